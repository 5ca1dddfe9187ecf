"""A generator whose model runs in vLLM, on a server or in this process.

    prompt with handles -> assembler -> text parts and memories -> vLLM -> token ids -> completion -> answer

The prompt is laid out here, by the room that lays it out for a model in process, and the answer's text, its end and its
usage come from the same `Completion`: only the model's forward passes happen elsewhere. `generator` is what users hold,
`server` and `offline` run the model for it, `wire` is what travels, `serve` says how a server is started. This room
does not know how answers are checked, streamed and counted: that is `answering`.
"""

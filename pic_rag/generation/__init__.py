"""Generation: prompts with handles in, answers out.

`answering` is what every generator does, with one `completion` an answer and `sampling` for the next token. `generator`
runs the model in this process: `engine` decodes, `turns` lets threads share it, `prefix` keeps what was read before,
`reader` is the LoRA that is on while memories are read. `vllm/` runs the model elsewhere. This room does not know how
memories are made or kept, nor where a question's documents came from.
"""

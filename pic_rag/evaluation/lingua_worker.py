"""The other end of `pic_rag.evaluation.lingua`: runs in a Python that has llmlingua, which need not have pic-rag.

It is started as a script with its settings as JSON. Requests come as lines of JSON on standard input, answers go as
lines of JSON to standard output: first one that says whether it is ready, then one for each request.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Any


def main() -> None:
    """Serve until standard input ends."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer

    def reply(make: Callable[[], dict[str, Any]]) -> bool:
        try:
            answer = make()
        except Exception as error:  # any of theirs: the caller is told, and decides
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        return "error" not in answer

    settings = json.loads(sys.argv[1])
    made: list[Any] = []
    if reply(lambda: _start(made, **settings)):
        for line in sys.stdin:
            request = json.loads(line)
            reply(lambda asked=request: {"text": _shorten(made[0], **asked)})  # type: ignore[misc]


def _start(made: list[Any], *, model: str, device: str, dtype: str, classifier: bool) -> dict[str, Any]:
    import llmlingua
    import torch

    loading = {"torch_dtype": getattr(torch, dtype)}
    options = {"device_map": device, "model_config": loading, "use_llmlingua2": classifier}
    made.append(llmlingua.PromptCompressor(model_name=model, **options))
    return {"versions": {name: version(name) for name in ("llmlingua", "transformers", "torch")}}


def _shorten(compressor: Any, *, texts: list[str], tokens: int, question: str | None) -> str:  # noqa: ANN401
    """The library's own settings, with a question those that its authors give for LongLLMLingua; but for the window.

    Its 200 tokens leave a text of under 400 nearly whole, whatever the target: a short text gets a smaller one.
    """
    if compressor.use_llmlingua2:
        return str(compressor.compress_prompt(texts, target_token=tokens)["compressed_prompt"])
    text_tokens = sum(len(compressor.tokenizer(text)["input_ids"]) for text in texts)
    aware = {
        "question": question,
        "concate_question": False,
        "rank_method": "longllmlingua",
        "condition_in_question": "after_condition",
        "condition_compare": True,
        "reorder_context": "sort",
        "dynamic_context_compression_ratio": 0.3,
    }
    window = min(200, max(20, text_tokens // 8))
    options = aware if question else {}
    shortened = compressor.compress_prompt(texts, target_token=tokens, iterative_size=window, **options)
    return str(shortened["compressed_prompt"])


if __name__ == "__main__":
    main()

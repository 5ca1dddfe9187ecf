"""LLMLingua, run by a Python that it works in.

LLMLingua (arXiv 2310.05736) drops the tokens that a small LM finds easy to guess. The package llmlingua 0.2.2 reads
keys and values as tuples, which transformers gave up after 4.47: with the transformers of pic-rag it raises on every
prompt over 200 tokens. So it lives in an environment of its own, and this file talks to it over a pipe.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO, cast

PYTHON_VARIABLE = "PIC_RAG_LLMLINGUA_PYTHON"
REQUIREMENTS = "llmlingua==0.2.2 transformers==4.47.1 torch"
_INSTALL = (
    f"Install it in an environment of its own (python -m venv lingua; lingua/bin/pip install {REQUIREMENTS}) and set "
    f"{PYTHON_VARIABLE}=lingua/bin/python."
)
_WORKER = Path(__file__).with_name("lingua_worker.py")


class LinguaError(RuntimeError):
    """LLMLingua cannot be had, or failed; the message says which and what to do."""


class Lingua:
    """Shortens texts with LLMLingua, or with LLMLingua-2. A child process that ends with this object.

    Args:
        model: folder or hub id of the scoring LM; for LLMLingua-2 of its token classifier.
        python: a Python that has llmlingua; None: `PIC_RAG_LLMLINGUA_PYTHON`, else this one.
        device: as torch names it.
        dtype: that it computes in.
        classifier: whether this is LLMLingua-2.

    Attributes:
        versions: of llmlingua, transformers and torch over there.

    Raises:
        LinguaError: when it does not start.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        python: str | Path | None = None,
        device: str = "cpu",
        dtype: str = "float32",
        classifier: bool = False,
    ) -> None:
        self.python = str(python or os.environ.get(PYTHON_VARIABLE) or sys.executable)
        self._folder = tempfile.TemporaryDirectory(prefix="pic-rag-lingua-")
        readable = _readable_by_older(Path(model), Path(self._folder.name)) if Path(model).is_dir() else model
        settings = json.dumps({"model": str(readable), "device": device, "dtype": dtype, "classifier": classifier})
        try:
            self._process = subprocess.Popen(
                [self.python, str(_WORKER), settings],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, encoding="utf-8",
            )  # fmt: skip
        except OSError as error:
            raise LinguaError(f"python must be an interpreter, got {self.python!r}: {error}. {_INSTALL}") from error
        self._requests, self._answers = cast("TextIO", self._process.stdin), cast("TextIO", self._process.stdout)
        weakref.finalize(self, _stop, self._process)
        self.versions: dict[str, str] = self._receive("start")["versions"]

    def shorten(self, texts: Sequence[str], tokens: int, question: str | None = None) -> str:
        """The texts as one, shortened to about so many tokens of the scorer; how many they became is for you to count.

        Args:
            texts: documents.
            tokens: what to aim at.
            question: rank and score by what it asks (LongLLMLingua); None: whatever is asked.

        Raises:
            LinguaError: when LLMLingua raises.
        """
        request = json.dumps({"texts": list(texts), "tokens": tokens, "question": question})
        with contextlib.suppress(BrokenPipeError):  # it ended: there is no answer to read
            self._requests.write(request + "\n")
            self._requests.flush()
        return str(self._receive("shorten a text")["text"])

    def _receive(self, doing: str) -> dict[str, Any]:
        line = self._answers.readline()
        answer = json.loads(line) if line else {"error": f"it ended with exit code {self._process.wait()}"}
        if "error" not in answer:
            return dict(answer)
        reason = answer["error"]
        hint = _INSTALL if reason.startswith("ModuleNotFoundError") else _hint(reason)
        raise LinguaError(f"LLMLingua must {doing} in {self.python}, got {reason}.{hint and ' ' + hint}")


def _hint(reason: str) -> str:
    if "tiktoken" in reason:
        return (
            "llmlingua needs OpenAI's cl100k_base: without network set TIKTOKEN_CACHE_DIR to a folder that holds it, "
            "such as llama_index/core/_static/tiktoken_cache of llama-index-core."
        )
    return ""


def _stop(process: subprocess.Popen[str]) -> None:
    """Close the pipes, at which the worker ends; it may still be busy."""
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
    process.kill()
    process.wait()


def _readable_by_older(folder: Path, target: Path) -> Path:
    """The same model with the three settings that transformers 4 knows by other names."""
    target = target / folder.resolve().name  # LLMLingua-2 reads in the name which tokenizer it has
    target.mkdir()
    for path in folder.iterdir():
        if path.is_file() and path.name not in ("config.json", "tokenizer_config.json"):
            (target / path.name).symlink_to(path.resolve())
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    rope = config.get("rope_parameters") or {}
    renamed = {"rope_theta": rope.get("rope_theta"), "torch_dtype": config.get("dtype")}
    config |= {name: value for name, value in renamed.items() if value is not None}
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    if tokenizer.get("tokenizer_class") == "TokenizersBackend":
        tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (target / "tokenizer_config.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return target

"""What a benchmark measures: the grid, and how often. Standard library only."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

SYSTEMS = ("text", "truncate", "pic", "llmlingua", "longllmlingua", "llmlingua2")
"""Systems of `pic_rag.evaluation.systems` that can be timed; full text is always measured, the others against it."""


def _field(default: Any, help: str) -> Any:  # noqa: ANN401 - a dataclass field of any type
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Suite:
    """The settings of a run.

    Raises:
        ValueError: when a field breaks its rule; the message names the field, the rule and the value.
    """

    contexts: tuple[int, ...] = _field((1024, 4096, 16384, 65536), "text tokens of a question's documents")
    ratios: tuple[int, ...] = _field((4, 16, 64), "text tokens per memory token")
    batch_sizes: tuple[int, ...] = _field((1, 32), "questions asked at once, each with documents of its own")
    systems: tuple[str, ...] = _field(SYSTEMS, "what is measured")
    repeats: int = _field(5, "repetitions, each with new documents; every figure is their median")
    new_tokens: int = _field(32, "tokens of every answer")
    document_tokens: int = _field(1024, "text tokens of a document")
    patience_s: float = _field(60.0, "a measurement that takes longer is not repeated, in seconds")
    compress_tokens: int = _field(2**18, "text tokens that the compressor's own speed is measured on")
    most_tokens: int = _field(2**21, "text tokens of all questions asked at once; larger measurements are skipped")
    lingua_tokens: int = _field(2**16, "the same for LLMLingua, which takes them a window at a time")

    def __post_init__(self) -> None:
        for name in ("contexts", "ratios", "batch_sizes"):
            values = getattr(self, name)
            if not values or min(values) < 1:
                raise ValueError(f"{name} must hold at least one whole number above 0, got {values!r}.")
        for name in ("repeats", "document_tokens", "patience_s", "compress_tokens", "most_tokens", "lingua_tokens"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a number above 0, got {getattr(self, name)!r}.")
        if self.new_tokens < 2:
            raise ValueError(f"new_tokens must be at least 2 to time decoding, got {self.new_tokens}.")
        unknown = [name for name in self.systems if name not in SYSTEMS]
        if unknown:
            raise ValueError(f"systems must be some of {', '.join(SYSTEMS)}, got {unknown[0]!r}.")


SUITES = {
    "cpu": Suite(
        contexts=(1024, 4096, 16384),
        batch_sizes=(1, 4),
        systems=("text", "truncate", "pic", "llmlingua", "llmlingua2"),
        repeats=3,
        new_tokens=16,
        patience_s=15.0,
        compress_tokens=8192,
        most_tokens=16384,
        lingua_tokens=4096,
    ),
    "gpu": Suite(repeats=3, new_tokens=16, patience_s=8.0, lingua_tokens=2**14),
}
"""`cpu` takes a quarter of an hour on two cores with the embedded models; `gpu` is the whole grid: see `--minutes`."""

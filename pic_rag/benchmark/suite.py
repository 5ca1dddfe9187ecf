"""What a benchmark measures: the grid, and how often. Standard library only."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pic_rag.config import described

SYSTEMS = ("text", "truncate", "pic", "llmlingua", "longllmlingua", "llmlingua2")
"""Systems of `pic_rag.evaluation.systems` that can be timed; full text is always measured, the others against it."""


@dataclass(frozen=True)
class Suite:
    """The settings of a run.

    Raises:
        ValueError: when a field breaks its rule; the message names the field, the rule and the value.
    """

    contexts: tuple[int, ...] = described("text tokens of a question's documents", default=(1024, 4096, 16384, 65536))
    ratios: tuple[int, ...] = described("text tokens per memory token", default=(4, 16, 64))
    batch_sizes: tuple[int, ...] = described("questions asked at once, each with documents of its own", default=(1, 32))
    systems: tuple[str, ...] = described("what is measured", default=SYSTEMS)
    repeats: int = described("repetitions, each with new documents; every figure is their median", default=5)
    new_tokens: int = described("tokens of every answer", default=32)
    document_tokens: int = described("text tokens of a document", default=1024)
    patience_s: float = described("a measurement that takes longer is not repeated, in seconds", default=60.0)
    compress_tokens: int = described("text tokens that the compressor's own speed is measured on", default=2**18)
    most_tokens: int = described(
        "text tokens of all questions asked at once; larger measurements are skipped", default=2**21
    )
    lingua_tokens: int = described("the same for LLMLingua, which takes them a window at a time", default=2**16)

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

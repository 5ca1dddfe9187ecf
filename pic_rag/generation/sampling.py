"""How the next token is chosen: greedily, or drawn from a temperature and a nucleus with random numbers of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from transformers import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from pic_rag.checks import check_whole

_GREEDY_BELOW = 1e-6  # scores divided by less than that are beyond float32


@dataclass(frozen=True)
class Sampling:
    """Settings of one decoding, checked.

    Attributes:
        max_new_tokens: length in tokens at which an answer ends in any case.
        stop: strings that end an answer and are not part of it; None: none.
        temperature: 0, or less than a millionth, decodes greedily.
        top_p: probability mass that tokens are drawn from, in (0, 1].
        seed: of the draws; None takes a new one from the operating system.
    """

    max_new_tokens: int = 128
    stop: Sequence[str] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_new_tokens", check_whole("max_new_tokens", self.max_new_tokens))
        if self.stop is None:  # as OpenAI's clients have it
            object.__setattr__(self, "stop", ())
        if isinstance(self.stop, str) or not all(isinstance(each, str) and each for each in self.stop):
            raise ValueError(f"stop must be a list of non-empty strings, got {self.stop!r}. Write stop=['END'].")
        if not isinstance(self.temperature, Real) or not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}. Use 0 to decode greedily.")
        if not isinstance(self.top_p, Real) or not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}. Use 1 to keep every token.")
        if self.seed is not None and not (isinstance(self.seed, int) and 0 <= self.seed < 2**63):
            raise ValueError(f"seed must be a whole number from 0 to 2**63 - 1, got {self.seed!r}. Use None for any.")

    def processors(self, prompts: int, device: torch.device) -> LogitsProcessorList:
        """What `model.generate` applies to the scores of a batch of `prompts`; nothing when greedy."""
        if self.temperature < _GREEDY_BELOW:
            return LogitsProcessorList()
        nucleus = [TopPLogitsWarper(self.top_p)] if self.top_p < 1.0 else []
        draw = SeededDraw(self.seed, prompts, device)
        return LogitsProcessorList([TemperatureLogitsWarper(float(self.temperature)), *nucleus, draw])


class SeededDraw(LogitsProcessor):
    """Draws each row's token itself and leaves greedy decoding no other choice.

    `do_sample=True` would draw from torch's global random numbers: a seed would disturb the caller's, and a row's
    tokens would depend on the rows beside it. Here every row has its own numbers, all from the same seed, so
    a batch gives what its prompts give alone.
    """

    def __init__(self, seed: int | None, prompts: int, device: torch.device) -> None:
        self._generators = [torch.Generator(device) for _ in range(prompts)]
        for generator in self._generators:
            generator.seed() if seed is None else generator.manual_seed(seed)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`(prompts, vocabulary)` scores in, the same shape out: 0 at the drawn token, minus infinity elsewhere."""
        rows = zip(scores.float().softmax(-1), self._generators, strict=True)
        drawn = torch.stack([torch.multinomial(row, 1, generator=generator) for row, generator in rows])
        return torch.full_like(scores, float("-inf")).scatter(1, drawn, 0.0)

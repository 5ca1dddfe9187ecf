"""Which ratio each text gets: as the caller says, or down a ladder until its memory is faithful enough.

This file does not know who makes memories.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Real
from typing import TypeVar, cast

from pic_rag.memory import Memory

T = TypeVar("T")

Ratio = int | Sequence[int | None] | None
"""Text tokens per memory token: one number for all texts, or one for each text, the last of which serves all texts
after it; None is the compressor's default. Retrieved texts come best first, so `(2, 16)` reads the best one closely."""


def ratio_of_each(ratio: Ratio, texts: int, check: Callable[[int | None], T]) -> list[T]:
    """What `check` makes of the ratio of each of so many texts.

    Args:
        ratio: as the caller gave it.
        texts: how many there are.
        check: raises for a ratio that is not served; it sees all of them, however few the texts are.

    Raises:
        ValueError: when there is a sequence without ratios.

    >>> ratio_of_each((2, 16), 3, lambda ratio: ratio)
    [2, 16, 16]
    """
    several = isinstance(ratio, Sequence) and not isinstance(ratio, (str, bytes))
    given = list(cast("Sequence[int | None]", ratio)) if several else [cast("int | None", ratio)]
    if not given:
        raise ValueError(f"ratio must be a number or a sequence of at least one, got {ratio!r}. None is the default.")
    checked = [check(own) for own in given]
    return [*checked[:texts], *checked[-1:] * (texts - len(checked))]


def check_floor(min_fidelity: float) -> None:
    """Raise ValueError where a floor under the fidelity is not a number from 0 to 1."""
    if isinstance(min_fidelity, bool) or not isinstance(min_fidelity, Real) or not 0 <= min_fidelity <= 1:
        raise ValueError(f"min_fidelity must be a number from 0 to 1, got {min_fidelity!r}. Use 1 for raw text.")


def descend(
    ladders: Sequence[Sequence[int]],
    min_fidelity: float,
    attempt: Callable[[Sequence[int], int], Sequence[Memory]],
) -> list[Memory]:
    """The memory of the highest ratio of each text that is faithful enough.

    Args:
        ladders: the ratios that each text may get, the lowest of which must do.
        min_fidelity: the floor, 0 to 1.
        attempt: makes the memories of the texts with these numbers at a ratio; they carry their fidelity.

    Raises:
        ValueError: when the floor is out of range.
    """
    check_floor(min_fidelity)
    chosen: dict[int, Memory] = {}
    pending = set(range(len(ladders)))
    for ratio in sorted({ratio for ladder in ladders for ratio in ladder}, reverse=True):
        numbers = [number for number in sorted(pending) if ratio in ladders[number]]
        if numbers:
            chosen.update(zip(numbers, attempt(numbers, ratio), strict=True))
        pending -= {number for number in numbers if (chosen[number].fidelity or 0.0) >= min_fidelity}
    return [chosen[number] for number in range(len(ladders))]

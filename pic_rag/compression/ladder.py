"""The ladder: ratios from the highest down, until a memory is faithful enough. It does not know who makes memories."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pic_rag.memory import Memory


def descend(
    texts: int, ladder: Sequence[int], min_fidelity: float, attempt: Callable[[Sequence[int], int], Sequence[Memory]]
) -> list[Memory]:
    """The first memory of each text, down a ladder of ratios, that is faithful enough.

    Args:
        texts: how many there are.
        ladder: ratios to try, the last of which must do.
        min_fidelity: the floor, 0 to 1.
        attempt: makes the memories of the texts with these numbers at a ratio; they carry their fidelity.

    Raises:
        ValueError: when the floor is out of range.
    """
    if isinstance(min_fidelity, bool) or not isinstance(min_fidelity, (int, float)) or not 0 <= min_fidelity <= 1:
        raise ValueError(f"min_fidelity must be a number from 0 to 1, got {min_fidelity!r}. Use 1 for raw text.")
    chosen: dict[int, Memory] = {}
    pending: Sequence[int] = range(texts)
    for ratio in ladder:
        if pending:
            chosen.update(zip(pending, attempt(pending, ratio), strict=True))
        pending = [number for number in pending if (chosen[number].fidelity or 0.0) < min_fidelity]
    return [chosen[number] for number in range(texts)]

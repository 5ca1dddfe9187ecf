"""Progress bars, alike for all that takes long."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm


def progress_bar(
    progress: bool | None,
    items: Iterable[Any] | None = None,
    **options: Any,  # noqa: ANN401 - tqdm's
) -> tqdm[Any]:
    """A bar on standard error that appears once it takes over a second.

    Args:
        progress: True shows it, False does not; None shows it on a terminal.
        items: to go through; None for a bar that is updated by hand.
        **options: of tqdm, such as `total`, `desc` and `unit`.
    """
    return tqdm(items, **{"delay": 1.0, "disable": None if progress is None else not progress, **options})

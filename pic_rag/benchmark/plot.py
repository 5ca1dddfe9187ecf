"""The picture of a report: time to the first token and to the end of the answer, over the length of the context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pic_rag.reporting import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pic_rag.benchmark.report import BenchRow

_PANELS = {"first_token_s": "to the first token, seconds", "total_s": "to the end of the answer, seconds"}
_MARKS = {None: "-", "hit": "-", "miss": "--", "prefix": ":"}


def draw(rows: Sequence[BenchRow]) -> Figure:
    """Two panels for every batch size, a line for every system, ratio and kind of cache.

    Raises:
        ImportError: without matplotlib.
    """
    batches = sorted({row.batch_size for row in rows})
    answered = [row for row in rows if row.total_s is not None]
    figure = new_figure(12.0, 1.0 + 4.0 * len(batches))
    panels = figure.subplots(len(batches), len(_PANELS), squeeze=False)
    for batch, pair in zip(batches, panels, strict=True):
        for field, axes in zip(_PANELS, pair, strict=True):
            _draw_panel(axes, answered, batch, field)
    lines = {str(line.get_label()): line for axes in panels.flat for line in axes.lines}
    figure.legend(list(lines.values()), list(lines), loc="outside right upper", fontsize=8)
    return figure


def _draw_panel(axes: Axes, rows: Sequence[BenchRow], batch: int, field: str) -> None:
    from matplotlib import colormaps
    from matplotlib.ticker import NullLocator

    colours: dict[tuple[str, int | None], int] = {}  # the same in every panel: one a system and ratio
    for system, ratio, cache in dict.fromkeys((row.system, row.ratio, row.cache) for row in rows):
        colour = colormaps["tab20"](colours.setdefault((system, ratio), len(colours)) % 20)
        kind = (system, ratio, cache, batch)
        points = [row for row in rows if (row.system, row.ratio, row.cache, row.batch_size) == kind]
        if points:
            label = " ".join(str(part) for part in (system, ratio and f"{ratio}x", cache) if part)
            contexts, times = zip(*((row.context_tokens, getattr(row, field)) for row in points), strict=True)
            axes.plot(contexts, times, _MARKS[cache], marker=".", label=label, color=colour)
    axes.set(xscale="log", yscale="log", xlabel="text tokens of the documents", ylabel=_PANELS[field])
    shown = sorted({row.context_tokens for row in rows})
    axes.set_xticks(shown, [f"{context:,}" for context in shown])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_title(f"{batch} question{'s' * (batch > 1)} at once", fontsize=10)
    axes.grid(True, which="both", alpha=0.25)

"""Plots of a study: learning curves, and quality against ratio. matplotlib (the extra `plot`), without a window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from pic_rag.reporting import new_figure
from pic_rag.study.records import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BOUND_STYLE: dict[str, Any] = {"color": "#888888", "linewidth": 1.0, "linestyle": "--"}


def draw_curves(results: Results) -> Figure:
    """Question loss against training steps: a panel for each ratio, a line for each arm's mean, a band over seeds.

    Raises:
        ImportError: without matplotlib.
    """
    ratios = results.study.measured.ratios
    figure = new_figure(4.2 * len(ratios), 3.6)
    panels = figure.subplots(1, len(ratios), squeeze=False)[0]
    for axes, ratio in zip(panels, ratios, strict=True):
        for arm, own in results.runs.items():
            curves = [{step: loss for step, _, loss in run.curve("loss", ratio)} for run in own]
            _draw_band(axes, arm, curves)
        axes.set_title(f"ratio {ratio}")
        axes.set_xlabel("optimiser steps")
    panels[0].set_ylabel("loss on held-out questions, nats a token")
    panels[-1].legend(frameon=False)
    return figure


def draw_quality(results: Results) -> Figure:
    """F1 after training against the ratio: a line for each arm, a dashed one for every system without a ratio.

    Raises:
        ImportError: without matplotlib.
    """
    figure = new_figure(6.0, 4.0)
    axes = figure.subplots()
    arms = {
        arm: [{line["ratio"]: 100 * line["f1"] for line in run.final("pic")} for run in own if run.finished]
        for arm, own in results.runs.items()
    }
    for arm, scores in arms.items():
        _draw_band(axes, arm, scores, "o")
    bounds: dict[str, dict[int, float]] = {}
    for line in results.bounds:
        bounds.setdefault(line["system"], {})[line["ratio"]] = 100 * line["f1"]
    for system, points in bounds.items():
        everywhere = points.get(None)  # type: ignore[call-overload]
        shown = dict.fromkeys(results.study.measured.ratios, everywhere) if None in points else points
        axes.plot(list(shown), list(shown.values()), **_BOUND_STYLE)
        end = (max(shown), shown[max(shown)])
        axes.annotate(system, end, textcoords="offset points", xytext=(0, 3), ha="right", fontsize=8, color="#555555")
    if bounds or any(arms.values()):  # of nothing there is no logarithm
        axes.set_xscale("log", base=2)
    axes.set_xticks(results.study.measured.ratios, list(map(str, results.study.measured.ratios)))
    axes.set_xlabel("text tokens per memory token")
    axes.set_ylabel("F1, per cent")
    axes.legend(frameon=False)
    return figure


def _draw_band(axes: Axes, name: str, curves: Sequence[Mapping[int, float]], marker: str = "") -> None:
    """The mean of some curves as a line, from the lowest to the highest as a band; where all of them have a point."""
    begun = [curve for curve in curves if curve]
    shared = sorted(set.intersection(*map(set, begun))) if begun else []
    values = [[curve[place] for curve in begun] for place in shared]
    [line] = axes.plot(shared, list(map(fmean, values)), label=name, marker=marker)
    axes.fill_between(shared, list(map(min, values)), list(map(max, values)), alpha=0.2, color=line.get_color(), lw=0)

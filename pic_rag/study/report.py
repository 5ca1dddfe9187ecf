"""A study's report: tables in Markdown and plots, from its metrics files alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, stdev

from pic_rag.reporting import markdown_table
from pic_rag.study.config import Measured
from pic_rag.study.records import Curve, Line, Results, best, reached, read_results

SCORES = {"f1": "F1", "em": "EM", "contains_answer": "answer contained", "agreement": "agreement"}
"""The scores of a table, in per cent, and their headings."""


def write_report(folder: str | Path) -> list[Path]:
    """Write `report.md`, `curves.png` and `quality.png` into a study's folder.

    Returns:
        The files written.

    Raises:
        FileNotFoundError: when the folder holds no study.
        ImportError: without matplotlib.
    """
    from pic_rag.study.plots import draw_curves, draw_quality

    folder = Path(folder)
    results = read_results(folder)
    report = folder / "report.md"
    report.write_text(render(results), encoding="utf-8")
    plots = {"curves.png": draw_curves, "quality.png": draw_quality}
    for name, draw in plots.items():
        draw(results).savefig(folder / name, metadata={"Software": None})  # the same files, whatever the version
    return [report, *(folder / name for name in plots)]


def render(results: Results) -> str:
    """The report as Markdown."""
    study = results.study
    runs = [run for own in results.runs.values() for run in own]
    finished = sum(run.finished for run in runs)
    parts = [
        f"Made by `pic-rag study --report` from the metrics files beside it. {finished} of {len(runs)} runs are "
        f"finished; the figures are of these, mean ± standard deviation over seeds {', '.join(map(str, study.seeds))}. "
        f"Questions: `{_slice(study.measured)}`. Text kept: tokens of their documents that the generator, reading a "
        "document's memory and the true words before, expects next, in per cent.",
        "## Answers",
        markdown_table(
            ["system", "ratio", *SCORES.values(), "KL to full text", "text kept", "runs"], list(_answer_rows(results))
        ),
    ]
    if reading := _reading(results):
        parts += ["## Learning to read", _READING_NOTE, reading]
    if study.reference:
        parts += [f"## Training to reach the best of `{study.reference}`", _race_note(study.reference), _race(results)]
    parts += ["## Arms", _arms(results)]
    return "# Study\n\n" + "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _slice(measured: Measured) -> str:
    """The questions as the options of `pic-rag eval` name them."""
    options = [f"--data {Path(measured.data).name}", f"--every {measured.every}", f"--offset {measured.offset}"]
    options += [f"--limit {measured.limit}"] if measured.limit else []
    return " ".join([*options, *(["--gold-only"] if measured.gold_only else [])])


def _answer_rows(results: Results) -> Iterator[list[str]]:
    for line in results.bounds:
        yield _answer_row(line["system"], line["ratio"], [line], [], [])
    for arm, own in results.runs.items():
        finished = [run for run in own if run.finished]
        read = [line for run in finished for line in run.final("text+reader")]
        if read:
            yield _answer_row(f"text, with the reader of {arm}", None, read, [], [])
        for ratio in results.study.measured.ratios:
            lines = [line for run in finished for line in run.final("pic") if line["ratio"] == ratio]
            kl, kept = (
                [value for run in finished for *_, value in run.curve(name, ratio)[-1:]]
                for name in ("kl", "text_accuracy")
            )
            if lines:
                yield _answer_row(arm, ratio, lines, kl, [100 * value for value in kept])


def _answer_row(
    name: str, ratio: int | None, lines: Sequence[Line], kl: Sequence[float], kept: Sequence[float]
) -> list[str]:
    scores = [[100 * line[score] for line in lines if line[score] is not None] for score in SCORES]
    spread = [_spread(values, ".1f") for values in scores]
    rest = [_spread(kl, ".3f"), _spread(kept, ".1f"), str(len(lines))]
    return [name, "" if ratio is None else str(ratio), *spread, *rest]


_READING_NOTE = (
    "Loss of the same tokens after so many steps: what the text's own words before do not tell has to be read from the "
    "memory."
)


def _reading(results: Results) -> str:
    """The curves of the text loss as a table; nothing where it was not measured."""
    curves = {
        (arm, ratio): [{step: loss for step, _, loss in run.curve("text_loss", ratio)} for run in own if run.finished]
        for arm, own in results.runs.items()
        for ratio in results.study.measured.ratios
    }
    steps = sorted({step for runs in curves.values() for run in runs for step in run})
    rows = [
        [arm, str(ratio), *(_spread([run[step] for run in runs if step in run], ".3f") for step in steps)]
        for (arm, ratio), runs in curves.items()
        if any(runs)
    ]
    return markdown_table(["arm", "ratio", *map(str, steps)], rows) if rows else ""


def _race_note(reference: str) -> str:
    return (
        f"Best loss: the lowest teacher-forced loss on the questions. The steps and training seconds are those of the "
        f"first measurement at least as good as the best of `{reference}` with the same seed, in per cent of the steps "
        f"`{reference}` took; seeds that never got there are counted as such."
    )


def _race(results: Results) -> str:
    header = ["arm", "ratio", "best loss", "to best loss: steps", "seconds", "of its steps"]
    header += ["best F1", "to best F1: steps", "seconds", "of its steps"]
    rows = []
    for ratio in results.study.measured.ratios:
        for arm, own in results.runs.items():
            reference = results.runs[results.study.reference or arm]
            pairs = [(run, other) for run, other in zip(own, reference, strict=True) if run.finished and other.finished]
            losses, scores = (
                [(run.curve(name, ratio), other.curve(name, ratio)) for run, other in pairs] for name in ("loss", "f1")
            )
            if pairs:
                loss = _spread([best(curve, rising=False) for curve, _ in losses], ".3f")
                f1 = _spread([100 * best(curve, rising=True) for curve, _ in scores], ".1f")
                rows.append([arm, str(ratio), loss, *_time(losses, rising=False), f1, *_time(scores, rising=True)])
    return markdown_table(header, rows)


def _time(pairs: Sequence[tuple[Curve, Curve]], *, rising: bool) -> list[str]:
    """Steps, seconds and per cent of the reference's steps until a run is as good as the reference's best."""
    times, shares = [], []
    for curve, reference in pairs:
        goal = best(reference, rising=rising)
        taken, needed = (reached(each, goal, rising=rising) for each in (curve, reference))
        if taken and needed:
            times.append(taken)
            shares.append(100 * taken[0] / needed[0] if needed[0] else 100.0)
    if len(times) < len(pairs):
        return [f"{len(times)} of {len(pairs)} seeds", "", ""]
    steps, seconds = zip(*times, strict=True)
    return [_spread(steps, ".0f"), _spread(seconds, ".0f"), f"{_spread(shares, '.0f')} %"]


def _arms(results: Results) -> str:
    """What each arm changes, and how much was trained on what."""
    rows = []
    for arm, changed in results.study.arms.items():
        begun = [run.head for run in results.runs[arm] if run.head]
        done = sum(run.finished for run in results.runs[arm])
        steps, device = (str(begun[0]["steps"]), begun[0]["versions"]["device"]) if begun else ("", "")
        rows.append([arm, f"`{json.dumps(changed)}`" if changed else "the base", steps, str(done), device])
    return markdown_table(["arm", "changes", "steps", "finished runs", "device"], rows)


def _spread(values: Sequence[float], form: str) -> str:
    """Mean and sample standard deviation; the mean alone of one value; nothing of none.

    >>> _spread([1.0, 2.0, 3.0], ".1f"), _spread([2.0], ".1f"), _spread([], ".1f")
    ('2.0 ± 1.0', '2.0', '')
    """
    if not values:
        return ""
    return f"{fmean(values):{form}}" + (f" ± {stdev(values):{form}}" if len(values) > 1 else "")

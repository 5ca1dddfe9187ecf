"""The metrics files of a study, read back: no model is needed to look at what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pic_rag.study.config import StudyConfig, run_name
from pic_rag.training.lines import read_lines

STUDY_FILE = "study.yaml"
METRICS_FOLDER = "metrics"
BOUNDS_FILE = "bounds.jsonl"

Line = Mapping[str, Any]
Curve = Sequence[tuple[int, float, float]]
"""Steps, seconds and values, in the order of training."""


@dataclass(frozen=True)
class Run:
    """What was measured of an arm with a seed.

    Attributes:
        head: arm, seed, steps, configuration, versions; empty before the run has begun.
        losses: `step`, `seconds`, `ratio`, `loss`, `kl`, `accuracy` on the answers' tokens, `text_loss` and
            `text_accuracy` on the documents', in the order of training.
        answers: `step`, `seconds` and the fields of `pic_rag.evaluation.runner.EvalRow`, likewise.
        whole: False where the last line was cut while it was written.
    """

    head: Line
    losses: list[Line]
    answers: list[Line]
    whole: bool = True

    @property
    def finished(self) -> bool:
        """Whether there are all answers of the last step."""
        return self.whole and bool(self.final("pic"))

    def final(self, system: str) -> list[Line]:
        """The answers of a system after the last step, a line for each ratio."""
        return [line for line in self.answers if line["system"] == system and line["step"] == self.head["steps"]]

    def curve(self, name: str, ratio: int) -> Curve:
        """Steps, seconds and values of a measurement of the memories at a ratio."""
        lines = self.losses + [line for line in self.answers if line["system"] == "pic"]
        shown = [line for line in lines if line["ratio"] == ratio and name in line]
        return [(line["step"], line["seconds"], line[name]) for line in shown]


@dataclass(frozen=True)
class Results:
    """A study's metrics files.

    Attributes:
        study: what was to be run.
        runs: what was, arm by arm; those that have not begun are empty.
        bounds: answers of systems that no arm changes, such as full text.
    """

    study: StudyConfig
    runs: Mapping[str, Sequence[Run]]
    bounds: Sequence[Line]


def metrics_path(folder: Path, arm: str, seed: int) -> Path:
    """The metrics file of a run."""
    return folder / METRICS_FOLDER / f"{run_name(arm, seed)}.jsonl"


def read_results(folder: str | Path) -> Results:
    """All that a study has measured so far.

    Raises:
        FileNotFoundError: when the folder holds no study.
        ValueError: when a file of it is damaged.
    """
    folder = Path(folder)
    study = StudyConfig.load(folder / STUDY_FILE)
    runs = {arm: [read_run(metrics_path(folder, arm, seed)) for seed in study.seeds] for arm in study.arms}
    return Results(study, runs, read_bounds(folder / METRICS_FOLDER / BOUNDS_FILE)[1])


def read_bounds(path: Path) -> tuple[Line, list[Line]]:
    """What the answers of a bounds file depend on, empty where an older pic-rag did not write it, and the answers."""
    lines = read_lines(path)
    head = next((line for line in lines if "system" not in line), {})
    return head, [line for line in lines if "system" in line]


def read_run(path: Path) -> Run:
    """A metrics file; an empty run when there is none yet."""
    head, *lines = read_lines(path) or [{}]
    return Run(
        head,
        [line for line in lines if "system" not in line],
        [line for line in lines if "system" in line],
        whole=not path.exists() or path.read_bytes().endswith(b"\n"),
    )


def best(curve: Curve, *, rising: bool) -> float:
    """The best value of a curve: the highest if it rises with quality, else the lowest."""
    values = [value for *_, value in curve]
    return max(values) if rising else min(values)


def reached(curve: Curve, goal: float, *, rising: bool) -> tuple[int, float] | None:
    """Step and seconds of the first value that is as good as a goal; None when none is.

    >>> reached([(0, 0.0, 5.0), (100, 9.5, 3.0), (200, 19.0, 2.0)], 3.0, rising=False)
    (100, 9.5)
    """
    for step, seconds, value in curve:
        if value == goal or (value > goal) is rising:
            return step, seconds
    return None

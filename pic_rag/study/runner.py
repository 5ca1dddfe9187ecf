"""Runs a study: trains what is not trained yet, and leaves metrics files that are small enough for version control."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator

from pic_rag.questions import Question, pick, read_questions
from pic_rag.reporting import versions
from pic_rag.study.config import Measured, StudyConfig
from pic_rag.study.records import BOUNDS_FILE, METRICS_FOLDER, STUDY_FILE, metrics_path, read_bounds, read_run
from pic_rag.study.watch import Watch, answer_line, answers
from pic_rag.training.config import TrainConfig, from_demo
from pic_rag.training.guards import launched, sole_writer
from pic_rag.training.lines import begin_lines, write_lines
from pic_rag.training.loop import COMPRESSOR_FOLDER, Trainer

logger = logging.getLogger(__name__)


def run_study(
    study: StudyConfig,
    folder: str | Path,
    *,
    arms: Sequence[str] | None = None,
    minutes: float | None = None,
    progress: bool | None = None,
) -> bool:
    """Train and measure every arm with every seed, one after the other, in this process.

    Args:
        study: what is compared.
        folder: receives `study.yaml` and `metrics/`, which are small; and `runs/`, which is large and ignored by git.
            Finished runs found there are skipped, others are resumed.
        arms: only these, for other processes may train others in the same folder; None: all.
        minutes: stop after that long; calling again goes on.
        progress: False hides the bars; None shows them on a terminal.

    Returns:
        Whether every run of these arms is finished.

    Raises:
        ValueError: when an arm is none of the study's, a run in `folder` was made with another configuration or is
            being trained by another process, a ratio is not served by an arm, a question has no document, or several
            processes were launched together.
    """
    folder = Path(folder)
    processes = launched(Accelerator())
    if processes > 1:
        raise ValueError(
            f"A study must run in one process, got {processes} launched together. Start it without a launcher; to "
            "spread the work, start it several times with different --arms."
        )
    if arms is not None and not arms:
        raise ValueError(f"arms must be some of {', '.join(study.arms)}, got none.")
    for arm in arms or ():
        if arm not in study.arms:
            raise ValueError(f"arms must be some of {', '.join(study.arms)}, got {arm!r}.")
    configs = {(arm, seed): study.training(arm, seed, folder) for arm, seed in study.runs}
    heads = {run: _head(*run, config, study.measured) for run, config in configs.items()}
    questions = _questions(study.measured)
    for run, head in heads.items():
        _check_same(metrics_path(folder, *run), head)
    _prepare(folder, study)
    runs = [(arm, seed) for arm, seed in study.runs if arms is None or arm in arms]
    stop = None if minutes is None else time.monotonic() + 60 * minutes
    for arm, seed in runs:
        left = None if stop is None else (stop - time.monotonic()) / 60
        if left is not None and left <= 0:
            return False
        path = metrics_path(folder, arm, seed)
        if not read_run(path).finished:
            logger.info("study: arm %s, seed %d", arm, seed)
            config, head = configs[arm, seed], heads[arm, seed]
            bounds = arm == next(iter(study.arms))  # once, also beside other processes
            _train(study.measured, bounds, questions, config, path, head, left, progress)
    return all(read_run(metrics_path(folder, arm, seed)).finished for arm, seed in runs)


def _train(
    measured: Measured,
    bounds: bool,
    questions: Sequence[Question],
    config: TrainConfig,
    path: Path,
    head: Mapping[str, Any],
    minutes: float | None,
    progress: bool | None,
) -> None:
    """One run, from where it stands; with the study's bounds, or without."""
    torch.compiler.reset()  # arms differ in depth: what was compiled for the last one is of no use
    accelerator = Accelerator()
    with sole_writer(Path(config.out), main_process=accelerator.is_main_process):
        trainer = Trainer(config, accelerator)
        begin_lines(path, head, trainer.step - 1)  # what is due where it stands is measured now, perhaps once more
        if bounds:
            _measure_bounds(measured, questions, path.with_name(BOUNDS_FILE), trainer, progress)
        watch = Watch(measured, questions, trainer, path, progress)
        watch(trainer)
        if trainer.step < config.steps:
            trainer.run(minutes, progress, watch)


def _measure_bounds(
    measured: Measured, questions: Sequence[Question], path: Path, trainer: Trainer, progress: bool | None
) -> None:
    """Answers of the systems that no arm changes, unless the file holds them; its head says what they depend on."""
    of_run = {name: getattr(trainer.config, name) for name in ("base_model", "precision")}
    head = json.loads(json.dumps({"measured": asdict(measured), **of_run}))
    if not measured.bounds:
        path.unlink(missing_ok=True)
    elif read_bounds(path)[0] != head:
        compressor = trainer.out / COMPRESSOR_FOLDER
        trainer.export(compressor)
        rows = answers(measured, questions, measured.bounds, compressor, trainer, progress)
        write_lines(path, head, *map(answer_line, rows))


def _questions(measured: Measured) -> list[Question]:
    source = read_questions(from_demo(measured.data), gold_only=measured.gold_only)
    questions = pick(source, every=measured.every, offset=measured.offset, limit=measured.limit)
    if not questions:
        raise ValueError(f"measured must leave at least one question of {measured.data!r}, got none.")
    for question in questions:
        if not any(context.document.strip() for context in question.contexts):
            raise ValueError(
                f"contexts must hold a document with text, got none of question {question.id!r} in {measured.data!r}. "
                "Correct the file, or leave the question out by every, offset or limit."
            )
    return questions


def _prepare(folder: Path, study: StudyConfig) -> None:
    (folder / METRICS_FOLDER).mkdir(parents=True, exist_ok=True)
    (folder / "runs").mkdir(exist_ok=True)
    (folder / "runs" / ".gitignore").write_text("*\n", encoding="utf-8")
    (folder / STUDY_FILE).write_text(yaml.safe_dump(study.to_dict(), sort_keys=False), encoding="utf-8")


def _head(arm: str, seed: int, config: TrainConfig, measured: Measured) -> dict[str, Any]:
    """The first line of a run's metrics file: all that its numbers depend on, and no path of this machine's."""
    values = {name: value for name, value in config.to_dict().items() if name not in ("out", "cache")}
    head = {"arm": arm, "seed": seed, "steps": config.steps, "config": values, "measured": asdict(measured)}
    return json.loads(json.dumps({**head, "versions": versions()}))


def _check_same(path: Path, head: Mapping[str, Any]) -> None:
    """Refuse to go on with a run that was made otherwise."""
    made = read_run(path).head
    for name in ("config", "measured"):
        if made and made[name] != head[name]:
            other = sorted(field for field, value in head[name].items() if made[name].get(field) != value)
            raise ValueError(
                f"The run in {path} must have the study's {name}, got another {other[0] if other else 'field'}. "
                "Take another folder, or delete that file and the run's folder."
            )

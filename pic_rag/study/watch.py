"""What is measured while a run is trained: the loss on questions often, answers now and then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from pic_rag.evaluation.runner import Row, evaluate
from pic_rag.questions import Question
from pic_rag.study.config import Measured
from pic_rag.training.batch import Batch, build_batches
from pic_rag.training.loop import COMPRESSOR_FOLDER, Trainer
from pic_rag.training.metrics import append_lines
from pic_rag.training.objective import Objective


class Watch:
    """Writes a line to a metrics file for every measurement that is due; `Trainer.run` calls it after each step.

    Args:
        measured: what is due when.
        questions: the slice that is measured on.
        trainer: the run.
        path: the metrics file, which has its head line.
        progress: as in `pic_rag.evaluation.runner.evaluate`.
    """

    def __init__(
        self, measured: Measured, questions: Sequence[Question], trainer: Trainer, path: Path, progress: bool | None
    ) -> None:
        self.measured = measured
        self.questions = questions
        self.path = path
        self.progress = progress
        self.objective = Objective(trainer.encoder, trainer.generator, distillation=0.0)
        self.batches = {ratio: self._pose(trainer, ratio) for ratio in measured.ratios}

    def __call__(self, trainer: Trainer) -> None:
        """Measure what is due after this step."""
        step, last = trainer.step, trainer.config.steps
        at = {"step": step, "seconds": round(trainer.seconds, 1)}
        if step % self.measured.loss_steps == 0 or step == last:
            device = trainer.accelerator.device
            losses = [{"ratio": ratio} | self._losses(ratio, device) for ratio in self.measured.ratios]
            append_lines(self.path, *(at | line for line in losses))
        if step in self.measured.answer_steps or step == last:
            append_lines(self.path, *(at | answer_line(row) for row in self._answers(trainer)))

    def _pose(self, trainer: Trainer, ratio: int) -> list[Batch]:
        posed = [trainer.factory.pose(asked, ratio) for asked in self.questions]
        return build_batches("questions", posed, trainer.config, self.measured.batch_size)

    @torch.no_grad()
    def _losses(self, ratio: int, device: torch.device) -> dict[str, float]:
        """Means over all answer tokens of the slice."""
        sums = torch.zeros(3, dtype=torch.float64, device=device)
        hidden = None if self.progress is None else not self.progress
        for batch in tqdm(self.batches[ratio], desc=f"loss {ratio}x", leave=False, delay=1.0, disable=hidden):
            sums += torch.stack(self.objective.measure(batch.to(device))) * len(batch.reads.target_ids)
        targets = sum(len(batch.reads.target_ids) for batch in self.batches[ratio])
        return dict(zip(("loss", "kl", "accuracy"), (sums / targets).tolist(), strict=True))

    def _answers(self, trainer: Trainer) -> list[Row]:
        """Answers of the compressor as it would be shipped now, and of its reader reading the text."""
        folder = trainer.out / COMPRESSOR_FOLDER
        trainer.export(folder)
        systems = ("pic", "text+reader") if trainer.config.reader_rank else ("pic",)
        return answers(self.measured, self.questions, systems, folder, trainer, self.progress)


def answers(
    measured: Measured,
    questions: Sequence[Question],
    systems: Sequence[str],
    compressor: Path,
    trainer: Trainer,
    progress: bool | None,
) -> list[Row]:
    """What `pic-rag eval` says of some systems, on the trainer's device and in its precision."""
    report = evaluate(
        questions,
        systems,
        measured.ratios,
        compressor=compressor,
        max_new_tokens=measured.max_new_tokens,
        batch_size=measured.batch_size,
        device=trainer.accelerator.device,
        dtype="bfloat16" if trainer.config.precision == "bf16" else "float32",
        progress=progress,
    )
    return report.rows


def answer_line(row: Row) -> dict[str, Any]:
    """A row as a metrics file holds it; its time would be another in every run."""
    return {name: value for name, value in asdict(row).items() if name != "seconds"}

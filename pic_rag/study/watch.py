"""What is measured while a run is trained: the loss on questions and on their documents often, answers now and then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pic_rag.evaluation.runner import EvalRow, evaluate
from pic_rag.progress import progress_bar
from pic_rag.questions import Question
from pic_rag.study.config import Measured
from pic_rag.training.batch import Batch, build_batches
from pic_rag.training.lines import append_lines
from pic_rag.training.loop import COMPRESSOR_FOLDER, Trainer
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
        self.asked = {ratio: self._asked(trainer, ratio) for ratio in measured.ratios}
        self.repeated = {ratio: self._repeated(trainer, ratio) for ratio in measured.ratios}

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

    def _asked(self, trainer: Trainer, ratio: int) -> list[Batch]:
        """The questions, to be answered from memories."""
        posed = [trainer.factory.pose(asked, ratio) for asked in self.questions]
        return build_batches("questions", posed, trainer.config, self.measured.batch_size)

    def _repeated(self, trainer: Trainer, ratio: int) -> list[Batch]:
        """The first document of each question, to be repeated from its memory."""
        documents = dict.fromkeys(asked.contexts[0].document for asked in self.questions)
        repeated = [trainer.factory.repeat(document, ratio) for document in documents]
        return build_batches("reconstruct", repeated, trainer.config, self.measured.batch_size)

    def _losses(self, ratio: int, device: torch.device) -> dict[str, float]:
        """Means over all tokens of the slice's answers, and over all of its documents."""
        loss, kl, accuracy = self._measure(self.asked[ratio], f"loss {ratio}x", device)
        text_loss, _, text_accuracy = self._measure(self.repeated[ratio], f"text {ratio}x", device)
        return {
            "loss": loss, "kl": kl, "accuracy": accuracy, "text_loss": text_loss, "text_accuracy": text_accuracy
        }  # fmt: skip

    @torch.no_grad()
    def _measure(self, batches: Sequence[Batch], title: str, device: torch.device) -> list[float]:
        """Cross-entropy, KL to the teacher and accuracy, means over all targets."""
        sums = torch.zeros(3, dtype=torch.float64, device=device)
        for batch in progress_bar(self.progress, batches, desc=title, leave=False):
            sums += torch.stack(self.objective.measure(batch.to(device))) * len(batch.reads.target_ids)
        return (sums / sum(len(batch.reads.target_ids) for batch in batches)).tolist()

    def _answers(self, trainer: Trainer) -> list[EvalRow]:
        """Answers of the compressor as it would be shipped now, and of its reader reading the text."""
        folder = trainer.out / COMPRESSOR_FOLDER
        trainer.export(folder)
        systems = ("pic", "text+reader") if trainer.config.reader_rank else ("pic",)
        rows = answers(self.measured, self.questions, ("text", *systems), folder, trainer, self.progress)
        return [row for row in rows if row.system in systems]  # full text is there to agree with


def answers(
    measured: Measured,
    questions: Sequence[Question],
    systems: Sequence[str],
    compressor: Path,
    trainer: Trainer,
    progress: bool | None,
) -> list[EvalRow]:
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


def answer_line(row: EvalRow) -> dict[str, Any]:
    """A row as a metrics file holds it; its time would be another in every run."""
    return {name: value for name, value in asdict(row).items() if name != "seconds"}

"""The metrics of a run: means over some steps, one JSON object a line."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from pic_rag.reporting import versions
from pic_rag.training.batch import Batch
from pic_rag.training.config import TrainConfig
from pic_rag.training.guards import diverged
from pic_rag.training.lines import append_lines, begin_lines


class MetricsLog:
    """Means over `log_steps`, one JSON object a line; numbers leave the device only when a line is written.

    `places_per_second` counts the places in rows of encoder and generator, filled or not, and not its teacher's.
    """

    def __init__(self, path: Path, step: int, seconds: float, config: TrainConfig) -> None:
        """Begin at a step, after so many seconds of training."""
        self.path = path
        self.config = config
        self.seconds = seconds
        begin_lines(path, {"config": config.to_dict(), "versions": versions()}, step)
        self._clear()

    def add(
        self, batch: Batch, loss: torch.Tensor, accuracy: torch.Tensor, gradient: torch.Tensor, rate: float
    ) -> None:
        """Take a step's numbers, which stay on their device."""
        self.losses.setdefault(batch.task, []).append(loss)
        self.accuracies.setdefault(batch.task, []).append(accuracy)
        self.gradients.append(gradient)
        self.rate = rate
        self.places += batch.layout.token_ids.numel() + batch.reads.ids.numel()

    def write(self, step: int, seconds: float) -> dict[str, float]:
        """Write the means since the last line; returns its losses and accuracies.

        Raises:
            ValueError: when one of them is no number; nothing is written.
        """
        line: dict[str, float] = {"step": step, "seconds": round(seconds, 1), "rate": self.rate}
        line["gradient_norm"] = torch.stack(self.gradients).mean().item()
        line["places_per_second"] = self.places / max(seconds - self.seconds, 1e-9)
        for task, losses in self.losses.items():
            line[f"{task}_loss"] = torch.stack(losses).mean().item()
            line[f"{task}_accuracy"] = torch.stack(self.accuracies[task]).mean().item()
        if not all(map(math.isfinite, line.values())):
            raise diverged("loss and gradient norm", step, self.config)
        append_lines(self.path, line)
        self.seconds = seconds
        self._clear()
        return {name: value for name, value in line.items() if name.endswith(("loss", "accuracy"))}

    def _clear(self) -> None:
        self.losses: dict[str, list[torch.Tensor]] = {}
        self.accuracies: dict[str, list[torch.Tensor]] = {}
        self.gradients: list[torch.Tensor] = []
        self.rate = 0.0
        self.places = 0

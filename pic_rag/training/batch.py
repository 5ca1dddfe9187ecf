"""Examples become the tensors of a step: encoder rows, generator rows, targets."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch.utils.data import Dataset

from pic_rag.layout import Layout, RowsFullError, arrange, build_layout
from pic_rag.mask import Places
from pic_rag.training.chat import MEMORY, Dialogue
from pic_rag.training.config import Stage, TrainConfig
from pic_rag.training.examples import Example, ExampleFactory, Ratios

_MOST_DRAWS = 1000  # examples that are too long, or without a memory, before a run gives up


@dataclass(frozen=True, eq=False)
class Rows:
    """Generator sequences packed in rows, each attending to itself alone.

    Attributes:
        ids: `(rows, places)` token ids, 0 where there is a memory token or nothing.
        slot: `(rows, places)` number of the memory token that sits here, -1 where none does.
        position_ids: `(rows, places)`.
        segment: `(rows, places)` the sequence a place belongs to, see `Places`.
        target_row: `(targets,)` row of the place that predicts a target.
        target_place: `(targets,)` its place.
        target_ids: `(targets,)` the token to predict.
    """

    ids: torch.Tensor
    slot: torch.Tensor
    position_ids: torch.Tensor
    segment: torch.Tensor
    target_row: torch.Tensor
    target_place: torch.Tensor
    target_ids: torch.Tensor

    @property
    def places(self) -> Places:
        """The rows as the PIC rule sees them: text alone, causal inside its sequence."""
        return Places(self.segment, torch.zeros_like(self.segment), torch.zeros_like(self.segment, dtype=torch.bool))

    def to(self, device: torch.device | str) -> Rows:
        """The same rows on another device."""
        return Rows(*(getattr(self, entry.name).to(device, non_blocking=True) for entry in fields(self)))

    def pin_memory(self) -> Rows:
        """The same rows in memory that a GPU copies from while it computes."""
        return Rows(*(getattr(self, entry.name).pin_memory() for entry in fields(self)))


@dataclass(frozen=True, eq=False)
class Batch:
    """One step's input. `teacher` has the targets of `reads` in the same order."""

    task: str
    layout: Layout
    reads: Rows
    teacher: Rows | None

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        teacher = self.teacher.to(device) if self.teacher else None
        return Batch(self.task, self.layout.to(device), self.reads.to(device), teacher)

    def pin_memory(self) -> Batch:
        """The same batch in memory that a GPU copies from while it computes; a DataLoader calls it."""
        teacher = self.teacher.pin_memory() if self.teacher else None
        return Batch(self.task, self.layout.pin_memory(), self.reads.pin_memory(), teacher)


class StepDataset(Dataset[Batch]):
    """The batch of every step: a function of the seed, the step and the device's rank, so a run resumes exactly."""

    def __init__(self, config: TrainConfig, factory: ExampleFactory, rank: int = 0) -> None:
        self.config = config
        self.factory = factory
        self.rank = rank

    def __len__(self) -> int:
        return self.config.steps

    def __getitem__(self, step: int) -> Batch:
        stage = self._stage(step)
        task = self._task(stage, step)
        ratios = stage.ratios or dict.fromkeys(self.config.pic.ratios, 1.0)
        random = np.random.default_rng([self.config.seed, step, self.rank])
        return fill_batch(task, self._draw(task, ratios, random), self.config)[0]

    def _draw(self, task: str, ratios: Ratios, random: np.random.Generator) -> list[Example]:
        """The step's examples: so many, or as many as its rows may hold. The first one has a memory."""
        examples: list[Example] = []
        room = np.array(self.config.rows or [np.inf] * 3) * self.config.row_places
        while len(examples) < self.config.examples_per_step:
            example = self._draw_one(task, ratios, random)
            room -= example.places
            if examples and room.min() < 0:
                break
            examples.append(example)
        for _ in range(_MOST_DRAWS):
            if any(example.segments for example in examples):
                return sorted(examples, key=lambda example: not example.segments)
            examples.append(self._draw_one(task, ratios, random))  # all were drawn as text
        raise ValueError(
            f"examples of the task {task} must have a document to compress, got {_MOST_DRAWS} in a row without. "
            "Name sources whose texts are not empty, or lower text_share."
        )

    def _draw_one(self, task: str, ratios: Ratios, random: np.random.Generator) -> Example:
        """An example that fits the generator's context, and a row where rows are fixed."""
        for _ in range(_MOST_DRAWS):
            example = self.factory.draw(task, ratios, random)
            fits_row = not self.config.rows or example.longest <= self.config.row_places
            if fits_row and self._reach(example) <= self.factory.context_places:
                return example
        if not fits_row:
            raise ValueError(
                f"row_places must hold examples of the task {task}, got {self.config.row_places}: {_MOST_DRAWS} in a "
                f"row were longer, the last one of {example.longest} places. Raise row_places or leave rows out."
            )
        raise ValueError(
            f"examples of the task {task} must fit the generator's context of {self.factory.context_places} places, "
            f"got {_MOST_DRAWS} in a row that do not, the last one of {self._reach(example)}. "
            "Split long documents, or lower documents, turns or text_tokens."
        )

    def _reach(self, example: Example) -> int:
        """Places of the context that the generator or its teacher needs."""
        steps = _steps([example], self.config)
        reads = len(example.reads.ids) if steps is None else int(steps[0].sum())
        return max(reads, len(example.teacher.ids) if example.teacher else 0)

    def _stage(self, step: int) -> Stage:
        """The stage a step belongs to."""
        ends = itertools.accumulate(stage.steps for stage in self.config.stages)
        return next(stage for stage, end in zip(self.config.stages, ends, strict=True) if step < end)

    def _task(self, stage: Stage, step: int) -> str:
        """The step's task, drawn from its stage's weights; the same on every device."""
        names, weights = zip(*sorted(stage.tasks.items()), strict=True)
        random = np.random.default_rng([self.config.seed, step])
        return str(random.choice(names, p=np.array(weights) / sum(weights)))


def build_batches(task: str, examples: Sequence[Example], config: TrainConfig, size: int) -> list[Batch]:
    """All the examples of a task, `size` a batch, or as many as the rows of a step hold."""
    batches = []
    start = 0
    while start < len(examples):
        batch, count = fill_batch(task, examples[start : start + size], config)
        batches.append(batch)
        start += count
    return batches


def fill_batch(task: str, examples: Sequence[Example], config: TrainConfig) -> tuple[Batch, int]:
    """A batch of the first examples, as many as the rows of a step hold; and how many they are."""
    for count in range(len(examples), 1, -1):
        with suppress(RowsFullError):
            return build_batch(task, examples[:count], config), count
    return build_batch(task, examples[:1], config), 1


def build_batch(task: str, examples: Sequence[Example], config: TrainConfig) -> Batch:
    """Pack examples of a task into the tensors of a step.

    Raises:
        RowsFullError: when the rows of a step do not hold them.
    """
    encoder_rows, reads_rows, teacher_rows = config.rows or (0, 0, 0)
    segments = [segment for example in examples for segment in example.segments]
    teachers = [example.teacher for example in examples if example.teacher is not None]
    return Batch(
        task,
        build_layout(segments, positions=config.pic.positions, row_places=config.row_places, rows=encoder_rows),
        build_rows([example.reads for example in examples], config.row_places, reads_rows, _steps(examples, config)),
        build_rows(teachers, config.row_places, teacher_rows) if teachers else None,
    )


def _steps(examples: Sequence[Example], config: TrainConfig) -> list[np.ndarray] | None:
    """How far the position of each token that is read lies from the one before; None: one, of all of them."""
    if config.pic.generator_positions == "contiguous":
        return None
    steps = [np.ones_like(example.reads.ids) for example in examples]
    for own, example in zip(steps, examples, strict=True):
        own[example.reads.ids == MEMORY] = example.strides
    return steps


def build_rows(
    sequences: Sequence[Dialogue], row_places: int, rows: int = 0, steps: Sequence[np.ndarray] | None = None
) -> Rows:
    """Pack generator sequences into rows, see `arrange`; memory tokens are numbered in the order of the sequences.

    `steps` says how far the position of each token lies from the one before; None: one.
    """
    lengths = [len(sequence.ids) for sequence in sequences]
    spots, (rows, width) = arrange(lengths, row_places, rows)
    ids, position_ids = np.zeros((2, rows, width), dtype=np.int64)
    slot = np.full((rows, width), -1, dtype=np.int64)
    owner = np.broadcast_to(-1 - np.arange(width), (rows, width)).copy()
    targets = []
    slots = 0
    for number, (sequence, (row, first)) in enumerate(zip(sequences, spots, strict=True)):
        here = slice(first, first + len(sequence.ids))
        is_memory = sequence.ids == MEMORY
        count = int(is_memory.sum())
        ids[row, here] = np.where(is_memory, 0, sequence.ids)
        slot[row, here][is_memory] = slots + np.arange(count)
        slots += count
        position_ids[row, here] = np.arange(len(sequence.ids)) if steps is None else steps[number].cumsum() - 1
        owner[row, here] = number
        place = np.flatnonzero(sequence.is_target)
        targets.append(np.stack([np.full(len(place), row), first + place - 1, sequence.ids[place]]))
    arrays = (ids, slot, position_ids, owner, *np.concatenate(targets, axis=1))
    return Rows(*(torch.from_numpy(array) for array in arrays))

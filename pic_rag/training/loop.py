"""The training loop: one device, or several under `accelerate launch`; resumable to the step."""

from __future__ import annotations

import logging
import math
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader

from pic_rag.encoder import PicEncoder
from pic_rag.models.backbone import ModelRef, end_token_ids, generator_id
from pic_rag.models.checkpoint import CONFIG_FILE, READER_FOLDER, Checkpoint
from pic_rag.progress import progress_bar
from pic_rag.training.batch import Batch, StepDataset
from pic_rag.training.config import TrainConfig
from pic_rag.training.corpora import Corpora
from pic_rag.training.examples import ExampleFactory
from pic_rag.training.guards import (
    are_finite,
    diverged,
    ignore_interrupts,
    launched,
    room_for_workers,
    sole_writer,
    uninterrupted,
)
from pic_rag.training.metrics import MetricsLog
from pic_rag.training.objective import Objective
from pic_rag.training.start import load_base, prepare_generator, save_reader, start_from
from pic_rag.training.state import ENDLESS, check_same, identity, past, read_state, settled_end, write_state

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
COMPRESSOR_FOLDER = "compressor"
_PACE_STEPS = 100


def train(
    config: TrainConfig, *, minutes: float | None = None, finish: bool = False, progress: bool | None = None
) -> Path:
    """Run a training configuration to its end, from its last checkpoint if there is one.

    Args:
        config: the run. Its `out` receives `metrics.jsonl`, `training_state.pt` and `compressor/`.
        minutes: stop after that long, with a checkpoint to resume from.
        finish: end the run within `minutes`: its stages are cut, or the last one extended, so that the learning rate
            reaches zero when the time is over. A run that was cut after its end was settled keeps it.
        progress: False hides the bar; None shows it on a terminal.

    Returns:
        The folder of the compressor as trained so far.

    Raises:
        ValueError: when `finish` comes without `minutes`, the run in `out` was started with another configuration,
            another process trains in `out`, several processes do not train together, or loss or weights are no
            numbers any more.
        RuntimeError: when another of several processes has ended; the steps taken are saved.
        KeyboardInterrupt: after Ctrl-C; the steps taken are saved.
    """
    if finish and minutes is None:
        raise ValueError("finish must come with minutes, the time there is, got none.")
    accelerator = Accelerator()
    if launched(accelerator) > accelerator.num_processes:
        raise ValueError(
            f"{launched(accelerator)} launched processes must train together, got each by itself. "
            "Without a GPU set ACCELERATE_USE_CPU=true; for a single process unset WORLD_SIZE."
        )
    with sole_writer(Path(config.out), main_process=accelerator.is_main_process):
        return Trainer(config, accelerator).run(minutes, progress, finish=finish)


class Trainer:
    """A run: its models, its optimiser, and where it stands."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator) -> None:
        self.config = config
        self.accelerator = accelerator
        self.out = Path(config.out)
        self.out.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(config.seed)
        base = load_base(config, accelerator.device)
        self.backbone = base
        self.base = base.ref
        embeddings = base.model.get_input_embeddings()
        self.encoder = PicEncoder(base.model, config.pic, embeddings, share_embeddings=True)
        self.generator = prepare_generator(base.model, config)
        self.factory = self._example_factory()
        if config.init_from:
            start_from(config.init_from, self.base, self.encoder, self.generator)
        elif self.encoder.pool is not None:
            self.encoder.pool.start_at(self.factory.token_counts(len(self.encoder.pool.token_salience)))
        if not config.learning_rate:  # the reader alone is trained: nothing is computed backwards through the encoder
            self.encoder.requires_grad_(False)
        for module in (self.encoder, self.generator):
            nn.Module.to(module, dtype=base.model.dtype)
        self.trained: list[torch.Tensor] = [*_trainable(self.encoder), *_trainable(self.generator)]
        self.master = [parameter.detach().float().clone() for parameter in self.trained]
        self.optimizer = torch.optim.AdamW(self._groups(), betas=(0.9, 0.95), fused=True)
        self.model = accelerator.prepare(Objective(self.encoder, self.generator, config.distillation))
        if config.compile:
            for decoder in (self.encoder.decoder, self.generator.get_decoder()):
                for layer in cast("nn.ModuleList", decoder.layers):  # all alike: compiled once, in seconds
                    layer.compile(dynamic=False if config.rows else None)
        self.step = 0
        self.saved: int | None = None  # the step of the last checkpoint
        self.seconds = 0.0
        self.given = config  # whose stages may end elsewhere than the run does
        self.end: int | None = None  # the last step, once `finish` has settled it or it was reached
        self._resume()

    def run(
        self,
        minutes: float | None,
        progress: bool | None,
        watch: Callable[[Trainer], None] | None = None,
        *,
        finish: bool = False,
    ) -> Path:
        """Train from where the run stands to its end, or for some minutes; `finish` as in `train`.

        `watch` is called after every step, before the step can become a checkpoint; what it takes is not training time.
        """
        if finish and minutes is not None and self.end is None:
            constant = (1 - self.config.decay_share) * minutes
            self.config = self.config.ending_at(ENDLESS)  # until it is known how many steps there is time for
            pace = self._of_main_process(self._run(constant, progress, watch))
            self.end = self.step + max(1, round(60 * (minutes - constant) / pace))
            self.config = self.config.ending_at(self.end)
            minutes = 1.1 * (minutes - constant)  # should the pace fall
        if self.step < self.config.steps:
            self._run(minutes, progress, watch)
        else:
            self._say_finished()
        return self.out / COMPRESSOR_FOLDER

    def _run(self, minutes: float | None, progress: bool | None, watch: Callable[[Trainer], None] | None) -> float:
        """Train for some minutes at most; returns seconds a step, of the latest steps."""
        started = saved = time.monotonic()
        ends: deque[float] = deque([started], maxlen=_PACE_STEPS)
        begin = started - self.seconds  # as if the run had been trained in one go
        shown = progress if self.accelerator.is_main_process else False
        log = None
        if self.accelerator.is_main_process:
            log = MetricsLog(self.out / METRICS_FILE, self.step, self.seconds, self.config)
        total = self.config.steps if self.config.steps < ENDLESS else None
        with progress_bar(shown, total=total, initial=self.step, desc="train") as bar:
            try:
                for batch in self._batches():
                    with uninterrupted():
                        self._take_step(batch, log)
                        ends.append(time.monotonic())
                        self.seconds = ends[-1] - begin
                        if log is not None and self._is_logged():
                            bar.set_postfix(log.write(self.step, self.seconds))
                    bar.update()
                    if watch is not None:
                        watch(self)
                        begin += time.monotonic() - ends[-1]
                    if ends[-1] - saved > 60 * self.config.checkpoint_minutes:
                        self._save()
                        saved = time.monotonic()
                    if minutes is not None and self._of_main_process(ends[-1] - started > 60 * minutes):
                        break
                self._save()
            except KeyboardInterrupt:
                if self.saved != self.step:
                    self._save()
                raise
        return (ends[-1] - ends[0]) / max(1, len(ends) - 1)

    def _say_finished(self) -> None:
        """Leave a finished run as it is; only a compressor that is gone is written again."""
        left = "nothing is left to do in %s after %d steps: choose another out, or change the stages to go on"
        logger.warning(left, self.out, self.step)
        folder = self.out / COMPRESSOR_FOLDER
        if self.accelerator.is_main_process and not (folder / CONFIG_FILE).exists():
            self.export(folder)

    def _batches(self) -> Iterator[Batch]:
        """The batch of every step to come; what a worker fails at is drawn again here, to show the error as it is."""
        dataset = StepDataset(self.config, self.factory, self.accelerator.process_index)
        steps = range(self.step, self.config.steps)
        with room_for_workers():
            batches = iter(_loader(dataset, steps, self.config.workers, pin=self.accelerator.device.type == "cuda"))
        for step in steps:
            try:
                with room_for_workers():
                    batch = next(batches)
            except Exception as error:
                error.__traceback__ = None  # it would hold the workers, which then take five seconds to end
                dataset[step]
                raise
            yield batch

    def _is_logged(self) -> bool:
        return self.step % self.config.log_steps == 0 or self.step == self.config.steps

    def _take_step(self, batch: Batch, log: MetricsLog | None) -> None:
        rate = self._rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        batch = batch.to(self.accelerator.device)
        with self._together():
            loss, accuracy = self.model(batch)
            self.accelerator.backward(loss)
        for master, parameter in zip(self.master, self.trained, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        gradient = nn.utils.clip_grad_norm_(self.master, self.config.clip or math.inf)
        self.optimizer.step()
        self._publish()
        self.step += 1
        if log is not None:
            log.add(batch, loss.detach(), accuracy.detach(), gradient.detach(), rate)

    def _of_main_process(self, value: float) -> float:
        """What the main process measured: all devices have to leave the loop at the same step."""
        if self.accelerator.num_processes == 1:
            return value
        with self._together():
            return float(broadcast(torch.tensor(float(value), device=self.accelerator.device)).item())

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Where processes wait for each other, between whole steps: when one has ended, the steps taken are saved."""
        try:
            yield
        except RuntimeError as error:
            if self.accelerator.num_processes == 1 or isinstance(error, torch.OutOfMemoryError):
                raise
            if self.saved != self.step:
                self._save()
            raise RuntimeError(
                f"All {self.accelerator.num_processes} processes must go on until the run ends, got one that has ended "
                "or failed: see its own message. Run the same command again to go on."
            ) from error

    def _publish(self) -> None:
        """Copy the float32 master weights into the model, which computes in its own dtype."""
        with torch.no_grad():
            torch._foreach_copy_(self.trained, self.master)

    def _rate(self, step: int) -> float:
        """Share of the peak learning rate: warm-up, constant, then linearly to zero."""
        config = self.config
        decay_steps = max(1, math.ceil(config.steps * config.decay_share))
        return min(1.0, (step + 1) / max(1, config.warmup_steps), (config.steps - step) / decay_steps)

    def _example_factory(self) -> ExampleFactory:
        """The corpora, tokenised by the main process if their cache does not hold them yet."""
        config = self.config
        cache = Path(config.cache) if config.cache else self.out / "tokens"
        with self.accelerator.main_process_first():
            corpora = Corpora(cache, self.backbone.tokenizer, config.held_out)
            texts = corpora.texts(config.texts) if config.texts else None
            questions = {corpora.questions(source): weight for source, weight in config.questions.items()}
        ends = end_token_ids(self.backbone.model, self.backbone.tokenizer)
        context = getattr(self.backbone.model.config.get_text_config(), "max_position_embeddings", None)
        return ExampleFactory(config, self.backbone.tokenizer, texts, questions, ends, context)

    def _groups(self) -> list[dict[str, Any]]:
        """AdamW's parameter groups: LoRA, head (converter, slots, pool), reader; `peak` is the highest rate."""
        config = self.config
        names = [name for name, parameter in self.encoder.named_parameters() if parameter.requires_grad]
        parts: dict[str, list[torch.Tensor]] = {"lora": [], "head": [], "reader": []}
        for number, master in enumerate(self.master):
            inside = number < len(names)
            part = ("lora" if names[number].startswith("decoder.") else "head") if inside else "reader"
            parts[part].append(master)
        rates = {
            "lora": config.learning_rate,
            "head": config.learning_rate * config.converter_rate_factor,
            "reader": config.reader_learning_rate,
        }
        return [
            {"params": part, "peak": rates[name], "lr": rates[name], "weight_decay": config.weight_decay}
            for name, part in parts.items()
            if part
        ]

    @uninterrupted()
    def _save(self) -> None:
        """Write the compressor and the resumable state; each file appears whole, and what diverged does not."""
        if not self.accelerator.is_main_process:
            return
        if not are_finite(self.master):
            raise diverged("weights", self.step, self.config)
        self.export(self.out / COMPRESSOR_FOLDER)
        finished = self.step == self.config.steps
        end = self.config.steps if finished or self.end is not None else None
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "config": identity(self.config),
            "base": self.base.id,
            "stages": past(self.config, self.step),
            "end": None if end is None else {"step": end, "stages": past(self.given)},
            "trained": self.master,
            "optimizer": self.optimizer.state_dict(),
        }
        write_state(self.out, state)
        self.saved = self.step

    def export(self, folder: Path) -> None:
        """Write the compressor in bfloat16, and the reader as a peft adapter beside it."""
        reader = None
        weights = {
            name: tensor.detach().to("cpu", torch.bfloat16) for name, tensor in self.encoder.trained_state().items()
        }
        with tempfile.TemporaryDirectory(dir=self.out) as staging:
            if isinstance(self.generator, PeftModel):
                reader = Path(staging, READER_FOLDER)
                save_reader(self.generator, reader, self.base.name)
            identity = generator_id(self.base.id, reader, self.config.pic.generator_positions)
            generator = ModelRef(self.base.name, identity)
            Checkpoint(self.config.pic, self.base, generator, weights, reader).save(folder)

    def _resume(self) -> None:
        state = read_state(self.out)
        if state is None:
            return
        check_same(state, self.config, self.base)
        self.end = settled_end(state, self.config)
        if self.end is not None:
            self.config = self.config.ending_at(self.end)
        if [saved.shape for saved in state["trained"]] != [master.shape for master in self.master]:
            raise ValueError(
                f"out must be a new folder or hold a run of this version, got {self.config.out!r}, in which another "
                "version trained other weights. Choose another folder, or delete this one."
            )
        for master, saved in zip(self.master, state["trained"], strict=True):
            master.copy_(saved)
        self._publish()
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        logger.info("resumed %s at step %d", self.out, self.step)


def _trainable(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _loader(dataset: StepDataset, steps: range, workers: int, *, pin: bool) -> DataLoader[Batch]:
    prefetch = 2 if workers else None
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        prefetch_factor=prefetch,
        pin_memory=pin,
        worker_init_fn=ignore_interrupts,
    )

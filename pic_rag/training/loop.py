"""The training loop: one device, or several under `accelerate launch`; resumable to the step."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedModel

from pic_rag.encoder import PicEncoder
from pic_rag.models.backbone import ModelRef, generator_id, load_backbone
from pic_rag.models.checkpoint import READER_FOLDER, Checkpoint
from pic_rag.models.quiet import quiet_loading
from pic_rag.training.batch import Batch, StepDataset
from pic_rag.training.config import TrainConfig
from pic_rag.training.corpora import Corpora
from pic_rag.training.examples import ExampleFactory
from pic_rag.training.metrics import MetricsLog
from pic_rag.training.objective import Objective

logger = logging.getLogger(__name__)

STATE_FILE = "training_state.pt"
METRICS_FILE = "metrics.jsonl"
COMPRESSOR_FOLDER = "compressor"
_PACE_STEPS = 100
_ENDLESS = 2**40  # steps of a run whose end is not known yet


def train(
    config: TrainConfig, *, minutes: float | None = None, finish: bool = False, progress: bool | None = None
) -> Path:
    """Run a training configuration to its end, from its last checkpoint if there is one.

    Args:
        config: the run. Its `out` receives `metrics.jsonl`, `training_state.pt` and `compressor/`.
        minutes: stop after that long, with a checkpoint to resume from.
        finish: end the run within `minutes`: its stages are cut, or the last one extended, so that the learning rate
            reaches zero when the time is over.
        progress: False hides the bar; None shows it on a terminal.

    Returns:
        The folder of the compressor as trained so far.

    Raises:
        ValueError: when the run in `out` was started with another configuration.
    """
    return Trainer(config, Accelerator()).run(minutes, progress, finish=finish)


class Trainer:
    """A run: its models, its optimiser, and where it stands."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator) -> None:
        self.config = config
        self.accelerator = accelerator
        self.out = Path(config.out)
        self.out.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(config.seed)
        base = load_backbone(
            config.base_model,
            device=accelerator.device,
            dtype="bfloat16" if config.precision == "bf16" else "float32",
            attn_implementation=config.attn_implementation,
        )
        self.backbone = base
        self.base = base.ref
        self.encoder = PicEncoder(base.model, config.pic, base.model.get_input_embeddings())
        self.generator = _prepare_generator(base.model, config)
        self.factory = self._example_factory()
        if config.init_from:
            self._start_from(config.init_from)
        elif self.encoder.pool is not None:
            self.encoder.pool.start_at(self.factory.token_counts(len(self.encoder.pool.token_salience)))
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
        self.seconds = 0.0
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
        if finish and minutes is not None:
            constant = (1 - self.config.decay_share) * minutes
            self.config = self.config.ending_at(_ENDLESS)  # until it is known how many steps there is time for
            pace = self._of_main_process(self._run(constant, progress, watch))
            left = max(1, round(60 * (minutes - constant) / pace))
            self.config = self.config.ending_at(self.step + left)
            minutes = 1.1 * (minutes - constant)  # should the pace fall
        self._run(minutes, progress, watch)
        return self.out / COMPRESSOR_FOLDER

    def _run(self, minutes: float | None, progress: bool | None, watch: Callable[[Trainer], None] | None) -> float:
        """Train for some minutes at most; returns seconds a step, of the latest steps."""
        steps = range(self.step, self.config.steps)
        dataset = StepDataset(self.config, self.factory, self.accelerator.process_index)
        batches = _loader(dataset, steps, self.config.workers, pin=self.accelerator.device.type == "cuda")
        started = saved = time.monotonic()
        ends: deque[float] = deque([started], maxlen=_PACE_STEPS)
        begin = started - self.seconds  # as if the run had been trained in one go
        hidden = progress is False or not self.accelerator.is_main_process
        log = None
        if self.accelerator.is_main_process:
            log = MetricsLog(self.out / METRICS_FILE, self.step, self.seconds, self.config)
        total = self.config.steps if self.config.steps < _ENDLESS else None
        with tqdm(total=total, initial=self.step, desc="train", disable=hidden or None) as bar:
            for batch in batches:
                loss, accuracy, gradient = self._take_step(batch)
                self.step += 1
                bar.update()
                now = time.monotonic()
                ends.append(now)
                if log is not None:
                    log.add(batch, loss, accuracy, gradient, self._rate(self.step - 1))
                    if self.step % self.config.log_steps == 0 or self.step == self.config.steps:
                        bar.set_postfix(log.write(self.step, now - begin))
                if watch is not None:
                    paused = time.monotonic()
                    self.seconds = paused - begin
                    watch(self)
                    begin += time.monotonic() - paused
                if now - saved > 60 * self.config.checkpoint_minutes:
                    self._save(time.monotonic() - begin)
                    saved = time.monotonic()
                if minutes is not None and self._of_main_process(now - started > 60 * minutes):
                    break
        self.seconds = time.monotonic() - begin
        self._save(self.seconds)
        return (ends[-1] - ends[0]) / max(1, len(ends) - 1)

    def _take_step(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rate = self._rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        batch = batch.to(self.accelerator.device)
        loss, accuracy = self.model(batch)
        self.accelerator.backward(loss)
        for master, parameter in zip(self.master, self.trained, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        gradient = nn.utils.clip_grad_norm_(self.master, self.config.clip)
        self.optimizer.step()
        self._publish()
        return loss.detach(), accuracy.detach(), gradient.detach()

    def _of_main_process(self, value: float) -> float:
        """What the main process measured: all devices have to leave the loop at the same step."""
        if self.accelerator.num_processes == 1:
            return value
        return float(broadcast(torch.tensor(float(value), device=self.accelerator.device)).item())

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
        return ExampleFactory(config, self.backbone.tokenizer, texts, questions)

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

    def _start_from(self, folder: str) -> None:
        start = Checkpoint.load(folder)
        if start.base.id.rpartition("@")[2] != self.base.id.rpartition("@")[2]:
            raise ValueError(f"init_from must be a compressor of {self.base.id!r}, got one of {start.base.id!r}.")
        self.encoder.load_trained_state(start.weights)
        if start.reader is not None:
            if not isinstance(self.generator, PeftModel):
                raise ValueError(f"reader_rank must be above 0: init_from={folder!r} has a reader to go on from.")
            self.generator.load_adapter(str(start.reader), "default", is_trainable=True)

    def _save(self, seconds: float) -> None:
        """Write the resumable state and the compressor; each file appears whole."""
        if not self.accelerator.is_main_process:
            return
        state = {
            "step": self.step,
            "seconds": seconds,
            "config": _identity(self.config),
            "stages": _past(self.config, self.step),
            "trained": self.master,
            "optimizer": self.optimizer.state_dict(),
        }
        torch.save(state, self.out / f"{STATE_FILE}.part")
        os.replace(self.out / f"{STATE_FILE}.part", self.out / STATE_FILE)
        self.export(self.out / COMPRESSOR_FOLDER)

    def export(self, folder: Path) -> None:
        """Write the compressor in bfloat16, and the reader as a peft adapter beside it."""
        reader = None
        weights = {
            name: tensor.detach().to("cpu", torch.bfloat16) for name, tensor in self.encoder.trained_state().items()
        }
        with tempfile.TemporaryDirectory(dir=self.out) as staging:
            if isinstance(self.generator, PeftModel):
                reader = Path(staging, READER_FOLDER)
                _save_reader(self.generator, reader, self.base.name)
            identity = generator_id(self.base.id, reader, self.config.pic.generator_positions)
            generator = ModelRef(self.base.name, identity)
            Checkpoint(self.config.pic, self.base, generator, weights, reader).save(folder)

    def _resume(self) -> None:
        path = self.out / STATE_FILE
        if not path.exists():
            return
        state = torch.load(path, map_location=self.accelerator.device, weights_only=True)
        if state["config"] != _identity(self.config):
            raise ValueError(
                f"out must be a new folder or hold the same run, got {str(self.out)!r} with another configuration. "
                "Choose another folder, or delete this one."
            )
        config = self.config.ending_at(max(self.config.steps, state["step"]))  # `finish` may have extended the run
        past = state.get("stages", _past(config, state["step"]))  # a state of an older pic-rag does not say
        if past != _past(config, state["step"]):
            raise ValueError(
                f"stages must begin with the {state['step']} steps that the run in {str(self.out)!r} has taken, got "
                f"other ones. They were: {past}. Put what is to change into steps after those, or choose another out."
            )
        for master, saved in zip(self.master, state["trained"], strict=True):
            master.copy_(saved)
        self._publish()
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        logger.info("resumed %s at step %d", self.out, self.step)


def _trainable(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _prepare_generator(model: PreTrainedModel, config: TrainConfig) -> PreTrainedModel | PeftModel:
    model.requires_grad_(False)
    if not config.reader_rank:
        return model
    lora = LoraConfig(
        r=config.reader_rank,
        lora_alpha=config.reader_rank,
        target_modules="all-linear",
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    with quiet_loading():
        return get_peft_model(model, lora)


def _save_reader(generator: PeftModel, folder: Path, base: str) -> None:
    generator.peft_config["default"].base_model_name_or_path = base  # else a path of this machine
    generator.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card; the compressor's speaks for both


def _loader(dataset: StepDataset, steps: range, workers: int, *, pin: bool) -> DataLoader[Batch]:
    prefetch = 2 if workers else None
    return DataLoader(
        dataset, batch_size=None, sampler=steps, num_workers=workers, prefetch_factor=prefetch, pin_memory=pin
    )


def _past(config: TrainConfig, step: int) -> list[dict[str, Any]]:
    """The stages up to a step, as JSON types: what a resumed run must have begun with."""
    past: list[dict[str, Any]] = []
    for stage in config.stages:
        if step > 0:
            past.append({**dataclasses.asdict(stage), "steps": min(stage.steps, step)})
        step -= stage.steps
    return json.loads(json.dumps(past))


def _identity(config: TrainConfig) -> dict[str, Any]:
    """What must stay the same in a resumed run, besides the stages of the steps taken, and but for how it is logged."""
    free = ("stages", "out", "checkpoint_minutes", "log_steps", "workers", "cache", "compile")
    return {name: value for name, value in json.loads(json.dumps(config.to_dict())).items() if name not in free}

"""What a training run is. Standard library and PyYAML only."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pic_rag.checks import check_whole
from pic_rag.config import PicConfig, described
from pic_rag.training.rules import (
    are_weights,
    read_fields,
    require_choice,
    require_number,
    require_path,
    require_paths,
    require_range,
    require_rows,
)

CONFIGS = Path(__file__).parent / "configs"
"""The training configurations that come with pic-rag."""

_DEMO = Path(__file__).parents[1] / "demo"

TASKS = ("reconstruct", "continue", "questions")

_CHOICES: dict[str, tuple[Any, ...]] = {
    "precision": ("bf16", "fp32"),
    "attn_implementation": ("sdpa", "eager", "flex_attention"),
    "compile": (True, False),
}
_PATHS = {"out": False, "base_model": True, "init_from": True, "cache": True}  # may it be None?
_WHOLE = {  # the least value of each field that counts
    "examples_per_step": 1,
    "target_tokens": 1,
    "turns": 1,
    "documents": 1,
    "reader_rank": 0,
    "warmup_steps": 0,
    "row_places": 1,
    "workers": 0,
    "log_steps": 1,
    "seed": 0,
}
_NUMBERS = {  # the least and the largest value of each field that measures
    "distractor_share": (0.0, 1.0),
    "question_first": (0.0, 1.0),
    "text_share": (0.0, 0.9),  # at 1 there would be nothing to compress
    "learning_rate": (0.0, math.inf),
    "converter_rate_factor": (0.0, math.inf),
    "reader_learning_rate": (0.0, math.inf),
    "distillation": (0.0, math.inf),
    "decay_share": (0.0, 1.0),
    "weight_decay": (0.0, math.inf),
    "clip": (0.0, math.inf),
    "checkpoint_minutes": (0.0, math.inf),
}


@dataclass(frozen=True)
class Stage:
    """A stretch of training with one mixture of tasks and of ratios."""

    steps: int = described("optimiser steps")
    tasks: Mapping[str, float] = described("weight of each task: a step draws one of reconstruct, continue, questions")
    ratios: Mapping[int, float] = described(
        "weight of each ratio: a document draws one, of the served ones or not; empty: `pic.ratios`, equally",
        default_factory=dict,
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", check_whole("steps of a stage", self.steps))
        if not are_weights(self.tasks) or not set(self.tasks) <= set(TASKS):
            raise ValueError(f"tasks of a stage must be weights of {', '.join(TASKS)}, got {self.tasks!r}.")
        if self.ratios != {} and not are_weights(self.ratios):
            raise ValueError(f"ratios of a stage must be weights of ratios, got {self.ratios!r}.")
        weights = {check_whole("ratios of a stage", ratio): weight for ratio, weight in self.ratios.items()}
        object.__setattr__(self, "ratios", weights)

    @classmethod
    def from_dict(cls, values: Any) -> Stage:  # noqa: ANN401 - whatever the file holds
        """Build from a YAML mapping; `steps` and `tasks` are needed, `ratios` may be there, else ValueError."""
        if not isinstance(values, Mapping) or set(values) - {"ratios"} != {"steps", "tasks"}:
            raise ValueError(f"stages must be a list of mappings with steps, tasks and perhaps ratios, got {values!r}.")
        return cls(**values)


@dataclass(frozen=True)
class TrainConfig:
    """A training run; `train.yaml` files hold exactly these fields.

    Raises:
        ValueError: when a field breaks its rule.
    """

    out: str = described("folder for checkpoints, metrics and the finished compressor")
    stages: tuple[Stage, ...] = described("what is trained, in order")
    pic: PicConfig = described("settings of the compressor", default=PicConfig())
    base_model: str | None = described(
        "folder or hub id of the base model and generator; None: the embedded", default=None
    )
    init_from: str | None = described("compressor to start from; None: an untrained one", default=None)
    texts: tuple[str, ...] = described("text corpora: .txt or .md, .jsonl(.gz) with `text`, or hf:ID", default=())
    questions: Mapping[str, float] = described(
        "question files and their weights; synthetic:FILE makes them out of a text corpus", default_factory=dict
    )
    held_out: tuple[str, ...] = described("files whose texts and questions are dropped from training", default=())
    cache: str | None = described("folder for tokenised corpora; None: `out`/tokens", default=None)
    examples_per_step: int = described("examples in an optimiser step, on every device; at most, with rows", default=8)
    text_tokens: tuple[int, int] = described(
        "shortest and longest text of a text example, in tokens", default=(64, 512)
    )
    target_tokens: int = described("longest continuation to predict, in tokens", default=128)
    turns: int = described("questions asked of the same documents in one example, at most", default=4)
    documents: int = described("documents in a questions example, at most", default=5)
    distractor_share: float = described("share of one-document examples that get distractors", default=0.3)
    question_first: float = described("share of prompts that ask before they show the documents", default=0.3)
    slots_per_chunk: tuple[int, ...] = described("slots_per_chunk drawn per example", default=(4,))
    learning_rate: float = described("of the LoRA; 0: the reader alone is trained", default=3e-4)
    converter_rate_factor: float = described("times learning_rate: converter, slot embedding and pool", default=5.0)
    reader_rank: int = described("rank of the generator's reader LoRA; 0: the generator stays frozen", default=0)
    reader_learning_rate: float = described("of the reader LoRA", default=3e-4)
    text_share: float = described(
        "share of a questions example's documents that stay text: what reading them teaches, the teacher knows",
        default=0.0,
    )
    distillation: float = described(
        "weight of KL to the same generator, reader included, reading the text, on answer tokens", default=0.0
    )
    warmup_steps: int = described("steps to full learning rate", default=50)
    decay_share: float = described("last share of all steps over which the rate falls linearly to zero", default=0.2)
    weight_decay: float = described("of AdamW, on all that is trained", default=0.01)
    clip: float = described("largest gradient norm; 0: any", default=1.0)
    precision: str = described(
        "'bf16' or 'fp32', of models and activations; trained weights stay float32", default="bf16"
    )
    row_places: int = described("room in a packed row", default=1024)
    rows: tuple[int, ...] = described(
        "packed rows of a step for encoder, generator and teacher, filled with as many examples as fit: one shape for "
        "compiled code; empty: as many as examples_per_step examples need",
        default=(),
    )
    workers: int = described("processes that build batches", default=1)
    compile: bool = described("torch.compile the layers of encoder and generator", default=False)
    attn_implementation: str = described("'sdpa', 'eager' or 'flex_attention'", default="sdpa")
    checkpoint_minutes: float = described("minutes between resumable checkpoints", default=10.0)
    log_steps: int = described("steps between lines of metrics.jsonl", default=10)
    seed: int = described("of everything drawn", default=0)

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("stages must hold at least one stage, got none.")
        for name, allowed in _CHOICES.items():
            require_choice(name, getattr(self, name), allowed)
        for name, least in _WHOLE.items():
            object.__setattr__(self, name, check_whole(name, getattr(self, name), least))
        for name, bounds in _NUMBERS.items():
            require_number(name, getattr(self, name), *bounds)
        for name, optional in _PATHS.items():
            require_path(name, getattr(self, name), optional=optional)
        for name in ("texts", "held_out"):
            require_paths(name, getattr(self, name))
        require_range("text_tokens", self.text_tokens, 2)
        if self.rows != ():
            require_rows(self.rows)
        self._check_weights()
        self._check_sources()
        if not self.learning_rate and not self.reader_rank:
            raise ValueError(
                "learning_rate must be above 0 where reader_rank is 0, got 0: nothing would learn. Raise one of them."
            )

    def _check_weights(self) -> None:
        if not isinstance(self.slots_per_chunk, tuple) or not self.slots_per_chunk:
            raise ValueError(f"slots_per_chunk must be a list of whole numbers, got {self.slots_per_chunk!r}.")
        counts = tuple(check_whole("slots_per_chunk", count) for count in self.slots_per_chunk)
        object.__setattr__(self, "slots_per_chunk", counts)
        named = are_weights(self.questions) and all(isinstance(name, str) for name in self.questions)
        if self.questions != {} and not named:
            raise ValueError(f"questions must be a mapping of files to weights, got {self.questions!r}.")

    def _check_sources(self) -> None:
        wanted = {task for stage in self.stages for task, weight in stage.tasks.items() if weight}
        if "questions" in wanted and not self.questions:
            raise ValueError("questions must name a file when a stage trains on questions, got none.")
        if wanted - {"questions"} and not self.texts:
            raise ValueError("texts must name a corpus when a stage trains on text, got none.")

    @property
    def steps(self) -> int:
        """Optimiser steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    def ending_at(self, steps: int) -> TrainConfig:
        """The same run with that many steps: later stages are cut, or the last one is extended.

        >>> run = TrainConfig("out", (Stage(2, {"continue": 1}), Stage(5, {"reconstruct": 1})), texts=("a.txt",))
        >>> [stage.steps for stage in run.ending_at(4).stages], [stage.steps for stage in run.ending_at(9).stages]
        ([2, 2], [2, 7])
        """
        stages, left = [], steps
        for stage in self.stages:
            if left > 0:
                stages.append(dataclasses.replace(stage, steps=min(stage.steps, left)))
            left -= stage.steps
        if left > 0:
            stages[-1] = dataclasses.replace(stages[-1], steps=stages[-1].steps + left)
        return dataclasses.replace(self, stages=tuple(stages))

    @classmethod
    def load(cls, path: str | Path, **overrides: Any) -> TrainConfig:  # noqa: ANN401 - any field
        """Read a YAML file; relative paths in it stay relative to the working directory, `demo:` is the demo corpus.

        Raises:
            FileNotFoundError: when there is no such file.
            ValueError: when it is no mapping of the fields above.
        """
        return cls.from_dict(from_demo({**read_yaml(path), **overrides}))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Build from plain JSON or YAML types; an unknown or a missing field raises ValueError by name."""
        converted = read_fields(cls, values, "training")
        if not isinstance(values["stages"], (list, tuple)):
            raise ValueError(
                f"stages must be a list of mappings with steps, tasks and perhaps ratios, got {values['stages']!r}."
            )
        converted["stages"] = tuple(Stage.from_dict(stage) for stage in values["stages"])
        converted["pic"] = _pic(values.get("pic", {}))
        return cls(**converted)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types."""
        return {**dataclasses.asdict(self), "pic": self.pic.to_dict()}


def find_config(name: str, shipped: Path = CONFIGS) -> Path:
    """The file of that name, else the one of that name in a folder of shipped configurations."""
    found = shipped / f"{name}.yaml"
    return found if found.is_file() and not Path(name).is_file() else Path(name)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping that a configuration file holds.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is no YAML mapping, or not UTF-8.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8, got: {error}. Convert the file.") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} must be YAML, got: {error}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must be a YAML mapping of fields, got {type(values).__name__}.")
    return values


def from_demo(values: Any) -> Any:  # noqa: ANN401 - any YAML value
    """The values with `demo:` at the beginning of a path replaced by the folder of pic-rag's own small corpus."""
    if isinstance(values, dict):
        return {from_demo(key): from_demo(value) for key, value in values.items()}
    if isinstance(values, list):
        return [from_demo(value) for value in values]
    demo = isinstance(values, str) and values.startswith("demo:")
    return str(_DEMO / values.removeprefix("demo:")) if demo else values


def _pic(values: Mapping[str, Any] | PicConfig) -> PicConfig:
    if isinstance(values, PicConfig):
        return values
    if not isinstance(values, Mapping):
        raise ValueError(f"pic must be a mapping of PicConfig's fields, or a preset and fields, got {values!r}.")
    values = dict(values)
    preset = values.pop("preset", None)
    return PicConfig.preset(preset, **values) if preset else PicConfig.from_dict(values)

"""What a study is: arms of a training configuration, seeds, what is measured. Standard library and PyYAML only."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pic_rag.checks import check_whole
from pic_rag.config import described
from pic_rag.training.config import TrainConfig, find_config, from_demo, read_yaml
from pic_rag.training.rules import read_fields, require_path, require_paths

CONFIGS = Path(__file__).parent / "configs"
"""The studies that come with pic-rag."""

_OWN = ("out", "cache", "seed")  # fields of a training configuration that the study sets itself


@dataclass(frozen=True)
class Measured:
    """What is measured of every run, and when.

    Raises:
        ValueError: when a field breaks its rule.
    """

    data: str = described("question file, as `pic-rag eval` reads it; name a slice that is not reported elsewhere")
    every: int = described("keep one question of so many", default=1)
    offset: int = described("questions before the first one kept", default=0)
    limit: int | None = described("most questions kept; None: all", default=None)
    gold_only: bool = described("only the contexts that hold the answer", default=False)
    ratios: tuple[int, ...] = described("text tokens per memory token", default=(4, 16, 64))
    loss_steps: int = described("steps between measurements of the teacher-forced question loss", default=100)
    answer_steps: tuple[int, ...] = described("steps after which answers are written; the last one always", default=())
    bounds: tuple[str, ...] = described("systems answered once, for comparison", default=("text", "none", "truncate"))
    max_new_tokens: int = described("longest answer", default=32)
    batch_size: int = described("prompts decoded, or questions scored, together", default=32)

    def __post_init__(self) -> None:
        require_path("data", self.data, optional=False)
        require_paths("bounds", self.bounds)
        least = {"every": 1, "loss_steps": 1, "max_new_tokens": 1, "batch_size": 1, "offset": 0}
        for name, number in (least if self.limit is None else {**least, "limit": 1}).items():
            object.__setattr__(self, name, check_whole(name, getattr(self, name), number))
        if self.ratios == ():
            raise ValueError("ratios must hold at least one ratio, got none.")
        for name in ("ratios", "answer_steps"):
            object.__setattr__(self, name, _check_each(name, getattr(self, name), 1))


@dataclass(frozen=True)
class StudyConfig:
    """A study; its YAML file holds exactly these fields.

    Raises:
        ValueError: when a field breaks its rule.
    """

    base: str = described("training configuration of every arm: a file, or a shipped one such as gpu")
    arms: Mapping[str, Mapping[str, Any]] = described("what each arm changes in it; `pic` is changed field by field")
    measured: Measured = described("what is measured")
    train: Mapping[str, Any] = described("what all arms change in it", default_factory=dict)
    seeds: tuple[int, ...] = described("every arm is trained once with each", default=(0,))
    reference: str | None = described("arm whose best score the others are timed to reach", default=None)

    def __post_init__(self) -> None:
        require_path("base", self.base, optional=False)
        if not isinstance(self.arms, Mapping) or not self.arms:
            raise ValueError(f"arms must be a mapping of names to changed fields, got {self.arms!r}.")
        for name, changed in {"train": self.train, **self.arms}.items():
            _check_changes(name, changed)
        object.__setattr__(self, "seeds", _check_each("seeds", self.seeds, 0))
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be different whole numbers, got {self.seeds!r}.")
        if self.reference is not None and self.reference not in self.arms:
            raise ValueError(f"reference must be one of {', '.join(self.arms)}, got {self.reference!r}.")

    @classmethod
    def load(cls, path: str | Path) -> StudyConfig:
        """Read a YAML file, or a shipped study by its name.

        Raises:
            FileNotFoundError: when there is no such file.
            ValueError: when it is no mapping of the fields above.
        """
        return cls.from_dict(read_yaml(find_config(str(path), CONFIGS)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StudyConfig:
        """Build from plain JSON or YAML types; an unknown or a missing field raises ValueError by name."""
        measured = values.get("measured")
        if not isinstance(measured, Mapping):
            raise ValueError(f"measured must be a mapping with the question file as data, got {measured!r}.")
        arms = values.get("arms")
        if isinstance(arms, Mapping):  # an arm that changes nothing may be left empty
            arms = {name: {} if changed is None else changed for name, changed in arms.items()}
        made = Measured(**read_fields(Measured, measured, "study"))
        return cls(**read_fields(cls, {**values, "arms": arms, "measured": made}, "study"))

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types."""
        return dataclasses.asdict(self)

    def training(self, arm: str, seed: int, folder: Path) -> TrainConfig:
        """The training run of an arm and a seed, below the study's folder."""
        base = read_yaml(find_config(self.base))
        _check_pic(self.base, base)
        changed = (base, self.train, self.arms[arm])
        pic = {name: value for part in changed for name, value in (part.get("pic") or {}).items()}
        merged = {name: value for part in changed for name, value in part.items()} | {"pic": pic, "seed": seed}
        own = {"out": str(folder / "runs" / run_name(arm, seed)), "cache": str(folder / "runs" / "tokens")}
        config = TrainConfig.from_dict(from_demo(merged | own))
        for ratio in self.measured.ratios:
            config.pic.check_ratio(ratio)
        return config

    @property
    def runs(self) -> list[tuple[str, int]]:
        """Arm and seed of every run, seed by seed: a study that is cut short still compares all arms."""
        return [(arm, seed) for seed in self.seeds for arm in self.arms]


def run_name(arm: str, seed: int) -> str:
    """What the files of a run are called."""
    return f"{arm}-{seed}"


def _check_changes(name: object, changed: object) -> None:
    if not isinstance(name, str) or not re.fullmatch(r"[\w.+-]+", name):
        raise ValueError(f"arms must have names of letters, digits and . + - _, got {name!r}.")
    if not isinstance(changed, Mapping):
        raise ValueError(f"{name} must be a mapping of training fields, got {changed!r}.")
    for field in _OWN:
        if field in changed:
            raise ValueError(f"{name} must leave {field} to the study, got {changed[field]!r}. Remove it.")
    _check_pic(name, changed)


def _check_pic(name: str, changed: Mapping[str, Any]) -> None:
    if not isinstance(changed.get("pic"), Mapping | None):
        raise ValueError(f"pic of {name} must be a mapping of PicConfig's fields, got {changed['pic']!r}.")


def _check_each(name: str, values: Any, least: int) -> tuple[int, ...]:  # noqa: ANN401 - whatever the file holds
    if not isinstance(values, (list, tuple)):
        raise ValueError(f"{name} must be a list of whole numbers, got {values!r}.")
    return tuple(check_whole(f"each of {name}", value, least) for value in values)

"""The state that a run resumes from: one file, and what has to be the same for a run to go on from it."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pic_rag.models.backbone import ModelRef, same_model
from pic_rag.training.config import TrainConfig
from pic_rag.training.guards import are_finite

STATE_FILE = "training_state.pt"
ENDLESS = 2**40  # steps of a run whose end is not known yet
_FREE = ("stages", "out", "checkpoint_minutes", "log_steps", "workers", "cache", "compile")


def write_state(out: Path, state: Mapping[str, Any]) -> None:
    """Write the state of a run; the file appears whole."""
    part = out / f"{STATE_FILE}.part"
    torch.save(dict(state), part)
    os.replace(part, out / STATE_FILE)


def read_state(out: Path) -> dict[str, Any] | None:
    """The state of the run in a folder, on the CPU; None where none has begun.

    Raises:
        ValueError: when the file is damaged, or its weights are no numbers.
    """
    path = out / STATE_FILE
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path} must be the whole state of a run, got a file that is cut or damaged. Delete it to begin anew."
        ) from error
    if not are_finite(state["trained"]):
        raise ValueError(
            f"{path} must hold finite weights, got others: the run diverged. Delete it to begin anew, with a lower "
            "learning_rate."
        )
    return state


def identity(config: TrainConfig) -> dict[str, Any]:
    """What must stay the same in a resumed run, besides the stages of the steps taken, and but for how it is logged."""
    return {name: value for name, value in json.loads(json.dumps(config.to_dict())).items() if name not in _FREE}


def past(config: TrainConfig, step: int = ENDLESS) -> list[dict[str, Any]]:
    """The stages up to a step, as JSON types: what a resumed run must have begun with."""
    stages: list[dict[str, Any]] = []
    for stage in config.stages:
        if step > 0:
            stages.append({**dataclasses.asdict(stage), "steps": min(stage.steps, step)})
        step -= stage.steps
    return json.loads(json.dumps(stages))


def settled_end(state: Mapping[str, Any], config: TrainConfig) -> int | None:
    """The step that a run will end, or has ended, at; None when that is open, or its stages are others by now."""
    end = state.get("end")
    return end["step"] if end and end["stages"] == past(config) else None


def check_same(state: Mapping[str, Any], config: TrainConfig, base: ModelRef) -> None:
    """Refuse to go on with a run that was begun otherwise.

    Raises:
        ValueError: when a setting, the base model's weights or the stages of the steps taken are others.
    """
    out, step = config.out, state["step"]
    if state["config"] != identity(config):
        raise ValueError(
            f"out must be a new folder or hold the same run, got {out!r} with another configuration: "
            f"{_difference(state['config'], identity(config))}. Choose another folder, or delete this one."
        )
    known = state.get("base", base.id)  # a state of an older pic-rag does not say
    if not same_model(known, base.id):
        raise ValueError(
            f"base_model must be {known!r}, which the run in {out!r} was begun with, got {base.id!r} at {base.name!r}. "
            "Put the right one there, or choose another out."
        )
    now = past(config.ending_at(max(config.steps, step)), step)  # `finish` may have extended the run
    taken = state.get("stages", now)  # likewise
    if taken != now:
        raise ValueError(
            f"stages must begin with the {step} steps that the run in {out!r} has taken, got "
            f"other ones. They were: {taken}. Put what is to change into steps after those, or choose another out."
        )


def _difference(made: Mapping[str, Any], now: Mapping[str, Any], where: str = "") -> str:
    """The first setting that is another by now.

    >>> _difference({"seed": 0, "pic": {"ratio": 4}}, {"seed": 0, "pic": {"ratio": 8}})
    'pic.ratio was 4 and is 8'
    """
    name = next(name for name in sorted(made.keys() | now.keys()) if made.get(name) != now.get(name))
    was, is_now = made.get(name), now.get(name)
    if name == "pic":
        return _difference(made[name], now[name], "pic.")
    return f"{where}{name} was {was!r} and is {is_now!r}"

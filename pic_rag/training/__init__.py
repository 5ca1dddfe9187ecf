"""Training a compressor: `config` -> `corpora` (tokens on disk) -> `examples` -> `batch` -> `objective` -> `loop`.

`chat` writes the conversations of examples; `start` is what a run begins with, `state` what it resumes from, `guards`
what keeps it whole, `metrics` and `lines` its log. `synthetic` makes questions of texts, `averaging` means of runs.

The public names load on first use: a configuration can be read and written without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_ROOMS = {"Stage": "config", "TrainConfig": "config", "train": "loop"}

__all__ = ["Stage", "TrainConfig", "train"]

if TYPE_CHECKING:
    from pic_rag.training.config import Stage, TrainConfig
    from pic_rag.training.loop import train


def __getattr__(name: str) -> Any:  # noqa: ANN401 - a module attribute may be anything
    if name not in _ROOMS:
        raise AttributeError(f"module 'pic_rag.training' has no attribute {name!r}")
    return getattr(importlib.import_module(f"pic_rag.training.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return list(__all__)

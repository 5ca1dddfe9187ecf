"""The two models a checkpoint belongs to: the base model the encoder is cut from, and the generator."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pic_rag.models.backbone import Backbone, ModelRef, load_backbone
from pic_rag.models.checkpoint import Checkpoint


def load_models(
    checkpoint: Checkpoint,
    base_model: str | Path | None = None,
    **loading: Any,  # noqa: ANN401 - passed on to load_backbone
) -> tuple[Backbone, Backbone]:
    """The base model and the generator of a checkpoint; one object where they are the same model.

    Args:
        checkpoint: says which models they are.
        base_model: where the base model is, when it is not where the checkpoint says.
        **loading: `device`, `dtype`, `attn_implementation`.

    Raises:
        FileNotFoundError: when the base model is not there.
        ValueError: when a model is not the one the checkpoint was trained with.
    """
    load = partial(load_backbone, **loading)
    base = _load_base(load, base_model or checkpoint.base.name)
    if _digest(base.ref.id) != _digest(checkpoint.base.id):
        raise ValueError(
            f"The base model must be {checkpoint.base.id!r}, which this compressor was trained on, got "
            f"{base.ref.id!r}. Pass the right folder or hub id as base_model."
        )
    return base, _load_generator(load, base, checkpoint.generator)


def _load_base(load: Callable[..., Backbone], name_or_path: str | Path) -> Backbone:
    try:
        return load(name_or_path)
    except OSError as error:
        raise FileNotFoundError(
            f"The base model must be a folder or a hub id, got {str(name_or_path)!r}: {error} "
            "Pass the folder or hub id it is at now as base_model."
        ) from error


def _load_generator(load: Callable[..., Backbone], base: Backbone, generator: ModelRef) -> Backbone:
    digest = _digest(generator.id).partition("+")[0]  # without its reader's
    if digest == _digest(base.ref.id):
        return base
    loaded = load(generator.name)
    if _digest(loaded.ref.id) != digest:
        raise ValueError(
            f"The generator must be {generator.id!r}, which this compressor writes memories for, got "
            f"{loaded.ref.id!r}. Put the right model at {generator.name!r}."
        )
    return loaded


def _digest(identity: str) -> str:
    return identity.rpartition("@")[2]

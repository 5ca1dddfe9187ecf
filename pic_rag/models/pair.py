"""The two models a checkpoint belongs to: the base model the encoder is cut from, and the generator."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pic_rag.models.backbone import Backbone, load_backbone, plain_id, same_model
from pic_rag.models.checkpoint import Checkpoint


def load_models(
    checkpoint: Checkpoint,
    base_model: str | Path | None = None,
    generator: str | Path | None = None,
    **loading: Any,  # noqa: ANN401 - passed on to load_backbone
) -> tuple[Backbone, Backbone]:
    """The base model and the generator of a checkpoint; one object where they are the same model.

    Args:
        checkpoint: says which models they are.
        base_model: where the base model is, when it is not where the checkpoint says.
        generator: where the generator is, likewise; the base model too, when it is the same model.
        **loading: `device`, `dtype`, `attn_implementation`.

    Raises:
        FileNotFoundError: when one of them is not there.
        ValueError: when a model is not the one the checkpoint was trained with.
    """
    one_model = same_model(checkpoint.base.id, plain_id(checkpoint.generator.id))
    argument = "generator" if one_model and not base_model else "base_model"
    place = base_model or (generator if one_model else None)
    base = _load(argument, place or checkpoint.base.name, loading)
    if not same_model(base.ref.id, checkpoint.base.id):
        raise ValueError(
            f"The base model must be {checkpoint.base.id!r}, which this compressor was trained on, got "
            f"{base.ref.id!r}. Pass the right folder or hub id as {argument}."
        )
    if one_model and generator in (None, place):
        return base, base
    return base, load_generator(checkpoint, generator, **loading)


def load_generator(
    checkpoint: Checkpoint,
    name_or_path: str | Path | None = None,
    **loading: Any,  # noqa: ANN401 - load_backbone's arguments
) -> Backbone:
    """Load the model that reads a compressor's memories, without its reader.

    Args:
        checkpoint: of the compressor.
        name_or_path: where the model is, when it is not where the checkpoint says.
        **loading: as for `load_backbone`.

    Raises:
        FileNotFoundError: when it is not there.
        ValueError: when the model found there is another than the memories are made for.
    """
    wanted = checkpoint.generator
    loaded = _load("generator", name_or_path or wanted.name, loading)
    if not same_model(loaded.ref.id, plain_id(wanted.id)):
        raise ValueError(
            f"generator must be {wanted.id!r}, which the compressor makes memories for, got {loaded.ref.id!r}. "
            "Name the folder or hub id where the right model is."
        )
    return loaded


def _load(argument: str, name_or_path: str | Path, loading: Mapping[str, Any]) -> Backbone:
    try:
        return load_backbone(name_or_path, **loading)
    except OSError as error:
        raise FileNotFoundError(
            f"{argument} must be a folder or a hub id, got {str(name_or_path)!r}: {error} "
            f"Pass the folder or hub id it is at now as {argument}."
        ) from error

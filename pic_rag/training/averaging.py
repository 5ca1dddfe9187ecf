"""The mean of compressors of one run: what a decaying learning rate would have settled on, without the training.

Weights of one run's checkpoints, or of runs that began with the same one, may be averaged (Izmailov et al.,
arXiv 1803.05407; Wortsman et al., arXiv 2203.05482); those of runs that began elsewhere may not.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from pic_rag.models.backbone import READER_WEIGHTS, ModelRef, generator_id, plain_id
from pic_rag.models.checkpoint import READER_FOLDER, Checkpoint, reader_settings
from pic_rag.training.guards import require_finite


def average(compressors: Sequence[str | Path], out: str | Path) -> Path:
    """Write the mean of compressors, each counted alike, reader included.

    Args:
        compressors: folders or hub ids, two or more, of the same base model and settings.
        out: folder of the mean.

    Returns:
        `out`.

    Raises:
        FileNotFoundError: when there is no such compressor.
        ValueError: when there are fewer than two, they differ in more than the values of their weights, or one of
            them has weights that are not finite.
    """
    if len(compressors) < 2:
        raise ValueError(f"compressors must be two or more to be averaged, got {len(compressors)}. Name another one.")
    parts = [Checkpoint.load(name) for name in compressors]
    first = parts[0]
    _check_alike(compressors, parts)
    readers = [part.reader for part in parts if part.reader is not None]
    read = [load_file(folder / READER_WEIGHTS) for folder in readers]
    for name, part in zip(compressors, parts, strict=True):
        require_finite(str(name), part.weights)
    for folder, weights in zip(readers, read, strict=True):
        require_finite(str(folder), weights)
    mean = _mean([part.weights for part in parts])
    with tempfile.TemporaryDirectory() as staging:
        reader, generator = None, first.generator
        if readers:
            reader = Path(staging, READER_FOLDER)
            shutil.copytree(readers[0], reader, copy_function=shutil.copyfile)
            merged = _mean(read)
            save_file(merged, reader / READER_WEIGHTS, metadata={"format": "pt"})
            identity = generator_id(plain_id(generator.id), reader, first.config.generator_positions)
            generator = ModelRef(generator.name, identity)
        Checkpoint(first.config, first.base, generator, mean, reader).save(out)
    return Path(out)


def _check_alike(compressors: Sequence[str | Path], parts: Sequence[Checkpoint]) -> None:
    """Refuse compressors of other settings or models than those of the first, and a reader where another has none."""
    first = parts[0]
    for name, part in zip(compressors, parts, strict=True):
        for field, expected, got in (
            ("config", first.config, part.config),
            ("base", first.base.id, part.base.id),
            ("generator", plain_id(first.generator.id), plain_id(part.generator.id)),
        ):
            if got != expected:
                raise ValueError(
                    f"compressors must have the same {field} to be averaged: {str(compressors[0])!r} has {expected}, "
                    f"got {got} in {str(name)!r}. Average checkpoints of one run."
                )
    readers = [part.reader for part in parts if part.reader is not None]
    for reader in readers[1:]:
        if reader_settings(reader) != reader_settings(readers[0]):
            raise ValueError(
                f"compressors must have readers of the same settings to be averaged: {str(readers[0])!r} has "
                f"{reader_settings(readers[0])}, got {reader_settings(reader)} in {str(reader)!r}. Average checkpoints "
                "of one run."
            )
    if readers and len(readers) < len(parts):
        raise ValueError(
            f"compressors must all have a reader or none to be averaged, got {len(readers)} of {len(parts)} that do. "
            "Average checkpoints of one run."
        )


def _mean(parts: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The mean of tensors of the same name and shape, computed in float32, in the dtype of the first."""
    shapes = [{name: tuple(tensor.shape) for name, tensor in part.items()} for part in parts]
    for shape in shapes[1:]:
        for name in sorted(shape.keys() | shapes[0].keys()):
            if shape.get(name) != shapes[0].get(name):
                raise ValueError(
                    f"compressors must have tensors of the same shapes to be averaged, got {shapes[0].get(name)} and "
                    f"{shape.get(name)} for {name!r}. Average checkpoints of one run."
                )
    return {
        name: torch.stack([part[name].float() for part in parts]).mean(0).to(tensor.dtype)
        for name, tensor in parts[0].items()
    }

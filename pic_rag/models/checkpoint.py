"""The folder a compressor is kept in: `config.json`, `compressor.safetensors` and, if it has one, `reader/`."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from pic_rag.config import PicConfig
from pic_rag.models import embedded
from pic_rag.models.backbone import READER_CONFIG, READER_WEIGHTS, ModelRef, generator_id, plain_id

FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "compressor.safetensors"
READER_FOLDER = "reader"


@dataclass(frozen=True)
class Checkpoint:
    """A compressor on disk.

    Attributes:
        config: the PIC settings.
        base: the model the encoder is made of.
        generator: the model that reads the memories; its id is that of the generator together with its reader.
        weights: LoRA, slot embedding and converter, by name.
        reader: folder of the generator's LoRA adapter, if the memories need one.
        quality: one sentence for users on what to expect of it; "" when nobody has said.
    """

    config: PicConfig
    base: ModelRef
    generator: ModelRef
    weights: dict[str, torch.Tensor]
    reader: Path | None = None
    quality: str = ""

    @cached_property
    def fingerprint(self) -> str:
        """64 hex digits over weights, settings and models; equal fingerprints make equal memories."""
        settings = self.config.to_dict()
        del settings["generator_positions"]  # the generator's id says it
        identity = {"pic": settings, "base": self.base.id, "generator": self.generator.id}
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
        for name, tensor in sorted(self.weights.items()):
            digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @classmethod
    def load(cls, name_or_path: str | Path | None = None) -> Checkpoint:
        """Read a checkpoint from a folder, a hub id (perhaps with `@revision`), or (None) the one shipped with pic-rag.

        Raises:
            FileNotFoundError: when there is none.
            ValueError: when it is damaged or of a newer format.
        """
        folder = _find_folder(name_or_path)
        settings = _read_settings(folder / CONFIG_FILE)
        config, generator = PicConfig.from_dict(settings["pic"]), ModelRef(**settings["generator"])
        weights = _read_weights(folder / WEIGHTS_FILE)
        reader = _find_reader(folder / READER_FOLDER, generator.id, config)
        _check_recorded(folder / WEIGHTS_FILE, reader, settings.get("recorded", {}))
        return cls(
            config=config,
            base=ModelRef(**settings["base"]),
            generator=generator,
            weights=weights,
            reader=reader,
            quality=str(settings.get("quality", "")),
        )

    def with_models_at(self, base: str, generator: str) -> Checkpoint:
        """The same compressor, its models known by where they have been found."""
        if (base, generator) == (self.base.name, self.generator.name):
            return self
        return replace(self, base=self.base._replace(name=base), generator=self.generator._replace(name=generator))

    def save(self, folder: str | Path) -> None:
        """Write the checkpoint. Cut while it takes an older one's place, it leaves no checkpoint, never a mixture."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        settings = {
            "format_version": FORMAT_VERSION,
            "pic": self.config.to_dict(),
            "base": self.base._asdict(),
            "generator": self.generator._asdict(),
            "quality": self.quality,
        }
        with tempfile.TemporaryDirectory(dir=target) as staging:
            weights, config = Path(staging, WEIGHTS_FILE), Path(staging, CONFIG_FILE)
            # `save_file` would make a file that nobody but its owner may read
            weights.write_bytes(save({name: tensor.contiguous() for name, tensor in self.weights.items()}))
            reader = self.reader
            if reader is not None and reader.resolve() == (target / READER_FOLDER).resolve():
                reader = None  # it is there
            if reader is not None:  # by `copyfile`, without modes: peft's files are for their owner only
                shutil.copytree(reader, Path(staging, READER_FOLDER), copy_function=shutil.copyfile)
            settings["recorded"] = _record(weights, self.reader)
            config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
            (target / CONFIG_FILE).unlink(missing_ok=True)  # comes back last: without it nothing is read
            if reader is not None:
                shutil.rmtree(target / READER_FOLDER, ignore_errors=True)
                os.replace(Path(staging, READER_FOLDER), target / READER_FOLDER)
            os.replace(weights, target / WEIGHTS_FILE)
            os.replace(config, target / CONFIG_FILE)


def _find_folder(name_or_path: str | Path | None) -> Path:
    if name_or_path is None:
        return embedded.compressor_path()
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return folder
    repository, _, revision = str(name_or_path).partition("@")
    if isinstance(name_or_path, Path) or repository.startswith((".", "~", os.sep)) or repository.count("/") > 1:
        raise FileNotFoundError(
            f"name_or_path must be a folder or a hub id, got {str(name_or_path)!r}: no such folder."
        )
    try:
        return Path(snapshot_download(repository, revision=revision or None))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise FileNotFoundError(
            f"name_or_path must be a folder or a hub id, got {name_or_path!r}: there is no such folder, and the hub "
            f"answered: {reason}. Check the spelling and the network, or leave it out to use the compressor shipped "
            "with pic-rag."
        ) from error


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"A compressor's folder must hold {CONFIG_FILE}, got {str(path.parent)!r} without it. "
            "Pass the folder that save_pretrained or `pic-rag train` wrote."
        ) from error
    except ValueError as error:
        raise ValueError(f"{path} must be JSON, got {error}. Fetch or train the checkpoint again.") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(settings).__name__}: it is no compressor's.")
    missing = {"format_version", "pic", "base", "generator"} - settings.keys()
    if missing:
        raise ValueError(f"{path} must name {', '.join(sorted(missing))}: it is no pic-rag compressor, or is damaged.")
    for part, names in (("pic", set()), ("base", {"name", "id"}), ("generator", {"name", "id"})):
        if not isinstance(settings[part], dict) or (names and settings[part].keys() != names):
            raise ValueError(f"{part} in {path} must hold {sorted(names) or 'settings'}, got {settings[part]!r}.")
    if settings["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"format_version must be {FORMAT_VERSION}, got {settings['format_version']} in {path}. Upgrade pic-rag."
        )
    return dict(settings)


def reader_settings(folder: Path) -> dict[str, Any]:
    """What of a reader's `adapter_config.json` changes what it computes; its id tells its weights alone.

    Raises:
        ValueError: when the file is missing or damaged.
    """
    path = folder / READER_CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        modules = config.get("target_modules")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} must be a JSON object as peft writes it, got: {error}. Fetch it again.") from error
    named = {name: config.get(name) for name in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")}
    return {**named, "target_modules": sorted(modules) if isinstance(modules, list) else modules}


def _record(weights: Path, reader: Path | None) -> dict[str, Any]:
    """What `_check_recorded` compares: the content of the weights' file, and the reader's settings."""
    recorded: dict[str, Any] = {"weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest()}
    return recorded if reader is None else {**recorded, "reader": reader_settings(reader)}


def _check_recorded(weights: Path, reader: Path | None, recorded: Mapping[str, Any]) -> None:
    """Raise ValueError where weights or reader are not those that the checkpoint was saved with.

    Older checkpoints have recorded nothing.
    """
    for name, got in _record(weights, reader).items() if recorded else ():
        if name in recorded and got != recorded[name]:
            where = weights if name == "weights_sha256" else weights.with_name(READER_FOLDER) / READER_CONFIG
            raise ValueError(
                f"{where} must be as {CONFIG_FILE} tells, with the {name} {recorded[name]!r}, got {got!r}. It is "
                "damaged or another compressor's: fetch it again."
            )


def _find_reader(folder: Path, generator: str, config: PicConfig) -> Path | None:
    """The reader that the generator's id speaks of; a folder that it does not speak of is another compressor's."""
    if "+" not in generator.rpartition("@")[2]:
        return None
    weights = folder / READER_WEIGHTS
    if not weights.is_file():
        raise FileNotFoundError(
            f"The memories of this compressor need their reader, got none at {str(weights)!r}. Fetch it again, or let "
            "the training run that writes it go on."
        )
    if generator_id(plain_id(generator), folder, config.generator_positions) != generator:
        raise ValueError(
            f"{weights} must be the reader that {CONFIG_FILE} names, got another. Fetch it again, or let the training "
            "run that writes it go on."
        )
    return folder


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"A compressor's folder must hold {WEIGHTS_FILE}, got none at {path}.") from error
    except SafetensorError as error:
        raise ValueError(
            f"{path} must be a whole safetensors file, got: {error}. It is truncated or damaged: fetch it again."
        ) from error

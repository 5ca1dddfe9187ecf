"""One loaded model for all who ask for the same one: components of an application share it instead of loading it again.

Models stay loaded until `unload_shared` or the end of the process. This room only keeps what others build.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, TypeVar

from pic_rag.compressor import Compressor
from pic_rag.generator import Generator

Model = TypeVar("Model", Compressor, Generator)

_models: dict[Hashable, Any] = {}
_locks: dict[Hashable, threading.Lock] = {}
_guard = threading.Lock()


def shared_compressor(
    name_or_path: str | Path | None = None, *, device: str | None = None, dtype: str | None = None
) -> Compressor:
    """The process's compressor of that name, device and dtype; loaded by the first who asks. Thread safe.

    Args:
        name_or_path: as for `Compressor.from_pretrained`.
        device: likewise.
        dtype: likewise.
    """
    key = ("compressor", _text(name_or_path), device, dtype)
    return _share(key, lambda: Compressor.from_pretrained(name_or_path, device=device, dtype=dtype))


def shared_generator(
    name_or_path: str | Path | None = None,
    *,
    reader: str | Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> Generator:
    """The process's generator of that name, reader, device and dtype; loaded by the first who asks. Thread safe.

    Args:
        name_or_path: as for `Generator.from_pretrained`.
        reader: likewise; a compressor's is `compressor.reader`.
        device: likewise.
        dtype: likewise.
    """
    key = ("generator", _text(name_or_path), _text(reader), device, dtype)
    return _share(key, lambda: Generator.from_pretrained(name_or_path, reader=reader, device=device, dtype=dtype))


def unload_shared() -> None:
    """Forget every shared model; one that nobody else holds is freed."""
    with _guard:
        _models.clear()


def _share(key: Hashable, load: Callable[[], Model]) -> Model:
    with _guard:
        lock = _locks.setdefault(key, threading.Lock())
    with lock:  # others may load other models meanwhile
        if key not in _models:
            _models[key] = load()
        model: Model = _models[key]
        return model


def _text(name: str | Path | None) -> str | None:
    return None if name is None else str(name)

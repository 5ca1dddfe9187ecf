"""One loaded model for all who ask for the same one: components of an application share it instead of loading it again.

What is shared stays until `unload_shared` or the end of the process. This room only keeps what others build, and
imports them when they are asked for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from pic_rag.compression.compressor import Compressor
    from pic_rag.generation.generator import Generator
    from pic_rag.models.checkpoint import Checkpoint
    from pic_rag.store import SQLiteStore

T = TypeVar("T")

_values: dict[Hashable, Any] = {}
_locks: dict[Hashable, threading.Lock] = {}
_guard = threading.Lock()


def shared_checkpoint(name_or_path: str | Path | None = None) -> Checkpoint:
    """The process's checkpoint of that name: what a compressor is on disk, read without loading models. Thread safe.

    Args:
        name_or_path: as for `Checkpoint.load`.
    """
    from pic_rag.models.checkpoint import Checkpoint

    return _share(("checkpoint", _text(name_or_path)), lambda: Checkpoint.load(name_or_path))


def shared_compressor(
    name_or_path: str | Path | None = None,
    **loading: Any,  # noqa: ANN401 - from_pretrained's arguments
) -> Compressor:
    """The process's compressor of that name and loading; loaded by the first who asks. Thread safe.

    Args:
        name_or_path: as for `Compressor.from_pretrained`.
        **loading: likewise.
    """
    from pic_rag.compression.compressor import Compressor

    key = ("compressor", _text(name_or_path), *_given(loading))
    return _share(key, lambda: Compressor.from_pretrained(name_or_path, **loading))


def shared_generator(
    checkpoint: Checkpoint,
    name_or_path: str | Path | None = None,
    **loading: Any,  # noqa: ANN401 - from_pretrained's arguments
) -> Generator:
    """The process's generator that reads a compressor's memories; loaded by the first who asks. Thread safe.

    Args:
        checkpoint: the compressor's: `shared_checkpoint(name)`, or `compressor.checkpoint`.
        name_or_path: where the generator is, when it is not where the checkpoint says.
        **loading: as for `Generator.from_pretrained`.

    Raises:
        ValueError: when the model found there is another than the memories are made for.
    """
    from pic_rag.generation.generator import Generator

    key = ("generator", checkpoint.generator, checkpoint.reader, _text(name_or_path), *_given(loading))
    return _share(key, lambda: Generator.from_checkpoint(checkpoint, name_or_path, **loading))


def shared_store(folder: str | Path | None = None) -> SQLiteStore:
    """The process's SQLite store in a folder; None: pic-rag's cache folder, where `PicRag` keeps memories as well."""
    from pic_rag.models.embedded import cache_folder
    from pic_rag.store import STORE_FILE, SQLiteStore

    path = Path(folder or cache_folder()) / STORE_FILE
    return _share(("store", str(path)), lambda: SQLiteStore(path))


def unload_shared() -> None:
    """Forget all that is shared; a model that nobody else holds is freed."""
    with _guard:
        _values.clear()


def _share(key: Hashable, make: Callable[[], T]) -> T:
    with _guard:
        lock = _locks.setdefault(key, threading.Lock())
    with lock:  # others may load other models meanwhile
        value: T | None = _values.get(key)
        if value is None:
            value = _values[key] = make()
        return value


def _text(name: str | Path | None) -> str | None:
    return None if name is None else str(name)


def _given(loading: dict[str, Any]) -> list[tuple[str, Any]]:
    """What was set: None and leaving it out are the same."""
    return sorted((name, value) for name, value in loading.items() if value is not None)

"""One loaded model for all who ask for the same one: components of an application share it instead of loading it again.

What is shared stays until `unload_shared` or the end of the process. This file keeps what others build; compressors,
generators and stores are shared by files of their own rooms. Importing it loads the standard library only.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from pic_rag.models.checkpoint import Checkpoint

T = TypeVar("T")

_values: dict[Hashable, Any] = {}
_locks: dict[Hashable, threading.Lock] = {}
_guard = threading.Lock()


def share(key: Hashable, make: Callable[[], T]) -> T:
    """The process's value of that key, made by the first who asks; who asks meanwhile waits for it. Thread safe."""
    with _guard:
        lock = _locks.setdefault(key, threading.Lock())
    with lock:  # others may load other models meanwhile
        value: T | None = _values.get(key)
        if value is None:
            value = _values[key] = make()
        return value


def loading_key(name_or_path: str | Path | None, loading: Mapping[str, Any]) -> Hashable:
    """Equal for equal requests: a path is its text, and None is a setting left out.

    >>> loading_key(Path("some/model"), {"device": None, "dtype": "float32"})
    ('some/model', ('dtype', 'float32'))
    """
    given = sorted((name, value) for name, value in loading.items() if value is not None)
    return (None if name_or_path is None else str(name_or_path), *given)


def unload_shared() -> None:
    """Forget all that is shared; a model that nobody else holds is freed."""
    with _guard:
        _values.clear()


def shared_checkpoint(name_or_path: str | Path | None = None) -> Checkpoint:
    """The process's checkpoint of that name: what a compressor is on disk, read without loading models. Thread safe.

    Args:
        name_or_path: as for `Checkpoint.load`.
    """
    from pic_rag.models.checkpoint import Checkpoint

    return share(("checkpoint", loading_key(name_or_path, {})), lambda: Checkpoint.load(name_or_path))

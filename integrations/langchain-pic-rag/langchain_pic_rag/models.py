"""The models of this process: equal settings share one loaded compressor, one generator and one store connection.

This file does not know LangChain.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import pic_rag

if TYPE_CHECKING:
    from pic_rag import Compressor, Generator, SQLiteStore

STORE_FILE = "memories.sqlite"

T = TypeVar("T")


class Loading(NamedTuple):
    """What decides which models are loaded.

    Attributes:
        model_name: folder or hub id of the compressor; None: the one shipped with pic-rag.
        generator_name: where the generator is, when not where the compressor's checkpoint says.
        device: as torch names it; None picks cuda, mps or cpu.
        dtype: such as "bfloat16"; None picks the device's fast one.
        options: further arguments of `from_pretrained`, as sorted pairs.
    """

    model_name: str | None
    generator_name: str | None
    device: str | None
    dtype: str | None
    options: tuple[tuple[str, Any], ...]

    @classmethod
    def of(
        cls,
        model_name: str | None,
        generator_name: str | None,
        device: str | None,
        dtype: str | None,
        model_kwargs: Mapping[str, Any],
    ) -> Loading:
        """The settings as one hashable value."""
        return cls(model_name, generator_name, device, dtype, tuple(sorted(model_kwargs.items())))


class _Shared:
    """Values by key, each made once. Threads that ask for a value being made wait for it; others do not."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._key_locks: dict[Hashable, threading.Lock] = {}
        self._values: dict[Hashable, Any] = {}

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        with self._lock:
            key_lock = self._key_locks.setdefault(key, threading.Lock())
        with key_lock:
            if key not in self._values:
                self._values[key] = make()
            return cast("T", self._values[key])

    def clear(self) -> None:
        with self._lock:
            self._key_locks, self._values = {}, {}


_models = _Shared()
_stores = _Shared()


def load_compressor(loading: Loading) -> Compressor:
    """The process's compressor for these settings, loaded at the first call."""

    def load() -> Compressor:
        return pic_rag.Compressor.from_pretrained(
            loading.model_name,
            base_model=loading.generator_name,
            device=loading.device,
            dtype=loading.dtype,
            **dict(loading.options),
        )

    return _models.get(("compressor", loading), load)


def load_generator(loading: Loading, compressor: Compressor) -> Generator:
    """The process's generator that reads this compressor's memories, loaded at the first call."""
    name = loading.generator_name or compressor.generator.name

    def load() -> Generator:
        return pic_rag.Generator.from_pretrained(
            name, reader=compressor.reader, device=loading.device, dtype=loading.dtype, **dict(loading.options)
        )

    return _models.get(("generator", loading._replace(generator_name=name), compressor.generator.id), load)


def default_store(cache_folder: str | None) -> SQLiteStore:
    """The process's SQLite store in a folder; None: pic-rag's own cache folder, which `PicRag` uses as well."""
    path = Path(cache_folder) / STORE_FILE if cache_folder else pic_rag.cache_folder() / STORE_FILE
    return _stores.get(str(path), lambda: pic_rag.SQLiteStore(path))


def unload_models() -> None:
    """Forget the models of this process: their memory is free once nothing else uses them."""
    _models.clear()

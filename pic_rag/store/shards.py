"""The store for bulk corpora: a folder of safetensors shards.

Every `mset` writes one new shard, so writers never wait for each other and a shard is written once. It appears under
its name in one atomic rename after an fsync: a killed writer leaves at most a temporary file, which nobody reads.

A shard holds one uint8 tensor per key and is read by memory mapping. Shards are numbered; where two hold the same key
the higher name wins. Any number of processes may read and write at once, but only one may delete.
"""

from __future__ import annotations

import os
import re
import threading
import time
import uuid
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import save

from pic_rag.store.protocol import StoreError

_SHARD_NAME = re.compile(r"shard-([0-9]{8})-[0-9a-f]{8}\.safetensors")
_RESERVED_KEY = "__metadata__"  # safetensors' own
_CLOCK_NS = 2_000_000_000  # coarsest clock of a common file system (FAT): 2 s


@dataclass(frozen=True)
class _Shard:
    """One file as it was when it was opened."""

    stamp: tuple[int, int, int]  # inode, modification time in ns, size in bytes
    reader: Any = None
    keys: frozenset[str] = field(default_factory=frozenset)
    error: str = ""  # why it cannot be read

    @classmethod
    def open(cls, path: Path, stamp: tuple[int, int, int]) -> _Shard:
        try:
            reader: Any = safetensors.safe_open(path, framework="np")
            return cls(stamp, reader, frozenset(reader.keys()))
        except (safetensors.SafetensorError, OSError) as error:
            return cls(stamp, error=str(error))


class ShardStore:
    """Keys to bytes in a folder of safetensors files.

    The headers are scanned on first use, and again when the folder has changed. One object may be shared by threads
    and pickled.

    Args:
        folder: The folder; it is made on the first `mset`.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Remember the folder; touch nothing."""
        self.folder = Path(folder).absolute()
        self._lock = threading.RLock()
        self._shards: dict[str, _Shard] = {}  # by file name
        self._homes: dict[str, str] = {}  # key to the file name that holds its newest value
        self._scanned_ns: int | None = None  # the folder's modification time, when it is safe to rely on

    def mget(self, keys: Sequence[str]) -> list[bytes | None]:
        """Values of the keys, in order; None where there is none.

        Raises:
            StoreError: The folder cannot be read, or a key is missing and a shard that might hold it is corrupt.
        """
        with self._reading():
            values = {key: self._read(key) for key in dict.fromkeys(keys)}
        if None in values.values():
            self._raise_if_corrupt()
        return [values[key] for key in keys]

    def mset(self, key_value_pairs: Sequence[tuple[str, bytes]]) -> None:
        """Write all pairs as one new shard; a key that is there already gets the new value.

        Raises:
            StoreError: The folder cannot be written.
            ValueError: A key is ``__metadata__``, which safetensors keeps for itself.
        """
        pairs = dict(key_value_pairs)
        if _RESERVED_KEY in pairs:
            raise ValueError(f"key must not be {_RESERVED_KEY!r}, which safetensors keeps for itself. Rename it.")
        if not pairs:
            return
        with self._reading():
            number = 1 + max((int(name.split("-")[1]) for name in self._shards), default=0)
            self._write(f"shard-{number:08d}-{uuid.uuid4().hex[:8]}.safetensors", pairs)

    def mdelete(self, keys: Sequence[str]) -> None:
        """Rewrite every shard that holds one of the keys; a key that is not there is no error.

        Raises:
            StoreError: The folder cannot be written.
        """
        doomed = set(keys)
        with self._reading():
            for name, shard in list(self._shards.items()):
                if doomed.isdisjoint(shard.keys):
                    continue
                kept = {key: shard.reader.get_tensor(key).tobytes() for key in shard.keys - doomed}
                if kept:
                    self._write(name, kept)
                else:
                    (self.folder / name).unlink(missing_ok=True)

    def yield_keys(self, *, prefix: str | None = None) -> Generator[str, None, None]:
        """Keys of all readable shards that start with the prefix, sorted; all keys without one.

        Raises:
            StoreError: The folder cannot be read, or, once the readable keys are out, a shard is corrupt.
        """
        with self._reading():
            keys = sorted(key for key in self._homes if key.startswith(prefix or ""))
        yield from keys
        self._raise_if_corrupt()

    def __reduce__(self) -> tuple[type[ShardStore], tuple[Path]]:
        """Pickle the folder: mapped files belong to their process."""
        return ShardStore, (self.folder,)

    def __repr__(self) -> str:
        """The call that makes this store."""
        return f"ShardStore({str(self.folder)!r})"

    @contextmanager
    def _reading(self) -> Generator[None, None, None]:
        """One thread at a time, with an index that is up to date."""
        with self._lock:
            try:
                self._refresh()
                yield
            except StoreError:
                raise
            except (OSError, safetensors.SafetensorError) as error:
                raise StoreError.at(self.folder, error) from error

    def _read(self, key: str) -> bytes | None:
        name = self._homes.get(key)
        return None if name is None else self._shards[name].reader.get_tensor(key).tobytes()

    def _raise_if_corrupt(self) -> None:
        for name, shard in sorted(self._shards.items()):
            if shard.error:
                raise StoreError(
                    f"Shard {self.folder / name} must be a whole safetensors file, got: {shard.error}. "
                    "Restore that file, or delete it and compress its documents again; the other shards are readable."
                )

    def _refresh(self) -> None:
        """Open the shards that are new, forget those that are gone; nothing if the folder has not changed."""
        try:
            changed_ns = self.folder.stat().st_mtime_ns
            if changed_ns == self._scanned_ns:
                return
            stamps = self._stamps()
        except FileNotFoundError:
            changed_ns, stamps = 0, {}
        except OSError as error:
            raise StoreError.at(self.folder, error) from error
        # A change within the same tick of the clock would leave the same time: rely on it only once it is old.
        self._scanned_ns = changed_ns if 0 < changed_ns < time.time_ns() - _CLOCK_NS else None
        self._index(stamps)

    def _stamps(self) -> dict[str, tuple[int, int, int]]:
        """Stamp of every shard in the folder, in the order of their names."""
        stamps = {}
        for name in sorted(filter(_SHARD_NAME.fullmatch, os.listdir(self.folder))):
            try:
                status = (self.folder / name).stat()
            except FileNotFoundError:  # deleted since it was listed
                continue
            stamps[name] = (status.st_ino, status.st_mtime_ns, status.st_size)
        return stamps

    def _index(self, stamps: dict[str, tuple[int, int, int]]) -> None:
        """Bring the index up to date, at the cost of the new shards only unless one was rewritten or deleted."""
        if any(stamps.get(name) != shard.stamp for name, shard in self._shards.items()):
            self._shards = {name: shard for name, shard in self._shards.items() if stamps.get(name) == shard.stamp}
            self._homes = {key: name for name, shard in sorted(self._shards.items()) for key in shard.keys}
        for name in stamps.keys() - self._shards.keys():
            shard = self._shards[name] = _Shard.open(self.folder / name, stamps[name])
            self._homes.update((key, max(name, self._homes.get(key, name))) for key in shard.keys)

    def _write(self, name: str, pairs: dict[str, bytes]) -> None:
        """Write a shard under a temporary name, then rename it: it is never seen half-written."""
        tensors = {key: np.frombuffer(value, dtype=np.uint8) for key, value in pairs.items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f".{name}.{uuid.uuid4().hex}.tmp"
        try:
            with temporary.open("wb") as file:
                file.write(save(tensors))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.folder / name)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        self._scanned_ns = None
        _fsync_folder(self.folder)


def _fsync_folder(folder: Path) -> None:
    """Make a rename itself survive a power cut, where the system can open folders."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

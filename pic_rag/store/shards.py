"""The store for bulk corpora: a folder of safetensors shards.

Every `mset` writes one new shard, so writers never wait for each other. A shard appears under its name in one atomic
rename after an fsync and never changes under it: a killed writer leaves at most a temporary file, which nobody reads.
`mdelete` writes what is left of a shard under a new name, then removes the old one; killed in between, it leaves both,
and the keys are deleted when it is called again.

A shard holds one uint8 tensor per key and is read by memory mapping. Shards are numbered; where two hold the same key
the higher name wins. Any number of processes may read and write at once, but only one may delete.

A store remembers the keys of every shard and keeps few of them mapped: systems limit mappings, and folders grow. To be
up to date it lists the names in the folder and opens the new shards, whatever the number of those it knows.
"""

from __future__ import annotations

import functools
import os
import re
import time
import uuid
from collections.abc import Generator, Iterable, Mapping, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import save

from pic_rag.store.forks import SurvivesForks
from pic_rag.store.protocol import StoreError

_SHARD_NAME = re.compile(r"shard-[0-9]{8}-[0-9a-f]{8}(-[0-9a-f]{8})?\.safetensors")  # number, writer, deletion
_RESERVED_KEY = "__metadata__"  # safetensors' own
_CLOCK_NS = 2_000_000_000  # coarsest clock of a common file system (FAT): 2 s
_MAPPED_SHARDS = 4096  # at once; Linux allows a process 65,530 mappings


class ShardStore(SurvivesForks):
    """Keys to bytes in a folder of safetensors files.

    The headers are scanned on first use, and those of new shards when the folder has changed. One object may be shared
    by threads, carried over a fork and pickled.

    Args:
        folder: The folder; it is made on the first `mset`.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Remember the folder; touch nothing."""
        self.folder = Path(folder).absolute()
        self._start_over()
        super().__init__()

    def _start_over(self) -> None:
        """Know nothing of the folder."""
        self._keys: dict[str, frozenset[str]] = {}  # of every readable shard, by file name
        self._homes: dict[str, str] = {}  # key to the file name that holds its newest value
        self._unreadable: dict[str, str] = {}  # file name to what is wrong with it
        self._highest = 0  # number that a shard has or had
        self._listed_ns: int | None = None  # the folder's modification time, when it is safe to rely on
        self._reader = functools.lru_cache(_MAPPED_SHARDS)(_open)

    def mget(self, keys: Sequence[str]) -> list[bytes | None]:
        """Values of the keys, in order; None where there is none.

        Raises:
            StoreError: The folder or a shard cannot be read, or a key is missing and an unreadable shard might hold it.
        """
        with self._up_to_date():
            by_shard = sorted(dict.fromkeys(keys), key=lambda key: self._homes.get(key, ""))  # each is opened once
            values = {key: self._value(key) for key in by_shard}
            if None in values.values():
                self._raise_if_unreadable()
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
        with self._up_to_date():
            self._highest += 1
            self._write(f"shard-{self._highest:08d}-{_random_hex()}.safetensors", pairs)

    def mdelete(self, keys: Sequence[str]) -> None:
        """Rewrite every shard that holds one of the keys; a key that is not there is no error.

        Raises:
            StoreError: The folder cannot be written, or a shard that holds one of the keys cannot be read.
        """
        doomed = set(keys)
        with self._up_to_date():
            self._listed_ns = None
            holding = [name for name, own in self._keys.items() if not doomed.isdisjoint(own)]
            for name in sorted(holding):  # old values go first, and never come back
                kept = {key: self._read(name, key) for key in self._keys[name] - doomed}
                if kept:
                    self._write(f"{_origin(name)}-{_random_hex()}.safetensors", kept)
                self._reader.cache_clear()  # Windows removes no file that is mapped
                (self.folder / name).unlink(missing_ok=True)

    def yield_keys(self, *, prefix: str | None = None) -> Generator[str, None, None]:
        """Keys of all readable shards that start with the prefix, sorted; all keys without one.

        Raises:
            StoreError: The folder cannot be read, or, once the readable keys are out, a shard is unreadable.
        """
        with self._up_to_date():
            keys = sorted(key for key in self._homes if key.startswith(prefix or ""))
        yield from keys
        with self._lock:
            self._raise_if_unreadable()

    def __reduce__(self) -> tuple[type[ShardStore], tuple[Path]]:
        """Pickle the folder: mapped files belong to their process."""
        return ShardStore, (self.folder,)

    def __repr__(self) -> str:
        """The call that makes this store."""
        return f"ShardStore({str(self.folder)!r})"

    @contextmanager
    def _up_to_date(self) -> Generator[None, None, None]:
        """One thread at a time, with an index that is up to date."""
        with self._lock:
            try:
                self._refresh()
                yield
            except StoreError:
                raise
            except OSError as error:
                raise StoreError.at(self.folder, error) from error
            except BaseException as error:  # Ctrl-C, say, in the middle of anything
                self._start_over()
                if isinstance(error, (MemoryError, safetensors.SafetensorError)):
                    raise StoreError.at(self.folder, error) from error
                raise

    def _value(self, key: str) -> bytes | None:
        """The newest value of a key."""
        while (name := self._homes.get(key)) is not None:
            try:
                return self._read(name, key)
            except FileNotFoundError:  # another process has rewritten or deleted the shard since the folder was listed
                self._forget({name})
                self._listed_ns = None
                self._refresh()
            except StoreError as error:  # damaged since it was opened first
                self._forget({name})
                self._unreadable[name] = str(error)
                raise
        return None

    def _read(self, name: str, key: str) -> bytes:
        return self._reader(self.folder / name).get_tensor(key).tobytes()

    def _raise_if_unreadable(self) -> None:
        if self._unreadable:
            raise StoreError(self._unreadable[min(self._unreadable)])

    def _refresh(self) -> None:
        """Forget the shards that are gone, open the new ones, and look again at those that were unreadable."""
        vanished: set[str] = set()  # rewritten or deleted before they were opened
        while missed := {name for name in self._unopened() - vanished if not self._add(name)}:
            vanished |= missed
            self._listed_ns = None  # what they were rewritten to is in the next listing

    def _unopened(self) -> set[str]:
        """Shards that are new in the folder, and unreadable ones, which somebody may have restored."""
        changed_ns, names = self._list()
        if names is None:
            return set(self._unreadable)
        # A change within the same tick of the clock would leave the same time: rely on it only once it is old.
        self._listed_ns = changed_ns if 0 < changed_ns < time.time_ns() - _CLOCK_NS else None
        self._forget(self._keys.keys() - names)
        self._unreadable = {}
        return set(filter(_SHARD_NAME.fullmatch, names - self._keys.keys()))

    def _list(self) -> tuple[int, set[str] | None]:
        """When the folder was changed, and the names in it; None if it was not since it was listed last."""
        try:
            changed_ns = self.folder.stat().st_mtime_ns
            if changed_ns == self._listed_ns:
                return changed_ns, None
            names = set(os.listdir(self.folder))
            if self.folder.stat().st_mtime_ns != changed_ns:  # under way: it may lack both names of a rewritten shard
                names = set(os.listdir(self.folder))
        except FileNotFoundError:
            return 0, set()
        return changed_ns, names

    def _add(self, name: str) -> bool:
        """Open a shard for its keys; whether it is still there."""
        self._highest = max(self._highest, int(name.split("-")[1]))
        self._unreadable.pop(name, None)
        try:
            self._index(name, self._reader(self.folder / name).keys())
        except FileNotFoundError:
            return False
        except StoreError as error:
            self._unreadable[name] = str(error)
        return True

    def _index(self, name: str, keys: Iterable[str]) -> None:
        self._keys[name] = frozenset(keys)
        self._claim(name, self._keys[name])

    def _claim(self, name: str, keys: Set[str]) -> None:
        """Make a shard the home of those of its keys that no higher one holds."""
        self._homes.update((key, max(name, self._homes.get(key, name))) for key in keys)

    def _forget(self, names: Set[str]) -> None:
        """Drop shards; their keys have the next higher ones as homes."""
        if not names:
            return
        lost = frozenset().union(*(self._keys.pop(name) for name in names))
        for key in lost:
            del self._homes[key]
        for name, keys in self._keys.items():
            self._claim(name, keys & lost)
        self._reader.cache_clear()

    def _write(self, name: str, pairs: Mapping[str, bytes]) -> None:
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
        self._listed_ns = None
        self._index(name, pairs)
        _fsync_folder(self.folder)


def _open(path: Path) -> Any:  # noqa: ANN401 - safetensors has no types
    """A reader of a shard, which maps it.

    Raises:
        FileNotFoundError: It is not there any more.
        StoreError: It cannot be read.
    """
    try:
        with path.open("rb"):  # safetensors calls every file not found that it cannot open
            return safetensors.safe_open(path, framework="np")
    except FileNotFoundError:
        raise
    except safetensors.SafetensorError as error:
        raise StoreError(
            f"Shard {path} must be a whole safetensors file, got: {error}. "
            "Restore that file, or delete it and compress its documents again; the other shards are readable."
        ) from error
    except (OSError, MemoryError) as error:
        raise StoreError.at(path, error) from error


def _origin(name: str) -> str:
    """Number and writer of a shard: whatever is deleted from it keeps its place among all shards.

    >>> _origin("shard-00000001-aaaaaaaa-bbbbbbbb.safetensors")
    'shard-00000001-aaaaaaaa'
    """
    return name[: len("shard-00000001-aaaaaaaa")]


def _random_hex() -> str:
    return uuid.uuid4().hex[:8]


def _fsync_folder(folder: Path) -> None:
    """Make a rename itself survive a power cut, where the system can open folders."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

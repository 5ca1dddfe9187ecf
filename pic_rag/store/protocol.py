"""What a store is: keys to bytes, in the shape of LangChain's `ByteStore`.

Anything with these four methods is a store: LangChain's Redis, file and in-memory byte stores plug in unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

_NEXT_STEPS = {
    "disk i/o error": "Free disk space, check the disk, or choose another path.",
    "cannot allocate memory": "Free memory, or raise the limits on it (ulimit -v, vm.max_map_count).",
    "memoryerror": "Free memory, or raise the limits on it (ulimit -v, vm.max_map_count).",
    "too many open files": "Raise the process's limit on open files (ulimit -n).",
    "disk is full": "Free disk space, or put the store on another disk.",
    "no space left": "Free disk space, or put the store on another disk.",
    "quota": "Free disk space, or put the store on another disk.",
    "too large": "Raise the process's file size limit (ulimit -f), or put the store on another disk.",
    "readonly": "Give this process write permission, or choose another path.",
    "read-only": "Give this process write permission, or choose another path.",
    "permission": "Give this process write permission, or choose another path.",
    "unable to open": "Choose a path whose folder exists and is writable, and have fewer files open than `ulimit -n`.",
    "no such file": "Try again: another process has moved or deleted it.",
    "exists": "Choose another path: something else is in the way.",
    "directory": "Choose another path: something else is in the way.",
    "locked": "Another process has been writing all this time: try again, or raise timeout_s.",
    "not a database": "Choose another path, or move that file away: memories can be compressed again.",
    "malformed": "Move that file away: its memories can be compressed again from their documents.",
}


@runtime_checkable
class MemoryStore(Protocol):
    """Keys to bytes. The store does not know what the bytes mean."""

    def mget(self, keys: Sequence[str]) -> list[bytes | None]:
        """Values of the keys, in order; None where there is none."""

    def mset(self, key_value_pairs: Sequence[tuple[str, bytes]]) -> None:
        """Write pairs; a key that is there already gets the new value."""

    def mdelete(self, keys: Sequence[str]) -> None:
        """Delete keys; a key that is not there is no error."""

    def yield_keys(self, *, prefix: str | None = None) -> Iterator[str]:
        """Keys that start with the prefix, all keys without one."""


def check_store(store: object) -> None:
    """Raise ValueError when something given as a store is none, such as the path of one."""
    if not isinstance(store, MemoryStore):
        raise ValueError(
            f"store must be a pic_rag.MemoryStore or a LangChain ByteStore, got {store!r}. "
            "For a file pass pic_rag.SQLiteStore(path)."
        )


class StoreError(OSError):
    """A store on disk could not be read or written. The message names the path and the next step."""

    @classmethod
    def at(cls, path: Path, error: Exception) -> StoreError:
        """Say what happened at a path, and what to do about it."""
        reason = str(error) or type(error).__name__
        next_step = next(
            (step for symptom, step in _NEXT_STEPS.items() if symptom in reason.lower()),
            "Check the disk, or choose another path.",
        )
        return cls(f"Store at {path} must be readable and writable, got: {reason}. {next_step}")

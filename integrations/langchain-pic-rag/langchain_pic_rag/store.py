"""PICByteStore: any pic-rag store as a LangChain `ByteStore`.

The other way needs no adapter: every LangChain `ByteStore` has the four methods of `pic_rag.MemoryStore`, so it is
passed as `store=` as it is.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from langchain_core.stores import ByteStore

from pic_rag import MemoryStore, SQLiteStore


class PICByteStore(ByteStore):
    """A pic-rag store where LangChain wants a `ByteStore`, such as `CacheBackedEmbeddings`.

    Args:
        store: a `pic_rag.MemoryStore`, or the path of a SQLite file.
    """

    def __init__(self, store: MemoryStore | str | os.PathLike[str]) -> None:
        self.store: MemoryStore = SQLiteStore(store) if isinstance(store, (str, os.PathLike)) else store

    def mget(self, keys: Sequence[str]) -> list[bytes | None]:
        """Values of the keys, in order; None where there is none."""
        return self.store.mget(keys)

    def mset(self, key_value_pairs: Sequence[tuple[str, bytes]]) -> None:
        """Write pairs; a key that is there already gets the new value."""
        self.store.mset(key_value_pairs)

    def mdelete(self, keys: Sequence[str]) -> None:
        """Delete keys; a key that is not there is no error."""
        self.store.mdelete(keys)

    def yield_keys(self, *, prefix: str | None = None) -> Iterator[str]:
        """Keys that start with the prefix, all keys without one."""
        yield from self.store.yield_keys(prefix=prefix)


def store_name(store: MemoryStore) -> str:
    """What tells a store from others: the same in every process, where the store says in which place it is."""
    if isinstance(store, PICByteStore):
        return store_name(store.store)
    place = getattr(store, "path", None) or getattr(store, "root_path", None)
    if type(store).__repr__ is not object.__repr__ or not isinstance(place, (str, os.PathLike)):
        return repr(store)
    return f"{type(store).__name__}({os.path.abspath(place)!r})"

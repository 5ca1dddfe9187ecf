"""The store: where memories are kept, the only room that writes them to disk.

`protocol` says what a store is (keys to bytes), `sqlite` and `shards` are two, `default` is the one used when nobody
says, `forks` keeps their locks whole where a process forks, `cache` finds memories in any of them by their handles, and
`signing` tells the handles that were handed out from those that somebody typed. This room does not know how a memory is
made: it asks a compressor for those it lacks. Names load on first use, so a process that only keeps bytes in SQLite
never imports torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pic_rag.store.cache import MemoryCache
    from pic_rag.store.default import STORE_FILE, shared_store
    from pic_rag.store.protocol import MemoryStore, StoreError
    from pic_rag.store.shards import ShardStore
    from pic_rag.store.signing import HandleSigner
    from pic_rag.store.sqlite import SQLiteStore

__all__ = [
    "STORE_FILE",
    "HandleSigner",
    "MemoryCache",
    "MemoryStore",
    "SQLiteStore",
    "ShardStore",
    "StoreError",
    "shared_store",
]

_HOMES = {
    "STORE_FILE": "default",
    "HandleSigner": "signing",
    "MemoryCache": "cache",
    "MemoryStore": "protocol",
    "SQLiteStore": "sqlite",
    "ShardStore": "shards",
    "StoreError": "protocol",
    "shared_store": "default",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """Import a public name from its module on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """Public names, for completion."""
    return __all__

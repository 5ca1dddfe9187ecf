"""The store: the only room that touches disk.

Names load on first use, so a process that only keeps bytes in SQLite never imports torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pic_rag.store.cache import MemoryCache
    from pic_rag.store.protocol import MemoryStore, StoreError
    from pic_rag.store.shards import ShardStore
    from pic_rag.store.signing import HandleSigner
    from pic_rag.store.sqlite import SQLiteStore

STORE_FILE = "memories.sqlite"
"""Name of the default store, in the cache folder or in an index."""

__all__ = ["STORE_FILE", "HandleSigner", "MemoryCache", "MemoryStore", "SQLiteStore", "ShardStore", "StoreError"]

_HOMES = {
    "HandleSigner": "signing",
    "MemoryCache": "cache",
    "MemoryStore": "protocol",
    "SQLiteStore": "sqlite",
    "ShardStore": "shards",
    "StoreError": "protocol",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """Import a public name from its module on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """Public names, for completion."""
    return __all__

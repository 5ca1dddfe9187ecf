"""Where memories are kept when nobody says: one SQLite file in a folder, shared in the process."""

from __future__ import annotations

from pathlib import Path

from pic_rag.models.embedded import cache_folder
from pic_rag.models.sharing import share
from pic_rag.store.sqlite import SQLiteStore

STORE_FILE = "memories.sqlite"
"""Name of the default store, in the cache folder or in an index."""


def shared_store(folder: str | Path | None = None) -> SQLiteStore:
    """The process's SQLite store in a folder; None: pic-rag's cache folder, where `PicRag` keeps memories as well."""
    path = Path(folder or cache_folder()).expanduser() / STORE_FILE
    return share(("store", str(path)), lambda: SQLiteStore(path))

"""The default store: one SQLite file, for many readers and writers.

Write-ahead logging keeps readers and the writer out of each other's way, across threads and processes. Every `mset`
is one transaction: a process killed in the middle of it leaves all of its pairs or none.

``synchronous=NORMAL`` survives any killed process without an fsync per `mset`. A power cut may lose the last
transactions, never the file: what is lost is compressed again.
"""

from __future__ import annotations

import os
import sqlite3
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from pic_rag.store.forks import SurvivesForks
from pic_rag.store.protocol import StoreError

_KEYS_PER_QUERY = 500  # SQLite before 3.32 allows 999 variables in a statement
_KEYS_PER_PAGE = 1000
_ROW_BYTES = 16  # of a row beside its key and value, at most


class SQLiteStore(SurvivesForks):
    """Keys to bytes in one SQLite file.

    The file is opened on first use. One object may be shared by threads, carried over a fork and pickled.

    Args:
        path: The file; it and its folders are made when missing. One that may not be written is read.
        timeout_s: Seconds to wait for another writer.
    """

    def __init__(self, path: str | os.PathLike[str], timeout_s: float = 30.0) -> None:
        """Remember the path; touch nothing."""
        if timeout_s < 0:
            raise ValueError(f"timeout_s must be at least 0, got {timeout_s}.")
        self.path = Path(path).absolute()
        self.timeout_s = timeout_s
        self._connection: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None  # that the connection is to
        self._immutable = False
        super().__init__()  # from now on a fork asks for the connection

    def mget(self, keys: Sequence[str]) -> list[bytes | None]:
        """Values of the keys, in order; None where there is none.

        Raises:
            StoreError: The file cannot be read.
        """
        wanted = list(dict.fromkeys(keys))
        values: dict[str, bytes] = {}
        with self._connected() as connection:
            for start in range(0, len(wanted), _KEYS_PER_QUERY):
                some = wanted[start : start + _KEYS_PER_QUERY]
                marks = ",".join("?" * len(some))
                values.update(connection.execute(f"SELECT key, value FROM memories WHERE key IN ({marks})", some))
        return [values.get(key) for key in keys]

    def mset(self, key_value_pairs: Sequence[tuple[str, bytes]]) -> None:
        """Write all pairs or, when it raises, none; a key that is there already gets the new value.

        Raises:
            StoreError: The file cannot be written: the disk is full, read-only or locked for `timeout_s`.
            ValueError: A value is larger than SQLite takes: 1,000,000,000 bytes with its key, as it is mostly built.
        """
        pairs = list(key_value_pairs)
        with self._connected() as connection:
            _check_sizes(pairs, _limit_bytes(connection))
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany("INSERT OR REPLACE INTO memories (key, value) VALUES (?, ?)", pairs)
            connection.execute("COMMIT")

    def mdelete(self, keys: Sequence[str]) -> None:
        """Delete keys; a key that is not there is no error.

        Raises:
            StoreError: The file cannot be written.
        """
        with self._connected() as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany("DELETE FROM memories WHERE key = ?", [(key,) for key in keys])
            connection.execute("COMMIT")

    def yield_keys(self, *, prefix: str | None = None) -> Generator[str, None, None]:
        """Keys that start with the prefix, sorted; all keys without one.

        Keys are read a page at a time and nothing is locked between pages, so the loop may write to the store.

        Raises:
            StoreError: The file cannot be read.
        """
        start, comparison = prefix or "", ">="
        while True:
            query = f"SELECT key FROM memories WHERE key {comparison} ? ORDER BY key LIMIT {_KEYS_PER_PAGE}"
            with self._connected() as connection:
                page = [key for (key,) in connection.execute(query, (start,))]
            for key in page:
                if not key.startswith(prefix or ""):  # keys are sorted by their bytes: the rest are past the prefix
                    return
                yield key
            if len(page) < _KEYS_PER_PAGE:
                return
            start, comparison = page[-1], ">"

    def close(self) -> None:
        """Let go of the file; the next call opens it again."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def __enter__(self) -> SQLiteStore:
        """The store itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def __reduce__(self) -> tuple[type[SQLiteStore], tuple[Path, float]]:
        """Pickle the path: a connection belongs to its process."""
        return SQLiteStore, (self.path, self.timeout_s)

    def __repr__(self) -> str:
        """The call that makes this store."""
        return f"SQLiteStore({str(self.path)!r}, timeout_s={self.timeout_s})"

    def _before_fork(self) -> None:
        """Close: SQLite's file locks are per process, and a child with a connection believes it holds its parent's."""
        self.close()

    @contextmanager
    def _connected(self) -> Generator[sqlite3.Connection, None, None]:
        """The connection, for one thread at a time.

        Whatever goes wrong, the connection is closed, which rolls its transaction back: none is left open.
        """
        with self._lock:
            try:
                if self._connection is not None and self._file != _file_id(self.path):
                    self.close()  # moved away or replaced: what is written to the old file nobody would find
                if self._connection is None:
                    self._connection = self._open()
                    self._file = _file_id(self.path)
                yield self._connection
                if self._immutable:  # it may be written to from now on, which such a connection would not notice
                    self.close()
            except BaseException as error:
                self.close()
                if isinstance(error, (sqlite3.DatabaseError, OSError)):
                    raise StoreError.at(self.path, error) from error
                raise

    def _open(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # the log is beside the file, not beside a link to it
        path = Path(os.path.realpath(self.path)) if self.path.is_symlink() else self.path
        if path.is_file() and not (_writable(path) and _writable(path.parent)):  # a log is to be beside it
            # Part of an image or of somebody else's installation. Without a log beside it nobody is writing to it, and
            # SQLite need not make one to read it.
            self._immutable = not path.with_name(f"{path.name}-wal").exists()
            return self._connect(f"{path.as_uri()}?mode=ro{'&immutable=1' if self._immutable else ''}")
        self._immutable = False
        connection = self._connect(path.as_uri())
        try:
            self._start_logging(connection)
            connection.execute("PRAGMA synchronous=NORMAL")
            connection.execute("CREATE TABLE IF NOT EXISTS memories (key TEXT PRIMARY KEY, value BLOB NOT NULL)")
        except BaseException:
            connection.close()
            raise
        return connection

    def _connect(self, uri: str) -> sqlite3.Connection:
        """A connection whose transactions begin and end where this file says so."""
        return sqlite3.connect(uri, uri=True, timeout=self.timeout_s, isolation_level=None, check_same_thread=False)

    def _start_logging(self, connection: sqlite3.Connection) -> None:
        """Switch to write-ahead logging.

        SQLite does not wait on its own when two processes switch a new file at once: it says "locked" straight away.
        """
        deadline = time.monotonic() + self.timeout_s
        while True:
            try:
                connection.execute("PRAGMA journal_mode=WAL")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)


def _limit_bytes(connection: sqlite3.Connection) -> int:
    """The largest row that SQLite takes."""
    if sys.version_info >= (3, 11):
        return connection.getlimit(sqlite3.SQLITE_LIMIT_LENGTH)
    return 1_000_000_000  # as it is built by default


def _check_sizes(pairs: Sequence[tuple[str, bytes]], row_bytes: int) -> None:
    for key, value in pairs:
        largest = row_bytes - _ROW_BYTES - len(key.encode())
        if len(value) > largest:
            raise ValueError(
                f"Value of {key} must be at most {largest:,} bytes in a SQLite file, got {len(value):,}. Split its "
                "document, compress it at a higher ratio, or keep memories in a folder of shards (ShardStore)."
            )


def _writable(path: Path) -> bool:
    return os.access(path, os.W_OK, effective_ids=os.access in os.supports_effective_ids)


def _file_id(path: Path) -> tuple[int, int] | None:
    """What tells a file from another one of that name; None where there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino

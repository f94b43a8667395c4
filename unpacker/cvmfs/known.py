"""Which object known bytes became, so that bytes seen before need not be compressed again.

The name of an object is known only after compressing, which takes most of the time of reading a layer; and a rebuilt
image has mostly files that an earlier one had. The index is a cache on local disk: losing it costs time, nothing else.

Contents are known by their BLAKE3: as hard to forge as SHA-256, at three times its speed.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from unpacker.errors import PublishError

MINIMUM = 16 << 10
"""Smaller contents are compressed in about the time that looking them up would take, and are most of the files."""


class Known(NamedTuple):
    """The digest of an object, and the size of the object as stored."""

    digest: bytes
    size: int


class KnownContents:
    """The index in the file `path`, for one repository, and in it one table for each compression and hash algorithm.
    Safe from many threads and processes."""

    def __init__(self, path: str, compression: str, algorithm: str) -> None:
        self._path = path
        self._table = f"blake3_{compression}_{algorithm}"
        self._lock = threading.Lock()
        with self._failing():
            self._db = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
            # No write-ahead log: of two processes that turn it on at the same moment one fails instead of waiting.
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._db.execute(
                f"CREATE TABLE IF NOT EXISTS {self._table}"
                " (content BLOB PRIMARY KEY, object BLOB NOT NULL, size INTEGER NOT NULL) WITHOUT ROWID"
            )

    def close(self) -> None:
        self._db.close()

    def find(self, content: bytes) -> Known | None:
        """What bytes of this hash became. The object may have been collected since."""
        with self._lock, self._failing():
            row = self._db.execute(f"SELECT object, size FROM {self._table} WHERE content = ?", (content,)).fetchone()
        return None if row is None else Known(*row)

    def add(self, learned: Mapping[bytes, Known]) -> None:
        """Remembers, by the hash of their bytes, objects that are in the repository now."""
        with self._lock, self._failing():
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany(
                f"INSERT OR REPLACE INTO {self._table} VALUES (?, ?, ?)",
                ((content, *known) for content, known in learned.items()),
            )
            self._db.execute("COMMIT")

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise PublishError(
                f"the index of known contents in {self._path}: {error}; delete it, which costs time only, and run again"
            ) from error

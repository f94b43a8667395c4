"""The reference log `.cvmfsreflog`: every root object ever published and not collected yet.

Garbage collection starts from it: what it does not list is never deleted, so a root catalog is listed before anything
can point at it. It is one file, not an object, so something must say that it is undamaged: the checksum file of the
official tools where they manage the repository, else the manifest.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import IntEnum

from unpacker.cvmfs import database
from unpacker.cvmfs.hash import ContentHash
from unpacker.errors import PublishError

FILE = ".cvmfsreflog"
LIMIT = 1 << 28

_SCHEMA, _REVISION = "1.0", 0
_TABLES = ("CREATE TABLE refs (hash TEXT, type INTEGER, timestamp INTEGER, CONSTRAINT pk_refs PRIMARY KEY (hash))",)


class Kind(IntEnum):
    """What a listed object is."""

    CATALOG = 0
    CERTIFICATE = 1
    HISTORY = 2
    META_INFO = 3


@dataclass(frozen=True, slots=True)
class Ref:
    """A root object, and when it was listed (Unix seconds)."""

    hash: ContentHash
    kind: Kind
    timestamp: int


@dataclass(frozen=True, slots=True)
class Reflog:
    """A reference log as its bytes. Changes make new ones."""

    name: str
    data: bytes
    what: str = "the reference log"

    @classmethod
    def create(cls, name: str) -> Reflog:
        """An empty one."""
        properties = {"schema": _SCHEMA, "schema_revision": str(_REVISION), "fqrn": name}
        return cls(name, database.created(_TABLES, properties))

    def refs(self) -> list[Ref]:
        """All that it lists, the oldest first."""
        with self._opened() as connection:
            rows = connection.execute("SELECT hash, type, timestamp FROM refs ORDER BY timestamp, hash").fetchall()
        try:
            return [Ref(ContentHash.parse(text), Kind(kind), int(timestamp)) for text, kind, timestamp in rows]
        except (TypeError, ValueError) as error:
            raise PublishError(f"{self.what} is damaged: {error}") from None

    def lists(self, name: ContentHash) -> bool:
        """Whether it lists this object."""
        with self._opened() as connection:
            return connection.execute("SELECT 1 FROM refs WHERE hash = ?", (name.hex,)).fetchone() is not None

    def with_refs(self, refs: Iterable[Ref]) -> Reflog:
        """These listed, too; one that is listed already gets the new time."""
        with self._opened() as connection:
            connection.execute("BEGIN")
            connection.executemany(
                "INSERT OR REPLACE INTO refs (hash, type, timestamp) VALUES (?, ?, ?)",
                ((ref.hash.hex, int(ref.kind), ref.timestamp) for ref in refs),
            )
            connection.execute("COMMIT")
            return replace(self, data=connection.serialize())

    def without(self, names: Iterable[ContentHash]) -> Reflog:
        """These not listed any more, and the file as small as it can be."""
        with self._opened() as connection:
            connection.execute("BEGIN")
            connection.executemany("DELETE FROM refs WHERE hash = ?", ((name.hex,) for name in names))
            connection.execute("COMMIT")
            connection.execute("VACUUM")
            return replace(self, data=connection.serialize())

    def is_sound(self) -> bool:
        """Whether it can be read to its last row and passes SQLite's own check."""
        try:
            with self._opened() as connection:
                if connection.execute("PRAGMA integrity_check").fetchall() != [("ok",)]:
                    return False
            self.refs()
        except PublishError:
            return False
        return True

    def checksum(self, algorithm: str) -> ContentHash:
        """The hash of the whole file."""
        return ContentHash.of(self.data, algorithm)

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        with database.opened(self.data, self.what, ("properties", "refs")) as connection:
            database.check_schema(connection, self.what, self.name, _SCHEMA, _REVISION)
            yield connection

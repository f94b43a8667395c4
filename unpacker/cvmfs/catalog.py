"""One catalog: an SQLite database in memory with the metadata of a subtree, schema 2.5 revision 7.

Reads revisions 0 to 7 and later ones, edits 5 to 7: earlier ones lack counters, later ones may mean things that an
edit would break. Columns are always named, because catalogs that were upgraded have them in another order.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NamedTuple

from unpacker.cvmfs.counters import Counters
from unpacker.cvmfs.hash import SIZE, ContentHash
from unpacker.cvmfs.row import Chunk, Row, key
from unpacker.errors import PublishError

SCHEMA = "2.5"
REVISION = 7
_OLDEST_EDITABLE = 5
"""From this revision on all 24 counters are there."""
_OLDEST_BINDING = 4

_PAGE_SIZE = 1024
"""Clients allocate the slots of their page cache for this."""

_WASTE = 4
"""Rewritten when more than one row number or page in so many is unused: clients reserve an inode for each number."""

_TABLES = (
    "CREATE TABLE properties (key TEXT, value TEXT, CONSTRAINT pk_properties PRIMARY KEY (key))",
    "CREATE TABLE catalog (md5path_1 INTEGER, md5path_2 INTEGER, parent_1 INTEGER, parent_2 INTEGER,"
    " hardlinks INTEGER, hash BLOB, size INTEGER, mode INTEGER, mtime INTEGER, mtimens INTEGER, flags INTEGER,"
    " name TEXT, symlink TEXT, uid INTEGER, gid INTEGER, xattr BLOB,"
    " CONSTRAINT pk_catalog PRIMARY KEY (md5path_1, md5path_2))",
    "CREATE TABLE chunks (md5path_1 INTEGER, md5path_2 INTEGER, offset INTEGER, size INTEGER, hash BLOB,"
    " CONSTRAINT pk_chunks PRIMARY KEY (md5path_1, md5path_2, offset, size),"
    " FOREIGN KEY (md5path_1, md5path_2) REFERENCES catalog (md5path_1, md5path_2))",
    "CREATE TABLE nested_catalogs (path TEXT, sha1 TEXT, size INTEGER,"
    " CONSTRAINT pk_nested_catalogs PRIMARY KEY (path))",
    "CREATE TABLE bind_mountpoints (path TEXT, sha1 TEXT, size INTEGER,"
    " CONSTRAINT pk_bind_mountpoints PRIMARY KEY (path))",
    "CREATE TABLE statistics (counter TEXT, value INTEGER, CONSTRAINT pk_statistics PRIMARY KEY (counter))",
)
_INDEX = "CREATE INDEX IF NOT EXISTS idx_catalog_parent ON catalog (parent_1, parent_2)"

_TEXTS = ("name", "symlink")
_KEYS = ("md5path_1", "md5path_2", "parent_1", "parent_2")


class Nested(NamedTuple):
    """A nested catalog as its parent names it: the hash of its object, the size of it uncompressed."""

    hash: ContentHash
    size: int


class Catalog:
    """One catalog, to read and to change, for one thread. `counters` are the caller's to keep right.

    `prefix` is the path it is mounted at. Everything that is wrong with its bytes is a PublishError.
    """

    def __init__(self, connection: sqlite3.Connection, what: str) -> None:
        self._db = connection
        self._what = what
        self.size = 0
        """Bytes of the file that it was read from; 0 for one made here."""
        self._db.text_factory = _text
        with self._reading():
            self._db.execute("PRAGMA trusted_schema = OFF")
            (foreign,) = self._do(
                "SELECT count(*) FROM sqlite_master WHERE type NOT IN ('table', 'index') OR sql LIKE 'create virtual%'"
            ).fetchone()
            if foreign:
                raise PublishError(f"{what}: not a catalog: it has views, triggers or virtual tables")
            columns = {name for _, name, *_ in self._db.execute("PRAGMA table_info(catalog)")}
            properties = dict(self._db.execute("SELECT key, value FROM properties"))
        self._has_nanoseconds = "mtimens" in columns
        self._selection = ", ".join(
            column if column in columns or column not in ("mtimens", "xattr") else "NULL" for column in Row._fields
        )
        schema = properties.get("schema")
        if schema != SCHEMA:
            raise PublishError(f"{what}: a catalog of schema {str(schema)[:20]!r}, where only {SCHEMA} can be read")
        self.schema_revision = self._number(properties, "schema_revision", 0)
        self.revision = self._number(properties, "revision", 0)
        self.last_modified = self._number(properties, "last_modified", 0)
        self.prefix = str(properties.get("root_prefix") or "")
        previous = properties.get("previous_revision")
        try:
            self.previous = ContentHash.parse(previous) if previous else None
        except (TypeError, ValueError):
            raise PublishError(f"{what}: previous_revision is not a content hash") from None
        if self.previous is not None and not any(self.previous.digest):
            self.previous = None
        self.counters = Counters()
        if self.schema_revision >= _OLDEST_EDITABLE:
            with self._reading():
                values = dict(self._db.execute("SELECT counter, value FROM statistics"))
            self.counters = Counters.of(values, what)

    @classmethod
    def create(cls, prefix: str, *, last_modified: int) -> Catalog:
        """An empty catalog of revision 1; its first row must be that of `prefix` itself."""
        connection = _connection()
        connection.execute("BEGIN")
        for statement in _TABLES:
            connection.execute(statement)
        properties = {"schema": SCHEMA, "schema_revision": str(REVISION), "revision": "1"}
        properties["last_modified"] = str(last_modified)
        for name, value in properties.items():
            connection.execute("INSERT INTO properties (key, value) VALUES (?, ?)", (name, value))
        if prefix:
            connection.execute(
                "INSERT INTO properties (key, value) VALUES ('root_prefix', CAST(? AS TEXT))", (_bytes(prefix),)
            )
        connection.executemany("INSERT INTO statistics (counter, value) VALUES (?, ?)", Counters().rows())
        return cls(connection, f"the catalog of {prefix or '/'}")

    @classmethod
    def load(cls, data: bytes, what: str) -> Catalog:
        """A catalog from the bytes of its file; `what` names it in errors."""
        if not data:  # which deserialize takes for a lack of memory
            raise PublishError(f"{what}: not a catalog: it is empty")
        connection = _connection()
        try:
            connection.deserialize(data)
            catalog = cls(connection, what)
            catalog.size = len(data)
            return catalog
        except (sqlite3.Error, UnicodeDecodeError) as error:
            connection.close()
            raise PublishError(f"{what}: not a catalog: {error}") from None
        except PublishError:
            connection.close()
            raise

    def __enter__(self) -> Catalog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._db.close()

    # Reading ---------------------------------------------------------------------------------------------------------

    def row(self, path: str) -> Row | None:
        """The row of a path of the repository, if it is in this catalog."""
        found = list(self._rows("md5path_1 = ? AND md5path_2 = ?", key(_bytes(path))))
        return found[0] if found else None

    def children(self, path: str) -> list[Row]:
        """The rows directly below a path, by their names; none for a nested catalog's mount point."""
        # The root of the repository has the parent (0, 0), so it is no child of any path.
        return list(self._rows("parent_1 = ? AND parent_2 = ? ORDER BY name", key(_bytes(path))))

    def chunks(self, path: str) -> tuple[Chunk, ...]:
        """The pieces of a chunked file in their order."""
        with self._reading():
            found = self._do(
                "SELECT offset, size, hash FROM chunks WHERE md5path_1 = ? AND md5path_2 = ? ORDER BY offset",
                key(_bytes(path)),
            ).fetchall()
        for offset, size, digest in found:
            if type(offset) is not int or type(size) is not int or type(digest) is not bytes:
                raise PublishError(f"{self._what}: malformed chunks of {path!a}; check the repository")
        return tuple(Chunk(*values) for values in found)

    def nested(self, path: str) -> Nested | None:
        """The nested catalog mounted at a path."""
        found = [nested for _, nested in self._nested("WHERE path = CAST(? AS TEXT)", (_bytes(path),))]
        return found[0] if found else None

    def all_nested(self) -> dict[str, Nested]:
        """All nested catalogs that this one names, by their mount points."""
        return dict(self._nested("ORDER BY path", ()))

    def count(self) -> int:
        """How many rows it has."""
        with self._reading():
            (number,) = self._db.execute("SELECT count(*) FROM catalog").fetchone()
        return int(number)

    def keys_below(self, path: str) -> list[tuple[int, int]]:
        """The path keys of `children`, in the same order: what clients look names up by, whatever the names say."""
        return self._do(
            "SELECT md5path_1, md5path_2 FROM catalog WHERE parent_1 = ? AND parent_2 = ? ORDER BY name",
            key(_bytes(path)),
        ).fetchall()

    def count_chunks(self) -> int:
        """How many pieces of chunked files it has."""
        return int(self._do("SELECT count(*) FROM chunks").fetchone()[0])

    def bound(self) -> dict[str, Nested]:
        """The root catalogs bound somewhere in it, by their mount points: snapshots of the official tools."""
        if self.schema_revision < _OLDEST_BINDING:
            return {}
        return dict(self._nested("ORDER BY path", (), "bind_mountpoints"))

    def digests(self) -> Iterator[bytes]:
        """The bare digests of all objects that its rows and chunks name; the same one more than once."""
        for table in ("catalog", "chunks"):
            # As it goes: there may be hundreds of thousands.
            with self._reading():
                for (digest,) in self._db.execute(f"SELECT hash FROM {table} WHERE hash IS NOT NULL"):
                    if type(digest) is not bytes or len(digest) != SIZE:
                        raise PublishError(f"{self._what}: a malformed content hash; check the repository")
                    yield digest

    # Changing --------------------------------------------------------------------------------------------------------

    def require_editable(self) -> None:
        """PublishError unless this version knows all that an edit must keep right."""
        if not _OLDEST_EDITABLE <= self.schema_revision <= REVISION:
            raise PublishError(
                f"{self._what}: a catalog of schema revision {self.schema_revision}; this version of unpacker writes"
                f" revision {REVISION} and edits {_OLDEST_EDITABLE} to {REVISION}: "
                + ("upgrade unpacker" if self.schema_revision > REVISION else "migrate the repository")
            )

    def insert(self, rows: Iterable[tuple[tuple[int, int], tuple[int, int], Row]]) -> None:
        """Adds many rows, each with its own key and its parent's, in the order in which listings shall read them."""
        self._insert(self._db, _bound_rows(rows))
        self._db.execute(_INDEX)

    def insert_chunks(self, chunks: Iterable[tuple[tuple[int, int], Chunk]]) -> None:
        """Adds the pieces of chunked files, each by the key of its file."""
        self._db.executemany(
            "INSERT INTO chunks (md5path_1, md5path_2, offset, size, hash) VALUES (?, ?, ?, ?, ?)",
            ((*own, *chunk) for own, chunk in chunks),
        )

    def put(self, path: str, row: Row, chunks: Iterable[Chunk] = ()) -> None:
        """Sets the row and the chunks of a path, in place of what it had."""
        own = key(_bytes(path))
        parent = key(_bytes(path.rpartition("/")[0])) if path else (0, 0)
        columns = [column for column in Row._fields if column != "mtimens" or self._has_nanoseconds]
        assignments = ", ".join(f"{column} = {_placeholder(column)}" for column in columns)
        values = [_bound(column, getattr(row, column)) for column in columns]
        changed = self._do(f"UPDATE catalog SET {assignments} WHERE md5path_1 = ? AND md5path_2 = ?", (*values, *own))
        if not changed.rowcount:
            self._do(
                f"INSERT INTO catalog ({', '.join((*_KEYS, *columns))})"
                f" VALUES (?, ?, ?, ?, {', '.join(map(_placeholder, columns))})",
                (*own, *parent, *values),
            )
        self._do("DELETE FROM chunks WHERE md5path_1 = ? AND md5path_2 = ?", own)
        self.insert_chunks((own, chunk) for chunk in chunks)

    def delete(self, path: str) -> None:
        """Takes the row of a path away, and its chunks."""
        own = key(_bytes(path))
        self._do("DELETE FROM catalog WHERE md5path_1 = ? AND md5path_2 = ?", own)
        self._do("DELETE FROM chunks WHERE md5path_1 = ? AND md5path_2 = ?", own)

    def attach(self, path: str, nested: Nested) -> None:
        """Names the nested catalog mounted at a path, in place of any other."""
        self._do(
            "INSERT OR REPLACE INTO nested_catalogs (path, sha1, size) VALUES (CAST(? AS TEXT), ?, ?)",
            (_bytes(path), nested.hash.hex, nested.size),
        )

    def detach(self, path: str) -> None:
        """Forgets the nested catalog mounted at a path."""
        self._do("DELETE FROM nested_catalogs WHERE path = CAST(? AS TEXT)", (_bytes(path),))

    def succeed(self, previous: ContentHash | None, *, revision: int, last_modified: int) -> None:
        """Makes this the next revision of the catalog that was stored as `previous`.

        That is None for a nested catalog: its former one goes with the revisions that had it, and a stratum 1, which
        passes over root catalogs that were collected, stops at a nested one that is named and not there.
        """
        self.previous, self.revision, self.last_modified = previous, revision, last_modified
        values = {"revision": str(revision), "last_modified": str(last_modified)}
        if previous is None:
            self._do("DELETE FROM properties WHERE key = 'previous_revision'")
        else:
            values["previous_revision"] = previous.hex
        for name, value in values.items():
            self._do("INSERT OR REPLACE INTO properties (key, value) VALUES (?, ?)", (name, value))

    def serialise(self) -> bytes:
        """The bytes of its file, with the counters as they are now. The same steps give the same bytes."""
        # The counters of an editable catalog are all there, so this changes values and never the order of rows.
        for name, value in self.counters.rows():
            self._do("UPDATE statistics SET value = ? WHERE counter = ?", (value, name))
        if self._db.in_transaction:
            self._db.execute("COMMIT")
        (rows, last) = self._do("SELECT count(*), max(rowid) FROM catalog").fetchone()
        (pages,) = self._do("PRAGMA page_count").fetchone()
        (free,) = self._do("PRAGMA freelist_count").fetchone()
        if (last or 0) - rows > rows // _WASTE or free > pages // _WASTE:
            self._rewrite()
        return self._db.serialize()

    def _rewrite(self) -> None:
        """Copies everything into a new database of the current revision, without the gaps."""
        fresh = _connection()
        fresh.execute("BEGIN")
        for statement in _TABLES:
            fresh.execute(statement)
        with self._reading():
            found = self._db.execute(
                f"SELECT {', '.join(_KEYS)}, {self._selection} FROM catalog ORDER BY rowid"
            ).fetchall()
            rows = [(values[:2], values[2:4], Row._make(values[4:])) for values in found]
            for _, _, row in rows:
                self._check(row)
            self._insert(fresh, _bound_rows(rows))
            for table, columns in (
                ("properties", ("key", "value")),
                ("chunks", ("md5path_1", "md5path_2", "offset", "size", "hash")),
                ("nested_catalogs", ("path", "sha1", "size")),
                ("bind_mountpoints", ("path", "sha1", "size")),
                ("statistics", ("counter", "value")),
            ):
                places = ", ".join("CAST(? AS TEXT)" if column == "path" else "?" for column in columns)
                fresh.executemany(
                    f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({places})",
                    (
                        [
                            _bound("name", v) if column == "path" else v
                            for column, v in zip(columns, values, strict=True)
                        ]
                        for values in self._db.execute(f"SELECT {', '.join(columns)} FROM {table} ORDER BY rowid")
                    ),
                )
        fresh.execute(_INDEX)
        fresh.execute("UPDATE properties SET value = ? WHERE key = 'schema_revision'", (str(REVISION),))
        fresh.execute("COMMIT")
        self._db.close()
        self._db = fresh
        self._db.text_factory = _text
        self._has_nanoseconds, self._selection, self.schema_revision = True, ", ".join(Row._fields), REVISION

    # Small parts -----------------------------------------------------------------------------------------------------

    @staticmethod
    def _insert(db: sqlite3.Connection, rows: Iterable[tuple[Any, ...]]) -> None:
        columns = (*_KEYS, *Row._fields)
        try:
            db.executemany(
                f"INSERT INTO catalog ({', '.join(columns)}) VALUES ({', '.join(map(_placeholder, columns))})", rows
            )
        except sqlite3.IntegrityError:
            raise PublishError("two names of one tree have the same path, so no catalog can hold both") from None

    def _rows(self, condition: str, values: tuple[int, int]) -> Iterator[Row]:
        with self._reading():
            found = self._db.execute(f"SELECT {self._selection} FROM catalog WHERE {condition}", values).fetchall()
        for row in map(Row._make, found):
            self._check(row)
            yield row

    def _check(self, row: Row) -> None:
        # SQLite takes any type in any column.
        if not (
            type(row.hardlinks) is type(row.size) is type(row.mode) is type(row.mtime) is int
            and type(row.flags) is type(row.uid) is type(row.gid) is int
            and isinstance(row.mtimens, int | None)
            and type(row.name) is type(row.symlink) is str
            and isinstance(row.hash, bytes | None)
            and isinstance(row.xattr, bytes | None)
        ):
            raise PublishError(f"{self._what}: a malformed row; check the repository with cvmfs_server check")

    def _nested(
        self, condition: str, values: tuple[bytes, ...], table: str = "nested_catalogs"
    ) -> Iterator[tuple[str, Nested]]:
        with self._reading():
            found = self._db.execute(f"SELECT path, sha1, size FROM {table} {condition}", values).fetchall()
        for path, text, size in found:
            try:
                yield path, Nested(ContentHash.parse(text), int(size))
            except (TypeError, ValueError):
                raise PublishError(f"{self._what}: a malformed reference to a nested catalog at {path!a}") from None

    def _number(self, properties: dict[str, Any], name: str, default: int) -> int:
        # Revisions were written as floating point numbers once.
        try:
            return int(float(properties.get(name, default)))
        except (TypeError, ValueError, OverflowError):
            raise PublishError(f"{self._what}: the property {name} is not a number") from None

    def _do(self, statement: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        with self._reading():
            return self._db.execute(statement, values)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        # SQLite quotes the file in its errors, whatever bytes these are.
        except (sqlite3.Error, UnicodeDecodeError) as error:
            raise PublishError(f"{self._what}: cannot be read as a catalog: {error}") from None


def _connection() -> sqlite3.Connection:
    """A database in memory, without a journal (a failed edit is thrown away whole), with every unused byte a zero."""
    # Threads may take turns with a catalog, never use it together.
    connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
    connection.execute(f"PRAGMA page_size = {_PAGE_SIZE}")  # the first of all, or it does nothing
    connection.execute("PRAGMA secure_delete = ON")
    connection.execute("PRAGMA journal_mode = OFF")
    return connection


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _placeholder(column: str) -> str:
    # A `str` with surrogates cannot be bound, and a blob is never equal to a text.
    return "CAST(? AS TEXT)" if column in _TEXTS else "?"


def _bound(column: str, value: Any) -> Any:
    return _bytes(value) if column in _TEXTS else value


def _bound_rows(rows: Iterable[tuple[tuple[int, int], tuple[int, int], Row]]) -> Iterator[tuple[Any, ...]]:
    # Spelt out, because this runs for every file of an image.
    for own, parent, (links, hash, size, mode, mtime, mtimens, flags, name, symlink, uid, gid, xattr) in rows:
        text = name.encode("utf-8", "surrogateescape")
        target = symlink.encode("utf-8", "surrogateescape") if symlink else b""
        yield *own, *parent, links, hash, size, mode, mtime, mtimens, flags, text, target, uid, gid, xattr

"""Small SQLite databases as values: bytes in, bytes out, opened in memory only while they are read or changed."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from unpacker.errors import PublishError


@contextmanager
def opened(data: bytes, what: str, tables: Sequence[str]) -> Iterator[sqlite3.Connection]:
    """A database in memory with these tables. What is wrong with its bytes is a PublishError about `what`."""
    if not data:  # For which SQLite has no error of its own.
        raise PublishError(f"{what} is damaged or something else: it is empty")
    connection = _connection()
    try:
        connection.deserialize(data)
        # Views and triggers run when a table is touched: whoever could write the file would run them here.
        found = dict(connection.execute("SELECT name, type FROM sqlite_master WHERE type <> 'index'"))
        if any(kind != "table" for kind in found.values()) or not set(tables) <= set(found):
            raise PublishError(f"{what} is damaged or something else: it lacks tables, or has more than tables")
        yield connection
    # SQLite quotes the file in its errors, whatever bytes these are.
    except (sqlite3.Error, OverflowError, UnicodeDecodeError) as error:
        raise PublishError(f"{what} is damaged or something else: {error}") from None
    finally:
        connection.close()


def created(statements: Sequence[str], properties: dict[str, str]) -> bytes:
    """The bytes of a new database: these tables, and a table `properties`."""
    connection = _connection()
    try:
        connection.execute("BEGIN")
        connection.execute("CREATE TABLE properties (key TEXT, value TEXT, CONSTRAINT pk_properties PRIMARY KEY (key))")
        for statement in statements:
            connection.execute(statement)
        connection.executemany("INSERT INTO properties (key, value) VALUES (?, ?)", properties.items())
        connection.execute("COMMIT")
        return connection.serialize()
    finally:
        connection.close()


def check_schema(connection: sqlite3.Connection, what: str, name: str, schema: str, newest: int) -> None:
    """PublishError unless the database is of this repository and of a schema that is understood."""
    properties = dict(connection.execute("SELECT key, value FROM properties"))
    try:
        revision = int(properties.get("schema_revision", -1))
        # Written as a number by some, so that 1.0 may come back as 1.
        known = float(properties.get("schema", 0)) == float(schema)
    except (TypeError, ValueError):
        known, revision = False, -1
    if not known or not 0 <= revision <= newest:
        raise PublishError(
            f"{what} has schema {str(properties.get('schema'))[:20]} revision {str(revision)[:20]}, where this version "
            f"of unpacker knows {schema} up to revision {newest}: upgrade unpacker"
        )
    if properties.get("fqrn") != name:
        raise PublishError(f"{what} is of the repository {str(properties.get('fqrn'))[:60]!r}, not of {name}")


def _connection() -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    connection.execute("PRAGMA trusted_schema = OFF")
    # What is deleted leaves zeros, so that the same rows give the same bytes.
    connection.execute("PRAGMA secure_delete = ON")
    connection.execute("PRAGMA journal_mode = OFF")
    return connection

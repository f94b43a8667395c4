"""The history of a repository: its tags, that is, named revisions. An object of its own, made anew by each publish."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from unpacker.cvmfs import database
from unpacker.cvmfs.hash import ContentHash
from unpacker.errors import PublishError, SettingsError

TRUNK, PREVIOUS = "trunk", "trunk-previous"
_LONGEST = 255
"""The current revision and the one before, which rollbacks return to. Kept by every publish, by whatever tool."""

_SCHEMA, _REVISION = "1.0", 3
_TABLES = (
    "CREATE TABLE branches (branch TEXT, parent TEXT, initial_revision INTEGER,"
    " CONSTRAINT pk_branch PRIMARY KEY (branch), FOREIGN KEY (parent) REFERENCES branches (branch),"
    " CHECK ((branch <> '') OR (parent IS NULL)), CHECK ((branch = '') OR (parent IS NOT NULL)))",
    "CREATE TABLE tags (name TEXT, hash TEXT, revision INTEGER, timestamp INTEGER, channel INTEGER,"
    " description TEXT, size INTEGER, branch TEXT, CONSTRAINT pk_tags PRIMARY KEY (name),"
    " FOREIGN KEY (branch) REFERENCES branches (branch))",
    "CREATE TABLE recycle_bin (hash TEXT, flags INTEGER, CONSTRAINT pk_hash PRIMARY KEY (hash))",
    "INSERT INTO branches (branch, parent, initial_revision) VALUES ('', NULL, 0)",
)
_NO_HASH = "0" * 40
_DESCRIPTIONS = {TRUNK: "current HEAD", PREVIOUS: "default undo target"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tag:
    """A named revision; `root_size` is that of its root catalog uncompressed, `timestamp` in Unix seconds."""

    name: str
    root: ContentHash
    root_size: int
    revision: int
    timestamp: int
    description: str = ""
    branch: str = ""


def check_tag(name: str) -> str:
    """Gives the name of a new tag back; SettingsError if no tool could take it, or if it is kept for trunk."""
    if (
        not 0 < len(name) <= _LONGEST
        or name in (TRUNK, PREVIOUS)
        or not name.isprintable()
        or any(map(str.isspace, name))
    ):
        raise SettingsError(
            f"not a name for a tag: {name[:100]!r} (1 to {_LONGEST} letters, no blanks, neither {TRUNK} nor {PREVIOUS})"
        )
    return name


@dataclass(frozen=True, slots=True)
class History:
    """A history database as its bytes. Changes make new ones; what this version does not know stays as it is."""

    name: str
    data: bytes
    what: str = "the history"

    @classmethod
    def create(cls, name: str) -> History:
        """One without tags; the checker of the official tools wants at least one."""
        properties = {"schema": _SCHEMA, "schema_revision": str(_REVISION)}
        properties |= {"fqrn": name, "previous_revision": _NO_HASH}
        return cls(name, database.created(_TABLES, properties))

    def tags(self) -> list[Tag]:
        """All tags, the newest revision first."""
        with self._opened() as connection:
            found = connection.execute(
                "SELECT name, hash, size, revision, timestamp, description, branch FROM tags"
                " ORDER BY revision DESC, name"
            ).fetchall()
        return [self._tag(*row) for row in found]

    def tag(self, name: str) -> Tag | None:
        """The tag of that name, if there is one."""
        return next((tag for tag in self.tags() if tag.name == name), None)

    def advanced(self, head: Tag) -> History:
        """`trunk` moved to `head` (whose name and description do not count); what it was becomes `trunk-previous`."""
        with self._opened() as connection:
            connection.execute("DELETE FROM tags WHERE name = ?", (PREVIOUS,))
            connection.execute(
                "UPDATE tags SET name = ?, description = ? WHERE name = ?", (PREVIOUS, _DESCRIPTIONS[PREVIOUS], TRUNK)
            )
            self._insert(connection, replace(head, name=TRUNK, description=_DESCRIPTIONS[TRUNK]))
            return replace(self, data=connection.serialize())

    def with_tag(self, tag: Tag) -> History:
        """The tag added, or moved if there is one of that name."""
        check_tag(tag.name)
        with self._opened() as connection:
            connection.execute("DELETE FROM tags WHERE name = ?", (tag.name,))
            self._insert(connection, tag)
            return replace(self, data=connection.serialize())

    def without(self, name: str) -> History:
        """The tag removed; PublishError if there is none of that name."""
        check_tag(name)
        with self._opened() as connection:
            if not connection.execute("DELETE FROM tags WHERE name = ?", (name,)).rowcount:
                raise PublishError(f"{self.what} has no tag {name!r}")
            return replace(self, data=connection.serialize())

    @property
    def previous(self) -> ContentHash | None:
        """The history object that this one was made from."""
        with self._opened() as connection:
            row = connection.execute("SELECT value FROM properties WHERE key = 'previous_revision'").fetchone()
        if row is None or row[0] == _NO_HASH:
            return None
        return self._hash(row[0])

    def following(self, previous: ContentHash) -> History:
        """Made from that history object."""
        with self._opened() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO properties (key, value) VALUES ('previous_revision', ?)", (previous.hex,)
            )
            return replace(self, data=connection.serialize())

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        with database.opened(self.data, self.what, ("properties", "tags", "branches")) as connection:
            database.check_schema(connection, self.what, self.name, _SCHEMA, _REVISION)
            yield connection

    def _tag(
        self,
        name: object,
        root: object,
        size: object,
        revision: object,
        timestamp: object,
        text: object,
        branch: object,
    ) -> Tag:
        # Old tools left sizes and branches out.
        size, branch = size or 0, branch or ""
        if (
            not isinstance(name, str)
            or not isinstance(size, int)
            or not isinstance(revision, int)
            or not isinstance(timestamp, int)
            or not isinstance(branch, str)
        ):
            raise PublishError(f"{self.what}: a malformed tag {str(name)[:100]!r}")
        return Tag(
            name=name,
            root=self._hash(root),
            root_size=size,
            revision=revision,
            timestamp=timestamp,
            description=str(text or ""),
            branch=branch,
        )

    def _hash(self, text: object) -> ContentHash:
        try:
            return ContentHash.parse(str(text))
        except ValueError as error:
            raise PublishError(f"{self.what}: {error}") from None

    @staticmethod
    def _insert(connection: sqlite3.Connection, tag: Tag) -> None:
        connection.execute(
            "INSERT INTO tags (name, hash, revision, timestamp, channel, description, size, branch)"
            " VALUES (?, ?, ?, ?, 0, ?, ?, ?)",
            (tag.name, tag.root.hex, tag.revision, tag.timestamp, tag.description, tag.root_size, tag.branch),
        )

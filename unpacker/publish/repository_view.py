"""What stands in one revision of a repository, whoever put it there, read from its catalogs."""

from __future__ import annotations

import threading

from unpacker.changeset import Kind
from unpacker.contracts import ContentStore
from unpacker.cvmfs.reader import Reader, node
from unpacker.publish.view import bounded
from unpacker.tree import Directory, File, Node, Special, Symlink


class RepositoryView:
    """The View of the revision that `reader` reads. Its threads take turns."""

    def __init__(self, reader: Reader, contents: ContentStore) -> None:
        self._reader = reader
        self._contents = contents
        self._lock = threading.Lock()

    def kind(self, path: str) -> Kind | None:
        """What stands at a path; None if nothing does."""
        found = self._node(path)
        if isinstance(found, Special):
            return found.kind
        return {Directory: Kind.DIRECTORY, Symlink: Kind.SYMLINK, File: Kind.FILE}.get(type(found))

    def link(self, path: str) -> str | None:
        """Where the symlink at a path leads to, as written; None if there is none."""
        found = self._node(path)
        return found.target if isinstance(found, Symlink) else None

    def read(self, path: str, limit: int) -> bytes | None:
        """The bytes of the file at a path; None if there is none. PublishError if they are more than `limit`."""
        found = self._node(path)
        if not isinstance(found, File):
            return None
        with self._contents.open(found.token) as stream:
            pieces, left = [], limit + 1
            while left > 0 and (piece := stream.read(left)):
                pieces.append(piece)
                left -= len(piece)
        return bounded(b"".join(pieces), limit, path)

    def _node(self, path: str) -> Node | None:
        with self._lock:
            found = self._reader.lookup(f"/{path}")
            return None if found is None else node(found)

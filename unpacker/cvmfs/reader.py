"""Reads a repository's tree through its nested catalogs, from the hash of a root catalog."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from types import TracebackType
from typing import NamedTuple

from unpacker.changeset import Kind
from unpacker.cvmfs.catalog import Catalog, Nested
from unpacker.cvmfs.hash import ContentHash
from unpacker.cvmfs.objects import ObjectStore
from unpacker.cvmfs.row import (
    BIND_MOUNT_POINT,
    CHUNKED,
    DIRECTORY,
    EXTERNAL,
    MOUNT_POINT,
    SYMLINK,
    Chunk,
    Row,
    content_of,
    decode_xattrs,
    device_of,
)
from unpacker.errors import PublishError
from unpacker.tree import Directory, File, Node, Special, Symlink

_KEPT_OPEN = 32
_KINDS = {stat.S_IFCHR: Kind.CHARACTER, stat.S_IFBLK: Kind.BLOCK, stat.S_IFIFO: Kind.FIFO}


class Found(NamedTuple):
    """One name of the repository. `nested` is set at the root of a nested catalog, where `row` is that catalog's own;
    it names the catalog's object."""

    path: str
    row: Row
    chunks: tuple[Chunk, ...] = ()
    nested: Nested | None = None


def open_catalog(objects: ObjectStore, hash: ContentHash, path: str, size: int | None = None) -> Catalog:
    """The catalog stored as `hash` and mounted at `path`. PublishError unless it is that, of that size."""
    what = f"catalog {hash} of {path or '/'}"
    data = objects.read(hash, "C")
    if size is not None and len(data) != size:
        raise PublishError(f"{what}: {len(data)} bytes where {size} were announced; check the repository")
    catalog = Catalog.load(data, what)
    if catalog.prefix != path:
        catalog.close()
        raise PublishError(f"{what}: a catalog for {catalog.prefix or '/'!a}; check the repository")
    return catalog


class Reader:
    """One revision of a repository, to look up names in and to walk. For one thread; `with` closes it.

    Bind mount points (snapshots that the official tools show under `/.cvmfs`) are not followed.
    """

    def __init__(self, objects: ObjectStore, root: ContentHash) -> None:
        self._objects = objects
        self._root = open_catalog(objects, root, "")
        self._open: dict[str, Catalog] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        for catalog in (self._root, *self._open.values()):
            catalog.close()
        self._open.clear()

    @property
    def root(self) -> Catalog:
        """The root catalog."""
        return self._root

    def lookup(self, path: str) -> Found | None:
        """What stands at a path, or None. No symlink is followed on the way."""
        if path:
            catalog = self._inside(path.rpartition("/")[0])
            return None if catalog is None else self._found(catalog, path)
        return self._found(self._root, "")

    def children(self, path: str) -> list[Found]:
        """What is in a directory, by names; nothing if there is no such directory. At a nested catalog, `row` is the
        parent's, so that listing opens no catalog more than it must."""
        catalog = self._inside(path)
        if catalog is None:
            return []
        return [self._here(catalog, f"{path}/{row.name}", row) for row in catalog.children(path)]

    def walk(self, path: str = "") -> Iterator[Found]:
        """Everything from a path on: a directory before what is in it, names by their bytes. Catalogs are opened when
        it comes to them and closed after them."""
        start = self._inside(path)
        if start is None:
            found = self.lookup(path)
            if found is not None:
                yield found
            return
        own = start.row(path)
        if own is None:
            raise PublishError(f"the catalog of {path or '/'} lacks the row of its own root; check the repository")
        yield Found(path, own)
        # Of the catalogs in here, the ones that the walk opened are closed when their last name is done.
        pending = [(path, start, iter(start.children(path)))]
        opened: list[tuple[str, Catalog]] = []
        try:
            while pending:
                directory, catalog, rows = pending[-1]
                row = next(rows, None)
                if row is None:
                    pending.pop()
                    if opened and opened[-1][0] == directory:
                        opened.pop()[1].close()
                    continue
                found = self._here(catalog, f"{directory}/{row.name}", row)
                if found.nested is not None:
                    below = open_catalog(self._objects, found.nested.hash, found.path, found.nested.size)
                    opened.append((found.path, below))
                    own = below.row(found.path)
                    if own is None:
                        raise PublishError(f"the catalog of {found.path!a} lacks the row of its own root")
                    found, catalog = found._replace(row=own), below
                yield found
                if found.row.flags & DIRECTORY and not found.row.flags & BIND_MOUNT_POINT:
                    pending.append((found.path, catalog, iter(catalog.children(found.path))))
        finally:
            for _, catalog in opened:
                catalog.close()

    def _inside(self, path: str) -> Catalog | None:
        """The catalog that has the names in a directory."""
        catalog = self._root
        names = path.split("/")[1:]
        at = ""
        for name in names:
            at += "/" + name
            row = catalog.row(at)
            if row is None or not row.flags & DIRECTORY or row.flags & BIND_MOUNT_POINT:
                return None
            if row.flags & MOUNT_POINT:
                catalog = self._nested(catalog, at)
        return catalog

    def _nested(self, parent: Catalog, path: str) -> Catalog:
        catalog = self._open.pop(path, None)
        if catalog is None:
            nested = _reference(parent, path)
            catalog = open_catalog(self._objects, nested.hash, path, nested.size)
        self._open[path] = catalog
        if len(self._open) > _KEPT_OPEN:
            self._open.pop(next(iter(self._open))).close()
        return catalog

    def _found(self, catalog: Catalog, path: str) -> Found | None:
        row = catalog.row(path)
        if row is None:
            return None
        found = self._here(catalog, path, row)
        if found.nested is None:
            return found
        own = self._nested(catalog, path).row(path)
        if own is None:
            raise PublishError(f"the catalog of {path!a} lacks the row of its own root; check the repository")
        return found._replace(row=own)

    @staticmethod
    def _here(catalog: Catalog, path: str, row: Row) -> Found:
        if path and path.rpartition("/")[2] != row.name:
            raise PublishError(f"{path!a}: its row has the name {row.name!a}; check the repository")
        chunks = catalog.chunks(path) if row.flags & CHUNKED else ()
        return Found(path, row, chunks, _reference(catalog, path) if row.flags & MOUNT_POINT else None)


def node(found: Found) -> Node:
    """The node that a name stands for, a directory without its children; PublishError for what no tree can hold."""
    row = found.row
    mode, xattrs = stat.S_IMODE(row.mode), decode_xattrs(row.xattr)
    if row.flags & DIRECTORY:
        return Directory(mode, row.uid, row.gid, row.mtime_ns, xattrs, {})
    if row.flags & SYMLINK:
        return Symlink(mode, row.uid, row.gid, row.mtime_ns, xattrs, row.symlink)
    if stat.S_ISREG(row.mode):
        if row.flags & EXTERNAL:
            raise PublishError(f"{found.path!a}: an external file, whose bytes are not in this repository")
        return File(mode, row.uid, row.gid, row.mtime_ns, xattrs, row.size, content_of(row, found.chunks).token)
    kind = _KINDS.get(stat.S_IFMT(row.mode))
    if kind is None:
        raise PublishError(f"{found.path!a}: a file of type {row.mode:#o}, such as no image has")
    device = (0, 0) if kind is Kind.FIFO else device_of(row.size)
    return Special(mode, row.uid, row.gid, row.mtime_ns, xattrs, kind, device)


def _reference(catalog: Catalog, path: str) -> Nested:
    nested = catalog.nested(path)
    if nested is None:
        raise PublishError(f"{path!a} is the mount point of a catalog that is not named; check the repository")
    return nested

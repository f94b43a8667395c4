"""Checks the tree of one revision: every catalog against the one above it, every row, every object's presence.

What only a row says of itself is in `check_row`. Counters are counted again, bottom-up over all catalogs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from unpacker.cvmfs import objects
from unpacker.cvmfs.catalog import Catalog, Nested
from unpacker.cvmfs.check_row import directory_faults, file_faults, group_faults, is_plain
from unpacker.cvmfs.counters import NAMES, NOTHING, Counters, Tally
from unpacker.cvmfs.hash import ContentHash
from unpacker.cvmfs.objects import ObjectStore
from unpacker.cvmfs.repository import CATALOG_LIMIT
from unpacker.cvmfs.row import (
    BIND_MOUNT_POINT,
    CATALOG_ROOT,
    CHUNKED,
    EXTERNAL,
    MARKER,
    MOUNT_POINT,
    SPECIAL,
    SYMLINK,
    Chunk,
    Row,
    tally,
)
from unpacker.cvmfs.row import key as path_key
from unpacker.errors import PublishError

_OLDEST_COUNTED = 5
"""Catalogs of earlier schema revisions lack some counters."""
_REMEMBERED = 500_000


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: a path in the repository or a file or part of it, and what is wrong there."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dataclass(slots=True)
class _Mounted:
    """A catalog to check, and how its parent names it; then what is known of it and of those below it."""

    path: str
    nested: Nested
    transition: Row | None
    stated: Counters | None = None
    own: Tally = NOTHING
    below: Tally = NOTHING
    is_known: bool = False
    """Whether all that is to be counted, in it and below it, could be."""
    inner: list[_Mounted] = field(default_factory=list)

    @property
    def where(self) -> str:
        return self.path or "/"


def check_tree(store: ObjectStore, root: ContentHash, size: int, *, revision: int | None = None) -> Iterator[Problem]:
    """Everything wrong with the tree below a root catalog, of which `size` and `revision` are announced.

    A catalog that cannot be read is one problem, and the others go on. One catalog at a time is in memory.
    """
    top = _Mounted("", Nested(root, size), None)
    present: set[bytes] = set()
    yield from _Check(store, top, revision, present).problems()
    pending = [top]
    while pending:
        place = pending[-1]
        if place.inner:
            inner = place.inner.pop()
            yield from _Check(store, inner, None, present).problems()
            pending.append(inner)
            continue
        pending.pop()
        if place.is_known and place.stated is not None:
            yield from _differences(place.where, "subtree", place.stated.below, place.below)
        if pending:
            above = pending[-1]
            above.is_known &= place.is_known
            above.below = above.below.plus(place.own).plus(place.below)


def _differences(where: str, kind: str, stated: Tally, counted: Tally) -> Iterator[Problem]:
    for name in NAMES:
        says, is_so = getattr(stated, name), getattr(counted, name)
        if says != is_so:
            yield Problem(where, f"the counter {kind}_{name} is {says}, where there are {is_so}")


class _Check:
    """The check of one catalog. Leaves in `place` what those above it need; `present` has the digests of objects of
    plain files that were found before."""

    def __init__(self, store: ObjectStore, place: _Mounted, revision: int | None, present: set[bytes]) -> None:
        self._store = store
        self._present = present
        self._place = place
        self._revision = revision
        self._seen = 1
        self._is_whole = True
        self._chunks = 0
        self._mounts: dict[str, Row] = {}
        self._binds: set[str] = set()
        self._groups: set[int] = set()
        self._counts = dict.fromkeys(NAMES, 0)

    def problems(self) -> Iterator[Problem]:
        place = self._place
        try:
            data = self._store.read(place.nested.hash, objects.CATALOG, limit=CATALOG_LIMIT)
            with Catalog.load(data, f"catalog {place.nested.hash}") as catalog:
                if place.nested.size not in (0, len(data)):  # Some old tools left the size out.
                    what = f"its catalog has {len(data)} bytes, where {place.nested.size} are announced"
                    yield Problem(place.where, what)
                yield from self._catalog(catalog)
        except PublishError as error:
            place.is_known = False
            yield Problem(place.where, str(error))

    def _catalog(self, catalog: Catalog) -> Iterator[Problem]:
        place = self._place
        if catalog.prefix != place.path:
            # All path keys in it are of other paths, so nothing more can be said of it.
            yield Problem(place.where, f"its catalog is one for {catalog.prefix or '/'!a}")
            return
        if self._revision is not None and catalog.revision != self._revision:
            what = f"its catalog is of revision {catalog.revision}, the manifest of {self._revision}"
            yield Problem(place.where, what)
        own = catalog.row(place.path)
        if own is None:
            yield Problem(place.where, "its catalog lacks the row of its own root")
            return
        yield from self._root(own)
        if not own.is_directory:
            return
        self._count(own, 0)
        yield from self._directories(catalog, own)
        yield from self._references(catalog)
        rows, chunks = catalog.count(), catalog.count_chunks()
        if rows != self._seen:
            self._is_whole = False
            yield Problem(place.where, f"dangling rows: of {rows} rows in its catalog {self._seen} can be reached")
        if chunks != self._chunks:
            self._is_whole = False
            yield Problem(place.where, f"dangling chunks: of {chunks} in its catalog {self._chunks} belong to a file")
        self._counts["nested"] = len(self._mounts)
        place.own = Tally(**self._counts)
        # What is wrong already would show in all counters up to the root again.
        place.is_known = self._is_whole
        if place.is_known and catalog.schema_revision >= _OLDEST_COUNTED:
            place.stated = catalog.counters
            yield from _differences(place.where, "self", catalog.counters.own, place.own)

    def _root(self, own: Row) -> Iterator[Problem]:
        place = self._place
        if not own.is_directory:
            yield Problem(place.where, "the root of its catalog is no directory")
            return
        if bool(own.flags & CATALOG_ROOT) is not bool(place.path) or own.flags & (MOUNT_POINT | BIND_MOUNT_POINT):
            yield Problem(place.where, f"the root of its catalog has the flags {own.flags:#x} of something else")
        yield from (Problem(place.where, fault) for fault in directory_faults(own))
        transition = place.transition
        if transition is not None:
            fields = [
                name for name in Row._fields if name != "flags" and getattr(own, name) != getattr(transition, name)
            ]
            if fields:
                what = f"the root of its catalog and the mount point above it differ in {', '.join(fields)}"
                yield Problem(place.where, what)

    def _directories(self, catalog: Catalog, own: Row) -> Iterator[Problem]:
        pending = [(self._place.path, own)]
        while pending:
            path, row = pending.pop()
            children = catalog.children(path)
            self._seen += len(children)
            if row.flags & MOUNT_POINT or row.flags & BIND_MOUNT_POINT:
                if children:
                    self._is_whole = False
                    yield Problem(path, "a mount point of another catalog, but this one has names in it, too")
                continue
            where = path or "/"
            subdirectories = sum(child.is_directory for child in children)
            if row.links != 2 + subdirectories:
                yield Problem(where, f"its link count is {row.links}, with {subdirectories} directories in it")
            yield from self._marker(path, children)
            yield from (Problem(where, fault) for fault in group_faults(children, self._groups))
            for child, key in zip(children, catalog.keys_below(path), strict=True):
                inner = f"{path}/{child.name}"
                if child.name in ("", ".", "..") or "/" in child.name or "\0" in child.name:
                    yield Problem(where, f"the name {child.name!a} in it is none for a file")
                elif path_key(inner.encode("utf-8", "surrogateescape")) != key:
                    yield Problem(where, f"the name {child.name!a} in it does not fit its path key")
                elif child.is_directory:
                    pending.append((inner, child))
                yield from self._row(catalog, inner, child)

    def _marker(self, path: str, children: list[Row]) -> Iterator[Problem]:
        marker = next((child for child in children if child.name == MARKER), None)
        is_nested_root = path != "" and path == self._place.path
        if is_nested_root and (marker is None or marker.is_directory):
            yield Problem(path, f"a nested catalog without the marker {MARKER}")
        elif marker is not None and not is_nested_root:
            yield Problem(path or "/", f"an abandoned marker {MARKER}: it is not the root of a nested catalog")

    def _row(self, catalog: Catalog, path: str, row: Row) -> Iterator[Problem]:
        if row.is_directory:
            if row.flags & CATALOG_ROOT:
                yield Problem(path, "it has the flag of a catalog's root, but is in the midst of one")
            if row.flags & MOUNT_POINT:
                self._mounts[path] = row
            elif row.flags & BIND_MOUNT_POINT:
                self._binds.add(path)
            self._count(row, 0)
            yield from (Problem(path, fault) for fault in directory_faults(row))
            return
        if is_plain(row):
            self._counts["regular"] += 1
            self._counts["file_size"] += row.size
            if row.hash not in self._present:
                yield from self._contents(path, row, ())
            return
        chunks = catalog.chunks(path) if row.flags & CHUNKED else ()
        self._chunks += len(chunks)
        self._count(row, len(chunks))
        yield from (Problem(path, fault) for fault in file_faults(row, chunks))
        if not row.flags & (EXTERNAL | SYMLINK | SPECIAL):
            yield from self._contents(path, row, chunks)

    def _contents(self, path: str, row: Row, chunks: tuple[Chunk, ...]) -> Iterator[Problem]:
        digests = [(chunk.hash, objects.CHUNK) for chunk in chunks]
        if row.hash is not None:
            digests.append((row.hash, ""))
        for digest, suffix in digests:
            try:
                name = row.hash_of(digest)
            except (PublishError, ValueError) as error:
                yield Problem(path, str(error))
                continue
            if self._store.has(name, suffix):
                if is_plain(row):
                    self._remember(digest)
            else:
                yield Problem(path, f"its {'chunk' if suffix else 'object'} {name}{suffix} is missing")

    def _remember(self, digest: bytes) -> None:
        # Images share most of their files. Emptied now and then, lest it grow with the repository.
        if len(self._present) >= _REMEMBERED:
            self._present.clear()
        self._present.add(digest)

    def _references(self, catalog: Catalog) -> Iterator[Problem]:
        nested, bound = catalog.all_nested(), catalog.bound()
        yield from self._unmatched(set(self._mounts), nested, "nested catalog")
        yield from self._unmatched(self._binds, bound, "bound catalog")
        # The last is taken first.
        self._place.inner = [
            _Mounted(path, nested[path], self._mounts[path])
            for path in sorted(nested, reverse=True)
            if path in self._mounts
        ]

    def _unmatched(self, points: set[str], named: Mapping[str, Nested], what: str) -> Iterator[Problem]:
        self._is_whole &= points == named.keys()
        for path in sorted(points - named.keys()):
            yield Problem(path, f"a mount point of a {what} that is not named")
        for path in sorted(named.keys() - points):
            yield Problem(path, f"a {what} is named for it, but it is no mount point of one")

    def _count(self, row: Row, chunks: int) -> None:
        counted = tally(row, chunks)
        for name in NAMES:
            value = getattr(counted, name)
            if value:
                self._counts[name] += value

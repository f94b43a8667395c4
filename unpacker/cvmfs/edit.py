"""Changes a repository's tree below existing catalogs, and gives the new root catalog.

Catalogs are immutable objects: an edit opens those on the way to what changes, changes them in memory, and stores each
of them once, the deepest first. All others keep their hash. Nothing refers to what was stored until the caller signs
the new root.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from unpacker.cvmfs.catalog import Catalog, Nested
from unpacker.cvmfs.compose import Composition, Mount, marker
from unpacker.cvmfs.counters import NOTHING, Counters, Tally
from unpacker.cvmfs.cuts import FULL, fans_out
from unpacker.cvmfs.deflation import EMPTY
from unpacker.cvmfs.hash import ContentHash
from unpacker.cvmfs.objects import ObjectBatch, ObjectStore
from unpacker.cvmfs.reader import open_catalog
from unpacker.cvmfs.row import (
    BIND_MOUNT_POINT,
    CATALOG_ROOT,
    DIRECTORY,
    HIDDEN,
    MARKER,
    MOUNT_POINT,
    NAME_LIMIT,
    TARGET_LIMIT,
    Row,
    of_directory,
    of_node,
    tally,
)
from unpacker.errors import PublishError
from unpacker.tree import Directory, File, Special, Symlink

Change = File | Symlink | Special | Directory | Mount | None
"""What shall stand at a path, in place of anything else; None: nothing.

A Directory keeps what is in it and adds its children; a Mount brings a whole composed tree."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Edited:
    """The root catalog after an edit. `written` counts the catalogs that are new; 0: nothing was to be changed."""

    root: ContentHash
    size: int
    revision: int
    counters: Counters
    written: int


def create_root(objects: ObjectStore | ObjectBatch, composition: Composition) -> Edited:
    """The root catalog of an empty repository, revision 1."""
    directory = of_directory(_new_directory(composition, (0, 0)), "", 0)
    with Catalog.create("", last_modified=composition.last_modified) as catalog:
        catalog.insert([])
        catalog.put("", directory)
        catalog.counters = Counters(Tally(dir=1))
        data = catalog.serialise()
        root = objects.put(composition.compress(data), "C")
        return Edited(root=root, size=len(data), revision=1, counters=catalog.counters, written=1)


def edit(
    objects: ObjectStore,
    root: ContentHash,
    changes: Mapping[str, Change],
    composition: Composition,
    *,
    base: str = "",
    catalogs: Callable[[str], bool] = fans_out,
    batch: ObjectBatch | None = None,
    stamps: Mapping[str, Change] | None = None,
    full: int = FULL,
) -> Edited:
    """The root catalog in which every path of `changes` stands as it says. Their order means nothing.

    Missing directories on the way are made; those for which `catalogs` is true (by their path relative to `base`, where
    images go) as nested catalogs, and so those in a catalog that has `full` rows. A directory of the first kind that a
    removal left empty goes too. PublishError, with nothing of
    it visible, for the removal of what is not there, a way through what is no directory, and catalogs that this
    version must not edit. Paths are absolute; one change below another that is not of a directory is a ValueError.
    What is stored goes into `batch`, after what is in it already, else into one of its own. `stamps` are changes that
    come along with others, and are none by themselves.
    """
    _check({**changes, **(stamps or {})})
    if batch is None:
        with objects.batch() as own:
            return edit(
                objects,
                root,
                changes,
                composition,
                base=base,
                catalogs=catalogs,
                batch=own,
                stamps=stamps,
                full=full,
            )
    work = _Edit(objects, batch, root, composition, base, catalogs, full)
    try:
        for path in sorted(changes, key=lambda path: (changes[path] is not None, path)):
            work.change(path, changes[path])
        work.finish()
        for path, change in (stamps or {}).items() if work.is_changed else ():
            work.change(path, change)
        return work.commit()
    finally:
        work.close()


@dataclass(slots=True)
class _Open:
    """A catalog being changed. `stored` is None for one made here; `before` is what its parent has counted of it."""

    catalog: Catalog
    stored: ContentHash | None
    above: _Open | None
    before: Counters
    changed: bool = False

    def count(self, more: Tally, less: Tally = NOTHING) -> None:
        counters = self.catalog.counters
        self.catalog.counters = Counters(counters.own.plus(more).minus(less), counters.below)
        self.changed = True

    def count_below(self, more: Tally, less: Tally = NOTHING) -> None:
        counters = self.catalog.counters
        self.catalog.counters = Counters(counters.own, counters.below.plus(more).minus(less))
        self.changed = True


class _Edit:
    """One edit. `_open` has the catalogs by their mount points, `_places` where directories have their names."""

    def __init__(
        self,
        objects: ObjectStore,
        batch: ObjectBatch,
        root: ContentHash,
        composition: Composition,
        base: str,
        catalogs: Callable[[str], bool],
        full: int,
    ) -> None:
        self._objects = objects
        self._batch = batch
        self._composition = composition
        self._base = base
        self._is_catalog = catalogs
        self._full = full
        self._open: dict[str, _Open] = {}
        self._places: dict[str, _Open] = {}
        self._left: set[str] = set()
        self._given: dict[str, Directory] = {}
        self._root = root
        self._size = self._opened("", Nested(root, -1), None).catalog.size

    def close(self) -> None:
        for place in self._open.values():
            place.catalog.close()

    @property
    def is_changed(self) -> bool:
        """Whether anything differs from what was there."""
        return any(place.changed for place in self._open.values())

    # What is asked for -----------------------------------------------------------------------------------------------

    def change(self, path: str, change: Change) -> None:
        # A stack, because a directory brings others.
        pending = [(path, change)]
        while pending:
            path, change = pending.pop()
            if change is None:
                self._remove(path)
                self._left.add(_parent(path))
            elif isinstance(change, Mount):
                self._mount(path, change)
            elif type(change) is Directory:
                if not all(map(_is_name, change.children)):
                    raise PublishError(f"{path!a} cannot be stored: a name in it is not one for a file")
                self._set_directory(path, change)
                self._given[path] = change
                pending.extend((f"{path}/{name}", node) for name, node in sorted(change.children.items(), reverse=True))
            else:
                assert not isinstance(change, Directory)
                self._set(path, change)

    def finish(self) -> None:
        """Gives directories that were asked for their own times again, after all changes in them; then takes away the
        fan-out directories that removals left empty, and those that this leaves empty in turn."""
        for path, directory in self._given.items():
            row = self._row(path)
            if row is not None and row.is_directory:
                self._set_directory(path, directory)
        left = self._left
        while left:
            path = max(left, key=len)
            left.remove(path)
            relative = self._relative(path)
            if not relative or not self._is_catalog(relative) or not self._exists(path):
                continue
            if all(row.name == MARKER for row in self._enter(path).catalog.children(path)):
                self._remove(path)
                left.add(_parent(path))

    def commit(self) -> Edited:
        """Stores what changed, the deepest catalogs first, and tells each parent."""
        written = 0
        root = self._open[""]
        for path in sorted(self._open, key=lambda path: path.count("/") if path else -1, reverse=True):
            place = self._open[path]
            if not place.changed:
                continue
            catalog = place.catalog
            if place.stored is not None:
                previous = place.stored if place.above is None else None
                catalog.succeed(previous, revision=catalog.revision + 1, last_modified=self._composition.last_modified)
            data = catalog.serialise()
            hash = self._batch.put(self._composition.compress(data), "C")
            written += 1
            if place.above is None:
                self._root, self._size = hash, len(data)
            else:
                self._tell(place.above, path, place, Nested(hash, len(data)))
        return Edited(
            root=self._root,
            size=self._size,
            revision=root.catalog.revision,
            counters=root.catalog.counters,
            written=written,
        )

    def _tell(self, above: _Open, path: str, place: _Open, nested: Nested) -> None:
        """Makes the parent's transition point agree with the child: both describe the same directory."""
        own, transition = place.catalog.row(path), above.catalog.row(path)
        assert own is not None
        assert transition is not None
        row = own._replace(flags=own.flags & ~CATALOG_ROOT | MOUNT_POINT | transition.flags & HIDDEN)
        above.catalog.put(path, row)
        above.count(tally(row, 0), tally(transition, 0))
        above.catalog.attach(path, nested)
        above.count_below(place.catalog.counters.total, place.before.total)

    # One change ------------------------------------------------------------------------------------------------------

    def _set(self, path: str, node: File | Symlink | Special) -> None:
        name = path.rpartition("/")[2]
        try:
            row, chunks = of_node(node, name)
        except ValueError as error:
            raise PublishError(f"{path!a} cannot be stored: {error}") from None
        if type(node) is Symlink and not 0 < row.size <= TARGET_LIMIT:
            raise PublishError(f"{path!a} cannot be stored: a symlink with a target of {row.size} bytes")
        place = self._enter(_parent(path))
        old = place.catalog.row(path)
        gone = NOTHING
        if old is not None and old.is_directory:
            self._remove(path)
        elif old is not None:
            had = place.catalog.chunks(path)
            if old == row and had == chunks:
                return
            gone = tally(old, len(had))
            self._leave_group(place, path, old)
        place.catalog.put(path, row, chunks)
        place.count(tally(row, len(chunks)), gone)
        self._touch(path)

    def _set_directory(self, path: str, node: Directory) -> None:
        old = self._row(path)
        if old is not None and not old.is_directory:
            self._remove(path)
            old = None
        if old is None:
            self._make(path, node)
            return
        place = self._enter(path)
        own = place.catalog.row(path)
        assert own is not None
        row = _directory_row(path, node)._replace(hardlinks=own.hardlinks, flags=own.flags, size=own.size)
        if row != own:
            place.catalog.put(path, row)
            place.count(tally(row, 0), tally(own, 0))

    def _mount(self, path: str, mount: Mount) -> None:
        if mount.row.name != path.rpartition("/")[2]:
            raise ValueError(f"a catalog for the name {mount.row.name!a} cannot be mounted at {path!a}")
        place = self._enter(_parent(path))
        nested = Nested(mount.hash, mount.size)
        old = place.catalog.row(path)
        if old is not None:
            if old == mount.row and place.catalog.nested(path) == nested:
                return
            self._remove(path)
        place.catalog.put(path, mount.row)
        place.catalog.attach(path, nested)
        place.count(tally(mount.row, 0))
        place.count_below(mount.counters.total)
        self._touch(path, 1)

    def _make(self, path: str, node: Directory | None = None) -> _Open:
        """Makes a directory that is not there, as a nested catalog where it shall be one."""
        parent = _parent(path)
        place = self._enter(parent)
        if node is None:
            above = place.catalog.row(parent)
            assert above is not None
            node = _new_directory(self._composition, (above.uid, above.gid))
        row = _directory_row(path, node)
        relative = self._relative(path)
        is_full = place.catalog.counters.own.entries >= self._full
        if not relative or not (is_full or self._is_catalog(relative)):
            place.catalog.put(path, row)
            place.count(tally(row, 0))
            self._touch(path, 1)
            return place
        row = row._replace(flags=DIRECTORY | MOUNT_POINT)
        place.catalog.put(path, row)
        place.count(tally(row, 0))
        self._touch(path, 1)
        catalog = Catalog.create(path, last_modified=self._composition.last_modified)
        catalog.insert([])
        own = row._replace(flags=DIRECTORY | CATALOG_ROOT)
        mark = marker(own, self._batch.put(EMPTY), hidden=self._composition.hidden_markers)
        catalog.put(path, own)
        catalog.put(f"{path}/{MARKER}", mark)
        fresh = _Open(catalog, None, place, Counters())
        fresh.count(tally(own, 0).plus(tally(mark, 0)))
        self._open[path] = self._places[path] = fresh
        return fresh

    def _remove(self, path: str) -> None:
        place = self._place_of(path)
        row = None if place is None else place.catalog.row(path)
        if place is None or row is None:
            raise PublishError(f"{path!a} cannot be removed from the repository: it is not there")
        if row.flags & BIND_MOUNT_POINT:
            raise PublishError(f"{path!a} cannot be removed: it is a bind mount point of the official tools")
        self._leave_group(place, path, row)
        for inner, inside in [*self._below(place, path, row), (path, row)]:
            if inside.flags & MOUNT_POINT:
                self._dismount(place, inner)
            place.count(NOTHING, tally(inside, len(place.catalog.chunks(inner))))
            place.catalog.delete(inner)
        if row.is_directory:
            self._forget(path)
        self._touch(path, -1 if row.is_directory else 0)

    @staticmethod
    def _below(place: _Open, path: str, row: Row) -> Iterator[tuple[str, Row]]:
        """What one catalog has below a path."""
        pending = [(path, row)]
        while pending:
            directory, row = pending.pop()
            if not row.is_directory or row.flags & MOUNT_POINT:
                continue
            for child in place.catalog.children(directory):
                if child.flags & BIND_MOUNT_POINT:
                    raise PublishError(f"{directory!a} has a bind mount point of the official tools in it")
                yield f"{directory}/{child.name}", child
                pending.append((f"{directory}/{child.name}", child))

    def _dismount(self, place: _Open, path: str) -> None:
        nested = place.catalog.nested(path)
        if path in self._open:
            counted = self._open[path].before
        elif nested is None:
            raise PublishError(f"{path!a} is the mount point of a catalog that is not named; check the repository")
        else:
            with open_catalog(self._objects, nested.hash, path, nested.size) as catalog:
                catalog.require_editable()
                counted = catalog.counters
        place.catalog.detach(path)
        place.count_below(NOTHING, counted.total)

    def _leave_group(self, place: _Open, path: str, row: Row) -> None:
        """Hard links made by other tools: those that stay have one link less."""
        group = row.hardlinks >> 32
        if not group:
            return
        parent = _parent(path)
        for other in place.catalog.children(parent):
            other_path = f"{parent}/{other.name}"
            if other.hardlinks >> 32 == group and other_path != path:
                links = other.links - 1
                hardlinks = group << 32 | links if links > 1 else 1
                place.catalog.put(other_path, other._replace(hardlinks=hardlinks), place.catalog.chunks(other_path))

    def _touch(self, path: str, links: int = 0) -> None:
        """The directory of `path` changed: its time, and the number of directories in it."""
        parent = _parent(path)
        place = self._enter(parent)
        row = place.catalog.row(parent)
        assert row is not None
        place.catalog.put(
            parent, row._replace(hardlinks=row.hardlinks + links, mtime=self._composition.last_modified, mtimens=0)
        )
        place.changed = True

    # Where things are ------------------------------------------------------------------------------------------------

    def _enter(self, path: str) -> _Open:
        """The catalog that has the names in a directory; what is missing on the way is made."""
        place = self._places.get(path)
        if place is not None:
            return place
        at, place = "", self._open[""]
        for name in path.split("/")[1:]:
            at += "/" + name
            known = self._places.get(at)
            if known is None:
                row = place.catalog.row(at)
                known = self._make(at) if row is None else self._through(place, at, row)
                self._places[at] = known
            place = known
        return place

    def _through(self, place: _Open, path: str, row: Row) -> _Open:
        if not row.is_directory:
            raise PublishError(f"{path!a} of the repository is no directory, so nothing can be put below it")
        if row.flags & BIND_MOUNT_POINT:
            raise PublishError(f"{path!a} of the repository is a snapshot of the official tools")
        if not row.flags & MOUNT_POINT:
            return place
        nested = place.catalog.nested(path)
        if nested is None:
            raise PublishError(f"{path!a} is the mount point of a catalog that is not named; check the repository")
        return self._opened(path, nested, place)

    def _opened(self, path: str, nested: Nested, above: _Open | None) -> _Open:
        catalog = open_catalog(self._objects, nested.hash, path, None if nested.size < 0 else nested.size)
        try:
            catalog.require_editable()
            if catalog.row(path) is None:
                raise PublishError(f"the catalog of {path or '/'} lacks the row of its own root; check the repository")
        except PublishError:
            catalog.close()
            raise
        place = self._open[path] = self._places[path] = _Open(catalog, nested.hash, above, catalog.counters)
        return place

    def _place_of(self, path: str) -> _Open | None:
        """The catalog that has the row of a path as its directory's, if all directories on the way exist."""
        return self._enter(_parent(path)) if self._exists(_parent(path)) else None

    def _exists(self, path: str) -> bool:
        return not path or path in self._places or self._row(path) is not None

    def _row(self, path: str) -> Row | None:
        """The row of a path as its directory's catalog has it, nothing made on the way."""
        at, place = "", self._open[""]
        row = place.catalog.row("")
        for name in path.split("/")[1:]:
            if row is None or not row.is_directory:
                return None
            if at:
                known = self._places.get(at)
                if known is None:
                    known = self._places[at] = self._through(place, at, row)
                place = known
            at += "/" + name
            row = place.catalog.row(at)
        return row

    def _forget(self, path: str) -> None:
        """A directory is gone, with all that was open below it."""
        for known in [p for p in self._places if p == path or p.startswith(path + "/")]:
            del self._places[known]
        for known in [p for p in self._open if p == path or p.startswith(path + "/")]:
            self._open.pop(known).catalog.close()

    def _relative(self, path: str) -> str:
        """A path relative to the base; empty for the base itself and for all that is not below it."""
        return path[len(self._base) + 1 :] if path.startswith(self._base + "/") else ""


def _new_directory(composition: Composition, owner: tuple[int, int]) -> Directory:
    return Directory(0o755, *owner, composition.last_modified * 10**9, (), {})


def _directory_row(path: str, node: Directory) -> Row:
    try:
        return of_directory(node, path.rpartition("/")[2], 0)
    except ValueError as error:
        raise PublishError(f"{path!a} cannot be stored: {error}") from None


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def _check(changes: Mapping[str, Change]) -> None:
    whole = {path for path, change in changes.items() if not isinstance(change, Directory)}
    for path in changes:
        start, *names = path.split("/")
        if start or not names or not all(map(_is_name, names)):
            raise ValueError(f"not a path that can be changed in a repository: {path!a}")
        above = _parent(path)
        while above:
            if above in whole:
                raise ValueError(f"{path!a} cannot be changed in the same edit as all of {above!a}")
            above = _parent(above)


def _is_name(name: str) -> bool:
    return (
        name not in ("", ".", "..", MARKER)
        and "\0" not in name
        and len(name.encode("utf-8", "surrogateescape")) <= NAME_LIMIT
    )

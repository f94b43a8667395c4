"""A prepared tree becomes nested catalogs: rows and nothing else, because its files are objects already.

Deterministic: the same tree at the same path with the same `last_modified` gives the same bytes, and so the same
objects (SQLite writes its own version into each catalog; that apart). Hard links are broken, every name is one.

What CernVM-FS cannot hold is left out or altered, and counted by word:

    markers      names `.cvmfscatalog`, with what is in them: clients' tools take them for instructions
    names        names longer than 255 bytes, or that no file system could have, with what is in them
    targets      symlinks whose target is empty or longer than 4,095 bytes
    xattrs       files of which at least one attribute is gone: longer than 255 bytes, or more than 255 of them
    variants     symlinks with `$(…)` in their target, stored as they are: clients put a variable of theirs there
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar, cast

from unpacker.changeset import Xattrs
from unpacker.cvmfs.catalog import Catalog, Nested
from unpacker.cvmfs.counters import NOTHING, Counters, Tally
from unpacker.cvmfs.cuts import LARGEST, SMALLEST, cuts
from unpacker.cvmfs.deflation import EMPTY, Compressor, dense
from unpacker.cvmfs.hash import ContentHash
from unpacker.cvmfs.objects import ObjectBatch, ObjectStore
from unpacker.cvmfs.row import (
    CATALOG_ROOT,
    DIRECTORY,
    FILE,
    HIDDEN,
    MARKER,
    MOUNT_POINT,
    NAME_LIMIT,
    TARGET_LIMIT,
    XATTR_LIMIT,
    Chunk,
    Row,
    key,
    of_directory,
    of_node,
)
from unpacker.tree import Directory, File, Node, Special, Symlink, Tree

_Key = tuple[int, int]
_N = TypeVar("_N", bound=File | Symlink | Special | Directory)
_Names = list[tuple[bytes, str, Node]]
_NO_NAMES = frozenset({MARKER, ".", ".."})


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """A stored catalog, as a parent in which it is mounted describes it. `row` is the directory's row there."""

    row: Row
    hash: ContentHash
    size: int
    counters: Counters


@dataclass(frozen=True, slots=True, kw_only=True)
class Composed:
    """A tree in the store. `altered` counts, by word, what CernVM-FS cannot hold; `catalogs` how many it became."""

    mount: Mount
    altered: Mapping[str, int]
    catalogs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Composition:
    """How trees become catalogs.

    `hidden_markers` keeps `.cvmfscatalog` out of listings; the official tools then cannot remove such a tree without
    leaving parts of it behind. `compress` is for catalogs; contents are compressed already.
    """

    last_modified: int
    hidden_markers: bool = False
    smallest: int = SMALLEST
    largest: int = LARGEST
    compress: Compressor = dense


def compose(tree: Tree, path: str, objects: ObjectStore | ObjectBatch, composition: Composition) -> Composed:
    """Stores the catalogs of a tree that will be mounted at `path`, an absolute path of the repository.

    The deepest come first, so that a stored catalog implies all it refers to. That the contents named by the tokens of
    its files are in the store is for the caller to check. OSError and PublishError as the store gives them.
    """
    if not path.startswith("/") or path.endswith("/"):
        raise ValueError(f"not the path of a directory inside a repository: {path!a}")
    empty = objects.put(EMPTY, "")
    altered: Counter[str] = Counter()
    mounts: dict[bytes, Mount] = {}
    top = _bytes(path)
    for cut in (*cuts(sizes(tree.root), smallest=composition.smallest, largest=composition.largest), ""):
        at = top + b"/" + _bytes(cut) if cut else top
        directory = _directory(tree.root, cut)
        mounts[at] = _Writing(at, directory, empty, mounts, altered, composition).store(objects)
    return Composed(mount=mounts[top], altered=dict(altered), catalogs=len(mounts))


def marker(directory: Row, empty: ContentHash, *, hidden: bool) -> Row:
    """The row of the marker file in the root of a nested catalog: empty, and as old and as owned as its directory.

    `empty` is the object of the empty file.
    """
    flags = FILE | empty.flags_bits | (HIDDEN if hidden else 0)
    row = Row(1, empty.digest, 0, 0o100644, directory.mtime, directory.mtimens, flags, MARKER, "", 0, 0, None)
    return row._replace(uid=directory.uid, gid=directory.gid)


class _Writing:
    """One catalog in the making: its rows go past once, are counted, and become bytes."""

    def __init__(
        self,
        path: bytes,
        directory: Directory,
        empty: ContentHash,
        mounts: Mapping[bytes, Mount],
        altered: Counter[str],
        composition: Composition,
    ) -> None:
        self._path = path
        self._mounts = mounts
        self._altered = altered
        self._composition = composition
        self._chunks: list[tuple[_Key, Chunk]] = []
        self._nested: list[tuple[bytes, Mount]] = []
        self._own = NOTHING
        self._names, subdirectories = self._kept(directory)
        name = path.rpartition(b"/")[2].decode("utf-8", "surrogateescape")
        self._root = of_directory(self._holdable(directory), name, subdirectories, CATALOG_ROOT)
        self._marker = marker(self._root, empty, hidden=composition.hidden_markers)

    def store(self, objects: ObjectStore | ObjectBatch) -> Mount:
        prefix = self._path.decode("utf-8", "surrogateescape")
        with Catalog.create(prefix, last_modified=self._composition.last_modified) as catalog:
            catalog.insert(self._rows())
            catalog.insert_chunks(self._chunks)
            below = NOTHING
            for path, mount in sorted(self._nested, key=lambda nested: nested[0]):
                catalog.attach(path.decode("utf-8", "surrogateescape"), Nested(mount.hash, mount.size))
                below = below.plus(mount.counters.total)
            catalog.counters = Counters(self._own, below)
            data = catalog.serialise()
        return Mount(
            row=self._root._replace(flags=DIRECTORY | MOUNT_POINT),
            hash=objects.put(self._composition.compress(data), "C"),
            size=len(data),
            counters=catalog.counters,
        )

    def _rows(self) -> Iterator[tuple[_Key, _Key, Row]]:
        """Directory by directory, the names of each together, because that is how they are listed."""
        chunks, mounts, nested = self._chunks, self._mounts, self._nested
        path = self._path
        regular = symlinks = specials = directories = chunked = size = chunked_size = attributed = 0
        own = key(path)
        yield own, key(path.rpartition(b"/")[0]), self._root
        yield key(path + b"/" + MARKER.encode("ascii")), own, self._marker
        pending = [(path + b"/", own, self._names)]
        while pending:
            prefix, parent, names = pending.pop()
            inside = []
            for encoded, name, node in names:
                path = prefix + encoded
                own = key(path)
                if isinstance(node, Directory):
                    directories += 1
                    mount = mounts.get(path)
                    if mount is None:
                        below, subdirectories = self._kept(node)
                        row = of_directory(self._holdable(node), name, subdirectories)
                        if below:
                            inside.append((path + b"/", own, below))
                    else:
                        row = mount.row
                        nested.append((path, mount))
                else:
                    row, pieces = of_node(self._holdable(node) if node.xattrs else node, name)
                    if type(node) is File:
                        regular += 1
                        size += node.size
                        if pieces:
                            chunked += 1
                            chunked_size += node.size
                            chunks.extend((own, piece) for piece in pieces)
                    elif type(node) is Symlink:
                        symlinks += 1
                        if ")" in node.target.partition("$(")[2]:
                            self._altered["variants"] += 1
                    else:
                        specials += 1
                if row.xattr is not None:
                    attributed += 1
                yield own, parent, row
            pending.extend(reversed(inside))
        self._own = Tally(
            regular=regular + 1,  # the marker
            symlink=symlinks,
            special=specials,
            dir=directories + 1,  # the root
            nested=len(nested),
            chunked=chunked,
            chunks=len(chunks),
            file_size=size,
            chunked_size=chunked_size,
            xattr=attributed + (self._root.xattr is not None),
        )

    def _kept(self, directory: Directory) -> tuple[_Names, int]:
        """The names of a directory that can be held, by their bytes, and how many of them are directories."""
        names: _Names = []
        subdirectories = 0
        for name, node in directory.children.items():
            encoded = _bytes(name)
            if not _is_holdable(name, encoded):
                self._altered["markers" if name == MARKER else "names"] += 1
            elif type(node) is Symlink and not _is_target(node.target):
                self._altered["targets"] += 1
            else:
                names.append((encoded, name, node))
                subdirectories += type(node) is Directory
        names.sort()
        return names, subdirectories

    def _holdable(self, node: _N) -> _N:
        """The node with those of its attributes that can be held."""
        if not node.xattrs:
            return node
        xattrs = _held_xattrs(node.xattrs)
        if len(xattrs) == len(node.xattrs):
            return node
        self._altered["xattrs"] += 1
        return cast(_N, node._replace(xattrs=xattrs))


def sizes(root: Directory) -> Iterator[tuple[str, int]]:
    """The directories that can be cut off, with the number of names in each, a directory before those in it."""
    pending = [("", root)]
    while pending:
        path, directory = pending.pop()
        children = directory.children
        yield path, len(children)
        prefix = path + "/" if path else ""
        for name, node in children.items():
            if isinstance(node, Directory) and node.children and _is_holdable(name, _bytes(name)):
                pending.append((prefix + name, node))


def _directory(root: Directory, path: str) -> Directory:
    node: Node = root
    for name in path.split("/") if path else ():
        assert isinstance(node, Directory)
        node = node.children[name]
    assert isinstance(node, Directory)
    return node


def _is_holdable(name: str, encoded: bytes) -> bool:
    return 0 < len(encoded) <= NAME_LIMIT and name not in _NO_NAMES and b"/" not in encoded and b"\0" not in encoded


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _is_target(target: str) -> bool:
    return 0 < len(_bytes(target)) <= TARGET_LIMIT and "\0" not in target


def _held_xattrs(xattrs: Xattrs) -> Xattrs:
    return tuple(
        (name, value) for name, value in xattrs if 0 < len(_bytes(name)) <= XATTR_LIMIT and len(value) <= XATTR_LIMIT
    )[:XATTR_LIMIT]

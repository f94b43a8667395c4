"""A prepared tree as `cvmfs_server` will publish it, and where its catalogs are cut. Pure.

They take some names for instructions to themselves, store whole seconds and no attributes unless told otherwise. All of
this is applied before a tree is written, so that what is recorded is what clients see.
"""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from unpacker.changeset import Kind
from unpacker.cvmfs.compose import sizes
from unpacker.cvmfs.cuts import cuts
from unpacker.cvmfs.row import MARKER, XATTR_LIMIT
from unpacker.tree import Directory, File, Node, Special, Symlink, Tree, name_bytes, rewrite, walk

_RESERVED = frozenset({MARKER, ".cvmfsautocatalog", ".cvmfsbundles"})
_GRAFT = ".cvmfsgraft-"
"""How names begin that make the official tools publish a file by a hash that the image claims."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Abilities:
    """What a repository is configured to keep."""

    xattrs: bool
    nanoseconds: bool
    specials: bool


def held(tree: Tree, abilities: Abilities) -> tuple[Tree, Mapping[str, int]]:
    """The tree as it will be published, and how many names that altered or left out, by the words of a record.

    `markers` are names that the official tools take for instructions, `xattrs` files that lose attributes, `fifos` are
    left out, `variants` symlinks that clients fill variables into, and stay.
    """
    counts: Counter[str] = Counter()
    reserved = [path for path, _ in walk(tree) if _is_reserved(path.rpartition("/")[2])]
    root = _edited(tree.root, dict.fromkeys(reserved))
    counts["markers"] = len(reserved)

    def rule(node: Node) -> Node | None:
        if type(node) is Special and node.kind is Kind.FIFO and not abilities.specials:
            counts["fifos"] += 1
            return None
        if type(node) is Symlink and ")" in node.target.partition("$(")[2]:
            counts["variants"] += 1
        if not abilities.nanoseconds and node.mtime_ns % 10**9:
            node = node._replace(mtime_ns=node.mtime_ns // 10**9 * 10**9)
        if node.xattrs:
            kept = tuple(x for x in node.xattrs if _is_held(*x)) if abilities.xattrs else ()
            if len(kept) != len(node.xattrs):
                counts["xattrs"] += 1
                node = node._replace(xattrs=kept)
        return node

    return rewrite(Tree(root, tree.implied), rule), {word: number for word, number in sorted(counts.items()) if number}


def marked(tree: Tree) -> tuple[Tree, int]:
    """The tree with a marker in its root, and in the directories that large trees are cut at; and how many these are.

    A marker is an empty file, as old and as owned as its directory.
    """
    root = tree.root
    places = (*cuts(sizes(root)), "")
    markers = {posixpath.join(place, MARKER): _marker(root, place) for place in places}
    return Tree(_edited(root, markers), tree.implied), len(places)


def _is_reserved(name: str) -> bool:
    return name in _RESERVED or name.startswith(_GRAFT)


def _is_held(name: str, value: bytes) -> bool:
    return len(name_bytes(name)) <= XATTR_LIMIT and len(value) <= XATTR_LIMIT


def _marker(root: Directory, place: str) -> File:
    directory: Node = root
    for name in place.split("/") if place else ():
        assert isinstance(directory, Directory)
        directory = directory.children[name]
    return File(0o644, directory.uid, directory.gid, directory.mtime_ns, (), 0, "")


def _edited(root: Directory, changes: Mapping[str, Node | None]) -> Directory:
    """The directory with other nodes at these paths below it, or with none there. Everything else is shared.

    Each directory on the way is copied once: how many changes there are in it is for the image to say.
    """
    if not changes:
        return root
    inside: dict[str, dict[str, Node | None]] = {"": {}}
    for path, node in changes.items():
        above, _, name = path.rpartition("/")
        is_known = above in inside
        inside.setdefault(above, {})[name] = node
        while not is_known:
            above = above.rpartition("/")[0]
            is_known = above in inside
            inside.setdefault(above, {})
    order = sorted(inside, key=lambda path: path.count("/") if path else -1)
    directories = {"": root}
    for path in order[1:]:
        above, _, name = path.rpartition("/")
        below = directories[above].children[name]
        assert isinstance(below, Directory)
        directories[path] = below
    for path in reversed(order):
        edits = inside[path]
        children = {name: child for name, child in directories[path].children.items() if name not in edits}
        children.update((name, node) for name, node in edits.items() if node is not None)
        directories[path] = directories[path]._replace(children=children)
        if path:
            above, _, name = path.rpartition("/")
            # What is taken away is not put back for a change below it.
            inside[above].setdefault(name, directories[path])
    return directories[""]

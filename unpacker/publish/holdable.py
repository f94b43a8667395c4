"""A prepared tree as `cvmfs_server` will publish it, and where its catalogs are cut. Pure.

They take some names for instructions to themselves, store whole seconds and no attributes unless told otherwise. All of
this is applied before a tree is written, so that what is recorded is what clients see.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
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
    root = tree.root
    for path in reversed(reserved):  # what is in a directory before the directory
        root = _replaced(root, path.split("/"), None)
        counts["markers"] += 1

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
    for place in places:
        root = _with_marker(root, place.split("/") if place else [])
    return Tree(root, tree.implied), len(places)


def _is_reserved(name: str) -> bool:
    return name in _RESERVED or name.startswith(_GRAFT)


def _is_held(name: str, value: bytes) -> bool:
    return len(name_bytes(name)) <= XATTR_LIMIT and len(value) <= XATTR_LIMIT


def _with_marker(root: Directory, names: Sequence[str]) -> Directory:
    directory: Node = root
    for name in names:
        assert isinstance(directory, Directory)
        directory = directory.children[name]
    marker = File(0o644, directory.uid, directory.gid, directory.mtime_ns, (), 0, "")
    return _replaced(root, [*names, MARKER], marker)


def _replaced(root: Directory, names: Sequence[str], node: Node | None) -> Directory:
    """The directory with another node at a path below it, or with none there. Everything else is shared."""
    above = [root]
    for name in names[:-1]:
        below = above[-1].children[name]
        assert isinstance(below, Directory)
        above.append(below)
    for directory, name in zip(reversed(above), reversed(names), strict=True):
        children = {key: child for key, child in directory.children.items() if key != name}
        if node is not None:
            children[name] = node
        node = directory._replace(children=children)
    assert isinstance(node, Directory)
    return node

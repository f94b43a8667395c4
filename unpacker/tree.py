"""The merged file system of an image, as names: node types, Tree, and ways through it.

Bytes are tokens; nothing here touches a disk. Trees are shared, never changed. Nothing recurses, because an image
chooses how deep its tree is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from operator import methodcaller
from typing import NamedTuple

from unpacker.changeset import Change, Kind, Xattrs


class File(NamedTuple):
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    xattrs: Xattrs
    size: int
    token: str
    change: Change = Change.NONE


class Symlink(NamedTuple):
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    xattrs: Xattrs
    target: str
    change: Change = Change.NONE


class Special(NamedTuple):
    """A device or a fifo, by `kind`."""

    mode: int
    uid: int
    gid: int
    mtime_ns: int
    xattrs: Xattrs
    kind: Kind
    device: tuple[int, int]
    change: Change = Change.NONE


class Directory(NamedTuple):
    """A directory and its children by name. Frozen by convention once the function that builds it returns."""

    mode: int
    uid: int
    gid: int
    mtime_ns: int
    xattrs: Xattrs
    children: dict[str, Node]
    change: Change = Change.NONE


Node = File | Symlink | Special | Directory


class Tree(NamedTuple):
    """A root file system. `implied` counts the directories that no entry asked for but some path went through."""

    root: Directory
    implied: int = 0


EMPTY = Tree(Directory(0o755, 0, 0, 0, (), {}))

MOST_LINKS = 40
"""Symbolic links followed in one path before Linux gives up (path_resolution(7), ELOOP)."""

name_bytes = methodcaller("encode", "utf-8", "surrogateescape")
"""A name as a file system has it, which is also what names are sorted by."""


def walk(tree: Tree) -> Iterator[tuple[str, Node]]:
    """Every node by path: the root (`""`) first, a directory before what is in it, names by their bytes."""
    yield "", tree.root
    open_directories = [("", tree.root.children, _sorted_names(tree.root))]
    while open_directories:
        prefix, children, names = open_directories[-1]
        for name in names:
            node = children[name]
            path = prefix + name
            yield path, node
            if type(node) is Directory and node.children:
                open_directories.append((path + "/", node.children, _sorted_names(node)))
                break
        else:
            open_directories.pop()


def lookup(tree: Tree, path: str) -> Node | None:
    """The node that `lstat` would find in a chroot: parents through symlinks inside the tree, the last not followed."""
    return find(tree.root, path)


class Found(NamedTuple):
    """A directory that a path leads to: its real path as names, and the symlinks (by real path) that led there."""

    trail: list[str]
    directory: Directory
    followed: list[str]


def resolve(root: Directory, path: str, count: Callable[[int], None]) -> Found | None:
    """Where a path leads, every symlink followed inside the tree; None if that is no directory.

    `count` is told how many components each symlink adds, and may refuse.
    """
    trail: list[str] = []
    directories = [root]
    followed: list[str] = []
    names = path.split("/")[::-1]
    while names:
        name = names.pop()
        if not name or name == ".":
            continue
        if name == "..":
            if trail:
                trail.pop()
                directories.pop()
            continue
        node = directories[-1].children.get(name)
        if type(node) is Directory:
            trail.append(name)
            directories.append(node)
        elif type(node) is Symlink and len(followed) < MOST_LINKS:
            count(node.target.count("/") + 1)
            followed.append("/".join((*trail, name)))
            if node.target.startswith("/"):
                trail, directories = [], [root]
            names.extend(node.target.split("/")[::-1])
        else:
            return None
    return Found(trail, directories[-1], followed)


def find(root: Directory, path: str, count: Callable[[int], None] = lambda steps: None) -> Node | None:
    """`lookup` from that directory; `count` is as for `resolve`."""
    parent, _, name = path.rpartition("/")
    if name in ("", ".", ".."):
        parent = path
    found = resolve(root, parent, count)
    if found is None or parent == path:
        return found and found.directory
    return found.directory.children.get(name)


def rewrite(tree: Tree, rule: Callable[[Node], Node | None]) -> Tree:
    """The tree with every node replaced by what `rule` gives for it; None drops it, with what is below.

    `rule` is called once per name, children before their directory, and leaves `children` alone. Directories in which
    nothing changed are shared with the tree given.
    """
    visits = [_Visit("", tree.root)]
    while True:
        visit = visits[-1]
        for name, node in visit.names:
            if type(node) is Directory and node.children:
                visits.append(_Visit(name, node))
                break
            replacement = rule(node)
            if replacement is not node:
                visit.replace(name, replacement)
        else:
            visits.pop()
            directory = visit.directory
            if visit.children is not None:
                directory = directory._replace(children=visit.children)
            replacement = rule(directory)
            if visits:
                if replacement is not visit.directory:
                    visits[-1].replace(visit.name, replacement)
                continue
            if not isinstance(replacement, Directory):
                raise ValueError("a tree needs its root directory")
            return tree if replacement is tree.root else tree._replace(root=replacement)


class _Visit:
    """A directory being rewritten; its children are copied when the first of them changes."""

    __slots__ = ("children", "directory", "name", "names")

    def __init__(self, name: str, directory: Directory) -> None:
        self.name = name
        self.directory = directory
        self.names = iter(directory.children.items())
        self.children: dict[str, Node] | None = None

    def replace(self, name: str, node: Node | None) -> None:
        if self.children is None:
            self.children = self.directory.children.copy()
        if node is None:
            del self.children[name]
        else:
            self.children[name] = node


def _sorted_names(directory: Directory) -> Iterator[str]:
    return iter(sorted(directory.children, key=name_bytes))

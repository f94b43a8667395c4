"""One layer as a directory that overlayfs can stack: what containerd's snapshotter mounts instead of pulling it. Pure.

The kernel's words for what a layer hides: a whiteout is a character device 0/0, an opaque directory has the extended
attribute `trusted.overlay.opaque`. An overlay knows nothing of what lies below, so a layer that says less by itself
than on top of others has no such directory.
"""

from __future__ import annotations

import posixpath
from dataclasses import replace

from unpacker.apply import apply
from unpacker.changeset import Changeset, Entry, Kind
from unpacker.errors import ImageError
from unpacker.limits import Limits
from unpacker.tree import EMPTY, Directory, Node, Special, Tree, walk

OPAQUE = ("trusted.overlay.opaque", b"y")
WHITEOUT = Special(0, 0, 0, 0, (), Kind.CHARACTER, (0, 0))

_DEVICES = (Kind.CHARACTER, Kind.BLOCK)


def layer_tree(changeset: Changeset, below: Tree, limits: Limits) -> Tree | None:
    """The directory of a layer that was applied on `below`; None if it cannot stand alone.

    That is one with hard links to what another layer brought, or with names below a symlink. A directory on the way
    that the layer does not have itself looks as it does in `below`, because the upper of two directories wins.
    Devices are not published: one that hides something of `below` is a whiteout, all others are left out.
    """
    if not _stands_alone(changeset):
        return None
    try:
        tree = apply(EMPTY, replace(changeset, whiteouts=(), opaque=()), limits)
    except ImageError:
        return None
    own = {entry.path for entry in changeset.entries if entry.kind is Kind.DIRECTORY}
    made = _Overlay(tree.root, below.root, own)
    for path, node in walk(tree):
        if type(node) is Special and node.kind in _DEVICES:
            made.leave_out(path)
    hidden = {*changeset.whiteouts, *changeset.opaque}
    for path in changeset.whiteouts:
        if not _is_below(path, hidden):
            made.hide(path)
    for path in changeset.opaque:
        if not _is_below(path, hidden):
            made.make_opaque(path)
    root = made.result(set(changeset.whiteouts))
    return None if root is None else Tree(root)


def _stands_alone(changeset: Changeset) -> bool:
    """Whether every hard link is to a file that came before it, and no name is a directory as well as something else.

    A link to what comes later may have meant another layer's file of that name; and a symlink on a path of the layer
    leads wherever the layers below say.
    """
    files: set[str] = set()
    directories = set(changeset.opaque)
    for entry in changeset.entries:
        if entry.kind is Kind.DIRECTORY:
            directories.add(entry.path)
            continue
        if entry.kind is Kind.HARDLINK and entry.target not in files:
            return False
        files.add(entry.path)
    for path in (*map(_path, changeset.entries), *changeset.whiteouts, *changeset.opaque):
        above = posixpath.dirname(path)
        while above and above not in directories:
            directories.add(above)
            above = posixpath.dirname(above)
    return directories.isdisjoint(files)


def _is_below(path: str, hidden: set[str]) -> bool:
    while path:
        path = posixpath.dirname(path)
        if path in hidden:
            return True
    return False


def _path(entry: Entry) -> str:
    return entry.path


class _Overlay:
    """The directory in the making. The trees given are not changed: what is, is copied first."""

    def __init__(self, root: Directory, below: Directory, own: set[str]) -> None:
        self._below = below
        self._own = own
        self._root = root._replace(children=dict(root.children))
        self._copied: dict[str, Directory] = {"": self._root}

    def hide(self, path: str) -> None:
        """Hides a name of the layers below; one that this layer brings itself hides them anyway, unless they merge."""
        parent, _, name = path.rpartition("/")
        directory = self._enter(parent) if self._leads_somewhere(parent) else None
        if directory is None:
            return
        node = directory.children.get(name)
        if node is None:
            directory.children[name] = WHITEOUT
        elif type(node) is Directory:
            self.make_opaque(path)

    def leave_out(self, path: str) -> None:
        """Takes a name away, so that an overlay shows nothing there."""
        parent, _, name = path.rpartition("/")
        directory = self._enter(parent)
        assert directory is not None
        del directory.children[name]
        if self.has_below(path):
            directory.children[name] = WHITEOUT

    def make_opaque(self, path: str) -> None:
        directory = self._enter(path) if self._leads_somewhere(path) else None
        if directory is None or OPAQUE in directory.xattrs:
            return
        marked = directory._replace(xattrs=tuple(sorted((*directory.xattrs, OPAQUE))))
        self._put(path, marked)

    def has_below(self, path: str) -> bool:
        """Whether the layers below have something where this path leads without following symlinks."""
        return _at(self._below, path) is not None

    def _leads_somewhere(self, path: str) -> bool:
        """Whether there is anything here or below: what is nowhere need not be hidden, and must not come to be."""
        return _at(self._root, path) is not None or self.has_below(path)

    def result(self, hidden: set[str]) -> Directory | None:
        """The whole, each directory that the layer only goes through as it is below; None where there is no directory
        below, but a symlink or a file that the layer did not mean to replace. Nothing is below what is `hidden`."""
        pending: list[tuple[str, Node | None]] = [("", self._below)]
        while pending:
            path, below = pending.pop()
            if path in hidden:
                below = None
            directory = self._enter(path)
            assert directory is not None
            if path not in self._own and below is not None:
                if type(below) is not Directory:
                    return None
                kept = tuple(x for x in directory.xattrs if x == OPAQUE)
                seen = below._replace(children=directory.children, xattrs=tuple(sorted((*below.xattrs, *kept))))
                directory = self._put(path, seen)
            inside = below.children if type(below) is Directory and OPAQUE not in directory.xattrs else {}
            for name, node in directory.children.items():
                if type(node) is Directory:
                    pending.append((f"{path}/{name}" if path else name, inside.get(name)))
        return self._root

    def _put(self, path: str, directory: Directory) -> Directory:
        if path:
            parent, _, name = path.rpartition("/")
            above = self._enter(parent)
            assert above is not None
            above.children[name] = directory
        else:
            self._root = directory
        self._copied[path] = directory
        return directory

    def _enter(self, path: str) -> Directory | None:
        """A directory of the layer, copied so that it can be changed, and made if it is not there; None where
        something else is."""
        known = self._copied.get(path)
        if known is not None:
            return known
        missing = [path]
        while (above := posixpath.dirname(missing[-1])) not in self._copied:
            missing.append(above)
        directory = self._copied[above]
        for at in reversed(missing):
            name = at.rpartition("/")[2]
            node = directory.children.get(name)
            if node is None:
                node = Directory(0o755, 0, 0, 0, (), {})
            elif type(node) is not Directory:
                return None
            fresh = node._replace(children=dict(node.children))
            directory.children[name] = fresh
            directory = self._copied[at] = fresh
        return directory


def _at(root: Directory, path: str) -> Node | None:
    node: Node | None = root
    for name in path.split("/") if path else ():
        node = node.children.get(name) if type(node) is Directory else None
    return node

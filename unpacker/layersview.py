"""One layer as a directory that overlayfs can stack: what containerd's snapshotter mounts instead of pulling it. Pure.

The kernel's words for what a layer hides: a whiteout is a character device 0/0, an opaque directory has the extended
attribute `trusted.overlay.opaque`. An overlay knows nothing of what lies below, so a layer that says less by itself
than on top of others has no such directory.
"""

from __future__ import annotations

import posixpath
from dataclasses import replace

from unpacker.changeset import Changeset, Entry, Kind
from unpacker.errors import ImageError
from unpacker.limits import Limits
from unpacker.tree import EMPTY, Directory, Node, Special, Tree, apply

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
    entries = tuple(entry for entry in changeset.entries if entry.kind not in _DEVICES)
    try:
        tree = apply(EMPTY, replace(changeset, entries=entries, whiteouts=(), opaque=()), limits)
    except ImageError:
        return None
    own = {entry.path for entry in entries if entry.kind is Kind.DIRECTORY}
    made = _Overlay(tree.root, below.root, own)
    for path in changeset.whiteouts:
        made.hide(path)
    for entry in changeset.entries:
        if entry.kind in _DEVICES and made.has_below(entry.path):
            made.hide(entry.path)
    for path in changeset.opaque:
        made.make_opaque(path)
    root = made.result()
    return None if root is None else Tree(root)


def _stands_alone(changeset: Changeset) -> bool:
    """Whether every hard link is to a file that came before it, and no path of the layer goes through a symlink of it.

    A link to what comes later may have meant another layer's file of that name: such a layer is not stacked either.
    """
    files: set[str] = set()
    links: set[str] = set()
    for entry in changeset.entries:
        if entry.kind is Kind.HARDLINK:
            if entry.target not in files:
                return False
            files.add(entry.path)
        elif entry.kind is Kind.SYMLINK:
            links.add(entry.path)
        if entry.kind is not Kind.DIRECTORY and entry.kind is not Kind.HARDLINK:
            files.add(entry.path)
    if not links:
        return True
    known: set[str] = set()
    for path in (*map(_path, changeset.entries), *changeset.whiteouts, *changeset.opaque):
        above = posixpath.dirname(path)
        while above and above not in known:
            if above in links:
                return False
            known.add(above)
            above = posixpath.dirname(above)
    return not links.intersection(changeset.opaque)


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
        directory = self._enter(parent)
        if directory is None:
            return
        node = directory.children.get(name)
        if node is None:
            directory.children[name] = WHITEOUT
        elif type(node) is Directory:
            self.make_opaque(path)

    def make_opaque(self, path: str) -> None:
        directory = self._enter(path)
        if directory is None or OPAQUE in directory.xattrs:
            return
        marked = directory._replace(xattrs=tuple(sorted((*directory.xattrs, OPAQUE))))
        self._put(path, marked)

    def has_below(self, path: str) -> bool:
        """Whether the layers below have something where this path leads without following symlinks."""
        node: Node | None = self._below
        for name in path.split("/"):
            node = node.children.get(name) if type(node) is Directory else None
        return node is not None

    def result(self) -> Directory | None:
        """The whole, each directory that the layer only goes through as it is below; None where there is no directory
        below, but a symlink or a file that the layer did not mean to replace."""
        pending: list[tuple[str, Node | None]] = [("", self._below)]
        while pending:
            path, below = pending.pop()
            directory = self._enter(path)
            assert directory is not None
            if path not in self._own and below is not None:
                if type(below) is not Directory:
                    return None
                kept = tuple(x for x in directory.xattrs if x == OPAQUE)
                seen = below._replace(children=directory.children, xattrs=tuple(sorted((*below.xattrs, *kept))))
                directory = self._put(path, seen)
            inside = below.children if type(below) is Directory else {}
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

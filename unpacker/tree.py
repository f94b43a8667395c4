"""The merged file system of an image, as names: node types, Tree, and `apply`.

Bottom-up as the OCI image specification has it (`layer.md`, "Applying Changesets"): a pure function on names. Bytes
are tokens; nothing here touches a disk.
"""

from __future__ import annotations

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
    """A root file system."""

    root: Directory


EMPTY = Tree(Directory(0o755, 0, 0, 0, (), {}))

"""What a root gets besides its image, and only where the image has nothing: `Addition`, and `add`.

Pure. Nothing that the image brings is replaced, emptied or given other metadata, and nothing is made outside the tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from unpacker.apply import apply
from unpacker.changeset import Changeset, Entry, Kind
from unpacker.tree import Directory, Symlink, Tree

_LINKS = 40
_STEPS = 4096
"""Symbolic links, and components of their targets, that are followed to one place; then it counts as not to be had."""
_NAME = 255
_PATH = 4096


class Addition(NamedTuple):
    """Something that a root shall have: an entry, and its bytes if that is a file."""

    entry: Entry
    data: bytes = b""


def directory(path: str, *, mode: int = 0o755) -> Addition:
    return Addition(Entry(path, Kind.DIRECTORY, mode))


def file(path: str, data: bytes, *, mode: int = 0o644) -> Addition:
    return Addition(Entry(path, Kind.FILE, mode, size=len(data)), data)


def symlink(path: str, target: str) -> Addition:
    return Addition(Entry(path, Kind.SYMLINK, 0o777, target=target))


def add(tree: Tree, entries: Sequence[Entry]) -> Tree:
    """The tree with those of the entries that it lacks, and the directories on the way to them.

    Symbolic links on the way are followed as in a container, but not out of the root. So is one in the place of what
    is there to be mounted on, a directory or an empty file: a dangling `home -> var/home` gets its `var/home`. What is
    in the way stays, and the entry is left out. Of two entries for one place the first counts.
    """
    lacking: dict[str, Entry] = {}
    for entry in entries:
        for part in _lacking(tree.root, entry):
            known = lacking.setdefault(part.path, part)
            if known.kind is not Kind.DIRECTORY:
                break  # nothing can be below it
    return apply(tree, Changeset(diff_id="", entries=tuple(lacking.values()))) if lacking else tree


def _lacking(root: Directory, entry: Entry) -> list[Entry]:
    """The entry where its path really leads, after the directories that are missing on the way; empty if there is
    something already, or nothing can be."""
    trail: list[str] = []
    directories = [root]
    names = entry.path.split("/")[::-1]
    is_mount_point = entry.kind is Kind.DIRECTORY or (entry.kind is Kind.FILE and not entry.size)
    links = steps = 0
    while names:
        name = names.pop()
        steps += 1
        if steps > _STEPS:
            return []
        if not name or name == ".":
            continue
        if name == "..":
            if not trail:
                return []
            trail.pop()
            del directories[len(trail) + 1 :]
            continue
        node = directories[-1].children.get(name) if len(directories) > len(trail) else None
        if type(node) is Directory:
            directories.append(node)
        elif type(node) is Symlink and (names or is_mount_point) and links < _LINKS:
            links += 1
            if node.target.startswith("/"):
                trail, directories = [], [root]
            names.extend(node.target.split("/")[::-1])
            continue
        elif node is not None:
            return []
        trail.append(name)
    if len(directories) > len(trail) or not all(map(_can_be_name, trail)) or len(_bytes("/".join(trail))) >= _PATH:
        return []
    ways = ("/".join(trail[:depth]) for depth in range(len(directories), len(trail)))
    made = [Entry(way, Kind.DIRECTORY, 0o755, entry.uid, entry.gid, entry.mtime_ns) for way in ways]
    return [*made, entry._replace(path="/".join(trail))]


def _can_be_name(name: str) -> bool:
    return len(_bytes(name)) <= _NAME and "\0" not in name


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")

"""What can be told of a tree, the same for one on disk, one that a client shows, and one in memory: to compare them."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from typing import NamedTuple

from unpacker.changeset import Kind
from unpacker.tree import File, Special, Symlink, Tree, walk

_PIECE = 1 << 20
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_KINDS = {
    stat.S_IFREG: Kind.FILE,
    stat.S_IFDIR: Kind.DIRECTORY,
    stat.S_IFLNK: Kind.SYMLINK,
    stat.S_IFIFO: Kind.FIFO,
    stat.S_IFCHR: Kind.CHARACTER,
    stat.S_IFBLK: Kind.BLOCK,
}


class Facts(NamedTuple):
    """One name: everything but inode numbers, link counts, and the other times."""

    kind: Kind
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    size: int
    content: str
    """The SHA-256 of a file, the target of a symlink, the numbers of a device."""
    xattrs: tuple[tuple[str, bytes], ...]


def on_disk(root: str, *, leave_out: frozenset[str] = frozenset()) -> dict[str, Facts]:
    """By path below `root`, "" being itself. Names to leave out are left out wherever they are, with what is in them.

    One descriptor is open at a time, and no path is ever used as a whole: trees may be deeper than either allows.
    """
    fd = os.open(root, _DIRECTORY)
    try:
        found = {"": _of(os.fstat(fd), "", f"/proc/self/fd/{fd}")}
        open_directories = [("", _names(fd, leave_out))]
        while open_directories:
            prefix, names = open_directories[-1]
            if not names:
                open_directories.pop()
                if open_directories:
                    fd = _go(fd, "..")
                continue
            name = names.pop()
            found[prefix + name] = facts = _entry(fd, name)
            if facts.kind is Kind.DIRECTORY:
                fd = _go(fd, name)
                open_directories.append((f"{prefix}{name}/", _names(fd, leave_out)))
    finally:
        os.close(fd)
    return found


def _names(fd: int, leave_out: frozenset[str]) -> list[str]:
    return sorted(set(os.listdir(fd)) - leave_out, reverse=True)


def _go(fd: int, name: str) -> int:
    there = os.open(name, _DIRECTORY, dir_fd=fd)
    os.close(fd)
    return there


def _entry(fd: int, name: str) -> Facts:
    own = os.lstat(name, dir_fd=fd)
    content = ""
    match _KINDS[stat.S_IFMT(own.st_mode)]:
        case Kind.SYMLINK:
            content = os.readlink(name, dir_fd=fd)
        case Kind.FILE:
            content = _digest(os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=fd))
        case Kind.CHARACTER | Kind.BLOCK:
            content = f"{os.major(own.st_rdev)}:{os.minor(own.st_rdev)}"
    return _of(own, content, f"/proc/self/fd/{fd}/{name}")


def _of(own: os.stat_result, content: str, where: str) -> Facts:
    kind = _KINDS[stat.S_IFMT(own.st_mode)]
    xattrs = []
    # The descriptor's own link leads to a directory; of everything else the name itself is asked.
    through = where.count("/") == 4
    for name in sorted(os.listxattr(where, follow_symlinks=through)):
        if name.startswith(("user.", "trusted.overlay.")):
            xattrs.append((name, os.getxattr(where, name, follow_symlinks=through)))
    size = own.st_size if kind is Kind.FILE else 0
    return Facts(kind, stat.S_IMODE(own.st_mode), own.st_uid, own.st_gid, own.st_mtime_ns, size, content, tuple(xattrs))


def _digest(fd: int) -> str:
    hasher = hashlib.sha256()
    with open(fd, "rb", buffering=0) as file:
        while piece := file.read(_PIECE):
            hasher.update(piece)
    return hasher.hexdigest()


def in_memory(tree: Tree, digest: Callable[[File], str]) -> dict[str, Facts]:
    """The same of a tree of ours; `digest` says what the SHA-256 of a file's contents is."""
    found = {}
    for path, node in walk(tree):
        kind, size, content = Kind.DIRECTORY, 0, ""
        if isinstance(node, File):
            kind, size, content = Kind.FILE, node.size, digest(node)
        elif isinstance(node, Symlink):
            kind, content = Kind.SYMLINK, node.target
        elif isinstance(node, Special):
            kind = node.kind
            if kind is not Kind.FIFO:
                content = f"{node.device[0]}:{node.device[1]}"
        facts = Facts(kind, node.mode, node.uid, node.gid, node.mtime_ns, size, content, tuple(sorted(node.xattrs)))
        found[path] = facts
    return found


def differences(found: dict[str, Facts], wanted: dict[str, Facts]) -> list[str]:
    """What is not the same, readable where two trees of thousands of names are not."""
    return [
        f"{path!a}: {found.get(path)!a}, and should be {wanted.get(path)!a}"
        for path in sorted(found.keys() | wanted.keys())
        if found.get(path) != wanted.get(path)
    ]

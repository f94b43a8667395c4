"""What stands in a directory of this host, whoever put it there. Follows no symlink: what is below one is not there."""

from __future__ import annotations

import errno
import os
import posixpath
import stat
from collections.abc import Callable
from contextlib import ExitStack
from typing import TypeVar

from unpacker.changeset import Kind
from unpacker.errors import PublishError
from unpacker.publish import posix

T = TypeVar("T")

_KINDS = {
    stat.S_IFREG: Kind.FILE,
    stat.S_IFDIR: Kind.DIRECTORY,
    stat.S_IFLNK: Kind.SYMLINK,
    stat.S_IFCHR: Kind.CHARACTER,
    stat.S_IFBLK: Kind.BLOCK,
    stat.S_IFIFO: Kind.FIFO,
}
_NOT_THERE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG})


class DirectoryView:
    """The View of a directory, or of a mounted repository."""

    def __init__(self, root: str) -> None:
        self._root = root

    def kind(self, path: str) -> Kind | None:
        """What stands at a path; None if nothing does."""
        return self._look(path, _kind)

    def link(self, path: str) -> str | None:
        """Where the symlink at a path leads to, as written; None if there is none."""

        def target(name: str, fd: int) -> str | None:
            return os.readlink(name, dir_fd=fd) if _kind(name, fd) is Kind.SYMLINK else None

        return self._look(path, target)

    def read(self, path: str, limit: int) -> bytes | None:
        """The bytes of the file at a path; None if there is none. PublishError if they are more than `limit`."""

        def data(name: str, fd: int) -> bytes | None:
            if _kind(name, fd) is not Kind.FILE:
                return None
            with open(os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd), "rb") as file:
                return file.read(limit + 1)

        found = self._look(path, data)
        return None if found is None else bounded(found, limit, path)

    def _look(self, path: str, at: Callable[[str, int], T | None]) -> T | None:
        """What `at` finds under a name in an open directory; None where not even the directory is there."""
        directory, name = posixpath.split(path)
        try:
            with ExitStack() as held:
                root = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                held.callback(os.close, root)
                fd = posix.open_directory(directory, root)
                held.callback(os.close, fd)
                return at(name, fd)
        except OSError as error:
            # Everything else that can go wrong says nothing about what is there.
            if error.errno not in _NOT_THERE:
                raise posix.failure(error, f"reading {path} in {self._root}") from error
        return None


def _kind(name: str, fd: int) -> Kind | None:
    return _KINDS.get(stat.S_IFMT(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode))


def bounded(data: bytes, limit: int, path: str) -> bytes:
    """These bytes, unless they are more than a note may have."""
    if len(data) > limit:
        raise PublishError(f"{path} has more than {limit:,} bytes, which no note of a publishing tool has: look at it")
    return data

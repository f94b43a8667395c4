"""What stands in a directory of this host, whoever put it there. Follows no symlink: what is below one is not there."""

from __future__ import annotations

import errno
import os
import posixpath
import stat
from contextlib import ExitStack

from unpacker.changeset import Kind
from unpacker.errors import PublishError
from unpacker.publish import posix

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
        with ExitStack() as held:
            at = self._parent(path, held)
            if at is None:
                return None
            try:
                own = os.stat(at[1], dir_fd=at[0], follow_symlinks=False)
            except OSError as error:
                self._raise_unless_absent(error, path)
                return None
        return _KINDS.get(stat.S_IFMT(own.st_mode))

    def link(self, path: str) -> str | None:
        """Where the symlink at a path leads to, as written; None if there is none."""
        if self.kind(path) is not Kind.SYMLINK:
            return None
        with ExitStack() as held:
            at = self._parent(path, held)
            if at is None:
                return None
            try:
                return os.readlink(at[1], dir_fd=at[0])
            except OSError as error:
                self._raise_unless_absent(error, path)
                return None

    def read(self, path: str, limit: int) -> bytes | None:
        """The bytes of the file at a path; None if there is none. PublishError if they are more than `limit`."""
        if self.kind(path) is not Kind.FILE:
            return None
        with ExitStack() as held:
            at = self._parent(path, held)
            if at is None:
                return None
            try:
                fd = os.open(at[1], os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at[0])
                with open(fd, "rb") as file:
                    return bounded(file.read(limit + 1), limit, path)
            except OSError as error:
                self._raise_unless_absent(error, path)
                return None

    def _parent(self, path: str, held: ExitStack) -> tuple[int, str] | None:
        directory, name = posixpath.split(path)
        try:
            root = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            held.callback(os.close, root)
            fd = posix.open_directory(directory, root)
            held.callback(os.close, fd)
        except OSError as error:
            self._raise_unless_absent(error, path)
            return None
        return fd, name

    def _raise_unless_absent(self, error: OSError, path: str) -> None:
        # Everything else that can go wrong says nothing about what is there.
        if error.errno not in _NOT_THERE:
            raise posix.failure(error, f"reading {path} in {self._root}") from error


def bounded(data: bytes, limit: int, path: str) -> bytes:
    """These bytes, unless they are more than a note may have."""
    if len(data) > limit:
        raise PublishError(f"{path} has more than {limit:,} bytes, which no note of a publishing tool has: look at it")
    return data

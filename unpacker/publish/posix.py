"""Trees on a POSIX file system: written and removed relative to directory descriptors, no symlink ever followed.

Names come from images, and an image may be hostile: each step opens one component below a descriptor that is already
held, so that no name can lead out of the tree. Nothing recurses; depth is bounded by the path limit only.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import NamedTuple

from unpacker.changeset import Kind, Xattrs
from unpacker.digest import Stream
from unpacker.errors import IntegrityError, NoRoom, PublishError
from unpacker.tree import Directory, File, Node, Special, Symlink, Tree

PIECE = 1 << 20
"""Bytes handled at once of what is too large to be held whole; a piece of zeros only becomes a hole."""

DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
CREATE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

_ZEROS = bytes(PIECE)
_KEPT_DESCRIPTORS = 32
_SPARE_BYTES = 64 << 20
_SPARE_INODES = 1000
_TIME_LIMIT = (1 << 63) - 1
_ADVICE = {
    errno.ENOSPC: "free space or inodes (unpacker gc may help) or enlarge the file system, then run again",
    errno.EDQUOT: "the quota is exhausted: raise it or free space (unpacker gc may help), then run again",
    errno.EIO: "the disk failed: see the kernel's log, repair the file system, then run again",
    errno.EROFS: "mount the file system writable, then run again",
    errno.EACCES: "run as the user who owns the target, or give this user its directories",
    errno.EPERM: "run as the user who owns the target, or give this user its directories",
    errno.ELOOP: "a symlink stands where a directory belongs, and is not followed: look at it, and move it away",
    errno.ENOTDIR: "a file or symlink stands where a directory belongs: look at it, and move it away",
    errno.ENAMETOOLONG: "this file system takes shorter names only",
}

Owner = tuple[int, int]
"""uid and gid."""

_libc = ctypes.CDLL(None, use_errno=True)


def failure(error: OSError, doing: str) -> PublishError:
    """The PublishError for a system call that failed while `doing`: what the kernel said, and what to do now."""
    name = f" ({os.fspath(error.filename)!r})" if isinstance(error.filename, str | bytes) else ""
    advice = _ADVICE.get(error.errno or 0)
    kind = NoRoom if error.errno in (errno.ENOSPC, errno.EDQUOT) else PublishError
    return kind(f"{doing}: {error.strerror or error}{name}{'; ' + advice if advice else ''}")


def keeps_owners() -> bool:
    """Whether this process may give files away: only root can publish with the image's owners."""
    return os.geteuid() == 0


def born_owner(dir_fd: int) -> Owner | None:
    """The owner that new files get in a directory just made by this process; None if they cannot be given another.

    Asked of the directory itself, because set-gid parents and mount options have a say in the group.
    """
    own = os.fstat(dir_fd)
    return (own.st_uid, own.st_gid) if keeps_owners() else None


def syncfs(fd: int) -> None:
    """Makes everything written so far to the file system of `fd` durable.

    Write-back errors are reported to descriptors that were open when they happened, so `fd` is best opened before
    the writing starts.
    """
    if _libc.syncfs(ctypes.c_int(fd)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def check_room(path: str, size: int, inodes: int) -> None:
    """NoRoom if the file system of `path` cannot take this many bytes and inodes more, with some to
    spare."""
    place = path
    while not os.path.exists(place):
        place = os.path.dirname(place)
    try:
        now = os.statvfs(place)
    except OSError as error:
        raise failure(error, f"asking for the free space of {path}") from error
    free = now.f_bavail * now.f_frsize
    if free < size + _SPARE_BYTES:
        raise NoRoom(
            f"no room in {path}: {(size + _SPARE_BYTES) / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free; "
            "free space (unpacker gc may help) or enlarge the file system"
        )
    # Some file systems (btrfs) make inodes as they need them, and say that they have none.
    if now.f_files and now.f_favail < inodes + _SPARE_INODES:
        raise NoRoom(
            f"no room in {path}: {inodes + _SPARE_INODES:,} inodes needed, {now.f_favail:,} free; "
            "remove files (unpacker gc may help) or make a file system with more inodes"
        )


def open_directory(path: str, dir_fd: int, *, create: bool = False) -> int:
    """A descriptor of the directory `path` (relative, may be "") below `dir_fd`; no component may be a symlink.

    With `create`, what is missing is made, open to all readers whatever the umask.
    """
    fd = os.open(".", DIRECTORY_FLAGS, dir_fd=dir_fd)
    for name in path.split("/") if path else ():
        try:
            below = _open_or_make(name, fd) if create else os.open(name, DIRECTORY_FLAGS, dir_fd=fd)
        finally:
            os.close(fd)
        fd = below
    return fd


def _open_or_make(name: str, dir_fd: int) -> int:
    try:
        return os.open(name, DIRECTORY_FLAGS, dir_fd=dir_fd)
    except FileNotFoundError:
        pass
    try:
        os.mkdir(name, 0o755, dir_fd=dir_fd)
    except FileExistsError:
        # Another process made it meanwhile.
        return os.open(name, DIRECTORY_FLAGS, dir_fd=dir_fd)
    fd = os.open(name, DIRECTORY_FLAGS, dir_fd=dir_fd)
    os.fchmod(fd, 0o755)
    return fd


class Descent:
    """A current directory that moves down and up a tree by descriptors, holding only a few of them open.

    Takes over the descriptor it starts from. Directories must be searchable for the way up out of deep trees.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._parents: list[int] = []

    def down(self, name: str) -> None:
        """Enters the directory `name`; a symlink or file of that name is an OSError."""
        fd = os.open(name, DIRECTORY_FLAGS, dir_fd=self.fd)
        parents = self._parents
        parents.append(self.fd)
        self.fd = fd
        far = len(parents) - _KEPT_DESCRIPTORS - 1
        if far >= 0 and parents[far] >= 0:
            os.close(parents[far])
            parents[far] = -1

    def up(self) -> int:
        """Returns to the parent; gives the descriptor of the directory left, which the caller closes."""
        parent = self._parents.pop()
        if parent < 0:
            parent = os.open("..", DIRECTORY_FLAGS, dir_fd=self.fd)
        left, self.fd = self.fd, parent
        return left

    def __enter__(self) -> Descent:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for fd in (self.fd, *self._parents):
            if fd >= 0:
                os.close(fd)


def set_metadata(fd: int, mode: int, uid: int, gid: int, mtime_ns: int, xattrs: Xattrs, born: Owner | None) -> None:
    """Gives an open file or directory that was `born` with that owner its final owner, xattrs, mode and mtime."""
    if born is not None and born != (uid, gid):
        os.fchown(fd, uid, gid)
    for name, value in xattrs:
        # Before the mode: who may not write to a file may not give it user.* attributes either (xattr(7)).
        try:
            os.setxattr(fd, name, value)
        except OSError as error:
            raise PublishError(
                f"the target's file system cannot store the extended attribute {name} of {len(value)} bytes: "
                f"{error.strerror}; use one that can (ext4, xfs, tmpfs of Linux 6.6)"
            ) from error
    os.fchmod(fd, mode)
    # Beyond 64 bits the call itself fails; what the file system cannot express it clips by itself.
    time = max(-_TIME_LIMIT, min(mtime_ns, _TIME_LIMIT))
    os.utime(fd, ns=(time, time))


def user_xattrs(fd: int) -> Xattrs:
    """The `user.*` attributes of an open file or directory, sorted by name; none where the file system has none."""
    try:
        names = os.listxattr(fd)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return ()
        raise
    return tuple((name, os.getxattr(fd, name)) for name in sorted(names) if name.startswith("user."))


def write_all(fd: int, data: bytes | bytearray) -> None:
    """Writes all of `data`: a disk that fills up takes a part first and says so with the next call."""
    written = os.write(fd, data)
    while written < len(data):
        written += os.write(fd, memoryview(data)[written:])


def write_pieces(fd: int, pieces: Iterator[bytes]) -> None:
    """Writes the pieces one after the other; a piece of zeros only becomes a hole."""
    size = 0
    for piece in pieces:
        length = len(piece)
        if piece == (_ZEROS if length == PIECE else bytes(length)):
            os.lseek(fd, length, os.SEEK_CUR)
        else:
            write_all(fd, piece)
        size += length
    os.ftruncate(fd, size)


def pieces(stream: Stream, size: int, taken: int = 0) -> Iterator[bytes]:
    """Exactly `size` bytes of a stream, those `taken` from it before not again, in pieces; IntegrityError if it ends
    before."""
    left = size - taken
    while left:
        piece = stream.read(min(left, PIECE))
        if not piece:
            raise IntegrityError(f"a file of {size} bytes ended after {size - left}")
        left -= len(piece)
        yield piece


def write_file(name: str, dir_fd: int, data: bytes, mode: int = 0o644) -> None:
    """Makes the new file `name` with these bytes and exactly this mode."""
    fd = os.open(name, CREATE_FLAGS, 0o600, dir_fd=dir_fd)
    try:
        write_all(fd, data)
        os.fchmod(fd, mode)
    finally:
        os.close(fd)


def write_tree(tree: Tree, name: str, dir_fd: int, link: Callable[[File, str, int], None]) -> tuple[int, int]:
    """Writes a prepared tree as the new directory `name`; gives the number of its entries and the size of its files.

    `link(file, name, dir_fd)` makes the name of a file that is not empty. Directories get their metadata after their
    children, so that their mtimes hold. OSError (or PublishError) leaves a part behind: `remove_tree` takes it away.
    """
    root = tree.root
    os.mkdir(name, 0o700, dir_fd=dir_fd)
    with Descent(os.open(name, DIRECTORY_FLAGS, dir_fd=dir_fd)) as at:
        born = born_owner(at.fd)
        entries, size, below = _write_children(root, at.fd, link, born)
        stack = [(root, iter(below))]
        while stack:
            directory, rest = stack[-1]
            child = next(rest, None)
            if child is not None:
                os.mkdir(child[0], 0o700, dir_fd=at.fd)
                at.down(child[0])
                count, length, below = _write_children(child[1], at.fd, link, born)
                entries, size = entries + count, size + length
                stack.append((child[1], iter(below)))
                continue
            stack.pop()
            left = at.up() if stack else os.dup(at.fd)
            try:
                set_metadata(left, *directory[:5], born)
            finally:
                os.close(left)
    return entries, size


def _write_children(
    directory: Directory, fd: int, link: Callable[[File, str, int], None], born: Owner | None
) -> tuple[int, int, list[tuple[str, Directory]]]:
    # Everything but the directories, which are given back; this loop is the cost of an image of known layers.
    size = 0
    below: list[tuple[str, Directory]] = []
    children: dict[str, Node] = directory.children
    for name, node in children.items():
        if type(node) is File:
            if node.size:
                link(node, name, fd)
                size += node.size
            else:
                _write_empty(node, name, fd, born)
        elif isinstance(node, Directory):
            below.append((name, node))
        elif isinstance(node, Symlink):
            os.symlink(node.target, name, dir_fd=fd)
            _set_link_metadata(node, name, fd, born)
        elif isinstance(node, Special) and node.kind is Kind.FIFO:
            os.mkfifo(name, 0o600, dir_fd=fd)
            os.chmod(name, node.mode, dir_fd=fd)
            _set_link_metadata(node, name, fd, born)
        else:
            raise PublishError(f"a published tree has no device nodes: {name!r}")
    return len(children), size, below


def _write_empty(node: File, name: str, dir_fd: int, born: Owner | None) -> None:
    fd = os.open(name, CREATE_FLAGS, 0o600, dir_fd=dir_fd)
    try:
        set_metadata(fd, node.mode, node.uid, node.gid, node.mtime_ns, node.xattrs, born)
    finally:
        os.close(fd)


def _set_link_metadata(node: Node, name: str, dir_fd: int, born: Owner | None) -> None:
    if born is not None and born != (node.uid, node.gid):
        os.chown(name, node.uid, node.gid, dir_fd=dir_fd, follow_symlinks=False)
    time = max(-_TIME_LIMIT, min(node.mtime_ns, _TIME_LIMIT))
    os.utime(name, ns=(time, time), dir_fd=dir_fd, follow_symlinks=False)


class Found(NamedTuple):
    """One name on disk. `fd` is the directory it is in (or it is itself), open while this one is current; `problem`
    says what could not be read: its attributes, if `own` is None, else what is below."""

    path: str
    own: os.stat_result | None
    fd: int
    problem: str = ""


def walk(at: Descent) -> Iterator[Found]:
    """Everything below and with the directory where `at` stands: a directory before what is in it, names by their
    bytes, as `tree.walk` has it."""
    yield Found("", os.fstat(at.fd), at.fd)
    stack = [("", iter(sorted(os.listdir(at.fd), key=os.fsencode)))]
    while stack:
        prefix, names = stack[-1]
        name = next(names, None)
        if name is None:
            stack.pop()
            if stack:
                os.close(at.up())
            continue
        path = prefix + name
        try:
            own = os.stat(name, dir_fd=at.fd, follow_symlinks=False)
        except PermissionError:
            yield Found(path, None, at.fd, "cannot be read")
            continue
        if not stat.S_ISDIR(own.st_mode):
            yield Found(path, own, at.fd)
            continue
        try:
            at.down(name)
        except PermissionError:
            yield Found(path, own, at.fd, "what is below cannot be read")
            continue
        yield Found(path, own, at.fd)
        stack.append((f"{path}/", iter(sorted(os.listdir(at.fd), key=os.fsencode))))


def remove_tree(name: str, dir_fd: int) -> None:
    """Removes the file or directory `name` with all below it; directories without write permission too.

    What vanishes meanwhile is as good as removed. Never follows a symlink.
    """
    try:
        os.unlink(name, dir_fd=dir_fd)
        return
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno not in (errno.EISDIR, errno.EPERM, errno.EACCES):
            raise
    if not stat.S_ISDIR(os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_mode):
        # A file that cannot be unlinked: say why.
        os.unlink(name, dir_fd=dir_fd)
        return
    _make_removable(name, dir_fd)
    with Descent(os.open(name, DIRECTORY_FLAGS, dir_fd=dir_fd)) as at:
        stack = [(name, _remove_children(at.fd))]
        while stack:
            own, below = stack[-1]
            if below:
                child = below.pop()
                _make_removable(child, at.fd)
                at.down(child)
                stack.append((child, _remove_children(at.fd)))
                continue
            stack.pop()
            if stack:
                os.close(at.up())
                os.rmdir(own, dir_fd=at.fd)
    os.rmdir(name, dir_fd=dir_fd)


def _remove_children(fd: int) -> list[str]:
    # Unlinks all but the directories, which are given back.
    below = []
    with os.scandir(fd) as found:
        for entry in found:
            if entry.is_dir(follow_symlinks=False):
                below.append(entry.name)
            else:
                os.unlink(entry.name, dir_fd=fd)
    return below


def _make_removable(name: str, dir_fd: int) -> None:
    # Root needs no permission; for all others a directory must be readable, writable and searchable to be emptied.
    if not keeps_owners():
        os.chmod(name, 0o700, dir_fd=dir_fd)

"""The contents of a directory target: one inode for the same bytes and metadata, linked into every root that has it.

A token is `<sha256 of the bytes>.<hash of mode, owner, mtime, xattrs>`. The pool's files carry their final metadata,
so that composing a root is making links. Empty files are not pooled: they are metadata only.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b, file_digest, sha256

from unpacker.changeset import Entry, Xattrs
from unpacker.digest import Stream
from unpacker.errors import PublishError
from unpacker.publish import posix
from unpacker.publish.shards import Shards, present
from unpacker.tree import File

EMPTY = sha256(b"").hexdigest()
SMALL = 1 << 20
"""Up to this size a file is read whole and hashed before anything is written; above, hashed while written."""

_TOKEN = re.compile(r"[0-9a-f]{64}\.[0-9a-f]{16}")
_WRITE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
# What link(2) answers where a file system (or a mount, or a policy) has no hard links for us.
_NO_LINKS = frozenset({errno.EXDEV, errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.ENOSYS})


def content_token(digest: str, mode: int, uid: int, gid: int, mtime_ns: int, xattrs: Xattrs) -> str:
    """The token of bytes (by the hex of their sha256) under this metadata."""
    text = b"%d %d %d %d" % (mode, uid, gid, mtime_ns)
    for name, value in xattrs:
        key = os.fsencode(name)
        text += b" %d:%b%d:%b" % (len(key), key, len(value), value)
    return f"{digest}.{blake2b(text, digest_size=8).hexdigest()}"


def pool_path(token: str) -> str:
    """Where the pool has a token, below its directory. Tokens come back from caches, so their form is checked."""
    if not _TOKEN.fullmatch(token):
        raise PublishError(f"not a token of this target: {token!r}; delete the cache of read layers, then run again")
    return f"{token[:2]}/{token[2:]}"


@dataclass(frozen=True, slots=True)
class PoolLocator:
    """Names the pool of a directory target across processes."""

    root: str

    def open(self) -> ContentPool:
        return ContentPool(self.root)


class ContentPool:
    """The ContentStore of the directory target at `root`. Holds nothing open between calls, so it can be had anew
    at any time, in any thread or process. Writing needs the target's lock, held by this or the starting process."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._pool = f"{root}/.unpacker/pool"
        self._scratch = f"{root}/.unpacker/txn"

    @property
    def locator(self) -> PoolLocator:
        return PoolLocator(self._root)

    @property
    def wants_threads(self) -> bool:
        return False  # Making files is most of the work, and threads would make them one after the other.

    @contextmanager
    def batch(self) -> Iterator[PoolBatch]:
        """Writes under temporary names; leaving cleanly is one sync, then all renames into the pool."""
        name = f"batch-{os.getpid()}-{secrets.token_hex(6)}"
        try:
            os.makedirs(self._pool, 0o700, exist_ok=True)
            os.makedirs(self._scratch, 0o700, exist_ok=True)
            os.mkdir(f"{self._scratch}/{name}", 0o700)
            pool_fd = os.open(self._pool, posix.DIRECTORY_FLAGS)
            scratch_fd = os.open(f"{self._scratch}/{name}", posix.DIRECTORY_FLAGS)
        except OSError as error:
            raise posix.failure(error, f"opening the pool of {self._root}") from error
        batch = PoolBatch(self._root, pool_fd, scratch_fd)
        try:
            yield batch
            batch.settle()
        finally:
            batch.forget()
            os.close(scratch_fd)
            os.close(pool_fd)
            try:
                os.rmdir(f"{self._scratch}/{name}")
            except OSError:
                pass  # An orphan is harmless; the next holder of the lock clears it away.

    @contextmanager
    def open(self, token: str) -> Iterator[Stream]:
        """The bytes of a token."""
        if token.startswith(EMPTY):
            with open(os.devnull, "rb") as nothing:
                yield nothing
            return
        try:
            fd = os.open(f"{self._pool}/{pool_path(token)}", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise posix.failure(error, f"reading content {token} of {self._root}") from error
        with open(fd, "rb") as stream:
            yield stream

    def missing(self, tokens: Collection[str], *, check: bool = False) -> set[str]:
        """Which of these the pool does not hold; empty files need none. With `check` bytes and metadata are compared
        with the token; what differs is thrown out of the pool (roots that have it keep it), and counts as missing."""
        wanted = [token for token in tokens if not token.startswith(EMPTY)]
        try:
            pool_fd = os.open(self._pool, posix.DIRECTORY_FLAGS)
        except FileNotFoundError:
            return set(wanted)
        except OSError as error:
            raise posix.failure(error, f"opening the pool of {self._root}") from error
        try:
            if check:
                return {token for token in wanted if not self._is_sound(token, pool_fd)}
            # What cannot be told counts as missing: that costs reading a layer again, nothing else.
            there = present((token for token in wanted if pool_path(token)), pool_fd)
            return {token for token in wanted if token not in there}
        except OSError as error:
            raise posix.failure(error, f"checking the pool of {self._root}") from error
        finally:
            os.close(pool_fd)

    @staticmethod
    def _is_sound(token: str, pool_fd: int) -> bool:
        path = pool_path(token)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=pool_fd)
        except FileNotFoundError:
            return False
        try:
            with open(fd, "rb", buffering=0) as file:
                digest = file_digest(file, "sha256").hexdigest()
                own = os.fstat(fd)
                found = content_token(
                    digest,
                    stat.S_IMODE(own.st_mode),
                    own.st_uid,
                    own.st_gid,
                    own.st_mtime_ns,
                    posix.user_xattrs(fd),
                )
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            found = ""  # A bad block: as good as another content.
        if found != token:
            os.unlink(path, dir_fd=pool_fd)
        return found == token


class PoolBatch:
    """One scope of writing into the pool; for one thread at a time."""

    def __init__(self, root: str, pool_fd: int, scratch_fd: int) -> None:
        self._root = root
        self._pool_fd = pool_fd
        self._scratch_fd = scratch_fd
        self._born = posix.born_owner(scratch_fd)
        self._shards = Shards(pool_fd)
        self._fresh: dict[str, str] = {}
        self._count = 0
        self._written = 0

    @property
    def written(self) -> int:
        return self._written

    def put(self, stream: Stream, size: int, hint: Entry) -> str:
        """Takes exactly `size` bytes and gives their token; writes only what the pool does not have."""
        if size > SMALL:
            return self._put_large(stream, size, hint)
        if size == 0:
            return content_token(EMPTY, hint.mode, hint.uid, hint.gid, hint.mtime_ns, hint.xattrs)
        data = stream.read(size)
        if len(data) != size:
            data += b"".join(posix.pieces(stream, size, len(data)))
        digest = sha256(data).hexdigest()
        token = content_token(digest, hint.mode, hint.uid, hint.gid, hint.mtime_ns, hint.xattrs)
        if self._has(token, size, hint):
            return token
        try:
            fd, name = self._create()
            try:
                posix.write_all(fd, data)
                posix.set_metadata(fd, hint.mode, hint.uid, hint.gid, hint.mtime_ns, hint.xattrs, self._born)
            finally:
                os.close(fd)
        except OSError as error:
            raise self._failure(error, hint) from error
        self._fresh[token] = name
        self._written += size
        return token

    def _put_large(self, stream: Stream, size: int, hint: Entry) -> str:
        hasher = sha256()

        def hashed() -> Iterator[bytes]:
            for piece in posix.pieces(stream, size):
                hasher.update(piece)
                yield piece

        try:
            fd, name = self._create()
            try:
                posix.write_pieces(fd, hashed())
                posix.set_metadata(fd, hint.mode, hint.uid, hint.gid, hint.mtime_ns, hint.xattrs, self._born)
            except BaseException:
                os.unlink(name, dir_fd=self._scratch_fd)
                raise
            finally:
                os.close(fd)
            self._written += size
            token = content_token(hasher.hexdigest(), hint.mode, hint.uid, hint.gid, hint.mtime_ns, hint.xattrs)
            if self._has(token, size, hint):
                os.unlink(name, dir_fd=self._scratch_fd)
            else:
                self._fresh[token] = name
        except OSError as error:
            raise self._failure(error, hint) from error
        return token

    def settle(self) -> None:
        """Makes all tokens of this batch durable and final: one sync, then the renames."""
        if not self._fresh:
            return
        try:
            posix.syncfs(self._scratch_fd)
            now = self._shards.again()
            for token in list(self._fresh):
                path = pool_path(token)
                if self._shards.remembers(path) and now.may_hold(path) and self._is_stored(self._fresh[token], path):
                    # Another layer was faster, and roots may have its inode already.
                    os.unlink(self._fresh[token], dir_fd=self._scratch_fd)
                else:
                    rename_into_pool(self._fresh[token], self._scratch_fd, token, self._pool_fd)
                del self._fresh[token]
        except OSError as error:
            raise posix.failure(error, f"storing contents in {self._root}") from error

    def _is_stored(self, name: str, path: str) -> bool:
        """Whether the pool's file looks as the new one of the same token does."""
        new = os.stat(name, dir_fd=self._scratch_fd, follow_symlinks=False)
        try:
            own = os.stat(path, dir_fd=self._pool_fd, follow_symlinks=False)
        except OSError:
            return False
        return (own.st_size, own.st_mode, own.st_mtime_ns) == (new.st_size, new.st_mode, new.st_mtime_ns)

    def forget(self) -> None:
        """Removes what is left under temporary names."""
        try:
            with os.scandir(self._scratch_fd) as found:
                names = [entry.name for entry in found]
            for name in names:
                os.unlink(name, dir_fd=self._scratch_fd)
        except OSError:
            pass  # An orphan is harmless; the next holder of the lock clears it away.

    def _has(self, token: str, size: int, hint: Entry) -> bool:
        if token in self._fresh:
            return True
        path = f"{token[:2]}/{token[2:]}"
        if not self._shards.may_hold(path):
            return False
        try:
            own = os.stat(path, dir_fd=self._pool_fd, follow_symlinks=False)
        except OSError:
            return False  # What cannot be told is written again, which is safe.
        # Somebody who wrote into a published file wrote into the pool. Where that shows, the content gets a new inode.
        # (Whole seconds, because not every file system keeps more.)
        return (
            own.st_size == size
            and own.st_mode & 0o7777 == hint.mode
            and own.st_mtime_ns // 1_000_000_000 == hint.mtime_ns // 1_000_000_000
        )

    def _create(self) -> tuple[int, str]:
        name = str(self._count)
        self._count += 1
        return os.open(name, _WRITE, 0o600, dir_fd=self._scratch_fd), name

    def _failure(self, error: OSError, hint: Entry) -> PublishError:
        error.filename = None  # A temporary name tells nobody anything.
        return posix.failure(error, f"storing {hint.path!r} in the pool of {self._root}")


class PoolLinks:
    """Makes the names of pooled files in the roots of one transaction.

    A file system allows an inode only so many names: then the content gets a new inode, which takes the pool's name
    once it is durable (`settle`). Where it allows no links at all, files are copied.
    """

    def __init__(self, root: str, pool_fd: int, scratch_fd: int) -> None:
        self._root = root
        self._pool_fd = pool_fd
        self._scratch_fd = scratch_fd
        self._renewed: dict[str, str] = {}
        self._count = 0

    def link(self, file: File, name: str, dir_fd: int) -> None:
        """Makes `name` in the directory `dir_fd` a name of this file's content."""
        token = file.token
        try:
            if token in self._renewed:
                self._link(self._renewed[token], self._scratch_fd, name, dir_fd)
            else:
                self._link(pool_path(token), self._pool_fd, name, dir_fd)
        except FileNotFoundError as error:
            raise PublishError(
                f"the pool of {self._root} does not hold content {token} of {name!r}; "
                "delete the cache of read layers, then run again"
            ) from error
        except OSError as error:
            if error.errno == errno.EMLINK:
                renewed = f"renewed-{self._count}"
                self._count += 1
                self._copy(file, renewed, self._scratch_fd)
                self._renewed[token] = renewed
                self._link(renewed, self._scratch_fd, name, dir_fd)
            elif error.errno in _NO_LINKS:
                self._copy(file, name, dir_fd)
            else:
                raise

    def settle(self) -> None:
        """Gives new inodes the pool's names. To be called after the sync that made them durable."""
        for token, name in self._renewed.items():
            rename_into_pool(name, self._scratch_fd, token, self._pool_fd)
        self._renewed.clear()

    @staticmethod
    def _link(source: str, source_fd: int, name: str, dir_fd: int) -> None:
        os.link(source, name, src_dir_fd=source_fd, dst_dir_fd=dir_fd, follow_symlinks=False)

    def _copy(self, file: File, name: str, dir_fd: int) -> None:
        source = os.open(pool_path(file.token), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._pool_fd)
        with open(source, "rb", buffering=0) as stream:
            born = posix.born_owner(dir_fd)
            fd = os.open(name, _WRITE, 0o600, dir_fd=dir_fd)
            try:
                posix.write_pieces(fd, posix.pieces(stream, file.size))
                posix.set_metadata(fd, file.mode, file.uid, file.gid, file.mtime_ns, file.xattrs, born)
            finally:
                os.close(fd)


def rename_into_pool(name: str, scratch_fd: int, token: str, pool_fd: int) -> None:
    """Gives a durable file its final name. Another process may have stored the same: either inode will do."""
    path = pool_path(token)
    try:
        os.rename(name, path, src_dir_fd=scratch_fd, dst_dir_fd=pool_fd)
    except FileNotFoundError:
        try:
            os.mkdir(path[:2], 0o700, dir_fd=pool_fd)
        except FileExistsError:
            pass
        os.rename(name, path, src_dir_fd=scratch_fd, dst_dir_fd=pool_fd)

"""The objects of a repository in a local directory: `data/xx/<rest>[suffix]`, each named by the hash of its bytes.

An object is never changed; a name that exists is an object that is complete and durable. So objects are written in
batches under temporary names in `data/txn/`, then synced once, then renamed. The modes let web servers read them.
"""

from __future__ import annotations

import errno
import itertools
import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from unpacker.cvmfs import deflation
from unpacker.cvmfs.hash import ContentHash
from unpacker.digest import Stream
from unpacker.errors import PublishError
from unpacker.publish import posix
from unpacker.publish.shards import Shards, present

CHUNK, CATALOG, HISTORY, CERTIFICATE, META_INFO = "P", "C", "H", "X", "M"
"""Suffixes of objects by what they are; a whole file has none."""

LIMIT = 1 << 30
"""The most that `read` holds in memory unless told otherwise."""

_MODE = 0o644
_DATA = "data/"
_TEMPORARY = "unpacker-"
_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC


class ObjectStore:
    """The object store of the repository in directory `root`. Holds nothing open between calls; safe from many
    threads and processes, also of other tools that write objects.

    Names are of one algorithm for what is written; objects of any can be read. PublishError for everything that fails.
    """

    def __init__(self, root: str, algorithm: str = "sha1") -> None:
        self.root = root
        self.algorithm = algorithm

    @classmethod
    def create(cls, root: str, algorithm: str = "sha1") -> ObjectStore:
        """Makes the directories that all tools expect, and the empty file. What exists stays as it is."""
        store = cls(root, algorithm)
        try:
            for name in ("", _DATA, *(f"{_DATA}{i:02x}" for i in range(256)), f"{_DATA}txn"):
                _make_directory(f"{root}/{name}")
        except OSError as error:
            raise posix.failure(error, f"making the object store of {root}") from error
        store.put(deflation.EMPTY)
        return store

    def path(self, name: ContentHash, suffix: str = "") -> str:
        """Where an object is, or would be."""
        return f"{self.root}/{name.object_path(suffix)}"

    def has(self, name: ContentHash, suffix: str = "") -> bool:
        """Whether there is such an object."""
        try:
            os.stat(self.path(name, suffix), follow_symlinks=False)
        except FileNotFoundError:
            # Also where nothing is mounted: that all objects of a repository are gone needs better proof.
            self._check_there()
            return False
        except OSError as error:
            raise self._failure(error, name, suffix) from error
        return True

    def present(self, names: Iterable[str]) -> set[str]:
        """Which of these whole files are there for sure, by the text of their hashes; `has` tells of the others."""
        try:
            fd = os.open(f"{self.root}/{_DATA}", posix.DIRECTORY_FLAGS)
        except OSError as error:
            raise posix.failure(error, f"opening the object store of {self.root}") from error
        try:
            return present(names, fd)
        finally:
            os.close(fd)

    def read(self, name: ContentHash, suffix: str = "", *, limit: int = LIMIT) -> bytes:
        """What a compressed object holds: decompressed, verified, and no more than `limit` bytes."""
        what = self._describe(name, suffix)
        with self.open(name, suffix) as stream:
            # No zlib stream is much longer than its contents.
            stored = _read(stream, limit + (limit >> 8) + 64)
        if stored is None:
            raise PublishError(f"{what} has more than the {limit} bytes that it may")
        if ContentHash.of(stored, name.algorithm) != name:
            raise self._damaged(name, suffix)
        return deflation.inflate(stored, limit, what)

    @contextmanager
    def open(self, name: ContentHash, suffix: str = "") -> Iterator[Stream]:
        """An object's bytes as they are stored, not verified."""
        try:
            fd = os.open(self.path(name, suffix), _OPEN)
        except FileNotFoundError as error:
            raise PublishError(
                f"the repository in {self.root} lacks {self._describe(name, suffix)}; if it was collected or lost, "
                "run unpacker verify to find what needs it"
            ) from error
        except OSError as error:
            raise self._failure(error, name, suffix) from error
        with open(fd, "rb", buffering=0) as file:
            yield _Reading(self, file, name, suffix)

    def stored(self, name: ContentHash, suffix: str = "") -> Iterator[bytes]:
        """An object's bytes as they are stored, in pieces. The last one is given only once all were found right."""
        with self.open(name, suffix) as stream:
            hasher = name.hasher()
            last = b""
            while piece := stream.read(deflation.PIECE):
                hasher.update(piece)
                if last:
                    yield last
                last = piece
            if hasher.result() != name:
                raise self._damaged(name, suffix)
            yield last

    def is_sound(self, name: ContentHash, suffix: str = "") -> bool:
        """Whether there is such an object and its bytes are what its name says; reads all of it."""
        try:
            fd = os.open(self.path(name, suffix), _OPEN)
        except FileNotFoundError:
            self._check_there()
            return False
        except OSError as error:
            raise self._failure(error, name, suffix) from error
        with open(fd, "rb", buffering=0) as file:
            try:
                return ContentHash.of_stream(file, name.algorithm) == name
            except OSError as error:
                if error.errno == errno.EIO:
                    return False  # A bad block: as good as other bytes.
                raise self._failure(error, name, suffix) from error

    def discard(self, name: ContentHash, suffix: str = "") -> None:
        """Removes an object; one that is not there is as good as removed."""
        try:
            os.unlink(self.path(name, suffix))
        except FileNotFoundError:
            pass
        except OSError as error:
            raise self._failure(error, name, suffix) from error

    def put(self, stored: deflation.Stored, suffix: str = "") -> ContentHash:
        """Stores one object, durable on return. For more than a few, `batch` is much faster."""
        with self.batch() as batch:
            return batch.put(stored, suffix)

    @contextmanager
    def batch(self) -> Iterator[ObjectBatch]:
        """A scope of writing: leaving it cleanly is one sync, then all renames, in the order of the `put`s; leaving
        by exception forgets them."""
        try:
            data_fd = os.open(f"{self.root}/{_DATA}", posix.DIRECTORY_FLAGS)
        except OSError as error:
            raise posix.failure(error, f"opening the object store of {self.root}") from error
        batch = ObjectBatch(self, data_fd)
        try:
            yield batch
            batch.settle()
        finally:
            batch.forget()
            os.close(data_fd)

    def sweep(self) -> None:
        """Removes what killed batches of this program left. Nobody else may be writing: call it under the
        repository's lock."""
        directory = f"{self.root}/{_DATA}txn"
        try:
            for name in os.listdir(directory):
                if name.startswith(_TEMPORARY):
                    os.unlink(f"{directory}/{name}")
        except FileNotFoundError:
            pass
        except OSError as error:
            raise posix.failure(error, f"clearing {directory}") from error

    def _check_there(self) -> None:
        if not os.path.isdir(f"{self.root}/{_DATA}"):
            raise PublishError(f"there is no repository in {self.root}: mount it, or look at the target's path")

    def _describe(self, name: ContentHash, suffix: str) -> str:
        return f"object {name.hex}{suffix} of {self.root}"

    def _damaged(self, name: ContentHash, suffix: str) -> PublishError:
        return PublishError(
            f"{self._describe(name, suffix)} is damaged: its bytes are not what its name says; "
            "run unpacker reconcile --rebuild, or restore it from a replica"
        )

    def _failure(self, error: OSError, name: ContentHash, suffix: str) -> PublishError:
        return posix.failure(error, f"reading {self._describe(name, suffix)}")


class _Reading:
    """An object's file, whose failures are PublishErrors."""

    def __init__(self, store: ObjectStore, file: Stream, name: ContentHash, suffix: str) -> None:
        self._store = store
        self._file = file
        self._name = name
        self._suffix = suffix

    def read(self, size: int, /) -> bytes:
        try:
            return self._file.read(size)
        except OSError as error:
            raise self._store._failure(error, self._name, self._suffix) from error


class ObjectBatch:
    """One scope of writing. `put` may be called from several threads at a time."""

    def __init__(self, store: ObjectStore, data_fd: int) -> None:
        self._store = store
        self._fd = data_fd
        self._prefix = f"{_TEMPORARY}{os.getpid()}-{secrets.token_hex(6)}-"
        self._count = itertools.count()
        # Final name → temporary name, both below data/. Threads meet in single operations on it only.
        self._fresh: dict[str, str] = {}
        self._shards = Shards(data_fd)
        self._is_born_public = False

    def put(self, stored: deflation.Stored, suffix: str = "") -> ContentHash:
        """Stores these bytes as they are, unless the repository has them."""
        name = ContentHash.of(stored, self._store.algorithm)
        path = name.object_path(suffix).removeprefix(_DATA)
        if self._holds(path, len(stored)):
            return name
        temporary = f"txn/{self._prefix}{next(self._count)}"
        try:
            try:
                self._write(temporary, stored)
            except FileNotFoundError:
                _make_directory("txn", dir_fd=self._fd)
                self._write(temporary, stored)
        except OSError as error:
            error.filename = None  # A temporary name tells nobody anything.
            raise posix.failure(error, f"storing an object in {self._store.root}") from error
        if self._fresh.setdefault(path, temporary) is not temporary:
            self._unlink(temporary)  # Another thread was faster.
        return name

    def holds(self, name: ContentHash, suffix: str, size: int) -> bool:
        """Whether the repository or this batch has such an object, of this size as stored."""
        return self._holds(name.object_path(suffix).removeprefix(_DATA), size)

    def _holds(self, path: str, size: int) -> bool:
        if path in self._fresh:
            return True
        if not self._shards.may_hold(path):
            return False
        try:
            own = os.stat(path, dir_fd=self._fd, follow_symlinks=False)
        except OSError:
            return False  # What cannot be told is written again, which is safe.
        # Where it shows that somebody damaged an object, it is replaced by a sound one.
        return own.st_size == size

    def _write(self, temporary: str, stored: deflation.Stored) -> None:
        fd = os.open(temporary, posix.CREATE_FLAGS, _MODE, dir_fd=self._fd)
        try:
            posix.write_all(fd, stored)
            if not self._is_born_public:
                # Umask and ACLs are the same for all files of a batch: the first one tells.
                self._is_born_public = stat.S_IMODE(os.fstat(fd).st_mode) == _MODE
                os.fchmod(fd, _MODE)
        except BaseException:
            self._unlink(temporary)
            raise
        finally:
            os.close(fd)

    def settle(self) -> None:
        """Makes all of this batch durable and final: one sync, then the renames.

        In the order of the `put`s, so that who stores what a catalog refers to before the catalog never has a catalog
        in the repository that refers to nothing.
        """
        if not self._fresh:
            return
        try:
            posix.syncfs(self._fd)
            for path in list(self._fresh):
                self._rename(self._fresh[path], path)
                del self._fresh[path]
        except OSError as error:
            raise posix.failure(error, f"storing objects in {self._store.root}") from error

    def _rename(self, temporary: str, path: str) -> None:
        try:
            os.rename(temporary, path, src_dir_fd=self._fd, dst_dir_fd=self._fd)
        except FileNotFoundError:
            _make_directory(path[:2], dir_fd=self._fd)
            os.rename(temporary, path, src_dir_fd=self._fd, dst_dir_fd=self._fd)

    def forget(self) -> None:
        """Removes what is left under temporary names."""
        for temporary in self._fresh.values():
            self._unlink(temporary)
        self._fresh.clear()

    def _unlink(self, temporary: str) -> None:
        try:
            os.unlink(temporary, dir_fd=self._fd)
        except OSError:
            pass  # An orphan is harmless; the next holder of the lock sweeps it away.


def _make_directory(path: str, dir_fd: int | None = None) -> None:
    try:
        os.mkdir(path, 0o755, dir_fd=dir_fd)
    except FileExistsError:
        return
    os.chmod(path, 0o755, dir_fd=dir_fd)  # Whatever the umask.


def _read(stream: Stream, limit: int) -> bytes | None:
    """All of a stream, or None if it is more than `limit`."""
    found, size = [], 0
    while piece := stream.read(deflation.PIECE):
        size += len(piece)
        if size > limit:
            return None
        found.append(piece)
    return b"".join(found)

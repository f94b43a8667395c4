"""Reads one layer: compressed stream → verified → inflated → tar members → Changeset, the bytes into a ContentStore.

Names and bytes part ways here: each file's bytes go sideways into the store and come back as a token, the metadata go
forward. OCI image specification, `layer.md`, sections "Changeset" and "Whiteouts".

Threads share the work of one layer, because decompressing, hashing and writing release the interpreter:

    inflate   stream → inflate → diff ID → bounded pipe
    caller    pipe → tar → batch.put
    storing   leave full batches while the next is being filled; where the store wants threads, do the `put`s, too

Memory does not grow with the layer or its files, only with the number of its entries. Whatever fails in one thread
stops the others; the caller gets that first failure, and no thread outlives the call.
"""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from unpacker import compression
from unpacker.changeset import Changeset, Entry, Kind
from unpacker.contracts import ContentStore, RegistryLocator, StoreLocator
from unpacker.digest import Digest, Stream
from unpacker.errors import ImageError, IntegrityError
from unpacker.image import Layer
from unpacker.limits import Limits
from unpacker.oci import LAYER_COMPRESSION
from unpacker.reference import Repository
from unpacker.rootfs import Policy, publishable
from unpacker.storing import THREADS, Batches
from unpacker.tar.reader import Member, TarReader

METADATA_BYTES = 512 << 20
"""Of all names, link targets and extended attributes of a layer, which are held in memory."""

_NAMES = 100
"""Bytes of names that go with an entry of a share."""

_XATTR_NAME = 255
_XATTR_VALUE = 1 << 16
"""The most that Linux takes: XATTR_NAME_MAX, XATTR_SIZE_MAX."""
_PIPE_PIECES = 8
_PROOF_BYTES = 256 << 20
_PARENTS_REMEMBERED = 1 << 14
_PARENT_LENGTH = 512

_WHITEOUT = ".wh."
_OPAQUE = ".wh..wh..opq"
_AUFS = ".wh..wh."
_AUFS_LINKS = ".wh..wh.plnk/"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerJob:
    """All that another process needs to read a layer; picklable."""

    repository: Repository
    layer: Layer
    registry: RegistryLocator
    store: StoreLocator
    policy: Policy
    limits: Limits
    share: int = 0
    """How many entries it may have beside other layers that are read at the same time; 0 where it is read alone."""


def read_layer(job: LayerJob) -> bytes:
    """Reads one layer in any process, for an Executor. Gives the encoded Changeset, whose tokens are durable."""
    store = job.store.open()
    with job.registry.open().blob(job.repository, job.layer.descriptor) as stream:
        return read(stream, job.layer, store, job.policy, job.limits, job.share).encode()


def read(
    stream: Stream, layer: Layer, store: ContentStore, policy: Policy, limits: Limits, share: int = 0
) -> Changeset:
    """Reads a layer's compressed stream to its end and gives its Changeset; the contents are then durable in `store`.

    `stream` itself verifies the blob (see VerifiedReader); the diff ID is verified here. Every entry is as `policy`
    publishes it. ImageError for what is malformed or beyond `limits`, Crowded for what is beyond `share` only,
    IntegrityError for bytes that are not what their digests say, and whatever `stream` and `store` raise.
    """
    what = f"layer {layer.descriptor.digest}"
    declared = LAYER_COMPRESSION.get(layer.descriptor.media_type)
    if declared is None:
        raise ImageError(f"{what}: no file system layer but {layer.descriptor.media_type or 'untyped'}")
    pipe = _Pipe()
    try:
        with ThreadPoolExecutor(max_workers=1 + THREADS, thread_name_prefix="layer") as pool:
            try:
                inflating = pool.submit(_inflate, stream, declared, layer, limits, pipe, what)
                inflating.add_done_callback(pipe.finish)
                with Batches(store, pool, pipe.fail) as batches:
                    reading = _Reading(batches, policy, limits, share, what)
                    reading.all(TarReader(pipe, limits, what))
                return reading.changeset(layer.diff_id, inflating.result())
            finally:
                pipe.close()
    except (IntegrityError, _BeyondLimit):
        raise
    except ImageError as error:
        # Damaged on its way, or made so? Bytes that are not yet verified prove nothing about the image: the rest of
        # them, unless it is very much, decides whose fault this is.
        _read_on(stream, error)
        raise


class _BeyondLimit(ImageError):
    """More than the operator allows: no need to know the rest of it."""


class Crowded(_BeyondLimit):
    """More metadata than fits beside those of other layers: to be read again when no other is."""


def _read_on(stream: Stream, error: ImageError) -> None:
    left = _PROOF_BYTES
    try:
        while left > 0 and (data := stream.read(compression.PIECE)):
            left -= len(data)
    except IntegrityError as truth:
        raise truth from error


def _inflate(stream: Stream, declared: str, layer: Layer, limits: Limits, pipe: _Pipe, what: str) -> int:
    """Fills the pipe; gives the size of the uncompressed layer once its diff ID was found right."""
    diff_id = Digest.parse(layer.diff_id)
    hasher = diff_id.hasher()
    size = 0
    inflated = compression.decompress(stream, declared, what)
    while data := inflated.read(compression.PIECE):
        size += len(data)
        if size > limits.image_unpacked:
            raise _BeyondLimit(f"{what}: more than {limits.image_unpacked} bytes uncompressed (limits.image_unpacked)")
        hasher.update(data)
        pipe.write(data)
    if hasher.hexdigest() != diff_id.hex:
        found = f"{diff_id.algorithm}:{hasher.hexdigest()}"
        raise IntegrityError(f"{what}: uncompressed it should be {diff_id}, but is {found}")
    return size


class _Pipe:
    """Bytes from one thread to another, a few pieces at most; a Stream for the one that reads."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._pieces: deque[bytes] = deque()
        self._rest = b""
        self._is_finished = False
        self._is_closed = False
        self._end: BaseException | None = None
        self._error: BaseException | None = None

    def write(self, data: bytes) -> None:
        with self._changed:
            while len(self._pieces) >= _PIPE_PIECES and not self._is_closed:
                self._changed.wait()
            if self._is_closed:
                raise _Closed
            self._pieces.append(data)
            self._changed.notify()

    def read(self, size: int, /) -> bytes:
        data = self._rest
        if not data:
            with self._changed:
                while not self._pieces and not self._is_finished and self._error is None:
                    self._changed.wait()
                if self._error is not None:
                    raise self._error
                if not self._pieces:
                    if self._end is not None:
                        raise self._end
                    return b""
                data = self._pieces.popleft()
                # A writer that waits is woken for some pieces at once: waking costs as much as a piece's hash.
                if len(self._pieces) <= _PIPE_PIECES // 2:
                    self._changed.notify()
        if len(data) <= size:
            self._rest = b""
            return data
        self._rest = data[size:]
        return data[:size]

    def finish(self, writer: Future[int]) -> None:
        """The writer is done: after what it wrote comes the end, or its error, so that the first fault of a layer is
        the one reported, whichever thread was faster."""
        with self._changed:
            self._is_finished = True
            self._end = writer.exception()
            self._changed.notify_all()

    def fail(self, worker: Future[None]) -> None:
        """Another thread is done: if it failed, so does the next read."""
        error = worker.exception()
        if error is not None:
            with self._changed:
                self._error = self._error or error
                self._changed.notify_all()

    def close(self) -> None:
        """The reader is gone: the writer shall stop."""
        with self._changed:
            self._is_closed = True
            self._pieces.clear()
            self._changed.notify_all()


class _Closed(Exception):
    """Ends the writing thread after its reader left; nobody waits for it."""


class _Reading:
    """The growing Changeset of one layer."""

    def __init__(self, batches: Batches, policy: Policy, limits: Limits, share: int, what: str) -> None:
        self._batches = batches
        self._policy = policy
        self._limits = limits
        self._what = what
        self._beyond: type[_BeyondLimit] = Crowded if 0 < share < limits.image_entries else _BeyondLimit
        self._most_entries = share if self._beyond is Crowded else limits.image_entries
        self._most_metadata = min(METADATA_BYTES, share * _NAMES) if self._beyond is Crowded else METADATA_BYTES
        self._paths = Paths(limits, what)
        self._entries: list[Entry] = []
        self._whiteouts: list[str] = []
        self._opaque: list[str] = []
        self._aufs_links: dict[str, Entry] = {}
        self._content_size = 0
        self._metadata = 0

    def all(self, tar: TarReader) -> None:
        normal, entries, limit = self._paths.normal, self._entries, self._most_entries
        for count, member in enumerate(tar, 1):
            if count > limit:
                raise self._beyond(f"{self._what}: more than {limit} entries (limits.image_entries)")
            path = normal(member.path)
            self._hold(len(path) + len(member.target))
            if _WHITEOUT in path and self._is_reserved(path, member, tar):
                continue
            entries.append(self._entry(path, member, tar))

    def changeset(self, diff_id: str, size: int) -> Changeset:
        return Changeset(
            diff_id=diff_id,
            entries=self._settled(),
            whiteouts=tuple(self._whiteouts),
            opaque=tuple(self._opaque),
            size=size,
            content_size=self._content_size,
        )

    def _settled(self) -> tuple[Entry, ...]:
        """The entries with tokens in place of tickets."""
        if not self._batches.gives_tickets:
            return tuple(self._entries)
        token = self._batches.token
        return tuple(Entry._make((*e[:10], token(e.token), e[11])) if e.token else e for e in self._entries)

    def _entry(self, path: str, member: Member, tar: TarReader) -> Entry:
        _, kind, mode, uid, gid, mtime_ns, size, target, device, xattrs = member
        if kind is Kind.SYMLINK:
            self._check_target(path, target)
        elif kind is Kind.HARDLINK:
            target = self._paths.normal(target)
            if _WHITEOUT in target:
                entry = self._aufs_links.get(target)
                if entry is not None:
                    return entry._replace(path=path)
            if not target or _is_below_reserved(target):
                raise ImageError(f"{self._what}: {path!r} is a hard link to {target!r}, which no layer can hold")
        if not path and kind is not Kind.DIRECTORY:
            raise ImageError(f"{self._what}: the root is no directory")
        entry = publishable(
            Entry(path, kind, mode, uid, gid, mtime_ns, size, target, device, xattrs),
            self._policy,
        )
        if entry.xattrs:
            self._check_xattrs(entry)
        if kind is Kind.FILE:
            self._content_size += size
            if self._content_size > self._limits.image_unpacked:
                raise _BeyondLimit(
                    f"{self._what}: more than {self._limits.image_unpacked} bytes of files (limits.image_unpacked)"
                )
            token = self._batches.put(tar, size, entry)
            # As _replace, at a third of its price.
            return Entry._make((*entry[:10], token, entry[11]))
        return entry

    def _hold(self, size: int) -> None:
        self._metadata += size
        if self._metadata > self._most_metadata:
            raise self._beyond(f"{self._what}: more than {self._most_metadata} bytes of names and extended attributes")

    def _check_xattrs(self, entry: Entry) -> None:
        for name, value in entry.xattrs:
            self._hold(len(name) + len(value))
            if len(name.encode("utf-8", "surrogateescape")) > _XATTR_NAME or len(value) > _XATTR_VALUE:
                raise ImageError(f"{self._what}: {entry.path!r} has an extended attribute that no system takes")

    def _check_target(self, path: str, target: str) -> None:
        if not target or "\0" in target or len(target.encode("utf-8", "surrogateescape")) >= self._limits.path:
            raise ImageError(f"{self._what}: {path!r} is a symbolic link to nothing, or to more than a path can hold")

    def _is_reserved(self, path: str, member: Member, tar: TarReader) -> bool:
        """Takes a whiteout, or what aufs left behind, for what it is; False for any other path."""
        parts = path.split("/")
        for i, part in enumerate(parts):
            if not part.startswith(_WHITEOUT):
                continue
            parent, is_last = "/".join(parts[:i]), i == len(parts) - 1
            if part == _OPAQUE and is_last:
                self._opaque.append(parent)
            elif part.startswith(_AUFS):
                # Old layers keep here the files that others hard-link to; they show under those names only.
                if path.startswith(_AUFS_LINKS) and member.kind is Kind.FILE:
                    self._aufs_links[path] = self._entry(path, member, tar)
            else:
                hidden = part.removeprefix(_WHITEOUT)
                if not is_last or hidden in ("", ".", ".."):
                    raise ImageError(f"{self._what}: {path!r} is not a valid whiteout")
                self._whiteouts.append(f"{parent}/{hidden}" if parent else hidden)
            return True
        return False


def _is_below_reserved(path: str) -> bool:
    return any(part.startswith(_WHITEOUT) for part in path.split("/"))


class Paths:
    """Makes paths of a tar into paths of an image: relative, without `.`, `..`, doubled or final slashes.

    `..` is taken lexically, before any symbolic link: what would leave the root is an ImageError, as is what no file
    system could hold.
    """

    def __init__(self, limits: Limits, what: str) -> None:
        self._name_limit = limits.name
        self._path_limit = limits.path - 1  # the limit counts the NUL at the end
        self._what = what
        # Directories as written → as they are, with a slash. Most paths share theirs with the one before.
        self._parents = {"": ""}

    def normal(self, path: str) -> str:
        parent, _, name = path.rpartition("/")
        known = self._parents.get(parent)
        if (
            known is None
            or not path.isascii()
            or len(path) > self._path_limit
            or len(name) > self._name_limit
            or name in ("", ".", "..")
        ):
            return self._slowly(path, parent, name)
        return known + name

    def _slowly(self, path: str, parent: str, name: str) -> str:
        parts: list[str] = []
        for part in path.split("/"):
            if part in ("", "."):
                continue
            if part == "..":
                if not parts:
                    raise ImageError(f"{self._what}: {_short(path)} leaves the root")
                parts.pop()
                continue
            if len(part.encode("utf-8", "surrogateescape")) > self._name_limit:
                raise ImageError(
                    f"{self._what}: {_short(path)} has a name of more than {self._name_limit} bytes (limits.name)"
                )
            parts.append(part)
        normal = "/".join(parts)
        if len(normal.encode("utf-8", "surrogateescape")) > self._path_limit:
            raise ImageError(f"{self._what}: {_short(path)} is longer than {self._path_limit} bytes (limits.path)")
        if name not in ("", ".", "..") and len(parent) <= _PARENT_LENGTH:
            if len(self._parents) >= _PARENTS_REMEMBERED:
                self._parents = {"": ""}
            self._parents[parent] = normal[: len(normal) - len(name)]
        return normal


def _short(path: str) -> str:
    return repr(path if len(path) <= 200 else path[:200] + "…")

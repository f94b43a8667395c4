"""The contents of files as objects of a CernVM-FS repository: compressed, named by hash, the large ones in chunks.

A token says all that a catalog needs to know of a file's bytes; it does not depend on the file's metadata:

    z:<hash>                          one object, a zlib stream
    zc:<hash>@<size>,<hash>@<size>…   chunks in their order, each a zlib stream, with their uncompressed sizes
    n:<hash>, nc:…                    the same, stored as they are: read, but never written (see `deflation`)
"""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Collection, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from blake3 import blake3

from unpacker.changeset import Entry
from unpacker.cvmfs import chunks, deflation
from unpacker.cvmfs.hash import ContentHash
from unpacker.cvmfs.known import MINIMUM as KNOWN_MINIMUM
from unpacker.cvmfs.known import Known, KnownContents
from unpacker.cvmfs.objects import CHUNK, ObjectBatch, ObjectStore
from unpacker.digest import Stream, exactly
from unpacker.errors import PublishError

_CHUNKED = 64
_UNCOMPRESSED = 1 << 11
_SIZE_LIMIT = 1 << 63
_PLAIN = re.compile(r"[zn]:[0-9a-f]{40}(?:-[a-z0-9]{1,10})?")


class Piece(NamedTuple):
    """A chunk of a file: its object, and its size uncompressed."""

    name: ContentHash
    size: int


@dataclass(frozen=True, slots=True)
class Content:
    """Where the bytes of one file are: one object, or chunks."""

    whole: ContentHash | None
    """The object of a file in one piece; None if there are chunks."""

    chunks: tuple[Piece, ...] = ()
    is_compressed: bool = True

    @classmethod
    def parse(cls, token: str) -> Content:
        """Reads a token. Tokens come back from caches, so what is none is a PublishError that says what to do."""
        kind, _, text = token.partition(":")
        try:
            if kind in ("z", "n"):
                return cls(ContentHash.parse(text), (), kind == "z")
            if kind in ("zc", "nc"):
                pieces = tuple(_parse_piece(piece) for piece in text.split(","))
                if len({piece.name.algorithm for piece in pieces}) == 1:
                    return cls(None, pieces, kind == "zc")
        except ValueError:
            pass
        shown = repr(token if len(token) <= 150 else token[:149] + "…")
        raise PublishError(f"not a token of this target: {shown}; delete the cache of read layers, then run again")

    @property
    def token(self) -> str:
        """The reverse of `parse`."""
        kind = "z" if self.is_compressed else "n"
        if self.whole is not None:
            return f"{kind}:{self.whole.hex}"
        return f"{kind}c:{','.join(f'{name.hex}@{size}' for name, size in self.chunks)}"

    @property
    def flags_bits(self) -> int:
        """What the flags of a catalog row say of these bytes: hash algorithm, compression, whether there are chunks."""
        name = self.chunks[0].name if self.whole is None else self.whole
        chunked = _CHUNKED if self.whole is None else 0
        return name.flags_bits | chunked | (0 if self.is_compressed else _UNCOMPRESSED)

    @property
    def objects(self) -> tuple[tuple[ContentHash, str], ...]:
        """The objects that hold the bytes, in their order, each with its suffix."""
        if self.whole is not None:
            return ((self.whole, ""),)
        return tuple((name, CHUNK) for name, _ in self.chunks)


def _parse_piece(text: str) -> Piece:
    name, _, size = text.partition("@")
    # Nothing but the digits that `token` prints: one content has one token.
    if not size.isascii() or not size.isdigit() or size.startswith("0") or len(size) > 19 or int(size) >= _SIZE_LIMIT:
        raise ValueError(f"no size of a chunk: {size[:50]!r}")
    return Piece(ContentHash.parse(name), int(size))


@dataclass(frozen=True, slots=True)
class ContentsLocator:
    """Names the contents of a repository across processes."""

    root: str
    compression: str = "dense"
    algorithm: str = "sha1"
    index: str | None = None

    def open(self) -> RepositoryContents:
        return RepositoryContents(ObjectStore(self.root, self.algorithm), self.compression, self.index)


class RepositoryContents:
    """The ContentStore over a repository's objects; `compression` is one of `deflation.COMPRESSIONS`.

    The same bytes have the same token as long as compression and hash algorithm are the same. `index` is a file on
    local disk, for this repository alone, that remembers which object known bytes became (see `known`). Holds nothing
    open between calls.
    """

    def __init__(self, objects: ObjectStore, compression: str = "dense", index: str | None = None) -> None:
        self.objects = objects
        self._index = index
        self._compression = compression
        self._compress = deflation.compressor(compression)

    @property
    def locator(self) -> ContentsLocator:
        return ContentsLocator(self.objects.root, self._compression, self.objects.algorithm, self._index)

    @property
    def wants_threads(self) -> bool:
        return True  # Compressing is most of the work, and leaves the interpreter to others.

    @property
    def empty(self) -> str:
        """The token of the empty file, which every repository has."""
        return Content(ContentHash.of(deflation.EMPTY, self.objects.algorithm)).token

    @contextmanager
    def batch(self) -> Iterator[ContentsBatch]:
        """Writes under temporary names; leaving cleanly is one sync, then all renames."""
        if self._index is None:
            with self.objects.batch() as objects:
                yield ContentsBatch(objects, self._compress, self.objects.algorithm)
            return
        with closing(KnownContents(self._index, self._compression, self.objects.algorithm)) as known:
            with self.objects.batch() as objects:
                batch = ContentsBatch(objects, self._compress, self.objects.algorithm, known)
                yield batch
            known.add(batch.learned)

    @contextmanager
    def open(self, token: str) -> Iterator[Stream]:
        """The bytes of a token, decompressed; who reads to their end has verified bytes. Chunks are opened as the
        reading gets there."""
        pieces = self._bytes(Content.parse(token))
        try:
            yield _Bytes(itertools.chain([next(pieces, b"")], pieces))
        finally:
            pieces.close()

    def _bytes(self, content: Content) -> Generator[bytes, None, None]:
        if content.whole is not None:
            yield from self._object(content.whole, "", content.is_compressed)
        for name, size in content.chunks:
            left = size
            for piece in self._object(name, CHUNK, content.is_compressed):
                left -= len(piece)
                if left < 0:
                    break
                yield piece
            if left:
                raise PublishError(
                    f"chunk {name.hex} of {self.objects.root} has not the {size} bytes that its token says; "
                    "delete the cache of read layers, then run again"
                )

    def _object(self, name: ContentHash, suffix: str, is_compressed: bool) -> Iterator[bytes]:
        stored = self.objects.stored(name, suffix)
        what = f"object {name.hex}{suffix} of {self.objects.root}"
        return deflation.inflated(stored, what) if is_compressed else stored

    def missing(self, tokens: Collection[str], *, check: bool = False) -> set[str]:
        """Which of these the repository does not hold. With `check` all objects are read and compared with their
        names; what differs is removed, and counts as missing."""
        if check:
            return {token for token in tokens if not self._holds(token, check)}
        # A publish asks for every file of its images: where nothing is odd, one call of the system each.
        there = self.objects.present(token[2:] for token in tokens if _PLAIN.fullmatch(token))
        return {token for token in tokens if token[2:] not in there and not self._holds(token, check)}

    def _holds(self, token: str, check: bool) -> bool:
        try:
            content = Content.parse(token)
        except PublishError:
            return False  # No token of ours is none that we hold.
        if not check:
            return all(self.objects.has(name, suffix) for name, suffix in content.objects)
        sound = True
        for name, suffix in content.objects:
            if not self.objects.is_sound(name, suffix):
                self.objects.discard(name, suffix)
                sound = False
        return sound


class ContentsBatch:
    """One scope of writing. Beyond what a Batch promises, `put` may be called from several threads at a time: it is
    compressing, outside of the interpreter's lock, that takes the time."""

    def __init__(
        self, objects: ObjectBatch, compress: deflation.Compressor, algorithm: str, known: KnownContents | None = None
    ) -> None:
        self._objects = objects
        self._compress = compress
        self._algorithm = algorithm
        self._known = known
        self.learned: dict[bytes, Known] = {}
        self._lock = threading.Lock()
        self._written = 0

    @property
    def written(self) -> int:
        """Bytes of the files put so far, uncompressed."""
        return self._written

    def put(self, stream: Stream, size: int, hint: Entry) -> str:
        """Takes exactly `size` bytes and gives their token; holds a chunk of them in memory."""
        try:
            if size > chunks.MINIMUM:
                token = self._put_large(stream, size)
            else:
                data = exactly(stream, size)
                token = f"z:{self._store(data, '').hex}"
        except PublishError as error:
            raise PublishError(f"storing {hint.path!r}: {error}") from error
        with self._lock:
            self._written += size
        return token

    def _put_large(self, stream: Stream, size: int) -> str:
        pieces = []
        for data in chunks.cut(stream, size):
            if len(data) == size:
                # One chunk is no chunk.
                return Content(self._store(data, "")).token
            pieces.append(Piece(self._store(data, CHUNK), len(data)))
        return Content(None, tuple(pieces)).token

    def _store(self, data: bytes, suffix: str) -> ContentHash:
        known = self._known
        if known is None or len(data) < KNOWN_MINIMUM:
            # The empty file is the same object in every repository, whatever the compressor.
            return self._objects.put(self._compress(data) if data else deflation.EMPTY, suffix)
        content = blake3(data).digest()
        found = self.learned.get(content) or known.find(content)
        if found is not None:
            name = ContentHash(found.digest, self._algorithm)
            if self._objects.holds(name, suffix, found.size):
                return name
        stored = self._compress(data)
        name = self._objects.put(stored, suffix)
        self.learned[content] = Known(name.digest, len(stored))
        return name


class _Bytes:
    """A Stream of pieces."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._rest = b""

    def read(self, size: int, /) -> bytes:
        while size and not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return b""
            self._rest = piece
        data, self._rest = self._rest[:size], self._rest[size:]
        return data

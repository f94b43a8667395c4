"""How objects are compressed: always a zlib stream (RFC 1950), by one of three compressors.

The name of an object is the hash of its compressed bytes, so a repository keeps to one compressor: another one stores
every content a second time. Readers do not care.

    dense   libdeflate: no larger than stock in sum, at two to three times its speed
    fast    libdeflate at its quickest: 5 % larger than stock at five to eight times its speed
    stock   zlib as the official tools call it, byte for byte, so that objects are shared with what they wrote; and for
            the two kinds of objects that they compress again instead of copying them

ISA-L is half as quick again, but its streams depend on more than the bytes: of 48 processes that compressed the same
4,434 files in three threads on a busy machine, five made other ones, and each such content would have been stored again
under another name.

Contents that do not compress are zlib streams too, of stored blocks. Storing them bare is allowed, but a client's cache
knows an object by its hash alone: a bare file made to equal the zlib stream of another one would, on each client that
opened it, show in place of that other one.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import cache

import deflate

from unpacker.errors import PublishError

Stored = bytes | bytearray
"""What compressors make: never changed, and not copied to say so."""
Compressor = Callable[[bytes], Stored]
COMPRESSIONS = ("dense", "fast", "stock")

EMPTY = bytes.fromhex("789c030000000001")
"""What every repository stores for the empty file, whatever its compressor would make of it."""

PIECE = 1 << 18
"""Bytes handled at once of what is too large to be held whole."""

# Against stock, level 5 is up to 1.8 % smaller for small files, but up to 1.5 % larger for large texts; level 6, which
# takes a quarter longer, is smaller for nearly all. With this limit the sum over real and generated images is smaller.
_DENSE_LEVEL = 5
_DENSE_LEVEL_LARGE = 6
_LARGE = 256 << 10
_FAST_LEVEL = 1
_PROBED = 1 << 18
_PROBE = 1 << 12
_PROBE_STEP = 1 << 16
_KNOWN_ANSWER = "99751a4ac30c72d8c620ed0c5e8be406f7d09675"


def compressor(name: str) -> Compressor:
    """The compressor of that name. PublishError if this machine cannot do what it promises."""
    if name not in COMPRESSIONS:
        raise PublishError(f"no such compression of a repository: {name!r} (one of {', '.join(COMPRESSIONS)})")
    if name == "stock":
        check_zlib()
    return {"dense": dense, "fast": fast, "stock": stock}[name]


def dense(data: bytes) -> Stored:
    """Small, and quicker than zlib."""
    return _deflated(data, _DENSE_LEVEL if len(data) < _LARGE else _DENSE_LEVEL_LARGE)


def fast(data: bytes) -> Stored:
    """Quicker still, and larger."""
    return _deflated(data, _FAST_LEVEL)


def _deflated(data: bytes, level: int) -> Stored:
    if not data:
        return EMPTY
    if len(data) >= _PROBED and _is_incompressible(data):
        level = 0
    return deflate.zlib_compress(data, level)


def _is_incompressible(data: bytes) -> bool:
    """Whether samples of these bytes say that it is not worth trying."""
    sample = b"".join(data[at : at + _PROBE] for at in range(0, len(data), _PROBE_STEP))
    return len(deflate.zlib_compress(sample, 1)) >= len(sample) * 0.98


def stock(data: bytes) -> bytes:
    """What the official tools store for these bytes."""
    return zlib.compress(data, 6)


@cache
def check_zlib() -> None:
    """Raises PublishError if this Python has a zlib whose streams are not those of the official tools (zlib-ng)."""
    data = b"".join(b"%d %x\n" % (i * i, i * 2654435761 & 0xFFFFFFFF) for i in range(12_000))
    if hashlib.sha1(zlib.compress(data, 6), usedforsecurity=False).hexdigest() != _KNOWN_ANSWER:
        raise PublishError(
            f"this needs the original zlib, but this Python has {zlib.ZLIB_RUNTIME_VERSION}, which compresses to other "
            "bytes: to make a repository, to use another certificate, and for compression 'stock', use a Python with "
            "the original zlib"
        )


def inflate(stored: bytes, limit: int, what: str) -> bytes:
    """The bytes of a stream that inflates to `limit` bytes at most; PublishError names `what` otherwise."""
    found, size = [], 0
    for piece in inflated((stored,), what):
        size += len(piece)
        if size > limit:
            raise PublishError(f"{what} inflates to more than {limit} bytes")
        found.append(piece)
    return b"".join(found)


def inflated(stored: Iterable[bytes], what: str) -> Iterator[bytes]:
    """The bytes of exactly one stream, in bounded pieces. Reads `stored` to its end."""
    stream = zlib.decompressobj()
    for data in stored:
        while data and not stream.eof:
            try:
                piece = stream.decompress(data, PIECE)
            except zlib.error as error:
                raise PublishError(f"{what} is no zlib stream ({error})") from None
            # The checksum is read after the last output was made, so nothing is pending once all input is used up.
            data = stream.unconsumed_tail
            if piece:
                yield piece
        if stream.unused_data or (data and stream.eof):
            raise PublishError(f"{what} goes on after its zlib stream")
    if not stream.eof:
        raise PublishError(f"{what} is a zlib stream without an end")

"""Tar blocks by hand, for archives that no tool would write."""

from __future__ import annotations

import io
from typing import Any

from unpacker.digest import Digest
from unpacker.image import Layer
from unpacker.limits import Limits
from unpacker.oci import OCI_LAYER, Descriptor
from unpacker.tar.reader import Member, TarReader

END = bytes(1024)
USTAR = b"ustar\x0000"
GNU = b"ustar  \x00"
OLD = bytes(8)


def header(
    name: bytes = b"file",
    *,
    flag: bytes = b"0",
    size: bytes | int = 0,
    mode: bytes = b"0000644\0",
    uid: bytes = b"0000000\0",
    gid: bytes = b"0000000\0",
    mtime: bytes = b"00000000000\0",
    link: bytes = b"",
    magic: bytes = USTAR,
    major: bytes = b"",
    minor: bytes = b"",
    prefix: bytes = b"",
    rest: bytes = b"",
    checksum: bytes | None = None,
) -> bytes:
    """One header block; `rest` replaces what follows the device numbers (byte 345 on), where GNU keeps other things."""
    number = b"%011o\0" % size if isinstance(size, int) else size
    block = bytearray(512)
    fields = [(name, 100), (mode, 8), (uid, 8), (gid, 8), (number, 12), (mtime, 12), (b" " * 8, 8), (flag, 1)]
    fields += [(link, 100), (magic, 8), (b"", 64), (major, 8), (minor, 8), (rest or prefix, 167)]
    pos = 0
    for value, length in fields:
        assert len(value) <= length
        block[pos : pos + len(value)] = value
        pos += length
    block[148:156] = b"%06o\0 " % sum(block) if checksum is None else checksum
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def regular(name: bytes, data: bytes, **fields: Any) -> bytes:
    return header(name, size=len(data), **fields) + padded(data)


def record(key: bytes, value: bytes) -> bytes:
    """One pax record, its length counting itself."""
    length = len(key) + len(value) + 3
    digits = len(str(length))
    while len(str(length + digits)) != digits:
        digits += 1
    return b"%d %b=%b\n" % (length + digits, key, value)


def pax(*records: tuple[bytes, bytes], flag: bytes = b"x") -> bytes:
    return regular(b"PaxHeaders/x", b"".join(record(key, value) for key, value in records), flag=flag)


def read(data: bytes, limits: Limits | None = None, piece: int | None = None) -> list[tuple[Member, bytes]]:
    """All members of a tar with their contents, read in pieces of the given size."""
    stream = io.BytesIO(data)
    source = Pieces(stream, piece) if piece else stream
    reader = TarReader(source, limits or Limits())
    found = []
    for member in reader:
        content = []
        while data := reader.read(1 << 16):
            content.append(data)
        found.append((member, b"".join(content)))
    assert stream.read() == b"", "the reader left something unread"
    return found


class Pieces:
    """A stream that gives at most so many bytes at once, as a network does."""

    def __init__(self, stream: io.BytesIO, piece: int) -> None:
        self._stream = stream
        self._piece = piece

    def read(self, size: int, /) -> bytes:
        return self._stream.read(min(size, self._piece))


def layer_of(blob: bytes, tar: bytes, media_type: str = OCI_LAYER) -> Layer:
    """The layer that an image would name: this blob, which uncompressed is this tar."""
    descriptor = Descriptor(media_type=media_type, digest=Digest.of(blob), size=len(blob))
    return Layer(descriptor=descriptor, diff_id=str(Digest.of(tar)))

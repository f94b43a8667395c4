"""One row of a catalog: its flags, its path key, and how a node of a tree becomes one.

Paths inside a repository are `""` for its root, else `/` and names joined by `/`; as bytes they are what the file
system has, without any normalisation.
"""

from __future__ import annotations

import stat
import struct
from hashlib import md5
from typing import NamedTuple

from unpacker.changeset import Kind, Xattrs
from unpacker.cvmfs.contents import Content, Piece
from unpacker.cvmfs.counters import Tally
from unpacker.cvmfs.hash import SIZE, ContentHash
from unpacker.errors import PublishError
from unpacker.tree import Directory, File, Special, Symlink

DIRECTORY = 1
MOUNT_POINT = 2
FILE = 4
SYMLINK = 8
SPECIAL = 16
CATALOG_ROOT = 32
CHUNKED = 64
EXTERNAL = 128
BIND_MOUNT_POINT = 0x4000
HIDDEN = 0x8000

DIRECTORY_SIZE = 4096
"""What the official tools write as the size of every directory."""

MARKER = ".cvmfscatalog"
"""The file that every nested catalog has directly in its root, and that no other directory may have."""

NAME_LIMIT = 255
TARGET_LIMIT = 4095
"""Clients cannot return a longer target."""
XATTR_LIMIT = 255
"""Of the number of attributes, and of the bytes in a key and in a value: each count is one byte."""

_TIME_LIMIT = (1 << 63) - 1
_COMPRESSION_SHIFT = 11
_PLAIN_TOKEN = len("z:") + 2 * SIZE
_LINKS = 0xFFFFFFFF
_SPECIAL_TYPES = {Kind.CHARACTER: stat.S_IFCHR, Kind.BLOCK: stat.S_IFBLK, Kind.FIFO: stat.S_IFIFO}
_unpack_key = struct.Struct("<qq").unpack


class Chunk(NamedTuple):
    """A piece of a chunked file: where it starts, its uncompressed size, the bare digest of its object."""

    offset: int
    size: int
    hash: bytes


class Row(NamedTuple):
    """What the `catalog` table says of one name, the columns by their names; the path keys are left out.

    Texts are `str` with surrogateescape. `hardlinks` is group << 32 | link count; `mtimens` is None where nobody
    recorded it; `hash` is the bare digest, its algorithm is in `flags`.
    """

    hardlinks: int
    hash: bytes | None
    size: int
    mode: int
    mtime: int
    mtimens: int | None
    flags: int
    name: str
    symlink: str
    uid: int
    gid: int
    xattr: bytes | None

    @property
    def links(self) -> int:
        return self.hardlinks & _LINKS

    @property
    def is_directory(self) -> bool:
        return bool(self.flags & DIRECTORY)

    @property
    def mtime_ns(self) -> int:
        return self.mtime * 10**9 + (self.mtimens or 0)

    @property
    def content_hash(self) -> ContentHash | None:
        """The object of a whole file."""
        return None if self.hash is None else self.hash_of(self.hash)

    def hash_of(self, digest: bytes) -> ContentHash:
        """A digest of this row or of its chunks, with the algorithm that the row names."""
        try:
            return ContentHash.from_flags(digest, self.flags)
        except ValueError as error:
            raise PublishError(f"{self.name!a}: {error}; check the repository") from None


def key(path: bytes) -> tuple[int, int]:
    """The path key: MD5 of the path as two signed little-endian numbers."""
    return _unpack_key(md5(path, usedforsecurity=False).digest())


def of_directory(node: Directory, name: str, subdirectories: int, flags: int = 0) -> Row:
    """A directory's row; its link count is 2 and one for each directory in it, however that one is attached."""
    seconds, nanoseconds = _time(node.mtime_ns)
    return Row(
        2 + subdirectories,
        None,
        DIRECTORY_SIZE,
        stat.S_IFDIR | node.mode,
        seconds,
        nanoseconds,
        DIRECTORY | flags,
        name,
        "",
        node.uid,
        node.gid,
        encode_xattrs(node.xattrs) if node.xattrs else None,
    )


def of_node(node: File | Symlink | Special, name: str) -> tuple[Row, tuple[Chunk, ...]]:
    """The row of anything but a directory, with the rows of its chunks. Hard links are broken: every name is one."""
    if type(node) is File:  # nearly all, so this is spelt out
        mode, uid, gid, mtime_ns, xattrs, size, _, _ = node
        digest, flags, chunks = _content(node)
        seconds, nanoseconds = _time(mtime_ns)
        xattr = encode_xattrs(xattrs) if xattrs else None
        mode |= stat.S_IFREG
        return Row(1, digest, size, mode, seconds, nanoseconds, flags, name, "", uid, gid, xattr), chunks
    seconds, nanoseconds = _time(node.mtime_ns)
    xattr = encode_xattrs(node.xattrs) if node.xattrs else None
    uid, gid = node.uid, node.gid
    if type(node) is Symlink:
        size = len(node.target.encode("utf-8", "surrogateescape"))
        mode = stat.S_IFLNK | 0o777  # archives have anything here
        flags = FILE | SYMLINK
        return Row(1, None, size, mode, seconds, nanoseconds, flags, name, node.target, uid, gid, xattr), ()
    assert type(node) is Special
    mode = _SPECIAL_TYPES[node.kind] | node.mode
    size = 0 if node.kind is Kind.FIFO else device_number(*node.device)
    return Row(1, None, size, mode, seconds, nanoseconds, FILE | SPECIAL, name, "", uid, gid, xattr), ()


def device_number(major: int, minor: int) -> int:
    """Linux's 64-bit `makedev`, as a signed number, because SQLite has no others."""
    number = (major & 0xFFFFF000) << 32 | (major & 0xFFF) << 8 | (minor & 0xFFFFFF00) << 12 | minor & 0xFF
    return number - (1 << 64) if number >= 1 << 63 else number


def device_of(number: int) -> tuple[int, int]:
    """The major and minor number of `device_number`'s result."""
    number &= (1 << 64) - 1
    return number >> 32 & 0xFFFFF000 | number >> 8 & 0xFFF, number >> 12 & 0xFFFFFF00 | number & 0xFF


def tally(row: Row, chunks: int) -> Tally:
    """What one row adds to the counters of its catalog."""
    xattr = 0 if row.xattr is None else 1
    if row.flags & DIRECTORY:
        return Tally(dir=1, nested=1 if row.flags & MOUNT_POINT else 0, xattr=xattr)
    if row.flags & SYMLINK:
        return Tally(symlink=1, xattr=xattr)
    if row.flags & SPECIAL:
        return Tally(special=1, xattr=xattr)
    is_chunked, is_external = bool(row.flags & CHUNKED), bool(row.flags & EXTERNAL)
    return Tally(
        regular=1,
        file_size=row.size,
        chunked=int(is_chunked),
        chunks=chunks,
        chunked_size=row.size * is_chunked,
        xattr=xattr,
        external=int(is_external),
        external_file_size=row.size * is_external,
    )


def encode_xattrs(xattrs: Xattrs) -> bytes | None:
    """The blob of the `xattr` column; ValueError for what its one-byte counts cannot hold."""
    if not xattrs:
        return None
    parts = [bytes((1, len(xattrs)))]
    for name, value in xattrs:
        key_bytes = name.encode("utf-8", "surrogateescape")
        if not key_bytes:
            raise ValueError("an extended attribute without a name")
        parts += bytes((len(key_bytes), len(value))), key_bytes, value
    return b"".join(parts)


def decode_xattrs(blob: bytes | None) -> Xattrs:
    """Reads `encode_xattrs`'s bytes; PublishError for any others."""
    if blob is None:
        return ()
    found = []
    try:
        version, count = blob[0], blob[1]
        position = 2
        for _ in range(count):
            middle = position + 2 + blob[position]
            end = middle + blob[position + 1]
            found.append((blob[position + 2 : middle].decode("utf-8", "surrogateescape"), blob[middle:end]))
            position = end
    except IndexError:
        version = position = -1
    if version != 1 or position != len(blob):
        raise PublishError("a catalog has extended attributes in a form that nobody knows; check the repository")
    return tuple(sorted(found))


def content_of(row: Row, chunks: tuple[Chunk, ...]) -> Content:
    """Where the bytes of a regular file are; PublishError for a row that does not say."""
    is_compressed = not row.flags >> _COMPRESSION_SHIFT & 7
    if row.flags & CHUNKED:
        pieces = tuple(Piece(row.hash_of(chunk.hash), chunk.size) for chunk in chunks)
        if not pieces:
            raise PublishError(f"{row.name!a}: a chunked file without chunks; check the repository")
        return Content(None, pieces, is_compressed)
    if row.hash is None:
        raise PublishError(f"{row.name!a}: a file without contents; check the repository")
    return Content(row.hash_of(row.hash), (), is_compressed)


def _content(node: File) -> tuple[bytes | None, int, tuple[Chunk, ...]]:
    """The digest of a whole file or the chunks of another one, and the flags that say which and how."""
    token = node.token
    if len(token) == _PLAIN_TOKEN and token.startswith("z:"):  # nearly all
        try:
            return bytes.fromhex(token[2:]), FILE, ()
        except ValueError:
            pass  # to where it is refused
    content = Content.parse(token)
    if content.whole is not None:
        return content.whole.digest, FILE | content.flags_bits, ()
    chunks = []
    offset = 0
    for piece in content.chunks:
        chunks.append(Chunk(offset, piece.size, piece.name.digest))
        offset += piece.size
    if offset != node.size:
        raise PublishError(
            f"the chunks of a file of {node.size} bytes have {offset}; delete the cache of read layers, then run again"
        )
    return None, FILE | content.flags_bits, tuple(chunks)


def _time(mtime_ns: int) -> tuple[int, int]:
    seconds, nanoseconds = divmod(mtime_ns, 10**9)
    if not -_TIME_LIMIT <= seconds <= _TIME_LIMIT:  # an archive may claim any time
        return (_TIME_LIMIT if seconds > 0 else -_TIME_LIMIT), 0
    return seconds, nanoseconds

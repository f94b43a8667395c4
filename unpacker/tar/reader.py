"""Reads a tar archive forward once: its members as plain values, their contents as a stream.

Formats: old (V7), ustar, pax (POSIX.1-2001) and GNU, as POSIX `pax`, the GNU tar manual ("Basic Tar Format", "Storing
Sparse Files") and star's documentation describe them. Where implementations differ we read what Go's `archive/tar`
reads, because the images were made and are run with it; `python -m tarfile` is the oracle of the tests. On purpose:

- A type of member that the image specification does not know is an error. POSIX would make it a regular file, but
  what container engines refuse nobody can have meant to ship.
- A global header may set times, owners and extended attributes for what follows; one that would name or size every
  later member is refused.
- A lone zero block followed by anything but zeros or the end is an error: some tools would read on, others not.
- Times that 64 bits of nanoseconds cannot hold become 0, as in Docker.

Names are bytes in the archive and `str` with surrogateescape here. Nothing is believed: every length is checked and
bounded, and whatever is wrong raises ImageError with the position.
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct
from typing import NamedTuple, NoReturn
from zlib import adler32

from unpacker.changeset import Kind, Xattrs
from unpacker.digest import Stream
from unpacker.errors import ImageError
from unpacker.limits import Limits
from unpacker.tar import pax, sparse
from unpacker.tar.fields import (
    Malformed,
    as_nanoseconds,
    as_owner,
    as_size,
    decimal,
    decimal_time,
    device_numbers,
    number,
    octal,
)

BLOCK = 512
PIECE = 1 << 20
"""How much is asked of the stream at once."""

_EXTENSIONS_PER_MEMBER = 16
"""Headers that only describe the next member; real archives have at most three."""
_NUMBERS_REMEMBERED = 4096

_ZERO = bytes(BLOCK)
_USTAR = b"ustar\x00"
_GNU = b"ustar  \x00"
_STAR = b"tar\0"
# name mode uid gid size mtime checksum type link magic (user group) major minor prefix
_HEADER = Struct("100s8s8s8s12s12s8sc100s8s64x8s8s155s12x")
_KINDS = {
    b"0": Kind.FILE,
    b"\0": Kind.FILE,
    b"7": Kind.FILE,
    b"1": Kind.HARDLINK,
    b"2": Kind.SYMLINK,
    b"3": Kind.CHARACTER,
    b"4": Kind.BLOCK,
    b"5": Kind.DIRECTORY,
    b"6": Kind.FIFO,
}


class Member(NamedTuple):
    """One member as its archive has it: path and target neither normalised nor checked, but for NUL and emptiness.

    `mode` has permission bits only; `size` is the logical size of a file, holes included, and 0 for all others.
    """

    path: str
    kind: Kind
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    size: int
    target: str
    device: tuple[int, int]
    xattrs: Xattrs


class TarReader:
    """Iterates over the members of a tar; between two steps, it is itself the Stream of the member just given.

    What is not read of a content is skipped. At the end of iteration everything that follows the archive in the
    stream has been read too, so that whoever hashes the stream has seen it all. Memory is bounded by a few pieces of
    the stream and `limits.pax_record`.
    """

    def __init__(self, stream: Stream, limits: Limits, what: str = "tar") -> None:
        self._stream = stream
        self._limits = limits
        self._what = what
        self._data = b""
        self._pos = 0
        self._before = 0
        """Bytes of the stream before `_data`."""
        self._left = 0
        """Bytes of the current member that the archive holds and nobody has read yet."""
        self._padding = 0
        self._sparse: sparse.Sparse | None = None
        """The current member, if it is sparse."""
        self._global: dict[bytes, bytes] = {}

    def __iter__(self) -> Iterator[Member]:
        unpack, kinds, no_device, no_xattrs = _HEADER.unpack, _KINDS, (0, 0), ()
        # Modes, owners and times repeat: remembered, because parsing them is most of the work.
        modes: dict[bytes, int] = {}
        owners: dict[bytes, int] = {}
        times: dict[bytes, int] = {}
        try:
            while True:
                block = self._next_block()
                if block is None:
                    return
                name, mode, uid, gid, size, mtime, checksum, flag, link, magic, major, minor, prefix = unpack(block)
                # Adler-32 counts modulo 65,521, which the sum of a block of ASCII cannot reach: the fast exact sum.
                total = (adler32(block) & 0xFFFF) - 1 if block.isascii() else sum(block)
                if total - sum(checksum) + 256 != octal(checksum):
                    if block == _ZERO:
                        self._end()
                        return
                    self._check(block, checksum)
                kind = kinds.get(flag)
                if kind is None or self._global:
                    member = self._described(block)
                    if member is None:
                        return
                    yield member
                    continue

                mode_number, uid_number, gid_number = modes.get(mode), owners.get(uid), owners.get(gid)
                if mode_number is None or uid_number is None or gid_number is None:
                    if len(modes) > _NUMBERS_REMEMBERED or len(owners) > _NUMBERS_REMEMBERED:
                        modes.clear()
                        owners.clear()
                    mode_number = modes[mode] = number(mode, "mode") & 0o7777
                    uid_number = owners[uid] = as_owner(number(uid, "uid"), "uid")
                    gid_number = owners[gid] = as_owner(number(gid, "gid"), "gid")
                mtime_ns = times.get(mtime)
                if mtime_ns is None:
                    if len(times) > _NUMBERS_REMEMBERED:
                        times.clear()
                    mtime_ns = times[mtime] = as_nanoseconds(number(mtime, "mtime"))
                path = str(name.partition(b"\0")[0], "utf-8", "surrogateescape")
                device = no_device
                if prefix[0] and (front := _front(magic, prefix, block)):
                    path = str(front, "utf-8", "surrogateescape") + "/" + path
                if not path:
                    self._fail("a member without a name")
                target = ""
                if kind is Kind.FILE:
                    if flag == b"\0" and path.endswith("/"):
                        kind, length = Kind.DIRECTORY, 0
                    else:
                        length = octal(size)
                        if length < 0:
                            length = as_size(number(size, "size"))
                        self._left = length
                        self._padding = -length & 511
                else:
                    length = 0
                    if kind is Kind.SYMLINK or kind is Kind.HARDLINK:
                        target = str(link.partition(b"\0")[0], "utf-8", "surrogateescape")
                    elif kind is Kind.CHARACTER or kind is Kind.BLOCK:
                        device = device_numbers(major, minor) if _is_of_a_standard(magic) else no_device
                yield Member(
                    path,
                    kind,
                    mode_number,
                    uid_number,
                    gid_number,
                    mtime_ns,
                    length,
                    target,
                    device,
                    no_xattrs,
                )
        except Malformed as problem:
            self._fail(str(problem))

    def read(self, size: int, /) -> bytes:
        """The content of the member just given: at most `size` bytes of it, b"" at its end only."""
        if (holed := self._sparse) is not None:
            self._sparse = None  # its stored bytes are read like those of any other
            try:
                return holed.read(size, self)
            finally:
                self._sparse = holed
        left = self._left
        if size > left:
            size = left
        if size <= 0:
            return b""
        pos = self._pos
        data = self._data[pos : pos + size]
        if not data:
            if not self._fill():
                self._fail("ends inside the content of a member")
            pos = 0
            data = self._data[:size]
        count = len(data)
        self._pos = pos + count
        self._left = left - count
        return data

    # The stream in blocks.

    def _fill(self) -> bool:
        """Takes the next piece of the stream in place of the current one; False at the end."""
        self._before += len(self._data)
        self._pos = 0
        self._data = self._stream.read(PIECE)
        return bool(self._data)

    def _next_block(self) -> bytes | None:
        """The block after the current member, or None if the stream ends there."""
        skip = self._left + self._padding
        self._sparse = None
        while skip > len(self._data) - self._pos:
            skip -= len(self._data) - self._pos
            if not self._fill():
                if skip <= self._padding:
                    # Some tools (umoci) do not fill the last block of the last content.
                    return None
                self._fail("ends inside the content of a member")
        self._left = self._padding = 0
        pos = self._pos + skip
        block = self._data[pos : pos + BLOCK]
        self._pos = pos + len(block)
        while len(block) < BLOCK:
            if not self._fill():
                if not block:
                    return None
                self._fail("ends inside a header")
            more = self._data[: BLOCK - len(block)]
            self._pos = len(more)
            block += more
        return block

    def _take(self, size: int, what: str) -> bytes:
        """The content of a header that describes the next member."""
        if size > self._limits.pax_record:
            self._fail(f"{what} of {size} bytes (the limit is {self._limits.pax_record})")
        self._left, self._padding = size, -size % BLOCK
        pieces = []
        while piece := self.read(size):
            pieces.append(piece)
        return b"".join(pieces)

    def _end(self) -> None:
        """After the first zero block: checks the second one and reads on to the end of the stream."""
        block = self._next_block()
        if block is not None and block != _ZERO:
            self._fail("one zero block, then something else")
        while self._fill():
            pass

    # Headers.

    def _check(self, block: bytes, checksum: bytes) -> None:
        """The checksum once more, slowly: as any tool ever wrote it, by signed bytes too."""
        stored = number(checksum, "checksum")
        rest = block[:148] + block[156:]
        unsigned = sum(rest) + 256
        if stored != unsigned and stored != unsigned - 256 * sum(byte > 127 for byte in rest):
            self._fail("not a tar header (its checksum is wrong)")

    def _described(self, block: bytes) -> Member | None:
        """The next member where headers before it, or its own type, say more than a plain header can."""
        records: pax.Records | None = None
        long_path = long_target = b""
        count = 0
        while (flag := block[156:157]) in b"xgLK":
            count += 1
            if count > _EXTENSIONS_PER_MEMBER:
                self._fail(f"more than {_EXTENSIONS_PER_MEMBER} headers that describe one member")
            size = as_size(number(block[124:136], "size"))
            if flag == b"x":
                records = pax.parse(self._take(size, "pax header"))
            elif flag == b"g":
                self._set_global(pax.parse(self._take(size, "global pax header")))
            elif flag == b"L":
                long_path = self._take(size, "long name").partition(b"\0")[0]
            else:
                long_target = self._take(size, "long link").partition(b"\0")[0]
            following = self._next_block()
            if following is None or following == _ZERO:
                if records is not None or long_path or long_target:
                    self._fail("a header that describes a member, but no member")
                if following is not None:
                    self._end()
                return None
            block = following
            self._check(block, block[148:156])
        return self._member(block, records, long_path, long_target)

    def _member(self, block: bytes, own: pax.Records | None, long_path: bytes, long_target: bytes) -> Member:
        """One member from its header, the pax records before it, and GNU's long names, which win."""
        name, mode, uid, gid, size, mtime, _, flag, link, magic, major, minor, prefix = _HEADER.unpack(block)
        values = {**self._global, **own.values} if own else self._global
        kind = _KINDS.get(flag)
        if flag == b"S" and magic == _GNU:
            kind = Kind.FILE
        if kind is None:
            self._fail(f"member of unknown type {flag!r}")

        path = name.partition(b"\0")[0]
        if prefix[0] and (front := _front(magic, prefix, block)):
            path = front + b"/" + path
        path = long_path or values.get(b"GNU.sparse.name") or values.get(b"path") or path
        target = b""
        if kind is Kind.SYMLINK or kind is Kind.HARDLINK:
            target = long_target or values.get(b"linkpath") or link.partition(b"\0")[0]
        if not path or b"\0" in path or b"\0" in target:
            self._fail("a member without a name, or with NUL in its names")
        if kind is Kind.FILE and flag == b"\0" and path.endswith(b"/"):
            kind = Kind.DIRECTORY

        length = 0
        if kind is Kind.FILE:
            recorded = values.get(b"size")
            length = as_size(decimal(recorded, "size") if recorded else number(size, "size"))
            self._left, self._padding = length, -length % BLOCK
            holed = None
            if flag == b"S":
                # The rest of its map comes before its content.
                self._left = self._padding = 0
                holed = sparse.old(block, self._next_block, length, self._limits.pax_record)
                self._left, self._padding = length, -length % BLOCK
            elif own is not None and sparse.is_sparse(own):
                holed = sparse.pax(own, self, length, self._limits.pax_record)
            if holed is not None:
                self._sparse, length = holed, holed.size
        is_device = kind is Kind.CHARACTER or kind is Kind.BLOCK
        recorded_uid, recorded_gid = values.get(b"uid"), values.get(b"gid")
        recorded_mtime = values.get(b"mtime")
        return Member(
            str(path, "utf-8", "surrogateescape"),
            kind,
            number(mode, "mode") & 0o7777,
            as_owner(decimal(recorded_uid, "uid") if recorded_uid else number(uid, "uid"), "uid"),
            as_owner(decimal(recorded_gid, "gid") if recorded_gid else number(gid, "gid"), "gid"),
            decimal_time(recorded_mtime) if recorded_mtime else as_nanoseconds(number(mtime, "mtime")),
            length,
            str(target, "utf-8", "surrogateescape"),
            device_numbers(major, minor) if is_device and _is_of_a_standard(magic) else (0, 0),
            pax.xattrs(values),
        )

    def _set_global(self, records: pax.Records) -> None:
        self._global |= pax.for_all(records)
        if sum(len(key) + len(value) for key, value in self._global.items()) > self._limits.pax_record:
            self._fail("global pax headers beyond the limit")

    def _fail(self, problem: str) -> NoReturn:
        raise ImageError(f"{self._what}: {problem} (before byte {self._before + self._pos} of the tar)") from None


def _is_of_a_standard(magic: bytes) -> bool:
    """Whether a header is more than that of the oldest format. Of ustar the version says nothing; readers ignore it."""
    return magic.startswith(_USTAR) or magic == _GNU


def _front(magic: bytes, prefix: bytes, block: bytes) -> bytes:
    """What stands before the name of a path, where the header has it there."""
    if magic.startswith(_USTAR):
        # star keeps two times where others have the end of the prefix.
        return (prefix[:131] if block.endswith(_STAR) else prefix).partition(b"\0")[0]
    if magic == _GNU:
        # GNU keeps two times here, and whatever wrote tars with Go before 1.8 the front of long paths of members that
        # have a large number elsewhere: so it is where the times are none.
        front = prefix.partition(b"\0")[0]
        try:
            for time in (prefix[:12], prefix[12:24]):
                if time[0]:
                    number(time, "time")
        except Malformed:
            return front if front.isascii() else b""
    return b""

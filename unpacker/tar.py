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

import base64
import binascii
from collections.abc import Iterator
from struct import Struct
from typing import NamedTuple, NoReturn
from urllib.parse import unquote_to_bytes
from zlib import adler32

from unpacker.changeset import Kind, Xattrs
from unpacker.digest import Stream
from unpacker.errors import ImageError
from unpacker.limits import Limits

BLOCK = 512
PIECE = 1 << 20
"""How much is asked of the stream at once."""

_EXTENSIONS_PER_MEMBER = 16
"""Headers that only describe the next member; real archives have at most three."""
_NUMBERS_REMEMBERED = 4096
_ID_LIMIT = 2**32 - 2
"""The highest owner; chown takes 2³² - 1 as "leave it"."""
_SECONDS_LIMIT = 2**63 // 10**9

_ZERO = bytes(BLOCK)
_ZEROS = bytes(PIECE)
_USTAR = b"ustar\x0000"
_GNU = b"ustar  \x00"
# name mode uid gid size mtime checksum type link magic (user group) major minor prefix
_HEADER = Struct("100s8s8s8s12s12s8sc100s8s64x8s8s155s12x")
_OLD_SPARSE = Struct("386x96sc12s17x")
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
        self._map: list[tuple[int, int]] | None = None
        """Of a sparse member: its data, as (offset, length), the next one last."""
        self._logical = 0
        self._logical_size = 0
        self._global: dict[bytes, bytes] = {}

    def __iter__(self) -> Iterator[Member]:
        unpack, kinds, no_device, no_xattrs = _HEADER.unpack, _KINDS, (0, 0), ()
        # Modes, owners and times repeat: remembered, because parsing them is most of the work.
        ids: dict[bytes, int] = {}
        times: dict[bytes, int] = {}
        while True:
            block = self._next_block()
            if block is None:
                return
            name, mode, uid, gid, size, mtime, checksum, flag, link, magic, major, minor, prefix = unpack(block)
            # Adler-32 counts modulo 65,521, which the sum of a block of ASCII cannot reach: the fast exact sum.
            total = (adler32(block) & 0xFFFF) - 1 if block.isascii() else sum(block)
            if total - sum(checksum) + 256 != _octal(checksum):
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

            mode_number, uid_number, gid_number = ids.get(mode), ids.get(uid), ids.get(gid)
            if mode_number is None or uid_number is None or gid_number is None:
                if len(ids) > _NUMBERS_REMEMBERED:
                    ids.clear()
                mode_number = ids[mode] = self._number(mode, "mode")
                uid_number = ids[uid] = self._id(self._number(uid, "uid"), "uid")
                gid_number = ids[gid] = self._id(self._number(gid, "gid"), "gid")
            mtime_ns = times.get(mtime)
            if mtime_ns is None:
                if len(times) > _NUMBERS_REMEMBERED:
                    times.clear()
                mtime_ns = times[mtime] = _nanoseconds(self._number(mtime, "mtime"))
            path = str(name.partition(b"\0")[0], "utf-8", "surrogateescape")
            device = no_device
            if prefix[0] and magic == _USTAR:
                path = str(prefix.partition(b"\0")[0], "utf-8", "surrogateescape") + "/" + path
            if not path:
                self._fail("a member without a name")
            target = ""
            if kind is Kind.FILE:
                if flag == b"\0" and path.endswith("/"):
                    kind, length = Kind.DIRECTORY, 0
                else:
                    length = _octal(size)
                    if length < 0:
                        length = self._size(self._number(size, "size"))
                    self._left = length
                    self._padding = -length & 511
            else:
                length = 0
                if kind is Kind.SYMLINK or kind is Kind.HARDLINK:
                    target = str(link.partition(b"\0")[0], "utf-8", "surrogateescape")
                elif kind is Kind.CHARACTER or kind is Kind.BLOCK:
                    device = self._device(magic, major, minor)
            yield Member(
                path,
                kind,
                mode_number & 0o7777,
                uid_number,
                gid_number,
                mtime_ns,
                length,
                target,
                device,
                no_xattrs,
            )

    def read(self, size: int, /) -> bytes:
        """The content of the member just given: at most `size` bytes of it, b"" at its end only."""
        if self._map is not None:
            return self._read_sparse(size)
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

    def _read_sparse(self, size: int) -> bytes:
        segments = self._map
        assert segments is not None
        here = self._logical
        size = min(size, self._logical_size - here)
        if size <= 0:
            return b""
        while segments and sum(segments[-1]) <= here:
            segments.pop()
        start, length = segments[-1] if segments else (self._logical_size, 0)
        if here < start:
            count = min(size, start - here, PIECE)
            self._logical += count
            return _ZEROS[:count]
        self._map = None
        try:
            data = self.read(min(size, start + length - here))
        finally:
            self._map = segments
        self._logical += len(data)
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
        self._map = None
        while skip > len(self._data) - self._pos:
            skip -= len(self._data) - self._pos
            if not self._fill():
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
        stored = self._number(checksum, "checksum")
        rest = block[:148] + block[156:]
        unsigned = sum(rest) + 256
        if stored != unsigned and stored != unsigned - 256 * sum(byte > 127 for byte in rest):
            self._fail("not a tar header (its checksum is wrong)")

    def _described(self, block: bytes) -> Member | None:
        """The next member where headers before it, or its own type, say more than a plain header can."""
        records: _Records | None = None
        long_path = long_target = b""
        count = 0
        while (flag := block[156:157]) in b"xgLK":
            count += 1
            if count > _EXTENSIONS_PER_MEMBER:
                self._fail(f"more than {_EXTENSIONS_PER_MEMBER} headers that describe one member")
            size = self._size(self._number(block[124:136], "size"))
            if flag == b"x":
                records = self._records(self._take(size, "pax header"))
            elif flag == b"g":
                self._set_global(self._records(self._take(size, "global pax header")))
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

    def _member(self, block: bytes, own: _Records | None, long_path: bytes, long_target: bytes) -> Member:
        """One member from its header, the pax records before it, and GNU's long names, which win."""
        name, mode, uid, gid, size, mtime, _, flag, link, magic, major, minor, prefix = _HEADER.unpack(block)
        values = {**self._global, **own.values} if own else self._global
        kind = _KINDS.get(flag)
        if flag == b"S" and magic == _GNU:
            kind = Kind.FILE
        if kind is None:
            self._fail(f"member of unknown type {flag!r}")

        path = name.partition(b"\0")[0]
        if magic == _USTAR and prefix[0]:
            path = prefix.partition(b"\0")[0] + b"/" + path
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
            length = self._size(self._decimal(recorded, "size") if recorded else self._number(size, "size"))
            self._left, self._padding = length, -length % BLOCK
            if flag == b"S":
                length = self._old_sparse(block)
            elif own is not None and any(key.startswith(b"GNU.sparse.") for key in own.values):
                length = self._pax_sparse(own)
        recorded_uid, recorded_gid = values.get(b"uid"), values.get(b"gid")
        recorded_mtime = values.get(b"mtime")
        return Member(
            str(path, "utf-8", "surrogateescape"),
            kind,
            self._number(mode, "mode") & 0o7777,
            self._id(self._decimal(recorded_uid, "uid") if recorded_uid else self._number(uid, "uid"), "uid"),
            self._id(self._decimal(recorded_gid, "gid") if recorded_gid else self._number(gid, "gid"), "gid"),
            self._time(recorded_mtime) if recorded_mtime else _nanoseconds(self._number(mtime, "mtime")),
            length,
            str(target, "utf-8", "surrogateescape"),
            self._device(magic, major, minor) if kind in (Kind.CHARACTER, Kind.BLOCK) else (0, 0),
            self._xattrs(values),
        )

    def _device(self, magic: bytes, major: bytes, minor: bytes) -> tuple[int, int]:
        if magic not in (_USTAR, _GNU):
            return (0, 0)
        numbers = self._number(major, "major device number"), self._number(minor, "minor device number")
        if not all(0 <= number < 2**32 for number in numbers):
            self._fail(f"a device number of {numbers}")
        return numbers

    # pax records.

    def _records(self, data: bytes) -> _Records:
        """Splits `<length> <key>=<value>\\n` records; an empty value takes the key away again (POSIX `pax`)."""
        values: dict[bytes, bytes] = {}
        sparse: list[bytes] = []
        pos = 0
        # Some writers fill the rest with NUL.
        while pos < len(data) and data[pos]:
            space = data.find(b" ", pos, pos + 10)
            digits = data[pos:space]
            if space < 0 or not digits.isdigit():
                self._fail("malformed pax record")
            end = pos + int(digits)
            equals = data.find(b"=", space, end)
            if end > len(data) or equals <= space + 1 or data[end - 1] != 0x0A:
                self._fail("malformed pax record")
            key, value = data[space + 1 : equals], data[equals + 1 : end - 1]
            if b"\0" in key:
                self._fail("a pax key with NUL in it")
            if key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes"):
                # Format 0.0 repeats these two, in turn.
                if (key == b"GNU.sparse.offset") != (len(sparse) % 2 == 0):
                    self._fail("malformed sparse map")
                sparse.append(value)
            values[key] = value
            pos = end
        return _Records(values, sparse)

    def _set_global(self, records: _Records) -> None:
        for key, value in records.values.items():
            if key in (b"path", b"linkpath", b"size") or key.startswith(b"GNU.sparse."):
                self._fail(f"a global header that sets {_text(key)} of all that follows")
            if key in (b"uid", b"gid", b"mtime") or b".xattr." in key:
                self._global[key] = value
        if sum(len(key) + len(value) for key, value in self._global.items()) > self._limits.pax_record:
            self._fail("global pax headers beyond the limit")

    def _xattrs(self, values: dict[bytes, bytes]) -> Xattrs:
        """star's and GNU tar's `SCHILY.xattr.*`, raw; libarchive's own spelling where only that is there."""
        found: dict[str, bytes] = {}
        for key, value in values.items():
            vendor, dot, name = key.partition(b".xattr.")
            if not dot or vendor not in (b"SCHILY", b"LIBARCHIVE"):
                continue
            # GNU tar spells = and % so, because a pax key ends at the first =; libarchive quotes as in a URL.
            is_raw = vendor == b"SCHILY"
            name = name.replace(b"%3D", b"=").replace(b"%25", b"%") if is_raw else unquote_to_bytes(name)
            if not name or b"\0" in name:
                self._fail("an extended attribute without a name, or with NUL in it")
            text = str(name, "utf-8", "surrogateescape")
            if is_raw:
                found[text] = value
            elif text not in found:
                try:
                    found[text] = base64.b64decode(value + b"=" * (-len(value) % 4), validate=True)
                except binascii.Error:
                    self._fail(f"extended attribute {text!r} is not base64")
        return tuple(sorted(found.items())) if found else ()

    # Sparse files.

    def _old_sparse(self, block: bytes) -> int:
        """GNU's first format: four segments in the header, 21 in each block that follows it. Gives the real size."""
        table, more, real = _OLD_SPARSE.unpack(block)
        numbers = self._old_segments(table)
        data_left, padding = self._left, self._padding
        self._left = self._padding = 0
        blocks = 0
        while more != b"\0":
            blocks += 1
            extension = self._next_block()
            if extension is None:
                self._fail("ends inside a sparse map")
            if blocks * BLOCK > self._limits.pax_record:
                self._fail(f"a sparse map beyond {self._limits.pax_record} bytes")
            numbers += self._old_segments(extension[:504])
            more = extension[504:505]
        self._left, self._padding = data_left, padding
        return self._set_map(numbers, self._number(real, "real size"))

    def _old_segments(self, table: bytes) -> list[int]:
        numbers = []
        for start in range(0, len(table), 24):
            offset, length = table[start : start + 12], table[start + 12 : start + 24]
            if not offset[0]:
                break
            numbers += [self._number(offset, "sparse offset"), self._number(length, "sparse length")]
        return numbers

    def _pax_sparse(self, records: _Records) -> int:
        """GNU's formats 0.0, 0.1 and 1.0. Gives the real size."""
        values = records.values
        real = values.get(b"GNU.sparse.realsize") or values.get(b"GNU.sparse.size")
        if real is None:
            self._fail("a sparse file without its real size")
        version = values.get(b"GNU.sparse.major", b"0"), values.get(b"GNU.sparse.minor", b"0")
        if version == (b"1", b"0"):
            texts = self._leading_map()
        elif version[0] == b"0":
            text = values.get(b"GNU.sparse.map")
            texts = records.sparse if text is None else text.split(b",") if text else []
            if self._decimal(values.get(b"GNU.sparse.numblocks", b""), "number of segments") * 2 != len(texts):
                self._fail("a sparse map of another length than announced")
        else:
            self._fail(f"sparse format {_text(version[0])}.{_text(version[1])} is not known")
        numbers = [self._decimal(text, "sparse map") for text in texts]
        return self._set_map(numbers, self._decimal(real, "real size"))

    def _leading_map(self) -> list[bytes]:
        """Format 1.0: the map precedes the data, decimal lines padded to a block; the first counts the segments."""
        text = b""
        lines: list[bytes] = []
        taken = 0
        wanted = 1
        while len(lines) < wanted:
            taken += BLOCK
            if taken > self._limits.pax_record:
                self._fail(f"a sparse map beyond {self._limits.pax_record} bytes")
            piece = b""
            while len(piece) < BLOCK and (more := self.read(BLOCK - len(piece))):
                piece += more
            if len(piece) < BLOCK:
                self._fail("a sparse map beyond its member")
            *complete, text = (text + piece).split(b"\n")
            lines += complete
            if lines:
                wanted = 1 + 2 * self._decimal(lines[0], "number of segments")
            elif len(text) > BLOCK:
                self._fail("malformed sparse map")
        return lines[1:wanted]

    def _set_map(self, numbers: list[int], real: int) -> int:
        """Makes `read` give holes as zeros, after checking that the segments are in order, inside, and all there."""
        segments = list(zip(numbers[::2], numbers[1::2], strict=True))
        end = 0
        for offset, length in segments:
            if offset < end or length < 0:
                self._fail("a sparse map out of order")
            end = offset + length
        if end > real:
            self._fail("a sparse map beyond the size of its file")
        if sum(numbers[1::2]) != self._left:
            self._fail("a sparse map at odds with the data")
        self._map = segments[::-1]
        self._logical, self._logical_size = 0, real
        return self._size(real)

    # Numbers.

    def _number(self, field: bytes, what: str) -> int:
        """A numeric field: octal digits between blanks and NULs, nothing at all (0), or GNU's base 256."""
        first = field[0]
        if first & 0x80:
            value = int.from_bytes(field, "big")
            bits = 8 * len(field)
            return value - (1 << bits) if first & 0x40 else value - (1 << (bits - 1))
        digits = field.strip(b" \0").partition(b"\0")[0].rstrip(b" ")
        if not digits:
            return 0
        number = _octal(digits)
        if number < 0:
            self._fail(f"{what} is {_text(field)}")
        return number

    def _decimal(self, text: bytes, what: str) -> int:
        if not text.isdigit() or len(text) > 20:
            self._fail(f"{what} is {_text(text)}")
        return int(text)

    def _size(self, size: int) -> int:
        if not 0 <= size < 2**63:
            self._fail(f"a size of {size} bytes")
        return size

    def _id(self, number: int, what: str) -> int:
        if not 0 <= number <= _ID_LIMIT:
            self._fail(f"{what} is {number}")
        return number

    def _time(self, text: bytes) -> int:
        """Decimal seconds with any fraction, exactly to the nanosecond (further digits are cut off)."""
        digits = text.removeprefix(b"-")
        seconds, _, fraction = digits.partition(b".")
        if not seconds.isdigit() or (fraction and not fraction.isdigit()) or len(seconds) > 20:
            self._fail(f"mtime is {_text(text)}")
        whole = int(seconds)
        if whole >= _SECONDS_LIMIT:
            return 0
        nanoseconds = whole * 10**9 + int(fraction[:9].ljust(9, b"0"))
        return -nanoseconds if text != digits else nanoseconds

    def _fail(self, problem: str) -> NoReturn:
        raise ImageError(f"{self._what}: {problem} (before byte {self._before + self._pos} of the tar)")


class _Records(NamedTuple):
    values: dict[bytes, bytes]
    sparse: list[bytes]


def _octal(field: bytes) -> int:
    """A numeric field as nearly all are: digits, then one or two blanks or NULs. -1 for any other."""
    digits = field.rstrip(b"\0 ")
    if digits.isdigit():
        try:
            return int(digits, 8)
        except ValueError:
            return -1
    return -1


def _nanoseconds(seconds: int) -> int:
    return seconds * 10**9 if -_SECONDS_LIMIT < seconds < _SECONDS_LIMIT else 0


def _text(value: bytes) -> str:
    """A piece of the archive for a message, short."""
    return repr(value[:40])

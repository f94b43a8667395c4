"""Takes the compression off a layer: gzip, zstd or none, by what the bytes are, in bounded pieces.

Gzip may have many members (RFC 1952, section 2.2; eStargz has one per file), zstd many frames, skippable ones among
them (RFC 8878, section 3.1; zstd:chunked ends in some). Input that ends early, is damaged, or goes on with something
else is an ImageError; zeros after the last gzip member are padding.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import IO, cast

import zstandard
from isal import igzip_lib

from unpacker.digest import Stream
from unpacker.errors import ImageError

PIECE = 1 << 20
"""The most that is given out at once. Every piece passes the interpreter's lock several times on its way, so that many
small ones cost more than the memory of a few large ones."""

INPUT = 1 << 18
"""The most that is read at once."""

ZSTD_WINDOW = 128 << 20
"""The memory one frame may ask for. It is what `zstd` itself accepts without a flag."""

_GZIP = b"\x1f\x8b"
_ZSTD = b"\x28\xb5\x2f\xfd"
_ZSTD_SKIPPABLE = b"\x2a\x4d\x18"
_FOREIGN = ((0, b"\xfd7zXZ\0", "xz"), (4, b"1AY&SY", "bzip2"), (0, b"\x04\x22\x4d\x18", "lz4"))
_PROBE = 512
_GzipError: type[Exception] = igzip_lib.IsalError  # type: ignore[assignment]  # its stub calls the class an instance
_FIRST_INPUT = 1 << 12


def decompress(stream: Stream, declared: str, what: str) -> Stream:
    """The uncompressed bytes of a layer of which the media type declares `gzip`, `zstd` or `none`.

    Where the first bytes say otherwise they are believed, because registries hold such layers and engines run them;
    what is none of the three is an ImageError. Memory does not depend on how far the input inflates.
    """
    head = b""
    while len(head) < _PROBE and (more := stream.read(_PROBE - len(head))):
        head += more
    found = _compression(head)
    rest = _Rejoined(head, stream)
    if found == "gzip":
        return _Gzip(rest, what)
    if found == "zstd":
        return _Zstd(rest, what)
    if found == "none" or not head:
        return rest  # Nothing at all is what Docker once pushed for empty layers, and engines take it.
    for position, magic, name in _FOREIGN:
        if head[position:].startswith(magic):
            raise ImageError(f"{what}: compressed by {name}, which layers cannot be (expected gzip, zstd or none)")
    if declared == "none":
        return rest
    raise ImageError(f"{what}: declared as {declared}, but neither gzip, zstd nor tar")


def _compression(head: bytes) -> str | None:
    if head.startswith(_GZIP):
        return "gzip"
    if head.startswith(_ZSTD) or _is_skippable(head):
        return "zstd"
    # An empty tar is blocks of zeros; old tars have no mark, and pass only where no compression was declared.
    if head[257:262] == b"ustar" or (len(head) == _PROBE and not head.strip(b"\0")):
        return "none"
    return None


def _is_skippable(head: bytes) -> bool:
    return head[1:4] == _ZSTD_SKIPPABLE and head[0] & 0xF0 == 0x50


class _Rejoined:
    """A stream with its first bytes put back."""

    def __init__(self, head: bytes, rest: Stream) -> None:
        self._head = head
        self._rest = rest

    def read(self, size: int, /) -> bytes:
        if self._head:
            data, self._head = self._head[:size], self._head[size:]
            return data
        return self._rest.read(size)


class _Gzip:
    def __init__(self, stream: Stream, what: str) -> None:
        self._stream = stream
        self._what = what
        self._input = b""
        self._pos = 0
        self._feed = _FIRST_INPUT
        self._started = False
        self._member: igzip_lib.IgzipDecompressor | None = None

    def read(self, size: int, /) -> bytes:
        while size > 0:
            member = self._member or self._begin()
            if member is None:
                return b""
            data = self._next_input() if member.needs_input else b""
            try:
                out: bytes = member.decompress(data, min(size, PIECE))
            except _GzipError as error:
                raise ImageError(f"{self._what}: damaged gzip data ({error})") from None
            self._member = None if member.eof else member
            if member.eof:
                self._pos -= len(member.unused_data)
            if out:
                return out
            # Asked even where there was no input: the library may hold the last few bytes of it back.
            if member.needs_input and not member.eof and not self._available():
                raise ImageError(f"{self._what}: gzip data end early")
        return b""

    def _available(self) -> bool:
        if self._pos >= len(self._input):
            self._input, self._pos = self._stream.read(INPUT), 0
        return bool(self._input)

    def _next_input(self) -> bytes:
        """Input for the current member: little first, then more, because what lies behind its end is copied back,
        and a layer may have a member for every few bytes."""
        self._available()
        data = self._input[self._pos : self._pos + self._feed]
        self._pos += len(data)
        self._feed = min(self._feed * 2, INPUT)
        return data

    def _begin(self) -> igzip_lib.IgzipDecompressor | None:
        """The next member; None, once the input was read to its end, after the last."""
        if not self._available():
            return None
        if self._started and self._input[self._pos] != _GZIP[0]:
            # Zeros are padding.
            while self._available():
                if self._input[self._pos :].strip(b"\0"):
                    raise ImageError(f"{self._what}: something else follows the gzip data")
                self._pos = len(self._input)
            return None
        self._feed = _FIRST_INPUT
        self._started = True
        return igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)


class _Zstd:
    def __init__(self, stream: Stream, what: str) -> None:
        self._what = what
        self._frames = _Frames(stream, what)
        decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW)
        self._reader = decompressor.stream_reader(
            cast(IO[bytes], self._frames), read_size=INPUT, read_across_frames=True, closefd=False
        )

    def read(self, size: int, /) -> bytes:
        try:
            data = self._reader.read(min(size, PIECE))
        except zstandard.ZstdError as error:
            bound = f"windows of more than {ZSTD_WINDOW >> 20} MiB are not read"
            why = f"{error}; {bound}" if "memory" in str(error) else error
            raise ImageError(f"{self._what}: damaged or unsupported zstd data ({why})") from None
        if not data and size > 0:
            self._frames.check_end()
        return data


class _Frames:
    """Zstd data on their way to the decompressor, which itself would take an early end for the end."""

    def __init__(self, stream: Stream, what: str) -> None:
        self._stream = stream
        self._what = what
        self._between_frames = True
        self._grammar = self._frames()
        self._wanted = next(self._grammar)
        self._header = b""

    def read(self, size: int, /) -> bytes:
        data = self._stream.read(size)
        pos, end = 0, len(data)
        while pos < end:
            self._between_frames = False
            if self._wanted < 0:
                step = min(-self._wanted, end - pos)
                pos += step
                self._wanted += step
            else:
                more = data[pos : pos + self._wanted]
                pos += len(more)
                self._wanted -= len(more)
                self._header += more
            while self._wanted == 0:
                header, self._header = self._header, b""
                self._wanted = self._grammar.send(header)
        return data

    def check_end(self) -> None:
        """The decompressor wants no more: right only between two frames, and with nothing behind them."""
        while self.read(INPUT):
            pass
        if not self._between_frames:
            raise ImageError(f"{self._what}: zstd data end early")

    def _frames(self) -> Generator[int, bytes, None]:
        """Frame and block headers (RFC 8878, sections 3.1.1 and 3.1.2): yields how many bytes it needs to see, or,
        negative, how many may pass unseen."""
        while True:
            self._between_frames = True
            magic = yield 4
            if _is_skippable(magic):
                yield -int.from_bytes((yield 4), "little")
                continue
            if magic != _ZSTD:
                raise ImageError(f"{self._what}: something else follows the zstd data")
            descriptor = (yield 1)[0]
            has_window = not descriptor & 0x20
            content_size = (0 if has_window else 1, 2, 4, 8)[descriptor >> 6]
            yield -(has_window + (0, 1, 2, 4)[descriptor & 3] + content_size)
            is_last = False
            while not is_last:
                block = int.from_bytes((yield 3), "little")
                is_last = bool(block & 1)
                is_repeated_byte = block >> 1 & 3 == 1
                yield -(1 if is_repeated_byte else block >> 3)
            if descriptor & 4:
                yield -4  # the checksum, which the decompressor verifies

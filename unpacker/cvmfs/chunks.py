"""Where large files are cut into chunks: by their contents, at the very places where the official tools cut them.

After a change in the middle of a file the cuts fall into place again, so that only the chunks around it are new. The
rule sees the last 32 bytes at each position i as x = XOR over k of byte[i-k] << k, taken to 32 bits, and cuts before
byte i where x is less than THRESHOLD away from the middle of its range.
"""

from __future__ import annotations

from collections.abc import Iterator

from unpacker.digest import Stream
from unpacker.errors import IntegrityError

MINIMUM = 4 << 20
AVERAGE = 8 << 20
MAXIMUM = 16 << 20
"""Sizes of a chunk; a file no larger than the minimum stays whole."""

THRESHOLD = 0xFFFFFFFF // AVERAGE

_MIDDLE = 0x7FFFFFFF
_WINDOW = 1 << 18
_REACH = 31
_LOW_BITS = int.from_bytes(b"\1" * (_WINDOW + _REACH), "little")
_JUST_BELOW = b"\0" + b"\1" * 22
_JUST_ABOVE = b"\1" + b"\0" * 22


def cut(stream: Stream, size: int) -> Iterator[bytes]:
    """The next `size` bytes of a stream in chunks; a few chunks' worth of memory. IntegrityError if it ends before."""
    buffer = bytearray()
    left = size
    while left or buffer:
        while left and len(buffer) < MAXIMUM:
            piece = stream.read(min(left, MAXIMUM - len(buffer), 1 << 20))
            if not piece:
                raise IntegrityError(f"a file of {size} bytes ended after {size - left}")
            left -= len(piece)
            buffer += piece
        end = first_cut(buffer)
        chunk = bytes(memoryview(buffer)[:end])
        del buffer[:end]
        yield chunk


def first_cut(data: bytes | bytearray) -> int:
    """The size of the first chunk of data of which at least `MAXIMUM` bytes are given, or all that there are."""
    stop = min(len(data), MAXIMUM)
    for start in range(MINIMUM, stop, _WINDOW):
        end = min(start + _WINDOW, stop)
        at = _first_hit(data[start - _REACH : end])
        if at is not None:
            return start - _REACH + at
    return stop


def _first_hit(data: bytes | bytearray) -> int | None:
    """The first position from the 32nd on that the rule hits, in a window and what it reaches back to.

    Python has no time to look at each byte. But bits 7 to 31 of x are, for all positions, one stream of bits: bit j
    of x at i is y[i-j], where y[t] = XOR over m < 8 of bit m of byte[t+m]. One large number makes all of y at once, a
    hit needs 0 and 22 times 1, or the reverse, in bits 31 to 9, and a search of strings finds those.
    """
    number = int.from_bytes(data, "little")
    number ^= number >> 9
    number ^= number >> 18
    number ^= number >> 36
    bits = (number & _LOW_BITS).to_bytes(len(data), "little")
    below, above = bits.find(_JUST_BELOW), bits.find(_JUST_ABOVE)
    while below >= 0 or above >= 0:
        if above < 0 or 0 <= below < above:
            at = below + _REACH
            below = bits.find(_JUST_BELOW, below + 1)
        else:
            at = above + _REACH
            above = bits.find(_JUST_ABOVE, above + 1)
        if at >= len(data):
            return None
        if _is_hit(data[at - _REACH : at + 1]):
            return at
    return None


def _is_hit(last: bytes | bytearray) -> bool:
    x = 0
    for byte in last:
        x = (x << 1 ^ byte) & 0xFFFFFFFF
    return abs(x - _MIDDLE) < THRESHOLD

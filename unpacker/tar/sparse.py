"""Sparse files: the maps that say where in a file its stored bytes belong, and the file read with its holes.

Four formats, all GNU tar's ("Storing Sparse Files" in its manual): the old one has its map in the header and in blocks
behind it, 0.0 and 0.1 have it in pax records, and 1.0 in the first blocks of the stored bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct

from unpacker.digest import Stream
from unpacker.tar.fields import Malformed, as_size, decimal, number, shown
from unpacker.tar.pax import Records

BLOCK = 512
_OLD = Struct("386x96sc12s17x")
_ZEROS = bytes(1 << 20)


class Sparse:
    """A sparse file: `size` bytes, of which `segments` (offset and length, in order) are stored, one after another.

    Malformed unless the segments are in order, inside the file, and `stored` bytes together.
    """

    def __init__(self, numbers: list[int], size: int, stored: int) -> None:
        segments = list(zip(numbers[::2], numbers[1::2], strict=True))
        end = 0
        for offset, length in segments:
            if offset < end or length < 0:
                raise Malformed("a sparse map out of order")
            end = offset + length
        if end > size:
            raise Malformed("a sparse map beyond the size of its file")
        if sum(numbers[1::2]) != stored:
            raise Malformed("a sparse map at odds with the data")
        self.size = as_size(size)
        self._segments = segments[::-1]
        """Those not yet read to their end, the next one last."""
        self._pos = 0

    def read(self, size: int, stored: Stream) -> bytes:
        """The next bytes of the file, at most `size` of them; `stored` gives those that are no hole."""
        here = self._pos
        size = min(size, self.size - here)
        if size <= 0:
            return b""
        segments = self._segments
        while segments and sum(segments[-1]) <= here:
            segments.pop()
        start, length = segments[-1] if segments else (self.size, 0)
        in_hole = here < start
        data = _ZEROS[: min(size, start - here)] if in_hole else stored.read(min(size, start + length - here))
        self._pos += len(data)
        return data


def is_sparse(records: Records) -> bool:
    return any(key.startswith(b"GNU.sparse.") for key in records.values)


def old(header: bytes, next_block: Callable[[], bytes | None], stored: int, limit: int) -> Sparse:
    """GNU's first format: four segments in the header, 21 in each block that follows it."""
    table, more, size = _OLD.unpack(header)
    numbers = _old_segments(table)
    blocks = 0
    while more != b"\0":
        blocks += 1
        block = next_block()
        if block is None:
            raise Malformed("ends inside a sparse map")
        if blocks * BLOCK > limit:
            raise Malformed(f"a sparse map beyond {limit} bytes")
        numbers += _old_segments(block[:504])
        more = block[504:505]
    return Sparse(numbers, number(size, "real size"), stored)


def _old_segments(table: bytes) -> list[int]:
    numbers = []
    for start in range(0, len(table), 24):
        offset, length = table[start : start + 12], table[start + 12 : start + 24]
        if not offset[0]:
            break
        numbers += [number(offset, "sparse offset"), number(length, "sparse length")]
    return numbers


def pax(records: Records, content: Stream, stored: int, limit: int) -> Sparse:
    """GNU's formats 0.0, 0.1 and 1.0; of the last, the map is taken from the `content`, which has `stored` bytes."""
    values = records.values
    size = values.get(b"GNU.sparse.realsize") or values.get(b"GNU.sparse.size")
    if size is None:
        raise Malformed("a sparse file without its real size")
    version = values.get(b"GNU.sparse.major", b"0"), values.get(b"GNU.sparse.minor", b"0")
    if version == (b"1", b"0"):
        texts, taken = _leading_map(content, limit)
        stored -= taken
    elif version[0] == b"0":
        text = values.get(b"GNU.sparse.map")
        texts = records.sparse if text is None else text.split(b",") if text else []
        if decimal(values.get(b"GNU.sparse.numblocks", b""), "number of segments") * 2 != len(texts):
            raise Malformed("a sparse map of another length than announced")
    else:
        raise Malformed(f"sparse format {shown(version[0])}.{shown(version[1])} is not known")
    numbers = [decimal(text, "sparse map") for text in texts]
    return Sparse(numbers, decimal(size, "real size"), stored)


def _leading_map(content: Stream, limit: int) -> tuple[list[bytes], int]:
    """Format 1.0: the map precedes the data, decimal lines padded to a block; the first counts the segments.

    Gives the lines after the first, and how many bytes the map took.
    """
    text = b""
    lines: list[bytes] = []
    taken = 0
    wanted = 1
    while len(lines) < wanted:
        taken += BLOCK
        if taken > limit:
            raise Malformed(f"a sparse map beyond {limit} bytes")
        piece = b""
        while len(piece) < BLOCK and (more := content.read(BLOCK - len(piece))):
            piece += more
        if len(piece) < BLOCK:
            raise Malformed("a sparse map beyond its member")
        *complete, text = (text + piece).split(b"\n")
        lines += complete
        if lines:
            wanted = 1 + 2 * decimal(lines[0], "number of segments")
        elif len(text) > BLOCK:
            raise Malformed("malformed sparse map")
    return lines[1:wanted], taken

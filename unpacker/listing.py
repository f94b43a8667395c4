"""The published tree as sorted lines: what `verify` compares a root with, and users search without opening a root.

zstd of one JSON array per line. The first is `["unpacker-listing", 1]`; each other one is

    [path, type, mode, uid, gid, mtime_ns, size, content, {xattr: hex}]

the root (`""`) first, a directory before what is in it, names by their bytes. `type` is a letter of `find -type`;
`content` is the sha256 of a file, the target of a symlink, `major:minor` of a device, else `""`. The xattrs are left
out where there are none. Bytes that are no UTF-8 are escaped surrogates, as Python and JSON have them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import NamedTuple

import zstandard

from unpacker.changeset import Kind, Xattrs
from unpacker.tree import Directory, File, Node, Special, Symlink, Tree, walk

_HEAD = b'["unpacker-listing", 1]'
_LINE = 64 << 20
"""More than any line that can be written: paths, targets and xattrs of an entry are bounded by the layer reader."""
_WINDOW = 8 << 20
_PIECE = 1 << 18
_KINDS = frozenset("fdlcbp")
_BARE_TYPES = (str, str, int, int, int, int, int, str)
_TYPES = frozenset({_BARE_TYPES, (*_BARE_TYPES, dict)})

_quote = json.JSONEncoder().encode


class Row(NamedTuple):
    """One name of a listing. `kind` is the type letter; the rest as the module says."""

    path: str
    kind: str
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    size: int
    content: str
    xattrs: Xattrs = ()


def listing(tree: Tree) -> bytes:
    """The bytes of listing.zst for a tree; the same tree gives the same bytes."""
    lines = [_HEAD.decode("ascii")]
    lines.extend(_line(path, node) for path, node in walk(tree))
    lines.append("")
    return zstandard.ZstdCompressor(level=3, write_checksum=True).compress("\n".join(lines).encode("ascii"))


def read(data: bytes) -> Iterator[Row]:
    """The rows of `listing`'s bytes, one at a time; ValueError when it comes to something else, or to an early end."""
    try:
        lines = _lines(data)
        if next(lines, b"") != _HEAD:
            raise ValueError("not a listing of this version")
        for number, line in enumerate(lines, 2):
            yield _row(line, number)
    except zstandard.ZstdError as error:
        raise ValueError(f"listing is damaged: {error}") from None


def _line(path: str, node: Node) -> str:
    size = 0
    content = '""'
    if type(node) is File:
        # A token of the directory target is the sha256 of the bytes, a dot, and a hash of the metadata.
        letter, size, content = "f", node.size, _quote(node.token.partition(".")[0])
    elif type(node) is Directory:
        letter = "d"
    elif type(node) is Symlink:
        letter, content = "l", _quote(node.target)
    else:
        assert type(node) is Special
        letter = str(node.kind)
        if node.kind is not Kind.FIFO:
            content = f'"{node.device[0]}:{node.device[1]}"'
    xattrs = "," + json.dumps({name: value.hex() for name, value in node.xattrs}) if node.xattrs else ""
    return f'[{_quote(path)},"{letter}",{node.mode},{node.uid},{node.gid},{node.mtime_ns},{size},{content}{xattrs}]'


def _lines(data: bytes) -> Iterator[bytes]:
    left = zstandard.frame_content_size(data)
    if left < 0:
        raise ValueError("listing does not say its length")
    decompressor = zstandard.ZstdDecompressor(max_window_size=_WINDOW)
    parts: list[bytes] = []  # of a line that has not ended yet
    unended = 0
    # A reader gives as much as it is asked for, whatever a few bytes may inflate to; but it takes the end of a cut
    # file for the end of the listing, hence the length.
    with decompressor.stream_reader(data, read_across_frames=True) as reader:
        while piece := reader.read(_PIECE):
            left -= len(piece)
            first, *others = piece.split(b"\n")
            parts.append(first)
            unended += len(first)
            if unended > _LINE:
                raise ValueError("listing has a line longer than any entry")
            if others:
                yield b"".join(parts)
                *lines, last = others
                yield from lines
                parts, unended = [last], len(last)
    if unended or left:
        raise ValueError("listing ends early or late")


def _row(line: bytes, number: int) -> Row:
    """The row of one line; ValueError if it is none."""
    try:
        value = json.loads(line)
        path, kind, mode, uid, gid, mtime_ns, size, content, *more = value
        xattrs = tuple((name, bytes.fromhex(hexadecimal)) for name, hexadecimal in more[0].items()) if more else ()
        row = Row(path, kind, mode, uid, gid, mtime_ns, size, content, xattrs)
        if tuple(map(type, value)) not in _TYPES or kind not in _KINDS:
            raise ValueError("not an entry")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"line {number} of the listing: {error}") from None
    return row

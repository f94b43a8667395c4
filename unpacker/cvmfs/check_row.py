"""What must hold of one row of a catalog by itself, and of the hard links in one directory. Pure."""

from __future__ import annotations

import stat
from collections.abc import Iterator, Sequence

from unpacker.cvmfs.hash import SIZE
from unpacker.cvmfs.row import (
    BIND_MOUNT_POINT,
    CATALOG_ROOT,
    CHUNKED,
    DIRECTORY,
    EXTERNAL,
    FILE,
    MOUNT_POINT,
    SPECIAL,
    SYMLINK,
    Chunk,
    Row,
    decode_xattrs,
)
from unpacker.errors import PublishError

DIRECT_IO = 0x10000

_COMPRESSION = 7 << 11
_COMPRESSIONS = (0, 1 << 11)
_NESTING = MOUNT_POINT | CATALOG_ROOT | BIND_MOUNT_POINT
_SPECIAL_TYPES = (stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK)
_SAME_IN_GROUP = ("hash", "size", "mode", "mtime", "mtimens", "symlink", "hardlinks")


def is_plain(row: Row) -> bool:
    """Whether a row is of a whole file with nothing special about it and nothing wrong with it; nearly all are."""
    return (
        row.flags == FILE
        and row.hardlinks == 1
        and _is(row, stat.S_IFREG)
        and row.hash is not None
        and len(row.hash) == SIZE
        and row.size >= 0
        and row.xattr is None
        and not row.symlink
    )


def _is(row: Row, kind: int) -> bool:
    # The functions of `stat` take no numbers that no file can have.
    return row.mode >> 12 == kind >> 12


def directory_faults(row: Row) -> Iterator[str]:
    """What is wrong with the row of a directory; its link count is for who knows what is in it."""
    if row.flags & (FILE | SYMLINK | SPECIAL | CHUNKED | EXTERNAL | DIRECT_IO):
        yield f"a directory with flags of a file ({row.flags:#x})"
    if (row.flags & _NESTING).bit_count() > 1:
        yield f"a directory with flags that exclude each other ({row.flags:#x})"
    if not _is(row, stat.S_IFDIR):
        yield f"a directory with the mode {row.mode:#o} of something else"
    if row.hash is not None:
        yield "a directory with a content hash"
    if row.hardlinks >> 32:
        yield "a directory in a group of hard links"
    if row.symlink:
        yield "a directory with the target of a symlink"
    yield from _xattr_faults(row)


def file_faults(row: Row, chunks: Sequence[Chunk]) -> Iterator[str]:
    """What is wrong with the row of anything but a directory."""
    if row.flags & (DIRECTORY | _NESTING) or not row.flags & FILE:
        yield f"a file with flags of a directory ({row.flags:#x})"
    if not row.links:
        yield "its link count is 0"
    elif row.links > 1 and not row.hardlinks >> 32:
        yield f"its link count is {row.links}, but it is in no group of hard links"
    yield from _xattr_faults(row)
    if row.flags & SYMLINK:
        yield from _symlink_faults(row)
    elif row.flags & SPECIAL:
        yield from _special_faults(row)
    else:
        yield from _regular_faults(row, chunks)


def _symlink_faults(row: Row) -> Iterator[str]:
    yield from _no_contents(row, "a symlink")
    if not _is(row, stat.S_IFLNK):
        yield f"a symlink with the mode {row.mode:#o} of something else"
    if not row.symlink:
        yield "a symlink without a target"
    elif row.size not in (0, len(row.symlink.encode("utf-8", "surrogateescape"))):
        yield f"a symlink of size {row.size}, which is not the length of its target"


def _special_faults(row: Row) -> Iterator[str]:
    yield from _no_contents(row, "a special file")
    if not any(_is(row, kind) for kind in _SPECIAL_TYPES):
        yield f"a special file with the mode {row.mode:#o} of something else"
    if row.symlink:
        yield "a special file with the target of a symlink"
    if (_is(row, stat.S_IFIFO) or _is(row, stat.S_IFSOCK)) and row.size:
        yield f"a fifo or socket of size {row.size}"


def _no_contents(row: Row, what: str) -> Iterator[str]:
    if row.hash is not None:
        yield f"{what} with a content hash"
    if row.flags & (SYMLINK | SPECIAL) == SYMLINK | SPECIAL or row.flags & (CHUNKED | EXTERNAL):
        yield f"{what} with flags of another file ({row.flags:#x})"
    if row.flags & DIRECT_IO:
        yield f"{what} with the flag of direct input and output"


def _regular_faults(row: Row, chunks: Sequence[Chunk]) -> Iterator[str]:
    if not _is(row, stat.S_IFREG):
        yield f"a regular file with the mode {row.mode:#o} of something else"
    if row.symlink:
        yield "a regular file with the target of a symlink"
    if row.size < 0:
        yield f"a regular file of size {row.size}"
    if row.flags & _COMPRESSION not in _COMPRESSIONS:
        yield f"a regular file in a compression that nobody knows ({row.flags:#x})"
    if not row.flags & CHUNKED:
        if row.hash is None:
            yield "a regular file without a content hash"
        return
    if not chunks:
        yield "a chunked file without chunks"
    at = 0
    for chunk in chunks:
        if chunk.offset != at or chunk.size <= 0:
            yield f"its chunks do not follow each other: at byte {at} is one at {chunk.offset} of {chunk.size} bytes"
            return
        at += chunk.size
    if chunks and at != row.size:
        yield f"its chunks have {at} bytes in sum, the file {row.size}"


def _xattr_faults(row: Row) -> Iterator[str]:
    try:
        decode_xattrs(row.xattr)
    except PublishError:
        yield "its extended attributes are in a form that nobody knows"


def group_faults(children: Sequence[Row], known: set[int]) -> Iterator[str]:
    """What is wrong with the groups of hard links in one directory; `known` gathers the groups of the catalog."""
    groups: dict[int, list[Row]] = {}
    for row in children:
        group = row.hardlinks >> 32
        if group and not row.is_directory:
            groups.setdefault(group, []).append(row)
    for group, members in groups.items():
        names = ", ".join(sorted(ascii(row.name) for row in members)[:5])
        if group in known:
            yield f"the hard links {names} are of a group that another directory has, too"
        if any(row.links != len(members) for row in members):
            yield f"the hard links {names} have another link count than the {len(members)} that they are"
        for name in _SAME_IN_GROUP:
            if len({getattr(row, name) for row in members}) > 1:
                yield f"the hard links {names} differ in {name}"
        known.add(group)

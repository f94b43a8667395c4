"""Published trees against what was recorded of them: every difference by name. Reads only, follows no symlink."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import file_digest

from unpacker import listing
from unpacker.changeset import Xattrs
from unpacker.listing import Row
from unpacker.multiarch import MULTIARCH, VARIANT, Place, leads_to
from unpacker.publish import posix
from unpacker.publish.layout import Layout
from unpacker.publish.roots import FLAT
from unpacker.record import Published, Unreadable

_REMEMBERED = 200_000
"""How many inodes that several roots share are read once only; more cost time, not memory."""

_KINDS = {
    stat.S_IFREG: "f",
    stat.S_IFDIR: "d",
    stat.S_IFLNK: "l",
    stat.S_IFCHR: "c",
    stat.S_IFBLK: "b",
    stat.S_IFIFO: "p",
    stat.S_IFSOCK: "s",
}
_WORDS = {
    "f": "a file",
    "d": "a directory",
    "l": "a symlink",
    "c": "a character device",
    "b": "a block device",
    "p": "a fifo",
    "s": "a socket",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One difference. `path` is inside the root, "" for the root, the record or the link as a whole."""

    public_path: str
    path: str
    what: str


def verify(
    root: str, published: Iterable[Published | Unreadable], *, quick: bool, unlisted: str | None = None
) -> Iterator[Problem]:
    """Every difference between the target at `root` and what stands published there; `quick` reads no contents. Files
    called `unlisted` are the target's own, and in no listing.

    A root of several names is compared once, a difference reported for each of its names. PublishError if the target
    itself cannot be read.
    """
    layout = Layout(root)
    names: dict[str, list[Published]] = {}
    for value in published:
        if isinstance(value, Unreadable):
            yield Problem(public_path=value.public_path, path="", what=value.problem)
        elif value.place is Place.FRONT:
            yield from _verify_link(layout, value)
        else:
            names.setdefault(value.root, []).append(value)
    contents = _Contents()
    for records in names.values():
        for record in records:
            yield from _verify_link(layout, record)
        # By a name that has a listing, if any does: another tool may have made a name of a root of ours.
        listed = min(records, key=lambda record: record.is_adopted)
        for path, what in _verify_root(layout, listed, None if quick else contents, unlisted):
            for record in records:
                yield Problem(public_path=record.public_path, path=path, what=what)


def _verify_link(layout: Layout, record: Published) -> Iterator[Problem]:
    name = record.public_path
    try:
        found = layout.link_root(name)
        if found is None:
            what = "it has no public link"
        elif not leads_to(record.root, found, name):
            what = f"its public link leads to {found or 'nowhere: it is no link'}, the record names {record.root}"
        elif not os.path.exists(f"{layout.path}/{name}") and not _serves_others(layout, record):
            what = f"dangling link: {record.root} does not exist"
        else:
            return
    except OSError as error:
        raise posix.failure(error, f"reading {name} in {layout.path}") from error
    yield Problem(public_path=name, path="", what=what)


def _serves_others(layout: Layout, record: Published) -> bool:
    """Whether a link that leads each machine its own way leads any machine to an image, if not this one."""
    directories = layout.names(MULTIARCH) if record.place is Place.FRONT and VARIANT in record.root else []
    return any(os.path.exists(f"{layout.path}/{MULTIARCH}/{name}/{record.public_path}") for name in directories)


def _verify_root(
    layout: Layout, record: Published, contents: _Contents | None, unlisted: str | None
) -> Iterator[tuple[str, str]]:
    if not record.root.startswith(f"{FLAT}/") and not record.is_adopted:
        yield "", f"the record names {record.root}, which is no root"
        return
    try:
        root_fd = layout.open(record.root)
    except (FileNotFoundError, NotADirectoryError):
        yield "", f"record without root: {record.root} does not exist"
        return
    except OSError as error:
        raise posix.failure(error, f"opening {record.root} in {layout.path}") from error
    if record.is_adopted:
        os.close(root_fd)  # Nobody listed what was in it when another tool made it.
        return
    with posix.Descent(root_fd) as at:
        try:
            data = layout.listing(record)
        except FileNotFoundError:
            yield "", "its listing.zst is missing"
            return
        except OSError as error:
            raise posix.failure(error, f"reading the listing of {record.public_path} in {layout.path}") from error
        rows = 0
        unreadable = "\0"
        try:
            there = (one for one in posix.walk(at) if unlisted is None or one.path.rpartition("/")[2] != unlisted)
            for row, found in _pairs(listing.read(data), there):
                rows += row is not None
                if found is not None and found.problem:
                    unreadable = f"{found.path}/"
                if found is not None or row is None or not row.path.startswith(unreadable):
                    yield from _compare(row, found, contents)
        except ValueError as error:
            yield "", f"its listing.zst is damaged: {error}"
        except OSError as error:
            raise posix.failure(error, f"comparing {record.root} in {layout.path} with its listing") from error
        else:
            if rows - 1 != record.entries:
                yield "", f"its listing.zst has {rows - 1} entries, the record says {record.entries}"


def _pairs(rows: Iterator[Row], found: Iterator[posix.Found]) -> Iterator[tuple[Row | None, posix.Found | None]]:
    """What is listed beside what is there; both come sorted, a directory before what is in it."""
    row, one = next(rows, None), next(found, None)
    while row is not None or one is not None:
        if row is not None and one is not None and row.path == one.path:
            yield row, one
            row, one = next(rows, None), next(found, None)
            continue
        # Names sort by their bytes component by component, so that what is in a directory follows it at once.
        listed = _order(row.path) if row is not None else None
        there = _order(one.path) if one is not None else None
        if there is None or (listed is not None and listed < there):
            yield row, None
            row = next(rows, None)
        else:
            yield None, one
            one = next(found, None)


def _order(path: str) -> list[bytes]:
    return os.fsencode(path).split(b"/") if path else []


class _Contents:
    """Digests of files, those of inodes that several roots share computed once."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], bytes] = {}

    def digest(self, fd: int, own: os.stat_result) -> str:
        inode = (own.st_dev, own.st_ino)
        known = self._known.get(inode)
        if known is None:
            with open(os.dup(fd), "rb", buffering=0) as file:
                known = file_digest(file, "sha256").digest()
            # The pool has one name, this root has another.
            if own.st_nlink > 2 and len(self._known) < _REMEMBERED:
                self._known[inode] = known
        return known.hex()


def _compare(row: Row | None, found: posix.Found | None, contents: _Contents | None) -> Iterator[tuple[str, str]]:
    if found is None:
        assert row is not None
        yield row.path, f"missing: {_WORDS[row.kind]} was published"
        return
    path, own = found.path, found.own
    if own is None:
        yield path, found.problem
        return
    if row is None:
        yield path, f"extra: {_WORDS[_KINDS[stat.S_IFMT(own.st_mode)]]} that was not published"
        return
    kind = _KINDS[stat.S_IFMT(own.st_mode)]
    if kind != row.kind:
        yield path, f"type: {_WORDS[row.kind]} was published, now {_WORDS[kind]}"
        return
    if found.problem:
        yield path, found.problem
    if kind != "l" and stat.S_IMODE(own.st_mode) != row.mode:
        yield path, f"mode: {row.mode:04o} was published, now {stat.S_IMODE(own.st_mode):04o}"
    if (own.st_uid, own.st_gid) != (row.uid, row.gid):
        yield path, f"owner: {row.uid}:{row.gid} was published, now {own.st_uid}:{own.st_gid}"
    if own.st_mtime_ns != row.mtime_ns:
        yield path, f"mtime: {row.mtime_ns / 1e9:.9f} was published, now {own.st_mtime_ns / 1e9:.9f}"
    name = path.rpartition("/")[2]
    if kind == "l":
        target = os.readlink(name, dir_fd=found.fd)
        if target != row.content:
            yield path, f"link target: {row.content!r} was published, now {target!r}"
    elif kind == "d":
        if not found.problem:
            yield from _compare_xattrs(path, row.xattrs, posix.user_xattrs(found.fd))
    elif kind == "f":
        if own.st_size != row.size:
            yield path, f"size: {row.size} was published, now {own.st_size}"
        yield from _compare_file(row, name, found.fd, contents if own.st_size == row.size else None)


def _compare_file(row: Row, name: str, dir_fd: int, contents: _Contents | None) -> Iterator[tuple[str, str]]:
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=dir_fd)
    except PermissionError:
        yield row.path, "contents cannot be read"
        return
    try:
        yield from _compare_xattrs(row.path, row.xattrs, posix.user_xattrs(fd))
        if contents is None:
            return
        try:
            digest = contents.digest(fd, os.fstat(fd))
        except OSError as error:
            yield row.path, f"contents cannot be read: {error.strerror}"
            return
        if digest != row.content:
            yield row.path, f"contents differ: sha256 {row.content} was published, now {digest}"
    finally:
        os.close(fd)


def _compare_xattrs(path: str, published: Xattrs, found: Xattrs) -> Iterator[tuple[str, str]]:
    before, now = dict(published), dict(found)
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            words = [f"{v!r}" if v is not None else "nothing" for v in (before.get(name), now.get(name))]
            yield path, f"xattr {name}: {words[0]} was published, now {words[1]}"

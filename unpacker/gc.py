"""Removes roots that no name refers to, and contents that no root has, after a grace period.

What refers to roots is read to the end before anything is deleted: what cannot be read may refer to anything. A root's
time runs from when it was recorded to have lost its last name, not from any time stamp of a file.
"""

from __future__ import annotations

import os
import posixpath
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from unpacker.errors import PublishError
from unpacker.publish import posix
from unpacker.publish.directory import DirectoryPublisher
from unpacker.publish.layout import LOCK, POOL, ROOTS, TRASH, Layout
from unpacker.publish.roots import FLAT, METADATA, UNREFERENCED, root_path, serialise_unreferenced

_NO_NAMES = frozenset({".flat", ".metadata", ".unpacker", ".layers", ".chains", ".images", "lost+found"})
"""Top-level directories in which no symlink is a name of a root. In all others, and `.multiarch`, every one counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """What was removed, or would be: `roots` by path, how many are `waiting` for their grace period, the number of
    pooled `contents`, the bytes `freed`, the `records` of names that have no link any more."""

    roots: tuple[str, ...]
    waiting: int
    contents: int
    freed: int
    records: tuple[str, ...]


def collect(publisher: DirectoryPublisher, *, grace: float, now: float, dry_run: bool) -> Collected:
    """Removes what has been without a name for more than `grace` seconds at the Unix time `now`, under the lock.

    Only roots that `unpacker` made. A root seen without a name for the first time is recorded, and waits. `dry_run`
    writes nothing at all, not even the lock. PublishError if anything cannot be read; then nothing is deleted.
    """
    if dry_run:
        return _collect(publisher, grace=grace, now=now, dry_run=True)
    with publisher.lock():
        return _collect(publisher, grace=grace, now=now, dry_run=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Due:
    """What to remove: `roots` by path, `records` by public path; since when others have no name (`waiting`), and what
    was recorded of that before."""

    roots: list[str]
    records: list[str]
    waiting: dict[str, int]
    recorded: dict[str, int]


def judge(layout: Layout, *, grace: float, now: float, known_as: str = "") -> Due:
    """What has been without a name for more than `grace` seconds at the Unix time `now`. Links may name the target by
    the path `known_as`, too. PublishError if anything cannot be read that may refer to a root."""
    try:
        recorded = layout.unreferenced()
        named = _named_roots(layout, known_as)
        ours = list(_roots(layout))
        leftover = [path for path in layout.records() if layout.is_leftover(path)]
        old = [path for path in leftover if _modified(layout, f"{METADATA}/{path}") <= now - grace]
    except ValueError as error:
        raise PublishError(
            f"{layout.path}/{UNREFERENCED} is damaged ({error}): nothing is deleted; remove that file, and the grace "
            "period of all roots without a name starts now"
        ) from error
    except OSError as error:
        raise posix.failure(error, f"reading what refers to roots in {layout.path} (nothing is deleted)") from error
    times = {root: recorded.get(root, int(now)) for root in ours if root not in named}
    due = sorted(root for root, since in times.items() if since <= now - grace)
    waiting = {root: since for root, since in times.items() if root not in due}
    return Due(roots=due, records=sorted(old), waiting=waiting, recorded=recorded)


def _collect(publisher: DirectoryPublisher, *, grace: float, now: float, dry_run: bool) -> Collected:
    layout = publisher.layout
    due = judge(layout, grace=grace, now=now)
    try:
        if dry_run:
            contents, freed = _contents_without(layout, due.roots, now - grace)
        else:
            began = _file_system_time(layout)
            for root in due.roots:
                _delete_root(layout, posixpath.basename(root))
            for path in due.records:
                layout.remove_record(path)
            if due.waiting != due.recorded:
                # After the deleting, which may be what makes room for this file.
                layout.replace_file(UNREFERENCED, serialise_unreferenced(due.waiting))
            contents, freed = _delete_contents(layout, now - grace, began)
    except OSError as error:
        raise posix.failure(error, f"collecting garbage in {layout.path}") from error
    return Collected(
        roots=tuple(due.roots),
        waiting=len(due.waiting),
        contents=contents,
        freed=freed,
        records=tuple(due.records),
    )


def _named_roots(layout: Layout, known_as: str) -> set[str]:
    """The roots that a symlink leads to: public names, other views of them, and what an operator linked by hand."""
    named: set[str] = set()
    real = os.path.realpath(layout.path)
    pending = [""]
    while pending:
        directory = pending.pop()
        try:
            with os.scandir(f"{layout.path}/{directory}") as found:
                entries = list(found)
        except FileNotFoundError:
            if directory:
                raise
            return named  # The target was never made.
        for entry in entries:
            path = f"{directory}/{entry.name}" if directory else entry.name
            if path in _NO_NAMES:
                continue
            if entry.is_symlink():
                target = os.readlink(f"{layout.path}/{path}")
                for base in (layout.path, real, known_as or real):
                    if target.startswith(f"{base}/"):
                        target = os.path.relpath(target, f"{base}/{directory}")
                root = posixpath.normpath(posixpath.join(directory, target))
                # A link into a root keeps that root, too.
                named.add("/".join(root.split("/")[:3]))
            elif entry.is_dir(follow_symlinks=False):
                pending.append(path)
    return named


def _roots(layout: Layout) -> Iterator[str]:
    for name in layout.names(ROOTS):
        # Where only the directory is missing, a run was killed before its rename; facts alone are cleaned elsewhere.
        stem, suffix = posixpath.splitext(name)
        if suffix == ".json" and os.path.lexists(f"{layout.path}/{root_path(stem)}"):
            yield root_path(stem)


def _modified(layout: Layout, path: str) -> float:
    return os.stat(f"{layout.path}/{path}", follow_symlinks=False).st_mtime


def _file_system_time(layout: Layout) -> int:
    # The clock of the file system, which may be another machine's, as the change times of files show it. Asked of a
    # file that exists: on a full disk there may be no inode for another one.
    os.chmod(f"{layout.path}/{LOCK}", 0o644)
    return os.stat(f"{layout.path}/{LOCK}").st_ctime_ns


def _delete_root(layout: Layout, name: str) -> None:
    # A rename first: a root is whole under its name, or not there.
    group = layout.open(f"{FLAT}/{name[:2]}")
    trash = layout.open(TRASH)
    try:
        if not posix.keeps_owners():
            # Who is not root can move a directory to another parent only with write permission on itself.
            os.chmod(name, 0o700, dir_fd=group)
        os.rename(name, name, src_dir_fd=group, dst_dir_fd=trash)
        for suffix in ("zst", "json"):
            try:
                os.unlink(f"{layout.path}/{ROOTS}/{name}.{suffix}")
            except FileNotFoundError:
                pass
        posix.remove_tree(name, trash)
    finally:
        os.close(trash)
        os.close(group)


def _delete_contents(layout: Layout, before: float, began: int) -> tuple[int, int]:
    """Deletes contents that no root has: those that changed last before that time, and those that lost their last
    root now, under this lock, since `began`."""
    contents = freed = 0
    for path, own in _contents(layout):
        if own.st_nlink == 1 and (own.st_ctime <= before or own.st_ctime_ns >= began):
            os.unlink(path)
            contents += 1
            freed += own.st_blocks * 512
    return contents, freed


def _contents_without(layout: Layout, roots: list[str], before: float) -> tuple[int, int]:
    """What `_delete_contents` would delete once these roots are gone."""
    links: Counter[int] = Counter()
    for root in roots:
        with posix.Descent(layout.open(root)) as at:
            for found in posix.walk(at):
                if found.own is not None and stat.S_ISREG(found.own.st_mode) and found.own.st_nlink > 1:
                    links[found.own.st_ino] += 1
    contents = freed = 0
    for _, own in _contents(layout):
        lost = links[own.st_ino]
        if own.st_nlink - lost == 1 and (lost or own.st_ctime <= before):
            contents += 1
            freed += own.st_blocks * 512
    return contents, freed


def _contents(layout: Layout) -> Iterator[tuple[str, os.stat_result]]:
    for group in layout.names(POOL):
        directory = f"{layout.path}/{POOL}/{group}"
        for name in layout.names(f"{POOL}/{group}"):
            path = f"{directory}/{name}"
            yield path, os.stat(path, follow_symlinks=False)

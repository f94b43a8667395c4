"""One transaction of `cvmfs_server`, written into the union mount: what a directory transaction writes, and more.

What is more: every tree as the repository will hold it; markers that tell the official tools where catalogs are cut,
in roots and in directories on the way to names; and no index, which the native writer makes anew from the records.
Nothing is visible to clients before the transaction is published, so no order is kept and nothing is synced.
"""

from __future__ import annotations

import os
import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from unpacker.contracts import Release
from unpacker.cvmfs.cuts import fans_out
from unpacker.cvmfs.row import MARKER
from unpacker.errors import PublishError
from unpacker.publish import index, posix
from unpacker.publish.holdable import Abilities, held, marked
from unpacker.publish.layout import OURS, ROOTS, TXN, Layout
from unpacker.publish.pool import PoolLinks
from unpacker.publish.roots import (
    FLAT,
    METADATA,
    UNREFERENCED,
    serialise_unreferenced,
)
from unpacker.publish.transaction import DirectoryTransaction, Link
from unpacker.record import Published, Unreadable
from unpacker.tree import File, Tree


class ServerTransaction(DirectoryTransaction):
    """Made, committed and closed by `ServerPublisher.transaction`, within an open transaction of ours."""

    def __init__(
        self,
        layout: Layout,
        before: dict[str, Published | Unreadable],
        made: set[str],
        *,
        pool: str,
        abilities: Abilities,
        is_nested: bool,
    ) -> None:
        """Makes what a target has, where it is not there yet. OSError as it comes."""
        os.makedirs(layout.path, exist_ok=True)
        for name in (FLAT, METADATA, OURS, ROOTS, TXN):
            os.close(layout.open(name, create=True))
        _take_over_index(layout)
        super().__init__(layout, before, made, pool=pool, write=_write_marked, durable=False)
        self._links = _Copies(layout.path, self._pool_fd, self._txn_fd)
        self._abilities = abilities
        self._is_nested = is_nested
        self._dropped: tuple[list[str], list[str]] = ([], [])
        self._waiting: Mapping[str, int] | None = None

    # Preparing -------------------------------------------------------------------------------------------------------

    def publish(self, release: Release) -> Published:
        """As every publisher's. What the repository cannot hold is left out, and counted in the record."""
        if release.tree is not None:
            tree, altered = held(release.tree, self._abilities)
            counts = Counter(release.record.altered)
            counts.update(altered)
            self._tell(release.record, altered)
            record = replace(release.record, altered=dict(sorted(counts.items())))
            release = replace(release, tree=tree, record=record)
        return super().publish(release)

    def drop(self, roots: Sequence[str], records: Sequence[str], waiting: Mapping[str, int]) -> None:
        """Takes away roots that no name refers to, and records without a name, for gc; `waiting` says since when other
        roots have no name."""
        self._dropped = (list(roots), list(records))
        self._waiting = dict(waiting)

    # Committing ------------------------------------------------------------------------------------------------------

    def commit(self) -> bool:
        """Writes everything into the union mount; gives whether there was anything. OSError as it comes."""
        roots = [f"{FLAT}/{staged.name[:2]}/{staged.name}" for staged in self._staged.values()]
        names = [*self._records, *(f"{METADATA}/{path}" for path in self._records)]
        gone = [*self._removed, *(f"{METADATA}/{path}" for path in self._removed)]
        has_changed = super().commit()
        if self._waiting is not None:
            self._drop()
            gone += [*self._dropped[0], *(f"{METADATA}/{path}" for path in self._dropped[1])]
            has_changed = True
        if has_changed:
            for path in gone:
                self._remove_bare(posixpath.dirname(path))
            self._mark((*roots, *names, f"{ROOTS}/*", f"{METADATA}/*"))
        return has_changed

    def _drop(self) -> None:
        roots, records = self._dropped
        for root in roots:
            parent, name = posixpath.split(root)
            fd = self._layout.open(parent)
            try:
                posix.remove_tree(name, fd)
            finally:
                os.close(fd)
            for suffix in ("json", "zst"):
                _unlink(f"{self._layout.path}/{ROOTS}/{name}.{suffix}")
        for path in records:
            self._layout.remove_record(path)
        posix.write_file("waiting", self._txn_fd, serialise_unreferenced(self._waiting or {}))
        os.rename("waiting", UNREFERENCED, src_dir_fd=self._txn_fd, dst_dir_fd=self._root_fd)

    def _write_listing(self, source: str, name: str) -> None:
        # A copy: the official tools cannot hold one file in two directories. The bytes are stored once all the same.
        posix.write_file(name, self._txn_fd, self._layout.read(f"{ROOTS}/{source}", None))

    def _mark(self, paths: Iterable[str]) -> None:
        """Puts a marker in each directory on the way to these paths that is to be a catalog."""
        directories = {directory for path in paths for directory in _above(path)}
        wanted = {directory for directory in directories if fans_out(directory)} | {ROOTS}
        if self._is_nested:
            wanted.add("")
        for directory in sorted(wanted):
            fd = self._layout.open(directory)
            try:
                posix.write_file(MARKER, fd, b"")
            except FileExistsError:
                pass
            finally:
                os.close(fd)

    def _remove_bare(self, directory: str) -> None:
        """Removes a directory on the way to names that has nothing but its marker any more, and those above it."""
        while directory not in ("", METADATA, FLAT):
            names = self._layout.names(directory)
            if names not in ([], [MARKER]):
                return
            if names:
                _unlink(f"{self._layout.path}/{directory}/{MARKER}")
            self._layout.remove_empty(directory)
            directory = posixpath.dirname(directory)

    # Ending ----------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Takes away what only the transaction itself needed."""
        super().close()
        try:
            os.rmdir(f"{self._layout.path}/{TXN}")
        except OSError:
            pass  # What stopped the transaction must be heard; then it is aborted as a whole.


class _Copies(PoolLinks):
    """Makes files of their own of what is in the pool: they may have other times and attributes than there."""

    def link(self, file: File, name: str, dir_fd: int) -> None:
        try:
            self._copy(file, name, dir_fd)
        except FileNotFoundError as error:
            raise PublishError(
                f"the pool does not hold content {file.token} of {name!r} any more; run again, and it is read again"
            ) from error


def _write_marked(tree: Tree, name: str, dir_fd: int, link: Link) -> tuple[int, int]:
    """As `posix.write_tree`, with markers, which are not counted."""
    whole, markers = marked(tree)
    entries, size = posix.write_tree(whole, name, dir_fd, link)
    return entries - markers, size


def _take_over_index(layout: Layout) -> None:
    """Takes the native writer's index away, which would not be true any more, and keeps what it knows of roots.

    They are kept as roots that are not to be published again, because there is no listing of them.
    """
    for part in _parts(layout):
        for name, line in part.roots.items():
            facts = part.facts(name)
            if line and facts is not None and layout.facts(name) is None:
                fd = layout.open(ROOTS)
                try:
                    posix.write_file(f"{name}.json", fd, replace(facts, damaged=True).serialise())
                finally:
                    os.close(fd)
    fd = layout.open(METADATA)
    try:
        for path in (index.DIRECTORY, index.OLD):
            posix.remove_tree(posixpath.basename(path), fd)
    finally:
        os.close(fd)


def _parts(layout: Layout) -> Iterator[index.Part]:
    for name in layout.names(index.DIRECTORY):
        if name in index.NUMBERS:
            try:
                yield index.Part.parse(layout.read(f"{index.DIRECTORY}/{name}", index.LIMIT))
            except ValueError:
                continue  # Roots that nothing is known of stay where they are.


def _above(path: str) -> Iterator[str]:
    while path := posixpath.dirname(path):
        yield path


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass

"""One transaction on a directory target: what it prepares, and the order in which it becomes visible.

    bytes → sync → roots → sync → records → sync → links → sync

Everything is written under temporary names and renamed after the sync that made it durable, so that a kill at any
point leaves every public link equal to its record: a record says what its name stood for before (`replaces`), and the
link tells which of the two is in force. Roots are staged beside their final names (`.flat/xx/.<root>.<transaction>`)
and not in `.unpacker/txn`, because a user who is not root can move a read-only directory only within its parent.
"""

from __future__ import annotations

import os
import posixpath
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

from unpacker import listing, multiarch
from unpacker.contracts import Release
from unpacker.digest import Digest
from unpacker.errors import PublishError
from unpacker.multiarch import MULTIARCH, Place
from unpacker.publish import posix
from unpacker.publish.layout import POOL, ROOTS, TXN, Layout
from unpacker.publish.names import NameChanges
from unpacker.publish.pool import PoolLinks
from unpacker.publish.roots import (
    FLAT,
    METADATA,
    UNREFERENCED,
    RootFacts,
    free_name,
    root_path,
    serialise_unreferenced,
)
from unpacker.record import Published, Unreadable
from unpacker.tree import File, Tree

STAGED = ".publish-"
"""In the names that roots have before they are in place."""

Link = Callable[[File, str, int], None]
"""Makes a name of a file in an open directory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Staged:
    """A root written under a temporary name, not yet in place."""

    name: str
    temporary: str
    facts: RootFacts


class DirectoryTransaction(NameChanges):
    """Made, committed and closed by `DirectoryPublisher.transaction`, under the target's lock."""

    def __init__(
        self,
        layout: Layout,
        before: dict[str, Published | Unreadable],
        made: set[str],
        *,
        pool: str | None = None,
        write: Callable[[Tree, str, int, Link], tuple[int, int]] = posix.write_tree,
        durable: bool = True,
    ) -> None:
        """`made` are the roots placed under this lock; those of this transaction are added. OSError as it comes, and
        then nothing is left open.

        `pool` is the directory of the contents, if it is not the target's own; `write` writes a root, as
        `posix.write_tree` does. Not `durable` is for who makes all of it durable, and visible, in a step of its own.
        """
        super().__init__(layout.path, before.get)
        self._layout = layout
        self._write = write
        self._durable = durable
        self._made = made
        self._before = before
        self._name = f"{STAGED[1:]}{os.getpid()}-{secrets.token_hex(6)}"
        self._staged: dict[tuple[str, str], _Staged] = {}
        self._damaged: set[str] = set()
        self._fds: list[int] = []
        self._has_halves = False
        try:
            # Open before anything is written, so that the syncs hear of every page that was lost.
            self._root_fd = self._opened("")
            self._pool_fd = self._opened(POOL) if pool is None else self._opened_elsewhere(pool)
            self._roots_fd = self._opened(ROOTS)
            os.mkdir(f"{layout.path}/{TXN}/{self._name}", 0o700)
            self._txn_fd = self._opened(f"{TXN}/{self._name}")
        except OSError:
            self.close()
            raise
        self._links = PoolLinks(layout.path, self._pool_fd, self._txn_fd)

    def _opened(self, path: str) -> int:
        fd = self._layout.open(path)
        self._fds.append(fd)
        return fd

    def _opened_elsewhere(self, path: str) -> int:
        fd = os.open(path, posix.DIRECTORY_FLAGS)
        self._fds.append(fd)
        return fd

    # Preparing -------------------------------------------------------------------------------------------------------

    def publish(self, release: Release) -> Published:
        """Composes the root (unless it exists) where nobody sees it, and completes the record. If this raises, the
        transaction is as it was before. `altered` is what the release's record says, or that of the root at hand.

        A tree for a name that has this very root already (and did before this run) asks for another one: the root is
        damaged. It keeps the names that it has, and is never published again.
        """
        record = release.record
        key = (record.image_id, record.rules)
        before = self._before.get(record.public_path)
        self._check_place(record.public_path)
        if release.adopted is not None:
            return self._adopt(release, release.adopted)
        try:
            staged = self._staged.get(key)
            root = root_path(staged.name) if staged else self._layout.root(*key)
            damaged = None
            if staged is None and root is not None and release.tree is not None and root not in self._made:
                damaged = root if isinstance(before, Published) and before.root == root else None
            if damaged:
                root = None
            if root is None:
                staged = self._staged[key] = self._compose(release)
                root = root_path(staged.name)
            if damaged:
                self._damaged.add(posixpath.basename(damaged))
            facts = staged.facts if staged else self._layout.facts(posixpath.basename(root))
        except OSError as error:
            raise posix.failure(error, f"composing the root of {record.reference} in {self._layout.path}") from error
        if facts is None:
            raise PublishError(f"{root} in {self._layout.path} vanished while it was being published; run again")
        return self._record(facts.completed(record, root, before), release.image.manifest.raw)

    def _stands(self, root: str) -> bool:
        return os.path.isdir(f"{self._layout.path}/{root}")

    def _facts_of(self, name: str) -> RootFacts | None:
        try:
            return self._layout.facts(name)
        except OSError as error:
            raise posix.failure(error, f"reading what is known of {root_path(name)} in {self._layout.path}") from error

    def _check_place(self, public_path: str) -> None:
        """PublishError if something that is not ours stands in the place of a name, or on the way there."""
        super()._check_place(public_path)
        try:
            obstacle = self._layout.obstacle(public_path)
        except OSError as error:
            raise posix.failure(error, f"looking for the place of {public_path} in {self._layout.path}") from error
        if obstacle is not None:
            raise PublishError(
                f"{self._layout.path}/{obstacle} stands where a directory belongs: move it away, and the next run "
                f"publishes {public_path}"
            )

    def _compose(self, release: Release) -> _Staged:
        record, tree = release.record, release.tree
        if tree is None:
            raise PublishError(f"{self._layout.path} has no sound root of {record.image_id} any more; run again")
        name = self._free_name(record.image_id)
        temporary = f".{name}.{self._name}"
        parent = self._layout.open(f"{FLAT}/{name[:2]}", create=True)
        try:
            entries, size = self._write(tree, temporary, parent, self._links.link)
            facts = RootFacts(
                image_id=record.image_id,
                rules=record.rules,
                entries=entries,
                size=size,
                altered=dict(record.altered),
                layers=record.layers,
            )
            posix.write_file(f"{name}.zst", self._txn_fd, listing.listing(tree))
            posix.write_file(f"{name}.json", self._txn_fd, facts.serialise())
        except BaseException:
            self._sweep(temporary, parent)
            for suffix in ("zst", "json"):
                self._sweep(f"{name}.{suffix}", self._txn_fd)
            raise
        finally:
            os.close(parent)
        return _Staged(name=name, temporary=temporary, facts=facts)

    def _free_name(self, image_id: str) -> str:
        # Whatever is there, ours or foreign, is left alone: a root is never changed once it has its name.
        hexadecimal = Digest.parse(image_id).hex
        taken = {*self._layout.names(f"{FLAT}/{hexadecimal[:2]}"), *(staged.name for staged in self._staged.values())}
        return free_name(image_id, taken)

    # Committing ------------------------------------------------------------------------------------------------------

    def commit(self) -> bool:
        """Publishes, in the order that this module promises; gives whether there was anything. OSError as it comes."""
        if not (self._staged or self._records or self._removed or self._notes):
            return False
        self._has_halves = True
        # A sync with nothing to make durable for the next step would only cost its time.
        if self._staged or self._damaged:
            self._mark_damaged()
            self._sync()
            self._links.settle()
            self._place_roots()
        self._write_records()
        self._sync()
        self._place_records()
        if self._records:
            self._sync()
        self._switch_links()
        self._unpublish()
        self._has_halves = False
        self._sync()
        return True

    def _sync(self) -> None:
        if self._durable:
            posix.syncfs(self._root_fd)

    def _mark_damaged(self) -> None:
        for name in self._damaged:
            facts = self._layout.facts(name)
            if facts is not None:
                data = replace(facts, damaged=True).serialise()
                posix.write_file(f"{name}.json", self._txn_fd, data)

    def _place_roots(self) -> None:
        for name in self._damaged:
            os.rename(f"{name}.json", f"{name}.json", src_dir_fd=self._txn_fd, dst_dir_fd=self._roots_fd)
        for key, staged in list(self._staged.items()):
            # The facts first: a root without facts counts as another tool's.
            for suffix in ("zst", "json"):
                name = f"{staged.name}.{suffix}"
                os.rename(name, name, src_dir_fd=self._txn_fd, dst_dir_fd=self._roots_fd)
            parent = self._layout.open(f"{FLAT}/{staged.name[:2]}")
            try:
                os.rename(staged.temporary, staged.name, src_dir_fd=parent, dst_dir_fd=parent)
            finally:
                os.close(parent)
            self._made.add(root_path(staged.name))
            del self._staged[key]

    def _write_records(self) -> None:
        for i, (path, (record, manifest)) in enumerate(self._records.items()):
            posix.write_file(f"{i}.record", self._txn_fd, record.serialise())
            os.symlink("../" * path.count("/") + record.root, f"{i}.link", dir_fd=self._txn_fd)
            if "manifest.json" in _beside(record):
                posix.write_file(f"{i}.manifest.json", self._txn_fd, manifest)
            if "listing.zst" in _beside(record):
                self._write_listing(f"{posixpath.basename(record.root)}.zst", f"{i}.listing.zst")
        for name, facts in self._adopted.items():
            posix.write_file(f"{name}.json", self._txn_fd, facts.serialise())
        posix.write_file("unreferenced", self._txn_fd, serialise_unreferenced(self._unreferenced()))
        for name, data in self._notes.items():
            posix.write_file(f"note.{name}", self._txn_fd, data)

    def _write_listing(self, source: str, name: str) -> None:
        try:
            os.link(source, name, src_dir_fd=self._roots_fd, dst_dir_fd=self._txn_fd, follow_symlinks=False)
        except OSError:
            # No links on this file system, or no more of this one. What else may be wrong, reading it will tell.
            posix.write_file(name, self._txn_fd, self._layout.read(f"{ROOTS}/{source}", None))

    def _place_records(self) -> None:
        for name in self._adopted:
            os.rename(f"{name}.json", f"{name}.json", src_dir_fd=self._txn_fd, dst_dir_fd=self._roots_fd)
        for i, (path, (record, _)) in enumerate(self._records.items()):
            fd = self._layout.open(f"{METADATA}/{path}", create=True)
            try:
                # The record first: it tells that what lies beside it is not yet of the root that the link leads to.
                os.rename(f"{i}.record", "record.json", src_dir_fd=self._txn_fd, dst_dir_fd=fd)
                for name in ("manifest.json", "listing.zst"):
                    if name in _beside(record):
                        os.rename(f"{i}.{name}", name, src_dir_fd=self._txn_fd, dst_dir_fd=fd)
                    elif isinstance(record.replaces, Published):
                        with suppress(FileNotFoundError):
                            os.unlink(name, dir_fd=fd)  # of the image that the name stood for before
            finally:
                os.close(fd)
        os.rename("unreferenced", UNREFERENCED, src_dir_fd=self._txn_fd, dst_dir_fd=self._root_fd)
        for name in self._notes:
            os.rename(f"note.{name}", f"{METADATA}/{name}", src_dir_fd=self._txn_fd, dst_dir_fd=self._root_fd)

    def _switch_links(self) -> None:
        self._link_aliases()
        # A front last: what it leads to is there before it.
        fronts_last = sorted(enumerate(self._records.items()), key=lambda each: each[1][1][0].place is Place.FRONT)
        for i, (path, _) in fronts_last:
            directory, name = posixpath.split(path)
            fd = self._layout.open(directory, create=True)
            try:
                os.rename(f"{i}.link", name, src_dir_fd=self._txn_fd, dst_dir_fd=fd)
            finally:
                os.close(fd)

    def _link_aliases(self) -> None:
        platforms = (record.platform for record, _ in self._records.values() if record.place is Place.PLATFORM)
        missing = multiarch.aliases({multiarch.directory(platform) for platform in platforms})
        if missing:
            fd = self._layout.open(MULTIARCH, create=True)
            try:
                for alias, directory in missing.items():
                    with suppress(FileExistsError):  # made before, or another tool's
                        os.symlink(directory, alias, dir_fd=fd)
            finally:
                os.close(fd)

    def _unpublish(self) -> None:
        # A front first: what it leads to is there until it has gone.
        for path in sorted(self._removed, key=lambda path: path.startswith(f"{MULTIARCH}/")):
            directory, name = posixpath.split(path)
            fd = self._layout.open(directory)
            try:
                os.unlink(name, dir_fd=fd)
            finally:
                os.close(fd)
            self._layout.remove_record(path)
            self._layout.remove_empty(directory)

    def _unreferenced(self) -> dict[str, int]:
        try:
            recorded = self._layout.unreferenced()
        except ValueError:
            # Damaged: roots without a name get the time of the next gc, so that their grace period starts later.
            recorded = {}
        before = {path: root for path in self._before if (root := self._layout.link_root(path))}
        after = {path: root for path, root in before.items() if path not in self._removed}
        after.update((path, record.root) for path, (record, _) in self._records.items())
        named = set(after.values())
        lost: dict[str, int] = {}
        for path, root in before.items():
            if root not in named and root.startswith(f"{FLAT}/"):
                time = self._removed[path] if path in self._removed else self._records[path][0].published
                lost[root] = max(time, lost.get(root, time))
        return {root: time for root, time in recorded.items() if root not in named} | lost

    # Ending ----------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Takes away what is left under temporary names, the transaction's own directory last, and closes."""
        for staged in self._staged.values():
            self._sweep_below(f"{FLAT}/{staged.name[:2]}", staged.temporary)
        if not self._has_halves:
            # Else it tells the next holder of the lock, as after a kill, that there may be records without links.
            self._sweep_below(TXN, self._name)
        while self._fds:
            os.close(self._fds.pop())

    def _sweep_below(self, directory: str, name: str) -> None:
        try:
            fd = self._layout.open(directory)
        except OSError:
            return
        try:
            self._sweep(name, fd)
        finally:
            os.close(fd)

    @staticmethod
    def _sweep(name: str, dir_fd: int) -> None:
        try:
            posix.remove_tree(name, dir_fd)
        except OSError:
            pass  # What stopped the transaction must be heard; what is left, the next holder of the lock removes.


def _beside(record: Published) -> tuple[str, ...]:
    """The files that a name has beside its record. A front is no image; another tool's root was never listed."""
    if record.place is Place.FRONT:
        return ()
    return ("manifest.json",) if record.is_adopted else ("manifest.json", "listing.zst")

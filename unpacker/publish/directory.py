"""The directory target: roots of hard links, records, and public names as symlinks, in a directory of this host."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from unpacker import lock
from unpacker.errors import PublishError
from unpacker.multiarch import Place
from unpacker.publish import posix
from unpacker.publish.layout import LOCK, OURS, POOL, ROOTS, TRASH, TXN, Layout
from unpacker.publish.pool import ContentPool
from unpacker.publish.roots import FLAT, METADATA, root_path
from unpacker.publish.transaction import STAGED, DirectoryTransaction
from unpacker.publish.view import DirectoryView
from unpacker.record import Published, Unreadable


class DirectoryPublisher:
    """The Publisher whose target is the directory `root` of this host; the first lock makes it."""

    def __init__(self, root: str) -> None:
        self.layout = Layout(os.path.abspath(root))
        self._contents = ContentPool(self.path)
        self._guard = threading.Lock()
        self._depth = 0
        self._held = ExitStack()
        self._made: set[str] = set()
        self._in_transaction = False

    @property
    def marker(self) -> str | None:
        """What files in roots are called that are the target's own, and no part of an image."""
        return None

    @property
    def wants_layers(self) -> bool:
        return False

    @property
    def fills_in_variables(self) -> bool:
        return False

    @property
    def path(self) -> str:
        """The absolute path of the target."""
        return self.layout.path

    @property
    def contents(self) -> ContentPool:
        return self._contents

    @property
    def keeps_owners(self) -> bool:
        """Whether files get the owners they have in the image, instead of the user who publishes."""
        return posix.keeps_owners()

    # The lock --------------------------------------------------------------------------------------------------------

    @contextmanager
    def lock(self, wait: float = 0) -> Iterator[None]:
        """Excludes every other run and gc on this target; Busy names the holder. Cleans what a killed one left."""
        with self._guard:
            if not self._depth:
                self._held = self._acquire(wait)
                self._made = set()
            self._depth += 1
        try:
            yield
        finally:
            with self._guard:
                self._depth -= 1
                if not self._depth:
                    self._held.close()

    def _acquire(self, wait: float) -> ExitStack:
        try:
            self._prepare()
        except FileExistsError as error:
            raise PublishError(f"the target {self.path} is no directory: name another, or move that away") from error
        except OSError as error:
            raise posix.failure(error, f"preparing the target {self.path}") from error
        try:
            with ExitStack() as stack:
                stack.enter_context(lock.exclusive(f"{self.path}/{LOCK}", f"the target {self.path}", wait))
                self._clean()
                return stack.pop_all()
        except OSError as error:
            raise posix.failure(error, f"locking the target {self.path}") from error

    def _prepare(self) -> None:
        if not os.path.isdir(self.path):
            os.makedirs(self.path, 0o755, exist_ok=True)
            # Whatever the mask of who runs this: what is published is for all to read.
            os.chmod(self.path, 0o755)
        for name in (FLAT, METADATA):
            os.close(self.layout.open(name, create=True))
        for name in (OURS, POOL, ROOTS, TXN, TRASH):
            # Not for others: contents lie here before their image is public.
            try:
                os.mkdir(f"{self.path}/{name}", 0o700)
                # A set-gid directory would hand its group down to the contents.
                os.chmod(f"{self.path}/{name}", 0o700)
            except FileExistsError:
                pass

    def _clean(self) -> None:
        """Removes what a killed run left under temporary names, and the halves of names it left. Nobody is using
        them: whoever holds the lock is alone."""
        groups = [name for name in self.layout.names(FLAT) if len(name) == 2]
        for group in groups:
            for name in self.layout.names(f"{FLAT}/{group}"):
                if name.startswith(".") and STAGED in name:
                    self._remove_tree(f"{FLAT}/{group}", name)
        left = [(place, name) for place in (TRASH, TXN) for name in self.layout.names(place)]
        if left:
            for path in self.layout.records():
                if self.layout.is_leftover(path):
                    self.layout.remove_record(path)
            for directory in self.layout.empty_directories():
                self.layout.remove_empty(directory)
            for name in self.layout.names(ROOTS):
                if not os.path.lexists(f"{self.path}/{root_path(name.partition('.')[0])}"):
                    os.unlink(f"{self.path}/{ROOTS}/{name}")
        for place, name in left:
            # Last, because they tell that there is something to clean.
            self._remove_tree(place, name)

    def _remove_tree(self, directory: str, name: str) -> None:
        fd = self.layout.open(directory)
        try:
            posix.remove_tree(name, fd)
        finally:
            os.close(fd)

    # What stands there -----------------------------------------------------------------------------------------------

    def published(self) -> Mapping[str, Published | Unreadable]:
        """What stands published, by public path, read from links and records. A record without its link is what an
        interrupted run left, not a published name; a link without its record is Unreadable."""
        try:
            found = ((path, self.layout.in_force(path)) for path in self.layout.public_names())
            return dict(sorted((path, value) for path, value in found if value is not None))
        except OSError as error:
            raise posix.failure(error, f"reading what is published in {self.path}") from error

    def lost(self, published: Mapping[str, Published | Unreadable]) -> frozenset[str]:
        """Of these the public names whose root somebody took away."""
        return frozenset(
            path
            for path, record in published.items()
            if isinstance(record, Published)
            and record.place is not Place.FRONT
            and not os.path.isdir(f"{self.layout.path}/{record.root}")
        )

    def view(self) -> DirectoryView:
        """What stands there now, another tool's things included."""
        return DirectoryView(self.path)

    def root(self, image_id: str, rules: str) -> str | None:
        """The complete root of this image composed under these rules, if the target has one that is sound."""
        try:
            return self.layout.root(image_id, rules)
        except OSError as error:
            raise posix.failure(error, f"looking for the root of {image_id} in {self.path}") from error

    def room(self, size: int, entries: int) -> None:
        """NoRoom if the file system cannot take this many bytes and inodes more, with some to spare."""
        posix.check_room(self.path, size, entries)

    def reclaim(self) -> None:
        """Deletes pooled contents that no root has. What is remembered of their layers is then not believed."""
        try:
            for group in self.layout.names(POOL):
                for name in self.layout.names(f"{POOL}/{group}"):
                    path = f"{self.path}/{POOL}/{group}/{name}"
                    if os.stat(path, follow_symlinks=False).st_nlink == 1:
                        os.unlink(path)
        except OSError as error:
            raise posix.failure(error, f"freeing room in {self.path}") from error

    def concerns(self) -> tuple[str, ...]:
        return ()

    def noted(self, name: str) -> bytes | None:
        """What `.metadata/<name>` holds, if it is there."""
        try:
            return self.layout.read(f"{METADATA}/{name}", None)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise posix.failure(error, f"reading the note {name} in {self.path}") from error

    # Change ----------------------------------------------------------------------------------------------------------

    @contextmanager
    def transaction(self, message: str) -> Iterator[DirectoryTransaction]:
        """Exclusive change in preparation; leaving cleanly publishes all of it, by exception nothing."""
        with self._alone(message):
            with self._failures(f"opening a transaction on {self.path} ({message})"):
                transaction = DirectoryTransaction(self.layout, dict(self.published()), self._made)
            try:
                yield transaction
                with self._failures(f"publishing in {self.path} ({message})"):
                    transaction.commit()
            finally:
                transaction.close()

    @contextmanager
    def _alone(self, message: str, wait: float = 0) -> Iterator[None]:
        """The lock, and no other transaction of this run."""
        with self.lock(wait):
            with self._guard:
                if self._in_transaction:
                    raise PublishError(f"a transaction of this run on {self.path} is open already ({message})")
                self._in_transaction = True
            try:
                yield
            finally:
                self._in_transaction = False

    @staticmethod
    @contextmanager
    def _failures(doing: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise posix.failure(error, doing) from error

"""The plain way into a repository of `cvmfs_server`: trees written through its transactions, by nothing but its verbs.

    contents → pool in the state directory → transaction … roots, records, links in the union mount … → publish

The layout is that of a directory target, with markers that tell the official tools where to cut catalogs, and without
a pool. Each byte is written once into the union mount. Reading is from the mount of the published revision.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from unpacker import lock
from unpacker.cvmfs.repository import Repository
from unpacker.cvmfs.row import MARKER
from unpacker.cvmfs.server import Server
from unpacker.cvmfs.session import Session
from unpacker.cvmfs.spool import Spool
from unpacker.errors import PublishError
from unpacker.publish import posix
from unpacker.publish.directory import DirectoryPublisher
from unpacker.publish.holdable import Abilities
from unpacker.publish.layout import Layout
from unpacker.publish.pool import ContentPool, PoolLocator, pool_path
from unpacker.publish.server_transaction import ServerTransaction
from unpacker.publish.stratum0 import whitelist_concerns
from unpacker.publish.view import DirectoryView
from unpacker.record import Published, Unreadable

LOCK = ".unpacker.lock"


class LocalContents(ContentPool):
    """A pool of contents on local disk, of which the target has copies: losing it costs reading layers again."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.root = root

    @property
    def locator(self) -> LocalLocator:
        return LocalLocator(self.root)

    @property
    def directory(self) -> str:
        """Where the contents are."""
        return f"{self.root}/.unpacker/pool"

    def missing(self, tokens: Collection[str], *, check: bool = False) -> set[str]:
        """Which of these the pool does not hold; tokens of the other way into the same repository among them."""
        ours = {token for token in tokens if _is_ours(token)}
        return super().missing(ours, check=check) | (set(tokens) - ours)

    def prepare(self) -> None:
        """Makes the pool, and clears what killed runs left in it. The caller holds the target's lock."""
        scratch = f"{self.root}/.unpacker/txn"
        try:
            for path in (self.directory, scratch):
                os.makedirs(path, 0o700, exist_ok=True)
            fd = os.open(scratch, posix.DIRECTORY_FLAGS)
            try:
                for name in os.listdir(fd):
                    posix.remove_tree(name, fd)
            finally:
                os.close(fd)
        except OSError as error:
            raise posix.failure(error, f"preparing the pool of contents in {self.root}") from error


class LocalLocator(PoolLocator):
    """Names a local pool across processes."""

    __slots__ = ()

    def open(self) -> LocalContents:
        return LocalContents(self.root)


class ServerPublisher(DirectoryPublisher):
    """The Publisher whose target is `/cvmfs/<name>[/<subdirectory>]`, through transactions of `cvmfs_server`.

    `state` is the target's state directory on local disk, in which the pool of contents is.
    """

    def __init__(self, server: Server, subdirectory: str = "", *, state: str) -> None:
        below = f"/{subdirectory}" if subdirectory else ""
        self._path = server.union + below
        super().__init__(server.readonly + below)
        self.server = server
        self.subdirectory = subdirectory
        self._contents: LocalContents = LocalContents(f"{state}/contents")
        self._session = Session(server)
        # Held while the official tools unmount and mount: what is open there then makes them use force, and who reads
        # then finds an empty directory.
        self._mounting = threading.RLock()
        self._wait = 0.0

    @property
    def path(self) -> str:
        """Where users of this host see the target."""
        return self._path

    @property
    def contents(self) -> LocalContents:
        return self._contents

    @property
    def marker(self) -> str:
        return MARKER

    @property
    def fills_in_variables(self) -> bool:
        return True

    @property
    def session(self) -> Session:
        """The way to transactions, for who holds the lock."""
        return self._session

    def reclaim(self) -> None:
        """Nothing: which objects are garbage is for `gc` to find out."""

    def concerns(self) -> tuple[str, ...]:
        """What an operator should know before it is too late."""
        return expiring(self.server, time.time())

    # The lock --------------------------------------------------------------------------------------------------------

    def _acquire(self, wait: float) -> ExitStack:
        """Our lock of the spool area and, where the storage is here, that of the repository; then what killed runs
        left is rolled back."""
        self._wait = wait
        deadline = time.monotonic() + wait
        server = self.server
        try:
            with ExitStack() as stack:
                stack.enter_context(lock.exclusive(f"{server.spool}/{LOCK}", f"the target {self.path}", wait))
                if server.storage is not None:
                    repository = Repository.open(server.storage)
                    stack.enter_context(repository.lock(max(0.0, deadline - time.monotonic())))
                    Spool(server.spool).clear_left_over()
                self._session.recover(max(0.0, deadline - time.monotonic()))
                if server.is_behind():
                    self._session.mount()
                server.published(self.subdirectory)
                self._contents.prepare()
                return stack.pop_all()
        except OSError as error:
            raise posix.failure(error, f"locking the target {self.path}") from error

    # What stands there -----------------------------------------------------------------------------------------------

    def published(self) -> Mapping[str, Published | Unreadable]:
        """What stands published, by public path; PublishError where the repository is not mounted."""
        self.server.published(self.subdirectory)
        return super().published()

    def view(self) -> DirectoryView:
        """What is published, another tool's things included; not what somebody has in an open transaction."""
        return DirectoryView(self.server.published(self.subdirectory))

    def root(self, image_id: str, rules: str) -> str | None:
        """As every publisher's; asked while a transaction is open, it answers after that."""
        with self._mounting:
            return super().root(image_id, rules)

    def room(self, size: int, entries: int) -> None:
        """Raises PublishError if the pool or the spool area cannot take this many bytes and inodes more."""
        posix.check_room(self._contents.root, size, entries)
        posix.check_room(self.server.spool, size, entries)

    # Change ----------------------------------------------------------------------------------------------------------

    @contextmanager
    def transaction(self, message: str) -> Iterator[ServerTransaction]:
        """A transaction of `cvmfs_server`; leaving cleanly publishes it, if anything changed, else it is aborted."""
        server = self.server
        abilities = Abilities(
            xattrs=server.keeps_xattrs, nanoseconds=server.keeps_nanoseconds, specials=server.keeps_specials
        )
        with (
            self._alone(message, self._wait),
            self._mounting,
            self._session.transaction(message, self.subdirectory, self._wait) as stock,
        ):
            made = set(self._made)
            with self._failures(f"opening a transaction on {self.path} ({message})"):
                transaction = ServerTransaction(
                    Layout(self.path),
                    dict(self.published()),
                    made,
                    pool=self._contents.directory,
                    abilities=abilities,
                    is_nested=bool(self.subdirectory),
                )
            try:
                yield transaction
                with self._failures(f"publishing in {self.path} ({message})"):
                    has_changed = transaction.commit()
            finally:
                transaction.close()
            if has_changed:
                # Before, because it may fail after it has published: what is there then is not damaged.
                self._made = made
                stock.publish()


def expiring(server: Server, now: float) -> tuple[str, ...]:
    """What to say of a whitelist that expires soon, where the storage is on this host."""
    if server.storage is None:
        return ()
    try:
        left = Repository.open(server.storage).days_left(int(now))
    except PublishError:
        return ()  # said by whatever is to be done with the repository
    return whitelist_concerns(server.name, left, f"cvmfs_server resign {server.name}")


def _is_ours(token: str) -> bool:
    try:
        return bool(pool_path(token))
    except PublishError:
        return False

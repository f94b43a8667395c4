"""The stratum 0 target: a CernVM-FS repository in a directory of this host, written without the official tools."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from unpacker.cvmfs import gc, spool
from unpacker.cvmfs import keys as key_files
from unpacker.cvmfs.contents import RepositoryContents
from unpacker.cvmfs.history import PREVIOUS, TRUNK, Tag, check_tag
from unpacker.cvmfs.reader import Reader
from unpacker.cvmfs.repository import Repository
from unpacker.cvmfs.transaction import transaction as cvmfs_transaction
from unpacker.errors import PublishError, SettingsError
from unpacker.limits import Limits
from unpacker.multiarch import Place
from unpacker.publish import posix
from unpacker.publish.index import Index
from unpacker.publish.repository_view import RepositoryView
from unpacker.publish.roots import METADATA, root_path
from unpacker.publish.snapshot import Parsed, Snapshot
from unpacker.publish.stratum0_transaction import Stratum0Transaction
from unpacker.record import Published, Unreadable

SOON = 10
"""Days before the whitelist expires from which on that is worth a warning."""


def whitelist_concerns(name: str, left: int, resign: str) -> tuple[str, ...]:
    """What to say of a whitelist that expires in so many days; `resign` is the command that renews it."""
    if left > SOON:
        return ()
    when = f"expires in {left} days" if left > 0 else "expires today" if left == 0 else "has expired"
    return (
        f"the whitelist of {name} {when}, and clients mount no repository without a valid one: "
        f"run {resign} where the master key is",
    )


class Stratum0Publisher:
    """The Publisher whose target is the repository in `directory`, with its keys in `keys` (by default beside it).

    Reading needs no keys. `index` is a file on local disk that remembers what known contents became; `layers_view` is
    whether layers are published as directories, too.
    """

    def __init__(
        self,
        directory: str,
        keys: str | None = None,
        *,
        index: str | None = None,
        layers_view: bool = True,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.time,
        spool_root: str = spool.SPOOLS,
        configuration: str = spool.CONFIGURATION,
    ) -> None:
        self.path = os.path.abspath(directory)
        self.keys = keys or key_files.default_directory(self.path)
        self._index = index
        self._layers_view = layers_view
        self._limits = limits or Limits()
        self._clock = clock
        self._spool_root, self._configuration = spool_root, configuration
        self._guard = threading.Lock()
        self._repository: Repository | None = None
        self._contents: RepositoryContents | None = None
        self._depth = 0
        self._wait = 0.0
        self._held = ExitStack()
        self._made: set[str] = set()
        self._in_transaction = False
        self._known: tuple[str, Index] | None = None
        self._parsed: Parsed = {}

    @property
    def keeps_owners(self) -> bool:
        """Catalogs keep the owners that files have in the image, whoever publishes."""
        return True

    @property
    def wants_layers(self) -> bool:
        return self._layers_view

    @property
    def fills_in_variables(self) -> bool:
        return True

    @property
    def wait(self) -> float:
        """How many seconds who holds the lock waits for the official tools."""
        return self._wait

    @property
    def repository(self) -> Repository:
        """The repository; its keys are there only under the lock."""
        with self._guard:
            if self._repository is None:
                self._repository = Repository.open(self.path)
            return self._repository

    @property
    def contents(self) -> RepositoryContents:
        repository = self.repository
        with self._guard:
            if self._contents is None:
                self._contents = RepositoryContents(repository.objects, repository.compression, self._index)
            return self._contents

    def reclaim(self) -> None:
        """Deletes what was stored under this lock and nothing published leads to; not where the official tools manage
        the repository, because what was stored may be theirs."""
        if self.repository.spool is None:
            gc.reclaim(self.repository, now=self._clock(), wait=self._wait)

    def concerns(self) -> tuple[str, ...]:
        """What an operator should know before it is too late."""
        try:
            repository = self.repository
        except PublishError:
            return ()  # said by whatever is to be done with the repository
        try:
            left = repository.days_left(int(self._clock()))
        except PublishError as error:
            return (str(error),)  # To look at what stands there needs no whitelist, but clients do.
        return whitelist_concerns(repository.name, left, f"unpacker resign stratum0:{self.path}")

    # The lock --------------------------------------------------------------------------------------------------------

    @contextmanager
    def lock(self, wait: float = 0) -> Iterator[None]:
        """Excludes every other run and gc of ours on this target; the official tools are kept out of transactions only.

        Keys that are missing or wrong are a PublishError here, before any work is done.
        """
        with self._guard:
            if not self._depth:
                self._repository = self._open(wait)
                self._wait = wait
                self._made = set()
            self._depth += 1
        try:
            yield
        finally:
            with self._guard:
                self._depth -= 1
                if not self._depth:
                    self._held.close()

    def _open(self, wait: float) -> Repository:
        repository = Repository.open(
            self.path, self.keys, spool_root=self._spool_root, configuration=self._configuration
        )
        if self._index is not None:
            try:
                os.makedirs(os.path.dirname(self._index), exist_ok=True)
            except OSError as error:
                raise posix.failure(error, f"making the state directory {os.path.dirname(self._index)}") from error
        with ExitStack() as stack:
            stack.enter_context(repository.lock(wait))
            self._held = stack.pop_all()
        return repository

    # Named snapshots -------------------------------------------------------------------------------------------------

    def snapshots(self) -> list[Tag]:
        """The revisions that have a name, the newest first; those that every publish moves are not among them."""
        repository = Repository.open(self.path)
        tags = repository.history(repository.manifest()).tags()
        return [tag for tag in tags if tag.name not in (TRUNK, PREVIOUS)]

    def name_snapshot(self, name: str, description: str) -> Tag:
        """Gives what is published a name, under which it can be read for as long as it has it."""
        check_tag(name)
        with (
            self.lock(self._wait),
            cvmfs_transaction(self.repository, now=int(self._clock()), wait=self._wait) as within,
        ):
            standing = next((tag for tag in self.snapshots() if tag.name == name), None)
            if standing is not None and standing.root != within.base.root:
                raise PublishError(f"{name} is the name of revision {standing.revision} already: remove it first")
            if standing is not None and not description:
                return standing  # Named again, it keeps what was said of it.
            within.tag({name: description})
            return next(tag for tag in self.snapshots() if tag.name == name)

    def forget_snapshot(self, name: str) -> None:
        """Takes a name away; what only it kept goes with the next gc."""
        with (
            self.lock(self._wait),
            cvmfs_transaction(self.repository, now=int(self._clock()), wait=self._wait) as within,
        ):
            if name not in {tag.name for tag in self.snapshots()}:
                raise SettingsError(
                    f"there is no snapshot {name!r} (`unpacker snapshot stratum0:{self.path}` lists them)"
                )
            within.tag({}, (name,))

    # What stands there -----------------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """The published revision, to be closed by who asked for it."""
        repository = self.repository
        root = repository.manifest().root
        known = self._known
        same = known[1] if known is not None and known[0] == root.hex else None
        reader = Reader(repository.objects, root)
        try:
            found = Snapshot(reader, self.contents, f"the repository {repository.name}", same)
        except BaseException:
            reader.close()
            raise
        self._known = (root.hex, found.index)
        return found

    def published(self) -> Mapping[str, Published | Unreadable]:
        """What stands published, by public path. A link without its record is Unreadable; a record without its link is
        no published name."""
        with self.snapshot() as found:
            read = found.index
            standing = found.published(self._parsed)
            known = self._known
            if found.index is not read and known is not None and known[1] is read:
                self._known = (known[0], found.index)  # It was damaged: the next transaction writes all of it.
            return standing

    def lost(self, published: Mapping[str, Published | Unreadable]) -> frozenset[str]:
        """Of these the public names whose root somebody else took away."""
        records = [r for r in published.values() if isinstance(r, Published) and r.place is not Place.FRONT]
        with self.snapshot() as found:
            doubtful = found.unproven(record.root for record in records)
            lost = doubtful - found.standing(doubtful)
        return frozenset(record.public_path for record in records if record.root in lost)

    def view(self) -> RepositoryView:
        """What stands there now, another tool's things included."""
        repository = self.repository
        return RepositoryView(Reader(repository.objects, repository.manifest().root), self.contents)

    def root(self, image_id: str, rules: str) -> str | None:
        """The complete root of this image composed under these rules, if the target has one that is sound."""
        with self.snapshot() as found:
            name = found.root(image_id, rules)
        return None if name is None else root_path(name)

    def room(self, size: int, entries: int) -> None:
        """Raises PublishError if the file system cannot take this many bytes more. Most entries become rows of a
        catalog, not inodes."""
        posix.check_room(self.path, size, 0)

    def noted(self, name: str) -> bytes | None:
        """What `.metadata/<name>` holds, if it is there."""
        with self.snapshot() as found:
            return found.file(f"{METADATA}/{name}")

    # Change ----------------------------------------------------------------------------------------------------------

    @contextmanager
    def transaction(self, message: str) -> Iterator[Stratum0Transaction]:
        """Exclusive change in preparation, also against the official tools; leaving cleanly publishes one revision,
        leaving by exception nothing."""
        with self.lock(self._wait):
            with self._guard:
                if self._in_transaction:
                    raise PublishError(f"a transaction of this run on {self.path} is open already ({message})")
                self._in_transaction = True
            try:
                repository, now = self.repository, int(self._clock())
                with cvmfs_transaction(repository, now=now, wait=self._wait) as within, self.snapshot() as before:
                    with repository.objects.batch() as batch:
                        transaction = Stratum0Transaction(
                            repository,
                            self.contents,
                            batch,
                            before,
                            within.base.root,
                            made=frozenset(self._made),
                            layers_view=self._layers_view,
                            limits=self._limits,
                            now=now,
                        )
                        yield transaction
                        edited = transaction.prepare()
                    # All that the new root reaches is durable now; this is the switch.
                    if edited is not None:
                        within.publish(edited.root, edited.size, now=now)
                        self._made |= transaction.made
            finally:
                self._in_transaction = False

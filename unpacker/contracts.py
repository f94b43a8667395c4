"""The seams: Registry, ContentStore, Publisher and their scoped helpers. Each docstring is the contract.

Who implements one runs its contract suite in the tests, unchanged.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from unpacker.changeset import Changeset, Entry, Kind
from unpacker.digest import Digest, Stream
from unpacker.image import Image, Layer
from unpacker.oci import Descriptor
from unpacker.record import Published, Unreadable
from unpacker.reference import Reference, Repository
from unpacker.tree import Tree


class Registry(Protocol):
    """A server speaking the distribution API, or what stands for one. Safe from many threads.

    Every method raises RegistryError (NotFound, Denied) after its retries, ImageError for what no retry mends.
    """

    def tags(self, repository: Repository) -> list[str]:
        """All tags, as listed, the pages followed to the end; a list that cannot be read to its end raises."""

    def head(self, reference: Reference) -> Descriptor:
        """What a reference points at now, without counting as a pull."""

    def manifest(self, repository: Repository, digest: Digest) -> tuple[bytes, str]:
        """A manifest or index and the transport's media type, the bytes checked against the digest."""

    def blob(self, repository: Repository, descriptor: Descriptor) -> AbstractContextManager[Stream]:
        """A blob's stream that raises rather than end early, late or different; broken connections are resumed."""

    def is_public(self, repository: Repository, digest: Digest) -> bool:
        """Whether a request without credentials can read this manifest."""

    @property
    def locator(self) -> RegistryLocator:
        """A picklable value whose `open()` gives this registry in another process."""


class RegistryLocator(Protocol):
    """Names a way into registries across processes: picklable, hashable. `open()` gives one object per process."""

    def open(self) -> Registry: ...


class ContentStore(Protocol):
    """Where the bytes of files go, by token. A token is a plain string, the same for the same bytes and metadata.

    Safe from many threads and, through `locator`, from many processes; an orphan is harmless.
    """

    @property
    def locator(self) -> StoreLocator:
        """A picklable value whose `open()` gives this store in another process."""

    @property
    def wants_threads(self) -> bool:
        """Whether taking contents is work that threads can share, such as compressing. Then `put` of its batches may
        be called from several of them at a time."""

    def batch(self) -> AbstractContextManager[Batch]:
        """A scope of writing. Leaving it cleanly makes all its tokens durable (one sync, then all renames);
        leaving by exception forgets them. A token counts only after its batch was left cleanly."""

    def open(self, token: str) -> AbstractContextManager[Stream]:
        """The bytes of a token."""

    def missing(self, tokens: Collection[str], *, check: bool = False) -> set[str]:
        """Which of these the store does not hold. With `check` every byte held is read again, and what is not what its
        token says is thrown away and counts as missing."""


class StoreLocator(Protocol):
    """Names a store across processes: picklable, hashable."""

    def open(self) -> ContentStore: ...


class Batch(Protocol):
    """One scope of writing; for one thread at a time, unless its store `wants_threads`."""

    @property
    def written(self) -> int:
        """Bytes written so far in this batch, so that its writer can bound it."""

    def put(self, stream: Stream, size: int, hint: Entry) -> str:
        """Takes exactly `size` bytes and gives their token. Idempotent. `hint` is the entry as it will be published:
        a store of inodes writes its metadata too, so that the same bytes under other metadata are another token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stacked:
    """One layer of an image: its changeset, and the tree of the layers `below` it, as they came."""

    layer: Layer
    changeset: Changeset
    below: Tree


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """One image ready to be published under one name.

    `tree` is the prepared tree, or None where `Publisher.root` said that the root exists. `record` is complete but
    for `root`, `entries`, `size`, `altered`, `replaces`, which the publisher fills in. `layers` come with a tree if
    `Publisher.wants_layers`. `adopted` is the path of a root that another tool made and that is taken over as it
    stands, without a tree and without knowing how many entries it has.
    """

    image: Image
    record: Published
    tree: Tree | None
    layers: tuple[Stacked, ...] = ()
    adopted: str | None = None


class View(Protocol):
    """What stands in a target, whoever put it there, by paths below its root. Follows no symlink. Safe from many
    threads. PublishError for what cannot be read, which is never the same as nothing there."""

    def kind(self, path: str) -> Kind | None:
        """What stands at a path; None if nothing does."""

    def link(self, path: str) -> str | None:
        """Where the symlink at a path leads to, as written; None if there is none."""

    def read(self, path: str, limit: int) -> bytes | None:
        """The bytes of the file at a path; None if there is none. PublishError if they are more than `limit`."""


class Publisher(Protocol):
    """A target: a published tree and the one way to change it."""

    @property
    def contents(self) -> ContentStore:
        """Where the bytes of this target's files go."""

    @property
    def wants_layers(self) -> bool:
        """Whether releases shall bring the layers of their image, too."""

    @property
    def fills_in_variables(self) -> bool:
        """Whether readers of this target put variables of theirs into symlinks, as clients of CernVM-FS do."""

    def lock(self, wait: float = 0) -> AbstractContextManager[None]:
        """Excludes every other run and gc on this target, for at most `wait` seconds of waiting; raises Busy with the
        holder. Cleans what a killed holder left. Reentrant in one publisher."""

    def published(self) -> Mapping[str, Published | Unreadable]:
        """What stands published, by public path, read from the target itself. Raises PublishError rather than give
        less than there is."""

    def lost(self, published: Mapping[str, Published | Unreadable]) -> frozenset[str]:
        """Of these the public names whose root is gone, as far as that is cheap to tell."""

    def view(self) -> View:
        """What stands there now, another tool's things included."""

    def root(self, image_id: str, rules: str) -> str | None:
        """The complete root of this image composed under these rules, if the target has one."""

    def room(self, size: int, entries: int) -> None:
        """NoRoom if the target cannot take this many bytes and inodes more."""

    def reclaim(self) -> None:
        """Frees what contents take that were stored and not published, as far as that can be told at once. Under the
        lock, and while no layer is read for an image that is still to be published."""

    def concerns(self) -> tuple[str, ...]:
        """What an operator should know of this target before it is too late; never raises for what is wrong with it."""

    def noted(self, name: str) -> bytes | None:
        """What `.metadata/<name>` holds, if it is there."""

    def transaction(self, message: str) -> AbstractContextManager[Transaction]:
        """Exclusive change in preparation, under the lock (taken if not held). Leaving cleanly publishes all of it;
        leaving by exception aborts what we opened and lets that exception through. If opening fails nothing was
        ours and nothing is touched. No reader sees anything of it before it ends."""


class Transaction(Protocol):
    """One transaction; usable only inside its `with`."""

    def publish(self, release: Release) -> Published:
        """Prepares a root (unless it exists), its record, and the public link to it. Gives the completed record."""

    def point(self, record: Published) -> Published:
        """Publishes a front: its record, and the public link to where `record.root` says, a name of one platform. Gives
        the record completed by `replaces`. A link never goes before what it leads to."""

    def remove(self, public_paths: Sequence[str], *, now: int) -> None:
        """Takes public names away, records included; their roots stay until gc collects them, and from `now` (Unix
        seconds) on count as unreferenced. Names that do not exist are a PublishError."""

    def note(self, name: str, data: bytes) -> None:
        """Writes `.metadata/<name>` (such as status.json) in the same transaction."""

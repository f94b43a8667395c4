"""A layer is read once: metadata into a Changeset, bytes into a store, everything verified to its last byte."""

from __future__ import annotations

import gzip
import io
import pickle
import random
import threading
import tracemalloc
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace

import pytest

from tests import images
from tests.memory_store import MemoryBatch, MemoryStore
from tests.raw_tar import Pieces, layer_of
from unpacker import layer as layers
from unpacker import storing
from unpacker.changeset import Change, Changeset, Entry, Kind
from unpacker.digest import Digest, Stream, VerifiedReader
from unpacker.errors import ImageError, IntegrityError, PublishError, RegistryError
from unpacker.limits import Limits
from unpacker.oci import OCI_LAYER, Descriptor
from unpacker.reference import Repository
from unpacker.rootfs import Policy

LIMITS = Limits()


@pytest.fixture(autouse=True, params=[False, True], ids=["one thread", "threads"])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever holds of a layer holds whether its contents are taken by the thread that reads or by others."""
    monkeypatch.setattr(MemoryStore, "wants_threads", request.param)


def read(tar: bytes, compression: str = "none", store: MemoryStore | None = None, **policy: object) -> Changeset:
    blob = images.compress(tar, compression)
    layer = layer_of(blob, tar, OCI_LAYER + {"none": "", "gzip": "+gzip", "zstd": "+zstd"}[compression])
    stream = VerifiedReader(io.BytesIO(blob), layer.descriptor.digest, layer.descriptor.size, "blob")
    return layers.read(stream, layer, store or MemoryStore(), Policy(**policy), LIMITS)  # type: ignore[arg-type]


def paths(*members: images.Member) -> list[str]:
    return [entry.path for entry in read(images.layer(*members)).entries]


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


# What a changeset holds.


@pytest.mark.parametrize("compression", ["none", "gzip", "zstd"])
def test_a_layer_becomes_entries_and_contents(compression: str) -> None:
    tar = images.layer(
        images.directory("etc/", mode=0o755, mtime=5),
        images.file("etc/motd", b"hello", mode=0o644, uid=3, gid=4, xattrs={"user.a": b"\x00\xff"}),
        images.symlink("etc/link", "motd"),
        images.hardlink("etc/twin", "./etc/motd"),
        images.file("etc/empty"),
    )
    store = MemoryStore()
    changeset = read(tar, compression, store)
    directory, motd, link, twin, empty = changeset.entries
    assert (directory.path, directory.kind, directory.mtime_ns) == ("etc", Kind.DIRECTORY, 5 * 10**9)
    assert motd == Entry(
        "etc/motd", Kind.FILE, 0o644, 3, 4, images.MTIME * 10**9, 5, xattrs=(("user.a", b"\x00\xff"),), token=motd.token
    )
    assert (link.kind, link.target) == (Kind.SYMLINK, "motd")
    assert (twin.kind, twin.target) == (Kind.HARDLINK, "etc/motd")
    assert store.contents == {motd.token: b"hello", empty.token: b""}
    assert (changeset.diff_id, changeset.size) == (str(Digest.of(tar)), len(tar))
    assert changeset.content_size == 5
    assert store.committed == 1


def test_entries_are_as_the_policy_publishes_them_before_they_are_stored() -> None:
    hints: list[Entry] = []

    class Noting(MemoryStore):
        @contextmanager
        def batch(self) -> Iterator[MemoryBatch]:
            with super().batch() as batch:
                put = batch.put

                def noted(stream: Stream, size: int, hint: Entry) -> str:
                    hints.append(hint)
                    return put(stream, size, hint)

                batch.put = noted  # type: ignore[method-assign]
                yield batch

    tar = images.layer(images.file("f", b"x", mode=0o4700, uid=5, xattrs={"security.capability": b"1"}))
    [entry] = read(tar, store=Noting(), owner=(1, 2)).entries
    assert (entry.mode & 0o6000, entry.mode & 0o444, entry.uid, entry.gid, entry.xattrs) == (0, 0o444, 1, 2, ())
    assert entry.change == Change.MODE | Change.SETID | Change.XATTR | Change.OWNER
    assert hints == [entry._replace(token="")]


def test_an_empty_layer_has_no_entries_and_opens_no_batch() -> None:
    store = MemoryStore()
    assert read(images.layer(), "gzip", store).entries == ()
    assert store.committed == 0


def test_entries_stay_in_the_order_of_the_tar_duplicates_too() -> None:
    assert paths(images.file("b"), images.directory("a"), images.file("b", b"again")) == ["b", "a", "b"]


# Paths.


@pytest.mark.parametrize(
    ("written", "path"),
    [
        ("./", ""),
        ("/", ""),
        (".", ""),
        ("./usr/bin/", "usr/bin"),
        ("/usr/bin", "usr/bin"),
        ("usr//./bin", "usr/bin"),
        ("usr/../etc", "etc"),
        ("a/b/../../c/.", "c"),
        ("a/...", "a/..."),
        ("\udcff/é", "\udcff/é"),
    ],
)
def test_paths_are_relative_and_normalised(written: str, path: str) -> None:
    for _ in range(2):  # the second time from memory
        assert layers.Paths(LIMITS, "layer").normal(written) == path
    assert paths(images.directory("x"), images.directory(written)) == ["x", path]


def test_normalised_parents_are_remembered_rightly() -> None:
    normal = layers.Paths(LIMITS, "layer").normal
    for _ in range(2):
        assert normal("./a/../b/c") == "b/c"
        assert normal("./a/../b/d") == "b/d"
        assert normal("./a/../b/..") == ""
        assert normal("/c") == "c"
        assert normal("c") == "c"
        assert normal("./a/../b/") == "b"


def test_symlink_targets_are_kept_verbatim() -> None:
    [entry] = read(images.layer(images.symlink("a", "/..//../etc/./x/"))).entries
    assert entry.target == "/..//../etc/./x/"


# Whiteouts.


def test_whiteouts_and_opaque_directories_are_no_entries() -> None:
    tar = images.layer(
        images.whiteout("a/b"),
        images.file("a/c"),
        images.opaque("a/d"),
        images.whiteout("top"),
        images.opaque(""),
        images.file("a/not.wh.one"),
    )
    changeset = read(tar)
    assert [entry.path for entry in changeset.entries] == ["a/c", "a/not.wh.one"]
    assert changeset.whiteouts == ("a/b", "top")
    assert changeset.opaque == ("a/d", "")


def test_what_aufs_left_behind_is_ignored_but_its_links_are_followed() -> None:
    tar = images.layer(
        images.directory(".wh..wh.plnk"),
        images.file(".wh..wh.plnk/12.34", b"shared", mode=0o755),
        images.file(".wh..wh.aufs"),
        images.directory("a/.wh..wh.orph"),
        images.file("a/.wh..wh.orph/x", b"gone"),
        images.hardlink("bin/one", ".wh..wh.plnk/12.34"),
        images.hardlink("bin/two", "/.wh..wh.plnk/12.34"),
    )
    changeset = read(tar)
    assert [(e.path, e.kind, e.mode, e.size) for e in changeset.entries] == [
        ("bin/one", Kind.FILE, 0o755, 6),
        ("bin/two", Kind.FILE, 0o755, 6),
    ]
    assert changeset.entries[0].token == changeset.entries[1].token
    assert changeset.whiteouts == changeset.opaque == ()


# Batches.


def test_batches_are_bounded_and_all_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storing, "BATCH_BYTES", 10_000)
    store = MemoryStore()
    tar = images.layer(*(images.file(f"f{i}", bytes([i]) * 4000) for i in range(10)))
    changeset = read(tar, "gzip", store)
    assert store.committed == 4
    assert not store.missing([entry.token for entry in changeset.entries])


def test_batches_of_many_small_files_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storing, "BATCH_FILES", 3)
    store = MemoryStore()
    read(images.layer(*(images.file(f"f{i}") for i in range(10))), store=store)
    assert store.committed == 4


def test_a_batch_becomes_durable_while_the_next_is_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storing, "BATCH_FILES", 1)
    second_is_open = threading.Event()

    class Watched(MemoryStore):
        opened = 0

        @contextmanager
        def batch(self) -> Iterator[MemoryBatch]:
            self.opened += 1
            is_first = self.opened == 1
            if not is_first:
                second_is_open.set()
            with super().batch() as batch:
                yield batch
                assert not is_first or second_is_open.wait(30), "the first batch held up the second"

    store = Watched()
    read(images.layer(images.file("a", b"1"), images.file("b", b"2")), store=store)
    assert store.committed == 2


# Verification and failure.


def test_another_diff_id_is_an_integrity_error_and_nothing_counts() -> None:
    tar = images.layer(images.file("f", b"x" * 1000))
    layer = replace(layer_of(tar, tar), diff_id=str(Digest.of(b"something else")))
    store = MemoryStore()
    with pytest.raises(IntegrityError, match="uncompressed it should be"):
        layers.read(io.BytesIO(tar), layer, store, Policy(), LIMITS)
    assert (store.committed, store.contents) == (0, {})


def test_the_diff_id_covers_what_follows_the_archive() -> None:
    tar = images.layer(images.file("f")) + b"trailing"
    changeset = read(tar, "gzip")
    assert (changeset.size, changeset.diff_id) == (len(tar), str(Digest.of(tar)))


@pytest.mark.parametrize("damage", ["shorter", "longer", "flipped", "zeroed"])
@pytest.mark.parametrize("compression", ["none", "gzip", "zstd"])
def test_a_blob_damaged_on_its_way_is_an_integrity_error_whatever_it_looks_like(compression: str, damage: str) -> None:
    tar = images.layer(*(images.file(f"f{i}", random.Random(i).randbytes(5000)) for i in range(200)))
    blob = images.compress(tar, compression)
    middle = len(blob) // 2
    damaged = {
        "shorter": blob[:-1],
        "longer": blob + b"\0",
        "flipped": blob[:middle] + bytes([blob[middle] ^ 1]) + blob[middle + 1 :],
        "zeroed": blob[:500] + bytes(100) + blob[600:],
    }[damage]
    layer = layer_of(blob, tar, OCI_LAYER + {"none": "", "gzip": "+gzip", "zstd": "+zstd"}[compression])
    stream = VerifiedReader(Pieces(io.BytesIO(damaged), 3000), layer.descriptor.digest, layer.descriptor.size, "blob")
    store = MemoryStore()
    with pytest.raises(IntegrityError):
        layers.read(stream, layer, store, Policy(), LIMITS)
    assert store.committed == 0


def test_a_malformed_layer_with_the_right_digest_is_an_image_error() -> None:
    blob = images.layer(images.file("f", b"x" * 5000))[:2000]
    with pytest.raises(ImageError, match="ends inside the content") as caught:
        read(blob)
    assert not isinstance(caught.value, IntegrityError)


def test_a_media_type_that_is_no_layer_is_refused() -> None:
    with pytest.raises(ImageError, match="no file system layer"):
        layers.read(io.BytesIO(b""), layer_of(b"", b"", "text/plain"), MemoryStore(), Policy(), LIMITS)


class Breaking:
    """A stream that fails after so many bytes, as a network does."""

    def __init__(self, data: bytes, after: int) -> None:
        self._stream = io.BytesIO(data)
        self._after = after

    def read(self, size: int, /) -> bytes:
        if self._stream.tell() >= self._after:
            raise RegistryError("connection lost", temporary=True)
        return self._stream.read(min(size, 10_000))


def test_a_failing_stream_is_the_cause_that_is_raised() -> None:
    tar = images.layer(images.file("f", random.Random(2).randbytes(500_000)))
    store = MemoryStore()
    with pytest.raises(RegistryError, match="connection lost"):
        layers.read(Breaking(tar, 200_000), layer_of(tar, tar), store, Policy(), LIMITS)
    assert (store.committed, store.contents) == (0, {})


class Endless:
    """A stream whose end nobody should ever wait for."""

    def __init__(self, head: bytes) -> None:
        self._head = io.BytesIO(head)
        self.given = 0

    def read(self, size: int, /) -> bytes:
        data = self._head.read(size) or bytes(size)
        self.given += len(data)
        assert self.given < 1 << 30, "still reading, although nobody wants it"
        return data


class Failing(MemoryStore):
    """A store whose batches fail: to open, to take a file, to become durable."""

    where = "put"

    @contextmanager
    def batch(self) -> Iterator[MemoryBatch]:
        if self.where == "open":
            raise PublishError("no open")
        with super().batch() as batch:
            if self.where == "put":
                batch.put = self._refuse  # type: ignore[method-assign]
            yield batch
            if self.where == "leave":
                raise PublishError("no leave")

    def _refuse(self, stream: Stream, size: int, hint: Entry) -> str:
        raise PublishError("no put")


@pytest.mark.parametrize("where", ["open", "put", "leave"])
def test_a_failing_store_stops_everything_and_is_the_cause(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storing, "BATCH_FILES", 2)
    store = Failing()
    store.where = where
    head = b"".join(images.layer(images.file(f"f{i}", b"x"))[:1024] for i in range(20))
    stream = Endless(head)
    tar = head
    with pytest.raises(PublishError, match=f"no {where}"):
        layers.read(stream, layer_of(tar, tar), store, Policy(), LIMITS)
    assert store.committed == 0
    assert not store.contents


def test_a_last_batch_that_fails_to_become_durable_fails_the_layer() -> None:
    store = Failing()
    store.where = "leave"
    with pytest.raises(PublishError, match="no leave"):
        read(images.layer(images.file("f")), store=store)


@pytest.mark.parametrize("cause", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_an_interrupt_leaves_no_thread_and_no_batch(
    cause: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storing, "GROUP_FILES", 1)

    class Interrupted(MemoryStore):
        @contextmanager
        def batch(self) -> Iterator[MemoryBatch]:
            with super().batch() as batch:
                batch.put = self._interrupt  # type: ignore[method-assign]
                yield batch

        def _interrupt(self, stream: Stream, size: int, hint: Entry) -> str:
            raise cause

    store = Interrupted()
    head = images.layer(images.file("f", b"x"))[:1024]
    with pytest.raises(cause):
        layers.read(Endless(head), layer_of(head, head), store, Policy(), LIMITS)
    assert (store.committed, store.abandoned) == (0, 1)


# Memory and processes.


def test_memory_does_not_grow_with_the_size_of_a_file() -> None:
    class Forgetting(MemoryStore):
        @contextmanager
        def batch(self) -> Iterator[MemoryBatch]:
            yield MemoryBatch(keep=False)

    def peak(size: int) -> int:
        tar = images.layer(images.file("big", bytes(size)))
        blob = gzip.compress(tar, 1)
        layer = layer_of(blob, tar, OCI_LAYER + "+gzip")
        del tar
        tracemalloc.start()
        try:
            layers.read(io.BytesIO(blob), layer, Forgetting(), Policy(), LIMITS)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    small, large = peak(10_000_000), peak(80_000_000)
    assert large < 16 << 20
    # Eight pieces of 1 MiB may lie between the threads, or none if the reader happened to keep up with a small file.
    assert large < small + (10 << 20)


@dataclass(frozen=True)
class OneBlob:
    """A way into a registry that has one blob; picklable."""

    content: bytes

    def open(self) -> OneBlob:
        return self

    @contextmanager
    def _stream(self, descriptor: Descriptor) -> Iterator[Stream]:
        yield VerifiedReader(io.BytesIO(self.content), descriptor.digest, descriptor.size, "blob")

    def blob(self, repository: Repository, descriptor: Descriptor) -> AbstractContextManager[Stream]:
        return self._stream(descriptor)


def test_a_job_reads_a_layer_by_its_locators_alone() -> None:
    tar = images.layer(images.file("f", b"content"))
    store = MemoryStore()
    job = layers.LayerJob(
        repository=Repository(registry="localhost:1", name="a"),
        layer=layer_of(tar, tar),
        registry=OneBlob(tar),  # type: ignore[arg-type]  # the part of a registry that a job uses
        store=store.locator,
        policy=Policy(),
        limits=LIMITS,
    )
    changeset = Changeset.decode(layers.read_layer(job))
    assert [store.contents[entry.token] for entry in changeset.entries] == [b"content"]


def test_a_job_survives_pickling() -> None:
    job = layers.LayerJob(
        repository=Repository(registry="localhost:1", name="a"),
        layer=layer_of(b"a", b"b"),
        registry=OneBlob(b"blob"),  # type: ignore[arg-type]
        store=OneBlob(b"store"),  # type: ignore[arg-type]
        policy=Policy(owner=(1, 2)),
        limits=Limits(name=9),
    )
    assert pickle.loads(pickle.dumps(job)) == job

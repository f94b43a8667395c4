"""Objects, tokens and streams that somebody damaged or made to do harm."""

from __future__ import annotations

import io
import os
import zlib
from pathlib import Path

import pytest

from unpacker.changeset import Entry, Kind
from unpacker.cvmfs import deflation
from unpacker.cvmfs.contents import Content, Piece, RepositoryContents
from unpacker.cvmfs.hash import ContentHash
from unpacker.cvmfs.objects import CATALOG, CHUNK, ObjectStore
from unpacker.errors import PublishError
from unpacker.publish import posix

GOOD = zlib.compress(b"hello, world")


@pytest.fixture(autouse=True)
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here pulls the plug, and syncing a busy machine's disk takes seconds each time."""
    monkeypatch.setattr(posix, "syncfs", lambda fd: None)


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    (tmp_path / "data").mkdir()
    return ObjectStore(str(tmp_path))


def test_a_small_object_that_inflates_without_end_is_refused(store: ObjectStore) -> None:
    name = store.put(zlib.compress(bytes(64 << 20), 9), CATALOG)
    with pytest.raises(PublishError, match="more than 1000000 bytes"):
        store.read(name, CATALOG, limit=1_000_000)


def test_an_object_larger_than_it_may_be_is_not_read_whole(store: ObjectStore) -> None:
    name = store.put(b"x", CATALOG)
    os.truncate(store.path(name, CATALOG), 1 << 40)
    with pytest.raises(PublishError, match="more than the 1000 bytes"):
        store.read(name, CATALOG, limit=1000)


@pytest.mark.parametrize("stored", [GOOD[:-1] + b"?", GOOD[:-1], b"", GOOD + b"?"])
def test_an_object_that_is_not_what_its_name_says_is_refused(store: ObjectStore, stored: bytes) -> None:
    name = store.put(GOOD, CATALOG)
    Path(store.path(name, CATALOG)).write_bytes(stored)
    with pytest.raises(PublishError, match="is damaged"):
        store.read(name, CATALOG)
    assert not store.is_sound(name, CATALOG)
    with pytest.raises(PublishError, match="is damaged"):
        list(store.stored(name, CATALOG))


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (b"no zlib stream", "no zlib stream"),
        (b"", "without an end"),
        (GOOD[:-1], "without an end"),
        (GOOD[:-1] + b"\0", "no zlib stream"),
        (GOOD + b"\0", "goes on after"),
        (GOOD + GOOD, "goes on after"),
    ],
)
def test_an_object_that_is_not_exactly_one_zlib_stream_is_refused(
    store: ObjectStore, stored: bytes, message: str
) -> None:
    name = store.put(stored)
    with pytest.raises(PublishError, match=message):
        store.read(name)
    with (
        pytest.raises(PublishError, match=message),
        RepositoryContents(store).open(f"z:{name}") as stream,
    ):
        while stream.read(1000):
            pass


def test_a_stream_that_ends_where_a_piece_ends_is_held_to_its_end(store: ObjectStore) -> None:
    stored = deflation.dense(os.urandom(3 * deflation.PIECE))
    with pytest.raises(PublishError, match="goes on after"):
        list(deflation.inflated((stored, b"?"), "it"))
    with pytest.raises(PublishError, match="without an end"):
        list(deflation.inflated((stored[:-1],), "it"))


@pytest.mark.parametrize("size", [4, 6])
def test_a_chunk_of_another_size_than_its_token_says_is_refused(store: ObjectStore, size: int) -> None:
    name = store.put(zlib.compress(b"hello"), CHUNK)
    token = Content(None, (Piece(name, 5), Piece(name, size))).token
    with pytest.raises(PublishError, match=f"not the {size} bytes"), RepositoryContents(store).open(token) as stream:
        while stream.read(1000):
            pass


@pytest.mark.parametrize(
    "token",
    [
        "",
        "z",
        "z:",
        "z:../../../etc/passwd",
        f"z:{'0' * 39}",
        f"z:{'0' * 40}C",
        f"z:{'A' * 40}",
        f"z:{'0' * 40}@5",
        f"y:{'0' * 40}",
        "zc:",
        f"zc:{'0' * 40}",
        f"zc:{'0' * 40}@",
        f"zc:{'0' * 40}@0",
        f"zc:{'0' * 40}@05",
        f"zc:{'0' * 40}@-5",
        f"zc:{'0' * 40}@+5",
        f"zc:{'0' * 40}@5,",
        f"zc:{'0' * 40}@1_0",
        f"zc:{'0' * 40}@٥",
        f"zc:{'0' * 40}@{1 << 63}",
        f"zc:{'0' * 40}@{'9' * 5000}",
        f"zc:{'0' * 40}@5,{'0' * 40}-shake128@5",
        f"{'0' * 64}.{'0' * 16}",
    ],
)
def test_what_is_no_token_is_refused_briefly_and_held_by_nobody(store: ObjectStore, token: str) -> None:
    with pytest.raises(PublishError, match=r"not a token of this target.*delete the cache") as raised:
        Content.parse(token)
    assert len(str(raised.value)) < 400
    assert RepositoryContents(store).missing({token}) == {token}


def test_a_file_that_equals_an_object_is_never_stored_under_its_name(store: ObjectStore) -> None:
    """A client's cache knows objects by their hash alone: it would show one in place of the other."""
    contents = RepositoryContents(store)
    victim = b"a program that many run\n" * 100
    with contents.batch() as batch:
        hint = Entry("bin/program", Kind.FILE)
        token = batch.put(io.BytesIO(victim), len(victim), hint)
        stored = deflation.dense(victim)
        evil = batch.put(io.BytesIO(stored), len(stored), hint)
    assert Content.parse(token).whole == ContentHash.of(stored)
    assert Content.parse(evil).whole != Content.parse(token).whole

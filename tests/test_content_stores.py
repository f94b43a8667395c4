"""What every ContentStore promises, run over each of them."""

from __future__ import annotations

import errno
import io
import os
import pickle
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from unpacker.changeset import Entry, Kind
from unpacker.contracts import ContentStore
from unpacker.cvmfs.contents import RepositoryContents
from unpacker.cvmfs.objects import ObjectStore
from unpacker.errors import IntegrityError, PublishError
from unpacker.publish import posix
from unpacker.publish.pool import ContentPool

MTIME = 1_600_000_000_123_456_789
LARGE = 5 << 20


@pytest.fixture(autouse=True)
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here pulls the plug, and syncing a busy machine's disk takes seconds each time."""
    monkeypatch.setattr(posix, "syncfs", lambda fd: None)


def _pool(root: Path) -> ContentStore:
    return ContentPool(str(root))


def _repository(compression: str, algorithm: str, *, index: bool = False) -> Callable[[Path], ContentStore]:
    def opened(root: Path) -> ContentStore:
        # Not `ObjectStore.create`: 256 directories for each test are slow to remove again.
        (root / "data").mkdir()
        known = f"{root.parent}/{root.name}.index" if index else None
        return RepositoryContents(ObjectStore(str(root), algorithm), compression, known)

    return opened


STORES: dict[str, Callable[[Path], ContentStore]] = {
    "directory": _pool,
    "dense": _repository("dense", "sha1"),
    "fast": _repository("fast", "shake128"),
    "stock": _repository("stock", "sha1"),
    "dense with an index": _repository("dense", "sha1", index=True),
}


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ContentStore:
    return STORES[request.param](tmp_path)


def entry(size: int) -> Entry:
    return Entry("some/file", Kind.FILE, size=size, uid=os.geteuid(), gid=os.getegid(), mtime_ns=MTIME)


def put(store: ContentStore, data: bytes) -> str:
    with store.batch() as batch:
        return batch.put(io.BytesIO(data), len(data), entry(len(data)))


def read(store: ContentStore, token: str) -> bytes:
    with store.open(token) as stream:
        return b"".join(iter(lambda: stream.read(100_000), b""))


def files(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


class Dribble:
    """A stream that gives less than it is asked for."""

    def __init__(self, data: bytes, most: int) -> None:
        self._stream, self._most = io.BytesIO(data), most

    def read(self, size: int, /) -> bytes:
        return self._stream.read(min(size, self._most))


SAMPLES = {
    "empty": b"",
    "one byte": b"x",
    "text": b"hello, world\n" * 1000,
    "random": random.Random(1).randbytes(300_000),
    "a mebibyte": b"a" * (1 << 20),
    "large": bytes(range(256)) * (LARGE // 256) + b"end",
    "large and random": random.Random(2).randbytes(LARGE),
    "zeros, more than any chunk": bytes(17 << 20),
}


class TestContents:
    @pytest.mark.parametrize("name", SAMPLES)
    def test_what_was_put_comes_back(self, store: ContentStore, name: str) -> None:
        assert read(store, put(store, SAMPLES[name])) == SAMPLES[name]

    @pytest.mark.parametrize("name", ["text", "large", "zeros, more than any chunk"])
    def test_the_same_bytes_have_the_same_token_and_are_stored_once(
        self, store: ContentStore, tmp_path: Path, name: str
    ) -> None:
        token = put(store, SAMPLES[name])
        before = files(tmp_path)
        assert put(store, SAMPLES[name]) == token
        assert files(tmp_path) == before

    def test_other_bytes_have_other_tokens(self, store: ContentStore) -> None:
        assert len({put(store, data) for data in SAMPLES.values()}) == len(SAMPLES)

    @pytest.mark.parametrize("name", ["text", "large"])
    def test_a_stream_may_give_less_than_it_is_asked_for(self, store: ContentStore, name: str) -> None:
        data = SAMPLES[name]
        with store.batch() as batch:
            token = batch.put(Dribble(data, 4097), len(data), entry(len(data)))
        assert token == put(store, data)
        assert read(store, token) == data

    @pytest.mark.parametrize("size", [0, 5, LARGE])
    def test_only_what_is_asked_for_is_taken_from_the_stream(self, store: ContentStore, size: int) -> None:
        stream = io.BytesIO(b"x" * size + b", world")
        with store.batch() as batch:
            batch.put(stream, size, entry(size))
        assert stream.read() == b", world"

    @pytest.mark.parametrize("size", [10, LARGE])
    def test_a_stream_that_ends_early_is_an_error(self, store: ContentStore, size: int) -> None:
        with store.batch() as batch:
            good = batch.put(io.BytesIO(b"good"), 4, entry(4))
            with pytest.raises(IntegrityError, match="ended after"):
                batch.put(io.BytesIO(b"x" * (size - 1)), size, entry(size))
        assert read(store, good) == b"good"

    def test_another_process_opens_the_same_store(self, store: ContentStore) -> None:
        token = put(store, b"hello")
        assert hash(store.locator) == hash(pickle.loads(pickle.dumps(store.locator)))
        reopened = pickle.loads(pickle.dumps(store.locator)).open()
        assert read(reopened, token) == b"hello"
        assert put(reopened, b"hello") == token

    def test_what_is_no_token_is_refused(self, store: ContentStore) -> None:
        with pytest.raises(PublishError), store.open("x:1234"):
            pass


class TestBatches:
    def test_no_token_is_there_before_its_batch_was_left(self, store: ContentStore) -> None:
        with store.batch() as batch:
            token = batch.put(io.BytesIO(b"hello"), 5, entry(5))
            assert batch.put(io.BytesIO(b"hello"), 5, entry(5)) == token
            assert store.missing({token}) == {token}
        assert store.missing({token}) == set()

    def test_what_a_batch_has_written_only_grows(self, store: ContentStore) -> None:
        with store.batch() as batch:
            assert batch.written == 0
            batch.put(io.BytesIO(b"hello"), 5, entry(5))
            assert batch.written == 5
            batch.put(io.BytesIO(b"x" * LARGE), LARGE, entry(LARGE))
            assert batch.written == 5 + LARGE

    @pytest.mark.parametrize("name", ["text", "large"])
    def test_a_batch_left_by_exception_leaves_nothing(self, store: ContentStore, tmp_path: Path, name: str) -> None:
        before = files(tmp_path)
        stop = RuntimeError("stop")
        with pytest.raises(RuntimeError) as raised, store.batch() as batch:
            token = batch.put(io.BytesIO(SAMPLES[name]), len(SAMPLES[name]), entry(len(SAMPLES[name])))
            raise stop
        assert raised.value is stop
        assert store.missing({token}) == {token}
        assert files(tmp_path) == before

    def test_one_sync_comes_before_all_renames(self, store: ContentStore, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[str] = []
        rename = os.rename

        def renamed(*args: Any, **options: Any) -> None:
            rename(*args, **options)
            calls.append("rename")

        monkeypatch.setattr(posix, "syncfs", lambda fd: calls.append("sync"))
        monkeypatch.setattr(os, "rename", renamed)
        with store.batch() as batch:
            for i in range(3):
                batch.put(io.BytesIO(b"%d" % i), 1, entry(1))
            assert calls == []
        assert calls == ["sync", "rename", "rename", "rename"]

    def test_a_batch_that_wrote_nothing_syncs_nothing(
        self, store: ContentStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        put(store, b"hello")
        monkeypatch.setattr(posix, "syncfs", lambda fd: pytest.fail("synced"))
        put(store, b"hello")

    def test_a_failed_sync_makes_no_token(
        self, store: ContentStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(fd: int) -> None:
            raise OSError(errno.EIO, "Input/output error")

        before = files(tmp_path)
        monkeypatch.setattr(posix, "syncfs", broken)
        with pytest.raises(PublishError, match="the disk failed"):
            put(store, b"hello")
        assert files(tmp_path) == before

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
    def test_a_failing_disk_is_reported_with_what_to_do(
        self, store: ContentStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
    ) -> None:
        def broken(fd: int, data: bytes) -> int:
            raise OSError(number, os.strerror(number))

        before = files(tmp_path)
        with pytest.raises(PublishError, match=r"some/file.*run again"), store.batch() as batch:
            monkeypatch.setattr(os, "write", broken)
            batch.put(io.BytesIO(b"hello"), 5, entry(5))
        assert files(tmp_path) == before

    def test_a_disk_that_takes_a_part_at_a_time_gets_all(
        self, store: ContentStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write = os.write
        monkeypatch.setattr(os, "write", lambda fd, data: write(fd, bytes(data[:3])))
        assert read(store, put(store, b"hello, world")) == b"hello, world"

    def test_threads_and_processes_may_write_the_same(self, store: ContentStore, tmp_path: Path) -> None:
        def work() -> None:
            for _ in range(3):
                with store.locator.open().batch() as batch:
                    for i in range(50):
                        batch.put(io.BytesIO(b"%d" % i), len(str(i)), entry(len(str(i))))

        program = (
            "import io, pickle, sys\nfrom tests.test_content_stores import entry\n"
            "for _ in range(3):\n"
            "    with pickle.loads(bytes.fromhex(sys.argv[1])).open().batch() as batch:\n"
            "        for i in range(50):\n"
            "            batch.put(io.BytesIO(b'%d' % i), len(str(i)), entry(len(str(i))))\n"
        )
        here = Path(__file__).parent.parent
        process = subprocess.Popen([sys.executable, "-c", program, pickle.dumps(store.locator).hex()], cwd=here)
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert process.wait(60) == 0
        before = files(tmp_path)
        tokens = {put(store, b"%d" % i) for i in range(50)}
        assert files(tmp_path) == before
        assert store.missing(tokens, check=True) == set()


class TestDamage:
    @pytest.mark.parametrize("name", ["text", "zeros, more than any chunk"])
    def test_a_check_throws_out_what_is_not_what_its_token_says(
        self, store: ContentStore, tmp_path: Path, name: str
    ) -> None:
        other = put(store, b"other")
        before = files(tmp_path)
        token = put(store, SAMPLES[name])
        assert store.missing({token, other}, check=True) == set()
        path = sorted(files(tmp_path).keys() - before.keys())[0]
        path.write_bytes(path.read_bytes()[:-1] + b"?")
        os.utime(path, ns=(MTIME, MTIME))
        assert store.missing({token, other}) == set()
        assert store.missing({token, other}, check=True) == {token}
        assert not path.exists()
        assert store.missing({token, other}) == {token}
        assert put(store, SAMPLES[name]) == token
        assert store.missing({token, other}, check=True) == set()

    def test_truncated_contents_are_written_again(self, store: ContentStore, tmp_path: Path) -> None:
        before = files(tmp_path)
        token = put(store, b"hello, world")
        [path] = files(tmp_path).keys() - before.keys()
        os.truncate(path, 2)
        os.utime(path, ns=(MTIME, MTIME))
        put(store, b"hello, world")
        assert read(store, token) == b"hello, world"

    def test_a_content_that_is_gone_is_missing_and_cannot_be_opened(self, store: ContentStore, tmp_path: Path) -> None:
        before = files(tmp_path)
        token = put(store, b"hello")
        [path] = files(tmp_path).keys() - before.keys()
        path.unlink()
        assert store.missing({token}) == {token}
        with pytest.raises(PublishError), store.open(token):
            pass

    def test_a_symlink_in_a_store_is_not_followed(self, store: ContentStore, tmp_path: Path) -> None:
        before = files(tmp_path)
        token = put(store, b"hello")
        [path] = files(tmp_path).keys() - before.keys()
        path.rename(tmp_path / "secret")
        path.symlink_to(tmp_path / "secret")
        with pytest.raises(PublishError), store.open(token):
            pass

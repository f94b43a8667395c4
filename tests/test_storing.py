"""How contents go into a store while a layer is read: who takes them, how many at a time, when a batch is left."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from tests.memory_store import MemoryBatch, MemoryStore
from unpacker import storing
from unpacker.changeset import Entry, Kind
from unpacker.digest import Stream
from unpacker.errors import IntegrityError
from unpacker.storing import Batches

HINT = Entry("some/file", Kind.FILE)


class Threaded(MemoryStore):
    """A store that wants threads and calls `taking` for every content, in whatever thread that is."""

    wants_threads = True

    def taking(self, size: int) -> None: ...

    @contextmanager
    def batch(self) -> Iterator[MemoryBatch]:
        store = self

        class Told(MemoryBatch):
            def put(self, stream: Stream, size: int, hint: Entry) -> str:
                store.taking(size)
                return super().put(stream, size, hint)

        with super().batch():
            batch = Told()
            yield batch
            self.contents.update(batch.contents)


@contextmanager
def batches(store: MemoryStore) -> Iterator[Batches]:
    def ignore(_: Future[None]) -> None: ...

    with ThreadPoolExecutor(storing.THREADS) as executor, Batches(store, executor, ignore) as made:
        yield made


def put(made: Batches, data: bytes) -> str:
    return made.put(io.BytesIO(data), len(data), HINT)


def test_a_store_that_wants_threads_gets_contents_from_several_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storing, "GROUP_FILES", 1)
    meeting = threading.Barrier(storing.WORKERS)

    class Meeting(Threaded):
        def taking(self, size: int) -> None:
            meeting.wait(30)

    with batches(Meeting()) as made:
        for number in range(2 * storing.WORKERS):
            put(made, b"%d" % number)


def test_tickets_become_the_tokens_of_their_contents_in_whatever_order_they_are_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(storing, "GROUP_FILES", 3)
    store = Threaded()
    contents = [b"content %d" % (number % 40) for number in range(100)]
    with batches(store) as made:
        tickets = [put(made, data) for data in contents]
    assert [store.contents[made.token(ticket)] for ticket in tickets] == contents


def test_small_contents_are_handed_over_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storing, "GROUP_BYTES", 1000)
    sent: list[Future[None]] = []
    with ThreadPoolExecutor(storing.THREADS) as executor, Batches(Threaded(), executor, sent.append) as made:
        for number in range(50):
            put(made, bytes([number]) * 100)
    # Five groups, and the end of the one batch.
    assert len(sent) == 5 + 1


def test_only_so_many_contents_wait_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storing, "GROUP_FILES", 1)
    may_go_on, lock = threading.Event(), threading.Lock()
    taken = 0

    class Slow(Threaded):
        def taking(self, size: int) -> None:
            nonlocal taken
            assert may_go_on.wait(30)
            with lock:
                taken += 1

    given = 0
    most = 0

    def give() -> None:
        nonlocal given, most
        with batches(Slow()) as made:
            for number in range(50):
                put(made, b"%d" % number)
                given += 1
                with lock:
                    most = max(most, given - taken)

    giver = threading.Thread(target=give)
    giver.start()
    giver.join(0.3)
    before = given
    may_go_on.set()
    giver.join(30)
    assert before <= 2 * storing.WORKERS
    assert (given, taken) == (50, 50)
    assert most <= 3 * storing.WORKERS


def test_a_large_content_is_taken_by_the_thread_that_reads_it() -> None:
    takers = {}

    class Noting(Threaded):
        def taking(self, size: int) -> None:
            takers[size] = threading.current_thread()

    with batches(Noting()) as made:
        put(made, b"x" * 10)
        put(made, bytes((4 << 20) + 1))
    assert takers[(4 << 20) + 1] is threading.current_thread()
    assert takers[10] is not threading.current_thread()


def test_a_batch_is_left_only_when_all_of_it_was_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storing, "BATCH_FILES", 2)
    monkeypatch.setattr(storing, "GROUP_FILES", 1)

    class Late(Threaded):
        left = 0

        def taking(self, size: int) -> None:
            threading.Event().wait(0.02)

        @contextmanager
        def batch(self) -> Iterator[MemoryBatch]:
            with super().batch() as batch:
                yield batch
                self.left += len(batch.contents)

    store = Late()
    with batches(store) as made:
        for number in range(11):
            put(made, b"%d" % number)
    assert (store.left, store.committed) == (11, 6)


def test_a_content_that_ends_early_fails_whoever_takes_it() -> None:
    with pytest.raises(IntegrityError, match="10 bytes ended after 3"), batches(Threaded()) as made:
        made.put(io.BytesIO(b"abc"), 10, HINT)

"""How the contents of one layer go into a ContentStore while it is read: in batches, and where it pays in threads.

A batch becomes durable while the next one is being filled, so that the disk is never idle and little is lost when a run
is killed. Where a store says that taking contents is work (compressing), files are gathered to groups and handed to
threads; what becomes of each is known at the end only, and until then a ticket stands for its token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import AbstractContextManager
from types import TracebackType

from unpacker.changeset import Entry
from unpacker.contracts import Batch, ContentStore
from unpacker.digest import Stream, exactly

BATCH_BYTES = 64 << 20
BATCH_FILES = 1 << 16
"""After how much a batch is made durable: so much is lost, at most, when a run is killed."""

WORKERS = 2
"""Threads that take contents where that is work. A layer has a process of its own, so more of them would only wait."""
THREADS = WORKERS + 1
"""What an executor must have free for one layer."""

GROUP_BYTES = 512 << 10
GROUP_FILES = 256
_HELD = 4 << 20
"""A larger file is not held whole, but taken by the thread that reads."""
_WAITING = 2 * WORKERS
"""Groups that may be under way at once: memory for so many."""

_Group = list[tuple[int, bytes, Entry]]


class Batches:
    """The batches of one layer, one after the other. For one thread; leaving it by exception forgets the last one.

    `failed` is told of every piece of work that ends, so that who reads learns of a failure at once.
    """

    def __init__(self, store: ContentStore, executor: Executor, failed: Callable[[Future[None]], None]) -> None:
        self._store = store
        self._executor = executor
        self._failed = failed
        self._in_threads = store.wants_threads
        self._scope: AbstractContextManager[Batch] | None = None
        self._batch: Batch | None = None
        self._bytes = self._files = 0
        self._group: _Group = []
        self._group_bytes = 0
        self._under_way: deque[Future[None]] = deque()
        self._flushing: Future[None] | None = None
        self._tokens: list[str] = []

    def __enter__(self) -> Batches:
        return self

    def put(self, stream: Stream, size: int, hint: Entry) -> str:
        """Takes exactly `size` bytes; gives their token, or a ticket for `token`."""
        batch = self._batch
        if batch is None:
            scope = self._store.batch()
            batch = self._batch = scope.__enter__()
            self._scope = scope
        if self._in_threads and size <= _HELD:
            token = self._hand_over(exactly(stream, size), hint)
        else:
            token = batch.put(stream, size, hint)
        self._bytes += size
        self._files += 1
        # Of what threads have in hand, the batch does not know yet.
        written = self._bytes if self._in_threads else batch.written
        if written >= BATCH_BYTES or self._files >= BATCH_FILES:
            self._flush()
        return token

    def token(self, ticket: str) -> str:
        """The token of what `put` gave; after the batches were left."""
        return self._tokens[int(ticket)] if ticket.isdecimal() else ticket

    @property
    def gives_tickets(self) -> bool:
        """Whether `put` may give tickets."""
        return self._in_threads

    def _hand_over(self, data: bytes, hint: Entry) -> str:
        ticket = len(self._tokens)
        self._tokens.append("")
        self._group.append((ticket, data, hint))
        self._group_bytes += len(data)
        if self._group_bytes >= GROUP_BYTES or len(self._group) >= GROUP_FILES:
            self._send()
        return str(ticket)

    def _send(self) -> None:
        """Gives the group to the threads; waits while they have too much."""
        group, self._group, self._group_bytes = self._group, [], 0
        if not group or self._batch is None:
            return
        while len(self._under_way) >= _WAITING:
            self._under_way.popleft().result()
        sent = self._executor.submit(self._take, self._batch, group)
        sent.add_done_callback(self._failed)
        self._under_way.append(sent)

    def _take(self, batch: Batch, group: _Group) -> None:
        tokens = self._tokens
        for ticket, data, hint in group:
            tokens[ticket] = batch.put(_Held(data), len(data), hint)

    def _flush(self) -> None:
        """Hands the batch to a thread that leaves it, at most one at a time, so that they cannot pile up."""
        self._send()
        self._wait()
        scope, self._scope, self._batch, self._bytes, self._files = self._scope, None, None, 0, 0
        if scope is not None:
            # What is under way for this batch was sent before, so it does not wait for the thread that waits for it.
            self._flushing = self._executor.submit(_leave, scope, list(self._under_way))
            self._flushing.add_done_callback(self._failed)

    def _wait(self) -> None:
        if self._flushing is not None:
            self._flushing.result()

    def _abandon(self, error: BaseException) -> None:
        scope, self._scope = self._scope, None
        if scope is not None:
            for sent in self._under_way:
                sent.exception()  # Waits: nobody may write into a batch that is being forgotten.
            scope.__exit__(type(error), error, error.__traceback__)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._abandon(error)
            return
        try:
            self._flush()
            self._wait()
        except BaseException as failure:
            self._abandon(failure)
            raise


def _leave(scope: AbstractContextManager[Batch], under_way: list[Future[None]]) -> None:
    try:
        for sent in under_way:
            sent.result()
    except BaseException as error:
        for sent in under_way:
            sent.exception()
        scope.__exit__(type(error), error, error.__traceback__)
        raise
    scope.__exit__(None, None, None)


class _Held:
    """A Stream of bytes at hand, given in one piece and not copied."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def read(self, size: int, /) -> bytes:
        data, self._data = self._data, b""
        return data

"""A blob as one stream over as many connections as it takes.

A connection that breaks is followed by another one that asks for the rest (`Range`). That the parts make up one blob
is for the digest to say, which is taken over the whole (`VerifiedReader`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack

from unpacker.errors import IntegrityError, RegistryError
from unpacker.registry.retry import Later, Policy
from unpacker.registry.transport import Answer

PIECE = 256 << 10
"""Bytes that one read gives at most: large enough that what is done once per piece costs nothing."""
_PROGRESS = 16 << 20
"""After so many bytes a connection has earned its keep, and the count of broken ones starts anew."""


class ResumingStream:
    """The bytes of one blob, in order, each once. For one thread; `close()` when done.

    `ask` makes one attempt at a request with these headers and gives its answer, status 200 or 206. After
    `policy.attempts` broken connections in a row without much progress the last one's error is raised.
    """

    def __init__(
        self, ask: Callable[[dict[str, str]], AbstractContextManager[Answer]], size: int, policy: Policy, what: str
    ) -> None:
        self._ask = ask
        self._size = size
        self._policy = policy
        self._what = what
        self._position = 0
        self._rest = memoryview(b"")
        self._connection = ExitStack()
        self._failures = 0
        self._earned = 0
        self._pieces = self._connect()

    def close(self) -> None:
        self._connection.close()

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes, b"" at the end of what the registry sends."""
        if not self._rest:
            data = self._gather(min(size, PIECE))
            if len(data) <= size:
                return data  # the usual case, in which nothing is copied
            self._rest = memoryview(data)
        data = bytes(self._rest[:size])
        self._rest = self._rest[size:]
        return data

    def _gather(self, size: int) -> bytes:
        pieces: list[bytes] = []
        while size > 0 and (piece := self._next()):
            pieces.append(piece)
            size -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _next(self) -> bytes:
        while True:
            try:
                piece = next(self._pieces, b"")
            except Later as error:
                if self._position >= self._size:
                    return b""  # all that was wanted is here; how the connection ended does not matter
                self._resume(error)
                continue
            if piece or self._position >= self._size:
                self._position += len(piece)
                return piece
            # Without Content-Length an early end looks like any other.
            self._resume(Later(f"{self._what}: the connection was closed early"))

    def _resume(self, error: Later) -> None:
        self._connection.close()
        if self._position - self._earned >= _PROGRESS:
            self._failures, self._earned = 0, self._position
        self._failures += 1
        if self._failures >= self._policy.attempts or self._policy.closing.is_set():
            raise Later(
                f"{error} (after {self._position} of {self._size} bytes; connection {self._failures} in a row)",
                status=error.status,
            )
        self._policy.sleep(self._policy.pause(self._failures))
        self._pieces = self._connect()

    def _connect(self) -> Iterator[bytes]:
        return self._policy.run(self._open)

    def _open(self) -> Iterator[bytes]:
        headers = {"Range": f"bytes={self._position}-"} if self._position else {}
        with ExitStack() as opening:
            answer = opening.enter_context(self._ask(headers))
            pieces = answer.pieces()
            if answer.status == 206:
                start = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
                if start is None or int(start[1]) != self._position or not self._position:
                    raise RegistryError(f"{self._what}: it sent another range than asked for", status=206)
            else:
                if answer.length is not None and answer.length != self._size:
                    raise IntegrityError(f"{self._what}: {answer.length} bytes, where the image says {self._size}")
                if self._position:
                    # A server without ranges begins again.
                    pieces = _skipping(pieces, self._position)
            self._connection = opening.pop_all()
            return pieces


def _skipping(pieces: Iterator[bytes], count: int) -> Iterator[bytes]:
    for piece in pieces:
        if count < len(piece):
            yield piece[count:]
        count = max(0, count - len(piece))

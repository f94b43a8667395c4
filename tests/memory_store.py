"""A ContentStore in memory: the contract at its smallest, for tests of whoever fills a store."""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

from unpacker.changeset import Entry
from unpacker.digest import Stream

_PIECE = 1 << 18


@dataclass(frozen=True)
class MemoryLocator:
    """Opens the one store it was made for; not across processes."""

    store: MemoryStore

    def open(self) -> MemoryStore:
        return self.store


@dataclass(eq=False)
class MemoryStore:
    """Keeps contents by their sha256; what a batch got counts once it was left cleanly.

    `committed` counts the batches left cleanly, `abandoned` the others. With `keep=False` only sizes and hashes are
    looked at, for measuring. `wants_threads` is for tests to change.
    """

    wants_threads: ClassVar[bool] = False
    contents: dict[str, bytes] = field(default_factory=dict)
    keep: bool = True
    committed: int = 0
    abandoned: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def locator(self) -> MemoryLocator:
        return MemoryLocator(self)

    @contextmanager
    def batch(self) -> Iterator[MemoryBatch]:
        batch = MemoryBatch(keep=self.keep)
        try:
            yield batch
        except BaseException:
            with self._lock:
                self.abandoned += 1
            raise
        with self._lock:
            self.contents.update(batch.contents)
            self.committed += 1

    @contextmanager
    def open(self, token: str) -> Iterator[Stream]:
        yield io.BytesIO(self.contents[token])

    def missing(self, tokens: Collection[str], *, check: bool = False) -> set[str]:
        if check:
            for token in set(tokens) & self.contents.keys():
                if hashlib.sha256(self.contents[token]).hexdigest() != token:
                    del self.contents[token]
        return {token for token in tokens if token not in self.contents}


@dataclass
class MemoryBatch:
    keep: bool = True
    written: int = 0
    contents: dict[str, bytes] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def put(self, stream: Stream, size: int, hint: Entry) -> str:
        pieces, left = [], size
        hasher = hashlib.sha256()
        while left:
            data = stream.read(min(left, _PIECE))
            assert 0 < len(data) <= left, "a content of another size than announced"
            hasher.update(data)
            left -= len(data)
            if self.keep:
                pieces.append(data)
        assert stream.read(1) == b"", "a content longer than announced"
        token = hasher.hexdigest()
        with self._lock:
            self.written += size
            self.contents[token] = b"".join(pieces)
        return token

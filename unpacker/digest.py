"""Digests of exact bytes, and a reader that verifies size and digest to the last byte.

Grammar and registered algorithms: OCI image specification, `descriptor.md`, section Digests.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from unpacker.errors import IntegrityError

if TYPE_CHECKING:
    from hashlib import _Hash

HEX_LENGTH = {"sha256": 64, "sha512": 128}
_HEX = re.compile(r"[0-9a-f]+")


class Stream(Protocol):
    """Bytes read forward once. `read(n)` gives at most n bytes, and b"" at the end only."""

    def read(self, size: int, /) -> bytes: ...


def exactly(stream: Stream, size: int) -> bytes:
    """The next `size` bytes of a stream; IntegrityError if it ends before."""
    data = stream.read(size) if size else b""
    if len(data) == size:
        return data
    found, got = [data], len(data)
    while got < size:
        data = stream.read(size - got)
        if not data:
            raise IntegrityError(f"a file of {size} bytes ended after {got}")
        found.append(data)
        got += len(data)
    return b"".join(found)


@dataclass(frozen=True, slots=True, order=True)
class Digest:
    """`algorithm:hex`, the name of exact bytes."""

    algorithm: str
    hex: str

    @classmethod
    def parse(cls, text: str) -> Digest:
        """Reads `sha256:…` or `sha512:…`; ValueError says what is wrong."""
        algorithm, colon, hexadecimal = text.partition(":")
        length = HEX_LENGTH.get(algorithm)
        shown = repr(text if len(text) <= 150 else text[:149] + "…")
        if not colon or length is None:
            raise ValueError(f"not a digest: {shown} (expected sha256:<64 hex digits>)")
        if len(hexadecimal) != length or not _HEX.fullmatch(hexadecimal):
            raise ValueError(f"not a {algorithm} digest: {shown} (expected {length} lower-case hex digits)")
        return cls(algorithm, hexadecimal)

    @classmethod
    def of(cls, data: bytes, algorithm: str = "sha256") -> Digest:
        """The digest of bytes at hand."""
        return cls(algorithm, hashlib.new(algorithm, data).hexdigest())

    def hasher(self) -> _Hash:
        """A fresh hash object of this digest's algorithm."""
        return hashlib.new(self.algorithm)

    def check(self, data: bytes, what: str) -> bytes:
        """Gives `data` back if it is what this digest names; IntegrityError names `what` otherwise."""
        found = Digest.of(data, self.algorithm)
        if found != self:
            raise IntegrityError(f"{what}: expected {self}, got {found}")
        return data

    @property
    def short(self) -> str:
        """For tables: the first 12 hex digits, as docker prints them."""
        return self.hex[:12]

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.hex}"


class VerifiedReader:
    """A stream that raises IntegrityError rather than end early, late or different.

    The last bytes are handed out only after the whole was found right, so who reads to b"" has verified bytes.
    """

    def __init__(self, stream: Stream, digest: Digest, size: int, what: str) -> None:
        self._stream = stream
        self._digest = digest
        self._left = size
        self._size = size
        self._what = what
        self._hash = digest.hasher()
        self._verified = False

    def read(self, size: int, /) -> bytes:
        if size < 0:
            # "All there is" has no bound, and b"" here would look like a verified end.
            raise ValueError(f"{self._what}: read a number of bytes, not {size}")
        if self._verified or size == 0:
            return b""
        data = self._stream.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise IntegrityError(f"{self._what}: longer than the {self._size} bytes announced")
        if not data and self._left:
            got = self._size - self._left
            raise IntegrityError(f"{self._what}: ended after {got} of {self._size} bytes")
        self._hash.update(data)
        if self._left == 0:
            self._finish()
        return data

    def _finish(self) -> None:
        if self._stream.read(1):
            raise IntegrityError(f"{self._what}: longer than the {self._size} bytes announced")
        found = self._hash.hexdigest()
        if found != self._digest.hex:
            raise IntegrityError(f"{self._what}: expected {self._digest}, got {self._digest.algorithm}:{found}")
        self._verified = True

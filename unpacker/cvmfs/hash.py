"""The content hash of CernVM-FS: names the bytes of an object as they are stored."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from unpacker.digest import Stream

SIZE = 20

# What flags bits 8 to 10 hold: the number of the algorithm, which counts from MD5 = 0, minus 1.
_FLAGS_SHIFT = 8
_FLAGS = {"sha1": 0 << _FLAGS_SHIFT, "rmd160": 1 << _FLAGS_SHIFT, "shake128": 2 << _FLAGS_SHIFT}
_FLAGS_MASK = 7 << _FLAGS_SHIFT
_TAGS = {"sha1": "", "rmd160": "-rmd160", "shake128": "-shake128"}
_TEXT = re.compile(r"([0-9a-f]{40})(?:-(rmd160|shake128))?")

ALGORITHMS = tuple(_FLAGS)


class Hasher:
    """A running hash of one of the three algorithms."""

    __slots__ = ("_algorithm", "_hash")

    def __init__(self, algorithm: str) -> None:
        _known(algorithm)
        self._algorithm = algorithm
        # An OpenSSL without its legacy provider has no RIPEMD-160 and raises ValueError here.
        name = {"sha1": "sha1", "rmd160": "ripemd160", "shake128": "shake_128"}[algorithm]
        self._hash = hashlib.new(name, usedforsecurity=False)

    def update(self, data: bytes | bytearray | memoryview) -> None:
        self._hash.update(data)

    def result(self) -> ContentHash:
        """The hash of everything so far."""
        if self._algorithm == "shake128":
            # hashlib.new gives one type for both kinds; typeshed knows only the kind with a fixed length.
            return ContentHash(self._hash.digest(SIZE), self._algorithm)  # type: ignore[call-arg]
        return ContentHash(self._hash.digest(), self._algorithm)


@dataclass(frozen=True, slots=True, order=True)
class ContentHash:
    """20 bytes and the algorithm that gave them. The type suffix of an object is no part of its hash."""

    digest: bytes
    algorithm: str = "sha1"

    def __post_init__(self) -> None:
        _known(self.algorithm)
        if len(self.digest) != SIZE:
            raise ValueError(f"a content hash has {SIZE} bytes, not {len(self.digest)}")

    @classmethod
    def parse(cls, text: str) -> ContentHash:
        """Reads the textual form, without a suffix; ValueError says what is wrong."""
        found = _TEXT.fullmatch(text)
        if found is None:
            raise ValueError(f"not a content hash: {text[:100]!r} (expected 40 hex digits, perhaps an algorithm)")
        return cls(bytes.fromhex(found[1]), found[2] or "sha1")

    @classmethod
    def from_flags(cls, digest: bytes, flags: int) -> ContentHash:
        """From a BLOB column of a catalog and the flags of its row."""
        for algorithm, bits in _FLAGS.items():
            if flags & _FLAGS_MASK == bits:
                return cls(digest, algorithm)
        raise ValueError(f"flags {flags:#x} name no known hash algorithm")

    @classmethod
    def of(cls, data: bytes | bytearray, algorithm: str = "sha1") -> ContentHash:
        """The hash of bytes at hand."""
        if algorithm == "sha1":
            # The usual case, at a third of the price: a layer has many small files.
            return cls(hashlib.sha1(data, usedforsecurity=False).digest())
        hasher = Hasher(algorithm)
        hasher.update(data)
        return hasher.result()

    @classmethod
    def of_stream(cls, stream: Stream, algorithm: str = "sha1") -> ContentHash:
        """The hash of all that a stream still holds."""
        hasher = Hasher(algorithm)
        while piece := stream.read(1 << 20):
            hasher.update(piece)
        return hasher.result()

    def hasher(self) -> Hasher:
        """A fresh hasher of this hash's algorithm."""
        return Hasher(self.algorithm)

    @property
    def hex(self) -> str:
        """The textual form, as in manifests, properties and tags: hex digits and the algorithm unless it is SHA-1."""
        return self.digest.hex() + _TAGS[self.algorithm]

    @property
    def flags_bits(self) -> int:
        """The algorithm, where the flags of a catalog row have it."""
        return _FLAGS[self.algorithm]

    def object_path(self, suffix: str = "") -> str:
        """Where a repository keeps the object, relative to its root."""
        text = self.hex
        return f"data/{text[:2]}/{text[2:]}{suffix}"

    def __str__(self) -> str:
        return self.hex


def _known(algorithm: str) -> None:
    if algorithm not in _FLAGS:
        raise ValueError(f"no hash algorithm of CernVM-FS: {algorithm!r} (one of {', '.join(ALGORITHMS)})")

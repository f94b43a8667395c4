"""Signed letters, the form of `.cvmfspublished` and `.cvmfswhitelist`: a text, its hash, a signature of that hash.

    <text, whole lines>
    --
    <hash of the text in hex>
    <signature, raw bytes to the end>

What is signed is the hash as ASCII text. Manifests and whitelists differ in how: see `keys`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from unpacker.cvmfs.hash import ContentHash
from unpacker.errors import PublishError

LIMIT = 1 << 20
"""Of a letter in bytes; a manifest has 500, a whitelist about 100 per certificate."""

_SEPARATOR = b"--\n"


@dataclass(frozen=True, slots=True)
class Letter:
    """A text that fits its hash, and a signature that nobody has verified yet."""

    text: bytes
    hash: ContentHash
    signature: bytes

    @classmethod
    def parse(cls, data: bytes, what: str) -> Letter:
        """Takes a letter apart and checks the hash; PublishError names `what`."""
        if len(data) > LIMIT:
            raise PublishError(f"{what} is longer than {LIMIT} bytes, so it is none")
        start = data.find(b"\n" + _SEPARATOR) + 1
        if not start:
            raise PublishError(f"{what} has no signature: it is cut short, or something else")
        text, rest = data[:start], data[start + len(_SEPARATOR) :]
        line, newline, signature = rest.partition(b"\n")
        try:
            named = ContentHash.parse(line.decode("ascii"))
            found = ContentHash.of(text, named.algorithm)
        except ValueError as error:
            raise PublishError(f"{what}: the line before its signature: {error}") from None
        if not newline or not signature:
            raise PublishError(f"{what} has no signature: it is cut short")
        if found != named:
            raise PublishError(f"{what} is damaged: its text is not what its hash says; restore it")
        return cls(text, named, signature)

    @property
    def signed(self) -> bytes:
        """What the signature signs."""
        return self.hash.hex.encode("ascii")


def seal(text: bytes, algorithm: str, sign: Callable[[bytes], bytes]) -> bytes:
    """The letter of a text, signed by `sign`."""
    # The first line of dashes ends the text for every reader; one inside would cut what is signed.
    if not text.endswith(b"\n") or b"\n" + _SEPARATOR in b"\n" + text:
        raise ValueError("a letter's text is whole lines, none of them two dashes")
    signed = ContentHash.of(text, algorithm).hex.encode("ascii")
    return text + _SEPARATOR + signed + b"\n" + sign(signed)

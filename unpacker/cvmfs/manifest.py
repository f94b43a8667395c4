"""The manifest `.cvmfspublished`: which root catalog a repository stands at. Replacing it is the one atomic switch."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import md5

from unpacker.cvmfs.hash import ContentHash
from unpacker.cvmfs.keys import Certificate, RepositoryKey
from unpacker.cvmfs.signing import Letter, seal
from unpacker.errors import PublishError

FILE = ".cvmfspublished"
TTL = 240
"""Seconds after which clients ask again, unless the root catalog says otherwise."""

_ROOT_PATH = md5(b"", usedforsecurity=False).hexdigest()
_NUMBER_LIMIT = 19


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a manifest says.

    `root_size` is that of the catalog uncompressed, `published` in Unix seconds. `others` are lines of letters that
    this version does not know, kept as they are.
    """

    name: str
    root: ContentHash
    root_size: int
    revision: int
    published: int
    certificate: ContentHash
    ttl: int = TTL
    history: ContentHash | None = None
    meta_info: ContentHash | None = None
    reflog: ContentHash | None = None
    collectable: bool = True
    alternative_paths: bool = False
    others: tuple[str, ...] = ()

    @classmethod
    def parse(cls, letter: Letter, what: str) -> Manifest:
        """Reads a letter as a manifest; PublishError names `what`."""
        values: dict[str, str] = {}
        others = []
        for line in letter.text.decode("utf-8", "surrogateescape").split("\n")[:-1]:
            if line[:1] in _KNOWN:
                values[line[0]] = line[1:]
            elif line and line[0] != _MICRO_CATALOG:  # That of the next revision would be another one.
                others.append(line)
        missing = [field for field in "CBRDSNXT" if field not in values]
        if missing:
            raise PublishError(f"{what} lacks the fields {', '.join(missing)}: it is no manifest, or damaged")
        if values["R"] != _ROOT_PATH:
            raise PublishError(f"{what} is of a part of a repository, which cannot be published")
        return cls(
            name=values["N"],
            root=_hash(values["C"], what),
            root_size=_number(values["B"], what),
            revision=_number(values["S"], what),
            published=_number(values["T"], what),
            certificate=_hash(values["X"], what),
            ttl=_number(values["D"], what),
            history=_optional(values.get("H"), what),
            meta_info=_optional(values.get("M"), what),
            reflog=_optional(values.get("Y"), what),
            collectable=values.get("G") == "yes",
            alternative_paths=values.get("A") == "yes",
            others=tuple(others),
        )

    def text(self) -> bytes:
        """What is signed, in the order in which the official tools write it."""
        fields: list[tuple[str, object]] = [
            ("C", self.root),
            ("B", self.root_size),
            ("R", _ROOT_PATH),
            ("D", self.ttl),
            ("S", self.revision),
            ("G", "yes" if self.collectable else "no"),
            ("A", "yes" if self.alternative_paths else "no"),
            ("N", self.name),
            ("X", self.certificate),
            ("H", self.history),
            ("T", self.published),
            ("M", self.meta_info),
            ("Y", self.reflog),
        ]
        lines = [f"{letter}{value}" for letter, value in fields if value is not None]
        return "".join(f"{line}\n" for line in (*lines, *self.others)).encode("utf-8", "surrogateescape")

    def sealed(self, key: RepositoryKey) -> bytes:
        """The file: signed by the repository key, hashed as its root catalog is."""
        return seal(self.text(), self.root.algorithm, key.sign)


def verified(data: bytes, certificate: Certificate, what: str) -> Manifest:
    """A manifest that the certificate's key signed; PublishError otherwise."""
    letter = Letter.parse(data, what)
    certificate.verify(letter, what)
    return Manifest.parse(letter, what)


_KNOWN = frozenset("CBRDSGANXHTMY")
_MICRO_CATALOG = "L"


def _hash(text: str, what: str) -> ContentHash:
    try:
        return ContentHash.parse(text)
    except ValueError as error:
        raise PublishError(f"{what}: {error}") from None


def _optional(text: str | None, what: str) -> ContentHash | None:
    return _hash(text, what) if text else None


def _number(text: str, what: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= _NUMBER_LIMIT):
        raise PublishError(f"{what}: not a number: {text[:30]!r}")
    return int(text)

"""The one file in a repository that says all that is published there, so that nobody reads a record per image.

`.metadata/published.zst`, written in the same revision as what it describes: zstd of lines, each of fields with tabs
between them, the last of which is JSON.

    unpacker  <version>
    name      <public path>  <root>  <record>
    root      <root's name>  <facts>
    layer     <hex of the digest of a layer that is published as a directory>

Lines are parsed when they are asked for: a publish touches few of them. The records of single names, for other readers
and for making a lost index anew, are beside it in `.metadata/<public path>/`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import NamedTuple

import zstandard

from unpacker.errors import PublishError
from unpacker.publish.roots import METADATA, RootFacts
from unpacker.record import Published, Unreadable

FILE = f"{METADATA}/published.zst"
LIMIT = 1 << 30
VERSION = 1


class Line(NamedTuple):
    """What is kept of one name: the root's path, and its record as it is written."""

    root: str
    record: bytes


@dataclass(frozen=True, slots=True)
class Index:
    """All names by public path, all roots of ours by their name, all layers of ours by their digest."""

    names: Mapping[str, Line]
    roots: Mapping[str, bytes]
    layers: frozenset[str]

    @classmethod
    def parse(cls, data: bytes, what: str) -> Index:
        """Reads `serialise`'s bytes; ValueError if they are damaged, PublishError if a newer version wrote them."""
        try:
            with zstandard.ZstdDecompressor().stream_reader(data) as reader:
                text = reader.read(LIMIT)
        except zstandard.ZstdError as error:
            raise ValueError(f"not compressed by zstd: {error}") from None
        first, *lines = text.split(b"\n")
        if not first.startswith(b"unpacker\t") or lines[-1:] != [b""]:
            raise ValueError("not whole")
        if first != b"unpacker\t%d" % VERSION:
            raise PublishError(f"{what} was written by another version of unpacker: use that version, or a newer one")
        names: dict[str, Line] = {}
        roots: dict[str, bytes] = {}
        layers: set[str] = set()
        for line in lines[:-1]:
            kind, _, rest = line.partition(b"\t")
            key, tab, rest = rest.partition(b"\t")
            if kind == b"name" and tab:
                root, _, record = rest.partition(b"\t")
                names[key.decode("utf-8", "surrogateescape")] = Line(root.decode("utf-8", "surrogateescape"), record)
            elif kind == b"root" and tab:
                roots[key.decode("utf-8", "surrogateescape")] = rest
            elif kind == b"layer" and not tab:
                layers.add(key.decode("utf-8", "surrogateescape"))
            else:
                raise ValueError(f"a line of unknown kind: {line[:50]!r}")
        return cls(names, roots, frozenset(layers))

    def serialise(self) -> bytes:
        """The same names and roots give the same bytes."""
        lines = [b"unpacker\t%d" % VERSION]
        for name, line in sorted(self.names.items()):
            lines.append(b"\t".join((b"name", _bytes(name), _bytes(line.root), line.record)))
        lines.extend(b"\t".join((b"root", _bytes(name), facts)) for name, facts in sorted(self.roots.items()))
        lines.extend(b"layer\t" + _bytes(name) for name in sorted(self.layers))
        return zstandard.ZstdCompressor(level=3).compress(b"\n".join((*lines, b"")))

    def facts(self, name: str) -> RootFacts | None:
        """What is known of a root; None if it is not ours, or that is damaged: then it is never used again."""
        line = self.roots.get(name)
        try:
            return None if line is None else RootFacts.parse(line)
        except ValueError:
            return None


def name_line(record: Published) -> Line:
    """How a record is kept."""
    return Line(record.root, json.dumps(record.to_json(), separators=(",", ":")).encode("ascii"))


def root_line(facts: RootFacts) -> bytes:
    """How the facts of a root are kept."""
    return json.dumps(asdict(facts), separators=(",", ":")).encode("ascii")


def parse_record(public_path: str, data: bytes) -> Published | Unreadable:
    """The record of a name, from its line or from record.json."""
    try:
        record = Published.parse(data)
    except (ValueError, RecursionError) as error:
        return Unreadable(public_path, f"its record is damaged: {error}")
    if record.public_path != public_path:
        return Unreadable(public_path, f"its record is that of {record.public_path}")
    return record


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")

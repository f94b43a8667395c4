"""What a repository says of all that is published in it, so that nobody reads a record per image.

`.metadata/published/`, written in the same revision as what it describes, text in lines of fields with tabs between:

    head      unpacker <version>, revision <number>: the revision of which all of this is true
    00 … ff   one part for each two digits that image IDs begin with; what is known of one image is in one of them:
              name   <public path>  <root>  <record>
              root   <root's name>  <facts>
              layer  <hex of the digest of a layer that came with one of these roots as a directory>
    others    <public path>  <root>: names that lead somewhere, and of which there is no record; %, tab and line feed
              as %25, %09 and %0A, because others may write any name

So a publish rewrites one part or two, however many images there are. Records and facts are JSON, parsed when they are
asked for. The records of single names, for other readers and for making a lost index anew, are beside it in
`.metadata/<public path>/`. Version 1 was one file `.metadata/published.zst`; the next publish takes it away.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any, NamedTuple

import zstandard

from unpacker.errors import PublishError
from unpacker.publish.roots import FLAT, METADATA, RootFacts, root_path
from unpacker.record import Published, Unreadable

DIRECTORY = f"{METADATA}/published"
HEAD, OTHERS = "head", "others"
OLD = f"{METADATA}/published.zst"
LIMIT = 1 << 30
VERSION = 2
NUMBERS = tuple(f"{number:02x}" for number in range(256))
"""The names of the parts."""

_NUMBERS = frozenset(NUMBERS)

_FIRST = b"unpacker\t%d\n" % VERSION


class Line(NamedTuple):
    """What is kept of one name: the root's path, and its record as it is written."""

    root: str
    record: bytes


@dataclass(frozen=True, slots=True)
class Part:
    """Names by public path, roots of ours by their name, layers of ours by their digest."""

    names: Mapping[str, Line]
    roots: Mapping[str, bytes]
    layers: frozenset[str]

    @classmethod
    def parse(cls, data: bytes) -> Part:
        """Reads `serialise`'s bytes; ValueError says how they are damaged."""
        names: dict[str, Line] = {}
        roots: dict[str, bytes] = {}
        layers: set[str] = set()
        if data and not data.endswith(b"\n"):
            raise ValueError("not whole")
        for line in data.split(b"\n")[:-1]:
            # JSON has no tabs.
            match line.split(b"\t"):
                case [b"name", path, root, record]:
                    names[_text(path)] = Line(_text(root), record)
                case [b"root", name, facts]:
                    roots[_text(name)] = facts
                case [b"layer", layer]:
                    layers.add(_text(layer))
                case _:
                    raise ValueError(f"a line of unknown kind: {line[:50]!r}")
        return cls(names, roots, frozenset(layers))

    def serialise(self) -> bytes:
        """The same names and roots give the same bytes; none if there is nothing in it."""
        lines = [
            b"\t".join((b"name", _bytes(name), _bytes(line.root), line.record))
            for name, line in sorted(self.names.items())
        ]
        lines.extend(b"\t".join((b"root", _bytes(name), facts)) for name, facts in sorted(self.roots.items()))
        lines.extend(b"layer\t" + _bytes(name) for name in sorted(self.layers))
        return b"\n".join((*lines, b""))

    def facts(self, name: str) -> RootFacts | None:
        """What is known of a root; None if it is not ours, or that is damaged: then it is never used again."""
        line = self.roots.get(name)
        try:
            return None if line is None else RootFacts.parse(line)
        except ValueError:
            return None


EMPTY = Part({}, {}, frozenset())


class Index:
    """The index of one revision. Its parts are read when they are asked for, and kept; safe from many threads.

    `revision` is the one of which it is true, 0 if that cannot be told: then links may say otherwise. `others` are
    names without a record, with what they lead to.
    """

    def __init__(
        self,
        revision: int,
        others: Mapping[str, str],
        parts: Mapping[str, Part],
        read: Callable[[str], bytes | None] | None = None,
    ) -> None:
        self.revision = revision
        self.others = others
        self._parts = dict(parts)
        self._read = read

    def part(self, number: str) -> Part:
        """One part; ValueError if it is damaged."""
        found = self._parts.get(number)
        if found is None:
            data = self._read(number) if self._read is not None else None
            found = self._parts[number] = EMPTY if data is None else Part.parse(data)
        return found

    def parts(self) -> Iterator[Part]:
        """All of them; ValueError if one is damaged."""
        return map(self.part, NUMBERS)


def number_of(root: str) -> str | None:
    """The part in which all is that is known of the root at this path; None if no root of ours can be there."""
    top, _, rest = root.partition("/")
    group, _, name = rest.partition("/")
    return group if top == FLAT and group in _NUMBERS and name.startswith(group) else None


def number_for(public_path: str, root: str) -> str:
    """The part in which a name is that leads to `root`. Those that lead to no root, such as fronts, are spread."""
    return number_of(root) or sha256(_bytes(public_path)).hexdigest()[:2]


def parts_of(names: Mapping[str, Line], roots: Mapping[str, bytes], layers: Iterable[str]) -> dict[str, Part]:
    """All the parts, from what is in them. Layers whose roots nobody knows go by their own digits."""
    found: dict[str, tuple[dict[str, Line], dict[str, bytes], set[str]]] = {n: ({}, {}, set()) for n in NUMBERS}
    for path, line in names.items():
        found[number_for(path, line.root)][0][path] = line
    for name, facts in roots.items():
        number = number_of(root_path(name))
        if number is not None:
            found[number][1][name] = facts
    for layer in layers:
        if layer[:2] in found:
            found[layer[:2]][2].add(layer)
    return {number: Part(one, two, frozenset(three)) for number, (one, two, three) in found.items()}


def head(revision: int) -> bytes:
    """The bytes of `head`."""
    return _FIRST + b"revision\t%d\n" % revision


def parse_head(data: bytes, what: str) -> int:
    """The revision that `head` names; ValueError if it is damaged, PublishError if a newer version wrote it."""
    first, _, rest = data.partition(b"\n")
    word, _, version = first.partition(b"\t")
    if word != b"unpacker" or not version.isdigit():
        raise ValueError("not the head of an index")
    if int(version) != VERSION:
        raise _of_another_version(what)
    name, _, number = rest.removesuffix(b"\n").partition(b"\t")
    if name != b"revision" or not number.isdigit():
        raise ValueError("not the head of an index")
    return int(number)


def serialise_others(others: Mapping[str, str]) -> bytes:
    """The bytes of `others`; none if there are no such names."""
    return b"".join(b"%b\t%b\n" % (_escaped(path), _escaped(root)) for path, root in sorted(others.items()))


def parse_others(data: bytes) -> dict[str, str]:
    """Reads `serialise_others`'s bytes; ValueError if they are damaged."""
    if data and not data.endswith(b"\n"):
        raise ValueError("not whole")
    found = {}
    for line in data.split(b"\n")[:-1]:
        path, tab, root = line.partition(b"\t")
        if not tab:
            raise ValueError(f"not a name and a root: {line[:50]!r}")
        found[_plain(path)] = _plain(root)
    return found


def parse_old(data: bytes, what: str) -> dict[str, Part]:
    """The parts, from the file of version 1. ValueError if that is damaged, PublishError if it is no such version."""
    try:
        with zstandard.ZstdDecompressor().stream_reader(data) as reader:
            text = reader.read(LIMIT)
    except zstandard.ZstdError as error:
        raise ValueError(f"not compressed by zstd: {error}") from None
    first, newline, rest = text.partition(b"\n")
    if not first.startswith(b"unpacker\t") or not newline:
        raise ValueError("not whole")
    if first != b"unpacker\t1":
        raise _of_another_version(what)
    whole = Part.parse(rest)
    return parts_of(whole.names, whole.roots, whole.layers)


def name_line(record: Published) -> Line:
    """How a record is kept."""
    return Line(record.root, json.dumps(record.to_json(), separators=(",", ":")).encode("ascii"))


def root_line(facts: RootFacts) -> bytes:
    """How the facts of a root are kept."""
    return json.dumps(asdict(facts), separators=(",", ":")).encode("ascii")


def parse_record(public_path: str, data: bytes) -> Published | Unreadable:
    """The record of a name, from its line or from record.json."""
    try:
        return _record(public_path, json.loads(data))
    except (ValueError, RecursionError) as error:
        return Unreadable(public_path, f"its record is damaged: {error}")


def parse_records(lines: Mapping[str, Line]) -> dict[str, Published | Unreadable]:
    """The records of many names. Read as one document, which takes less than half the time, where none is damaged."""
    try:
        values = json.loads(b"[%b]" % b",".join(line.record for line in lines.values()))
    except (ValueError, RecursionError):
        values = []
    if len(values) != len(lines):
        return {path: parse_record(path, line.record) for path, line in lines.items()}
    return {path: _record(path, value) for path, value in zip(lines, values, strict=True)}


def _record(public_path: str, value: Any) -> Published | Unreadable:
    try:
        record = Published.from_json(value)
    except (ValueError, RecursionError) as error:
        return Unreadable(public_path, f"its record is damaged: {error}")
    if record.public_path != public_path:
        return Unreadable(public_path, f"its record is that of {record.public_path}")
    return record


def _of_another_version(what: str) -> PublishError:
    return PublishError(f"{what} was written by another version of unpacker: use that version, or a newer one")


def _escaped(text: str) -> bytes:
    return _bytes(text).replace(b"%", b"%25").replace(b"\t", b"%09").replace(b"\n", b"%0A")


def _plain(data: bytes) -> str:
    return _text(data.replace(b"%0A", b"\n").replace(b"%09", b"\t").replace(b"%25", b"%"))


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")

"""A file that a person wrote, as text whose every value knows where it stands; and what is found wrong in it.

YAML is read from the parser's events into three kinds of nodes. All scalars stay the text that was written (`3.10` is
not a number here), duplicate keys and foreign tags are faults with a place, and nothing in the file can make reading it
deep, endless or large: depth, size and the number of values, aliases followed, are bounded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

import yaml

from unpacker.errors import WishlistError

SIZE_LIMIT = 8 << 20
DEPTH_LIMIT = 32
VALUES_LIMIT = 100_000
FINDINGS_LIMIT = 1_000
"""Findings kept of one file; the last one says how many more there were."""
_TOO_DEEP = f"nested deeper than {DEPTH_LIMIT} levels"

_NOT_TEXT = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_NULLS = frozenset({"", "~", "null", "Null", "NULL"})
_PLAIN_TAGS = frozenset({None, "!", *(f"tag:yaml.org,2002:{t}" for t in ("str", "int", "float", "bool", "seq", "map"))})
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A place in a file and what is wrong there; printed as compilers do, so that editors and CI find the place."""

    file: str
    line: int
    column: int
    message: str
    is_warning: bool = False

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}: {self.message}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scalar:
    """One value, as the text that was written.

    Of all nodes: `line` and `column` count from 1, `faults` is how many faults were found in the node and below it
    when the document was read.
    """

    line: int
    column: int
    text: str
    is_plain: bool = False
    faults: int = 0

    @property
    def is_null(self) -> bool:
        """Whether nothing was written, or unquoted `null` or `~`."""
        return self.is_plain and self.text in _NULLS


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequence:
    """A list of nodes."""

    line: int
    column: int
    items: tuple[Node, ...]
    faults: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Mapping:
    """Keys with their values, in order; of a key written twice, the first."""

    line: int
    column: int
    entries: tuple[tuple[Scalar, Node], ...]
    faults: int = 0

    def get(self, key: str) -> Node | None:
        return next((value for name, value in self.entries if name.text == key), None)


Node: TypeAlias = Scalar | Sequence | Mapping


@dataclass(frozen=True, slots=True)
class Findings:
    """Collects all that is wrong in one file, while reading goes on."""

    file: str
    _found: list[Fault] = field(default_factory=list)
    _counts: dict[bool, int] = field(default_factory=lambda: {True: 0, False: 0})

    def fault(self, at: Node | tuple[int, int], message: str) -> None:
        """Something that makes an entry, or the file, not what its writer meant."""
        self._add(at, message, is_warning=False)

    def warn(self, at: Node | tuple[int, int], message: str) -> None:
        """Something worth saying that changes nothing."""
        self._add(at, message, is_warning=True)

    @property
    def count(self) -> int:
        """How many faults so far: more than before means that what was read in between is faulty."""
        return self._counts[False]

    def _add(self, at: Node | tuple[int, int], message: str, *, is_warning: bool) -> None:
        line, column = at if isinstance(at, tuple) else (at.line, at.column)
        self._counts[is_warning] += 1
        if self._counts[is_warning] <= FINDINGS_LIMIT:
            self._found.append(Fault(file=self.file, line=line, column=column, message=message, is_warning=is_warning))

    def sorted(self, *, warnings: bool) -> tuple[Fault, ...]:
        """The faults, or the warnings, in the order of the file."""
        found = sorted((f for f in self._found if f.is_warning is warnings), key=lambda f: (f.line, f.column))
        more = self._counts[warnings] - len(found)
        if more:
            last = found[-1]
            message = f"and {more} more like these"
            found.append(
                Fault(file=self.file, line=last.line, column=last.column, message=message, is_warning=warnings)
            )
        return tuple(found)


def unreadable(file: str, line: int, column: int, message: str) -> WishlistError:
    """The error for a file of which nothing can be used."""
    return WishlistError(str(Fault(file=file, line=line, column=column, message=message)))


def shown(text: str, limit: int = 80) -> str:
    """A text from the file as a message quotes it: on one line, and not at any length."""
    return repr(text if len(text) <= limit else text[: limit - 1] + "…")


def decode(data: bytes, file: str) -> str:
    """The text of a file: UTF-8, of bounded size, without control characters. WishlistError names the place."""
    if len(data) > SIZE_LIMIT:
        raise unreadable(file, 1, 1, f"larger than {SIZE_LIMIT >> 20} MiB, which no wishlist is")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # utf-8-sig counts from behind the byte order mark.
        before = data.removeprefix(b"\xef\xbb\xbf")[: error.start].decode("utf-8", "replace")
        raise unreadable(file, *_place(before), "not UTF-8 text (save the file as UTF-8)") from None
    wrong = _NOT_TEXT.search(text)
    if wrong:
        message = f"control character {wrong[0]!a}, which no text file has"
        raise unreadable(file, *_place(text[: wrong.start()]), message)
    return text


def _place(before: str) -> tuple[int, int]:
    lines = re.split("\r\n|[\r\n]", before)
    return len(lines), len(lines[-1]) + 1


@dataclass(slots=True)
class _Open:
    """A sequence or mapping whose end has not been read yet."""

    is_mapping: bool
    line: int
    column: int
    anchor: str | None
    items: list[Node] = field(default_factory=list)
    values: int = 1
    faults: int = 0


def read_yaml(text: str, findings: Findings) -> Node | None:
    """The first document of a YAML text, or None if there is none. WishlistError for what is not YAML.

    What can be passed over (a duplicate key, a foreign tag, a second document) is a fault among the findings.
    """
    try:
        return _read(yaml.parse(text, Loader=_LOADER), findings)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        if "nesting depth" in str(error.problem):
            # Newer versions of libyaml have a limit of their own, which it meets first where it looks ahead for a key.
            raise unreadable(findings.file, line, column, _TOO_DEEP) from None
        context = error.context
        if context and error.context_mark and error.context_mark.line + 1 != line:
            context = f"{context} begun in line {error.context_mark.line + 1}"
        message = ", ".join(part for part in (error.problem, context) if part)
        raise unreadable(findings.file, line, column, f"not YAML: {message}{_hint(text, error)}") from None
    except yaml.YAMLError as error:
        raise unreadable(findings.file, 1, 1, f"not YAML: {shown(str(error))}") from None


def _hint(text: str, error: yaml.MarkedYAMLError) -> str:
    if "alias" in str(error.context):
        return ' (put a pattern that starts with * between quotes: "*-rc*")'
    mark = error.problem_mark
    lines = text.splitlines()
    if mark and mark.line < len(lines):
        line = lines[mark.line]
        if "\t" in line[: len(line) - len(line.lstrip())]:
            return " (indent with blanks, not with tabs)"
        if line[mark.column : mark.column + 1] in ("@", "%", "`"):
            return " (put this value between quotes)"
    return ""


def _read(events: Iterator[yaml.Event], findings: Findings) -> Node | None:
    root: Node | None = None
    stack: list[_Open] = []
    anchors: dict[str, tuple[Node, int] | None] = {}
    values = 0
    documents = 0
    for event in events:
        assert event.start_mark is not None  # the parser marks every event
        place = (event.start_mark.line + 1, event.start_mark.column + 1)
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                findings.fault(place, "a second document begins here: a wishlist is one document, without ---")
                break
        done: Node
        size = 1
        if isinstance(event, yaml.SequenceStartEvent | yaml.MappingStartEvent):
            if len(stack) == DEPTH_LIMIT:
                raise unreadable(findings.file, *place, _TOO_DEEP)
            faults = _check_tag(event.tag, place, findings)
            stack.append(_Open(isinstance(event, yaml.MappingStartEvent), *place, event.anchor, faults=faults))
            if event.anchor:
                anchors[event.anchor] = None
            continue
        if isinstance(event, yaml.ScalarEvent):
            faults = _check_tag(event.tag, place, findings)
            is_plain = event.implicit[0]
            done = Scalar(line=place[0], column=place[1], text=event.value, is_plain=is_plain, faults=faults)
            anchor = event.anchor
        elif isinstance(event, yaml.AliasEvent):
            known = anchors.get(event.anchor or "")
            if known is None:
                why = "stands for a value that contains it" if event.anchor in anchors else "stands for nothing"
                hint = 'put a pattern that starts with * between quotes: "*-rc*"'
                raise unreadable(findings.file, *place, f"the alias *{event.anchor} {why} ({hint})")
            done, size = known
            anchor = None
        elif isinstance(event, yaml.SequenceEndEvent | yaml.MappingEndEvent):
            frame = stack.pop()
            done, size, anchor = _close(frame, findings), frame.values, frame.anchor
        else:
            continue
        # A finished collection's values were counted when they came; an alias brings all of its own once more.
        values += size if isinstance(event, yaml.AliasEvent) else 1
        if values > VALUES_LIMIT:
            raise unreadable(findings.file, *place, f"more than {VALUES_LIMIT:,} values, aliases counted")
        if anchor:
            anchors[anchor] = (done, size)
        if stack:
            stack[-1].items.append(done)
            stack[-1].values += size
            stack[-1].faults += done.faults
        else:
            root = done
    return root


def _check_tag(tag: str | None, place: tuple[int, int], findings: Findings) -> int:
    if tag in _PLAIN_TAGS:
        return 0
    findings.fault(place, f"the YAML tag {shown(tag or '')} means nothing here (put text that starts with ! in quotes)")
    return 1


def _close(frame: _Open, findings: Findings) -> Node:
    if not frame.is_mapping:
        return Sequence(line=frame.line, column=frame.column, items=tuple(frame.items), faults=frame.faults)
    first: dict[str, Scalar] = {}
    entries = []
    before = findings.count
    for key, value in zip(frame.items[::2], frame.items[1::2], strict=True):
        if not isinstance(key, Scalar):
            findings.fault(key, "a key must be a word (put text that starts with { or [ between quotes)")
        elif key.text in first:
            findings.fault(key, f"the key {shown(key.text)} stands here twice (first in line {first[key.text].line})")
        else:
            first[key.text] = key
            entries.append((key, value))
    faults = frame.faults + findings.count - before
    return Mapping(line=frame.line, column=frame.column, entries=tuple(entries), faults=faults)

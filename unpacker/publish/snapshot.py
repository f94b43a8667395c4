"""One revision of a native repository as a target: what stands published in it, which roots it has, its notes.

Where others published since we did, names are read from the links in the catalogs and compared with the index, so that
what they changed shows.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType

from unpacker import logs
from unpacker.cvmfs.contents import RepositoryContents
from unpacker.cvmfs.reader import Found, Reader
from unpacker.cvmfs.row import SYMLINK, content_of
from unpacker.digest import Digest
from unpacker.errors import PublishError
from unpacker.multiarch import MULTIARCH
from unpacker.publish import index as indexes
from unpacker.publish.index import Index, Line, Part, number_for, number_of
from unpacker.publish.roots import (
    METADATA,
    RootFacts,
    foreign,
    is_public_name,
    layer_path,
    may_be_registry,
    names_of,
    root_path,
)
from unpacker.record import Published, Unreadable

log = logs.Log()

Parsed = dict[tuple[str, bytes], Published | Unreadable]
"""What lines of an index say, by the name and the record as it is written."""

_FILE_LIMIT = 64 << 20
_NO_RECORD = "it has no record (published by another tool?)"


class Snapshot:
    """For one thread; `with` closes it. PublishError for everything that cannot be read."""

    def __init__(self, reader: Reader, contents: RepositoryContents, what: str, known: Index | None = None) -> None:
        """`known` is the index of this very revision, if somebody has read it already."""
        self._reader = reader
        self._contents = contents
        self._what = what
        self.index = known if known is not None else self._read_index()

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._reader.close()

    # The index -------------------------------------------------------------------------------------------------------

    @property
    def revision(self) -> int:
        return self._reader.root.revision

    @property
    def is_settled(self) -> bool:
        """Whether the index says exactly what the links say, so that nobody need look at them."""
        return self.index.revision == self.revision

    def part(self, number: str) -> Part:
        """One part of the index."""
        try:
            return self.index.part(number)
        except ValueError as error:
            self._mend(error)
            return self.index.part(number)

    def parts(self) -> list[Part]:
        """The whole index."""
        try:
            return list(self.index.parts())
        except ValueError as error:
            self._mend(error)
            return list(self.index.parts())

    def facts(self, name: str) -> RootFacts | None:
        """What is known of a root; None if it is not ours."""
        number = number_of(root_path(name))
        return None if number is None else self.part(number).facts(name)

    # Names -----------------------------------------------------------------------------------------------------------

    def published(self, parsed: Parsed) -> Mapping[str, Published | Unreadable]:
        """What stands published. `parsed` remembers what lines of the index say, and is left with those of this
        revision."""
        parts = self.parts()
        records: Parsed = {}
        for part in parts:
            fresh = {path: line for path, line in part.names.items() if (path, line.record) not in parsed}
            known = indexes.parse_records(fresh)
            for path, line in part.names.items():
                key = (path, line.record)
                records[key] = known[path] if path in known else parsed[key]
        parsed.clear()
        parsed.update(records)
        if self.is_settled:
            found = {path: records[path, line.record] for part in parts for path, line in part.names.items()}
            found.update((path, self._judged(path, root, None)) for path, root in self.index.others.items())
            return {path: found[path] for path in sorted(found)}
        lines: dict[str, dict[str, Line]] = {}
        for part in parts:
            for path, line in part.names.items():
                lines.setdefault(path, {})[line.root] = line
        judged = {}
        for path, root in sorted(self.links()):
            by_root = lines.get(path, {})
            standing = by_root.get(root) or next(iter(by_root.values()), None)
            record = None if standing is None else records[path, standing.record]
            judged[path] = self._judged(path, root, standing, record)
        return judged

    def get(self, public_path: str) -> Published | Unreadable | None:
        """What stands published under one name."""
        root = self.link(public_path)
        return None if root is None else self._judged(public_path, root, self._line(public_path, root))

    def link(self, public_path: str) -> str | None:
        """The path of the root that a public link leads to; "" where something else stands, None where nothing does."""
        found = self._reader.lookup(f"/{public_path}")
        return None if found is None else _target(public_path, found)

    def links(self) -> Iterator[tuple[str, str]]:
        """Every public name and the path of the root that its link leads to, "" where no link stands."""
        platforms = [p.path for p in self._reader.children(f"/{MULTIARCH}") if p.row.is_directory]
        tops = {"", *platforms}
        pending = ["", *platforms]
        while pending:
            directory = pending.pop()
            for found in self._reader.children(directory):
                path = found.path[1:]
                name = posixpath.basename(path)
                if name.startswith(".") or not (directory not in tops or may_be_registry(name)):
                    continue
                if directory not in tops and is_public_name(path):
                    yield path, _target(path, found)
                elif found.row.is_directory:
                    pending.append(found.path)

    def standing(self, roots: Iterable[str]) -> set[str]:
        """Which of these paths of roots lead to something. What cannot be told, because the catalog above is damaged,
        counts as standing; no root's own catalog is opened, of which there are as many as images."""
        groups: dict[str, list[str]] = {}
        for root in roots:
            groups.setdefault(posixpath.dirname(root), []).append(root)
        found: set[str] = set()
        for parent, wanted in groups.items():
            try:
                there = set(self.children(parent))
            except PublishError as error:
                log.warning("roots not looked for", where=parent, what=self._what, why=str(error))
                found.update(wanted)
                continue
            found.update(root for root in wanted if posixpath.basename(root) in there)
        return found

    def unproven(self, roots: Iterable[str]) -> set[str]:
        """Of these roots those of which the index does not prove that they are there: in a revision of ours it knows
        all of our own that are, since what publishes them or takes them away keeps it so."""
        if not self.is_settled:
            return set(roots)
        known = {root_path(name) for part in self.parts() for name in part.roots}
        return set(roots) - known

    def has(self, path: str) -> bool:
        """Whether there is anything under a path below the target."""
        return self._reader.lookup(f"/{path}") is not None

    def children(self, path: str) -> list[str]:
        """The names in a directory of the target; none if it is not there."""
        return [posixpath.basename(found.path) for found in self._reader.children(f"/{path}" if path else "")]

    def symlinks(self, path: str) -> Iterator[tuple[str, str]]:
        """Every symlink from a path on, and its target."""
        for found in self._reader.walk(f"/{path}"):
            if found.row.flags & SYMLINK:
                yield found.path[1:], found.row.symlink

    def _line(self, path: str, root: str) -> Line | None:
        line = self.part(number_for(path, root)).names.get(path)
        if line is not None or self.is_settled:
            return line
        return next((part.names[path] for part in self.parts() if path in part.names), None)

    @staticmethod
    def _judged(
        path: str, root: str, line: Line | None, parsed: Published | Unreadable | None = None
    ) -> Published | Unreadable:
        if not root:
            return foreign(path)
        if line is None:
            return Unreadable(path, _NO_RECORD)
        if line.root != root:
            return Unreadable(path, f"its link leads to {root}, its record names {line.root}")
        return indexes.parse_record(path, line.record) if parsed is None else parsed

    # Roots and files -------------------------------------------------------------------------------------------------

    def root(self, image_id: str, rules: str) -> str | None:
        """The name of a sound root of this image composed under these rules."""
        part = self.part(Digest.parse(image_id).hex[:2])
        for name in names_of(image_id, part.roots):
            facts = part.facts(name)
            if facts is not None and (facts.rules, facts.damaged) == (rules, False) and self.has(root_path(name)):
                return name
        return None

    def token(self, path: str) -> str | None:
        """The token of a file below the target, if there is one."""
        found = self._file(path)
        return None if found is None else content_of(found.row, found.chunks).token

    def file(self, path: str, limit: int = _FILE_LIMIT) -> bytes | None:
        """The bytes of a file below the target, if there is one."""
        found = self._file(path)
        if found is None:
            return None
        if found.row.size > limit:
            raise PublishError(f"{path} of {self._what} has {found.row.size} bytes, more than the {limit} that it may")
        return self._bytes(content_of(found.row, found.chunks).token)

    def _file(self, path: str) -> Found | None:
        found = self._reader.lookup(f"/{path}")
        return None if found is None or found.row.is_directory or found.row.flags & SYMLINK else found

    def _bytes(self, token: str) -> bytes:
        with self._contents.open(token) as stream:
            parts = []
            while part := stream.read(1 << 20):
                parts.append(part)
        return b"".join(parts)

    # Reading the index -----------------------------------------------------------------------------------------------

    def _read_index(self) -> Index:
        try:
            # Where there is one of the old version, that version was the last to publish here.
            old = self._file(indexes.OLD)
            if old is not None:
                return Index(0, {}, indexes.parse_old(self._of_index(old), f"{indexes.OLD} of {self._what}"))
            head = self._file(f"{indexes.DIRECTORY}/{indexes.HEAD}")
            if head is not None:
                what = f"{indexes.DIRECTORY} of {self._what}"
                return self._stored_index(indexes.parse_head(self._of_index(head), what))
        except ValueError as error:
            self._warn(error)
        return self._rebuilt()

    def _stored_index(self, revision: int) -> Index:
        files = {
            posixpath.basename(found.path): found
            for found in self._reader.children(f"/{indexes.DIRECTORY}")
            if not found.row.is_directory and not found.row.flags & SYMLINK
        }

        def read(name: str) -> bytes | None:
            return self._of_index(files[name]) if name in files else None

        return Index(revision, indexes.parse_others(read(indexes.OTHERS) or b""), {}, read)

    def _of_index(self, found: Found) -> bytes:
        """The bytes of a file of the index. ValueError where they are lost for good, because the records say the same;
        PublishError where they could not be read this time."""
        if found.row.size > indexes.LIMIT:
            raise ValueError(f"{found.path[1:]} has {found.row.size} bytes, more than the {indexes.LIMIT} that it may")
        content = content_of(found.row, found.chunks)
        try:
            return self._bytes(content.token)
        except PublishError as error:
            if all(self._contents.objects.is_sound(name, suffix) for name, suffix in content.objects):
                raise
            raise ValueError(str(error)) from error

    def _mend(self, error: ValueError) -> None:
        self._warn(error)
        self.index = self._rebuilt()

    def _warn(self, error: ValueError) -> None:
        log.warning("index of published names damaged, read anew from records", what=self._what, why=str(error))

    def _rebuilt(self) -> Index:
        """The index from the records of single names: somebody took it away. Roots that no name has are not known to
        be ours then, and stay."""
        names: dict[str, Line] = {}
        roots: dict[str, bytes] = {}
        layers: set[str] = set()
        for path, root in self.links():
            data = self.file(f"{METADATA}/{path}/record.json") if root else None
            record = None if data is None else indexes.parse_record(path, data)
            if isinstance(record, Published):
                names[path] = indexes.name_line(record)
                if number_of(record.root) is None:
                    continue  # a front, or a root of another tool's that never becomes ours
                facts = RootFacts(
                    image_id=record.image_id,
                    rules=record.rules,
                    entries=record.entries,
                    size=record.size,
                    altered=record.altered,
                    layers=record.layers,
                )
                roots[posixpath.basename(record.root)] = indexes.root_line(facts)
                if not record.is_adopted:
                    layers.update(filter(self._has_layer_of_ours, (digest[7:] for digest in record.layers)))
        return Index(0, {}, indexes.parts_of(names, roots, layers))

    def _has_layer_of_ours(self, hexadecimal: str) -> bool:
        # DUCC has its notes on a layer beside it, and may need it for images that are none of ours.
        path = layer_path(hexadecimal)
        return self.has(path) and not self.has(f"{path}/.metadata")


def _target(public_path: str, found: Found) -> str:
    if not found.row.flags & SYMLINK:
        return ""
    return posixpath.normpath(posixpath.join(posixpath.dirname(public_path), found.row.symlink))

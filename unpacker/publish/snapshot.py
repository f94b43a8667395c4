"""One revision of a native repository as a target: what stands published in it, which roots it has, its notes.

Names are read from the links in the catalogs and compared with the index, so that what other tools changed shows.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Mapping
from types import TracebackType

from unpacker import logs
from unpacker.cvmfs.contents import RepositoryContents
from unpacker.cvmfs.reader import Found, Reader
from unpacker.cvmfs.row import SYMLINK, content_of
from unpacker.errors import PublishError
from unpacker.publish import index as indexes
from unpacker.publish.index import Index, Line
from unpacker.publish.roots import METADATA, RootFacts, is_public_name, layer_path, may_be_registry, names_of, root_path
from unpacker.record import Published, Unreadable

log = logs.Log()

_FILE_LIMIT = 64 << 20


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

    # Names -----------------------------------------------------------------------------------------------------------

    def published(self, parsed: dict[bytes, Published | Unreadable]) -> Mapping[str, Published | Unreadable]:
        """What stands published. `parsed` remembers what lines of the index say, and is left with those of this
        revision."""
        found: dict[str, Published | Unreadable] = {}
        lines: dict[bytes, Published | Unreadable] = {}
        for path, root in sorted(self._links()):
            line = self.index.names.get(path)
            value = None if line is None else parsed.get(line.record)
            found[path] = self._judged(path, root, line, value)
            if line is not None and (value := found[path]) and isinstance(value, Published):
                lines[line.record] = value
        parsed.clear()
        parsed.update(lines)
        return found

    def get(self, public_path: str) -> Published | Unreadable | None:
        """What stands published under one name."""
        found = self._reader.lookup(f"/{public_path}")
        if found is None:
            return None
        return self._judged(public_path, _target(public_path, found), self.index.names.get(public_path))

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

    @staticmethod
    def _judged(
        path: str, root: str, line: Line | None, parsed: Published | Unreadable | None = None
    ) -> Published | Unreadable:
        if not root:
            return Unreadable(path, "a directory or file stands where its link belongs")
        if line is None:
            return Unreadable(path, "it has no record (published by another tool?)")
        if line.root != root:
            return Unreadable(path, f"its link leads to {root}, its record names {line.root}")
        return indexes.parse_record(path, line.record) if parsed is None else parsed

    def _links(self) -> Iterator[tuple[str, str]]:
        """Every public name and the path of the root that its link leads to, "" where no link stands."""
        pending = [""]
        while pending:
            directory = pending.pop()
            for found in self._reader.children(directory):
                path = found.path[1:]
                name = posixpath.basename(path)
                if name.startswith(".") or not (directory or may_be_registry(name)):
                    continue
                if is_public_name(path):
                    yield path, _target(path, found)
                elif found.row.is_directory:
                    pending.append(found.path)

    # Roots and files -------------------------------------------------------------------------------------------------

    def root(self, image_id: str, rules: str) -> str | None:
        """The name of a sound root of this image composed under these rules."""
        for name in names_of(image_id, self.index.roots):
            facts = self.facts(name)
            if facts is not None and (facts.rules, facts.damaged) == (rules, False) and self.has(root_path(name)):
                return name
        return None

    def facts(self, name: str) -> RootFacts | None:
        """What is known of a root; None if it is not ours."""
        return self.index.facts(name)

    def file(self, path: str, limit: int = _FILE_LIMIT) -> bytes | None:
        """The bytes of a file below the target, if there is one."""
        found = self._reader.lookup(f"/{path}")
        if found is None or found.row.is_directory or found.row.flags & SYMLINK:
            return None
        if found.row.size > limit:
            raise PublishError(f"{path} of {self._what} has {found.row.size} bytes, more than the {limit} that it may")
        with self._contents.open(content_of(found.row, found.chunks).token) as stream:
            parts = []
            while part := stream.read(1 << 20):
                parts.append(part)
        return b"".join(parts)

    def _read_index(self) -> Index:
        data = self.file(indexes.FILE, indexes.LIMIT)
        if data is not None:
            try:
                return Index.parse(data, f"{indexes.FILE} of {self._what}")
            except ValueError as error:
                log.warning("index of published names damaged, read anew from records", what=self._what, why=str(error))
        return self._rebuilt()

    def _rebuilt(self) -> Index:
        """The index from the records of single names: somebody took it away. Roots that no name has are not known to
        be ours then, and stay."""
        names: dict[str, Line] = {}
        roots: dict[str, bytes] = {}
        layers: set[str] = set()
        for path, root in self._links():
            data = self.file(f"{METADATA}/{path}/record.json") if root else None
            record = None if data is None else indexes.parse_record(path, data)
            if isinstance(record, Published):
                names[path] = indexes.name_line(record)
                facts = RootFacts(
                    image_id=record.image_id,
                    rules=record.rules,
                    entries=record.entries,
                    size=record.size,
                    altered=record.altered,
                    layers=record.layers,
                )
                roots[posixpath.basename(record.root)] = indexes.root_line(facts)
                layers.update(
                    hexadecimal for digest in record.layers if self.has(layer_path(hexadecimal := digest[7:]))
                )
        return Index(names, roots, frozenset(layers))


def _target(public_path: str, found: Found) -> str:
    if not found.row.flags & SYMLINK:
        return ""
    return posixpath.normpath(posixpath.join(posixpath.dirname(public_path), found.row.symlink))

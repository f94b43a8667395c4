"""The index of the next revision: what one transaction changes in it, part by part."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass

from unpacker.publish import index as indexes
from unpacker.publish.index import DIRECTORY, HEAD, NUMBERS, OTHERS, Line, Part, number_for, number_of
from unpacker.publish.roots import RootFacts, root_path
from unpacker.publish.snapshot import Snapshot
from unpacker.record import Published


@dataclass(slots=True)
class _Changing:
    names: dict[str, Line]
    roots: dict[str, bytes]
    layers: set[str]


class NextIndex:
    """Made for one transaction, from what stood `before`.

    Where others published since, this compares everything with the links first: what they changed goes to `others`, so
    that the index is true of its revision again.
    """

    def __init__(self, before: Snapshot) -> None:
        self._before = before
        self._parts: dict[str, _Changing] = {}
        self._others = dict(before.index.others)
        if not before.is_settled:
            self._settle()

    def _settle(self) -> None:
        links = dict(self._before.links())
        self._others = dict(links)
        for number in NUMBERS:
            part = self._part(number)
            part.names = {path: line for path, line in part.names.items() if links.get(path) == line.root}
            # A name whose root somebody took away stays what it is, and whose; that nothing is known of the root any
            # more is what tells (`Snapshot.unproven`).
            standing = self._before.standing(map(root_path, part.roots))
            part.roots = {name: line for name, line in part.roots.items() if root_path(name) in standing}
            for path in part.names:
                self._others.pop(path, None)

    def _part(self, number: str) -> _Changing:
        found = self._parts.get(number)
        if found is None:
            part = self._before.part(number)
            found = self._parts[number] = _Changing(dict(part.names), dict(part.roots), set(part.layers))
        return found

    def _of(self, root: str) -> _Changing:
        number = number_of(root)
        if number is None:
            raise ValueError(f"not the path of a root: {root!r}")
        return self._part(number)

    # Changes ---------------------------------------------------------------------------------------------------------

    def forget_name(self, path: str) -> str | None:
        """Takes a name away that stood before; gives the path of the root that it was known to stand for."""
        root = self._before.link(path)
        self._others.pop(path, None)
        line = self._part(number_for(path, root)).names.pop(path, None) if root else None
        return line.root if line is not None and number_of(line.root) is not None else None

    def set_name(self, record: Published) -> str | None:
        """Makes a name stand for a root; gives the path of the root that it was known to stand for before."""
        path = record.public_path
        before = self.forget_name(path)
        self._part(number_for(path, record.root)).names[path] = indexes.name_line(record)
        return before

    def has_name(self, root: str) -> bool:
        """Whether a name stands for the root at this path."""
        return any(line.root == root for line in self._of(root).names.values())

    def set_root(self, name: str, facts: RootFacts) -> None:
        self._of(root_path(name)).roots[name] = indexes.root_line(facts)

    def add_layer(self, hexadecimal: str, root: str) -> None:
        """A layer came with the root of this name."""
        self._of(root_path(root)).layers.add(hexadecimal)

    def drop(self, path: str) -> None:
        """Forgets a root or a layer by its path."""
        name = posixpath.basename(path)
        if number_of(path) is not None:
            self._of(path).roots.pop(name, None)
            return
        for number, part in zip(NUMBERS, self._before.parts(), strict=True):
            if name in part.layers:
                self._part(number).layers.discard(name)

    # The files -------------------------------------------------------------------------------------------------------

    def files(self) -> dict[str, bytes | None]:
        """What every file of the index that may differ now is to hold, by its path; None for one that is to go. The
        head is not among them: it changes with every revision."""
        found: dict[str, bytes | None] = {indexes.OLD: None}
        for number, part in self._parts.items():
            data = Part(part.names, part.roots, frozenset(part.layers)).serialise()
            found[f"{DIRECTORY}/{number}"] = data or None
        found[f"{DIRECTORY}/{OTHERS}"] = indexes.serialise_others(self._others) or None
        return found


def head_file(revision: int) -> tuple[str, bytes]:
    """The path of the head, and what it holds in this revision."""
    return f"{DIRECTORY}/{HEAD}", indexes.head(revision)

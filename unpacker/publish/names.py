"""What one transaction does to public names: the part of it that is the same for every target."""

from __future__ import annotations

import posixpath
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

from unpacker import logs
from unpacker.contracts import Release
from unpacker.errors import PublishError
from unpacker.publish.roots import RootFacts, is_note, refuse_foreign, root_path
from unpacker.record import Published, Unreadable

log = logs.Log()

Standing = Callable[[str], Published | Unreadable | None]
"""Gives what stands published under a name before the transaction."""


class NameChanges(ABC):
    """Records to write, names to take away, notes, and roots of other tools of which something is known from now on.

    `where` names the target in messages.
    """

    def __init__(self, where: str, standing: Standing) -> None:
        self._where = where
        self._standing = standing
        self._records: dict[str, tuple[Published, bytes]] = {}
        self._removed: dict[str, int] = {}
        self._notes: dict[str, bytes] = {}
        self._adopted: dict[str, RootFacts] = {}

    @abstractmethod
    def _stands(self, root: str) -> bool:
        """Whether there is a root at a path."""

    @abstractmethod
    def _facts_of(self, name: str) -> RootFacts | None:
        """What is known of a root; None if it is not ours."""

    def _check_place(self, public_path: str) -> None:
        """PublishError if a name is not ours to change."""
        refuse_foreign(self._standing(public_path))

    @staticmethod
    def _tell(record: Published, altered: Mapping[str, int]) -> None:
        """Warns, once for each root, of what CernVM-FS cannot hold of an image, or not as it is."""
        if altered:
            log.warning("not all of it as in the image", name=record.public_path, **altered)

    def _record(self, completed: Published, manifest: bytes) -> Published:
        """Has a name stand for what its record says; gives that record."""
        self._records[completed.public_path] = (completed, manifest)
        self._removed.pop(completed.public_path, None)
        return completed

    def _adopt(self, release: Release, root: str) -> Published:
        """Takes over a root that another tool made. Nothing of it is changed, nor read."""
        record, name = release.record, posixpath.basename(root)
        if not self._stands(root):
            raise PublishError(f"{root} in {self._where} vanished while it was being adopted; run again")
        facts = RootFacts(image_id=record.image_id, rules=record.rules, entries=0, size=0, layers=record.layers)
        if root == root_path(name) and self._facts_of(name) is None:
            # With facts it is collected once nothing refers to it any more, as a root of ours. One that is ours
            # already, to which another tool made a name, keeps its own.
            self._adopted[name] = facts
        completed = facts.completed(record, root, self._standing(record.public_path))
        return self._record(completed, release.image.manifest.raw)

    def point(self, record: Published) -> Published:
        """Publishes a front, with nothing but its record and its link."""
        self._check_place(record.public_path)
        return self._record(record.succeeding(self._standing(record.public_path)), b"")

    def remove(self, public_paths: Sequence[str], *, now: int) -> None:
        """Takes public names away; PublishError if one of them does not exist, and then none is taken."""
        standing = {path: self._standing(path) for path in public_paths}
        unknown = [path for path, before in standing.items() if before is None and path not in self._records]
        if unknown:
            raise PublishError(f"not published in {self._where}: {', '.join(unknown)}")
        for before in standing.values():
            refuse_foreign(before)
        for path, before in standing.items():
            self._records.pop(path, None)
            if before is not None:
                self._removed[path] = now

    def note(self, name: str, data: bytes) -> None:
        """Writes `.metadata/<name>` with everything else."""
        if not is_note(name):
            raise PublishError(f"not a name for a note: {name!r}")
        self._notes[name] = data

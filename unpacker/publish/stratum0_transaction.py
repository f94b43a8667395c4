"""One transaction on a native repository: catalogs of new roots, and the one edit that makes everything visible.

    contents (stored before, their presence checked) → catalogs of roots and layers → records, index → edit of the root

Roots, records, index and links come into one new root catalog, which the publisher signs: a reader has all or nothing
of it, and a link always equals its record.
"""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from io import BytesIO

from unpacker.changeset import Entry, Kind
from unpacker.contracts import Release, Stacked
from unpacker.cvmfs.compose import Composed, Composition, Mount, compose
from unpacker.cvmfs.contents import ContentsBatch, RepositoryContents
from unpacker.cvmfs.deflation import compressor
from unpacker.cvmfs.edit import Change, Edited, edit
from unpacker.cvmfs.hash import ContentHash
from unpacker.cvmfs.objects import ObjectBatch
from unpacker.cvmfs.repository import Repository
from unpacker.digest import Digest
from unpacker.errors import PublishError
from unpacker.layersview import layer_tree
from unpacker.limits import Limits
from unpacker.publish import index as indexes
from unpacker.publish.index import Index, Line, name_line, root_line
from unpacker.publish.roots import (
    FLAT,
    METADATA,
    UNREFERENCED,
    RootFacts,
    free_name,
    is_note,
    layer_path,
    parse_unreferenced,
    root_path,
    serialise_unreferenced,
)
from unpacker.publish.snapshot import Snapshot
from unpacker.record import Published, Unreadable
from unpacker.tree import Directory, File, Symlink, Tree

_SHOWN = 3


class Stratum0Transaction:
    """Made and ended by `Stratum0Publisher.transaction`, under the locks of the repository."""

    def __init__(
        self,
        repository: Repository,
        contents: RepositoryContents,
        batch: ObjectBatch,
        before: Snapshot,
        root: ContentHash,
        *,
        made: frozenset[str],
        layers_view: bool,
        limits: Limits,
        now: int,
    ) -> None:
        """`made` are the roots published under this run's lock before; all that is stored goes into `batch`."""
        self._repository = repository
        self._contents = contents
        self._batch = batch
        self._before = before
        self._root = root
        self._made_before = made
        self._layers_view = layers_view
        self._limits = limits
        self._now = now
        self._compress = compressor(repository.compression)
        self._fresh: dict[tuple[str, str], str] = {}
        self._facts: dict[str, RootFacts] = {}
        self._mounts: dict[str, Mount] = {}
        self._layers: set[str] = set()
        self._records: dict[str, tuple[Published, bytes]] = {}
        self._removed: dict[str, int] = {}
        self._dropped: list[str] = []
        self._notes: dict[str, bytes] = {}
        self._unreferenced: dict[str, int] | None = None

    @property
    def made(self) -> set[str]:
        """The names of the roots composed here."""
        return set(self._fresh.values())

    # Preparing -------------------------------------------------------------------------------------------------------

    def publish(self, release: Release) -> Published:
        """Composes the root (unless it exists) and completes the record. If this raises, the transaction is as it was.

        A tree for a name that has this very root already (and did before this run) asks for another one: the root is
        damaged. It keeps the names that it has, and is never published again.
        """
        record = release.record
        key = (record.image_id, record.rules)
        before = self._before.get(record.public_path)
        name = self._fresh.get(key) or self._before.root(*key)
        is_older = name is not None and key not in self._fresh and name not in self._made_before
        if name is not None and is_older and release.tree is not None and _stands_for(before, name):
            facts = self._before.facts(name)
            self._compose(release)
            if facts is not None:
                self._facts[name] = replace(facts, damaged=True)
            name = self._fresh[key]
        if name is None:
            self._compose(release)
            name = self._fresh[key]
        found = self._facts.get(name) or self._before.facts(name)
        if found is None:
            raise PublishError(f"nothing is known of {root_path(name)} in {self._repository.name} any more; run again")
        completed = found.completed(record, root_path(name), before)
        self._records[record.public_path] = (completed, release.image.manifest.raw)
        self._removed.pop(record.public_path, None)
        return completed

    def _compose(self, release: Release) -> None:
        record, tree = release.record, release.tree
        if tree is None:
            raise PublishError(f"{self._repository.name} has no sound root of {record.image_id} any more; run again")
        name = free_name(record.image_id, self._taken(record.image_id))
        composition = Composition(last_modified=_created(release.image.config.created), compress=self._compress)
        layers, left_out = self._layer_trees(release.layers)
        self._check_present(str(record.reference), (tree, *layers.values()))
        composed = compose(tree, f"/{root_path(name)}", self._batch, composition)
        mounts = {path: compose(layer, f"/{path}", self._batch, composition).mount for path, layer in layers.items()}
        entries, size = _measure(composed)
        altered = Counter(record.altered)
        altered.update(composed.altered)
        if left_out:
            altered["layers"] += left_out
        self._facts[name] = RootFacts(
            image_id=record.image_id,
            rules=record.rules,
            entries=entries,
            size=size,
            altered=dict(sorted(altered.items())),
            layers=record.layers,
        )
        self._mounts[root_path(name)] = composed.mount
        self._mounts.update(mounts)
        self._layers.update(path.split("/")[2] for path in mounts)
        self._fresh[record.image_id, record.rules] = name

    def _taken(self, image_id: str) -> set[str]:
        # Whatever is there, ours or foreign, is left alone: a root is never changed once it has its name.
        return {*self._before.children(f"{FLAT}/{Digest.parse(image_id).hex[:2]}"), *self._facts}

    def _layer_trees(self, layers: Sequence[Stacked]) -> tuple[dict[str, Tree], int]:
        """The layers that are not published yet, by path, and how many cannot be because they do not stand alone."""
        found: dict[str, Tree] = {}
        left_out = 0
        for stacked in layers if self._layers_view else ():
            hexadecimal = stacked.layer.descriptor.digest.hex
            path = f"{layer_path(hexadecimal)}/layerfs"
            if path in found or path in self._mounts or self._before.has(path):
                continue
            tree = layer_tree(stacked.changeset, stacked.below, self._limits)
            if tree is None:
                left_out += 1
            else:
                found[path] = tree
        return found, left_out

    def _check_present(self, what: str, trees: Sequence[Tree]) -> None:
        """PublishError unless all contents are there now, under the locks: garbage collection by the official tools
        may have removed what the cache of read layers believes in."""
        tokens: set[str] = set()
        pending = [tree.root for tree in trees]
        while pending:
            for node in pending.pop().children.values():
                if type(node) is File:
                    tokens.add(node.token)
                elif type(node) is Directory:
                    pending.append(node)
        missing = self._contents.missing(tokens)
        if missing:
            shown = ", ".join(sorted(missing)[:_SHOWN]) + (", …" if len(missing) > _SHOWN else "")
            raise PublishError(
                f"{self._repository.name} does not hold content of {what} that it had ({len(missing)} files: {shown}; "
                "collected as garbage?); the next run reads those layers again"
            )

    def remove(self, public_paths: Sequence[str], *, now: int) -> None:
        """Takes public names away; PublishError if one of them does not exist, and then none is taken."""
        standing = {path for path in public_paths if self._before.get(path) is not None}
        unknown = [path for path in public_paths if path not in standing and path not in self._records]
        if unknown:
            raise PublishError(f"not published in {self._repository.name}: {', '.join(unknown)}")
        for path in public_paths:
            self._records.pop(path, None)
            if path in standing:
                self._removed[path] = now

    def note(self, name: str, data: bytes) -> None:
        """Writes `.metadata/<name>` with everything else."""
        if not is_note(name) or f"{METADATA}/{name}" == indexes.FILE:
            raise PublishError(f"not a name for a note: {name!r}")
        self._notes[name] = data

    def drop(self, paths: Sequence[str], unreferenced: Mapping[str, int]) -> None:
        """Takes roots and layers away that no name refers to, for gc; `unreferenced` says since when others wait."""
        self._dropped.extend(paths)
        self._unreferenced = dict(unreferenced)

    # Ending ----------------------------------------------------------------------------------------------------------

    def prepare(self) -> Edited | None:
        """The root catalog with all of it, stored in the batch; None if there is nothing to change."""
        if not (self._facts or self._records or self._removed or self._notes or self._dropped) and (
            self._unreferenced is None
        ):
            return None
        changes: dict[str, Change] = {f"/{path}": mount for path, mount in self._mounts.items()}
        for path, (record, manifest) in self._records.items():
            target = "../" * path.count("/") + record.root
            changes[f"/{path}"] = Symlink(0o777, 0, 0, record.published * 10**9, (), target)
            changes[f"/{METADATA}/{path}/manifest.json"] = self._file(manifest)
            changes[f"/{METADATA}/{path}/record.json"] = self._file(record.serialise())
        for path in self._removed:
            changes[f"/{path}"] = None
            if self._before.has(f"{METADATA}/{path}"):
                changes[f"/{METADATA}/{path}"] = None
        for path in self._dropped:
            changes[f"/{path}"] = None
        changes[f"/{UNREFERENCED}"] = self._file(serialise_unreferenced(self._now_unreferenced()))
        changes[f"/{indexes.FILE}"] = self._file(self._index().serialise())
        for name, data in self._notes.items():
            changes[f"/{METADATA}/{name}"] = self._file(data)
        composition = Composition(last_modified=self._now, compress=self._compress)
        edited = edit(self._repository.objects, self._root, changes, composition, batch=self._batch)
        return edited if edited.written else None

    def _file(self, data: bytes) -> File:
        hint = Entry("", Kind.FILE, size=len(data))
        batch = ContentsBatch(self._batch, self._compress, self._repository.algorithm)
        return File(0o644, 0, 0, self._now * 10**9, (), len(data), batch.put(BytesIO(data), len(data), hint))

    def _index(self) -> Index:
        before = self._before.index
        names: dict[str, Line] = {path: line for path, line in before.names.items() if path not in self._removed}
        names.update((path, name_line(record)) for path, (record, _) in self._records.items())
        gone = {posixpath.basename(path) for path in self._dropped}
        roots = {name: line for name, line in before.roots.items() if name not in gone}
        roots.update((name, root_line(facts)) for name, facts in self._facts.items())
        return Index(names, roots, (before.layers | self._layers) - gone)

    def _now_unreferenced(self) -> dict[str, int]:
        """When each root lost its last name: what was recorded, and what this transaction takes the last name from."""
        recorded = self.recorded() if self._unreferenced is None else self._unreferenced
        names = self._before.index.names
        after = {path: line.root for path, line in names.items() if path not in self._removed}
        after.update((path, record.root) for path, (record, _) in self._records.items())
        named = set(after.values())
        lost: dict[str, int] = {}
        for path in (*self._removed, *self._records):
            line = names.get(path)
            if line is not None and line.root not in named:
                time = self._removed[path] if path in self._removed else self._records[path][0].published
                lost[line.root] = max(time, lost.get(line.root, time))
        return {root: time for root, time in recorded.items() if root not in named} | lost

    def recorded(self) -> dict[str, int]:
        """When roots lost their last name, as recorded. Damaged counts as empty: then roots without a name get the
        time of the next gc, so that their grace period starts later."""
        data = self._before.file(UNREFERENCED)
        try:
            return {} if data is None else parse_unreferenced(data)
        except ValueError:
            return {}


def _stands_for(before: Published | Unreadable | None, name: str) -> bool:
    return isinstance(before, Published) and before.root == root_path(name)


def _measure(composed: Composed) -> tuple[int, int]:
    """Names below the root, and the bytes of all files. The counters have a marker for each catalog, and the root of
    each one again in the catalog above."""
    total = composed.mount.counters.total
    return total.entries - 2 * composed.catalogs, total.file_size


def _created(text: str) -> int:
    """When the image says that it was made: catalogs of the same image are the same bytes whenever they are made."""
    try:
        return max(0, int(datetime.fromisoformat(text).timestamp()))
    except (ValueError, OverflowError, OSError):
        return 0

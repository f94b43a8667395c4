"""One transaction on a native repository: catalogs of new roots, and the one edit that makes everything visible.

    contents (stored before, their presence checked) → catalogs of roots and layers → records, index → edit of the root

Roots, records, index and links come into one new root catalog, which the publisher signs: a reader has all or nothing
of it, and a link always equals its record.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from zlib import crc32

from unpacker import multiarch
from unpacker.contracts import Release, Stacked
from unpacker.cvmfs.compose import Composed, Composition, Mount, compose
from unpacker.cvmfs.contents import Content, Piece, RepositoryContents
from unpacker.cvmfs.deflation import compressor
from unpacker.cvmfs.edit import Change, Edited, edit
from unpacker.cvmfs.hash import ContentHash
from unpacker.cvmfs.objects import CHUNK, ObjectBatch
from unpacker.cvmfs.repository import Repository
from unpacker.digest import Digest
from unpacker.errors import PublishError
from unpacker.layersview import layer_tree
from unpacker.limits import Limits
from unpacker.multiarch import MULTIARCH, Place
from unpacker.publish import index as indexes
from unpacker.publish.indexing import NextIndex, head_file
from unpacker.publish.names import NameChanges
from unpacker.publish.roots import (
    FLAT,
    METADATA,
    UNREFERENCED,
    RootFacts,
    free_name,
    layer_path,
    parse_unreferenced,
    root_path,
    serialise_unreferenced,
)
from unpacker.publish.snapshot import Snapshot
from unpacker.record import Published, Unreadable
from unpacker.tree import Directory, File, Symlink, Tree

_SHOWN = 3

_LONG = 1 << 18
"""Bytes from which on a text is cut into pieces."""
_LINES = 200
"""How many lines a piece has on average."""


class Stratum0Transaction(NameChanges):
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
        super().__init__(repository.name, before.get)
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
        self._layers: dict[str, str] = {}
        self._dropped: list[str] = []
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
        self._check_place(record.public_path)
        if release.adopted is not None:
            return self._adopt(release, release.adopted)
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
        return self._record(found.completed(record, root_path(name), before), release.image.manifest.raw)

    def _stands(self, root: str) -> bool:
        return self._before.has(root)

    def _facts_of(self, name: str) -> RootFacts | None:
        return self._before.facts(name)

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
        self._tell(record, composed.altered)
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
        self._layers.update((path.split("/")[2], name) for path in mounts)
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

    def note(self, name: str, data: bytes) -> None:
        """Writes `.metadata/<name>` with everything else."""
        if f"{METADATA}/{name}" in (indexes.DIRECTORY, indexes.OLD):
            raise PublishError(f"not a name for a note: {name!r}")
        super().note(name, data)

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
            self._put(changes, f"{METADATA}/{path}/manifest.json", manifest if manifest else None)
            self._put(changes, f"{METADATA}/{path}/record.json", record.serialise())
        platforms = (record.platform for record, _ in self._records.values() if record.place is Place.PLATFORM)
        for alias, directory in multiarch.aliases({multiarch.directory(platform) for platform in platforms}).items():
            if not self._before.has(f"{MULTIARCH}/{alias}"):
                changes[f"/{MULTIARCH}/{alias}"] = Symlink(0o777, 0, 0, self._now * 10**9, (), directory)
        for path in self._removed:
            changes[f"/{path}"] = None
            if self._before.has(f"{METADATA}/{path}"):
                changes[f"/{METADATA}/{path}"] = None
        for path in self._dropped:
            changes[f"/{path}"] = None
        index, unreferenced = self._index()
        self._put(changes, UNREFERENCED, serialise_unreferenced(unreferenced))
        for path, data in index.files().items():
            self._put(changes, path, data)
        for name, data in self._notes.items():
            self._put(changes, f"{METADATA}/{name}", data)
        if not changes:
            return None
        head: dict[str, Change] = {}
        self._put(head, *head_file(self._before.revision + 1))
        composition = Composition(last_modified=self._now, compress=self._compress)
        edited = edit(self._repository.objects, self._root, changes, composition, batch=self._batch, stamps=head)
        return edited if edited.written else None

    def _put(self, changes: dict[str, Change], path: str, data: bytes | None) -> None:
        """Makes a file hold this, or takes it away; nothing, not even its time, changes in one that holds it."""
        before = self._before.token(path)
        if data is None:
            if before is not None:
                changes[f"/{path}"] = None
            return
        pieces = _pieces(data)
        if len(pieces) == 1:
            token = Content(self._batch.put(self._compress(data))).token
        else:
            stored = (Piece(self._batch.put(self._compress(piece), CHUNK), len(piece)) for piece in pieces)
            token = Content(None, tuple(stored)).token
        if token != before:
            changes[f"/{path}"] = File(0o644, 0, 0, self._now * 10**9, (), len(data), token)

    def _index(self) -> tuple[NextIndex, dict[str, int]]:
        """The index after this, and when each root lost its last name: what was recorded, and what this transaction
        takes the last name from."""
        index = NextIndex(self._before)
        lost: dict[str, int] = {}
        for path, time in self._removed.items():
            root = index.forget_name(path)
            if root is not None:
                lost[root] = max(time, lost.get(root, time))
        for record, _ in self._records.values():
            root = index.set_name(record)
            if root is not None:
                lost[root] = max(record.published, lost.get(root, record.published))
        for name, facts in (self._adopted | self._facts).items():
            index.set_root(name, facts)
        for layer, name in self._layers.items():
            index.add_layer(layer, name)
        for path in self._dropped:
            index.drop(path)
        times = self.recorded() if self._unreferenced is None else self._unreferenced
        named = {record.root for record, _ in self._records.values()}
        kept = {root: time for root, time in times.items() if root not in named}
        # A front is known to lead to a name, which is no root.
        roots = {root: time for root, time in lost.items() if root.startswith(f"{FLAT}/")}
        return index, kept | {root: time for root, time in roots.items() if not index.has_name(root)}

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


def _pieces(data: bytes) -> list[bytes]:
    """A text in pieces of some 30 kB, cut where the lines say so: where little of a long one changes, most of its
    pieces are in the repository already."""
    if len(data) < _LONG:
        return [data]
    pieces: list[bytes] = []
    start = end = 0
    for line in data.splitlines(keepends=True):
        end += len(line)
        if not crc32(line) % _LINES:
            pieces.append(data[start:end])
            start = end
    return [*pieces, data[start:]] if start < end else pieces

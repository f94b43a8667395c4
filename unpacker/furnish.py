"""From merged trees to trees that can be published: what a root gets besides its image is stored and put in place."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence

from unpacker.additions import Addition
from unpacker.changeset import Entry, Kind
from unpacker.contracts import Batch, ContentStore
from unpacker.oci import ImageConfig
from unpacker.rootfs import Policy, additions, prepare
from unpacker.tree import Tree


def furnish(
    merged: Sequence[tuple[Tree, ImageConfig]], contents: ContentStore, policy: Policy, *, check: bool = False
) -> list[tuple[Tree, Mapping[str, int]]]:
    """The tree to publish of each, and what of it was altered (as `prepare` has it).

    All bytes go into the store in one batch, because a batch is a sync. With `check` what the store has of them already
    is read before it is relied on: somebody may have written into a root that shares it.
    """
    if not merged:
        return []
    wanted = [additions(config, policy) for _, config in merged]
    added = _store(wanted, contents)
    tokens = {entry.token for entries in added for entry in entries if entry.token}
    if check and contents.missing(tokens, check=True):
        added = _store(wanted, contents)
    return [prepare(tree, entries, policy) for (tree, _), entries in zip(merged, added, strict=True)]


def _store(wanted: Iterable[Iterable[Addition]], contents: ContentStore) -> list[list[Entry]]:
    with contents.batch() as batch:
        return [[_stored(addition, batch) for addition in several] for several in wanted]


def _stored(addition: Addition, batch: Batch) -> Entry:
    entry, data = addition
    return entry._replace(token=batch.put(io.BytesIO(data), len(data), entry)) if entry.kind is Kind.FILE else entry

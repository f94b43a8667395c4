"""Which images share a transaction: what is ready, when it is published, and how much at once."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from unpacker.budget import together
from unpacker.contracts import Stacked
from unpacker.image import Image
from unpacker.plan import Action
from unpacker.survey import Request
from unpacker.tree import Tree

BATCH_IMAGES = 20
BATCH_SECONDS = 2.0
"""Bounds of one transaction: what is ready waits so long for company, and so many trees are in memory at most."""


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """All actions that come to the same image, and when its work began."""

    actions: tuple[Action, ...]
    began: float


@dataclass(frozen=True, slots=True, eq=False)
class Ready:
    """An image that nothing but the target can fail any more. `tree` is as merged, then as published; None where its
    root exists."""

    job: Job
    image: Image
    tree: Tree | None
    altered: Mapping[str, int]
    entries: int
    since: float
    layers: tuple[Stacked, ...] = ()
    adopted: str | None = None
    weight: int = 0
    size: int = 0


def is_due(ready: Sequence[Ready], request: Request, *, more_to_come: bool) -> bool:
    """Whether to publish what is ready now, or to wait for more to share the transaction with."""
    if not ready:
        return False
    full = (
        len(ready) >= BATCH_IMAGES
        or sum(one.entries for one in ready) >= request.transaction_entries
        or sum(one.size for one in ready) >= request.transaction_bytes
        or sum(one.weight for one in ready) >= together(request.limits)
    )
    return full or not more_to_come or time.monotonic() - ready[0].since >= BATCH_SECONDS


def bundles(ready: Sequence[Ready], request: Request) -> list[list[Ready]]:
    """What is ready by the transactions in which it is published: each within the bounds, or of one image only."""
    found: list[list[Ready]] = []
    entries = size = 0
    for one in ready:
        entries, size = entries + one.entries, size + one.size
        fits = entries <= request.transaction_entries and size <= request.transaction_bytes
        if not found or not fits or len(found[-1]) >= BATCH_IMAGES:
            found.append([])
            entries, size = one.entries, one.size
        found[-1].append(one)
    return found


def jobs_of(actions: Sequence[Action]) -> list[Job]:
    """Actions by image: tags that point at one digest are one piece of work."""
    groups: dict[tuple[str, str, str], list[Action]] = {}
    for action in actions:
        pinned = action.after
        assert pinned is not None
        key = (str(pinned.reference.repository), str(pinned.descriptor.digest), str(pinned.platform))
        groups.setdefault(key, []).append(action)
    return [Job(tuple(group), 0.0) for group in groups.values()]

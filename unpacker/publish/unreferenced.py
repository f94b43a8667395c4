"""Takes roots out of a native repository that no name leads to, after their grace period, and layers no root has.

That unlinks them in one new revision; their objects are garbage once the revisions before are. Then it collects what
is garbage already (see `cvmfs.gc`).
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from dataclasses import dataclass

from unpacker import logs
from unpacker.cvmfs import gc
from unpacker.errors import NoRoom, PublishError
from unpacker.publish.roots import FLAT, LAYERS, METADATA, UNREFERENCED, layer_path, parse_unreferenced, root_path
from unpacker.publish.snapshot import Snapshot
from unpacker.publish.stratum0 import Stratum0Publisher

log = logs.Log()

_NO_NAMES = frozenset({FLAT, METADATA, LAYERS, ".images", ".chains", ".cvmfs"})
"""Top-level directories in which no symlink is a name of a root. In all others, every one counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """What was removed, or would be: `roots` and `layers` by path, how many roots are `waiting`; then how many
    `revisions` and `contents`, and the bytes `freed`. `unlinked` are the bytes that only these roots and layers have: a
    later run frees them, once the revisions are old enough that still show them."""

    roots: tuple[str, ...]
    layers: tuple[str, ...]
    waiting: int
    revisions: int
    contents: int
    freed: int
    unlinked: int


@dataclass(frozen=True, slots=True)
class _Plan:
    """What to unlink, and since when the roots without a name wait that are not."""

    roots: list[str]
    layers: list[str]
    waiting: dict[str, int]
    is_news: bool

    @property
    def paths(self) -> tuple[str, ...]:
        return (*self.roots, *self.layers)


def collect(publisher: Stratum0Publisher, *, grace: float, keep: float, now: float, dry_run: bool) -> Collected:
    """Unlinks what has been without a name for more than `grace` seconds at the Unix time `now`, and deletes the
    objects of revisions superseded more than `keep` seconds before, under the lock.

    Only roots and layers that `unpacker` made. A root seen without a name for the first time is recorded, and waits.
    `dry_run` writes nothing. PublishError if anything cannot be read; then nothing is unlinked, or nothing deleted.
    """
    if dry_run:
        with publisher.snapshot() as snapshot:
            plan = _plan(snapshot, grace, now)
        unlinked = _weigh(publisher, plan)
        found = _collect_objects(publisher, keep=keep, grace=grace, now=now, dry_run=True)
    else:
        with publisher.lock():
            early = gc.Collected(revisions=0, objects=0, freed=0)
            try:
                plan, unlinked = _unlink(publisher, grace, now)
            except NoRoom:
                # What is garbage already may be what fills the disk.
                early = _collect_objects(publisher, keep=keep, grace=grace, now=now, dry_run=False)
                plan, unlinked = _unlink(publisher, grace, now)
            found = _collect_objects(publisher, keep=keep, grace=grace, now=now, dry_run=False).plus(early)
    return Collected(
        roots=tuple(plan.roots),
        layers=tuple(plan.layers),
        waiting=len(plan.waiting),
        revisions=found.revisions,
        contents=found.objects,
        freed=found.freed,
        unlinked=unlinked,
    )


def _collect_objects(
    publisher: Stratum0Publisher, *, keep: float, grace: float, now: float, dry_run: bool
) -> gc.Collected:
    repository = publisher.repository
    if not repository.manifest().collectable:
        # As cvmfs_server makes repositories, unless asked otherwise. Roots are unlinked all the same.
        log.info("objects stay: the repository forbids garbage collection", repository=repository.name)
        return gc.Collected(revisions=0, objects=0, freed=0)
    return gc.collect(repository, keep=keep, grace=grace, now=now, dry_run=dry_run, wait=publisher.wait)


def _unlink(publisher: Stratum0Publisher, grace: float, now: float) -> tuple[_Plan, int]:
    with publisher.transaction("gc") as transaction:
        with publisher.snapshot() as snapshot:
            plan = _plan(snapshot, grace, now)
        unlinked = _weigh(publisher, plan)
        if plan.is_news:
            transaction.drop(plan.paths, plan.waiting)
    return plan, unlinked


def _weigh(publisher: Stratum0Publisher, plan: _Plan) -> int:
    return gc.weigh(publisher.repository, {f"/{path}" for path in plan.paths})


def _plan(snapshot: Snapshot, grace: float, now: float) -> _Plan:
    data = snapshot.file(UNREFERENCED)
    try:
        recorded = {} if data is None else parse_unreferenced(data)
    except ValueError as error:
        raise PublishError(
            f"{UNREFERENCED} is damaged ({error}): nothing is unlinked; remove that file with cvmfs_server, and the "
            "grace period of all roots without a name starts now"
        ) from error
    named = set(_led_to(snapshot))
    parts = snapshot.parts()
    ours = [root for part in parts for root in map(root_path, part.roots) if snapshot.has(root)]
    times = {root: recorded.get(root, int(now)) for root in ours if root not in named}
    due = sorted(root for root, since in times.items() if since <= now - grace)
    waiting = {root: since for root, since in times.items() if root not in due}
    needed: set[str] = set()
    for root in set(ours) - set(due):
        facts = snapshot.facts(posixpath.basename(root))
        if facts is None:
            raise PublishError(f"what is known of {root} is damaged, and it may need any layer: nothing is unlinked")
        needed.update(digest.partition(":")[2] for digest in facts.layers)
    idle = {layer for part in parts for layer in part.layers} - needed
    layers = sorted(path for path in map(layer_path, idle) if snapshot.has(path))
    return _Plan(due, layers, waiting, bool(due or layers) or waiting != recorded)


def _led_to(snapshot: Snapshot) -> Iterator[str]:
    """The roots that symlinks lead to: public names, other views of them, and what an operator linked by hand."""
    for name in snapshot.children(""):
        if name in _NO_NAMES:
            continue
        for path, target in snapshot.symlinks(name):
            if target.startswith("/cvmfs/"):
                # As others write links. Of which repository does not matter: one root too many does no harm.
                path, target = "", target.split("/", 3)[-1]
            root = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
            # A link into a root keeps that root, too.
            yield "/".join(root.split("/")[:3])

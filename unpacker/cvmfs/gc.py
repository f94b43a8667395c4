"""Collects the garbage of a repository: old revisions, and the objects that no kept revision reaches.

    mark what is kept → list the store → orphans deleted → reference log without the condemned → all others deleted

Everything is read before anything is written: what cannot be read may refer to anything. A kill leaves objects that
nothing refers to, for the next collection, and never a reference to what is gone. Catalogs go first, because others
take a catalog that is there for proof that all below it is. Orphans go before anything is written, because they may be
what fills the disk.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from unpacker.cvmfs import files, objects, reflog
from unpacker.cvmfs.catalog import REVISION, Catalog
from unpacker.cvmfs.hash import ContentHash
from unpacker.cvmfs.history import PREVIOUS, TRUNK
from unpacker.cvmfs.manifest import Manifest
from unpacker.cvmfs.reflog import Kind, Ref, Reflog
from unpacker.cvmfs.repository import CATALOG_LIMIT, LOCK, Repository
from unpacker.cvmfs.scrub import SCRATCH, listed, parse_name
from unpacker.cvmfs.transaction import transaction
from unpacker.errors import PublishError
from unpacker.publish import posix

STATUS = ".cvmfs_status.json"
"""What the official tools note of a repository for whoever asks."""

_STATUS_LIMIT = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """What was removed, or would be: the number of `revisions` and of `objects`, and the bytes `freed`."""

    revisions: int
    objects: int
    freed: int

    def plus(self, other: Collected) -> Collected:
        return Collected(
            revisions=self.revisions + other.revisions,
            objects=self.objects + other.objects,
            freed=self.freed + other.freed,
        )


def collect(
    repository: Repository, *, keep: float, grace: float, now: float, dry_run: bool, wait: float = 0
) -> Collected:
    """Condemns the revisions that were superseded more than `keep` seconds before the Unix time `now`, except those
    that a tag names (`trunk` and `trunk-previous` among them), and deletes what only they reach.

    What nothing reaches at all may be of an ingest that has not published yet: it goes once its file has not changed
    for `grace` seconds. Under the publishing lock; Busy after at most `wait` seconds. `dry_run` writes nothing at all,
    not even a lock. PublishError if anything of a kept revision cannot be read; then nothing is deleted.
    """
    if dry_run:
        return _plan(repository, repository.manifest(), _published_log(repository), keep, grace, now).collected
    with transaction(repository, now=int(now), wait=wait) as within:
        plan = _plan(repository, within.base, within.reflog, keep, grace, now)
        try:
            _delete_all(repository, plan.orphans)
            if plan.condemned:
                within.replace_reflog(within.reflog.without(ref.hash for ref in plan.condemned))
            _delete_all(repository, plan.garbage)
            _note_collection(repository, now)
        except OSError as error:
            raise posix.failure(error, f"deleting garbage of {repository.name}") from error
    return plan.collected


def reclaim(repository: Repository, *, now: float, wait: float = 0) -> None:
    """Deletes what was stored since our lock was taken and no revision leads to. For who holds that lock, and has
    nothing under way. PublishError if anything in use cannot be told; then nothing is deleted."""
    with transaction(repository, now=int(now), wait=wait) as within:
        plan = _plan(repository, within.base, within.reflog, math.inf, -math.inf, now)
        try:
            since = os.stat(f"{repository.directory}/{LOCK}").st_ctime  # When its holder signed it.
            young = [one for one in plan.orphans if os.stat(one[0], follow_symlinks=False).st_ctime >= since]
            _delete_all(repository, young)
        except OSError as error:
            raise posix.failure(error, f"deleting what was not published in {repository.name}") from error


def weigh(repository: Repository, paths: Collection[str]) -> int:
    """The bytes on disk of all objects to which in the published revision, and in those that an operator's tags name,
    only what is at these paths leads: they are free once the revisions are collected that have these paths."""
    if not paths:
        return 0
    base = repository.manifest()
    tags = repository.history(base).tags()
    kept = _reach(repository, [tag.root for tag in tags if tag.name not in (TRUNK, PREVIOUS)])
    gone: list[ContentHash] = []
    pending = [base.root]
    while pending:
        name = pending.pop()
        if name.digest in kept.catalogs:
            continue
        kept.catalogs.add(name.digest)
        with _opened(repository, name) as catalog:
            kept.digests.add(name.digest)
            kept.digests.update(catalog.digests())
            for path, nested in catalog.all_nested().items():
                # A layer's directory is no catalog, but what is in it is.
                is_below = path in paths or path.rpartition("/")[0] in paths
                (gone if is_below else pending).append(nested.hash)
    alone = _lost(repository, gone, kept)
    return sum(_size(path) for path, digest, _ in _stored(repository) if digest in alone)


def _size(path: str) -> int:
    try:
        return os.stat(path, follow_symlinks=False).st_blocks * 512
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise posix.failure(error, f"looking at {path}") from error


def _note_collection(repository: Repository, now: float) -> None:
    """Says when it was, where the official tools say and look (some collect by themselves after a while)."""
    try:
        value = json.loads(files.read(f"{repository.directory}/{STATUS}", _STATUS_LIMIT))
    except (FileNotFoundError, ValueError, RecursionError):
        value = {}
    moment = time.asctime(time.gmtime(now)).split()
    known = value if isinstance(value, dict) else {}
    known["last_gc"] = " ".join((*moment[:4], "UTC", moment[4]))
    repository.write(STATUS, json.dumps(known, indent=2).encode("utf-8") + b"\n")


@dataclass(frozen=True, slots=True)
class _Plan:
    """The entries of the reference log to take out; the objects to delete after that (`garbage`), and those to which
    nothing leads (`orphans`), each with whether it is a catalog."""

    condemned: list[Ref]
    garbage: list[tuple[str, bool]]
    orphans: list[tuple[str, bool]]
    freed: int

    @property
    def collected(self) -> Collected:
        revisions = sum(ref.kind is Kind.CATALOG for ref in self.condemned)
        return Collected(revisions=revisions, objects=len(self.garbage) + len(self.orphans), freed=self.freed)


class _Reached:
    """The digests of all objects that some root catalogs lead to, and of which of them the catalogs were read.

    Apart, because a file may have the bytes of a catalog; without suffixes, which keeps an object too many at most.
    """

    def __init__(self) -> None:
        self.digests: set[bytes] = set()
        self.catalogs: set[bytes] = set()


def _plan(repository: Repository, base: Manifest, log: Reflog, keep: float, grace: float, now: float) -> _Plan:
    if not base.collectable:
        raise PublishError(f"the manifest of {repository.name} forbids garbage collection (G): nothing is deleted")
    pinned = {name for name in (base.root, base.certificate, base.history, base.meta_info) if name is not None}
    tagged = {tag.root for tag in repository.history(base).tags()}
    kept, condemned = judge(log.refs(), pinned | tagged, now - keep)
    roots = {base.root, *tagged, *(ref.hash for ref in kept if ref.kind is Kind.CATALOG)}
    reached = _reach(repository, roots)
    reached.digests.update(name.digest for name in pinned)
    reached.digests.update(ref.hash.digest for ref in kept)
    lost = _lost(repository, [ref.hash for ref in condemned if ref.kind is Kind.CATALOG], reached)
    lost.update(ref.hash.digest for ref in condemned)
    garbage: list[tuple[str, bool]] = []
    orphans: list[tuple[str, bool]] = []
    freed = 0
    for path, digest, suffix in _stored(repository):
        if digest in reached.digests:
            continue
        try:
            own = os.stat(path, follow_symlinks=False)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise posix.failure(error, f"looking at {path} (nothing is deleted)") from error
        # The later one: a batch is renamed long after its first object was written.
        if digest in lost or max(own.st_mtime, own.st_ctime) <= now - grace:
            (garbage if digest in lost else orphans).append((path, suffix == objects.CATALOG))
            freed += own.st_blocks * 512
    return _Plan(condemned, garbage, orphans, freed)


def judge(refs: Iterable[Ref], pinned: Collection[ContentHash], before: float) -> tuple[list[Ref], list[Ref]]:
    """Which entries of a reference log are kept, and which are condemned: those that are not pinned, and were followed
    by another one of their kind no later than at the Unix time `before`.

    Not when they were published: whoever reads a revision reads it until the next one comes, however old it is.
    """
    kept: list[Ref] = []
    condemned: list[Ref] = []
    following: dict[Kind, int] = {}
    for ref in sorted(refs, key=lambda ref: (ref.timestamp, ref.hash), reverse=True):
        # The last may have lost a race, and was never published. If it was, it is pinned.
        ended = following.get(ref.kind, ref.timestamp)
        following[ref.kind] = ref.timestamp
        (kept if ref.hash in pinned or ended > before else condemned).append(ref)
    return kept, condemned


def _reach(repository: Repository, roots: Iterable[ContentHash]) -> _Reached:
    reached = _Reached()
    pending = list(roots)
    while pending:
        name = pending.pop()
        if name.digest in reached.catalogs:
            continue
        try:
            with _opened(repository, name) as catalog:
                if catalog.schema_revision > REVISION:
                    raise PublishError(
                        f"catalog {name} has schema revision {catalog.schema_revision}, this version of unpacker knows "
                        f"those up to {REVISION}, and cannot tell what it refers to: upgrade unpacker"
                    )
                reached.digests.add(name.digest)
                reached.digests.update(catalog.digests())
                pending += [nested.hash for nested in catalog.all_nested().values()]
                # Their revisions have tags; where not, they are gone for clients already.
                pending += [
                    bound.hash
                    for bound in catalog.bound().values()
                    if repository.objects.has(bound.hash, objects.CATALOG)
                ]
        except PublishError as error:
            raise PublishError(f"what is in use cannot be told, so nothing is deleted: {error}") from error
        reached.catalogs.add(name.digest)
    return reached


def _lost(repository: Repository, roots: list[ContentHash], reached: _Reached) -> set[bytes]:
    """The digests of what these roots lead to and nothing else does, as far as they can be read."""
    digests: set[bytes] = set()
    seen: set[bytes] = set()
    while roots:
        name = roots.pop()
        if name.digest in reached.catalogs or name.digest in seen:
            continue
        seen.add(name.digest)
        digests.add(name.digest)
        try:
            with _opened(repository, name) as catalog:
                digests.update(digest for digest in catalog.digests() if digest not in reached.digests)
                roots += [nested.hash for nested in catalog.all_nested().values()]
        except PublishError:
            # A collection that was killed may have taken it. What it led to waits for the grace period, like all that
            # nothing refers to; what is kept is known already, and does not depend on this.
            continue
    return digests


def _opened(repository: Repository, name: ContentHash) -> Catalog:
    data = repository.objects.read(name, objects.CATALOG, limit=CATALOG_LIMIT)
    return Catalog.load(data, f"catalog {name} of {repository.name}")


def _stored(repository: Repository) -> Iterator[tuple[str, bytes, str]]:
    """All objects in the store: path, digest, suffix. What is not named like one is nothing of ours."""
    for group in listed(f"{repository.directory}/data"):
        if group.name != SCRATCH and group.is_dir(follow_symlinks=False):
            for entry in listed(group.path):
                found = parse_name(group.name, entry.name)
                if found is not None and entry.is_file(follow_symlinks=False):
                    yield entry.path, found[0].digest, found[1]


def _delete_all(repository: Repository, garbage: Collection[tuple[str, bool]]) -> None:
    if not garbage:
        return
    _delete(path for path, is_catalog in garbage if is_catalog)
    # A power failure must not bring catalogs back whose files are gone.
    repository.sync()
    _delete(path for path, is_catalog in garbage if not is_catalog)


def _delete(paths: Iterable[str]) -> None:
    for path in paths:
        try:
            os.unlink(path)
        except FileNotFoundError:
            continue


def _published_log(repository: Repository) -> Reflog:
    path = f"{repository.directory}/{reflog.FILE}"
    try:
        return Reflog(repository.name, files.read(path, reflog.LIMIT), path)
    except OSError as error:
        raise posix.failure(error, f"reading {path}") from error

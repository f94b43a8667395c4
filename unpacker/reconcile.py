"""The loop: survey what is wished and what stands, then fetch, read, flatten and publish what differs.

Resolve wide, read layers wide, publish narrow. Everything that can fail for an outside reason happens before a
transaction opens; what fails, fails alone.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Protocol

import structlog

from unpacker import __version__, journal
from unpacker.cache import ChangesetCache
from unpacker.changeset import Changeset
from unpacker.contracts import Publisher, Registry, Release
from unpacker.errors import ImageError, PublishError, RegistryError, UnpackerError, UnsafePlan
from unpacker.image import Image
from unpacker.layer import LayerJob, read_layer
from unpacker.limits import Limits
from unpacker.plan import Action, Done, Outcome, Plan, Resolution, Rules, Verb, plan
from unpacker.pools import ASKING_THREADS, Pools
from unpacker.record import Published, Unreadable
from unpacker.report import status_note
from unpacker.resolve import fetch, resolve, unreachable
from unpacker.rootfs import Policy, prepare
from unpacker.status import Failure
from unpacker.tree import EMPTY, Tree, apply
from unpacker.wish import Wish

log: structlog.stdlib.BoundLogger = structlog.get_logger()

_CHAINS_KEPT = 8
BATCH_IMAGES = 20
BATCH_ENTRIES = 2_000_000
"""Bounds of one transaction: a failure in it costs composing these again, one by one."""


class Progress(Protocol):
    """Told how far a run is; draws it on a terminal or ignores it."""

    def planned(self, actions: int) -> None: ...

    def working(self, what: str) -> None: ...

    def finished(self, outcome: Outcome) -> None: ...


class Silent:
    """Progress for cron."""

    def planned(self, actions: int) -> None: ...

    def working(self, what: str) -> None: ...

    def finished(self, outcome: Outcome) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One run, all choices made. `state` is the target's state directory; `only` a glob over public paths."""

    wishes: tuple[Wish, ...]
    owner: str | None
    sound: bool
    publisher: Publisher
    registry: Registry
    policy: Policy
    limits: Limits
    state: str
    jobs: int
    may_become_public: frozenset[str] = frozenset()
    only: str | None = None
    removals: bool = True
    rebuild: bool = False
    damaged: frozenset[str] = frozenset()
    allow_removals: bool = False
    keep_vanished: float | None = None
    lock_wait: float = 0
    clock: Callable[[], float] = time.time
    attach: Callable[[Published, Image], object] | None = None
    """What to do after a name was published, besides: attach a receipt. Its failure never fails a publish."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """Everything known before anything is changed."""

    plan: Plan
    resolution: Resolution
    published: Mapping[str, Published | Unreadable]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What came of a run."""

    survey: Survey
    outcomes: tuple[Outcome, ...] = ()
    failures: Mapping[str, Failure] = field(default_factory=dict)


def survey(request: Request, asking: Executor | None = None) -> Survey:
    """Asks the target and the registries, and plans; changes nothing. What `plan` shows and `reconcile` does."""
    if asking is None:
        with ThreadPoolExecutor(ASKING_THREADS, "asking") as own:
            return survey(request, own)
    published = request.publisher.published()
    wishes = [w for w in request.wishes if _in_scope(str(w.repository), request.only)]
    resolution = resolve(wishes, request.registry, asking, request.limits, lambda path: _matches(path, request.only))
    history = journal.load(request.state)
    rules = Rules(
        owner=request.owner,
        sound=request.sound,
        rebuild=request.policy.rules if request.rebuild else None,
        removals=request.removals and request.only is None,
        allow_removals=request.allow_removals,
        keep_vanished=request.keep_vanished,
        vanished_since=history.vanished,
        damaged=request.damaged,
        now=int(request.clock()),
    )
    return Survey(plan=plan(wishes, resolution, published, rules), resolution=resolution, published=published)


def _matches(public_path: str, only: str | None) -> bool:
    return only is None or fnmatchcase(public_path, only) or fnmatchcase(public_path.partition(":")[0], only)


def _in_scope(repository: str, only: str | None) -> bool:
    """Whether any tag of a repository may match: decided without asking for its tags."""
    if only is None:
        return True
    head, colon, _ = only.rpartition(":")
    return fnmatchcase(repository, only) or fnmatchcase(repository, head if colon else only) or "*" in only


def reconcile(request: Request, progress: Progress | None = None) -> Result:
    """Makes what stands published equal to what is wished, as far as it can be; never raises for one image."""
    watch = progress or Silent()
    # The pools come first: their processes are forked while this one has no threads, locks or connections to inherit.
    with Pools(request.jobs) as pools, request.publisher.lock(request.lock_wait):
        found = survey(request, pools.asking)
        watch.planned(len(found.plan.changes))
        outcomes: list[Outcome] = []
        try:
            for outcome in _Run(request, pools, watch).carry_out(found.plan):
                outcomes.append(outcome)
                watch.finished(outcome)
        finally:
            # Written also when the run is stopped: what failed until now is worth knowing.
            failures = _write_journal(request, found, outcomes)
        _write_status(request, failures)
    return Result(survey=found, outcomes=tuple(outcomes), failures=failures)


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    """All actions that come to the same image, and when its work began."""

    actions: tuple[Action, ...]
    began: float


@dataclass(frozen=True, slots=True, eq=False)
class _Opened:
    """An image whose documents are at hand, and those of its changesets that the cache had."""

    image: Image
    root: str | None
    cached: Mapping[str, bytes]


class _Run:
    """One run's moving parts: what is being fetched, read, and ready to publish."""

    def __init__(self, request: Request, pools: Pools, watch: Progress) -> None:
        self._request = request
        self._pools = pools
        self._watch = watch
        self._cache = ChangesetCache(request.state, request.policy.rules)
        self._layers: dict[str, Future[bytes]] = {}
        self._retried: set[str] = set()
        self._jobs_of: dict[str, LayerJob] = {}
        self._chains: dict[tuple[str, ...], Tree] = {}

    def carry_out(self, plan: Plan) -> Iterator[Outcome]:
        """Does a plan's actions; yields each one's outcome when it is known."""
        wanted = [a for a in plan.actions if a.verb in (Verb.PUBLISH, Verb.UPDATE)]
        yield from (Outcome(action=a, done=Done.KEPT) for a in plan.actions if a.verb is Verb.KEEP)
        yield from (Outcome(action=a, done=Done.HELD) for a in plan.held)
        yield from self._publish_all(wanted)
        yield from self._remove([a for a in plan.actions if a.verb is Verb.REMOVE])

    # -- publishing ---------------------------------------------------------------------------------------------

    def _publish_all(self, actions: Sequence[Action]) -> Iterator[Outcome]:
        waiting = deque(_jobs(actions))
        opening: dict[Future[_Opened], _Job] = {}
        reading: list[tuple[_Job, _Opened]] = []
        window = 2 * self._request.jobs + 2
        while waiting or opening or reading:
            while waiting and len(opening) + len(reading) < window:
                job = replace(waiting.popleft(), began=time.monotonic())
                opening[self._pools.asking.submit(self._open, job.actions[0])] = job
            self._wait(opening, reading)
            for opened in [f for f in opening if f.done()]:
                job = opening.pop(opened)
                try:
                    reading.append((job, opened.result()))
                    self._start_layers(reading[-1][1])
                except Exception as error:  # noqa: BLE001 - one image's failure, whatever it is, is its own
                    if reading and reading[-1][0] is job:
                        reading.pop()
                    yield from self._failed(job, error)
            ready = [(job, opened) for job, opened in reading if self._is_read(opened)]
            for batch in self._batches(ready):
                reading = [entry for entry in reading if entry not in batch]
                yield from self._commit(batch)
                self._forget(reading)

    def _open(self, action: Action) -> _Opened:
        request = self._request
        assert action.after is not None
        self._watch.working(action.public_path)
        image = fetch(action.after, request.registry, request.limits, request.may_become_public)
        root = request.publisher.root(image.image_id, request.policy.rules)
        if root is not None and action.public_path not in request.damaged:
            return _Opened(image=image, root=root, cached={})
        check = action.public_path in request.damaged
        return _Opened(image=image, root=None, cached=self._recall(image, check=check))

    def _recall(self, image: Image, *, check: bool) -> dict[str, bytes]:
        """The encoded changesets that spare reading a layer: known, and every file they name is still stored."""
        contents = self._request.publisher.contents
        found = {}
        for layer in image.layers:
            changeset = self._cache.get(layer)
            if changeset is None:
                continue
            tokens = {e.token for e in changeset.entries if e.token}
            if not contents.missing(tokens, check=check):
                found[layer.key] = changeset.encode()
        return found

    def _start_layers(self, opened: _Opened) -> None:
        if opened.root is not None:
            return
        image = opened.image
        new = [layer for layer in image.layers if layer.key not in self._layers and layer.key not in opened.cached]
        # What comes out of a layer is not known before it is read; three times the compressed size is usual.
        self._request.publisher.room(3 * sum(layer.descriptor.size for layer in new), len(new))
        for layer in image.layers:
            if layer.key in opened.cached and layer.key not in self._layers:
                self._layers[layer.key] = _known(opened.cached[layer.key])
        for layer in new:
            if layer.key in self._layers:
                continue  # the same layer twice in one image
            if layer.key in self._jobs_of and (again := self._cache.get(layer)) is not None:
                # Read earlier in this run and forgotten since, to keep memory bounded.
                self._layers[layer.key] = _known(again.encode())
                continue
            job = LayerJob(
                repository=image.pinned.reference.repository,
                layer=layer,
                registry=self._request.registry.locator,
                store=self._request.publisher.contents.locator,
                policy=self._request.policy,
                limits=self._request.limits,
            )
            self._jobs_of[layer.key] = job
            self._layers[layer.key] = self._pools.layers.submit(read_layer, job)

    def _wait(self, opening: Mapping[Future[_Opened], _Job], reading: Sequence[tuple[_Job, _Opened]]) -> None:
        unread = {f for _, opened in reading for f in self._futures(opened) if not f.done()}
        if reading and any(self._is_read(opened) for _, opened in reading):
            return
        pending: set[Future[Any]] = {*opening, *unread}
        if pending:
            wait(pending, return_when=FIRST_COMPLETED)
        self._replace_broken(reading)

    def _replace_broken(self, reading: Sequence[tuple[_Job, _Opened]]) -> None:
        """Reads layers again, each in a process of its own, after a process died: one of them killed it, not all."""
        for _, opened in reading:
            for layer in opened.image.layers if opened.root is None else ():
                future = self._layers[layer.key]
                broken = future.done() and isinstance(future.exception(), BrokenProcessPool)
                if broken and layer.key not in self._retried:
                    self._retried.add(layer.key)
                    self._layers[layer.key] = self._pools.alone(read_layer, self._jobs_of[layer.key])

    def _futures(self, opened: _Opened) -> list[Future[bytes]]:
        return [self._layers[layer.key] for layer in opened.image.layers] if opened.root is None else []

    def _is_read(self, opened: _Opened) -> bool:
        return all(f.done() for f in self._futures(opened))

    def _batches(self, ready: Sequence[tuple[_Job, _Opened]]) -> Iterator[list[tuple[_Job, _Opened]]]:
        for start in range(0, len(ready), BATCH_IMAGES):
            yield list(ready[start : start + BATCH_IMAGES])

    def _forget(self, reading: Sequence[tuple[_Job, _Opened]]) -> None:
        """Drops the changesets that no image in progress needs; the cache on disk has them if another one comes."""
        needed = {layer.key for _, opened in reading for layer in opened.image.layers}
        self._layers = {key: future for key, future in self._layers.items() if key in needed}

    def _commit(self, batch: Sequence[tuple[_Job, _Opened]]) -> Iterator[Outcome]:
        """Composes and publishes images together; if the target refuses them together, one by one."""
        composed: list[tuple[_Job, _Opened, Tree | None, Mapping[str, int]]] = []
        entries = 0
        for job, opened in batch:
            try:
                tree, altered, count = self._compose(opened)
            except Exception as error:  # noqa: BLE001 - one image's failure, whatever it is, is its own
                yield from self._failed(job, error)
                continue
            composed.append((job, opened, tree, altered))
            entries += count
            if entries > BATCH_ENTRIES:
                yield from self._transact(composed)
                composed, entries = [], 0
        yield from self._transact(composed)

    def _transact(self, composed: Sequence[tuple[_Job, _Opened, Tree | None, Mapping[str, int]]]) -> Iterator[Outcome]:
        if not composed:
            return
        names = ", ".join(a.public_path for job, *_ in composed for a in job.actions)
        done: list[tuple[_Job, _Opened, Action, Published]] = []
        try:
            with self._request.publisher.transaction(f"publish {names}") as transaction:
                for job, opened, tree, altered in composed:
                    for action in job.actions:
                        release = self._release(action, opened.image, tree, altered)
                        done.append((job, opened, action, transaction.publish(release)))
                        tree = None  # the other names of this image link to the root just made
        except Exception as error:  # noqa: BLE001 - one image's failure, whatever it is, is its own
            if len(composed) > 1:
                for single in composed:
                    yield from self._transact([single])
            else:
                yield from self._failed(composed[0][0], error)
            return
        for job, opened, action, published in done:
            what = Done.PUBLISHED if action.verb is Verb.PUBLISH else Done.UPDATED
            log.info(what.value, name=action.public_path, image=published.image_id, root=published.root)
            self._attach(published, opened.image)
            yield Outcome(
                action=action,
                done=what,
                seconds=time.monotonic() - job.began,
                size=sum(layer.descriptor.size for layer in opened.image.layers if layer.key in self._jobs_of),
                published=published,
            )

    def _compose(self, opened: _Opened) -> tuple[Tree | None, Mapping[str, int], int]:
        """The tree to publish (None: its root exists), what the policy altered in it, and how large it is."""
        if opened.root is not None:
            return None, {}, 0
        image, limits = opened.image, self._request.limits
        keys = tuple(layer.key for layer in image.layers)
        known = next((n for n in range(len(keys), 0, -1) if keys[:n] in self._chains), 0)
        tree = self._chains[keys[:known]] if known else EMPTY
        entries = size = 0
        for position, layer in enumerate(image.layers):
            encoded = self._layers[layer.key].result()
            changeset = Changeset.decode(encoded)
            entries += len(changeset.entries)
            size += changeset.content_size
            if entries > limits.image_entries or size > limits.image_unpacked:
                raise ImageError(
                    f"{image.pinned.reference}: {entries} entries of {size} bytes in its first {position + 1} layers, "
                    f"more than the {limits.image_entries} and {limits.image_unpacked} that the operator allows"
                )
            if position >= known:
                tree = apply(tree, changeset, limits)
                self._keep_chain(keys[: position + 1], tree)
            if layer.key in self._jobs_of:
                self._cache.put(layer, encoded)
        self._request.publisher.room(0, entries + tree.implied)
        prepared, altered = prepare(tree, image.config, self._request.policy)
        return prepared, altered, entries

    def _keep_chain(self, keys: tuple[str, ...], tree: Tree) -> None:
        # Images of one repository mostly share all but their top layers; trees share what they do not change.
        self._chains[keys] = tree
        while len(self._chains) > _CHAINS_KEPT:
            del self._chains[next(iter(self._chains))]

    def _release(self, action: Action, image: Image, tree: Tree | None, altered: Mapping[str, int]) -> Release:
        pinned, before = action.after, action.before
        assert pinned is not None
        owner = before.wishlist if isinstance(before, Published) and before.wishlist else self._request.owner
        record = Published(
            reference=replace(pinned.reference, digest=None if pinned.reference.tag else pinned.reference.digest),
            digest=str(pinned.descriptor.digest),
            manifest_digest=image.manifest_digest,
            image_id=image.image_id,
            platform=pinned.platform,
            root="",
            rules=self._request.policy.rules,
            wishlist=owner,
            published=int(self._request.clock()),
            compressed=image.manifest.compressed_size,
            layers=tuple(str(layer.descriptor.digest) for layer in image.layers),
            altered=altered,
            gpu=pinned.gpu,
            tool=f"unpacker {__version__}",
        )
        return Release(image=image, record=record, tree=tree)

    def _attach(self, published: Published, image: Image) -> None:
        if self._request.attach is None:
            return
        try:
            self._request.attach(published, image)
        except UnpackerError as error:
            log.warning("receipt not attached", name=published.public_path, error=str(error))

    def _failed(self, job: _Job, error: BaseException) -> Iterator[Outcome]:
        known = as_error(error)
        for action in job.actions:
            log.info("failed", name=action.public_path, error=str(known))  # the report is where it is told
            yield Outcome(action=action, done=Done.FAILED, seconds=time.monotonic() - job.began, error=known)

    # -- removing -----------------------------------------------------------------------------------------------

    def _remove(self, actions: Sequence[Action]) -> Iterator[Outcome]:
        if not actions:
            return
        paths = [a.public_path for a in actions]
        error: UnpackerError | None = None
        try:
            with self._request.publisher.transaction(f"remove {', '.join(paths)}") as transaction:
                transaction.remove(paths, now=int(self._request.clock()))
        except UnpackerError as caught:
            error = caught
        for action in actions:
            done = Done.FAILED if error else Done.REMOVED
            log.info(done.value, name=action.public_path, reason=action.reason)
            yield Outcome(action=action, done=done, error=error)


def _known(encoded: bytes) -> Future[bytes]:
    future: Future[bytes] = Future()
    future.set_result(encoded)
    return future


def exit_code(result: Result, *, sound: bool) -> int:
    """What a run comes to for who called it; the gravest matter wins."""
    failed = [o.error for o in result.outcomes if o.error is not None]
    if any(isinstance(error, PublishError) for error in failed):
        return PublishError.exit_code
    if result.survey.plan.held:
        return UnsafePlan.exit_code
    if unreachable(result.survey.resolution):
        return RegistryError.exit_code
    return 1 if failed or result.survey.plan.unresolved or not sound else 0


def _jobs(actions: Sequence[Action]) -> list[_Job]:
    """Actions by image: tags that point at one digest are one piece of work."""
    groups: dict[tuple[str, str, str], list[Action]] = {}
    for action in actions:
        pinned = action.after
        assert pinned is not None
        key = (str(pinned.reference.repository), str(pinned.descriptor.digest), str(pinned.platform))
        groups.setdefault(key, []).append(action)
    return [_Job(tuple(group), 0.0) for group in groups.values()]


def as_error(error: BaseException) -> UnpackerError:
    """What a failure is called in the report; one that nobody foresaw is logged with its traceback."""
    if isinstance(error, UnpackerError):
        return error
    if isinstance(error, BrokenProcessPool):
        return ImageError("reading a layer killed its process (out of memory?)")
    if isinstance(error, OSError):
        return PublishError(f"{error.strerror or error}: {error.filename or 'the target or the state directory'}")
    log.error("unforeseen", exc_info=error)
    return UnpackerError(f"unforeseen {type(error).__name__}: {error} (this is a fault of unpacker: please report it)")


def _write_journal(request: Request, found: Survey, outcomes: Sequence[Outcome]) -> Mapping[str, Failure]:
    failed = {o.action.public_path: str(o.error) for o in outcomes if o.error is not None}
    failed |= {(u.reference.public_path if u.reference else u.name): str(u.error) for u in found.plan.unresolved}
    expansions: dict[str, tuple[str, ...]] = {}
    for wish in request.wishes:
        listed = found.resolution.listed.get(str(wish.repository))
        if wish.needs_listing and listed is not None:
            expansions[wish.text] = wish.select(sorted(listed))
    pinned = {p.reference.public_path for p in found.resolution.pinned}
    # Wishes that could not even be listed keep their last expansion, so that `status` still knows their names.
    before = journal.load(request.state)
    kept = {w.text: before.expansions[w.text] for w in request.wishes if w.text in before.expansions}
    after = before.after(
        failed=failed,
        vanished=frozenset(a.public_path for a in found.plan.actions if a.vanished),
        expansions=kept | expansions,
        seen=None if request.only is None else frozenset(pinned | set(failed)),
        now=int(request.clock()),
    )
    journal.store(request.state, after)
    return after.failures


def _write_status(request: Request, failures: Mapping[str, Failure]) -> None:
    standing = {path: p for path, p in request.publisher.published().items() if isinstance(p, Published)}
    owner = request.owner or "the command line"
    note = status_note(request.publisher.noted("status.json"), owner, standing, failures, int(request.clock()))
    if note is not None:
        with request.publisher.transaction("note how all stands") as transaction:
            transaction.note("status.json", note)

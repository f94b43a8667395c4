"""The loop: survey what is wished and what stands, then fetch, read, flatten and publish what differs.

Resolve wide, read layers wide, publish narrow. Everything that can fail for an outside reason happens before a
transaction opens; what fails, fails alone.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Protocol

from unpacker import __version__, journal, logs
from unpacker.cache import ChangesetCache
from unpacker.contracts import Publisher, Registry, Release, Stacked
from unpacker.errors import ImageError, PublishError, RegistryError, UnpackerError, UnsafePlan
from unpacker.flatten import Growing, Layers
from unpacker.image import Image
from unpacker.limits import Limits
from unpacker.plan import Action, Done, Outcome, Plan, Resolution, Rules, Verb, plan
from unpacker.pools import ASKING_THREADS, Pools
from unpacker.recipe import is_ignored
from unpacker.record import Published, Unreadable
from unpacker.report import status_note
from unpacker.resolve import fetch, resolve, unforeseen, unreachable
from unpacker.rootfs import Policy, prepare
from unpacker.status import Failure
from unpacker.tree import Tree
from unpacker.wish import Wish

log = logs.Log()

BATCH_IMAGES = 20
BATCH_ENTRIES = 200_000
BATCH_SECONDS = 2.0
"""Bounds of one transaction: what is ready waits so long for company, and so many trees are in memory at most."""


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
    history: journal.Journal = field(default_factory=journal.Journal)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What came of a run. `troubles` kept it from writing down what came of it."""

    survey: Survey
    outcomes: tuple[Outcome, ...] = ()
    failures: Mapping[str, Failure] = field(default_factory=dict)
    troubles: tuple[UnpackerError, ...] = ()


def survey(request: Request, asking: Executor | None = None) -> Survey:
    """Asks the target and the registries, and plans; changes nothing. What `plan` shows and `reconcile` does."""
    if asking is None:
        with ThreadPoolExecutor(ASKING_THREADS, "asking") as own:
            return survey(request, own)
    published = request.publisher.published()
    wishes = [w for w in request.wishes if _in_scope(str(w.repository), request.only)]
    resolution = resolve(wishes, request.registry, asking, request.limits, lambda path: _matches(path, request.only))
    history = journal.load(request.state, request.owner or "")
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
    decided = plan(wishes, resolution, published, rules)
    return Survey(plan=decided, resolution=resolution, published=published, history=history)


def _matches(public_path: str, only: str | None) -> bool:
    return only is None or fnmatchcase(public_path, only) or fnmatchcase(_without_tag(public_path), only)


def _in_scope(repository: str, only: str | None) -> bool:
    """Whether any tag of a repository may match: decided without asking for its tags."""
    if only is None:
        return True
    return fnmatchcase(repository, only) or fnmatchcase(repository, _without_tag(only)) or "*" in only


def _without_tag(name: str) -> str:
    """The repository of a public name. A registry's own name may have a colon, and so has a digest."""
    parent, slash, last = name.rpartition("/")
    return f"{parent}{slash}{last.partition(':')[0]}"


def reconcile(request: Request, progress: Progress | None = None) -> Result:
    """Makes what stands published equal to what is wished, as far as it can be; never raises for one image."""
    watch = progress or Silent()
    # The pools come first: their processes are forked while this one has no threads, locks or connections to inherit.
    with Pools(request.jobs) as pools, request.publisher.lock(request.lock_wait):
        found = survey(request, pools.asking)
        watch.planned(len(found.plan.changes))
        outcomes: list[Outcome] = []
        troubles: list[UnpackerError] = []
        try:
            for outcome in _Run(request, pools, watch).carry_out(found.plan):
                outcomes.append(outcome)
                watch.finished(outcome)
        finally:
            # Written also when the run is stopped: what failed until now is worth knowing.
            failures = _journal(request, found, outcomes)
            with _told(troubles):
                journal.store(request.state, failures, request.owner or "")
        with _told(troubles):
            _write_status(request, failures.failures)
    return Result(survey=found, outcomes=tuple(outcomes), failures=failures.failures, troubles=tuple(troubles))


@contextmanager
def _told(troubles: list[UnpackerError]) -> Iterator[None]:
    """What goes wrong in writing down what was done must not keep from telling it."""
    try:
        yield
    except UnpackerError as error:
        troubles.append(error)


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    """All actions that come to the same image, and when its work began."""

    actions: tuple[Action, ...]
    began: float


@dataclass(frozen=True, slots=True, eq=False)
class _Opened:
    """An image whose documents are at hand, and its root, if the target has a sound one."""

    image: Image
    root: str | None
    damaged: bool


@dataclass(frozen=True, slots=True, eq=False)
class _Ready:
    """An image that nothing but the target can fail any more. `tree` is None where its root exists."""

    job: _Job
    image: Image
    tree: Tree | None
    altered: Mapping[str, int]
    entries: int
    since: float
    layers: tuple[Stacked, ...] = ()


class _Run:
    """One run's moving parts: what is being opened, flattened, and ready to publish."""

    def __init__(self, request: Request, pools: Pools, watch: Progress) -> None:
        self._request = request
        self._pools = pools
        self._watch = watch
        self._layers = Layers(
            pools=pools,
            cache=ChangesetCache(request.state, request.policy.rules),
            registry=request.registry.locator,
            contents=request.publisher.contents,
            policy=request.policy,
            limits=request.limits,
            keep_layers=request.publisher.wants_layers,
        )

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
        growing: list[tuple[_Job, Growing]] = []
        ready: list[_Ready] = []
        window = 2 * self._request.jobs + 2
        while waiting or opening or growing or ready:
            while waiting and len(opening) + len(growing) < window:
                job = replace(waiting.popleft(), began=time.monotonic())
                opening[self._pools.asking.submit(self._open, job.actions)] = job
            if opening or growing:
                unread = self._layers.pending(g.image for _, g in growing)
                patience = max(0.0, ready[0].since + BATCH_SECONDS - time.monotonic()) if ready else None
                pending: set[Future[Any]] = {*opening, *unread}
                wait(pending, timeout=patience, return_when=FIRST_COMPLETED)
            for opened in [future for future in opening if future.done()]:
                job = opening.pop(opened)
                try:
                    self._take(job, opened.result(), growing, ready)
                except Exception as error:  # noqa: BLE001 - one image's failure, whatever it is, is its own
                    yield from self._failed(job, error)
            self._layers.replace_broken(g.image for _, g in growing)
            before = len(growing)
            for job, image in list(growing):
                try:
                    if not image.advance():
                        continue
                    ready.append(self._complete(job, image))
                except Exception as error:  # noqa: BLE001 - one image's failure, whatever it is, is its own
                    yield from self._failed(job, error)
                growing.remove((job, image))
            if _is_due(ready, more_to_come=bool(waiting or opening or growing)):
                yield from self._transact(ready)
                ready = []
            if len(growing) < before:
                self._layers.forget_all_but(g.image for _, g in growing)

    def _open(self, actions: Sequence[Action]) -> _Opened:
        request, action = self._request, actions[0]
        assert action.after is not None
        self._watch.working(action.public_path)
        image = fetch(action.after, request.registry, request.limits, request.may_become_public)
        damaged = any(a.public_path in request.damaged for a in actions)
        root = None if damaged else request.publisher.root(image.image_id, request.policy.rules)
        return _Opened(image=image, root=root, damaged=damaged)

    def _take(self, job: _Job, opened: _Opened, growing: list[tuple[_Job, Growing]], ready: list[_Ready]) -> None:
        if opened.root is not None:
            ready.append(_Ready(job, opened.image, None, {}, 0, time.monotonic()))
            return
        # What comes out of a layer is not known before it is read; three times the compressed size is usual.
        self._request.publisher.room(3 * self._layers.compressed(opened.image), len(opened.image.layers))
        growing.append((job, self._layers.start(opened.image, check=opened.damaged)))

    def _complete(self, job: _Job, image: Growing) -> _Ready:
        self._request.publisher.room(0, image.entries + image.tree.implied)
        tree, altered = prepare(image.tree, image.image.config, self._request.policy)
        return _Ready(job, image.image, tree, altered, image.entries, time.monotonic(), tuple(image.stacked))

    def _transact(self, ready: Sequence[_Ready]) -> Iterator[Outcome]:
        """Publishes images together; if the target refuses them together, one by one."""
        names = ", ".join(a.public_path for one in ready for a in one.job.actions)
        done: list[tuple[_Ready, Action, Published]] = []
        try:
            with self._request.publisher.transaction(f"publish {names}") as transaction:
                for one in ready:
                    tree = one.tree
                    # A damaged root's own name first: a tree for it is what asks the target for another root.
                    for action in sorted(one.job.actions, key=lambda a: a.public_path not in self._request.damaged):
                        release = self._release(action, one, tree)
                        done.append((one, action, transaction.publish(release)))
                        tree = None  # the other names of this image link to the root just made
        except Exception as error:  # noqa: BLE001 - one image's failure, whatever it is, is its own
            if len(ready) > 1:
                for one in ready:
                    yield from self._transact([one])
            else:
                yield from self._failed(ready[0].job, error)
            return
        for one, action, published in done:
            what = Done.PUBLISHED if action.verb is Verb.PUBLISH else Done.UPDATED
            log.info(what.value, name=action.public_path, image=published.image_id, root=published.root)
            self._attach(published, one.image)
            yield Outcome(
                action=action,
                done=what,
                seconds=time.monotonic() - one.job.began,
                size=sum(layer.descriptor.size for layer in one.image.layers if self._layers.was_read(layer)),
                published=published,
            )

    def _release(self, action: Action, ready: _Ready, tree: Tree | None) -> Release:
        image = ready.image
        pinned = action.after
        assert pinned is not None
        record = Published(
            reference=replace(pinned.reference, digest=None if pinned.reference.tag else pinned.reference.digest),
            digest=str(pinned.descriptor.digest),
            manifest_digest=image.manifest_digest,
            image_id=image.image_id,
            platform=pinned.platform,
            root="",
            rules=self._request.policy.rules,
            wishlist=action.owners[0] if action.owners else None,
            also=action.owners[1:],
            published=int(self._request.clock()),
            compressed=image.manifest.compressed_size,
            layers=tuple(str(layer.descriptor.digest) for layer in image.layers),
            altered=ready.altered,
            gpu=pinned.gpu,
            tool=f"unpacker {__version__}",
        )
        return Release(image=image, record=record, tree=tree, layers=() if tree is None else ready.layers)

    def _attach(self, published: Published, image: Image) -> None:
        if self._request.attach is None:
            return
        try:
            self._request.attach(published, image)
        except UnpackerError as error:
            log.warning("receipt not attached", name=published.public_path, error=str(error))

    def _failed(self, job: _Job, error: Exception) -> Iterator[Outcome]:
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


def exit_code(result: Result, *, sound: bool, ignored: Collection[str] = ()) -> int:
    """What a run comes to for who called it; the gravest matter wins. Failures of images alone that match a recipe's
    `ignored` patterns count for nothing."""
    failed = [o.error for o in result.outcomes if o.error is not None]
    if result.troubles or any(isinstance(error, PublishError) for error in failed):
        return PublishError.exit_code
    if result.survey.plan.held:
        return UnsafePlan.exit_code
    if unreachable(result.survey.resolution):
        return RegistryError.exit_code
    names = [o.action.public_path for o in result.outcomes if o.error is not None]
    # Where not even the tags are known, the whole wish failed, which a recipe writes with its wildcard.
    names += [u.name if u.reference is not None else f"{u.name}:*" for u in result.survey.plan.unresolved]
    return 1 if not sound or not all(is_ignored(name, ignored) for name in names) else 0


def _is_due(ready: Sequence[_Ready], *, more_to_come: bool) -> bool:
    """Whether to publish what is ready now, or to wait for more to share the transaction with."""
    if not ready:
        return False
    full = len(ready) >= BATCH_IMAGES or sum(one.entries for one in ready) >= BATCH_ENTRIES
    return full or not more_to_come or time.monotonic() - ready[0].since >= BATCH_SECONDS


def _jobs(actions: Sequence[Action]) -> list[_Job]:
    """Actions by image: tags that point at one digest are one piece of work."""
    groups: dict[tuple[str, str, str], list[Action]] = {}
    for action in actions:
        pinned = action.after
        assert pinned is not None
        key = (str(pinned.reference.repository), str(pinned.descriptor.digest), str(pinned.platform))
        groups.setdefault(key, []).append(action)
    return [_Job(tuple(group), 0.0) for group in groups.values()]


def as_error(error: Exception) -> UnpackerError:
    """What a failure is called in the report."""
    if isinstance(error, BrokenProcessPool):
        return ImageError("reading a layer killed its process (out of memory?)")
    if isinstance(error, OSError):
        return PublishError(f"{error.strerror or error}: {error.filename or 'the target or the state directory'}")
    return unforeseen(error)


def _journal(request: Request, found: Survey, outcomes: Sequence[Outcome]) -> journal.Journal:
    """What this wishlist's journal says after the run."""
    failed = {o.action.public_path: str(o.error) for o in outcomes if o.error is not None}
    failed |= {(u.reference.public_path if u.reference else u.name): str(u.error) for u in found.plan.unresolved}
    expansions: dict[str, tuple[str, ...]] = {}
    for wish in request.wishes:
        listed = found.resolution.listed.get(str(wish.repository))
        if wish.needs_listing and listed is not None:
            # Two wishes may be written alike, and differ in what stands beside the image.
            expansions[wish.text] = tuple(dict.fromkeys((*expansions.get(wish.text, ()), *wish.select(sorted(listed)))))
    # A part of a wishlist, a single image, or a run that was stopped: what it did not come to stays as noted.
    planned = {a.public_path for a in found.plan.changes}
    known = {o.action.public_path for o in outcomes}
    partial = request.only is not None or request.owner is None or not planned <= known
    seen = ({p.reference.public_path for p in found.resolution.pinned} | set(failed)) - (planned - known)
    # Wishes that could not even be listed keep their last expansion, so that `status` still knows their names.
    before = found.history
    kept = {w.text: before.expansions[w.text] for w in request.wishes if w.text in before.expansions}
    return before.after(
        failed=failed,
        vanished=frozenset(a.public_path for a in found.plan.actions if a.vanished),
        expansions=kept | expansions,
        seen=frozenset(seen) if partial else None,
        now=int(request.clock()),
    )


def _write_status(request: Request, failures: Mapping[str, Failure]) -> None:
    standing = {path: p for path, p in request.publisher.published().items() if isinstance(p, Published)}
    owner = request.owner or "the command line"
    note = status_note(request.publisher.noted("status.json"), owner, standing, failures, int(request.clock()))
    if note is not None:
        with request.publisher.transaction("note how all stands") as transaction:
            transaction.note("status.json", note)

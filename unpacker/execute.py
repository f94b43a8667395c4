"""Carries out a plan: fetches, reads, flattens and publishes what differs.

Read layers wide, publish narrow. Everything that can fail for an outside reason happens before a transaction opens;
what fails, fails alone.
"""

from __future__ import annotations

import errno
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from typing import Any, Protocol

from unpacker import __version__, logs
from unpacker.bundles import BATCH_SECONDS, Job, Ready, bundles, is_due, jobs_of
from unpacker.cache import ChangesetCache
from unpacker.contracts import Release, Transaction
from unpacker.errors import Busy, ImageError, NoRoom, PublishError, UnpackerError
from unpacker.flatten import Growing, Layers
from unpacker.fronts import Fronts, is_front
from unpacker.furnish import furnish
from unpacker.image import Image
from unpacker.minutes import STATUS
from unpacker.plan import Action, Done, Outcome, Plan, Verb
from unpacker.pools import Pools
from unpacker.record import ADOPTED, Published
from unpacker.resolve import fetch, unforeseen
from unpacker.survey import Request
from unpacker.tree import Tree

log = logs.Log()

ADOPTED_TOGETHER = 500
"""So many names of another tool get their records in one transaction."""


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


@dataclass(frozen=True, slots=True, eq=False)
class _Opened:
    """An image whose documents are at hand, and its root, if the target has a sound one."""

    image: Image
    root: str | None


class Execution:
    """One run's moving parts: what is being opened, flattened, and ready to publish.

    `closing` gives what the last transaction is to write into status.json, so that it needs none of its own; with
    `is_closed` that is done.
    """

    def __init__(
        self, request: Request, pools: Pools, watch: Progress, closing: Callable[[Sequence[Outcome]], bytes | None]
    ) -> None:
        self._request = request
        self._pools = pools
        self._watch = watch
        self._closing = closing
        self.is_closed = False
        self._layers = Layers(
            pools=pools,
            cache=ChangesetCache(request.state, request.policy.entry_rules),
            registry=request.registry.locator,
            contents=request.publisher.contents,
            policy=request.policy,
            limits=request.limits,
            keep_layers=request.publisher.wants_layers,
        )

    def carry_out(self, plan: Plan) -> Iterator[Outcome]:
        """Does a plan's actions; yields each one's outcome when it is known."""
        wanted = [a for a in plan.actions if a.verb in (Verb.PUBLISH, Verb.UPDATE, Verb.REPAIR)]
        fronts = [a for a in wanted if is_front(a)]
        failed: dict[str, UnpackerError] = {}
        yield from (Outcome(action=a, done=Done.KEPT) for a in plan.actions if a.verb is Verb.KEEP)
        yield from (Outcome(action=a, done=Done.HELD) for a in plan.held)
        removals = [a for a in plan.actions if a.verb is Verb.REMOVE]
        rest = [a for a in wanted if not is_front(a)]
        yield from self._adopt([a for a in plan.actions if a.verb is Verb.ADOPT])
        for outcome in self._publish_with_room(rest, is_last=not fronts and not removals):
            if outcome.error is not None:
                failed[outcome.action.public_path] = outcome.error
            yield outcome
        closing = Fronts(self._request, self._note)
        yield from closing.close(fronts, removals, failed)
        self.is_closed = self.is_closed or closing.is_closed

    # -- adopting -----------------------------------------------------------------------------------------------

    def _adopt(self, actions: Sequence[Action]) -> Iterator[Outcome]:
        """Gives what another tool published its records: that costs as good as nothing, so many share a transaction."""
        for first in range(0, len(actions), ADOPTED_TOGETHER):
            now = time.monotonic()
            ready = [
                Ready(Job((action,), now), action.inherited.image, None, {}, 0, now, adopted=action.inherited.root)
                for action in actions[first : first + ADOPTED_TOGETHER]
                if action.inherited is not None and action.inherited.image is not None
            ]
            yield from self._transact(ready, is_last=False)

    # -- publishing ---------------------------------------------------------------------------------------------

    def _publish_with_room(self, actions: Sequence[Action], *, is_last: bool) -> Iterator[Outcome]:
        """What failed for lack of room is tried once more, image by image: one that is too large for the disk must not
        keep from it what came together with it, nor leave it full."""
        short: list[Action] = []
        is_short = False
        reads: int | None = None
        for outcome in self._publish_all(actions, is_last=is_last):
            if isinstance(outcome.error, NoRoom):
                is_short = True
                if len(actions) > 1:
                    short.append(outcome.action)
                    continue
            yield outcome
        for job in jobs_of(short):
            self.is_closed = False
            reads = self._reclaim(reads)
            yield from self._publish_all(job.actions, is_last=False)
        if is_short:
            self._reclaim(reads)

    def _reclaim(self, reads: int | None) -> int:
        """Frees room, unless no layer was read since the last time: then there is none to free, and looking for it may
        take long. Gives how many were read so far."""
        if reads == self._layers.reads:
            return reads
        wait(self._layers.abandoned())  # What they still store nobody would come back for.
        try:
            self._request.publisher.reclaim()
        except PublishError as error:
            log.warning("room not freed", error=str(error))  # what wanted it says that there is none
        return self._layers.reads

    def _publish_all(self, actions: Sequence[Action], *, is_last: bool) -> Iterator[Outcome]:
        waiting = deque(jobs_of(actions))
        opening: dict[Future[_Opened], Job] = {}
        growing: list[tuple[Job, Growing]] = []
        ready: list[Ready] = []
        window = 2 * self._request.jobs + 2
        while waiting or opening or growing or ready:
            while waiting and len(opening) + len(growing) < window:
                job = replace(waiting.popleft(), began=time.monotonic())
                opening[self._pools.asking.submit(self._open, job.actions)] = job
            self._feed(growing, ready)
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
            self._feed(growing, ready)
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
            if len(growing) < before:
                self._layers.forget_all_but(g.image for _, g in growing)
            # What shall be read next, before what takes its time.
            self._feed(growing, ready)
            more = bool(waiting or opening or growing)
            if is_due(ready, self._request, more_to_come=more):
                due = bundles(ready, self._request)
                for bundle in due:
                    yield from self._transact(bundle, is_last=is_last and not more and bundle is due[-1])
                ready = []

    def _feed(self, growing: Sequence[tuple[Job, Growing]], ready: Sequence[Ready]) -> None:
        self._layers.feed([image.image for _, image in growing], beside=sum(one.weight for one in ready))

    def _open(self, actions: Sequence[Action]) -> _Opened:
        request, action = self._request, actions[0]
        assert action.after is not None
        self._watch.working(action.public_path)
        image = fetch(action.after, request.registry, request.limits, request.may_become_public)
        damaged = any(a.public_path in request.damaged for a in actions)
        root = None if damaged else request.publisher.root(image.image_id, request.policy.rules)
        return _Opened(image=image, root=root)

    def _take(self, job: Job, opened: _Opened, growing: list[tuple[Job, Growing]], ready: list[Ready]) -> None:
        if opened.root is not None:
            ready.append(Ready(job, opened.image, None, {}, 0, time.monotonic()))
            return
        # What comes out of a layer is not known before it is read; three times the compressed size is usual.
        self._request.publisher.room(3 * self._layers.compressed(opened.image), len(opened.image.layers))
        # What one image shares with a damaged one may be what is damaged.
        check = bool(self._request.damaged)
        growing.append((job, self._layers.start(opened.image, check=check)))

    def _complete(self, job: Job, image: Growing) -> Ready:
        self._request.publisher.room(0, image.entries + image.tree.implied)
        now, layers = time.monotonic(), tuple(image.stacked)
        return Ready(job, image.image, image.tree, {}, image.entries, now, layers, size=image.size, weight=image.weight)

    def _furnish(self, ready: Sequence[Ready]) -> list[Ready]:
        """The same with their trees as they are published. Before the transaction: it may fail for lack of space."""
        request = self._request
        trees = [(one.tree, one.image.config) for one in ready if one.tree is not None]
        done = iter(furnish(trees, request.publisher.contents, request.policy, check=bool(request.damaged)))
        furnished = []
        for one in ready:
            tree, altered = next(done) if one.tree is not None else (None, one.altered)
            furnished.append(replace(one, tree=tree, altered=altered))
        return furnished

    def _transact(self, ready: Sequence[Ready], *, is_last: bool) -> Iterator[Outcome]:
        """Publishes images together; if the target refuses them together, one by one."""
        names = ", ".join(a.public_path for one in ready for a in one.job.actions)
        done: list[tuple[Ready, Action, Published]] = []
        try:
            furnished = self._furnish(ready)
            with self._request.publisher.transaction(f"publish {names}") as transaction:
                for one in furnished:
                    tree = one.tree
                    # A damaged root's own name first: a tree for it is what asks the target for another root.
                    for action in sorted(one.job.actions, key=lambda a: a.public_path not in self._request.damaged):
                        release = self._release(action, one, tree)
                        done.append((one, action, transaction.publish(release)))
                        tree = None  # the other names of this image link to the root just made
                if is_last:
                    self._note(transaction, [Outcome.of(action, record) for _, action, record in done])
            self.is_closed = is_last
        except Exception as error:  # noqa: BLE001 - one image's failure, whatever it is, is its own
            if isinstance(error, Busy):
                # It is not for any of the images; and each would wait anew.
                for one in ready:
                    yield from self._failed(one.job, error)
            elif len(ready) > 1:
                for one in ready:
                    yield from self._transact([one], is_last=is_last and one is ready[-1])
            else:
                yield from self._failed(ready[0].job, error)
            return
        for one, action, published in done:
            outcome = Outcome.of(action, published)
            log.info(outcome.done.value, name=action.public_path, image=published.image_id, root=published.root)
            self._attach(published, one.image)
            yield replace(
                outcome,
                seconds=time.monotonic() - one.job.began,
                size=sum(layer.descriptor.size for layer in one.image.layers if self._layers.was_read(layer)),
            )

    def _note(self, transaction: Transaction, outcomes: Sequence[Outcome]) -> None:
        note = self._closing(outcomes)
        if note is not None:
            transaction.note(STATUS, note)

    def _release(self, action: Action, ready: Ready, tree: Tree | None) -> Release:
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
            rules=self._request.policy.rules if ready.adopted is None else ADOPTED,
            wishlist=action.owners[0] if action.owners else None,
            also=action.owners[1:],
            published=int(self._request.clock()),
            compressed=image.manifest.compressed_size,
            layers=tuple(str(layer.descriptor.digest) for layer in image.layers),
            altered=ready.altered,
            gpu=pinned.gpu,
            place=pinned.place,
            tool=f"unpacker {__version__}",
        )
        layers = () if tree is None else ready.layers
        return Release(image=image, record=record, tree=tree, layers=layers, adopted=ready.adopted)

    def _attach(self, published: Published, image: Image) -> None:
        if self._request.attach is None:
            return
        try:
            self._request.attach(published, image.pinned.descriptor)
        except Exception as error:  # noqa: BLE001 - whatever it is, the name is published
            log.warning("receipt not attached", name=published.public_path, error=str(unforeseen(error)))

    def _failed(self, job: Job, error: Exception) -> Iterator[Outcome]:
        known = as_error(error)
        for action in job.actions:
            log.info("failed", name=action.public_path, error=str(known))  # the report is where it is told
            yield Outcome(action=action, done=Done.FAILED, seconds=time.monotonic() - job.began, error=known)


def as_error(error: Exception) -> UnpackerError:
    """What a failure is called in the report."""
    if isinstance(error, BrokenProcessPool):
        return ImageError("reading a layer killed its process (out of memory?)")
    if isinstance(error, OSError):
        kind = NoRoom if error.errno in (errno.ENOSPC, errno.EDQUOT) else PublishError
        return kind(f"{error.strerror or error}: {error.filename or 'the target or the state directory'}")
    return unforeseen(error)

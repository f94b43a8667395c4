"""The last transaction of a run: fronts, which lead to the names of several platforms, and removals."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace

from unpacker import __version__, logs
from unpacker.contracts import Transaction
from unpacker.errors import Busy, PublishError, UnpackerError
from unpacker.multiarch import Place, front_target, is_platform_of, public_path
from unpacker.plan import Action, Done, Outcome
from unpacker.record import Published
from unpacker.survey import Request

log = logs.Log()


class Fronts:
    """Closes a run. `note` adds to a transaction what the last one writes besides; with `is_closed` that is done."""

    def __init__(self, request: Request, note: Callable[[Transaction, Sequence[Outcome]], None]) -> None:
        self._request = request
        self._note_in = note
        self.is_closed = False

    def close(
        self, fronts: Sequence[Action], removals: Sequence[Action], failed: Mapping[str, UnpackerError]
    ) -> Iterator[Outcome]:
        """Fronts, when all images are published that can be, and removals, in one transaction: a front is led elsewhere
        before what it led to goes. `failed` are the names that failed, whose standing ones stay as they are."""
        if not fronts and not removals:
            return
        try:
            published = self._request.publisher.published()
        except PublishError as unknown:
            for action in (*fronts, *removals):
                log.info("failed", name=action.public_path, error=str(unknown))
                yield Outcome(action=action, done=Done.FAILED, error=unknown)
            return
        standing = {path for path, p in published.items() if isinstance(p, Published)}
        standing -= {a.public_path for a in removals}
        ready: list[tuple[Action, Published]] = []
        unready = set(failed)
        for action in fronts:
            record = self._front(action)
            missing = _missing(record, standing, variants=self._request.publisher.fills_in_variables)
            missing = missing or _lost(action, failed, standing)
            if missing is None:
                ready.append((action, record))
                continue
            unready.add(action.public_path)
            error = failed.get(missing) or PublishError(f"{missing}, which it would lead to, is not published")
            log.info("failed", name=action.public_path, error=str(error))
            yield Outcome(action=action, done=Done.FAILED, error=error)
        # What a name still leads to that should have been changed, stays with it.
        kept = [a for a in removals if isinstance(a.before, Published) and a.before.reference.public_path in unready]
        yield from (Outcome(action=a, done=Done.KEPT) for a in kept)
        yield from self._point_and_remove(ready, [a for a in removals if a not in kept])

    def _point_and_remove(
        self, fronts: Sequence[tuple[Action, Published]], removals: Sequence[Action]
    ) -> Iterator[Outcome]:
        if not fronts and not removals:
            return
        paths = [a.public_path for a in removals]
        points = [record.public_path for _, record in fronts]
        parts = (("point", points), ("remove", paths))
        what = "; ".join(f"{word} {', '.join(names)}" for word, names in parts if names)
        error: UnpackerError | None = None
        done: dict[str, Published] = {}
        try:
            with self._request.publisher.transaction(what) as transaction:
                done = {record.public_path: transaction.point(record) for _, record in fronts}
                if paths:
                    transaction.remove(paths, now=int(self._request.clock()))
                outcomes = [Outcome.of(action, done[record.public_path]) for action, record in fronts]
                outcomes += [Outcome.of(action) for action in removals]
                self._note_in(transaction, outcomes)
            self.is_closed = True
        except UnpackerError as caught:
            error, self.is_closed = caught, False
        if error is not None and not isinstance(error, Busy) and fronts and len(fronts) + len(removals) > 1:
            yield from self._point_one_by_one(fronts, removals)
            return
        for action in (*(action for action, _ in fronts), *removals):
            outcome = Outcome.of(action, done.get(action.public_path))
            if error is not None:
                outcome = Outcome(action=action, done=Done.FAILED, error=error)
            log.info(outcome.done.value, name=action.public_path, reason=action.reason)
            yield outcome

    def _point_one_by_one(
        self, fronts: Sequence[tuple[Action, Published]], removals: Sequence[Action]
    ) -> Iterator[Outcome]:
        """What the target refuses together: each front alone, then the names that go, but for those that lie behind a
        front which could not be changed."""
        stuck: set[str] = set()
        for action, record in fronts:
            for outcome in self._point_and_remove([(action, record)], []):
                if outcome.error is not None:
                    stuck.add(action.public_path)
                yield outcome
        kept = [a for a in removals if isinstance(a.before, Published) and a.before.reference.public_path in stuck]
        yield from (Outcome(action=a, done=Done.KEPT) for a in kept)
        yield from self._point_and_remove([], [a for a in removals if a not in kept])

    def _front(self, action: Action) -> Published:
        pinned = action.after
        assert pinned is not None
        path, variants = pinned.reference.public_path, self._request.publisher.fills_in_variables
        return Published(
            reference=replace(pinned.reference, digest=None if pinned.reference.tag else pinned.reference.digest),
            digest=str(pinned.descriptor.digest),
            manifest_digest="",
            image_id="",
            platform=pinned.platform,
            root=front_target(path, pinned.platform, variants=variants),
            rules="",
            wishlist=action.owners[0] if action.owners else None,
            also=action.owners[1:],
            published=int(self._request.clock()),
            gpu=pinned.gpu,
            place=Place.FRONT,
            tool=f"unpacker {__version__}",
        )


def is_front(action: Action) -> bool:
    """Whether an action is about a name that stands before several platforms."""
    return action.after is not None and action.after.place is Place.FRONT


def _lost(action: Action, failed: Collection[str], standing: Collection[str]) -> str | None:
    """The name that failed and for lack of which a front would take an image from who has it now under a plain name."""
    before = action.before
    if not isinstance(before, Published) or before.place is not Place.PLAIN:
        return None
    path = public_path(before.public_path, Place.PLATFORM, before.platform)
    return path if path in failed and path not in standing else None


def _missing(front: Published, standing: Collection[str], *, variants: bool) -> str | None:
    """The name for lack of which a front would lead nowhere. Where each reader goes its own way from it, one name of
    any platform is enough: the others are reported on their own."""
    path = front.reference.public_path
    first = public_path(path, Place.PLATFORM, front.platform)
    if first in standing or (variants and any(is_platform_of(name, path) for name in standing)):
        return None
    return first

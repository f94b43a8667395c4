"""The loop: survey what is wished and what stands, then carry out the plan, and write down what came of it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from unpacker import journal
from unpacker.errors import PublishError, RegistryError, UnpackerError, UnsafePlan
from unpacker.execute import Execution, Progress, Silent
from unpacker.minutes import journal_after, status_after, write_status
from unpacker.plan import Outcome
from unpacker.pools import Pools
from unpacker.recipe import is_ignored
from unpacker.resolve import unreachable
from unpacker.status import Failure
from unpacker.survey import Request, Survey, survey


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What came of a run. `troubles` kept it from writing down what came of it."""

    survey: Survey
    outcomes: tuple[Outcome, ...] = ()
    failures: Mapping[str, Failure] = field(default_factory=dict)
    troubles: tuple[UnpackerError, ...] = ()


def reconcile(request: Request, progress: Progress | None = None) -> Result:
    """Makes what stands published equal to what is wished, as far as it can be; never raises for one image."""
    watch = progress or Silent()
    # The pools come first: their processes are forked while this one has no threads, locks or connections to inherit.
    with Pools(request.jobs) as pools, request.publisher.lock(request.lock_wait):
        found = survey(request, pools.asking)
        request = replace(request, damaged=found.damaged)
        watch.planned(len(found.plan.changes))
        outcomes: list[Outcome] = []
        troubles: list[UnpackerError] = []

        def closing(last: Sequence[Outcome]) -> bytes | None:
            return status_after(request, found, [*outcomes, *last])

        run = Execution(request, pools, watch, closing)
        try:
            for outcome in run.carry_out(found.plan):
                outcomes.append(outcome)
                watch.finished(outcome)
        finally:
            # Written also when the run is stopped: what failed until now is worth knowing.
            failures = journal_after(request, found, outcomes)
            with _told(troubles):
                journal.store(request.state, failures, request.owner or "")
        with _told(troubles):
            if not run.is_closed:
                write_status(request, failures.failures)
    return Result(survey=found, outcomes=tuple(outcomes), failures=failures.failures, troubles=tuple(troubles))


@contextmanager
def _told(troubles: list[UnpackerError]) -> Iterator[None]:
    """What goes wrong in writing down what was done must not keep from telling it."""
    try:
        yield
    except UnpackerError as error:
        troubles.append(error)


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

"""What a run leaves in writing: the journal of what failed, and the note of how all stands, for users to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from unpacker import journal
from unpacker.errors import PublishError
from unpacker.multiarch import MULTIARCH
from unpacker.plan import Done, Outcome
from unpacker.record import Published, Unreadable
from unpacker.report import status_note
from unpacker.status import Failure
from unpacker.survey import Request, Survey

STATUS = "status.json"


def journal_after(request: Request, found: Survey, outcomes: Sequence[Outcome]) -> journal.Journal:
    """What this wishlist's journal says after the run."""
    failed = {o.action.public_path: str(o.error) for o in outcomes if o.error is not None}
    failed |= {(u.reference.public_path if u.reference else u.name): str(u.error) for u in found.plan.unresolved}
    expansions: dict[str, tuple[str, ...]] = {}
    for wish in request.wishes:
        listed = found.resolution.listed.get(wish.repository)
        if wish.needs_listing and listed is not None:
            # Two wishes may be written alike, and differ in what stands beside the image.
            expansions[wish.text] = tuple(dict.fromkeys((*expansions.get(wish.text, ()), *wish.select(sorted(listed)))))
    # A part of a wishlist, a single image, or a run that was stopped: what it did not come to stays as noted.
    planned = {a.public_path for a in found.plan.changes}
    known = {o.action.public_path for o in outcomes}
    partial = request.only is not None or request.owner is None or not planned <= known
    seen = ({p.public_path for p in found.resolution.pinned} | set(failed)) - (planned - known)
    # Wishes that could not even be listed keep their last expansion, so that `status` still knows their names.
    before = found.history
    kept = {w.text: before.expansions[w.text] for w in request.wishes if w.text in before.expansions}
    # Where a list could not be read, nothing is known of its names; nor of one that its registry does not tell of.
    silent = {str(u.repository) for u in found.plan.unresolved if u.reference is None}
    unresolved = {u.reference.public_path for u in found.plan.unresolved if u.reference is not None}
    noted = (*before.failures, *before.vanished)
    unknown = {n for n in noted if _public(n) in unresolved or _public(n).rpartition(":")[0] in silent}
    return before.after(
        # Who asked for a single image was told, and no run will come back to it.
        failed=failed if request.owner is not None else {},
        vanished=frozenset(a.public_path for a in found.plan.actions if a.vanished),
        expansions=kept | expansions,
        seen=frozenset(seen) if partial else None,
        unknown=frozenset(unknown),
        now=int(request.clock()),
    )


def _public(name: str) -> str:
    """The public name of which this may be one platform."""
    return name.split("/", 2)[-1] if name.startswith(f"{MULTIARCH}/") else name


def status_after(request: Request, found: Survey, outcomes: Sequence[Outcome]) -> bytes | None:
    """What status.json is to say once all of a run is done, if that is anything new."""
    standing = dict(found.published)
    for outcome in outcomes:
        if outcome.published is not None:
            standing[outcome.action.public_path] = outcome.published
        elif outcome.done is Done.REMOVED:
            standing.pop(outcome.action.public_path, None)
    return _note(request, standing, journal_after(request, found, outcomes).failures)


def write_status(request: Request, failures: Mapping[str, Failure]) -> None:
    note = _note(request, request.publisher.published(), failures)
    if note is not None:
        with request.publisher.transaction("note how all stands") as transaction:
            transaction.note(STATUS, note)


def _note(
    request: Request, published: Mapping[str, Published | Unreadable], failures: Mapping[str, Failure]
) -> bytes | None:
    standing = {path: p for path, p in published.items() if isinstance(p, Published)}
    owner = request.owner or "the command line"
    try:
        before = request.publisher.noted(STATUS)
    except PublishError:
        before = None  # What cannot be read is written anew: no image is to fail for a note.
    return status_note(before, owner, standing, failures, int(request.clock()))

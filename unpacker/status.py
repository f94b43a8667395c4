"""How every wished and published name stands, from the target and the journal alone: no registry is asked. Pure."""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from unpacker.record import Published, Unreadable
from unpacker.reference import Reference
from unpacker.wish import Wish


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Something that keeps failing: since when, when last (Unix seconds), with which error, how often in a row."""

    since: int
    last: int
    error: str
    times: int = 1


class State(enum.StrEnum):
    """How one name stands."""

    PUBLISHED = "published"
    PENDING = "pending"
    FAILING = "failing"
    VANISHED = "vanished"
    UNREADABLE = "unreadable"
    UNWISHED = "unwished"


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """One name, or one wish of which no name is known yet. Times in Unix seconds, sizes in bytes."""

    name: str
    state: State
    published: Published | None = None
    since: int | None = None
    error: str = ""


def status(
    wishes: Collection[Wish] | None,
    published: Mapping[str, Published | Unreadable],
    failures: Mapping[str, Failure],
    vanished: Mapping[str, int],
    expansions: Mapping[str, tuple[str, ...]],
) -> tuple[Status, ...]:
    """Every name that is published, wished, or failing. Without a wishlist (None) nothing counts as unwished; with one,
    what fails in others is left out.

    What a wildcard comes to is what its last run saw; a wildcard that no run has seen yet is one pending line.
    """
    wished: dict[str, None] = {}
    pending: list[str] = []
    for wish in wishes or ():
        names = _names(wish, expansions)
        wished |= dict.fromkeys(names)
        published_of_wish = any(_covers(wish, p) for p in published.values() if isinstance(p, Published))
        # That its tags could not be listed, or none matched, is noted by repository: one line says it, not two.
        if not names and not published_of_wish and str(wish.repository) not in failures:
            pending.append(wish.text)
    covered = {
        path
        for path, p in published.items()
        if isinstance(p, Published) and (wishes is None or any(_covers(w, p) for w in wishes))
    }
    if wishes is not None:
        ours = {*published, *wished, *(str(wish.repository) for wish in wishes)}
        failures = {name: failure for name, failure in failures.items() if name in ours}
    rows = []
    for name in sorted({*published, *wished, *pending, *failures}):
        stands = published.get(name)
        failure = failures.get(name)
        record = stands if isinstance(stands, Published) else None
        if isinstance(stands, Unreadable):
            rows.append(Status(name=name, state=State.UNREADABLE, error=stands.problem))
        elif failure is not None:
            rows.append(
                Status(name=name, state=State.FAILING, published=record, since=failure.since, error=failure.error)
            )
        elif name in vanished and record is not None:
            rows.append(Status(name=name, state=State.VANISHED, published=record, since=vanished[name]))
        elif record is None:
            rows.append(Status(name=name, state=State.PENDING))
        elif name in wished or name in covered:
            rows.append(Status(name=name, state=State.PUBLISHED, published=record))
        else:
            rows.append(Status(name=name, state=State.UNWISHED, published=record))
    return tuple(rows)


def _names(wish: Wish, expansions: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    if wish.digest is not None:
        tag = wish.tags[0].glob if wish.tags else None
        return wish.public_paths(Reference(repository=wish.repository, tag=tag, digest=wish.digest))
    tags = expansions.get(wish.text, ()) if wish.needs_listing else wish.select(())
    references = (Reference(repository=wish.repository, tag=tag) for tag in tags)
    return tuple(path for reference in references for path in wish.public_paths(reference))


def _covers(wish: Wish, published: Published) -> bool:
    # One platform of several may be published that this wish does not ask for.
    reference = published.reference
    return wish.may_ask_for(reference) and published.public_path in wish.public_paths(reference)

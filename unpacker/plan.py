"""Pinned × published → Plan: what to do about each public name, and why. Pure; the safety gate is here.

Unknown is not empty: a name is removed only if this wishlist published it, the wishlist was read without fault, and
the tag list that no longer asks for it was read to its end.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from unpacker.digest import Digest
from unpacker.errors import UnpackerError, WishlistError
from unpacker.image import Pinned, Unresolved
from unpacker.oci import Descriptor
from unpacker.record import Published, Unreadable
from unpacker.reference import Reference
from unpacker.wish import Wish

DAY = 86_400


class Verb(enum.StrEnum):
    """What is done about one public name."""

    PUBLISH = "publish"
    UPDATE = "update"
    REMOVE = "remove"
    KEEP = "keep"


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """One step of a plan. `before` is what stands published, `after` what is wished; the reason is for people."""

    verb: Verb
    public_path: str
    reason: str
    before: Published | Unreadable | None = None
    after: Pinned | None = None
    owners: tuple[str, ...] = ()
    """The wishlists that the record names afterwards."""
    vanished: bool = False
    """Wished and published, but the registry no longer has it."""

    @property
    def changes(self) -> bool:
        return self.verb is not Verb.KEEP


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolution:
    """What the registries said about the wishes of one wishlist.

    `listed` has the tags of each repository (by its printed name) whose list was read to its end. `missing` are
    references that are wished literally and that the registry says it does not have. `warnings` are for people.
    """

    pinned: tuple[Pinned, ...] = ()
    unresolved: tuple[Unresolved, ...] = ()
    missing: tuple[Unresolved, ...] = ()
    listed: Mapping[str, frozenset[str]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What a decision depends on besides the wishes: who asks, under which rules, what is allowed.

    `owner` is the wishlist's identity (None: none, a single image); `sound` says that it was read without fault.
    `rebuild` is the rules hash that every root shall have, or None to leave roots of other rules alone. `removals` is
    False where nothing may be removed (`--only`). `keep_vanished` is in days, None for ever; `vanished_since` Unix
    seconds by public path.
    """

    owner: str | None
    sound: bool = True
    rebuild: str | None = None
    removals: bool = True
    allow_removals: bool = False
    keep_vanished: float | None = None
    vanished_since: Mapping[str, int] = field(default_factory=dict)
    damaged: frozenset[str] = frozenset()
    now: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything a run would do. `held` are removals that a person must allow; `refusal` says why."""

    actions: tuple[Action, ...] = ()
    unresolved: tuple[Unresolved, ...] = ()
    held: tuple[Action, ...] = ()
    refusal: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def changes(self) -> tuple[Action, ...]:
        return tuple(a for a in self.actions if a.changes)


def plan(
    wishes: Sequence[Wish],
    resolution: Resolution,
    published: Mapping[str, Published | Unreadable],
    rules: Rules,
) -> Plan:
    """Compares what is wished with what stands published."""
    actions: list[Action] = []
    conflicts: list[Unresolved] = []
    for pinned in resolution.pinned:
        decided = _decide(pinned, published.get(pinned.reference.public_path), rules)
        if isinstance(decided, Unresolved):
            conflicts.append(decided)
        else:
            actions.append(decided)
    wished = {pinned.reference.public_path for pinned in resolution.pinned}
    failed = [u for u in resolution.missing if u.name not in published]
    spoken_for = wished | {c.reference.public_path for c in conflicts if c.reference}
    removals: list[Action] = []
    for path, before in sorted(published.items()):
        if path in spoken_for or isinstance(before, Unreadable):
            continue
        if rules.owner not in before.owners:
            continue
        action = _leftover(before, wishes, resolution, rules)
        (removals if action.verb is Verb.REMOVE else actions).append(action)
    removals, held, refusal = _gate(removals, wishes, published, rules)
    return Plan(
        actions=(*sorted(actions, key=lambda a: a.public_path), *removals),
        unresolved=(*resolution.unresolved, *failed, *conflicts),
        held=tuple(held),
        refusal=refusal,
        warnings=resolution.warnings,
    )


def _decide(pinned: Pinned, before: Published | Unreadable | None, rules: Rules) -> Action | Unresolved:
    path = pinned.reference.public_path
    owners = (rules.owner,) if rules.owner is not None else ()
    if isinstance(before, Published):
        # What no wishlist published belongs to none, whoever wishes it now: it is removed only by name.
        owners = tuple(dict.fromkeys((*before.owners, *owners))) if before.owners else ()

    def act(verb: Verb, reason: str) -> Action:
        return Action(verb=verb, public_path=path, reason=reason, before=before, after=pinned, owners=owners)

    if before is None:
        return act(Verb.PUBLISH, "not published yet")
    if isinstance(before, Unreadable):
        return act(Verb.UPDATE, f"its record cannot be relied on: {before.problem}")
    if not before.platform.serves(pinned.platform):
        others = [owner for owner in before.owners if owner != rules.owner]
        if others:
            return Unresolved(
                repository=pinned.reference.repository,
                reference=pinned.reference,
                error=WishlistError(
                    f"{path} is published for {before.platform} by the wishlist {others[0]}: "
                    f"two wishlists cannot wish one name for two platforms"
                ),
            )
        return act(Verb.UPDATE, f"wished for {pinned.platform}, published for {before.platform}")
    if before.digest != str(pinned.descriptor.digest):
        return act(Verb.UPDATE, f"the tag moved from {_short(before.digest)} to {pinned.descriptor.digest.short}")
    if path in rules.damaged:
        return act(Verb.UPDATE, "its root is damaged")
    if rules.rebuild is not None and before.rules != rules.rebuild:
        return act(Verb.UPDATE, "published under other rules")
    if owners != before.owners:
        return act(Verb.UPDATE, "published for another wishlist, wished here, too")
    return act(Verb.KEEP, "as wished")


def _leftover(before: Published, wishes: Sequence[Wish], resolution: Resolution, rules: Rules) -> Action:
    """What becomes of a name that this wishlist published and no pinned reference stands for now."""
    repository = str(before.reference.repository)

    def act(verb: Verb, reason: str, *, vanished: bool = False) -> Action:
        return Action(verb=verb, public_path=before.public_path, reason=reason, before=before, vanished=vanished)

    if any(_may_wish(u, before.reference) for u in resolution.unresolved):
        return act(Verb.KEEP, "kept: what the registry has now is not known")
    if any(u.name == str(before.reference) or _same_name(u, before) for u in resolution.missing) or _vanished(
        before.reference, wishes, resolution.listed.get(repository)
    ):
        since = rules.vanished_since.get(before.public_path, rules.now)
        days = (rules.now - since) / DAY
        if rules.keep_vanished is not None and days >= rules.keep_vanished and rules.removals and rules.sound:
            return act(Verb.REMOVE, f"gone from the registry for {days:.0f} days", vanished=True)
        return act(Verb.KEEP, "kept: gone from the registry", vanished=True)
    if not rules.sound:
        return act(Verb.KEEP, "kept: the wishlist has faults, so what it does not ask for is not known")
    if not rules.removals:
        return act(Verb.KEEP, "kept: this run looks at a part of the wishlist only")
    others = tuple(owner for owner in before.owners if owner != rules.owner)
    if others:
        return Action(
            verb=Verb.UPDATE,
            public_path=before.public_path,
            reason=f"no longer wished here, but by {others[0]}",
            before=before,
            after=_as_it_stands(before),
            owners=others,
        )
    return act(Verb.REMOVE, "no longer wished")


def _as_it_stands(before: Published) -> Pinned:
    """What a published name is pinned to, so that its record can be written anew and nothing else."""
    descriptor = Descriptor(media_type="", digest=Digest.parse(before.digest), size=0)
    return Pinned(reference=before.reference, descriptor=descriptor, platform=before.platform, gpu=before.gpu)


def _same_name(unresolved: Unresolved, before: Published) -> bool:
    return unresolved.reference is not None and unresolved.reference.public_path == before.public_path


def _may_wish(unresolved: Unresolved, reference: Reference) -> bool:
    if unresolved.reference is not None:
        return unresolved.reference.public_path == reference.public_path
    return str(unresolved.repository) == str(reference.repository)


def _vanished(reference: Reference, wishes: Iterable[Wish], listed: frozenset[str] | None) -> bool:
    """Whether the wishes would still choose this tag if the registry still had it."""
    tag = reference.tag
    if tag is None or listed is None or tag in listed:
        return False
    same = (w for w in wishes if str(w.repository) == str(reference.repository) and w.digest is None)
    return any(tag in wish.select((*listed, tag)) for wish in same)


def _gate(
    removals: list[Action],
    wishes: Sequence[Wish],
    published: Mapping[str, Published | Unreadable],
    rules: Rules,
) -> tuple[list[Action], list[Action], str]:
    """Holds back removals beyond what a program should decide alone: more than max(5, 10 %) of this wishlist's tags."""
    ours = sum(1 for p in published.values() if isinstance(p, Published) and rules.owner in p.owners)
    bound = max(5, ours // 10)
    if rules.allow_removals or not removals:
        return removals, [], ""
    if not wishes:
        return [], removals, f"the wishlist is empty and {len(removals)} names stand published for it"
    if len(removals) > bound:
        return [], removals, f"{len(removals)} of {ours} names would be removed, more than {bound}"
    return removals, [], ""


def _short(digest: str) -> str:
    return digest.partition(":")[2][:12]


class Done(enum.StrEnum):
    """What came of an action."""

    PUBLISHED = "published"
    UPDATED = "updated"
    REMOVED = "removed"
    KEPT = "kept"
    FAILED = "failed"
    HELD = "held"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of one action. `size` is the compressed bytes read for it, `seconds` from its start to its end."""

    action: Action
    done: Done
    seconds: float = 0
    size: int = 0
    published: Published | None = None
    error: UnpackerError | None = None

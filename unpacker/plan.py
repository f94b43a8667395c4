"""Pinned × published → Plan: what to do about each public name, and why. Pure; the safety gate is here.

Unknown is not empty: a name is removed only if this wishlist published it, the wishlist was read without fault, and
the tag list that no longer asks for it was read to its end.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from unpacker.digest import Digest
from unpacker.errors import PublishError, UnpackerError, WishlistError
from unpacker.image import Image, Pinned, Unresolved
from unpacker.multiarch import Place, is_platform_of
from unpacker.oci import Descriptor
from unpacker.record import Published, Unreadable
from unpacker.reference import Reference, Repository
from unpacker.wish import Wish

DAY = 86_400


class Verb(enum.StrEnum):
    """What is done about one public name."""

    PUBLISH = "publish"
    UPDATE = "update"
    ADOPT = "adopt"
    """What another tool published and is sound gets a record, and stays as it is."""
    REPAIR = "repair"
    """What another tool published and is damaged is composed anew."""
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
    inherited: Inheritance | None = None
    """What another tool left, where that is what the action is about."""

    @property
    def changes(self) -> bool:
        return self.verb is not Verb.KEEP


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolution:
    """What the registries said about the wishes of one wishlist.

    `listed` has the tags of each repository whose list was read to its end; over http and over https it is two, for
    another server may answer. `missing` are references that are wished literally and that the registry says it does
    not have. `warnings` are for people.
    """

    pinned: tuple[Pinned, ...] = ()
    unresolved: tuple[Unresolved, ...] = ()
    missing: tuple[Unresolved, ...] = ()
    listed: Mapping[Repository, frozenset[str]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Inheritance:
    """What becomes of a name that another tool published: adopt, repair, update, keep or remove, and why.

    `root` is the root to adopt, below the target's root; `image` is there where the registry was asked for it.
    """

    verb: Verb
    reason: str
    image: Image | None = None
    root: str | None = None


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
    inherited: Mapping[str, Inheritance] = field(default_factory=dict)
    """By public path; empty unless the run adopts."""
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
    removals: list[Action] = []
    for pinned in resolution.pinned:
        decided = _decide(pinned, published.get(pinned.public_path), rules)
        if isinstance(decided, Unresolved):
            conflicts.append(decided)
        else:
            actions.append(decided)
    wished = {pinned.public_path for pinned in resolution.pinned}
    for path, one in rules.inherited.items():
        if path not in wished:
            action = _inherit(path, one, published.get(path))
            if action.verb is not Verb.REMOVE:
                actions.append(action)
            elif rules.removals and rules.sound:
                removals.append(action)
    failed = list(resolution.missing)
    if failed:
        standing = {p.reference.public_path if isinstance(p, Published) else path for path, p in published.items()}
        failed = [u for u in failed if u.reference is None or u.reference.public_path not in standing]
    spoken_for = wished | {c.reference.public_path for c in conflicts if c.reference}
    for path in sorted(published):
        before = published[path]
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
    path = pinned.public_path
    owners = (rules.owner,) if rules.owner is not None else ()
    if isinstance(before, Published):
        # What no wishlist published belongs to none, whoever wishes it now: it is removed only by name.
        owners = tuple(dict.fromkeys((*before.owners, *owners))) if before.owners else ()
    elif before is not None and pinned.place is Place.FRONT and any(is_platform_of(p, path) for p in rules.inherited):
        # Nor does the name before several platforms, where these are taken over.
        owners = ()

    def act(verb: Verb, reason: str) -> Action:
        return Action(verb=verb, public_path=path, reason=reason, before=before, after=pinned, owners=owners)

    if (inherited := rules.inherited.get(path)) is not None:
        # It belongs to nobody, whoever wishes it now: it was there before, and is removed only by name.
        return _inherit(path, inherited, before)
    if before is None:
        return act(Verb.PUBLISH, "not published yet")
    if isinstance(before, Unreadable) and before.is_foreign:
        return Unresolved(
            repository=pinned.reference.repository,
            reference=pinned.reference,
            error=PublishError(before.problem),
        )
    if isinstance(before, Unreadable):
        return act(Verb.UPDATE, f"its record cannot be relied on: {before.problem}")
    others = [owner for owner in before.owners if owner != rules.owner]
    if before.place is not pinned.place or not before.platform.serves(pinned.platform):
        stands, wanted = _purpose(before), _purpose(pinned)
        if others:
            return Unresolved(
                repository=pinned.reference.repository,
                reference=pinned.reference,
                error=WishlistError(
                    f"{path} is published for {stands} by the wishlist {others[0]}, and wished here for {wanted}: "
                    f"two wishlists cannot wish one name for two platforms"
                ),
            )
        return act(Verb.UPDATE, f"wished for {wanted}, published for {stands}")
    if before.digest != str(pinned.descriptor.digest):
        return act(Verb.UPDATE, f"the tag moved from {_short(before.digest)} to {pinned.descriptor.digest.short}")
    if path in rules.damaged:
        return act(Verb.UPDATE, "its root is damaged or gone")
    if pinned.place is not Place.FRONT and rules.rebuild is not None and before.rules != rules.rebuild:
        return act(Verb.UPDATE, "published under other rules")
    if before.gpu != pinned.gpu and not others:
        return act(Verb.UPDATE, f"wished {'with' if pinned.gpu else 'without'} gpu")
    if owners != before.owners:
        return act(Verb.UPDATE, "published for another wishlist, wished here, too")
    return act(Verb.KEEP, "as wished")


def _inherit(path: str, inherited: Inheritance, before: Published | Unreadable | None) -> Action:
    after = None if inherited.image is None else inherited.image.pinned
    return Action(
        verb=inherited.verb,
        public_path=path,
        reason=inherited.reason,
        before=before,
        after=after,
        inherited=inherited,
    )


def _purpose(name: Published | Pinned) -> str:
    return f"several platforms, {name.platform} first" if name.place is Place.FRONT else str(name.platform)


def _leftover(before: Published, wishes: Sequence[Wish], resolution: Resolution, rules: Rules) -> Action:
    """What becomes of a name that this wishlist published and no pinned reference stands for now."""

    def act(verb: Verb, reason: str, *, vanished: bool = False) -> Action:
        return Action(verb=verb, public_path=before.public_path, reason=reason, before=before, vanished=vanished)

    if any(_may_wish(u, before.reference) for u in resolution.unresolved):
        return act(Verb.KEEP, "kept: what the registry has now is not known")
    if any(u.name == str(before.reference) or _same_name(u, before) for u in resolution.missing) or _vanished(
        before.reference, wishes, resolution.listed
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
    return Pinned(
        reference=before.reference,
        descriptor=descriptor,
        platform=before.platform,
        gpu=before.gpu,
        place=before.place,
    )


def _same_name(unresolved: Unresolved, before: Published) -> bool:
    return unresolved.reference is not None and unresolved.reference.public_path == before.reference.public_path


def _may_wish(unresolved: Unresolved, reference: Reference) -> bool:
    if unresolved.reference is not None:
        return unresolved.reference.public_path == reference.public_path
    return str(unresolved.repository) == str(reference.repository)


def _vanished(reference: Reference, wishes: Iterable[Wish], listed: Mapping[Repository, frozenset[str]]) -> bool:
    """Whether the wishes would still choose this tag if the registry still had it."""
    tag = reference.tag
    if tag is None:
        return False
    # By the printed name: a record does not say whether it was http or https.
    for wish in (w for w in wishes if str(w.repository) == str(reference.repository) and w.digest is None):
        tags = listed.get(wish.repository)
        if tags is not None and tag not in tags and tag in wish.select((*tags, tag)):
            return True
    return False


def _gate(
    removals: list[Action],
    wishes: Sequence[Wish],
    published: Mapping[str, Published | Unreadable],
    rules: Rules,
) -> tuple[list[Action], list[Action], str]:
    """Holds back removals beyond what a program should decide alone: more than max(5, 10 %) of this wishlist's tags,
    each counted once for all its platforms."""
    ours = len(
        {p.reference.public_path for p in published.values() if isinstance(p, Published) and rules.owner in p.owners}
    )
    gone = len({a.before.reference.public_path if isinstance(a.before, Published) else a.public_path for a in removals})
    bound = max(5, ours // 10)
    if rules.allow_removals or not removals:
        return removals, [], ""
    if not wishes:
        return [], removals, f"the wishlist is empty and {len(removals)} names stand published for it"
    if gone > bound:
        return [], removals, f"{gone} of {ours} names would be removed, more than {bound}"
    return removals, [], ""


def _short(digest: str) -> str:
    return digest.partition(":")[2][:12]


class Done(enum.StrEnum):
    """What came of an action."""

    PUBLISHED = "published"
    UPDATED = "updated"
    ADOPTED = "adopted"
    REPAIRED = "repaired"
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

    @classmethod
    def of(cls, action: Action, published: Published | None = None) -> Outcome:
        """That an action was done as planned."""
        return cls(action=action, done=_DONE[action.verb], published=published)


_DONE = {
    Verb.PUBLISH: Done.PUBLISHED,
    Verb.UPDATE: Done.UPDATED,
    Verb.ADOPT: Done.ADOPTED,
    Verb.REPAIR: Done.REPAIRED,
    Verb.REMOVE: Done.REMOVED,
    Verb.KEEP: Done.KEPT,
}

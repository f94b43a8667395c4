"""What is wished against what stands: everything that is known before anything is changed, and the plan from it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from unpacker import journal, multiarch, pools
from unpacker.contracts import Publisher, Registry, View
from unpacker.errors import PublishError
from unpacker.limits import Limits
from unpacker.multiarch import MULTIARCH, Place
from unpacker.oci import Descriptor
from unpacker.plan import Plan, Resolution, Rules, plan
from unpacker.predecessors import Estate, Source, inherit
from unpacker.record import Published, Unreadable
from unpacker.resolve import resolve
from unpacker.rootfs import Policy
from unpacker.wish import Wish


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
    predecessors: View | None = None
    """The target as other tools left it, where their images are to be taken over."""
    lock_wait: float = 0
    transaction_entries: int = 200_000
    transaction_bytes: int = 20_000_000_000
    """How much the images that share a transaction may be together, besides the number of them."""
    clock: Callable[[], float] = time.time
    attach: Callable[[Published, Descriptor], object] | None = None
    """What to do after a name was published, besides: attach a receipt to what its tag points at. Its failure never
    fails a publish."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """Everything known before anything is changed."""

    plan: Plan
    resolution: Resolution
    published: Mapping[str, Published | Unreadable]
    damaged: frozenset[str] = frozenset()
    history: journal.Journal = field(default_factory=journal.Journal)


def survey(request: Request, asking: Executor | None = None) -> Survey:
    """Asks the target and the registries, and plans; changes nothing. What `plan` shows and `reconcile` does."""
    if asking is None:
        with pools.asking() as own:
            return survey(request, own)
    published = request.publisher.published()
    wishes = [w for w in request.wishes if _in_scope(str(w.repository), request.only)]
    resolution = resolve(wishes, request.registry, asking, request.limits, lambda path: _matches(path, request.only))
    estate = _estate(request, resolution, published, asking)
    resolution = _without(resolution, estate)
    resolution = replace(resolution, warnings=(*resolution.warnings, *_led_elsewhere(request.publisher, resolution)))
    damaged = request.damaged | request.publisher.lost(published)
    history = journal.load(request.state, request.owner or "")
    rules = Rules(
        owner=request.owner,
        sound=request.sound,
        rebuild=request.policy.rules if request.rebuild else None,
        removals=request.removals and request.only is None,
        allow_removals=request.allow_removals,
        keep_vanished=request.keep_vanished,
        vanished_since=history.vanished,
        damaged=damaged,
        inherited=estate.names,
        now=int(request.clock()),
    )
    decided = plan(wishes, resolution, published, rules)
    return Survey(plan=decided, resolution=resolution, published=published, damaged=damaged, history=history)


def _estate(
    request: Request, resolution: Resolution, published: Mapping[str, Published | Unreadable], asking: Executor
) -> Estate:
    if request.predecessors is None:
        return Estate()
    source = Source(
        view=request.predecessors,
        registry=request.registry,
        limits=request.limits,
        may_become_public=request.may_become_public,
    )
    return inherit(source, resolution, published, asking, lambda path: _matches(path, request.only))


def _without(resolution: Resolution, estate: Estate) -> Resolution:
    """The names of which it is not known what becomes of what another tool left are as good as not resolved."""
    unknown = {u.reference.public_path for u in estate.unresolved if u.reference}
    return replace(
        resolution,
        pinned=tuple(p for p in resolution.pinned if p.reference.public_path not in unknown),
        unresolved=(*resolution.unresolved, *estate.unresolved),
        warnings=(*resolution.warnings, *estate.hints),
    )


def _led_elsewhere(publisher: Publisher, resolution: Resolution) -> Iterator[str]:
    """Warnings for each alias of a platform that somebody else made, and that does not lead to where this one's images
    are: machines that ask by it find what the other published, now and ever."""
    directories = {multiarch.directory(p.platform) for p in resolution.pinned if p.place is Place.PLATFORM}
    if not directories:
        return
    view = publisher.view()
    for alias, directory in multiarch.aliases(directories).items():
        path = f"{MULTIARCH}/{alias}"
        try:
            target = view.link(path)
            further = None if target is None else view.link(f"{MULTIARCH}/{target}")
            if directory in (target, further) or view.kind(path) is None:
                continue
        except PublishError:
            continue  # Whoever reads that directory will tell; no run is to fail for a warning.
        what = "is no link" if target is None else f"leads to {target}"
        yield (
            f"{path} {what}, so machines that ask for {alias} do not get what is published in {MULTIARCH}/{directory}: "
            f"make it a link to {directory} once all that is wanted of it is there"
        )


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

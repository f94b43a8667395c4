"""What a merge request would publish: the difference of two wishlists, looked up in registries, without a target."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Executor
from typing import NamedTuple

from unpacker.contracts import Registry
from unpacker.image import Pinned
from unpacker.limits import Limits
from unpacker.multiarch import Place, is_platform_of
from unpacker.report import Proposal
from unpacker.resolve import complete, manifest_of, names_of, resolve, unforeseen, unreachable
from unpacker.wish import Wish


class Proposed(NamedTuple):
    """What a change of a wishlist comes to, by name, and whether no registry at all could be asked."""

    proposals: tuple[Proposal, ...]
    is_out_of_reach: bool


def propose(
    new: Sequence[Wish],
    old: Sequence[Wish],
    registry: Registry,
    executor: Executor,
    limits: Limits,
    may_become_public: Collection[str] = (),
) -> Proposed:
    """Every name that `new` adds to, changes in or drops from `old`; those in both are not asked for.

    A name that cannot be looked up, or whose image would be refused, carries its error.
    """
    before = {wish.meaning for wish in old}
    after = {wish.meaning for wish in new}
    added = [wish for wish in new if wish.meaning not in before]
    dropped = [wish for wish in old if wish.meaning not in after]
    resolution = resolve(added, registry, executor, limits)
    old_names, old_errors = names_of(dropped, registry, executor, resolution.listed)
    still, uncertain = names_of([w for w in new if w.meaning in before and w.needs_listing], registry, executor, {})
    kept = {path for wish in new if wish.meaning in before for path in _literal_paths(wish)} | set(still)
    proposals: list[Proposal] = []
    wished = {pinned.public_path for pinned in resolution.pinned}
    images = (p for p in resolution.pinned if p.place is not Place.FRONT)
    fresh = [p for p in images if _is_news(p, old_names, kept)]
    proposals += executor.map(lambda p: _look_up(p, old_names, registry, limits, may_become_public), fresh)
    proposals += [
        Proposal(name=u.name, change="add", error=str(u.error)) for u in (*resolution.unresolved, *resolution.missing)
    ]
    unsure = (*resolution.unresolved, *resolution.missing)
    unknown = {u.reference.public_path for u in unsure if u.reference is not None}
    unlisted = {str(u.repository) for u in unsure if u.reference is None} | uncertain.keys()
    proposals += [
        Proposal(name=path, change="drop")
        for path in old_names
        if path not in wished
        and path not in kept
        and not any(path == name or is_platform_of(path, name) for name in unknown)
        and str(old_names[path].repository) not in unlisted
    ]
    proposals += [Proposal(name=name, change="drop", error=str(error)) for name, error in old_errors.items()]
    return Proposed(tuple(sorted(proposals, key=lambda p: p.name)), unreachable(resolution))


def _literal_paths(wish: Wish) -> list[str]:
    return [path for reference in wish.literal_references for path in wish.public_paths(reference)]


def _is_news(pinned: Pinned, old_names: Mapping[str, Wish], kept: set[str]) -> bool:
    path = pinned.public_path
    if path in kept:
        return False
    wish = old_names.get(path)
    if wish is None or wish.digest != pinned.reference.digest:
        return True
    # The name of one platform of several says which one; a plain name does not.
    return pinned.place is Place.PLAIN and (bool(wish.platforms) or wish.platform != pinned.platform)


def _look_up(
    pinned: Pinned,
    old_names: Mapping[str, Wish],
    registry: Registry,
    limits: Limits,
    may_become_public: Collection[str],
) -> Proposal:
    path = pinned.public_path
    change = "change" if path in old_names else "add"
    try:
        manifest, digest, platforms = manifest_of(pinned, registry, limits)
        image = complete(pinned, manifest, digest, registry, limits, may_become_public)
    except Exception as error:  # noqa: BLE001 - one image's failure, whatever it is, is its own
        return Proposal(name=path, change=change, digest=str(pinned.descriptor.digest), error=str(unforeseen(error)))
    return Proposal(
        name=path,
        change=change,
        digest=str(pinned.descriptor.digest),
        platform=str(pinned.platform),
        platforms=tuple(str(p) for p in platforms) or (str(image.config.platform),),
        layers=len(manifest.layers),
        compressed=manifest.compressed_size,
    )

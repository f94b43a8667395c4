"""Wishes → pinned references, and pinned references → Images, by asking registries.

Wide: one task per repository, then one per reference, on the executor given. A run in which nothing changed costs one
tag listing (all its pages) per wildcard's repository and one HEAD per reference.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

from unpacker import logs
from unpacker.contracts import Registry
from unpacker.digest import Digest, Stream
from unpacker.errors import Denied, ImageError, NotFound, RegistryError, UnpackerError, WishlistError
from unpacker.image import Image, Layer, Pinned, Unresolved
from unpacker.limits import Limits
from unpacker.multiarch import Place
from unpacker.oci import Descriptor, ImageConfig, Index, Manifest, Platform, parse_manifest
from unpacker.plan import Resolution
from unpacker.reference import Reference, Repository, is_tag
from unpacker.wish import Wish

log = logs.Log()

_INDEX_DEPTH = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    """A reference and what its wish says about it, before any registry was asked for the reference itself."""

    reference: Reference
    places: tuple[tuple[Place, Platform], ...]
    gpu: bool
    line: int

    def pinned(self, descriptor: Descriptor) -> list[Pinned]:
        return [
            Pinned(reference=self.reference, descriptor=descriptor, platform=platform, gpu=self.gpu, place=place)
            for place, platform in self.places
        ]


def resolve(
    wishes: Sequence[Wish],
    registry: Registry,
    executor: Executor,
    limits: Limits,
    in_scope: Callable[[str], bool] = lambda public_path: True,
) -> Resolution:
    """Asks the registries what the wishes come to now. Whatever fails is an Unresolved of its own; the rest goes on.

    References whose public path is not `in_scope` are left out before they are asked for.
    """
    repositories = sorted({wish.repository for wish in wishes if wish.needs_listing})
    answers = dict(zip(repositories, executor.map(lambda r: _list(registry, r), repositories), strict=True))
    listed = {r: frozenset(a) for r, a in answers.items() if not isinstance(a, UnpackerError)}
    wanted, unresolved, warnings = expand(wishes, answers, limits)
    wanted = [w for w in wanted if in_scope(w.reference.public_path)]
    heads = executor.map(lambda w: _head(registry, w), wanted)
    pinned: list[Pinned] = []
    missing: list[Unresolved] = []
    for one, found in zip(wanted, heads, strict=True):
        if isinstance(found, Descriptor):
            pinned.extend(one.pinned(found))
        elif isinstance(found.error, NotFound):
            missing.append(found)
        else:
            unresolved.append(found)
    return Resolution(
        pinned=tuple(pinned),
        unresolved=tuple(unresolved),
        missing=tuple(missing),
        listed=listed,
        warnings=tuple(warnings),
    )


def expand(
    wishes: Iterable[Wish], answers: dict[Repository, list[str] | UnpackerError], limits: Limits
) -> tuple[list[_Wanted], list[Unresolved], list[str]]:
    """The references that the wishes ask for, given each repository's tags (or why they are not known). Pure."""
    chosen: dict[str, _Wanted] = {}
    unresolved: list[Unresolved] = []
    warnings: list[str] = []
    for repository, answer in answers.items():
        odd = [] if isinstance(answer, UnpackerError) else [t for t in answer if not is_tag(t)]
        if odd:
            warnings.append(f"{repository} lists {len(odd)} tags that are no tags, never used: {odd[0][:64]!r} …")
    for wish in wishes:
        listing: list[str] | UnpackerError = answers.get(wish.repository, []) if wish.needs_listing else []
        if isinstance(listing, UnpackerError):
            unresolved.append(Unresolved(repository=wish.repository, reference=None, error=listing))
            continue
        for reference in _references(wish, listing, limits, unresolved):
            wanted = _Wanted(reference=reference, places=wish.places, gpu=wish.gpu, line=wish.line)
            first = chosen.setdefault(reference.public_path, wanted)
            if _meaning(first) != _meaning(wanted):
                error = WishlistError(
                    f"wished on line {first.line} and, differently, on line {wish.line}: one name can be one image only"
                )
                unresolved.append(Unresolved(repository=wish.repository, reference=reference, error=error))
    clashing = {u.reference.public_path for u in unresolved if u.reference is not None}
    return [w for path, w in chosen.items() if path not in clashing], unresolved, warnings


def _meaning(wanted: _Wanted) -> object:
    # The last place has the platform that matters most; the order of those before it does not.
    *names, (place, last) = wanted.places
    same = (*sorted((kind, str(p.normal)) for kind, p in names), (place, str(last.normal)))
    return (wanted.reference, same, wanted.gpu)


def _references(
    wish: Wish, listing: Iterable[str], limits: Limits, unresolved: list[Unresolved]
) -> Iterable[Reference]:
    if wish.digest is not None:
        tag = wish.tags[0].glob if wish.tags else None
        return [Reference(repository=wish.repository, tag=tag, digest=wish.digest)]
    tags = wish.select(listing)
    # Each platform of a tag is an image as large as any other.
    if len(tags) * max(1, len(wish.platforms)) > limits.tags_per_wish:
        error = WishlistError(
            f"{wish.text} matches {len(tags)} tags{_each(wish)}, more than the {limits.tags_per_wish} that "
            f"the operator allows (limits.tags_per_wish): narrow the pattern or add `newest: N`"
        )
        unresolved.append(Unresolved(repository=wish.repository, reference=None, error=error))
        return []
    if not tags and wish.needs_listing:
        error = WishlistError(f"{wish.text} matches none of the tags that {wish.repository} has")
        unresolved.append(Unresolved(repository=wish.repository, reference=None, error=error))
    return [Reference(repository=wish.repository, tag=tag) for tag in tags]


def _each(wish: Wish) -> str:
    return f" for {len(wish.platforms)} platforms" if wish.platforms else ""


def unforeseen(error: Exception) -> UnpackerError:
    """An error as the report tells it; one that nobody foresaw is logged with its traceback."""
    if isinstance(error, UnpackerError):
        return error
    log.error("unforeseen", exc_info=error)
    return UnpackerError(f"unforeseen {type(error).__name__}: {error} (this is a fault of unpacker: please report it)")


def _list(registry: Registry, repository: Repository) -> list[str] | UnpackerError:
    try:
        return registry.tags(repository)
    except Exception as error:  # noqa: BLE001 - one repository's failure, whatever it is, is its own
        return unforeseen(error)


def _head(registry: Registry, wanted: _Wanted) -> Descriptor | Unresolved:
    try:
        return registry.head(wanted.reference)
    except Exception as error:  # noqa: BLE001 - one reference's failure, whatever it is, is its own
        return Unresolved(repository=wanted.reference.repository, reference=wanted.reference, error=unforeseen(error))


def fetch(pinned: Pinned, registry: Registry, limits: Limits, may_become_public: Collection[str]) -> Image:
    """All of an image but its layers' bytes, verified and within the limits.

    An image that an anonymous request cannot read is Denied unless `may_become_public` has its `registry/repository`:
    what is published is public.
    """
    manifest, digest, _ = manifest_of(pinned, registry, limits)
    return complete(pinned, manifest, digest, registry, limits, may_become_public)


def complete(
    pinned: Pinned,
    manifest: Manifest,
    digest: Digest,
    registry: Registry,
    limits: Limits,
    may_become_public: Collection[str],
) -> Image:
    """The rest of an image whose manifest is at hand; raises for what makes `fetch` raise."""
    repository = pinned.reference.repository
    if str(repository) not in may_become_public and not registry.is_public(repository, digest):
        raise Denied(
            f"{pinned.reference} is private, and what is published becomes public: if that is meant, the operator "
            f"lists {repository} under may_become_public in the settings",
            status=403,
        )
    config = config_of(manifest, repository, registry, limits)
    if config.platform.architecture and not _is_for(config.platform, pinned.platform):
        raise ImageError(f"{pinned.reference} is for {config.platform}, wished for {pinned.platform}")
    if len(manifest.layers) != len(config.diff_ids):
        raise ImageError(
            f"{pinned.reference}: {len(manifest.layers)} layers, but the config names {len(config.diff_ids)} diff IDs"
        )
    if manifest.compressed_size > limits.image_compressed:
        raise ImageError(
            f"{pinned.reference}: {manifest.compressed_size / 1e9:.1f} GB compressed, more than the "
            f"{limits.image_compressed / 1e9:.0f} GB that the operator allows (limits.image_compressed)"
        )
    return Image(
        pinned=pinned,
        manifest=manifest,
        manifest_digest=str(digest),
        config=config,
        layers=tuple(
            Layer(descriptor=descriptor, diff_id=str(diff_id))
            for descriptor, diff_id in zip(manifest.layers, config.diff_ids, strict=True)
        ),
    )


def manifest_of(pinned: Pinned, registry: Registry, limits: Limits) -> tuple[Manifest, Digest, tuple[Platform, ...]]:
    """The manifest for the wished platform, its digest, and the platforms there are (none named by a plain image)."""
    digest = pinned.descriptor.digest
    platforms: tuple[Platform, ...] = ()
    for _ in range(_INDEX_DEPTH):
        raw, media_type = registry.manifest(pinned.reference.repository, digest)
        document = parse_manifest(raw, media_type)
        if isinstance(document, Manifest):
            return document, digest, platforms
        platforms = platforms or _platforms(document)
        digest = document.choose(pinned.platform).digest
    raise ImageError(f"{pinned.reference}: an index in an index in an index")


def _platforms(index: Index) -> tuple[Platform, ...]:
    known = {d.platform for d in index.manifests if d.platform and not d.is_attestation and d.platform.os != "unknown"}
    return tuple(sorted(known, key=str))


def config_of(manifest: Manifest, repository: Repository, registry: Registry, limits: Limits) -> ImageConfig:
    """An image's config, its bytes verified."""
    if manifest.config.size > limits.config:
        raise ImageError(
            f"{repository}: config of {manifest.config.size} bytes, more than {limits.config} (limits.config)"
        )
    with registry.blob(repository, manifest.config) as stream:
        return ImageConfig.parse(_read_all(stream, manifest.config))


def _read_all(stream: Stream, descriptor: Descriptor) -> bytes:
    parts = []
    while piece := stream.read(descriptor.size or 1):
        parts.append(piece)
    return b"".join(parts)


def _is_for(config: Platform, wanted: Platform) -> bool:
    # Old builders leave the variant out of the config, so it is compared only where both name one.
    if (config.os or "linux", config.architecture) != (wanted.os, wanted.architecture):
        return False
    return not (config.variant and wanted.variant) or config.serves(wanted)


def unreachable(resolution: Resolution) -> bool:
    """Whether no registry answered at all, though at least one was asked."""
    if resolution.pinned or resolution.missing or resolution.listed:
        return False
    errors = [u.error for u in resolution.unresolved if isinstance(u.error, RegistryError)]
    return bool(errors) and all(e.status is None for e in errors)


def names_of(
    wishes: Sequence[Wish], registry: Registry, executor: Executor, listed: Mapping[Repository, frozenset[str]]
) -> tuple[dict[str, Wish], dict[str, UnpackerError]]:
    """The public names that wishes come to, by their wish, without asking for the images; and the lists that failed.

    Tag lists at hand in `listed` are not asked for again.
    """
    needed = sorted({w.repository for w in wishes if w.needs_listing and w.repository not in listed})
    answers = dict(zip(needed, executor.map(lambda r: _list(registry, r), needed), strict=True))
    errors = {str(r): a for r, a in answers.items() if isinstance(a, UnpackerError)}
    names: dict[str, Wish] = {}
    for wish in wishes:
        answer = answers.get(wish.repository, listed.get(wish.repository, frozenset()))
        if wish.digest is not None or not wish.needs_listing:
            references = wish.literal_references
        elif isinstance(answer, UnpackerError):
            continue
        else:
            references = tuple(Reference(repository=wish.repository, tag=tag) for tag in wish.select(answer))
        names |= {path: wish for reference in references for path in wish.public_paths(reference)}
    return names, errors

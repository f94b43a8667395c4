"""Reads what DUCC (of CernVM-FS 2.12 and 2.14) and OSG's cvmfs-singularity-sync published, to be taken over.

Nothing is changed here, and no file of an image is read: names, links, DUCC's notes on layers, and whether the files
are there that each tool writes last. What cannot be read is an error, never a sign that it is not there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from typing import Any

from unpacker import multiarch
from unpacker.changeset import Kind
from unpacker.contracts import Registry, View
from unpacker.errors import NotFound, PublishError, UnpackerError, WishlistError
from unpacker.image import Image, Pinned, Unresolved
from unpacker.inherited import Inherited, Maker, Root, is_variant, judge, lost, root_of, unknown
from unpacker.limits import Limits
from unpacker.multiarch import Place
from unpacker.oci import LINUX_AMD64
from unpacker.plan import Inheritance, Resolution, Verb
from unpacker.record import Published, Unreadable
from unpacker.reference import Reference
from unpacker.resolve import fetch, unforeseen

NOTES_LIMIT = 4 << 20
"""The most that is read of one of DUCC's notes."""

_FINISHED = {
    # What each of them adds to a root last. DUCC was seen to lose it later.
    Maker.DUCC: (".singularity.d/runscript", ".singularity.d/env/10-docker2singularity.sh"),
    Maker.OSG: (".singularity.d/runscript", "srv", "cvmfs"),
}
_LEFTOVERS = {
    ".chains": "no consumer reads it, and its catalogs are many",
    ".dirty-chains": "marks of unfinished chains, which nobody reads",
    ".metadata/remove-schedule.json": "nothing ever read it",
    "podmanStore": "this tool does not keep it up to date",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Estate:
    """All that there is to take over: what becomes of each name, the names of which that is not known, and hints."""

    names: Mapping[str, Inheritance] = field(default_factory=dict)
    unresolved: tuple[Unresolved, ...] = ()
    hints: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where to ask: the tree of the target, and the registries under the operator's limits."""

    view: View
    registry: Registry
    limits: Limits
    may_become_public: Collection[str]


def inherit(
    source: Source,
    resolution: Resolution,
    published: Mapping[str, Published | Unreadable],
    asking: Executor,
    in_scope: Callable[[str], bool] = lambda public_path: True,
) -> Estate:
    """Judges every name of another tool: those that the wishes come to, and those `in_scope` that nobody wishes.

    That costs the manifest and the config of each, and no layer. PublishError if the target cannot be read.
    """
    wished = {p.public_path: p for p in resolution.pinned if _may_be_inherited(p, published.get(p.public_path))}
    spoken_for = {p.public_path for p in resolution.pinned}
    spoken_for |= {u.reference.public_path for u in (*resolution.unresolved, *resolution.missing) if u.reference}
    orphans = {
        path: reference
        for path, standing in published.items()
        if isinstance(standing, Unreadable) and path not in spoken_for and in_scope(path)
        if (reference := reference_of(path)) is not None
    }
    asked: dict[str, Pinned | Reference] = {**wished, **orphans}
    answers = asking.map(lambda path: _inherit_one(source, path, asked[path]), asked)
    names: dict[str, Inheritance] = {}
    unresolved: list[Unresolved] = []
    for path, found in zip(asked, answers, strict=True):
        if isinstance(found, Unresolved):
            unresolved.append(found)
        elif found is not None:
            names[path] = found
    return Estate(names=names, unresolved=tuple(unresolved), hints=tuple(_hints(source.view)))


def _may_be_inherited(pinned: Pinned, standing: Published | Unreadable | None) -> bool:
    # A front is a link and nothing else: it is made anew, before names that are judged each for itself.
    return not isinstance(standing, Published) and pinned.place is not Place.FRONT


def reference_of(public_path: str) -> Reference | None:
    """The image that a public name of DUCC's stands for; None if no image can have this name."""
    directory, _, last = public_path.rpartition("/")
    name, _, spec = last.partition(":")
    separator = "@" if spec.startswith("sha256:") else ":"
    try:
        return Reference.parse(f"{directory}/{name}{separator}{spec}")
    except ValueError:
        return None


def _inherit_one(source: Source, path: str, asked: Pinned | Reference) -> Inheritance | Unresolved | None:
    reference = asked if isinstance(asked, Reference) else asked.reference
    try:
        if isinstance(asked, Reference):
            return _orphan(source, path, asked)
        link = source.view.link(path)
        if link is not None and is_variant(link, path):
            raise WishlistError(
                f"DUCC published {path} for several platforms: wish it with `platforms:` to take it over as that"
            )
        found = _find(source.view, path, asked.reference if asked.place is Place.PLAIN else None)
        return None if found is None else _judged(source, found, path, asked)
    except PublishError:
        raise
    except Exception as error:  # noqa: BLE001 - one image's failure, whatever it is, is its own
        return Unresolved(repository=reference.repository, reference=reference, error=unforeseen(error))


def _orphan(source: Source, path: str, reference: Reference) -> Inheritance | None:
    """What becomes of a name that nobody wishes: it stays, and is mended if it needs to be and can be."""
    link = source.view.link(path)
    if link is not None and is_variant(link, path):
        reason = "kept as DUCC left it: it stands for several platforms, and nobody wishes it"
        return Inheritance(verb=Verb.KEEP, reason=reason)
    found = _find(source.view, path, None)
    if found is None:
        return None
    try:
        descriptor = source.registry.head(reference)
        return _judged(source, found, path, Pinned(reference=reference, descriptor=descriptor, platform=LINUX_AMD64))
    except NotFound:
        return lost(found)
    except UnpackerError as error:
        return unknown(found, error)


def _judged(source: Source, found: Inherited, path: str, pinned: Pinned) -> Inheritance:
    image = fetch(pinned, source.registry, source.limits, source.may_become_public)
    return judge(replace(found, layers=_layers(source.view, found, path, image)), image)


def _find(view: View, path: str, reference: Reference | None) -> Inherited | None:
    """What another tool published under a public name, or for a reference under the name that OSG has for it."""
    places = [path]
    if reference is not None and reference.tag is not None:
        places.append(f"{reference.repository.name}:{reference.tag}")
    for place in places:
        link = view.link(place)
        root = None if link is None else root_of(link, place)
        if root is not None:
            return replace(_inspected(view, root), is_absolute=link is not None and link.startswith("/"))
    return None


def _inspected(view: View, root: Root) -> Inherited:
    if view.kind(root.path) is not Kind.DIRECTORY:
        return Inherited(root=root, is_dangling=True, faults=("its link leads to nothing",))
    lacking = [name for name in _FINISHED[root.maker] if view.kind(f"{root.path}/{name}") is None]
    return Inherited(root=root, faults=(f"it lacks {', '.join(lacking)}",) if lacking else ())


def _layers(view: View, found: Inherited, path: str, image: Image) -> Mapping[str, str | None] | None:
    """DUCC's notes on the layers of an image; None where it published no layers, or those of another image."""
    if found.root.maker is not Maker.DUCC or found.is_dangling or not _has_manifest(view, path, image):
        return None
    layers: dict[str, str | None] = {}
    for layer in image.layers:
        hexadecimal = layer.descriptor.digest.hex
        directory = f".layers/{hexadecimal[:2]}/{hexadecimal}"
        if view.kind(f"{directory}/layerfs") is Kind.DIRECTORY:
            layers[hexadecimal] = _noted_digest(view.read(f"{directory}/.metadata/layers.json", NOTES_LIMIT))
    return layers


def _has_manifest(view: View, path: str, image: Image) -> bool:
    """Whether DUCC noted this image's manifest under the name: it does when it thinks that all layers are published.

    2.14 notes what came from an index elsewhere; after an update both may be there, and the older one is stale.
    """
    places = [path]
    for name in {multiarch.directory(image.pinned.platform), image.pinned.platform.architecture}:
        places.append(f"{multiarch.MULTIARCH}/{name}/{path}")
    for place in places:
        document = _json(view.read(f".metadata/{place}/manifest.json", NOTES_LIMIT))
        config = _key(document, "config") if isinstance(document, dict) else None
        if isinstance(config, dict) and _key(config, "digest") == image.image_id:
            return True
    return False


def _noted_digest(data: bytes | None) -> str | None:
    document = _json(data)
    first = document[0] if isinstance(document, list) and document else document
    noted = first.get("diff-digest") if isinstance(first, dict) else None
    return noted if isinstance(noted, str) else None


def _json(data: bytes | None) -> Any:
    """What a note says; None if it is not there or no JSON, which an interrupted DUCC leaves."""
    try:
        return None if data is None else json.loads(data)
    except (ValueError, RecursionError):
        return None


def _key(document: Mapping[str, Any], name: str) -> Any:
    # 2.12 wrote the names of its own fields, 2.14 those of the specification.
    return next((value for key, value in document.items() if key.lower() == name), None)


def _hints(view: View) -> Iterator[str]:
    for name, reason in _LEFTOVERS.items():
        if view.kind(name) is not None:
            yield f"{name}, which DUCC left, may be removed by hand: {reason}"

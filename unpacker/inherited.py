"""What another tool published, and what becomes of it: Inherited → Verdict. Pure.

DUCC links a public name to `.flat/<xx>/<hex of the image ID>` and notes of each layer what it unpacked;
cvmfs-singularity-sync links `<namespace>/<repository>:<tag>`, without the registry, to `.images/<xx>/<rest>`, named by
the hash of the image's layers or by the digest of its index. Either may have left damage: what is sound is adopted as
it is, what is not is composed anew beside it.
"""

from __future__ import annotations

import enum
import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256

from unpacker.errors import UnpackerError
from unpacker.image import Image
from unpacker.multiarch import is_platform_of
from unpacker.plan import Inheritance, Verb

_FLAT = re.compile(r"\.flat/(?P<group>[0-9a-f]{2})/(?P<hex>(?P=group)[0-9a-f]{62})")
_IMAGES = re.compile(r"\.images/(?P<index>sha256:)?(?P<group>[0-9a-f]{2})/(?P<rest>[0-9a-f]{62})")
_MOUNTED = re.compile(r"/cvmfs/[^/]+/(.+)")


class Maker(enum.StrEnum):
    """Which tool published it."""

    DUCC = "DUCC"
    OSG = "cvmfs-singularity-sync"


@dataclass(frozen=True, slots=True, kw_only=True)
class Root:
    """A root of another tool: its path below the target's root, and the identity that its name claims.

    Of DUCC that is the image ID, of OSG the hash of the layers' digests, or the digest of an index if `of_index`.
    """

    path: str
    maker: Maker
    identity: str
    of_index: bool = False

    def is_of(self, image: Image) -> bool:
        """Whether its name says that it is the root of this image."""
        if self.maker is Maker.DUCC:
            return image.image_id == f"sha256:{self.identity}"
        if self.of_index:
            return str(image.pinned.descriptor.digest) == f"sha256:{self.identity}"
        digests = "".join(layer.descriptor.digest.hex for layer in image.layers)
        return sha256(digests.encode("ascii")).hexdigest() == self.identity


@dataclass(frozen=True, slots=True, kw_only=True)
class Inherited:
    """One name that another tool published, as far as the tree itself tells: its root, and what is wrong with that.

    `is_dangling` says that nothing is there, `is_absolute` that its link names a mounted repository, which may be
    another one than this. `layers` has what was noted of each layer's unpacked bytes (their digest), by the hex of the
    layer's own digest; None where the layer was begun and never finished. It is None itself where the tool kept no
    layers for this image.
    """

    root: Root
    is_dangling: bool = False
    is_absolute: bool = False
    faults: tuple[str, ...] = ()
    layers: Mapping[str, str | None] | None = None


def root_of(link: str, at: str) -> Root | None:
    """The root that a symlink at the path `at` below the target leads to; None if it is not one of these tools'."""
    mounted = _MOUNTED.fullmatch(link)
    if link.startswith("/") and mounted is None:
        return None
    path = posixpath.normpath(mounted[1] if mounted else posixpath.join(posixpath.dirname(at), link))
    if flat := _FLAT.fullmatch(path):
        return Root(path=path, maker=Maker.DUCC, identity=flat["hex"])
    if images := _IMAGES.fullmatch(path):
        identity = images["group"] + images["rest"]
        return Root(path=path, maker=Maker.OSG, identity=identity, of_index=images["index"] is not None)
    return None


def is_variant(link: str, at: str) -> bool:
    """Whether a client fills in a part of the link at this path: then it stands for images of several platforms. Seen
    through a client, as a mounted repository is, that is done already."""
    return "$(" in link or is_platform_of(posixpath.normpath(posixpath.join(posixpath.dirname(at), link)), at)


def judge(found: Inherited, image: Image) -> Inheritance:
    """What becomes of an inherited name, now that its image is known."""
    maker = found.root.maker
    if not found.root.is_of(image):
        reason = f"published by {maker} from another image; the tag now has {_short(image.image_id)}"
        return _inheritance(Verb.UPDATE, reason, found, image)
    faults = [*found.faults, *_layer_faults(found, image)]
    if faults:
        return _inheritance(Verb.REPAIR, f"published by {maker}, damaged: {'; '.join(faults)}", found, image)
    unproven = maker is Maker.DUCC and found.layers is None
    reason = f"published by {maker}, sound" + (" as far as can be told: it kept no layers" if unproven else "")
    return _inheritance(Verb.ADOPT, reason, found, image)


def lost(found: Inherited) -> Inheritance:
    """What becomes of an inherited name that nobody wishes and that its registry no longer has."""
    if found.is_dangling and not found.is_absolute:
        reason = f"its link, which {found.root.maker} made, leads to nothing, and the registry has it no more"
        return Inheritance(verb=Verb.REMOVE, reason=reason)
    reason = f"kept as {found.root.maker} left it: gone from the registry, so nothing can prove it"
    return Inheritance(verb=Verb.KEEP, reason=reason)


def unknown(found: Inherited, error: UnpackerError) -> Inheritance:
    """What becomes of an inherited name that nobody wishes and of which the registry does not tell."""
    return Inheritance(verb=Verb.KEEP, reason=f"kept as {found.root.maker} left it: {error}")


def _inheritance(verb: Verb, reason: str, found: Inherited, image: Image) -> Inheritance:
    root = found.root.path if verb is Verb.ADOPT else None
    return Inheritance(verb=verb, reason=reason, image=image, root=root)


def _layer_faults(found: Inherited, image: Image) -> list[str]:
    """What DUCC's own notes give away: it wrote down the digest of what it really unpacked, and never looked at it."""
    if found.layers is None or found.is_dangling:
        return []
    faults = []
    for layer in image.layers:
        digest = layer.descriptor.digest
        if digest.hex not in found.layers:
            faults.append(f"layer {digest.short} is missing")
        elif (noted := found.layers[digest.hex]) is None:
            faults.append(f"layer {digest.short} was never finished")
        elif noted.rpartition(":")[2] != layer.diff_id.rpartition(":")[2]:
            faults.append(f"layer {digest.short} was cut off or altered while it was unpacked")
    return faults


def _short(digest: str) -> str:
    return digest.partition(":")[2][:12]

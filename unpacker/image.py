"""What a wish comes to: Pinned (a tag nailed to a digest), Unresolved (why not), Image (all but the layers' bytes)."""

from __future__ import annotations

from dataclasses import dataclass

from unpacker.errors import UnpackerError
from unpacker.multiarch import Place, public_path
from unpacker.oci import Descriptor, ImageConfig, Manifest, Platform
from unpacker.reference import Reference, Repository


@dataclass(frozen=True, slots=True, kw_only=True)
class Pinned:
    """A reference and the descriptor its tag points at now: all that a decision needs.

    Of several platforms of one reference each is one, and so is the front before them, whose `platform` is the first.
    """

    reference: Reference
    descriptor: Descriptor
    platform: Platform
    gpu: bool = False
    place: Place = Place.PLAIN

    @property
    def public_path(self) -> str:
        return public_path(self.reference.public_path, self.place, self.platform)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unresolved:
    """A wish or reference that could not be pinned, and why. Unknown is not empty: nothing is removed for it.

    `reference` is None where even the tags are unknown: then every published tag of `repository` may be wished.
    """

    repository: Repository
    reference: Reference | None
    error: UnpackerError

    @property
    def name(self) -> str:
        return str(self.reference if self.reference is not None else self.repository)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One layer as its image names it: the blob and what it must be uncompressed."""

    descriptor: Descriptor
    diff_id: str

    @property
    def key(self) -> str:
        """Blob digest and diff ID, verified together: the identity of a read layer."""
        return f"{self.descriptor.digest.hex}-{self.diff_id.partition(':')[2]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """One image of one platform, its documents at hand and verified; no accessor does I/O."""

    pinned: Pinned
    manifest: Manifest
    manifest_digest: str
    config: ImageConfig
    layers: tuple[Layer, ...]

    @property
    def image_id(self) -> str:
        """`sha256:<hex>` of the config."""
        return str(self.manifest.config.digest)

"""Documents of the OCI image specification and their Docker ancestors: Descriptor, Manifest, Index, ImageConfig.

Sources: OCI image specification (`descriptor.md`, `manifest.md`, `image-index.md`, `config.md`); Docker image manifest
version 2, schema 2. Parsing checks what later steps rely on and ignores what they do not know.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from unpacker.digest import Digest
from unpacker.errors import ImageError

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"
DOCKER_SCHEMA1 = "application/vnd.docker.distribution.manifest.v1+json"
DOCKER_SCHEMA1_SIGNED = "application/vnd.docker.distribution.manifest.v1+prettyjws"

MANIFEST_TYPES = (OCI_MANIFEST, OCI_INDEX, DOCKER_MANIFEST, DOCKER_LIST)
"""What we ask a registry for, in this order."""

LAYER_COMPRESSION = {
    OCI_LAYER: "none",
    OCI_LAYER + "+gzip": "gzip",
    OCI_LAYER + "+zstd": "zstd",
    "application/vnd.oci.image.layer.nondistributable.v1.tar": "none",
    "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip": "gzip",
    "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd": "zstd",
    DOCKER_LAYER: "none",
    DOCKER_LAYER + ".gzip": "gzip",
    DOCKER_LAYER + ".zstd": "zstd",
    "application/vnd.docker.image.rootfs.foreign.diff.tar": "none",
    "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip": "gzip",
}
"""Media type of a layer → its declared compression. Anything else is not a layer of a container image."""

_SLOPPY_CONFIGS = frozenset({"", "application/octet-stream", "application/json", "text/html"})
"""What registries and builders of Docker's first years called a config in manifests of schema 2; Docker takes them."""

_PLATFORM_PART = re.compile(r"[a-z0-9]+(?:[._-][a-z0-9]+)*")
_ARCHITECTURE_ALIASES = {
    "x86_64": "amd64",
    "x86-64": "amd64",
    "aarch64": "arm64",
    "i386": "386",
    "armhf": "arm",
}


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Platform:
    """os/architecture[/variant], in Go's names. Printing gives the spelling of the specification."""

    os: str = "linux"
    architecture: str
    variant: str | None = None

    @classmethod
    def parse(cls, text: str) -> Platform:
        """Reads `linux/amd64`, `linux/arm64/v8`; ValueError says what would be right."""
        parts = text.split("/")
        if len(parts) not in (2, 3) or not all(_PLATFORM_PART.fullmatch(part) for part in parts):
            found = repr(text if len(text) <= 80 else text[:79] + "…")
            raise ValueError(f"not a platform: {found} (expected os/architecture[/variant], e.g. linux/amd64)")
        architecture = _ARCHITECTURE_ALIASES.get(parts[1], parts[1])
        return cls(os=parts[0], architecture=architecture, variant=parts[2] if len(parts) == 3 else None)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Platform:
        """As an index or a config has it; some have other names than Go's."""
        architecture = str(value.get("architecture") or "")
        return cls(
            os=str(value.get("os") or ""),
            architecture=_ARCHITECTURE_ALIASES.get(architecture, architecture),
            variant=str(value["variant"]) if value.get("variant") else None,
        )

    @property
    def normal(self) -> Platform:
        """With the variant that the architecture implies (as in containerd's platforms): amd64 v1, arm64 v8, arm v7."""
        implied = {"amd64": "v1", "arm64": "v8", "arm": "v7"}.get(self.architecture)
        return Platform(os=self.os, architecture=self.architecture, variant=self.variant or implied)

    def serves(self, wanted: Platform) -> bool:
        """Whether an image for this platform is what `wanted` asks for, implied variants considered."""
        return self.normal == wanted.normal

    def __str__(self) -> str:
        return "/".join(p for p in (self.os, self.architecture, self.variant) if p)


LINUX_AMD64 = Platform(os="linux", architecture="amd64")


@dataclass(frozen=True, slots=True, kw_only=True)
class Descriptor:
    """Media type, digest and size of bytes that are elsewhere."""

    media_type: str
    digest: Digest
    size: int
    platform: Platform | None = None
    is_attestation: bool = False

    @classmethod
    def from_json(cls, value: Any, what: str) -> Descriptor:
        """Reads one descriptor of a document; `what` names it in the ImageError."""
        if not isinstance(value, dict):
            raise ImageError(f"{what}: not a descriptor")
        size = value.get("size")
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise ImageError(f"{what}: size is {size!r}")
        try:
            digest = Digest.parse(str(value.get("digest")))
        except ValueError as error:
            raise ImageError(f"{what}: {error}") from None
        platform = value.get("platform")
        annotations = value.get("annotations")
        return cls(
            media_type=str(value.get("mediaType") or ""),
            digest=digest,
            size=size,
            platform=Platform.from_json(platform) if isinstance(platform, dict) else None,
            # BuildKit marks provenance and SBOM manifests so, and gives them the platform unknown/unknown.
            is_attestation=isinstance(annotations, dict) and "vnd.docker.reference.type" in annotations,
        )

    def to_json(self) -> dict[str, Any]:
        return {"mediaType": self.media_type, "digest": str(self.digest), "size": self.size}


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """One image for one platform: a config and layers, lowest first."""

    raw: bytes
    media_type: str
    config: Descriptor
    layers: tuple[Descriptor, ...]

    @property
    def compressed_size(self) -> int:
        return sum(layer.size for layer in self.layers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """Manifests by platform."""

    raw: bytes
    media_type: str
    manifests: tuple[Descriptor, ...]

    def choose(self, wanted: Platform) -> Descriptor:
        """The manifest for a platform; attestations do not count. ImageError names the platforms that exist."""
        images = [d for d in self.manifests if d.platform is not None and not d.is_attestation]
        images = [d for d in images if d.platform and d.platform.os != "unknown"]
        for exact in (True, False):
            for descriptor in images:
                platform = descriptor.platform
                assert platform is not None
                if platform == wanted if exact else platform.serves(wanted):
                    return descriptor
        # An architecture without a variant asks for any variant of it: the index lists the preferred one first.
        if wanted.variant is None:
            for descriptor in images:
                platform = descriptor.platform
                assert platform is not None
                if (platform.os, platform.architecture) == (wanted.os, wanted.architecture):
                    return descriptor
        unlabelled = [d for d in self.manifests if d.platform is None and not d.is_attestation]
        if len(unlabelled) == 1 and not images:
            # An index of one image that does not say its platform: the config will say it, and is checked.
            return unlabelled[0]
        exist = ", ".join(sorted({str(d.platform) for d in images})) or "none"
        raise ImageError(f"no image for {wanted} (platforms that exist: {exist})")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageConfig:
    """Runtime settings of an image and the diff IDs of its layers."""

    raw: bytes
    platform: Platform
    diff_ids: tuple[Digest, ...]
    env: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    working_dir: str = ""
    user: str = ""
    created: str = ""
    labels: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, raw: bytes) -> ImageConfig:
        """ImageError says what is wrong with it."""
        value = _json_object(raw, "image config")
        rootfs = value.get("rootfs")
        ids = _list(rootfs.get("diff_ids")) if isinstance(rootfs, dict) else None
        if ids is None:
            raise ImageError("image config: no rootfs.diff_ids (not a container image)")
        try:
            diff_ids = tuple(Digest.parse(str(i)) for i in ids)
        except ValueError as error:
            raise ImageError(f"image config: rootfs.diff_ids: {error}") from None
        config = value.get("config")
        config = config if isinstance(config, dict) else {}
        labels = config.get("Labels")
        return cls(
            raw=raw,
            platform=Platform.from_json(value),
            diff_ids=diff_ids,
            env=_strings(config.get("Env")),
            entrypoint=_strings(config.get("Entrypoint")),
            cmd=_strings(config.get("Cmd")),
            working_dir=str(config.get("WorkingDir") or ""),
            user=str(config.get("User") or ""),
            created=str(value.get("created") or ""),
            labels=tuple(sorted((str(k), str(v)) for k, v in labels.items())) if isinstance(labels, dict) else (),
        )


def _list(value: object) -> list[Any] | None:
    """A list of a document; None if it is something else. Go writes an empty one as null, or not at all."""
    if value is None:
        return []
    return value if isinstance(value, list) else None


def _strings(value: object) -> tuple[str, ...]:
    # Docker wrote Entrypoint and Cmd as a plain string in old images (shell form).
    if isinstance(value, str):
        return (value,)
    return tuple(str(v) for v in value) if isinstance(value, list) else ()


def parse_manifest(raw: bytes, media_type: str = "") -> Manifest | Index:
    """Reads what a registry gave for a reference; ImageError for what is no container image, and says what it is.

    The document's own `mediaType` is believed over the transport's; one without any is told by its fields
    (OCI image specification, `manifest.md`: clients must not trust mismatching types).
    """
    value = _json_object(raw, "manifest")
    declared = str(value.get("mediaType") or media_type.partition(";")[0].strip())
    if value.get("schemaVersion") == 1 or declared in (DOCKER_SCHEMA1, DOCKER_SCHEMA1_SIGNED):
        raise ImageError(
            "this is a Docker schema 1 manifest, a format retired in 2017: push the image again with a current tool"
        )
    if "manifests" in value and ("layers" in value or "config" in value):
        raise ImageError("manifest is index and image at once: refused (OCI image specification, manifest.md)")
    if declared in (OCI_INDEX, DOCKER_LIST) or (not declared and "manifests" in value):
        entries = value.get("manifests")
        if not isinstance(entries, list):
            raise ImageError("index: no list of manifests")
        found = (Descriptor.from_json(m, f"index: manifests[{i}]") for i, m in enumerate(entries))
        return Index(raw=raw, media_type=declared or OCI_INDEX, manifests=tuple(found))
    if declared not in (OCI_MANIFEST, DOCKER_MANIFEST, "") or "layers" not in value:
        raise ImageError(f"not an image manifest but {declared or 'something else'}")
    config = Descriptor.from_json(value.get("config"), "manifest: config")
    entries = _list(value["layers"])
    if entries is None:
        raise ImageError("manifest: layers is not a list")
    layers = tuple(Descriptor.from_json(d, f"manifest: layers[{i}]") for i, d in enumerate(entries))
    artifact = value.get("artifactType")
    is_sloppy = declared == DOCKER_MANIFEST and config.media_type in _SLOPPY_CONFIGS
    if config.media_type not in (OCI_CONFIG, DOCKER_CONFIG) and not is_sloppy:
        raise ImageError(f"not a container image but an artifact of type {artifact or config.media_type or 'unknown'}")
    for i, layer in enumerate(layers):
        if layer.media_type not in LAYER_COMPRESSION:
            raise ImageError(f"manifest: layers[{i}] is no file system layer but {layer.media_type or 'untyped'}")
    return Manifest(raw=raw, media_type=declared or OCI_MANIFEST, config=config, layers=layers)


def _json_object(raw: bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(raw)
        if b"\\ud" in raw.lower():
            # JSON can escape half a surrogate pair, which is no text and cannot be written anywhere later.
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ImageError(f"{what}: not JSON ({type(error).__name__})") from None
    if not isinstance(value, dict):
        raise ImageError(f"{what}: not a JSON object")
    return value

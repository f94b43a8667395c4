"""Literal images for tests: layers as tuples of members, images as manifests, configs and blobs in memory.

>>> layer(file("etc/motd", b"hello"), whiteout("etc/issue"))      # the bytes of a tar
>>> image(layer(...), layer(...), env=["A=1"])                     # a BuiltImage, to serve or to lay out
"""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zstandard

from unpacker import oci
from unpacker.digest import Digest

Member = tuple[tarfile.TarInfo, bytes]
MTIME = 1_600_000_000


def _member(
    name: str,
    kind: bytes,
    mode: int,
    data: bytes = b"",
    *,
    uid: int = 0,
    gid: int = 0,
    mtime: float = MTIME,
    **extra: Any,
) -> Member:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.mode = mode
    info.uid, info.gid, info.mtime = uid, gid, mtime
    info.size = len(data)
    xattrs = extra.pop("xattrs", {})
    info.pax_headers = {f"SCHILY.xattr.{k}": v.decode("utf-8", "surrogateescape") for k, v in xattrs.items()}
    for key, value in extra.items():
        setattr(info, key, value)
    return info, data


def file(name: str, data: bytes = b"", *, mode: int = 0o644, **meta: Any) -> Member:
    return _member(name, tarfile.REGTYPE, mode, data, **meta)


def directory(name: str, *, mode: int = 0o755, **meta: Any) -> Member:
    return _member(name, tarfile.DIRTYPE, mode, **meta)


def symlink(name: str, target: str, **meta: Any) -> Member:
    return _member(name, tarfile.SYMTYPE, 0o777, linkname=target, **meta)


def hardlink(name: str, target: str, **meta: Any) -> Member:
    return _member(name, tarfile.LNKTYPE, 0o644, linkname=target, **meta)


def fifo(name: str, *, mode: int = 0o644, **meta: Any) -> Member:
    return _member(name, tarfile.FIFOTYPE, mode, **meta)


def device(name: str, major: int, minor: int, *, block: bool = False, mode: int = 0o660, **meta: Any) -> Member:
    kind = tarfile.BLKTYPE if block else tarfile.CHRTYPE
    return _member(name, kind, mode, devmajor=major, devminor=minor, **meta)


def whiteout(path: str) -> Member:
    """Hides `path` of lower layers."""
    head, tail = os.path.split(path)
    return file(os.path.join(head, f".wh.{tail}"))


def opaque(path: str) -> Member:
    """Hides all that lower layers have in the directory `path`."""
    return file(os.path.join(path, ".wh..wh..opq"))


def layer(*members: Member, format: int = tarfile.PAX_FORMAT) -> bytes:
    """The bytes of an uncompressed tar of these members, in this order."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format, encoding="utf-8", errors="surrogateescape") as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def compress(data: bytes, compression: str) -> bytes:
    if compression == "gzip":
        return gzip.compress(data, 1, mtime=0)
    if compression == "zstd":
        return zstandard.ZstdCompressor(level=1).compress(data)
    return data


_SUFFIX = {"gzip": "+gzip", "zstd": "+zstd", "none": ""}


@dataclass(frozen=True, kw_only=True)
class BuiltImage:
    manifest: bytes
    config: bytes
    blobs: dict[str, bytes]
    """All blobs by digest, the config among them, the manifest not."""
    media_type: str = oci.OCI_MANIFEST
    platform: dict[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        return str(Digest.of(self.manifest))

    @property
    def image_id(self) -> str:
        return str(Digest.of(self.config))


def image(
    *layers: bytes,
    compression: str = "gzip",
    docker: bool = False,
    architecture: str = "amd64",
    variant: str | None = None,
    created: str = "2020-09-13T12:26:40Z",
    **config: Any,
) -> BuiltImage:
    """An image of these layers (uncompressed tars); `config` are keys of its runtime config, such as `Env`."""
    blobs: dict[str, bytes] = {}
    descriptors = []
    for data in layers:
        blob = compress(data, compression)
        media_type = oci.OCI_LAYER + _SUFFIX[compression]
        if docker:
            media_type = oci.DOCKER_LAYER + {"gzip": ".gzip", "zstd": ".zstd", "none": ""}[compression]
        blobs[str(Digest.of(blob))] = blob
        descriptors.append({"mediaType": media_type, "digest": str(Digest.of(blob)), "size": len(blob)})
    platform = {"os": "linux", "architecture": architecture} | ({"variant": variant} if variant else {})
    document: dict[str, Any] = {
        **platform,
        "created": created,
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": [str(Digest.of(data)) for data in layers]},
    }
    raw_config = json.dumps(document).encode()
    blobs[str(Digest.of(raw_config))] = raw_config
    media_type = oci.DOCKER_MANIFEST if docker else oci.OCI_MANIFEST
    manifest = {
        "schemaVersion": 2,
        "mediaType": media_type,
        "config": {
            "mediaType": oci.DOCKER_CONFIG if docker else oci.OCI_CONFIG,
            "digest": str(Digest.of(raw_config)),
            "size": len(raw_config),
        },
        "layers": descriptors,
    }
    return BuiltImage(
        manifest=json.dumps(manifest).encode(), config=raw_config, blobs=blobs, media_type=media_type, platform=platform
    )


def index(*images: BuiltImage, docker: bool = False, attestation: bool = False) -> tuple[bytes, str]:
    """The bytes and media type of an index of these images, optionally with an attestation as BuildKit adds it."""
    entries: list[dict[str, Any]] = [
        {"mediaType": i.media_type, "digest": i.digest, "size": len(i.manifest), "platform": i.platform} for i in images
    ]
    if attestation:
        fake = b"attestation"
        entries.append(
            {
                "mediaType": oci.OCI_MANIFEST,
                "digest": str(Digest.of(fake)),
                "size": len(fake),
                "platform": {"os": "unknown", "architecture": "unknown"},
                "annotations": {"vnd.docker.reference.type": "attestation-manifest"},
            }
        )
    media_type = oci.DOCKER_LIST if docker else oci.OCI_INDEX
    return json.dumps({"schemaVersion": 2, "mediaType": media_type, "manifests": entries}).encode(), media_type


def write_layout(path: Path, images: dict[str, BuiltImage]) -> Path:
    """Writes an OCI image layout with these images by tag, as `skopeo copy … oci:PATH:TAG` would."""
    blobs = path / "blobs" / "sha256"
    blobs.mkdir(parents=True, exist_ok=True)
    entries = []
    for tag, built in images.items():
        for digest, data in {**built.blobs, built.digest: built.manifest}.items():
            (blobs / digest.partition(":")[2]).write_bytes(data)
        entries.append(
            {
                "mediaType": built.media_type,
                "digest": built.digest,
                "size": len(built.manifest),
                "annotations": {"org.opencontainers.image.ref.name": tag},
            }
        )
    (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    (path / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": entries}))
    return path

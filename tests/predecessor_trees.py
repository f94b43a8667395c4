"""Trees as other tools leave them, in a directory: DUCC's of CernVM-FS 2.12 and 2.14, OSG's cvmfs-singularity-sync's.

They follow the documented layouts, not the tools: names, links, notes, and the damage that the tools are known to
leave. What is in a root is what the layers hold, applied by simple means: the images of these tests need no more.

>>> ducc = DuccTree(path, generation="2.14")
>>> ducc.publish("registry.example.org/org/app:1.0", built)
>>> ducc.lose_layer(built, 0)
"""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import tarfile
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from tests.images import BuiltImage
from unpacker.digest import Digest

Generation = Literal["2.12", "2.14"]


def _hex(digest: str) -> str:
    return digest.partition(":")[2]


def _layers(built: BuiltImage) -> list[tuple[str, bytes]]:
    """Each layer's digest (hex) and its tar."""
    digests = [layer["digest"] for layer in json.loads(built.manifest)["layers"]]
    return [(_hex(digest), gzip.decompress(built.blobs[digest])) for digest in digests]


# Python before 3.11.4, as Debian 12 has it, knows no filters, and has none.
_AS_IT_IS: Any = {"filter": "fully_trusted"} if hasattr(tarfile, "fully_trusted_filter") else {}


def _unpack(tar: bytes, root: Path, *, whiteouts: bool) -> None:
    """The members of a tar into a directory; whiteouts are applied, or left as the files they are."""
    root.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        for member in archive:
            parent, _, name = member.name.rpartition("/")
            if whiteouts and name.startswith(".wh."):
                hidden = root / parent / name.removeprefix(".wh.")
                shutil.rmtree(hidden) if hidden.is_dir() and not hidden.is_symlink() else hidden.unlink()
                continue
            archive.extract(member, root, **_AS_IT_IS)


class DuccTree:
    """What `cvmfs_ducc convert` of one generation leaves below the root of a repository."""

    def __init__(self, path: Path, generation: Generation = "2.14") -> None:
        self.path = path
        self.generation = generation
        path.mkdir(parents=True, exist_ok=True)

    def publish(self, name: str, built: BuiltImage, *, index: str | None = None, layers: bool = True) -> None:
        """One image under `registry/repository:tag`. `index` names the platform directory of an image that came from
        an index; without `layers` it was converted with --skip-layers, which leaves no notes."""
        if layers:
            self._write_layers(built)
            self._write_manifest(name, built, index)
        self._write_flat(built)
        link = self.path / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to("../" * name.count("/") + self.flat(built))

    def publish_variants(self, name: str, **platforms: BuiltImage) -> None:
        """One image for several platforms, as 2.14 does with -m: a link that clients fill in."""
        for platform, built in platforms.items():
            self._write_layers(built)
            self._write_manifest(name, built, platform)
            self._write_flat(built)
            link = self.path / ".multiarch" / platform / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to("../" * (name.count("/") + 2) + self.flat(built))
        front = self.path / name
        front.parent.mkdir(parents=True, exist_ok=True)
        front.symlink_to("../" * name.count("/") + f".multiarch/$(CVMFS_ARCH:-amd64)/{name}")

    def flat(self, built: BuiltImage) -> str:
        """Where an image's root is, below the tree."""
        identity = _hex(built.image_id)
        return f".flat/{identity[:2]}/{identity}"

    def layer(self, built: BuiltImage, number: int) -> Path:
        digest = _layers(built)[number][0]
        return self.path / ".layers" / digest[:2] / digest

    def _write_layers(self, built: BuiltImage) -> None:
        for number, (digest, tar) in enumerate(_layers(built)):
            at = self.layer(built, number)
            if at.exists():
                continue
            _unpack(tar, at / "layerfs", whiteouts=False)
            note = {
                "id": digest,
                "created": "2024-10-01T12:00:00Z",
                "compressed-diff-digest": f"sha256:{digest}",
                "compressed-size": len(built.blobs[f"sha256:{digest}"]),
                "diff-digest": str(Digest.of(tar)),
                "diff-size": len(tar),
                "parent": "",
            }
            (at / ".metadata").mkdir()
            (at / ".metadata" / "layers.json").write_text(json.dumps([note]))
            (at / ".metadata" / "origin.json").write_text(json.dumps({"origin": [built.image_id]}))
            (self.path / ".layers" / ".cvmfscatalog").touch()

    def _write_manifest(self, name: str, built: BuiltImage, index: str | None) -> None:
        document: Any = json.loads(built.manifest)
        if self.generation == "2.12":
            # Its own structure, marshalled again.
            document = {
                "SchemaVersion": 2,
                "MediaType": document["mediaType"],
                "Config": _capitals(document["config"]),
                "Layers": [_capitals(layer) for layer in document["layers"]],
            }
        below = f".multiarch/{index}/{name}" if index is not None and self.generation == "2.14" else name
        at = self.path / ".metadata" / below
        at.mkdir(parents=True, exist_ok=True)
        (at / "manifest.json").write_text(json.dumps(document))

    def _write_flat(self, built: BuiltImage) -> None:
        root = self.path / self.flat(built)
        if root.exists():
            return
        chain = ""
        for digest, tar in _layers(built):
            _unpack(tar, root, whiteouts=True)
            chain = sha256(f"{chain} {digest}".encode()).hexdigest()
            below = self.path / ".chains" / chain[:2] / chain
            if self.generation == "2.12" and not below.exists():
                shutil.copytree(root, below, symlinks=True)
        singularity = root / ".singularity.d"
        (singularity / "env").mkdir(parents=True)
        (singularity / "runscript").write_text('#!/bin/sh\nexec "$@"\n')
        (singularity / "env" / "10-docker2singularity.sh").write_text("#!/bin/sh\n")

    # Damage ----------------------------------------------------------------------------------------------------------

    def lose_layer(self, built: BuiltImage, number: int) -> None:
        """A download failed, was logged, and never tried again."""
        shutil.rmtree(self.layer(built, number))

    def leave_layer_unfinished(self, built: BuiltImage, number: int) -> None:
        """DUCC was stopped between the layer and its note."""
        (self.layer(built, number) / ".metadata" / "layers.json").unlink()

    def cut_layer_off(self, built: BuiltImage, number: int) -> None:
        """The stream ended early: what came until then was published, and its digest noted."""
        at = self.layer(built, number)
        shutil.rmtree(at / "layerfs")
        (at / "layerfs").mkdir()
        note = at / ".metadata" / "layers.json"
        (value,) = json.loads(note.read_text())
        note.write_text(json.dumps([value | {"diff-digest": str(Digest.of(b"")), "diff-size": 0}]))

    def lose_singularity(self, built: BuiltImage) -> None:
        """A clean-up of 2026 took the files for Singularity away."""
        shutil.rmtree(self.path / self.flat(built) / ".singularity.d")

    def lose_root(self, built: BuiltImage) -> None:
        """Garbage collection removed what a link still leads to."""
        shutil.rmtree(self.path / self.flat(built))


class OsgTree:
    """What cvmfs-singularity-sync leaves. `mounted` is the path that its absolute links name."""

    def __init__(self, path: Path, mounted: str = "/cvmfs/singularity.opensciencegrid.org") -> None:
        self.path = path
        self.mounted = mounted
        path.mkdir(parents=True, exist_ok=True)

    def publish(self, name: str, built: BuiltImage, *, of_index: str | None = None) -> None:
        """One image under `namespace/repository:tag`. `of_index` is the digest of the index that it came from."""
        layers = _layers(built)
        root = self.path / self.images(built, of_index)
        for _, tar in layers:
            _unpack(tar, root, whiteouts=True)
        (root / ".singularity.d").mkdir()
        (root / ".singularity.d" / "runscript").write_text("#!/bin/sh\n")
        (root / "srv").mkdir(exist_ok=True)
        (root / "cvmfs").mkdir(exist_ok=True)
        link = self.path / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(f"{self.mounted}/{self.images(built, of_index)}")

    def images(self, built: BuiltImage, of_index: str | None = None) -> str:
        """Where an image's root is, below the tree."""
        if of_index is not None:
            identity = _hex(of_index)
            return f".images/sha256:{identity[:2]}/{identity[2:]}"
        identity = sha256("".join(digest for digest, _ in _layers(built)).encode()).hexdigest()
        return f".images/{identity[:2]}/{identity[2:]}"

    def leave_unfinished(self, built: BuiltImage) -> None:
        """The build raised in the middle; the next pass took the directory for the image."""
        root = self.path / self.images(built)
        os.rmdir(root / "cvmfs")
        os.rmdir(root / "srv")


def _capitals(value: dict[str, Any]) -> dict[str, Any]:
    return {key[:1].upper() + key[1:]: item for key, item in value.items()}

"""Image-layout directories as registries."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.docker_registry import DockerRegistry
from tests.images import file, image, index, layer, write_layout
from unpacker.digest import Digest
from unpacker.errors import ImageError, IntegrityError, NotFound, RegistryError
from unpacker.limits import Limits
from unpacker.oci import OCI_INDEX, OCI_MANIFEST, Descriptor, parse_manifest
from unpacker.reference import Reference, Repository
from unpacker.registry.layout import Layout

APP = image(layer(file("etc/motd", b"hello\n")))
PLACE = Repository.parse("layout.local/org/app")


def reference(tag: str) -> Reference:
    return Reference(repository=PLACE, tag=tag)


def descriptor(data: bytes) -> Descriptor:
    return Descriptor(media_type="", digest=Digest.of(data), size=len(data))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_layout(tmp_path / "layout", {"1.0": APP, "2.0": APP})


def blob_path(path: Path, data: bytes) -> Path:
    return path / "blobs" / "sha256" / Digest.of(data).hex


def test_an_image_is_read_by_its_tag(path: Path) -> None:
    layout = Layout(str(path))
    assert layout.tags(PLACE) == ["1.0", "2.0"]
    found = layout.head(reference("1.0"))
    assert (found.media_type, str(found.digest), found.size) == (OCI_MANIFEST, APP.digest, len(APP.manifest))
    assert layout.manifest(PLACE, found.digest) == (APP.manifest, OCI_MANIFEST)
    with layout.blob(PLACE, descriptor(APP.config)) as stream:
        assert stream.read(1 << 20) == APP.config
        assert stream.read(1) == b""
    assert layout.is_public(PLACE, found.digest)


def test_a_tag_that_is_not_there_names_those_that_are(path: Path) -> None:
    with pytest.raises(NotFound, match=r"no tag 3\.0 \(tags that exist: 1\.0, 2\.0\)"):
        Layout(str(path)).head(reference("3.0"))


def test_an_image_inside_an_index_is_found_by_digest(path: Path) -> None:
    raw, _ = index(APP)
    blob_path(path, raw).write_bytes(raw)
    found = Layout(str(path)).head(Reference(repository=PLACE, digest=Digest.of(raw)))
    assert (found.media_type, found.size) == (OCI_INDEX, len(raw))


def test_what_is_no_layout_says_so(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"index\.json: no such file in this image layout"):
        Layout(str(tmp_path)).tags(PLACE)
    (tmp_path / "index.json").write_text("[]")
    with pytest.raises(ImageError, match=r"index\.json is not an image index"):
        Layout(str(tmp_path)).tags(PLACE)
    with pytest.raises(NotFound):
        Layout(str(tmp_path / "none")).tags(PLACE)


def test_a_missing_blob_is_not_found(path: Path) -> None:
    with pytest.raises(NotFound, match="blobs/sha256"), Layout(str(path)).blob(PLACE, descriptor(b"none")):
        pytest.fail("entered")


def test_another_process_opens_the_same_layout(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    locator = pickle.loads(pickle.dumps(Layout("layout").locator))
    monkeypatch.chdir("/")
    assert locator.open().tags(PLACE) == ["1.0", "2.0"]
    assert hash(locator) == hash(Layout(str(path)).locator)


def test_what_skopeo_writes_is_read(docker_registry: DockerRegistry, tmp_path: Path) -> None:
    if shutil.which("skopeo") is None:
        pytest.skip("skopeo is not installed: no layout of its making was read")
    docker_registry.push("org/layout", "1.0", APP)
    source = f"docker://{docker_registry.host}/org/layout:1.0"
    policy = ["--insecure-policy"]
    copy = ["copy", "--src-tls-verify=false", source, f"oci:{tmp_path}/out:1.0"]
    subprocess.run(["skopeo", *policy, *copy], check=True, capture_output=True)
    layout = Layout(f"{tmp_path}/out")
    found = layout.head(reference("1.0"))
    raw, media_type = layout.manifest(PLACE, found.digest)
    assert parse_manifest(raw, media_type).raw == raw
    assert layout.tags(PLACE) == ["1.0"]


# What an operator downloaded from somebody.


def test_a_blob_with_other_bytes_is_refused(path: Path) -> None:
    blob_path(path, APP.config).write_bytes(b"x" * len(APP.config))
    with Layout(str(path)).blob(PLACE, descriptor(APP.config)) as stream, pytest.raises(IntegrityError):
        stream.read(1 << 20)
    blob_path(path, APP.manifest).write_bytes(b"{}")
    with pytest.raises(IntegrityError):
        Layout(str(path)).manifest(PLACE, Digest.parse(APP.digest))


def test_a_blob_that_is_a_symlink_is_refused(path: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(APP.config)
    blob_path(path, APP.config).unlink()
    blob_path(path, APP.config).symlink_to(outside)
    with pytest.raises(RegistryError, match="symbolic links"), Layout(str(path)).blob(PLACE, descriptor(APP.config)):
        pytest.fail("entered")


def test_a_directory_of_blobs_that_is_a_symlink_is_refused(path: Path, tmp_path: Path) -> None:
    (path / "blobs").rename(tmp_path / "elsewhere")
    (path / "blobs").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RegistryError), Layout(str(path)).blob(PLACE, descriptor(APP.config)):
        pytest.fail("entered")


@pytest.mark.timeout(20)
def test_a_blob_that_is_a_fifo_holds_nobody_up(path: Path) -> None:
    blob_path(path, APP.config).unlink()
    os.mkfifo(blob_path(path, APP.config))
    with (
        pytest.raises(RegistryError, match="not a regular file"),
        Layout(str(path)).blob(PLACE, descriptor(APP.config)),
    ):
        pytest.fail("entered")


def test_a_huge_manifest_is_refused(path: Path) -> None:
    with pytest.raises(ImageError, match="longer than the limit of 100 bytes"):
        Layout(str(path), limits=Limits(manifest=100)).manifest(PLACE, Digest.parse(APP.digest))


@pytest.mark.parametrize("entry", [1, {}, {"digest": "sha256:../../../etc/passwd", "size": 1}, {"size": -1}])
def test_a_descriptor_that_makes_no_sense_is_refused(path: Path, entry: object) -> None:
    (path / "index.json").write_text(json.dumps({"manifests": [entry]}))
    with pytest.raises(ImageError):
        Layout(str(path)).head(reference("1.0"))

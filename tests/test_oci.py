"""Documents of images: what is read, which platform is chosen, what is refused and how that is said."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.images import BuiltImage, file, image, index, layer
from unpacker import oci
from unpacker.errors import ImageError
from unpacker.oci import LINUX_AMD64, ImageConfig, Index, Manifest, Platform, parse_manifest


def built(architecture: str = "amd64", variant: str | None = None, **options: Any) -> BuiltImage:
    return image(layer(file("a", architecture.encode())), architecture=architecture, variant=variant, **options)


def index_of(*images: BuiltImage, **options: bool) -> Index:
    parsed = parse_manifest(*index(*images, **options))
    assert isinstance(parsed, Index)
    return parsed


def changed(raw: bytes, **changes: Any) -> bytes:
    """A JSON document with other values; None takes a key away."""
    value = {**json.loads(raw), **changes}
    return json.dumps({k: v for k, v in value.items() if v is not None}).encode()


@pytest.mark.parametrize("docker", [False, True])
@pytest.mark.parametrize("compression", ["gzip", "zstd", "none"])
def test_an_image_manifest_is_read_in_both_dialects(docker: bool, compression: str) -> None:
    source = image(layer(file("a")), layer(file("b")), docker=docker, compression=compression)
    manifest = parse_manifest(source.manifest, source.media_type)
    assert isinstance(manifest, Manifest)
    assert str(manifest.config.digest) == source.image_id
    assert [oci.LAYER_COMPRESSION[d.media_type] for d in manifest.layers] == [compression] * 2
    assert manifest.compressed_size == sum(len(source.blobs[str(d.digest)]) for d in manifest.layers)
    assert manifest.raw == source.manifest


def test_a_manifest_without_a_media_type_is_told_by_its_fields() -> None:
    source = built()
    assert isinstance(parse_manifest(changed(source.manifest, mediaType=None)), Manifest)
    assert isinstance(parse_manifest(changed(index(source)[0], mediaType=None)), Index)


def test_the_documents_own_media_type_is_believed_over_the_transports() -> None:
    assert isinstance(parse_manifest(built().manifest, oci.OCI_INDEX), Manifest)


@pytest.mark.parametrize("docker", [False, True])
def test_an_index_gives_the_manifest_of_the_platform(docker: bool) -> None:
    amd64, arm64 = built("amd64", docker=docker), built("arm64", "v8", docker=docker)
    found = index_of(amd64, arm64, docker=docker)
    assert str(found.choose(LINUX_AMD64).digest) == amd64.digest
    assert str(found.choose(Platform.parse("linux/arm64")).digest) == arm64.digest
    assert str(found.choose(Platform.parse("linux/arm64/v8")).digest) == arm64.digest


def test_the_exact_variant_is_preferred_and_any_variant_is_better_than_none() -> None:
    v6, v7 = built("arm", "v6"), built("arm", "v7")
    both = index_of(v6, v7)
    assert str(both.choose(Platform.parse("linux/arm/v6")).digest) == v6.digest
    assert str(both.choose(Platform.parse("linux/arm")).digest) == v7.digest
    assert str(index_of(v6).choose(Platform.parse("linux/arm")).digest) == v6.digest
    with pytest.raises(ImageError, match=r"no image for linux/arm/v7 \(platforms that exist: linux/arm/v6\)"):
        index_of(v6).choose(Platform.parse("linux/arm/v7"))


def test_a_platform_that_is_missing_names_those_that_exist() -> None:
    found = index_of(built("amd64"), built("s390x"), attestation=True)
    with pytest.raises(
        ImageError, match=r"no image for linux/arm64 \(platforms that exist: linux/amd64, linux/s390x\)"
    ):
        found.choose(Platform.parse("linux/arm64"))


def test_attestations_are_never_chosen() -> None:
    source = built()
    assert str(index_of(source, attestation=True).choose(LINUX_AMD64).digest) == source.digest
    with pytest.raises(ImageError, match="platforms that exist: none"):
        index_of(attestation=True).choose(LINUX_AMD64)


def test_an_index_of_one_entry_chooses_by_platform_too() -> None:
    with pytest.raises(ImageError, match="platforms that exist: linux/arm64"):
        index_of(built("arm64")).choose(LINUX_AMD64)


def test_an_index_of_one_entry_without_a_platform_gives_that_one() -> None:
    source = built()
    entry = {"mediaType": source.media_type, "digest": source.digest, "size": len(source.manifest)}
    raw = json.dumps({"schemaVersion": 2, "mediaType": oci.OCI_INDEX, "manifests": [entry]}).encode()
    found = parse_manifest(raw)
    assert isinstance(found, Index)
    assert str(found.choose(LINUX_AMD64).digest) == source.digest


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("linux/amd64", "linux/amd64"),
        ("linux/x86_64", "linux/amd64"),
        ("linux/aarch64", "linux/arm64"),
        ("linux/arm/v7", "linux/arm/v7"),
        ("windows/amd64", "windows/amd64"),
    ],
)
def test_a_platform_is_read_and_printed_in_gos_names(text: str, printed: str) -> None:
    assert str(Platform.parse(text)) == printed


@pytest.mark.parametrize(
    "text",
    ["", "amd64", "linux/", "/amd64", "linux/arm/v7/x", "linux amd64", "Linux/amd64", "linux/..", "linux/ärm", "a/b\n"],
)
def test_what_is_no_platform_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected os/architecture"):
        Platform.parse(text)


@pytest.mark.parametrize(
    ("one", "other"),
    [("linux/arm64", "linux/arm64/v8"), ("linux/arm", "linux/arm/v7"), ("linux/amd64", "linux/amd64/v1")],
)
def test_an_architecture_and_its_implied_variant_serve_each_other(one: str, other: str) -> None:
    assert Platform.parse(one).serves(Platform.parse(other))
    assert Platform.parse(other).serves(Platform.parse(one))
    assert not Platform.parse(one).serves(Platform.parse("linux/arm/v6"))


def test_a_config_gives_what_runs_the_image() -> None:
    source = built(
        Env=["A=1"], Entrypoint=["/bin/sh"], Cmd="exec", WorkingDir="/w", User="u", Labels={"b": "2", "a": "1"}
    )
    config = ImageConfig.parse(source.config)
    assert config.platform == LINUX_AMD64
    assert [str(d) for d in config.diff_ids] == json.loads(source.config)["rootfs"]["diff_ids"]
    assert (config.env, config.entrypoint, config.cmd) == (("A=1",), ("/bin/sh",), ("exec",))
    assert (config.working_dir, config.user) == ("/w", "u")
    assert config.labels == (("a", "1"), ("b", "2"))


def test_a_config_without_runtime_settings_has_none() -> None:
    raw = changed(built().config, config=None)
    assert ImageConfig.parse(raw).env == ()
    assert ImageConfig.parse(changed(raw, config={"Env": None, "Labels": None})).labels == ()


DIGEST = "sha256:" + "0" * 64
CONFIG = {"mediaType": oci.OCI_CONFIG, "digest": DIGEST, "size": 2}
LAYER = {"mediaType": oci.OCI_LAYER, "digest": DIGEST, "size": 2}


@pytest.mark.parametrize(
    ("document", "problem"),
    [
        ({"schemaVersion": 1, "fsLayers": []}, "schema 1"),
        ({"mediaType": oci.DOCKER_SCHEMA1_SIGNED}, "schema 1"),
        ({"manifests": [], "layers": []}, "index and image at once"),
        ({"mediaType": oci.OCI_INDEX}, "no list of manifests"),
        ({"mediaType": "application/x-other", "layers": []}, "not an image manifest but application/x-other"),
        ({}, "not an image manifest"),
        ({"config": CONFIG, "layers": {}}, "layers is not a list"),
        ({"config": CONFIG, "layers": [1]}, r"layers\[0\]: not a descriptor"),
        ({"config": None, "layers": []}, "config: not a descriptor"),
        ({"config": CONFIG, "layers": [{**LAYER, "size": -1}]}, r"layers\[0\]: size is -1"),
        ({"config": CONFIG, "layers": [{**LAYER, "size": True}]}, "size is True"),
        ({"config": CONFIG, "layers": [{**LAYER, "size": "2"}]}, "size is '2'"),
        ({"config": CONFIG, "layers": [{**LAYER, "digest": "sha256:../../x"}]}, "not a sha256 digest"),
        ({"config": CONFIG, "layers": [{**LAYER, "digest": None}]}, "not a digest"),
        ({"config": CONFIG, "layers": [{**LAYER, "mediaType": "text/plain"}]}, "no file system layer but text/plain"),
        (
            {"config": {**CONFIG, "mediaType": "application/vnd.cncf.helm.config.v1+json"}, "layers": []},
            "artifact.*helm",
        ),
        ({"config": {**CONFIG, "mediaType": ""}, "layers": [], "artifactType": "a/b"}, "artifact of type a/b"),
    ],
)
def test_what_is_no_container_image_is_refused_and_said_what_it_is(document: object, problem: str) -> None:
    with pytest.raises(ImageError, match=problem):
        parse_manifest(json.dumps(document).encode())


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 100_000, b"1" * 5_000])
def test_what_is_no_json_object_is_an_image_error(raw: bytes) -> None:
    with pytest.raises(ImageError):
        parse_manifest(raw)
    with pytest.raises(ImageError):
        ImageConfig.parse(raw)


@pytest.mark.parametrize(
    "document",
    [{}, {"rootfs": []}, {"rootfs": None}, {"rootfs": {"diff_ids": "x"}}, {"rootfs": {"diff_ids": ["sha256:1"]}}],
)
def test_a_config_without_diff_ids_is_no_container_image(document: object) -> None:
    with pytest.raises(ImageError, match=r"rootfs\.diff_ids"):
        ImageConfig.parse(json.dumps(document).encode())


@pytest.mark.parametrize("rootfs", [{"type": "layers"}, {"diff_ids": None}, {"diff_ids": []}])
def test_an_image_without_layers_has_no_diff_ids_however_that_is_written(rootfs: object) -> None:
    assert ImageConfig.parse(json.dumps({"rootfs": rootfs}).encode()).diff_ids == ()
    for layers in (None, []):
        parsed = parse_manifest(json.dumps({"schemaVersion": 2, "config": CONFIG, "layers": layers}).encode())
        assert isinstance(parsed, Manifest) and parsed.layers == ()


@pytest.mark.parametrize("called", ["application/octet-stream", "application/json", "text/html", ""])
def test_the_first_years_names_of_a_config_count_in_a_manifest_of_docker_only(called: str) -> None:
    document = {"schemaVersion": 2, "config": CONFIG | {"mediaType": called}, "layers": []}
    parsed = parse_manifest(json.dumps(document | {"mediaType": oci.DOCKER_MANIFEST}).encode())
    assert isinstance(parsed, Manifest)
    with pytest.raises(ImageError, match="artifact"):
        parse_manifest(json.dumps(document | {"mediaType": oci.OCI_MANIFEST}).encode())


def test_other_names_of_an_architecture_are_understood_in_images_as_in_wishes() -> None:
    value = {"os": "linux", "architecture": "aarch64", "rootfs": {}}
    assert ImageConfig.parse(json.dumps(value).encode()).platform == Platform.parse("linux/arm64")


def test_half_a_surrogate_pair_is_refused_and_a_whole_one_is_text() -> None:
    half = b'{"rootfs": {"diff_ids": []}, "config": {"Env": ["A=\\uD800"]}}'
    with pytest.raises(ImageError, match="image config: not JSON"):
        ImageConfig.parse(half)
    whole = half.replace(b"\\uD800", b"\\ud83d\\ude00")
    assert ImageConfig.parse(whole).env == ("A=😀",)

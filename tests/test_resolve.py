"""Wishes → references → images: what registries are asked, and what is made of their answers."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from typing import ClassVar, cast

import pytest

from tests.fake_registry import FakeRegistry
from tests.images import BuiltImage, file, image, index, layer
from unpacker import oci
from unpacker.contracts import Registry
from unpacker.digest import Digest
from unpacker.errors import ImageError, NotFound, UnpackerError, WishlistError
from unpacker.image import Image
from unpacker.limits import Limits
from unpacker.plan import Resolution
from unpacker.reference import Reference, Repository
from unpacker.registry.client import Access
from unpacker.resolve import fetch, names_of, resolve, unreachable
from unpacker.wish import Wish
from unpacker.wishlist import parse

AMD = image(layer(file("arch", b"amd64")), architecture="amd64")
ARM = image(layer(file("arch", b"arm64")), architecture="arm64", variant="v8")


@pytest.fixture
def asking() -> Iterator[Executor]:
    with ThreadPoolExecutor(4) as executor:
        yield executor


def wishes(text: str, fake: FakeRegistry) -> tuple[Wish, ...]:
    return parse(text.replace("HOST", f"http://{fake.host}").encode(), "w").wishes


def ask(text: str, fake: FakeRegistry, asking: Executor) -> Resolution:
    registry = Access(backoff=0.01, attempts=2, timeout=5).open()
    return resolve(wishes(f"version: 2\nimages:\n{text}", fake), registry, asking, Limits())


def names(resolution: Resolution) -> list[str]:
    return sorted(p.reference.public_path.partition("/")[2] for p in resolution.pinned)


def test_two_wishes_for_one_repository_cost_one_listing(registry: FakeRegistry, asking: Executor) -> None:
    for tag in ("1.0", "1.1", "2.0"):
        registry.add("a/b", tag, AMD)
    found = ask("- HOST/a/b:1.*\n- HOST/a/b:2.*\n", registry, asking)
    assert names(found) == ["a/b:1.0", "a/b:1.1", "a/b:2.0"]
    assert registry.count("GET", "tags/list") == 1
    assert registry.count("HEAD") == 3


class Twofold:
    """A registry that has other tags over http than over https, as two servers behind one name have."""

    TAGS: ClassVar[dict[str, list[str]]] = {"http": ["1.0", "2.0"], "https": ["1.1"]}

    def tags(self, repository: Repository) -> list[str]:
        return self.TAGS[repository.scheme]

    def head(self, reference: Reference) -> oci.Descriptor:
        return oci.Descriptor(media_type=oci.OCI_MANIFEST, digest=Digest.of(str(reference).encode()), size=1)


def test_http_and_https_of_one_name_are_two_tag_lists(asking: Executor) -> None:
    text = "version: 2\nimages: ['http://reg.example.org/a/b:1.*', 'https://reg.example.org/a/b:*.1']"
    twofold = cast(Registry, Twofold())
    found = resolve(parse(text.encode(), "w").wishes, twofold, asking, Limits())
    assert names(found) == ["a/b:1.0", "a/b:1.1"]
    assert {r.scheme: sorted(tags) for r, tags in found.listed.items()} == Twofold.TAGS


def test_a_name_known_over_http_is_still_asked_for_over_https(asking: Executor) -> None:
    wished = parse(b"version: 2\nimages: ['https://reg.example.org/a/b:*']", "w").wishes
    plain = replace(wished[0].repository, scheme="http")
    found, _ = names_of(wished, cast(Registry, Twofold()), asking, {plain: frozenset({"1.0"})})
    assert list(found) == ["reg.example.org/a/b:1.1"]


def test_a_literal_tag_needs_no_listing(registry: FakeRegistry, asking: Executor) -> None:
    registry.add("a/b", "1.0", AMD)
    assert names(ask("- HOST/a/b:1.0\n", registry, asking)) == ["a/b:1.0"]
    assert registry.count("GET", "tags/list") == 0


def test_a_tag_wished_by_two_patterns_alike_is_one_reference(registry: FakeRegistry, asking: Executor) -> None:
    registry.add("a/b", "1.0", AMD)
    found = ask("- HOST/a/b:1.*\n- HOST/a/b:*.0\n", registry, asking)
    assert names(found) == ["a/b:1.0"]
    assert not found.unresolved


def test_a_tag_wished_by_two_patterns_differently_is_an_error_of_that_tag_only(
    registry: FakeRegistry, asking: Executor
) -> None:
    for tag in ("1.0", "1.1"):
        registry.add("a/b", tag, AMD)
    text = "- HOST/a/b:1.*\n- image: HOST/a/b\n  tags: ['*.0']\n  platform: linux/arm64\n"
    found = ask(text, registry, asking)
    assert names(found) == ["a/b:1.1"]
    assert isinstance(found.unresolved[0].error, WishlistError)
    assert "line 3" in str(found.unresolved[0].error)


def test_names_that_are_no_tags_are_reported_and_never_used(registry: FakeRegistry, asking: Executor) -> None:
    registry.add("a/b", "ok", AMD)
    registry.listed_tags["a/b"] = ["../../etc", "a b", "-x", ".hidden", "x" * 129, "new\nline"]
    found = ask("- HOST/a/b:*\n", registry, asking)
    assert names(found) == ["a/b:ok"]
    assert "6 tags" in found.warnings[0]


def test_one_wish_that_fails_leaves_the_others(registry: FakeRegistry, asking: Executor) -> None:
    registry.add("a/b", "1", AMD)
    found = ask("- HOST/a/none:*\n- HOST/a/b:1\n- HOST/a/b:gone\n", registry, asking)
    assert names(found) == ["a/b:1"]
    assert [u.name.partition("/")[2] for u in found.unresolved] == ["a/none"]
    assert isinstance(found.missing[0].error, NotFound)
    assert not unreachable(found)


def image_of(
    fake: FakeRegistry, asking: Executor, *, platform: str = "linux/amd64", limits: Limits | None = None
) -> Image:
    found = ask(f"- image: HOST/a/b:1\n  platform: {platform}\n", fake, asking)
    registry = Access(backoff=0.01, attempts=2, timeout=5, limits=limits or Limits()).open()
    return fetch(found.pinned[0], registry, limits or Limits(), frozenset())


@pytest.mark.parametrize("docker", [False, True])
@pytest.mark.parametrize(("platform", "wanted"), [("linux/amd64", AMD), ("linux/arm64", ARM), ("linux/arm64/v8", ARM)])
def test_the_platform_is_chosen_from_an_index(
    registry: FakeRegistry, asking: Executor, platform: str, wanted: BuiltImage, docker: bool
) -> None:
    registry.add_index("a/b", "1", AMD, ARM, docker=docker, attestation=True)
    assert image_of(registry, asking, platform=platform).image_id == wanted.image_id


def test_a_platform_that_an_index_lacks_names_those_it_has(registry: FakeRegistry, asking: Executor) -> None:
    registry.add_index("a/b", "1", AMD, ARM, attestation=True)
    with pytest.raises(ImageError, match=r"linux/s390x.*linux/amd64, linux/arm64/v8"):
        image_of(registry, asking, platform="linux/s390x")


def test_an_index_of_one_entry_is_chosen_like_any_other(registry: FakeRegistry, asking: Executor) -> None:
    registry.add_index("a/b", "1", ARM)
    assert image_of(registry, asking, platform="linux/arm64").image_id == ARM.image_id
    with pytest.raises(ImageError, match="linux/amd64"):
        image_of(registry, asking)


def test_a_plain_image_of_another_platform_is_refused(registry: FakeRegistry, asking: Executor) -> None:
    registry.add("a/b", "1", ARM)
    with pytest.raises(ImageError, match="linux/arm64"):
        image_of(registry, asking)


def test_an_index_of_indexes_ends(registry: FakeRegistry, asking: Executor) -> None:
    raw, media_type = index(AMD)
    for _ in range(4):
        digest = registry.add_manifest("a/b", None, raw, media_type)
        inner = BuiltImage(manifest=raw, config=b"", blobs={}, media_type=media_type, platform=AMD.platform)
        assert inner.digest == digest
        raw, media_type = index(inner)
    registry.add_manifest("a/b", "1", raw, media_type)
    with pytest.raises(ImageError, match="index"):
        image_of(registry, asking)


SCHEMA1 = b'{"schemaVersion": 1, "name": "a/b", "tag": "1", "fsLayers": []}'
HELM = (
    b'{"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "config": {"mediaType": '
    b'"application/vnd.cncf.helm.config.v1+json", "size": 2, "digest": "sha256:' + b"0" * 64 + b'"}, "layers": []}'
)


@pytest.mark.parametrize(
    ("raw", "media_type", "word"),
    [
        (SCHEMA1, oci.DOCKER_SCHEMA1_SIGNED, "schema 1"),
        (HELM, oci.OCI_MANIFEST, "helm"),
        (b"[]", oci.OCI_MANIFEST, "JSON object"),
        (b"{", oci.OCI_MANIFEST, "JSON"),
        (b"[" * 100_000, oci.OCI_MANIFEST, "JSON"),
    ],
)
def test_what_is_no_image_gets_a_clear_error(
    registry: FakeRegistry, asking: Executor, raw: bytes, media_type: str, word: str
) -> None:
    registry.add_manifest("a/b", "1", raw, media_type)
    with pytest.raises(UnpackerError, match=word):
        image_of(registry, asking)


def test_layers_and_diff_ids_must_be_as_many(registry: FakeRegistry, asking: Executor) -> None:
    two = image(layer(file("a")), layer(file("b")))
    one = image(layer(file("a")))
    built = BuiltImage(
        manifest=two.manifest.replace(two.image_id.encode(), one.image_id.encode()).replace(
            f'"size": {len(two.config)}'.encode(), f'"size": {len(one.config)}'.encode()
        ),
        config=one.config,
        blobs={**two.blobs, **one.blobs},
    )
    registry.add("a/b", "1", built)
    with pytest.raises(ImageError, match="2 layers"):
        image_of(registry, asking)

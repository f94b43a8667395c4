"""Names of images: what is read, what is refused, where it is published, what is called."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unpacker.digest import Digest
from unpacker.reference import Reference, Repository, TagPattern, is_loopback, is_tag, split

HEX = "0123456789abcdef" * 4


def test_a_name_is_registry_repository_tag() -> None:
    reference = Reference.parse("gitlab.example.org:5005/group/sub/tool:1.0")
    assert reference.repository == Repository(registry="gitlab.example.org:5005", name="group/sub/tool")
    assert reference.tag == "1.0"
    assert reference.digest is None
    assert reference.public_path == "gitlab.example.org:5005/group/sub/tool:1.0"
    assert reference.spec == "1.0"


def test_the_registry_is_kept_as_written_and_called_by_its_one_api_host() -> None:
    for spelling in ("docker.io", "index.docker.io", "registry.hub.docker.com", "Docker.IO"):
        reference = Reference.parse(f"{spelling}/library/alpine:3")
        assert reference.public_path == f"{spelling}/library/alpine:3"
        assert reference.repository.api_host == "registry-1.docker.io"


def test_docker_hubs_own_images_are_called_under_library_and_published_as_written() -> None:
    repository = Repository.parse("docker.io/alpine")
    assert (repository.api_name, str(repository)) == ("library/alpine", "docker.io/alpine")
    assert Repository.parse("ghcr.io/alpine").api_name == "alpine"


def test_a_digest_alone_names_the_path() -> None:
    reference = Reference.parse(f"ghcr.io/a/b@sha256:{HEX}")
    assert reference.tag is None
    assert reference.public_path == f"ghcr.io/a/b:sha256:{HEX}"
    assert reference.spec == f"sha256:{HEX}"


def test_tag_and_digest_are_published_under_the_tag_and_asked_for_by_digest() -> None:
    reference = Reference.parse(f"ghcr.io/a/b:1.0@sha256:{HEX}")
    assert reference.public_path == "ghcr.io/a/b:1.0"
    assert reference.spec == f"sha256:{HEX}"
    assert str(reference) == f"ghcr.io/a/b:1.0@sha256:{HEX}"


def test_the_scheme_is_https_unless_written_or_on_loopback() -> None:
    assert Repository.parse("ghcr.io/a").scheme == "https"
    assert Repository.parse("http://ghcr.io/a").scheme == "http"
    assert Repository.parse("localhost:5000/a").scheme == "http"
    assert Repository.parse("127.0.0.1:5000/a").scheme == "http"
    assert Repository.parse("[::1]:5000/a").scheme == "http"
    assert Repository.parse("https://localhost:5000/a").scheme == "https"


@pytest.mark.parametrize("host", ["127.0.0.1.example.org", "localhost.example.org", "127.evil", "[::2]", "example.org"])
def test_what_only_looks_like_loopback_is_not(host: str) -> None:
    assert not is_loopback(host)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("alpine:3", "no registry host.*registry.hub.docker.com/library/alpine:3"),
        ("atlas/athena:1", "no registry host.*registry.hub.docker.com/atlas/athena:1"),
        ("alpine@sha256:" + "0" * 64, "no registry host.*registry.hub.docker.com/library/alpine@sha256:0"),
        ("ghcr.io/a/b", "neither tag nor digest.*ghcr.io/a/b:latest"),
        ("ghcr.io/a/b:", "empty tag"),
        ("ghcr.io/A/b:1", "not a repository name"),
        ("ghcr.io/a//b:1", "not a repository name"),
        ("ghcr.io/../b:1", "not a repository name"),
        ("ghcr.io/.a/b:1", "not a repository name"),
        ("ghcr.io/a/b/:1", "not a repository name"),
        ("ghcr.io/:1", "not a repository name"),
        ("https://hub.docker.com/r/org/tool:1", "address of a page.*registry.hub.docker.com/org/tool"),
        ("https://hub.docker.com/_/alpine:3", "address of a page.*registry.hub.docker.com/library/alpine"),
        (".ghcr.io/a:1", "no registry host"),
        ("gh..cr.io/a:1", "no registry host"),
        ("../a.b/c:1", "no registry host"),
        ("ghcr.io:0/a:1", "no such port"),
        ("ghcr.io:65536/a:1", "no such port"),
        ("ghcr.io/a:1.*", "not a tag"),
        ("ghcr.io/a:.1", "not a tag"),
        ("ghcr.io/a:-1", "not a tag"),
        ("ghcr.io/a:1:2", "not a tag"),
        ("ghcr.io/a:" + "x" * 129, "not a tag"),
        ("ghcr.io/a@sha256:123", "not a sha256 digest"),
        ("ghcr.io/a@md5:" + "0" * 32, "not a digest"),
        (f"ghcr.io/a@sha256:{HEX.upper()}", "lower-case"),
        ("docker://ghcr.io/a:1", "not a registry's scheme"),
        ("ghcr.io/a b:1", "not an image name"),
        ("ghcr.io/a:1\n", "not an image name"),
        ("", "not an image name"),
        ("ghcr.io/" + "a" * 120 + ":1", "longer than 119"),
        ("ghcr.io/" + "a/" * 130 + "a:1", "longer than 255"),
        ("ghcr.io/" + "a" * 2000 + ":1", "longer than 1,024"),
    ],
)
def test_what_is_wrong_with_a_name_is_said(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Reference.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "https://user:hunter2@ghcr.io/a/b:1",
        "user:hunter2@ghcr.io/a/b:1",
        "ghcr.io/a/b:1?token=hunter2",
        "ghcr.io/a/b?a&hunter2",
    ],
)
def test_a_secret_in_a_name_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(ValueError, match="an image name") as caught:
        split(text)
    assert "hunter2" not in str(caught.value)


def test_a_port_is_not_taken_for_a_tag() -> None:
    name = split("gitlab.example.org:5005/group/tool")
    assert (name.repository.registry, name.tag) == ("gitlab.example.org:5005", None)


def test_the_longest_names_still_fit_into_one_file_name() -> None:
    repository = Repository.parse("ghcr.io/" + "a" * 119)
    by_tag = Reference(repository=repository, tag="t" * 128)
    by_digest = Reference(repository=repository, digest=Digest("sha512", "0" * 128))
    assert all(len(r.public_path.rpartition("/")[2]) <= 255 for r in (by_tag, by_digest))


@pytest.mark.parametrize("glob", ["*", "3.*", "v?.[0-9]*", "[!a-f]*", "1.0", "*-rc[12]", "[_.-]*", "a[b-]"])
def test_globs_are_patterns(glob: str) -> None:
    assert str(TagPattern.parse(glob)) == glob


@pytest.mark.parametrize(
    "glob",
    [
        *("", "a b", "a/b", "a:b", "a+b", "(a|b)", "a$", "^a", ".*", "-rc*", "ä*", "1,2", "{1,2}", "a\n", "a\x00"),
        *("[", "[abc", "[]", "[!]", "]", "a]", "[a b]", "[/]", "[^a]*", "[z-a]*", "[a][1z-a]", "[[a]]", "\\*"),
        *("x" * 129, "*" * 257),
    ],
)
def test_a_pattern_that_can_never_match_a_tag_is_refused(glob: str) -> None:
    with pytest.raises(ValueError, match="tag"):
        TagPattern.parse(glob)


def test_an_empty_range_is_refused_and_turned_round() -> None:
    with pytest.raises(ValueError, match=r"empty range 9-1 .*write 1-9"):
        TagPattern.parse("v[9-1]")


def test_only_patterns_without_wildcards_are_literal() -> None:
    assert TagPattern.parse("1.0").is_literal
    assert TagPattern.parse("[z][-a]").matches("z-")
    assert not any(TagPattern.parse(glob).is_literal for glob in ("*", "1.?", "1.[0]"))


TAG = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}", fullmatch=True)
NAME = st.from_regex(r"[a-z0-9]{1,5}((\.|_|__|-)[a-z0-9]{1,5})?(/[a-z0-9]{1,5}){0,2}", fullmatch=True)
HOST = st.sampled_from(["ghcr.io", "localhost:5000", "[::1]:5000", "registry.hub.docker.com", "a-b.c:1"])


@given(HOST, NAME, st.none() | TAG, st.none() | st.binary())
def test_every_reference_is_read_back_from_its_text(host: str, name: str, tag: str | None, of: bytes | None) -> None:
    digest = None if of is None else Digest.of(of)
    if tag is None and digest is None:
        tag = "latest"
    reference = Reference(repository=Repository.parse(f"{host}/{name}"), tag=tag, digest=digest)
    assert Reference.parse(str(reference)) == reference


@given(TAG)
def test_a_tag_is_a_pattern_that_matches_only_itself(tag: str) -> None:
    pattern = TagPattern.parse(tag)
    assert pattern.is_literal
    assert pattern.matches(tag)
    assert not pattern.matches(tag + "x")


@given(st.text(max_size=12) | st.text("[]!-*?az09./", max_size=8))
def test_any_text_is_a_tag_a_glob_or_refused(text: str) -> None:
    try:
        pattern = TagPattern.parse(text)
    except ValueError:
        assert not is_tag(text)
    else:
        assert pattern.is_literal == is_tag(text)

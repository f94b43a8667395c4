"""The manifest: the bytes that the official tools write, read and verified."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unpacker.cvmfs import keys, manifest
from unpacker.cvmfs.hash import ALGORITHMS, ContentHash
from unpacker.cvmfs.keys import RepositoryKey
from unpacker.cvmfs.manifest import Manifest
from unpacker.cvmfs.signing import Letter, seal
from unpacker.errors import PublishError

NAME = "try.example.org"
TEXT = (
    b"C" + b"1" * 40 + b"\nB16384\nRd41d8cd98f00b204e9800998ecf8427e\nD240\nS7\nGyes\nAno\n"
    b"Ntry.example.org\nX" + b"2" * 40 + b"\nH" + b"3" * 40 + b"\nT1790000000\nM" + b"4" * 40 + b"-shake128\n"
    b"Y" + b"5" * 40 + b"\n"
)
VALUE = Manifest(
    name=NAME,
    root=ContentHash.parse("1" * 40),
    root_size=16384,
    revision=7,
    published=1_790_000_000,
    certificate=ContentHash.parse("2" * 40),
    history=ContentHash.parse("3" * 40),
    meta_info=ContentHash.parse("4" * 40 + "-shake128"),
    reflog=ContentHash.parse("5" * 40),
)


def parse(text: bytes) -> Manifest:
    return Manifest.parse(Letter.parse(seal(text, "sha1", lambda _: b"x"), "it"), "it")


def test_a_manifest_is_the_lines_that_the_official_tools_write() -> None:
    assert VALUE.text() == TEXT
    assert parse(TEXT) == VALUE


def test_the_order_of_lines_does_not_matter() -> None:
    assert parse(b"".join(sorted(TEXT.splitlines(keepends=True)))) == VALUE


def test_optional_fields_may_be_missing() -> None:
    kept = [line for line in TEXT.splitlines(keepends=True) if line[:1] not in b"HMYGA"]
    read = parse(b"".join(kept))
    assert (read.history, read.meta_info, read.reflog) == (None, None, None)
    assert (read.collectable, read.alternative_paths) == (False, False)
    assert b"\nH" not in read.text() and b"None" not in read.text()


def test_fields_of_later_versions_are_kept_and_a_micro_catalog_is_not() -> None:
    read = parse(TEXT + b"Vsomething new\nL" + b"6" * 40 + b"\n")
    assert read.text() == TEXT + b"Vsomething new\n"


@pytest.mark.parametrize("letter", "CBRDSNXT")
def test_a_mandatory_field_that_is_missing_is_named(letter: str) -> None:
    text = b"".join(line for line in TEXT.splitlines(keepends=True) if line[:1] != letter.encode())
    with pytest.raises(PublishError, match=f"lacks the fields {letter}"):
        parse(text)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"S7", b"S-7", "not a number"),
        (b"S7", b"S\xd9\xa7", "not a number"),
        (b"S7", b"S" + b"9" * 30, "not a number"),
        (b"C1", b"Cx", "not a content hash"),
        (b"C1", b"C1-md5", "not a content hash"),
        (b"Rd4", b"Rd5", "part of a repository"),
    ],
)
def test_a_malformed_field_is_refused(old: bytes, new: bytes, message: str) -> None:
    with pytest.raises(PublishError, match=message):
        parse(TEXT.replace(b"\n" + old, b"\n" + new) if old != b"C1" else TEXT.replace(old, new, 1))


HASHES = st.builds(ContentHash, st.binary(min_size=20, max_size=20), st.sampled_from(ALGORITHMS))
NUMBERS = st.integers(0, 2**63 - 1)


@given(
    st.builds(
        Manifest,
        name=st.just(NAME),
        root=HASHES,
        root_size=NUMBERS,
        revision=NUMBERS,
        published=NUMBERS,
        certificate=HASHES,
        ttl=NUMBERS,
        history=st.none() | HASHES,
        meta_info=st.none() | HASHES,
        reflog=st.none() | HASHES,
        collectable=st.booleans(),
        alternative_paths=st.booleans(),
    )
)
def test_what_is_written_is_what_is_read(value: Manifest) -> None:
    assert parse(value.text()) == value


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> RepositoryKey:
    directory: Path = tmp_path_factory.mktemp("keys")
    keys.create(str(directory), NAME, now=0)
    return RepositoryKey.open(str(directory), NAME)


def test_only_what_the_key_signed_is_believed(key: RepositoryKey) -> None:
    data = VALUE.sealed(key)
    assert manifest.verified(data, key.certificate, "it") == VALUE
    with pytest.raises(PublishError, match="damaged"):
        manifest.verified(data.replace(b"S7\n", b"S8\n"), key.certificate, "it")
    forged = dataclasses.replace(VALUE, revision=8)
    with pytest.raises(PublishError, match="not signed by the repository's key"):
        manifest.verified(seal(forged.text(), "sha1", lambda _: data[-256:]), key.certificate, "it")


def test_the_hash_of_a_manifest_is_of_the_algorithm_of_its_root(key: RepositoryKey) -> None:
    data = dataclasses.replace(VALUE, root=ContentHash.of(b"", "shake128")).sealed(key)
    assert b"-shake128\n" in data.partition(b"\n--\n")[2]
    manifest.verified(data, key.certificate, "it")

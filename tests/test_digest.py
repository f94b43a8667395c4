"""Digests, and the reader that gives right bytes or raises."""

from __future__ import annotations

import hashlib
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unpacker.digest import Digest, VerifiedReader
from unpacker.errors import IntegrityError

HELLO = b"hello, world"


def reader(served: bytes, *, of: bytes = HELLO, size: int | None = None) -> VerifiedReader:
    """Reads `served` where `of` was promised."""
    return VerifiedReader(io.BytesIO(served), Digest.of(of), len(of) if size is None else size, "blob")


def drain(stream: VerifiedReader, step: int = 5) -> bytes:
    return b"".join(iter(lambda: stream.read(step), b""))


def test_a_digest_is_read_and_printed() -> None:
    for algorithm in ("sha256", "sha512"):
        digest = Digest.of(HELLO, algorithm)
        assert str(digest) == f"{algorithm}:{hashlib.new(algorithm, HELLO).hexdigest()}"
        assert Digest.parse(str(digest)) == digest
    assert Digest.of(HELLO).short == hashlib.sha256(HELLO).hexdigest()[:12]


@pytest.mark.parametrize(
    "text",
    [
        *("", "sha256", "sha256:", ":", "sha256:" + "0" * 63, "sha256:" + "0" * 65, "sha256:" + "g" * 64),
        *("sha256:" + "A" * 64, "SHA256:" + "0" * 64, "md5:" + "0" * 32, "sha512:" + "0" * 64),
        *("sha256:" + "0" * 64 + "\n", "sha256:../" + "0" * 61, "0" * 64, "sha256:" + "٠" * 64),
    ],
)
def test_what_is_no_digest_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"not a .*digest"):
        Digest.parse(text)


def test_a_message_does_not_repeat_a_text_of_any_length() -> None:
    with pytest.raises(ValueError, match="not a sha256 digest") as caught:
        Digest.parse("sha256:" + "0" * 1_000_000)
    assert len(str(caught.value)) < 300


def test_check_gives_right_bytes_back_and_names_wrong_ones() -> None:
    assert Digest.of(HELLO).check(HELLO, "config") == HELLO
    with pytest.raises(IntegrityError, match="config: expected sha256:"):
        Digest.of(HELLO).check(b"other", "config")


@given(st.binary(max_size=64), st.integers(1, 70))
def test_right_bytes_pass_whatever_the_step(data: bytes, step: int) -> None:
    stream = reader(data, of=data)
    assert drain(stream, step) == data
    assert stream.read(step) == b""


def test_nothing_is_verified_too() -> None:
    assert drain(reader(b"", of=b"")) == b""
    with pytest.raises(IntegrityError):
        reader(b"", of=HELLO, size=0).read(1)


@given(st.binary(max_size=64), st.integers(1, 70))
def test_other_bytes_never_pass(served: bytes, step: int) -> None:
    if served == HELLO:
        return
    with pytest.raises(IntegrityError):
        drain(reader(served), step)


@pytest.mark.parametrize(
    ("served", "problem"),
    [
        (HELLO[:-1], "ended after 11 of 12 bytes"),
        (b"", "ended after 0 of 12 bytes"),
        (HELLO + b"!", "longer than the 12 bytes announced"),
        (HELLO[:-1] + b"D", "expected sha256:"),
    ],
)
def test_what_is_wrong_with_bytes_is_said(served: bytes, problem: str) -> None:
    with pytest.raises(IntegrityError, match=f"blob: {problem}"):
        drain(reader(served))


def test_the_last_bytes_are_not_handed_out_before_all_are_found_right() -> None:
    stream = reader(HELLO[:-1] + b"D")
    got = stream.read(6)
    with pytest.raises(IntegrityError):
        stream.read(6)
    assert got == HELLO[:6]


def test_who_reads_on_after_an_error_gets_the_error_again_and_no_end() -> None:
    stream = reader(HELLO[:-1] + b"D")
    for _ in range(2):
        with pytest.raises(IntegrityError):
            drain(stream)


def test_reading_all_at_once_is_refused_rather_than_taken_for_the_end() -> None:
    with pytest.raises(ValueError, match="blob"):
        reader(HELLO).read(-1)
    assert reader(HELLO).read(0) == b""

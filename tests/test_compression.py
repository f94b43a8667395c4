"""Layers are decompressed by what their bytes are, whole or not at all, in bounded pieces."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import random
import zlib

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import images
from tests.raw_tar import Pieces
from unpacker import compression
from unpacker.errors import ImageError

TAR = images.layer(images.file("a", random.Random(1).randbytes(300_000)), images.file("b", bytes(2_000_000)))
SKIPPABLE = b"\x5a\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"12345"


def inflate(data: bytes, declared: str = "gzip", *, size: int = 1 << 18, piece: int = 1 << 20) -> bytes:
    stream = io.BytesIO(data)
    inflated = compression.decompress(Pieces(stream, piece), declared, "layer")
    found = []
    while out := inflated.read(size):
        assert len(out) <= size
        found.append(out)
    assert inflated.read(size) == b""
    assert stream.read() == b"", "the input was not read to its end"
    return b"".join(found)


@pytest.mark.parametrize("declared", ["gzip", "zstd", "none"])
@pytest.mark.parametrize("actual", ["gzip", "zstd", "none"])
def test_the_bytes_win_over_the_declared_type(declared: str, actual: str) -> None:
    assert inflate(images.compress(TAR, actual), declared) == TAR


@pytest.mark.parametrize("declared", ["gzip", "zstd"])
@pytest.mark.parametrize("data", [b"<html>" * 100, b"x", bytes(100)])
def test_what_is_none_of_the_three_is_refused(declared: str, data: bytes) -> None:
    with pytest.raises(ImageError):
        inflate(data, declared)


@pytest.mark.parametrize("declared", ["gzip", "zstd", "none"])
def test_nothing_at_all_is_an_empty_layer_as_engines_take_it(declared: str) -> None:
    assert inflate(b"", declared) == b""


@pytest.mark.parametrize("declared", ["gzip", "none"])
@pytest.mark.parametrize(
    ("data", "name"),
    [(lzma.compress(TAR), "xz"), (bz2.compress(TAR), "bzip2"), (b"\x04\x22\x4d\x18" + bytes(600), "lz4")],
)
def test_what_else_it_is_compressed_by_is_told(declared: str, data: bytes, name: str) -> None:
    with pytest.raises(ImageError, match=f"compressed by {name}"):
        inflate(data, declared)


def test_without_a_declared_compression_anything_may_be_a_tar() -> None:
    assert inflate(b"an old header", "none") == b"an old header"


def test_an_empty_tar_needs_no_mark() -> None:
    assert inflate(bytes(1024), "gzip") == bytes(1024)


def test_all_members_of_a_gzip_layer_are_read_and_zeros_behind_them() -> None:
    parts = [TAR[i : i + 70_001] for i in range(0, len(TAR), 70_001)]
    data = b"".join(gzip.compress(part) for part in [*parts, b""])
    assert inflate(data) == TAR
    assert inflate(data + bytes(10_000)) == TAR


def test_many_tiny_gzip_members_take_no_more_than_linear_time() -> None:
    data = gzip.compress(b"x", mtime=0) * 50_000
    assert inflate(data) == b"x" * 50_000


def test_gzip_headers_may_have_all_their_optional_fields() -> None:
    body = gzip.compress(b"hello", mtime=0)[10:]
    header = b"\x1f\x8b\x08\x1e" + bytes(6) + b"\x04\x00extr" + b"name\0" + b"comment\0"
    header += (zlib.crc32(header) & 0xFFFF).to_bytes(2, "little")
    assert inflate(header + body) == b"hello"


def test_all_frames_of_a_zstd_layer_are_read_skippable_ones_passed_over() -> None:
    compressor = zstandard.ZstdCompressor(write_checksum=True)
    streamed = compressor.compressobj()
    unsized = streamed.compress(TAR) + streamed.flush()
    data = SKIPPABLE + compressor.compress(TAR) + SKIPPABLE + unsized + compressor.compress(b"") + SKIPPABLE
    assert inflate(data, "zstd") == TAR + TAR


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.one_of(st.binary(max_size=300), st.integers(0, 5000).map(bytes)), max_size=6).map(b"".join),
    st.sampled_from(["gzip", "zstd"]),
    st.integers(1, 4),
    st.sampled_from([1, 100, 5000, 1 << 18]),
    st.sampled_from([1, 17, 4096]),
    st.integers(0, 2**32),
)
def test_any_content_survives_in_any_pieces_and_any_cut_is_noticed(
    content: bytes, kind: str, copies: int, size: int, piece: int, cut: int
) -> None:
    data = images.compress(content, kind)
    assert inflate(data * copies, kind, size=size, piece=piece) == content * copies
    end = cut % len(data)
    if end:
        with pytest.raises(ImageError):
            inflate(data[:end], kind, size=size, piece=piece)
        with pytest.raises(ImageError):
            inflate(data + data[:end], kind, size=size, piece=piece)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["gzip", "zstd"]), st.integers(0, 2**32), st.integers(1, 255))
def test_a_flipped_byte_is_an_image_error_or_harmless(kind: str, where: int, flip: int) -> None:
    content = b"some text, " * 50 + bytes(range(256))
    checked = zstandard.ZstdCompressor(write_checksum=True).compress(content)
    damaged = bytearray(checked if kind == "zstd" else gzip.compress(content, mtime=0))
    damaged[where % len(damaged)] ^= flip
    try:
        assert inflate(bytes(damaged), kind) == content
    except ImageError:
        pass


def test_what_follows_gzip_data_is_told_from_data_that_end_early() -> None:
    with pytest.raises(ImageError, match="something else follows"):
        inflate(gzip.compress(b"text") + b"junk", "gzip")
    with pytest.raises(ImageError, match="end early"):
        inflate(gzip.compress(b"text")[:-1], "gzip")

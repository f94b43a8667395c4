"""What a layer made to hurt gets: an ImageError, soon, in bounded memory, with nothing of it stored.

One test for every limit, and for every lie that a tar, gzip or zstd header can tell.
"""

from __future__ import annotations

import gzip
import io
import itertools
import threading
import time
import tracemalloc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import zstandard

from tests import images
from tests.memory_store import MemoryBatch, MemoryStore
from tests.raw_tar import END, GNU, OLD, header, layer_of, pax, read, record, regular
from unpacker import compression, layer
from unpacker.digest import Stream, VerifiedReader
from unpacker.errors import ImageError, IntegrityError
from unpacker.limits import Limits
from unpacker.oci import OCI_LAYER
from unpacker.rootfs import Policy
from unpacker.tar.reader import TarReader

MIB = 1 << 20
SMALL = Limits(image_unpacked=10 * MIB, image_entries=1000)


class Forgetting(MemoryStore):
    """Counts what it is given and keeps nothing."""

    taken = 0

    @contextmanager
    def batch(self) -> Iterator[MemoryBatch]:
        batch = MemoryBatch(keep=False)
        try:
            yield batch
        finally:
            self.taken += batch.written


class Chain:
    """A stream of pieces made while it is read, and a count of what was taken."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = iter(pieces)
        self._rest = b""
        self.taken = 0

    def read(self, size: int, /) -> bytes:
        if not self._rest:
            self._rest = next(self._pieces, b"")
        data, self._rest = self._rest[:size], self._rest[size:]
        self.taken += len(data)
        return data


@dataclass
class Refused:
    message: str
    store: Forgetting
    seconds: float
    memory: int


def refused(blob: bytes | Stream, limits: Limits = SMALL, suffix: str = "") -> Refused:
    """Reads a layer that must be refused, and measures it."""
    stream = io.BytesIO(blob) if isinstance(blob, bytes) else blob
    content = blob if isinstance(blob, bytes) else b""
    named = layer_of(content, content, OCI_LAYER + suffix)
    store = Forgetting()
    threads = threading.active_count()
    tracemalloc.start()
    started = time.monotonic()
    try:
        with pytest.raises(ImageError) as caught:
            layer.read(stream, named, store, Policy(), limits)
        memory = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert not isinstance(caught.value, IntegrityError), "refused only because of its digest"
    assert threading.active_count() == threads
    assert store.committed == 0
    return Refused(str(caught.value), store, time.monotonic() - started, memory)


def malformed(tar: bytes, match: str, limits: Limits = SMALL) -> None:
    """This tar is refused with this message, wherever its pieces are cut."""
    for piece in (None, 1000):
        with pytest.raises(ImageError, match=match):
            read(tar, limits, piece)


# Bombs.


def test_a_gzip_bomb_stops_at_the_limit_in_bounded_memory() -> None:
    bomb = gzip.compress(header(b"bomb", size=100 * MIB) + bytes(100 * MIB) + END, 1)
    assert len(bomb) < MIB
    found = refused(bomb, SMALL, "+gzip")
    assert "more than 10485760 bytes" in found.message
    assert found.memory < 16 * MIB
    assert found.store.taken == 0


def test_a_gzip_bomb_behind_the_end_of_the_archive_stops_too() -> None:
    found = refused(gzip.compress(END + bytes(50 * MIB), 1), SMALL, "+gzip")
    assert "more than 10485760 bytes uncompressed" in found.message
    assert found.memory < 16 * MIB


def test_a_zstd_bomb_stops_at_the_limit_in_bounded_memory() -> None:
    bomb = zstandard.ZstdCompressor(level=3).compress(END + bytes(200 * MIB))
    assert len(bomb) < 50_000
    found = refused(bomb, SMALL, "+zstd")
    assert "more than 10485760 bytes uncompressed" in found.message
    assert found.memory < 32 * MIB
    assert found.seconds < 5


def test_a_zstd_frame_may_not_ask_for_much_memory() -> None:
    # Frame header: no single segment, no sizes; window of 2^(10+exponent).
    exponent = 30 - 10
    frame = b"\x28\xb5\x2f\xfd" + bytes([0x00, exponent << 3]) + (1 | 5 << 3).to_bytes(3, "little") + b"hello"
    assert "zstd data" in refused(frame, SMALL, "+zstd").message
    # A single segment of 1 GiB is a window of 1 GiB.
    frame = b"\x28\xb5\x2f\xfd" + bytes([0xE0]) + (1 << 30).to_bytes(8, "little")
    frame += (1 | 5 << 3).to_bytes(3, "little") + b"hello"
    assert "zstd data" in refused(frame, SMALL, "+zstd").message


def test_a_window_of_the_size_that_zstd_accepts_is_accepted() -> None:
    frame = b"\x28\xb5\x2f\xfd" + bytes([0x00, (27 - 10) << 3]) + (1 | 1024 << 3).to_bytes(3, "little") + END
    tar = compression.decompress(io.BytesIO(frame), "zstd", "layer").read(4096)
    assert tar == END


@pytest.mark.parametrize("format", ["old", "0.0", "0.1", "1.0"])
def test_a_sparse_bomb_counts_by_its_logical_size(format: str) -> None:
    size = 1 << 40
    number = str(size).encode()
    if format == "old":
        real = b"\x80" + size.to_bytes(11, "big")
        tar = header(b"bomb", flag=b"S", magic=GNU, rest=bytes(41) + bytes(96) + b"\0" + real)
    elif format == "1.0":
        records = (b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.realsize", number)
        tar = pax(*records) + regular(b"bomb", b"0\n".ljust(512, b"\0"))
    else:
        last = ((b"GNU.sparse.map", b""),) if format == "0.1" else ()
        tar = pax((b"GNU.sparse.size", number), (b"GNU.sparse.numblocks", b"0"), *last) + header(b"bomb")
    assert [member.size for member in TarReader(io.BytesIO(tar + END), SMALL)] == [size]
    found = refused(tar + END)
    assert "more than 10485760 bytes of files" in found.message
    assert found.store.taken == 0


def test_many_files_together_stop_at_the_limit() -> None:
    tar = b"".join(regular(b"f%d" % i, bytes(MIB)) for i in range(11)) + END
    found = refused(tar, Limits(image_unpacked=10 * MIB))
    assert "more than 10485760 bytes" in found.message
    assert found.store.taken <= 10 * MIB


@pytest.mark.parametrize("name", [b"f%d", b".wh.f%d", b".wh..wh.plnk/%d", b"same%.0d"])
def test_a_flood_of_entries_stops_at_the_limit_whatever_they_are(name: bytes) -> None:
    stream = Chain(header(name % i) for i in itertools.count(1))
    assert "more than 1000 entries" in refused(stream).message
    assert stream.taken < 10 * MIB


def test_a_flood_of_empty_gzip_members_ends_with_its_blob() -> None:
    blob = gzip.compress(b"", mtime=0) * 30_000 + gzip.compress(END, mtime=0)
    named = layer_of(blob, END, OCI_LAYER + "+gzip")
    started = time.monotonic()
    assert layer.read(io.BytesIO(blob), named, MemoryStore(), Policy(), SMALL).entries == ()
    assert time.monotonic() - started < 10


# Extension headers.


@pytest.mark.parametrize("flag", [b"x", b"g", b"L", b"K"])
def test_an_extension_header_beyond_the_limit_is_refused_before_it_is_read(flag: bytes) -> None:
    value = b"v" * (MIB - 20)
    just = record(b"comment", value + b"v" * (MIB - len(record(b"comment", value))))
    assert len(just) == MIB
    if flag in b"xg":
        assert len(read(regular(b"x", just, flag=flag) + header() + END)) == 1
    malformed(header(b"x", flag=flag, size=MIB + 1, magic=GNU), "of 1048577 bytes .the limit is 1048576")
    malformed(header(b"x", flag=flag, size=b"\x80" + (1 << 62).to_bytes(11, "big"), magic=GNU), "the limit is")


@pytest.mark.parametrize("flag", [b"x", b"g", b"L", b"K"])
def test_a_chain_of_extension_headers_without_end_is_refused(flag: bytes) -> None:
    body = record(b"comment", b"c") if flag in b"xg" else b"name"
    stream = Chain(itertools.repeat(regular(b"x", body, flag=flag, magic=GNU)))
    with pytest.raises(ImageError, match="more than 16 headers that describe one member"):
        list(TarReader(stream, SMALL))
    assert stream.taken < MIB


@pytest.mark.parametrize("end", [b"", bytes(512), END])
@pytest.mark.parametrize("flag", [b"x", b"L", b"K"])
def test_an_extension_header_without_a_member_is_refused(flag: bytes, end: bytes) -> None:
    body = record(b"path", b"p") if flag == b"x" else b"p"
    malformed(header() + regular(b"x", body, flag=flag, magic=GNU) + end, "but no member")


def test_global_headers_cannot_pile_up() -> None:
    def attack() -> Iterator[bytes]:
        for i in range(1000):
            yield pax((b"SCHILY.xattr.user.%d" % i, bytes(50_000)), flag=b"g") + header(b"f%d" % i)

    found = refused(Chain(attack()), Limits())
    assert "global pax headers beyond the limit" in found.message
    assert found.memory < 16 * MIB


@pytest.mark.parametrize("key", [b"path", b"linkpath", b"size", b"GNU.sparse.name", b"GNU.sparse.realsize"])
def test_a_global_header_cannot_name_or_size_all_members(key: bytes) -> None:
    malformed(pax((key, b"1"), flag=b"g") + header() + END, "a global header that sets")


@pytest.mark.parametrize(
    "data",
    [
        b"5 a=b\n",
        b"7 a=b\n",
        b"6 a=bX",
        b"-6 a=b\n",
        b"6_ a=b\n",
        b" 6 a=b\n",
        b"999999999999 a=b\n",
        b"99999999 a=b\n",
        b"5 ab\n",
        b"5 =b\n",
        b"0 a=b\n",
        b"3 \n",
        b"6 a=b\ngarbage",
        b"6",
    ],
)
def test_malformed_pax_records_are_refused(data: bytes) -> None:
    malformed(regular(b"x", data, flag=b"x") + header() + END, "malformed pax record")


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        (b"path", b"a\0b", "NUL"),
        (b"linkpath", b"a\0b", "NUL"),
        (b"pa\0th", b"a", "NUL"),
        (b"SCHILY.xattr.", b"a", "extended attribute"),
        (b"SCHILY.xattr.a\0b", b"a", "NUL"),
        (b"LIBARCHIVE.xattr.a%00b", b"YQ", "NUL"),
        (b"LIBARCHIVE.xattr.a", b"***", "not base64"),
        (b"size", b"-1", "size is"),
        (b"size", b"1" * 30, "size is"),
        (b"size", b"9" * 20, "a size of"),
        (b"size", b"0x10", "size is"),
        (b"size", b"1_0", "size is"),
        (b"uid", b"-1", "uid is"),
        (b"uid", b"4294967295", "uid is"),
        (b"gid", b"9" * 20, "gid is"),
        (b"mtime", b"now", "mtime is"),
        (b"mtime", b"1e400", "mtime is"),
        (b"mtime", b"nan", "mtime is"),
        (b"mtime", b"--1", "mtime is"),
        (b"mtime", b"1.-5", "mtime is"),
        (b"mtime", "١".encode(), "mtime is"),
    ],
)
def test_pax_values_that_make_no_sense_are_refused(key: bytes, value: bytes, match: str) -> None:
    flag = b"2" if key == b"linkpath" else b"0"
    malformed(pax((key, value)) + header(flag=flag, link=b"x") + END, match)


def test_a_pax_size_that_lies_is_noticed() -> None:
    malformed(pax((b"size", b"100000")) + regular(b"f", b"abc") + END, "ends inside the content")
    malformed(pax((b"size", b"0")) + regular(b"f", b"abc") + END, "checksum")


# Headers.


@pytest.mark.parametrize(
    "size",
    [
        b"-0000000001\0",
        b"\xff" * 12,
        b"\x80" + b"\xff" * 11,
        b"\x80" + (1 << 63).to_bytes(11, "big"),
        b"00000000008\0",
        b"0o000000017\0",
        b"0_000000001\0",
        b"garbage\0\0\0\0\0",
        b"+0000000001\0",
    ],
)
def test_sizes_that_make_no_sense_are_refused(size: bytes) -> None:
    malformed(header(b"f", size=size, magic=GNU) + END, "size")
    malformed(header(b"L", size=size, flag=b"L", magic=GNU) + END, "size|limit")


@pytest.mark.parametrize("field", ["uid", "gid"])
def test_owners_that_no_system_has_are_refused(field: str) -> None:
    for value in (b"\xff" * 8, b"\x80" + b"\xff" * 7, b"\x80\0\0\0" + b"\xff" * 4):
        malformed(header(b"f", magic=GNU, **{field: value}) + END, f"{field} is")


@pytest.mark.parametrize("field", ["uid", "gid"])
def test_a_number_that_passed_as_a_mode_is_no_owner_for_that(field: str) -> None:
    large = b"\x80" + b"\xff" * 7
    first = header(b"a", magic=GNU) + header(b"b", magic=GNU, mode=large)
    malformed(first + header(b"c", magic=GNU, **{field: large}) + END, f"{field} is")


def test_times_and_modes_of_any_number_do_no_harm() -> None:
    [(member, _)] = read(header(b"f", magic=GNU, mtime=b"\x80" + b"\xff" * 11, mode=b"\xff" * 8) + END)
    assert (member.mtime_ns, member.mode) == (0, 0o7777)


def test_device_numbers_of_any_size_are_refused() -> None:
    malformed(header(b"f", flag=b"3", major=b"\xff" * 8) + END, "device number")
    malformed(header(b"f", flag=b"4", minor=b"\x80" + b"\xff" * 7) + END, "device number")


def test_a_wrong_checksum_is_refused() -> None:
    malformed(header(checksum=b"0000000\0") + END, "checksum")
    malformed(header(checksum=b"garbage\0") + END, "checksum")
    malformed(regular(b"a", b"x" * 600) + b"not a header".ljust(512) + END, "checksum")
    # Off by what the fast sum is computed modulo.
    block = header("é".encode() * 50, link=b"\xff" * 100, prefix=b"\xff" * 155, rest=b"\xff" * 167)
    total = sum(block[:148] + block[156:]) + 256
    assert total > 65_521
    wrong = b"%06o\0 " % (total - 65_521)
    malformed(header("é".encode() * 50, link=b"\xff" * 100, rest=b"\xff" * 167, checksum=wrong) + END, "checksum")


def test_the_header_behind_an_extension_has_its_checksum_verified_too() -> None:
    malformed(pax((b"path", b"p")) + header(checksum=b"0000000\0") + END, "checksum")


@pytest.mark.parametrize("flag", [b"V", b"M", b"D", b"N", b"X", b"A", b"8", b"9", b"\xff", b" "])
def test_a_member_of_unknown_type_is_refused(flag: bytes) -> None:
    malformed(header(flag=flag) + END, "unknown type")


def test_a_sparse_member_needs_gnus_own_header() -> None:
    malformed(header(flag=b"S") + END, "unknown type")


def test_a_member_without_a_name_is_refused() -> None:
    malformed(header(b"") + END, "without a name")
    malformed(header(b"", magic=OLD) + END, "without a name")


@pytest.mark.parametrize("cut", [1, 511, 513, 700, 1023, 1025, 1536 + 100])
def test_a_truncated_archive_is_refused(cut: int) -> None:
    tar = regular(b"f", b"x" * 600) + header(b"g")
    malformed(tar[:cut], "ends inside")


def test_one_zero_block_in_the_middle_is_refused() -> None:
    malformed(header(b"a") + bytes(512) + header(b"b") + END, "one zero block")


# Sparse maps.


def _sparse(size: int, *numbers: int, data: bytes = b"") -> bytes:
    text = ",".join(map(str, numbers)).encode()
    records = (b"GNU.sparse.size", b"%d" % size), (b"GNU.sparse.numblocks", b"%d" % (len(numbers) // 2))
    return pax(*records, (b"GNU.sparse.map", text)) + regular(b"f", data) + END


def test_sparse_maps_that_lie_are_refused() -> None:
    assert [content for _, content in read(_sparse(10, 2, 3, data=b"abc"))] == [b"\0\0abc\0\0\0\0\0"]
    malformed(_sparse(10, 5, 3, 2, 3, data=b"abcdef"), "out of order")
    malformed(_sparse(10, 0, 5, 4, 1, data=b"abcdef"), "out of order")
    malformed(_sparse(10, 8, 3, data=b"abc"), "beyond the size")
    malformed(_sparse(10, 0, 4, data=b"abc"), "at odds with the data")
    malformed(_sparse(10, 0, 2, data=b"abc"), "at odds with the data")
    malformed(_sparse(10, 0, data=b"abc"), "another length")
    malformed(pax((b"GNU.sparse.size", b"5"), (b"GNU.sparse.map", b"0,x")) + header() + END, "is")
    malformed(pax((b"GNU.sparse.map", b"0,0")) + header() + END, "without its real size")
    malformed(pax((b"GNU.sparse.size", b"5"), (b"GNU.sparse.numbytes", b"1")) + header() + END, "malformed sparse map")
    version = (b"GNU.sparse.major", b"2"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.realsize", b"0")
    malformed(pax(*version) + header() + END, "is not known")


@pytest.mark.parametrize("start", [b"9999999\n", b"1\n", b"x\n", b"-1\n", b"1" * 600])
def test_a_leading_sparse_map_that_lies_is_refused(start: bytes) -> None:
    records = (b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.realsize", b"5")
    malformed(pax(*records) + regular(b"f", start + bytes(512)) + END, "sparse|segments")
    endless = pax(*records) + header(b"f", size=b"\x80" + (1 << 40).to_bytes(11, "big"))
    stream = Chain(itertools.chain([endless, b"99999999\n".ljust(512, b"0")], itertools.repeat(b"0\n" * 256)))
    with pytest.raises(ImageError, match="sparse map"):
        list(TarReader(stream, SMALL))
    assert stream.taken < 2 * MIB


def test_a_chain_of_sparse_blocks_without_end_is_refused() -> None:
    head = header(b"f", flag=b"S", magic=GNU, rest=bytes(41) + bytes(96) + b"\1")
    stream = Chain(itertools.chain([head], itertools.repeat(bytes(504) + b"\1" + bytes(7))))
    with pytest.raises(ImageError, match="a sparse map beyond 1048576 bytes"):
        list(TarReader(stream, SMALL))
    assert stream.taken < 2 * MIB
    malformed(head, "ends inside a sparse map")


# Paths.


@pytest.mark.parametrize("path", ["..", "../x", "a/../../x", "/../etc/passwd", "a/b/../../../c", "./.."])
def test_what_would_leave_the_root_is_refused(path: str) -> None:
    assert "leaves the root" in refused(images.layer(images.file(path))).message
    assert "leaves the root" in refused(images.layer(images.directory(path))).message
    assert "leaves the root" in refused(images.layer(images.hardlink("link", path))).message


def test_names_and_paths_end_where_file_systems_do() -> None:
    name = "n" * 255
    path = "/".join(["d" * 255] * 15 + ["e" * 254, "f"])
    assert len(path) == 4096 - 1 + 1
    good = [name, "é" * 127, path[1:]]
    tar = images.layer(*(images.file(p) for p in good))
    named = layer_of(tar, tar)
    assert [e.path for e in layer.read(io.BytesIO(tar), named, MemoryStore(), Policy(), SMALL).entries] == good
    for bad in (name + "n", "a/" + name + "n/b", "é" * 128):
        assert "name of more than 255 bytes" in refused(images.layer(images.file(bad))).message
    for bad in (path, path + "g", "é/" * 2000, "a/" * 400_000):
        assert "longer than 4095 bytes" in refused(images.layer(images.file(bad))).message
        assert "longer than 4095 bytes" in refused(images.layer(images.hardlink("x", bad))).message


@pytest.mark.parametrize("target", ["", "t" * 4096, "é" * 2048])
def test_symlink_targets_that_no_system_takes_are_refused(target: str) -> None:
    tar = images.layer(images.symlink("link", target)) if target else header(b"link", flag=b"2") + END
    assert "symbolic link to nothing, or to more" in refused(tar).message


def test_the_longest_symlink_target_is_accepted() -> None:
    tar = images.layer(images.symlink("link", "t" * 4095))
    [entry] = layer.read(io.BytesIO(tar), layer_of(tar, tar), MemoryStore(), Policy(), SMALL).entries
    assert len(entry.target) == 4095


@pytest.mark.parametrize("member", [images.file("."), images.symlink("./", "x"), images.fifo("/"), images.file("a/..")])
def test_a_root_that_is_no_directory_is_refused(member: images.Member) -> None:
    assert "the root is no directory" in refused(images.layer(member)).message


@pytest.mark.parametrize("target", [".", "/", ".wh.x", "a/.wh.x", ".wh..wh.plnk/1.2", "a/.wh..wh..opq"])
def test_a_hard_link_to_what_no_layer_holds_is_refused(target: str) -> None:
    assert "hard link" in refused(images.layer(images.hardlink("link", target))).message


@pytest.mark.parametrize("name", [".wh.", "a/.wh.", ".wh..", ".wh...", "a/.wh...", ".wh.a/b", "a/.wh.b/c/d"])
def test_whiteouts_of_nothing_and_below_whiteouts_are_refused(name: str) -> None:
    assert "not a valid whiteout" in refused(images.layer(images.file(name))).message


# Extended attributes, and all that is held in memory.


def test_extended_attributes_that_no_system_takes_are_refused() -> None:
    for key, value in ((b"user." + b"n" * 251, b""), (b"user.a", bytes(65_537))):
        tar = pax((b"SCHILY.xattr." + key, value)) + header() + END
        assert "extended attribute that no system takes" in refused(tar).message
    for key, value in ((b"user." + b"n" * 250, b""), (b"user.a", bytes(65_536)), (b"trusted.dropped", bytes(100_000))):
        tar = pax((b"SCHILY.xattr." + key, value)) + header() + END
        assert layer.read(io.BytesIO(tar), layer_of(tar, tar), MemoryStore(), Policy(), SMALL).entries


@pytest.mark.parametrize(
    "member",
    [
        pax((b"SCHILY.xattr.user.a", bytes(60_000))) + header(),
        pax((b"path", b"long/" * 800)) + header(),
        pax((b"linkpath", b"l" * 4000)) + header(flag=b"2"),
        pax((b"linkpath", b"long/" * 800)) + header(flag=b"1"),
        pax((b"path", b"long/" * 700 + b".wh.x")) + header(),
        pax((b"path", b".wh..wh.plnk/" + b"long/" * 700)) + header(),
    ],
)
def test_a_flood_of_metadata_stops_at_the_limit(member: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "METADATA_BYTES", 1 << 17)
    stream = Chain(itertools.repeat(member))
    assert "more than 131072 bytes of names and extended attributes" in refused(stream, Limits()).message
    assert stream.taken < 4 * MIB


# Damage, with digests that say so or do not.


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
def test_a_truncated_layer_is_refused_even_if_its_blob_digest_is_right(kind: str) -> None:
    blob = images.compress(images.layer(images.file("f", b"x" * 100_000)), kind)
    for cut in (len(blob) - 1, len(blob) // 2, 12):
        assert "damaged" in (message := refused(blob[:cut], SMALL, f"+{kind}").message) or "early" in message


def test_a_wrong_gzip_checksum_or_length_is_refused() -> None:
    blob = bytearray(gzip.compress(END))
    for where in (-1, -5):
        damaged = blob.copy()
        damaged[where] ^= 1
        assert "damaged gzip data" in refused(bytes(damaged), SMALL, "+gzip").message


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
def test_garbage_behind_the_compressed_data_is_refused(kind: str) -> None:
    blob = images.compress(END, kind)
    for garbage in (b"x", b"garbage" * 1000, bytes(100) + b"x"):
        refused(blob + garbage, SMALL, f"+{kind}")


@pytest.mark.parametrize("change", [-1, 1])
def test_a_blob_of_another_size_than_its_descriptor_says_is_an_integrity_error(change: int) -> None:
    blob = gzip.compress(END)
    named = layer_of(blob, END, OCI_LAYER + "+gzip")
    stream = VerifiedReader(io.BytesIO(blob), named.descriptor.digest, len(blob) + change, "blob")
    with pytest.raises(IntegrityError):
        layer.read(stream, named, MemoryStore(), Policy(), SMALL)

"""The tar reader reads every format in use, byte for byte as `tarfile` and GNU tar write them."""

from __future__ import annotations

import io
import os
import random
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import images
from tests.raw_tar import END, GNU, OLD, header, pax, read, regular
from unpacker.changeset import Kind
from unpacker.errors import ImageError
from unpacker.limits import Limits
from unpacker.tar.reader import TarReader

# Literal archives.


def test_a_plain_member_has_all_its_metadata() -> None:
    data = images.layer(
        images.file("etc/motd", b"hello", mode=0o4755, uid=7, gid=8, mtime=1234), format=tarfile.USTAR_FORMAT
    )
    [(member, content)] = read(data)
    assert content == b"hello"
    assert member == ("etc/motd", Kind.FILE, 0o4755, 7, 8, 1234 * 10**9, 5, "", (0, 0), ())


def test_every_type_of_the_specification_is_read() -> None:
    data = images.layer(
        images.directory("d"),
        images.symlink("s", "../x"),
        images.hardlink("h", "d/x"),
        images.device("c", 1, 3),
        images.device("b", 8, 1, block=True),
        images.fifo("p"),
    )
    found = [(m.path.rstrip("/"), m.kind, m.target, m.device) for m, _ in read(data)]
    assert found == [
        ("d", Kind.DIRECTORY, "", (0, 0)),
        ("s", Kind.SYMLINK, "../x", (0, 0)),
        ("h", Kind.HARDLINK, "d/x", (0, 0)),
        ("c", Kind.CHARACTER, "", (1, 3)),
        ("b", Kind.BLOCK, "", (8, 1)),
        ("p", Kind.FIFO, "", (0, 0)),
    ]


def test_a_ustar_prefix_is_the_front_of_the_path() -> None:
    [(member, _)] = read(header(b"b" * 100, prefix=b"a" * 155) + END)
    assert member.path == "a" * 155 + "/" + "b" * 100


@pytest.mark.parametrize("version", [b"00", b"  ", b"\0\0"])
def test_what_version_of_ustar_a_header_claims_does_not_matter(version: bytes) -> None:
    [(member, _)] = read(header(b"name", prefix=b"front", magic=b"ustar\0" + version) + END)
    assert member.path == "front/name"


def test_a_prefix_of_star_ends_before_its_times() -> None:
    times = b"14722310345 14722310345 "
    [(member, _)] = read(header(b"name", prefix=b"p" * 131, rest=b"p" * 131 + times + b"\0" * 8 + b"tar\0") + END)
    assert member.path == "p" * 131 + "/name"


def test_a_header_of_gnu_has_times_where_others_have_the_prefix_but_for_those_of_old_go() -> None:
    times = b"14722310345\0" * 2
    [(member, _)] = read(header(b"name", magic=GNU, rest=times) + END)
    assert member.path == "name"
    # Go's own fixture invalid-go17.tar: before 1.8 it wrote a prefix into headers that it marked as GNU's.
    [(member, _)] = read(header(b"name", magic=GNU, prefix=b"a" * 100 + b"/" + b"b" * 54) + END)
    assert member.path == "a" * 100 + "/" + "b" * 54 + "/name"
    [(member, _)] = read(header(b"name", magic=GNU, prefix=b"\xe4" + b"a" * 100) + END)
    assert member.path == "name", "no ASCII, and no times: nobody wrote that"


def test_an_old_header_has_no_prefix_and_a_final_slash_makes_a_directory() -> None:
    data = header(b"d/", flag=b"\0", magic=OLD, prefix=b"not a prefix") + header(b"f", flag=b"\0", magic=OLD) + END
    assert [(m.path, m.kind) for m, _ in read(data)] == [("d/", Kind.DIRECTORY), ("f", Kind.FILE)]


def test_contiguous_files_are_files() -> None:
    [(member, content)] = read(regular(b"f", b"abc", flag=b"7") + END)
    assert (member.kind, content) == (Kind.FILE, b"abc")


def test_numbers_may_be_padded_with_blanks_or_missing() -> None:
    [(member, _)] = read(header(b"f", mode=b"   644 \0", uid=b"        ", gid=bytes(8), mtime=b"  17  \0     ") + END)
    assert (member.mode, member.uid, member.gid, member.mtime_ns) == (0o644, 0, 0, 15 * 10**9)


def test_base_256_numbers_are_read_negative_times_too() -> None:
    uid = b"\x80" + (3_000_000_000).to_bytes(7, "big")
    mtime = (-5).to_bytes(12, "big", signed=True)
    [(member, content)] = read(
        header(b"f", uid=uid, mtime=mtime, magic=GNU, size=b"\x80" + (3).to_bytes(11, "big")) + b"abc".ljust(512) + END
    )
    assert (member.uid, member.mtime_ns, content) == (3_000_000_000, -5 * 10**9, b"abc")


def test_a_checksum_of_signed_bytes_is_right_too() -> None:
    block = header("é".encode())
    signed = sum(b - 256 if b > 127 else b for b in block[:148] + block[156:]) + 256
    [(member, _)] = read(header("é".encode(), checksum=b"%06o\0 " % signed) + END)
    assert member.path == "é"


def test_gnu_long_names_and_links_belong_to_the_next_member_only() -> None:
    name, target = b"n" * 3000, b"t" * 2000
    data = regular(b"././@LongLink", name + b"\0", flag=b"L", magic=GNU)
    data += regular(b"././@LongLink", target + b"\0", flag=b"K", magic=GNU)
    data += header(b"short", flag=b"2", link=b"cut", magic=GNU) + header(b"next", magic=GNU) + END
    (first, _), (second, _) = read(data)
    assert (first.path, first.target) == (name.decode(), target.decode())
    assert (second.path, second.target) == ("next", "")


def test_pax_records_win_over_the_header() -> None:
    data = pax(
        (b"path", "ü/\udcff".encode("utf-8", "surrogateescape")),
        (b"uid", b"4000000000"),
        (b"gid", b"12"),
        (b"size", b"3"),
        (b"mtime", b"-1.5"),
    )
    [(member, content)] = read(data + header(b"cut", size=0) + b"abc".ljust(512) + END)
    assert (member.path, member.uid, member.gid, member.size) == ("ü/\udcff", 4_000_000_000, 12, 3)
    assert (member.mtime_ns, content) == (-1_500_000_000, b"abc")


def test_pax_applies_to_one_member_and_an_empty_value_takes_a_record_back() -> None:
    data = pax((b"mtime", b"7"), (b"path", b"")) + header(b"a") + header(b"b") + END
    assert [(m.path, m.mtime_ns) for m, _ in read(data)] == [("a", 7 * 10**9), ("b", 0)]


@pytest.mark.parametrize(
    ("text", "nanoseconds"),
    [
        (b"1600000000.123456789", 1_600_000_000_123_456_789),
        (b"1600000000.1234567899", 1_600_000_000_123_456_789),
        (b"0.1", 100_000_000),
        (b"-0.000000001", -1),
        (b"3.", 3_000_000_000),
        (b"99999999999999999999", 0),
        (b"-62135596800", 0),
    ],
)
def test_times_are_exact_to_the_nanosecond(text: bytes, nanoseconds: int) -> None:
    [(member, _)] = read(pax((b"mtime", text)) + header() + END)
    assert member.mtime_ns == nanoseconds


def test_xattrs_are_bytes_and_libarchive_spells_them_otherwise() -> None:
    data = pax(
        (b"SCHILY.xattr.user.b", b"\x00\xff\n=1 x=y\n"),
        (b"SCHILY.xattr.user.%3D", b"equals"),
        (b"LIBARCHIVE.xattr.user.a%20b", b"AAH/"),
        (b"LIBARCHIVE.xattr.user.b", b"AAAA"),
    )
    [(member, _)] = read(data + header() + END)
    assert member.xattrs == (("user.=", b"equals"), ("user.a b", b"\x00\x01\xff"), ("user.b", b"\x00\xff\n=1 x=y\n"))


def test_global_records_hold_until_changed_and_yield_to_a_members_own() -> None:
    data = pax((b"mtime", b"5"), (b"uid", b"9"), (b"comment", b"a commit"), flag=b"g") + header(b"a")
    data += pax((b"mtime", b"6")) + header(b"b") + pax((b"uid", b""), flag=b"g") + header(b"c") + END
    assert [(m.path, m.mtime_ns, m.uid) for m, _ in read(data)] == [
        ("a", 5 * 10**9, 9),
        ("b", 6 * 10**9, 9),
        ("c", 5 * 10**9, 0),
    ]


@pytest.mark.parametrize("end", [b"", bytes(512), bytes(1024), bytes(10240), END + b"garbage" * 1000])
def test_an_archive_may_end_in_several_ways_and_what_follows_is_read_and_ignored(end: bytes) -> None:
    assert [content for _, content in read(regular(b"f", b"abc") + end)] == [b"abc"]


@pytest.mark.parametrize("end", [b"", b"\0", b"\0" * 507])
def test_the_last_content_need_not_fill_its_block(end: bytes) -> None:
    """As in the layers of `umoci insert`; engines run them, because Go's reader takes that for an end."""
    data = header(b"f", size=5) + b"hello" + end
    assert [(member.path, content) for member, content in read(data)] == [("f", b"hello")]
    assert [member.path for member in TarReader(io.BytesIO(data), Limits(), "it")] == ["f"], "unread"


def test_no_bytes_at_all_are_no_members() -> None:
    assert read(b"") == []
    assert read(END) == []


def test_a_global_header_alone_is_no_member() -> None:
    assert read(pax((b"comment", b"x"), flag=b"g") + END) == []


def test_contents_need_not_be_read() -> None:
    data = b"".join(regular(b"f%d" % i, b"x" * (i * 700)) for i in range(100)) + END
    reader = TarReader(io.BytesIO(data), Limits())
    assert [member.path for member in reader] == [f"f{i}" for i in range(100)]


def test_a_content_may_be_read_in_part() -> None:
    reader = TarReader(io.BytesIO(regular(b"a", b"abcdef" * 1000) + regular(b"b", b"xyz") + END), Limits())
    starts = [reader.read(3) for _ in reader]
    assert starts == [b"abc", b"xyz"]


def test_pieces_of_any_size_give_the_same_members() -> None:
    data = pax((b"mtime", b"1.5")) + regular(b"a", b"abc" * 1000) + images.layer(images.file("é" * 120, b"x" * 600))
    whole = read(data)
    assert len(whole) == 2
    for piece in (1, 7, 511, 512, 513, 4096):
        assert read(data, piece=piece) == whole


# Against GNU tar.


def _sparse_file(path: Path, seed: int) -> bytes:
    """A file with many holes: more than fit into one header, and one at its end."""
    generator = random.Random(seed)
    with open(path, "wb") as file:
        offset = generator.randrange(2) * 8192
        for _ in range(generator.choice([1, 3, 4, 5, 30, 60])):
            file.seek(offset)
            file.write(generator.randbytes(generator.randrange(1, 9000)))
            offset = file.tell() + generator.randrange(20_000)
        file.truncate(offset + generator.randrange(50_000))
    return path.read_bytes()


@pytest.mark.parametrize(
    "options",
    [
        ["--format=gnu"],
        ["--format=pax", "--sparse-version=0.0"],
        ["--format=pax", "--sparse-version=0.1"],
        ["--format=pax", "--sparse-version=1.0"],
        ["--format=posix"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("piece", [None, 1000])
def test_sparse_files_of_gnu_tar_read_as_they_were(tmp_path: Path, options: list[str], piece: int | None) -> None:
    contents = {f"file{seed}": _sparse_file(tmp_path / f"file{seed}", seed) for seed in range(10)}
    contents["empty-hole"] = bytes(100_000)
    (tmp_path / "empty-hole").write_bytes(contents["empty-hole"])
    contents["after"] = b"not sparse"
    (tmp_path / "after").write_bytes(contents["after"])
    command = ["tar", "--create", "--sparse", "--hole-detection=raw", *options, "-C", str(tmp_path), *contents]
    data = subprocess.run(command, check=True, capture_output=True).stdout
    assert len(data) < sum(len(content) for content in contents.values()), "tar made nothing sparse"
    found = read(data, piece=piece)
    assert {member.path: content for member, content in found} == contents
    assert all(member.size == len(content) for member, content in found)


@pytest.mark.parametrize("format", ["v7", "oldgnu", "gnu", "ustar", "pax"])
def test_archives_of_gnu_tar_have_the_names_types_and_times_of_the_files(tmp_path: Path, format: str) -> None:
    directory = tmp_path / "directory"
    directory.mkdir()
    file = directory / "file"
    file.write_bytes(b"content")
    os.utime(file, ns=(0, 1_500_000_000_123_456_789))
    (directory / "link").symlink_to("file")
    os.link(file, directory / "twin")
    command = ["tar", "--create", f"--format={format}", "--sort=name", "-C", str(tmp_path), "directory"]
    found = [m for m, _ in read(subprocess.run(command, check=True, capture_output=True).stdout)]
    assert [(m.path, m.kind, m.target) for m in found] == [
        ("directory/", Kind.DIRECTORY, ""),
        ("directory/file", Kind.FILE, ""),
        ("directory/link", Kind.SYMLINK, "file"),
        ("directory/twin", Kind.HARDLINK, "directory/file"),
    ]
    assert found[1].mtime_ns == 1_500_000_000_123_456_789 if format == "pax" else 1_500_000_000 * 10**9


# Against tarfile.

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
KINDS = {
    tarfile.REGTYPE: Kind.FILE,
    tarfile.AREGTYPE: Kind.FILE,
    tarfile.CONTTYPE: Kind.FILE,
    tarfile.DIRTYPE: Kind.DIRECTORY,
    tarfile.SYMTYPE: Kind.SYMLINK,
    tarfile.LNKTYPE: Kind.HARDLINK,
    tarfile.CHRTYPE: Kind.CHARACTER,
    tarfile.BLKTYPE: Kind.BLOCK,
    tarfile.FIFOTYPE: Kind.FIFO,
}
_bytes = st.binary(min_size=1, max_size=40).map(lambda b: b.replace(b"\0", b"0").replace(b"/", b"1"))
_components = st.one_of(st.sampled_from(["a", "b", "usr", "é", "x" * 99, "y" * 155]), _bytes.map(os.fsdecode))
_names = st.lists(_components, min_size=1, max_size=6).map("/".join)


class Archive:
    """What tarfile wrote, and how many members it was given."""

    def __init__(self, data: bytes, written: int) -> None:
        self.data = data
        self.written = written

    def __repr__(self) -> str:
        # Shown by hypothesis when a test fails.
        with tarfile.open(fileobj=io.BytesIO(self.data), encoding="utf-8", errors="surrogateescape") as archive:
            return ascii([info.get_info() for info in archive.getmembers()])[:10_000]


@st.composite
def archives(draw: st.DrawFn) -> Archive:
    format = FORMATS[draw(st.sampled_from(sorted(FORMATS)))]
    large = 2**32 - 2 if format != tarfile.USTAR_FORMAT else 0o7777777
    buffer = io.BytesIO()
    written = 0
    with tarfile.open(fileobj=buffer, mode="w", format=format, encoding="utf-8", errors="surrogateescape") as archive:
        for _ in range(draw(st.integers(0, 6))):
            info = tarfile.TarInfo(draw(_names))
            info.type = draw(st.sampled_from(sorted(KINDS)))
            if info.type == tarfile.AREGTYPE and len(os.fsencode(info.name)) > 100:
                # Where the header cuts a long name behind a slash, tarfile takes such a file for a directory.
                info.type = tarfile.REGTYPE
            info.mode = draw(st.integers(0, 0o7777))
            info.uid, info.gid = draw(st.integers(0, large)), draw(st.integers(0, large))
            info.mtime = draw(st.integers(0, 8**11 - 1))
            data = b""
            if KINDS[info.type] is Kind.FILE:
                data = draw(st.one_of(st.binary(max_size=1500), st.integers(0, 3000).map(bytes)))
                info.size = len(data)
            elif KINDS[info.type] in (Kind.SYMLINK, Kind.HARDLINK):
                info.linkname = draw(_names)
            elif KINDS[info.type] in (Kind.CHARACTER, Kind.BLOCK):
                info.devmajor, info.devminor = draw(st.integers(0, 0o7777777)), draw(st.integers(0, 0o7777777))
            if format == tarfile.PAX_FORMAT:
                keys = st.text("abc.é", min_size=1, max_size=9).map("SCHILY.xattr.user.{}".format)
                xattrs = draw(st.dictionaries(keys, st.binary(max_size=60), max_size=3))
                info.pax_headers = {key: value.decode("utf-8", "surrogateescape") for key, value in xattrs.items()}
                if draw(st.booleans()):
                    nanoseconds = draw(st.integers(-(10**18), 10**18))
                    sign, (seconds, rest) = "-" * (nanoseconds < 0), divmod(abs(nanoseconds), 10**9)
                    info.pax_headers["mtime"] = f"{sign}{seconds}.{rest:09d}"
            try:
                archive.addfile(info, io.BytesIO(data))
                written += 1
            except ValueError:
                pass  # too long for ustar
    return Archive(buffer.getvalue(), written)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(archives(), st.sampled_from([None, 100, 512, 1000]))
def test_whatever_tarfile_writes_is_read_as_tarfile_reads_it(made: Archive, piece: int | None) -> None:
    data = made.data
    found = read(data, piece=piece)
    with tarfile.open(fileobj=io.BytesIO(data), encoding="utf-8", errors="surrogateescape") as archive:
        expected = archive.getmembers()
        assert len(found) == len(expected) == made.written
        for (member, content), info in zip(found, expected, strict=True):
            kind = KINDS[info.type]
            assert member.kind is kind
            assert member.path.rstrip("/") == info.name.rstrip("/")
            assert (member.mode, member.uid, member.gid) == (info.mode, info.uid, info.gid)
            assert member.target == (info.linkname if kind in (Kind.SYMLINK, Kind.HARDLINK) else "")
            if kind in (Kind.CHARACTER, Kind.BLOCK):
                assert member.device == (info.devmajor, info.devminor)
            text = info.pax_headers.get("mtime")
            if text is None:
                assert member.mtime_ns == info.mtime * 10**9
            else:
                seconds, _, rest = text.lstrip("-").partition(".")
                assert member.mtime_ns == (-1 if text[0] == "-" else 1) * (int(seconds) * 10**9 + int(rest))
            assert dict(member.xattrs) == {
                key.removeprefix("SCHILY.xattr."): value.encode("utf-8", "surrogateescape")
                for key, value in info.pax_headers.items()
                if key.startswith("SCHILY.xattr.")
            }
            file = archive.extractfile(info) if kind is Kind.FILE else None
            assert content == (file.read() if file is not None else b"")
            assert member.size == len(content)


def _with_checksum(block: bytes) -> bytes:
    total = sum(block[:148] + block[156:]) + 256
    return block[:148] + b"%06o\0 " % total + block[156:]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(archives(), st.data())
def test_a_damaged_archive_is_an_image_error_or_still_one(made: Archive, data: st.DataObject) -> None:
    damaged = bytearray(made.data)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(damaged) - 1))
        damaged[start : start + 1] = data.draw(st.binary(min_size=1, max_size=1))
        if data.draw(st.booleans()):
            # A header that is wrong under a checksum that is right.
            block = start - start % 512
            damaged[block : block + 512] = _with_checksum(bytes(damaged[block : block + 512]))
    if data.draw(st.booleans()):
        del damaged[data.draw(st.integers(0, len(damaged))) :]
    reader = TarReader(io.BytesIO(bytes(damaged)), Limits(pax_record=1 << 16))
    try:
        for member in reader:
            left = min(member.size, 1 << 20)
            while left > 0 and (piece := reader.read(1 << 16)):
                left -= len(piece)
    except ImageError:
        pass

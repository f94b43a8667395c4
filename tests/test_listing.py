"""The published tree as sorted lines, there and back; and no damage unnoticed."""

from __future__ import annotations

import json

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from unpacker.apply import apply
from unpacker.changeset import Changeset, Entry, Kind
from unpacker.listing import Row, listing, read
from unpacker.tree import EMPTY, Tree, walk

SHA = "ab" * 32


def tree_of(*entries: Entry) -> Tree:
    return apply(EMPTY, Changeset(diff_id="sha256:test", entries=entries))


TREE = tree_of(
    Entry("", Kind.DIRECTORY, 0o755, mtime_ns=1_600_000_000_123_456_789),
    Entry("bin/sh", Kind.FILE, 0o755, 1, 2, 3, 4, token=f"{SHA}.0123456789abcdef", xattrs=(("user.a", b"\x00\xff"),)),
    Entry("bin/bash", Kind.SYMLINK, 0o777, target="sh"),
    Entry("pipe", Kind.FIFO, 0o600),
    Entry("disk", Kind.BLOCK, 0o660, device=(8, 1)),
    Entry('caf\udce9 "quoted" \U0001f600\n', Kind.FILE, token=f"{SHA}.ffff"),
)


def lines(data: bytes) -> list[str]:
    return zstandard.ZstdDecompressor().decompress(data).decode("ascii").splitlines()


def packed(*rows: str) -> bytes:
    text = "".join(row + "\n" for row in ('["unpacker-listing", 1]', *rows))
    return zstandard.ZstdCompressor().compress(text.encode())


def test_a_listing_is_one_json_array_a_line_in_the_order_of_names() -> None:
    assert lines(listing(TREE)) == [
        '["unpacker-listing", 1]',
        '["","d",493,0,0,1600000000123456789,0,""]',
        '["bin","d",493,0,0,0,0,""]',
        '["bin/bash","l",511,0,0,0,0,"sh"]',
        f'["bin/sh","f",493,1,2,3,4,"{SHA}",{{"user.a": "00ff"}}]',
        f'["caf\\udce9 \\"quoted\\" \\ud83d\\ude00\\n","f",420,0,0,0,0,"{SHA}"]',
        '["disk","b",432,0,0,0,0,"8:1"]',
        '["pipe","p",384,0,0,0,0,""]',
    ]


def test_reading_gives_every_name_with_what_it_is() -> None:
    rows = list(read(listing(TREE)))
    assert [r.path for r in rows] == [path for path, _ in walk(TREE)]
    assert rows[3] == Row("bin/sh", "f", 0o755, 1, 2, 3, 4, SHA, (("user.a", b"\x00\xff"),))
    assert rows[2] == Row("bin/bash", "l", 0o777, 0, 0, 0, 0, "sh")
    assert rows[4].path == 'caf\udce9 "quoted" \U0001f600\n'


def test_the_same_tree_gives_the_same_bytes() -> None:
    other = tree_of(*(Entry(f"{i}", Kind.FILE) for i in range(9)))
    backwards = tree_of(*(Entry(f"{i}", Kind.FILE) for i in reversed(range(9))))
    assert listing(other) == listing(backwards)


_TEXT = st.binary(min_size=1, max_size=20).map(lambda b: b.decode("utf-8", "surrogateescape"))
_NAME = _TEXT.filter(lambda t: not set(t) & {"/", "\0"} and t not in (".", ".."))


@settings(deadline=None)
@given(
    names=st.lists(_NAME, min_size=1, max_size=5),
    target=_TEXT,
    value=st.binary(max_size=30),
    mtime_ns=st.integers(-(2**62), 2**62),
    uid=st.integers(0, 2**32),
)
def test_any_tree_is_read_back_as_written(names: list[str], target: str, value: bytes, mtime_ns: int, uid: int) -> None:
    path = "/".join(names)
    tree = tree_of(
        Entry(path, Kind.FILE, uid=uid, mtime_ns=mtime_ns, token="t.m", xattrs=((f"user.{names[0]}", value),)),
        Entry(path + "~", Kind.SYMLINK, 0o777, target=target),
    )
    rows = {r.path: r for r in read(listing(tree))}
    assert rows[path] == Row(path, "f", 0o644, uid, 0, mtime_ns, 0, "t", ((f"user.{names[0]}", value),))
    assert rows[path + "~"].content == target
    assert list(rows) == [p for p, _ in walk(tree)]


BIG = listing(tree_of(*(Entry(f"d{i % 7}/{i}", Kind.FILE, token=f"{i:064x}.x") for i in range(2_000))))


@pytest.mark.parametrize("kept", [0, 1, 5, len(BIG) // 2, len(BIG) - 5])
def test_a_listing_cut_short_is_noticed(kept: int) -> None:
    with pytest.raises(ValueError, match="listing"):
        list(read(BIG[:kept]))


@settings(deadline=None)
@given(place=st.integers(0, len(BIG) - 1), bit=st.integers(0, 7))
def test_a_flipped_bit_is_noticed_or_harmless(place: int, bit: int) -> None:
    """The frame carries a checksum; a bit that the format leaves unused changes nothing that is read."""
    damaged = bytearray(BIG)
    damaged[place] ^= 1 << bit
    try:
        rows = list(read(bytes(damaged)))
    except ValueError:
        return
    assert rows == list(read(BIG))


@pytest.mark.parametrize("tail", [b"x", b"trailing bytes", BIG])
def test_bytes_after_the_end_are_noticed(tail: bytes) -> None:
    with pytest.raises(ValueError, match="listing"):
        list(read(BIG + tail))


@pytest.mark.parametrize(
    "row",
    [
        "",
        "{}",
        "[]",
        "null",
        '["a","f",420,0,0,0,0]',
        '["a","x",420,0,0,0,0,""]',
        '["a","f","420",0,0,0,0,""]',
        '["a","f",420.0,0,0,0,0,""]',
        '["a","f",true,0,0,0,0,""]',
        '[1,"f",420,0,0,0,0,""]',
        '["a",["f"],420,0,0,0,0,""]',
        '["a","f",420,0,0,0,0,null]',
        '["a","f",420,0,0,0,0,"",{"user.a":"xy"}]',
        '["a","f",420,0,0,0,0,"",{"user.a":1}]',
        '["a","f",420,0,0,0,0,"",["user.a"]]',
        '["a","f",420,0,0,0,0,"",{},{}]',
        "[" * 100_000,
        '["a","f",420,0,0,0,0,"' + "\xff" + '"]extra',
        "9" * 5_000,
    ],
)
def test_a_line_that_is_no_entry_is_named(row: str) -> None:
    with pytest.raises(ValueError, match="line 2 of the listing"):
        list(read(packed(row)))


def test_another_version_is_refused() -> None:
    for head in ('["unpacker-listing", 2]', '["something"]', ""):
        with pytest.raises(ValueError, match="not a listing of this version"):
            list(read(zstandard.ZstdCompressor().compress((head + "\n").encode())))


def test_what_inflates_without_end_is_refused_in_bounded_memory() -> None:
    """200 MB of one line from a few kB: the reader stops at its bound for a line, not at the end of memory."""
    bomb = zstandard.ZstdCompressor().compress(b'["unpacker-listing", 1]\n' + b"[" * 200_000_000)
    assert len(bomb) < 100_000
    with pytest.raises(ValueError, match="longer than any entry"):
        list(read(bomb))


def test_a_frame_that_needs_a_huge_window_is_refused() -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=27)
    data = zstandard.ZstdCompressor(compression_params=parameters).compress(b"x" * (32 << 20))
    with pytest.raises(ValueError, match="listing"):
        list(read(data))


def test_every_line_is_json_that_other_tools_read() -> None:
    for line in lines(listing(TREE)):
        assert isinstance(json.loads(line), list)

"""One catalog: what goes in comes out, and nothing else is taken for one."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import struct

import pytest

from unpacker.cvmfs.catalog import Catalog, Nested
from unpacker.cvmfs.counters import NAMES, Counters, Tally
from unpacker.cvmfs.hash import ContentHash
from unpacker.cvmfs.row import Chunk, Row, decode_xattrs, device_number, device_of, encode_xattrs, key, tally
from unpacker.errors import PublishError

HASH = ContentHash(b"\x11" * 20)
ROOT = Row(2, None, 4096, 0o040755, 5, 6, 33, "p", "", 0, 0, None)
FILE = Row(1, b"\x22" * 20, 7, 0o100644, -5, None, 4, "f\udcff", "", 1, 2, b"\x01\x00")


def test_rows_chunks_and_references_come_back_as_they_were() -> None:
    with Catalog.create("/a/p", last_modified=9) as made:
        made.insert([(key(b"/a/p"), key(b"/a"), ROOT)])
        made.put("/a/p/f\udcff", FILE, [Chunk(0, 4, b"x" * 20), Chunk(4, 3, b"y" * 20)])
        made.attach("/a/p/n\udcff", Nested(HASH, 1024))
        made.counters = Counters(Tally(dir=1, regular=1), Tally(symlink=3))
        data = made.serialise()
    with Catalog.load(data, "it") as catalog:
        assert (catalog.prefix, catalog.revision, catalog.last_modified, catalog.size) == ("/a/p", 1, 9, len(data))
        assert catalog.row("/a/p") == ROOT
        assert catalog.children("/a/p") == [FILE]
        assert catalog.chunks("/a/p/f\udcff") == (Chunk(0, 4, b"x" * 20), Chunk(4, 3, b"y" * 20))
        assert catalog.nested("/a/p/n\udcff") == Nested(HASH, 1024)
        assert catalog.all_nested().keys() == {"/a/p/n\udcff"}
        assert catalog.counters == Counters(Tally(dir=1, regular=1), Tally(symlink=3))
        assert catalog.row("/a/p/other") is None
        assert catalog.nested("/a/p/other") is None


def test_a_path_key_is_the_md5_as_two_signed_numbers() -> None:
    assert key(b"") == struct.unpack("<qq", bytes.fromhex("d41d8cd98f00b204e9800998ecf8427e"))
    assert struct.pack("<qq", *key("/ü".encode())) == hashlib.md5(b"/\xc3\xbc").digest()


def test_all_24_counters_are_written() -> None:
    rows = dict(Counters(Tally(dir=2), Tally(file_size=3)).rows())
    assert len(rows) == 24
    assert (rows["self_dir"], rows["subtree_file_size"], rows["self_external_file_size"]) == (2, 3, 0)
    assert Counters.of(rows, "it") == Counters(Tally(dir=2), Tally(file_size=3))


@pytest.mark.parametrize("value", [None, -1, "many", 1.5])
def test_a_counter_that_is_missing_or_no_count_is_an_error(value: object) -> None:
    rows: dict[str, object] = dict(Counters().rows()) | {"subtree_chunks": value}
    with pytest.raises(PublishError, match="counter subtree_chunks"):
        Counters.of(rows, "it")  # type: ignore[arg-type]


def test_tallies_add_and_subtract_name_by_name() -> None:
    numbers = Tally(**{name: at for at, name in enumerate(NAMES)})
    assert numbers.plus(numbers).minus(numbers) == numbers
    assert numbers.plus(Tally(xattr=1)).xattr == numbers.xattr + 1


def test_each_row_counts_as_what_it_is() -> None:
    assert tally(FILE, 0) == Tally(regular=1, file_size=7, xattr=1)
    assert tally(FILE._replace(flags=68), 2) == Tally(
        regular=1, file_size=7, chunked=1, chunks=2, chunked_size=7, xattr=1
    )
    assert tally(FILE._replace(flags=132), 0) == Tally(
        regular=1, file_size=7, external=1, external_file_size=7, xattr=1
    )
    assert tally(ROOT._replace(flags=3), 0) == Tally(dir=1, nested=1)
    assert tally(ROOT._replace(flags=12), 0) == Tally(symlink=1)
    assert tally(ROOT._replace(flags=20), 0) == Tally(special=1)


@pytest.mark.parametrize("device", [(0, 0), (1, 3), (8, 1), (259, 70000), (2**32 - 1, 2**32 - 1)])
def test_device_numbers_are_linuxs_and_fit_a_signed_column(device: tuple[int, int]) -> None:
    number = device_number(*device)
    assert -(2**63) <= number < 2**63
    assert device_of(number) == device
    if number >= 0:
        assert number == os.makedev(*device)


def test_xattrs_have_the_form_of_the_format() -> None:
    assert encode_xattrs((("user.a", b"\xff"), ("user.b", b""))) == b"\x01\x02\x06\x01user.a\xff\x06\x00user.b"
    assert encode_xattrs(()) is None
    assert decode_xattrs(b"\x01\x02\x06\x01user.a\xff\x06\x00user.b") == (("user.a", b"\xff"), ("user.b", b""))


@pytest.mark.parametrize("blob", [b"", b"\x01", b"\x02\x00", b"\x01\x01", b"\x01\x00x", b"\x01\x01\x03\x00ab"])
def test_xattrs_of_another_form_are_refused(blob: bytes) -> None:
    with pytest.raises(PublishError, match="extended attributes"):
        decode_xattrs(blob)


def test_the_root_catalog_has_no_root_prefix() -> None:
    with Catalog.create("", last_modified=1) as made:
        made.insert([])
        assert "root_prefix" not in dict(_database(made.serialise()).execute("SELECT key, value FROM properties"))


def _database(data: bytes) -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:")
    connection.deserialize(data)
    return connection

"""The reference log: what it lists, its checksum, and what it is worth when it does not fit."""

from __future__ import annotations

import hashlib
import sqlite3

import pytest

from unpacker.cvmfs.hash import ContentHash
from unpacker.cvmfs.reflog import Kind, Ref, Reflog
from unpacker.errors import PublishError

NAME = "try.example.org"
ROOT = ContentHash.of(b"root")
HISTORY = ContentHash.of(b"history", "shake128")
REFS = (Ref(ROOT, Kind.CATALOG, 10), Ref(HISTORY, Kind.HISTORY, 11))


def edited(log: Reflog, statement: str) -> Reflog:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    connection.deserialize(log.data)
    connection.execute(statement)
    data = connection.serialize()
    connection.close()
    return Reflog(NAME, data)


def test_a_new_log_has_the_schema_of_the_official_tools_and_lists_nothing() -> None:
    connection = sqlite3.connect(":memory:")
    connection.deserialize(Reflog.create(NAME).data)
    properties = dict(connection.execute("SELECT key, value FROM properties"))
    connection.close()
    assert properties == {"schema": "1.0", "schema_revision": "0", "fqrn": NAME}
    assert Reflog.create(NAME).refs() == []


def test_what_is_added_is_listed_with_its_kind_and_time() -> None:
    log = Reflog.create(NAME).with_refs(REFS)
    assert log.refs() == list(REFS)
    assert log.lists(ROOT) and log.lists(HISTORY)
    assert not log.lists(ContentHash(HISTORY.digest)), "the algorithm is part of a hash"


def test_adding_again_sets_the_time_anew_and_lists_once() -> None:
    log = Reflog.create(NAME).with_refs(REFS).with_refs([Ref(ROOT, Kind.CATALOG, 99)])
    assert log.refs() == [REFS[1], Ref(ROOT, Kind.CATALOG, 99)]


def test_what_is_taken_out_is_gone_and_its_space_too() -> None:
    many = [Ref(ContentHash.of(b"%d" % i), Kind.CATALOG, i) for i in range(2000)]
    full = Reflog.create(NAME).with_refs(REFS).with_refs(many)
    less = full.without(ref.hash for ref in many)
    assert less.refs() == list(REFS)
    assert len(less.data) < len(full.data) / 10
    assert less.is_sound()


def test_the_checksum_is_of_the_file_in_the_algorithm_of_the_repository() -> None:
    log = Reflog.create(NAME)
    assert log.checksum("sha1").digest == hashlib.sha1(log.data).digest()
    assert log.checksum("shake128").hex.endswith("-shake128")


def test_the_same_steps_give_the_same_bytes() -> None:
    assert Reflog.create(NAME).with_refs(REFS).data == Reflog.create(NAME).with_refs(REFS).data


def test_only_a_log_that_can_be_read_to_its_last_row_is_sound() -> None:
    many = [Ref(ContentHash.of(b"%d" % i), Kind.CATALOG, i) for i in range(500)]
    log = Reflog.create(NAME).with_refs(many)
    assert log.is_sound()
    for spoiled in (
        log.data[: len(log.data) // 2],
        b"",
        log.data[:9000] + bytes(4096) + log.data[9000 + 4096 :],
    ):
        assert not Reflog(NAME, spoiled).is_sound()
    assert not Reflog("other.example.org", log.data).is_sound()


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("UPDATE refs SET type = 9", "damaged"),
        ("UPDATE refs SET hash = 'x'", "damaged"),
        ("UPDATE refs SET timestamp = NULL", "damaged"),
        ("UPDATE properties SET value = '1' WHERE key = 'schema_revision'", "upgrade unpacker"),
        ("UPDATE properties SET value = 'other.example.org' WHERE key = 'fqrn'", "not of try.example.org"),
        ("DROP TABLE refs", "lacks tables"),
        ("CREATE VIEW v AS SELECT 1", "more than tables"),
    ],
)
def test_a_log_that_is_not_understood_is_refused(statement: str, message: str) -> None:
    with pytest.raises(PublishError, match=message):
        edited(Reflog.create(NAME).with_refs([REFS[0]]), statement).refs()

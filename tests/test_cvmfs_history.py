"""The tag database: what every publish does to it, and what is left alone."""

from __future__ import annotations

import sqlite3

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unpacker.cvmfs.hash import ContentHash
from unpacker.cvmfs.history import History, Tag
from unpacker.errors import PublishError, SettingsError

NAME = "try.example.org"


def revision(number: int, name: str = "") -> Tag:
    root = ContentHash.of(b"root %d" % number)
    return Tag(name=name, root=root, root_size=1000 + number, revision=number, timestamp=10_000 + number)


def names(history: History) -> dict[str, int]:
    return {tag.name: tag.revision for tag in history.tags()}


def edited(history: History, statement: str) -> History:
    """As another program would have written it."""
    connection = sqlite3.connect(":memory:", isolation_level=None)
    connection.deserialize(history.data)
    connection.execute(statement)
    data = connection.serialize()
    connection.close()
    return History(NAME, data)


def rows(history: History, query: str) -> list[tuple[object, ...]]:
    connection = sqlite3.connect(":memory:")
    connection.deserialize(history.data)
    found = connection.execute(query).fetchall()
    connection.close()
    return found


def test_a_new_history_has_the_schema_and_the_one_branch_of_the_official_tools() -> None:
    fresh = History.create(NAME)
    assert dict(rows(fresh, "SELECT key, value FROM properties")) == {
        "schema": "1.0",
        "schema_revision": "3",
        "fqrn": NAME,
        "previous_revision": "0" * 40,
    }
    assert rows(fresh, "SELECT * FROM branches") == [("", None, 0)]
    assert rows(fresh, "SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name") == [
        ("branches",),
        ("properties",),
        ("recycle_bin",),
        ("tags",),
    ]
    assert fresh.tags() == [] and fresh.previous is None


def test_publishing_moves_trunk_and_what_it_was_becomes_trunk_previous() -> None:
    first = History.create(NAME).advanced(revision(1))
    assert names(first) == {"trunk": 1}
    third = first.advanced(revision(2)).advanced(revision(3))
    assert names(third) == {"trunk": 3, "trunk-previous": 2}
    assert rows(third, "SELECT name, hash, revision, timestamp, channel, description, size, branch FROM tags") == [
        ("trunk-previous", revision(2).root.hex, 2, 10_002, 0, "default undo target", 1002, ""),
        ("trunk", revision(3).root.hex, 3, 10_003, 0, "current HEAD", 1003, ""),
    ]


def test_named_tags_stay_where_they_are_until_moved_or_removed() -> None:
    tagged = History.create(NAME).advanced(revision(1)).with_tag(revision(1, "kept")).advanced(revision(2))
    assert names(tagged) == {"trunk": 2, "trunk-previous": 1, "kept": 1}
    assert tagged.tag("kept") == revision(1, "kept")
    assert names(tagged.with_tag(revision(2, "kept")))["kept"] == 2
    assert names(tagged.without("kept")) == {"trunk": 2, "trunk-previous": 1}
    with pytest.raises(PublishError, match="no tag 'kept'"):
        tagged.without("kept").without("kept")


@pytest.mark.parametrize("name", ["", "trunk", "trunk-previous", "a b", "a\nb", "a\x00b", "x" * 256])
def test_names_that_are_kept_for_trunk_or_that_tools_cannot_take_are_refused(name: str) -> None:
    history = History.create(NAME).advanced(revision(1))
    with pytest.raises(SettingsError, match="not a name for a tag"):
        history.with_tag(revision(1, name))
    with pytest.raises(SettingsError, match="not a name for a tag"):
        history.without(name)


def test_a_history_names_the_one_it_was_made_from() -> None:
    name = ContentHash.of(b"old", "shake128")
    assert History.create(NAME).following(name).previous == name


def test_changes_leave_the_history_they_started_from_alone() -> None:
    history = History.create(NAME).advanced(revision(1))
    before = history.data
    history.advanced(revision(2)).with_tag(revision(2, "t")).without("t")
    assert history.data == before


def test_branches_tags_and_tables_of_others_stay() -> None:
    history = edited(
        History.create(NAME).advanced(revision(1)),
        "INSERT INTO branches (branch, parent, initial_revision) VALUES ('side', '', 1)",
    )
    other = f"('their tag', '{'a' * 40}-rmd160', 1, 5, 4, 'from before', 7, 'side')"
    history = edited(history, f"INSERT INTO tags VALUES {other}")
    history = edited(history, f"INSERT INTO recycle_bin VALUES ('{'b' * 40}', 1)").advanced(revision(2))
    assert rows(history, "SELECT branch FROM branches ORDER BY branch") == [("",), ("side",)]
    assert rows(history, "SELECT channel FROM tags WHERE branch = 'side'") == [(4,)]
    assert rows(history, "SELECT count(*) FROM recycle_bin") == [(1,)]
    found = history.tag("their tag")
    assert found is not None and (found.root.algorithm, found.branch) == ("rmd160", "side")


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("UPDATE properties SET value = '4' WHERE key = 'schema_revision'", "upgrade unpacker"),
        ("UPDATE properties SET value = '2.0' WHERE key = 'schema'", "upgrade unpacker"),
        ("UPDATE properties SET value = 'x' WHERE key = 'schema'", "upgrade unpacker"),
        ("DELETE FROM properties", "upgrade unpacker"),
        ("UPDATE properties SET value = 'other.example.org' WHERE key = 'fqrn'", "'other.example.org', not of"),
        ("UPDATE tags SET hash = 'nonsense'", "not a content hash"),
        ("UPDATE tags SET revision = 'nonsense'", "malformed tag"),
        ("DROP TABLE tags", "lacks tables"),
        ("CREATE TRIGGER t AFTER INSERT ON tags BEGIN DELETE FROM tags; END", "more than tables"),
        ("CREATE VIEW v AS SELECT 1", "more than tables"),
    ],
)
def test_a_history_that_is_not_understood_is_refused(statement: str, message: str) -> None:
    history = edited(History.create(NAME).advanced(revision(1)), statement)
    with pytest.raises(PublishError, match=message):
        history.tags()


@pytest.mark.parametrize("data", [b"", b"rubbish", b"SQLite format 3\x00" + b"\xff" * 5000])
def test_bytes_that_are_no_database_are_refused(data: bytes) -> None:
    with pytest.raises(PublishError, match="damaged or something else"):
        History(NAME, data).tags()


def test_a_history_that_was_cut_short_is_refused() -> None:
    whole = History.create(NAME).advanced(revision(1)).data
    with pytest.raises(PublishError, match="damaged or something else"):
        History(NAME, whole[: len(whole) // 2]).tags()


@given(st.lists(st.sampled_from(["publish", "a", "b", "-a", "-b"]), max_size=12))
def test_any_sequence_of_publishes_and_tags_gives_what_a_plain_dictionary_gives(steps: list[str]) -> None:
    history, model, number = History.create(NAME).advanced(revision(1)), {"trunk": 1}, 1
    for step in steps:
        if step == "publish":
            number += 1
            history = history.advanced(revision(number))
            model |= {"trunk-previous": model["trunk"], "trunk": number}
        elif step.startswith("-"):
            if step[1:] in model:
                history = history.without(step[1:])
                del model[step[1:]]
        else:
            history = history.with_tag(revision(number, step))
            model[step] = number
    assert names(history) == model

"""Journal, cache, status and report: what is remembered, how it is shown, and that none of it is believed too much."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from unpacker import journal, report
from unpacker.cache import ChangesetCache, prune
from unpacker.changeset import Change, Changeset, Entry, Kind
from unpacker.digest import Digest
from unpacker.errors import RegistryError
from unpacker.image import Layer, Unresolved
from unpacker.journal import Journal
from unpacker.oci import OCI_LAYER, Descriptor, Platform
from unpacker.plan import Plan
from unpacker.record import Published, Unreadable
from unpacker.reference import Reference
from unpacker.status import Failure, State, status
from unpacker.wishlist import parse


def record(name: str, owner: str | None = "ours", published: int = 1000) -> Published:
    return Published(
        reference=Reference.parse(name),
        digest="sha256:" + "1" * 64,
        manifest_digest="sha256:" + "1" * 64,
        image_id="sha256:" + "2" * 64,
        platform=Platform(architecture="amd64"),
        root=".flat/22/" + "2" * 64,
        rules="r",
        wishlist=owner,
        published=published,
        size=1_234_567,
    )


WISHES = parse(b"version: 2\nimages:\n- r.org/a:1\n- r.org/b:*\n- r.org/c:x*\n", "w").wishes


def states(**known: object) -> dict[str, str]:
    rows = status(WISHES, **{"published": {}, "failures": {}, "vanished": {}, "expansions": {}, **known})  # type: ignore[arg-type]
    return {row.name: row.state.value for row in rows}


def test_before_any_run_every_wish_is_pending() -> None:
    assert states() == {"r.org/a:1": "pending", "r.org/b:*": "pending", "r.org/c:x*": "pending"}


def test_a_wildcard_whose_tags_could_not_be_listed_is_failing_and_nothing_besides() -> None:
    failures = {"r.org/b": Failure(since=1, last=2, error="no answer")}
    assert states(failures=failures) == {"r.org/a:1": "pending", "r.org/b": "failing", "r.org/c:x*": "pending"}


def test_what_fails_in_another_wishlist_is_shown_without_a_wishlist_only() -> None:
    failures = {"r.org/other:1": Failure(since=1, last=2, error="no answer")}
    assert "r.org/other:1" not in states(failures=failures)
    assert [(row.name, row.state) for row in status(None, {}, failures, {}, {})] == [("r.org/other:1", State.FAILING)]


def test_a_wildcard_is_what_its_last_run_saw() -> None:
    found = states(expansions={"r.org/b:*": ("1", "2")}, published={"r.org/b:1": record("r.org/b:1")})
    assert found["r.org/b:1"] == "published"
    assert found["r.org/b:2"] == "pending"
    assert "r.org/b:*" not in found


def test_failing_vanished_unreadable_and_unwished_are_told_apart() -> None:
    found = states(
        published={
            "r.org/a:1": record("r.org/a:1"),
            "r.org/b:old": record("r.org/b:old"),
            "r.org/b:odd": Unreadable("r.org/b:odd", "no record"),
            "r.org/z:1": record("r.org/z:1", owner=None),
        },
        failures={"r.org/a:1": Failure(since=1, last=2, error="no")},
        vanished={"r.org/b:old": 5},
    )
    assert found["r.org/a:1"] == "failing"
    assert found["r.org/b:old"] == "vanished"
    assert found["r.org/b:odd"] == "unreadable"
    assert found["r.org/z:1"] == "unwished"


def test_a_published_root_that_fails_to_update_is_shown_with_both() -> None:
    rows = status(
        WISHES, {"r.org/a:1": record("r.org/a:1")}, {"r.org/a:1": Failure(since=10, last=20, error="no")}, {}, {}
    )
    (row,) = [r for r in rows if r.name == "r.org/a:1"]
    assert (row.state, row.since, row.error) == (State.FAILING, 10, "no")
    assert row.published is not None


def test_the_journal_remembers_since_when_and_forgets_what_works_again() -> None:
    first = Journal().after(failed={"a": "x"}, vanished=frozenset({"v"}), expansions={}, seen=None, now=10)
    second = first.after(failed={"a": "y"}, vanished=frozenset({"v"}), expansions={}, seen=None, now=20)
    assert second.failures["a"] == Failure(since=10, last=20, error="y", times=2)
    assert second.vanished == {"v": 10}
    third = second.after(failed={}, vanished=frozenset(), expansions={}, seen=None, now=30)
    assert not third.failures
    assert not third.vanished


def test_a_partial_run_leaves_what_it_did_not_look_at_as_it_was_noted() -> None:
    whole = Journal().after(
        failed={"a": "x", "b": "x"}, vanished=frozenset({"v"}), expansions={"w": ("1",)}, seen=None, now=10
    )
    part = whole.after(failed={}, vanished=frozenset(), expansions={}, seen=frozenset({"a"}), now=20)
    assert set(part.failures) == {"b"}
    assert part.vanished == {"v": 10}
    assert part.expansions == {"w": ("1",)}


def test_what_could_not_be_asked_about_stays_as_it_was_noted() -> None:
    """Else one outage would forget since when a tag has failed, or how long ago it vanished."""
    before = Journal(
        failures={"reg/a:1": Failure(since=10, last=20, error="broken", times=2)},
        vanished={"reg/a:2": 15, "reg/b:1": 15},
    )
    after = before.after(
        failed={"reg/a": "no answer"},
        vanished=frozenset(),
        expansions={},
        seen=None,
        unknown=frozenset({"reg/a:1", "reg/a:2"}),
        now=30,
    )
    assert after.vanished == {"reg/a:2": 15}
    assert after.failures["reg/a:1"].since == 10 and after.failures["reg/a"].since == 30


def test_the_journal_survives_its_file_and_a_damaged_file_is_set_aside(tmp_path: Path) -> None:
    written = Journal().after(
        failed={"a\udcff": "x"}, vanished=frozenset(), expansions={"w": ("1",)}, seen=None, now=10
    )
    journal.store(str(tmp_path), written)
    assert journal.load(str(tmp_path)) == written
    (tmp_path / "journal.json").write_text('{"schema": 1, "failures": 3}')
    assert journal.load(str(tmp_path)) == Journal()
    assert (tmp_path / "journal.json.damaged").exists()


def test_every_target_has_its_own_state_directory() -> None:
    assert journal.directory("/s", "/srv/a") != journal.directory("/s", "/srv/b")
    assert journal.directory("/s", "/srv/a-b") != journal.directory("/s", "/srv/a/b")


CHANGESET = Changeset(
    diff_id="sha256:" + "3" * 64,
    entries=(
        Entry(
            "a\udcff", Kind.FILE, 0o644, 1, 2, -5, 3, token="t", xattrs=(("user.x", b"\x00\xff"),), change=Change.MODE
        ),
        Entry("d", Kind.CHARACTER, device=(1, 3)),
        Entry("l", Kind.SYMLINK, target="a"),
    ),
    whiteouts=("gone",),
    opaque=("",),
    size=10,
    content_size=3,
)
LAYER = Layer(descriptor=Descriptor(media_type=OCI_LAYER, digest=Digest.of(b"blob"), size=4), diff_id=CHANGESET.diff_id)


def test_a_changeset_comes_back_from_its_encoding_as_it_was() -> None:
    assert Changeset.decode(CHANGESET.encode()) == CHANGESET


def test_the_cache_gives_back_only_what_is_whole_and_of_the_same_rules(tmp_path: Path) -> None:
    cache = ChangesetCache(str(tmp_path), "r1")
    assert cache.get(LAYER) is None
    cache.put(LAYER, CHANGESET.encode())
    assert cache.get(LAYER) == CHANGESET
    assert ChangesetCache(str(tmp_path), "r2").get(LAYER) is None
    (path,) = tmp_path.rglob("*.changeset")
    path.write_bytes(path.read_bytes()[:-3])
    assert cache.get(LAYER) is None


def test_what_the_cache_has_not_used_for_long_is_pruned(tmp_path: Path) -> None:
    cache = ChangesetCache(str(tmp_path), "r1")
    cache.put(LAYER, CHANGESET.encode())
    assert prune(str(tmp_path), unused_for=1000) == 0
    (path,) = tmp_path.rglob("*.changeset")
    os.utime(path, (1, 1))
    assert prune(str(tmp_path), unused_for=1000) > 0
    assert cache.get(LAYER) is None


def test_the_table_has_the_digest_of_the_tag_short_and_the_json_has_it_whole() -> None:
    rows = status(None, {"r.org/a:1": record("r.org/a:1")}, {}, {}, {})
    (row,) = report.status_rows(rows, 2000)
    digest = record("r.org/a:1").digest
    assert dict(zip(report.STATUS_HEADER, row, strict=True))["DIGEST"] == digest.partition(":")[2][:12] != ""
    assert report.status_json(rows)[0]["published"]["digest"] == digest


def test_a_table_keeps_a_hostile_cell_on_its_line() -> None:
    text = report.table(("A", "B"), [("x\x1b[31m\ny", "z"), ("\udcff", "w")])
    assert len(text.splitlines()) == 3
    assert "\x1b" not in text


def test_markdown_lets_no_cell_become_markup() -> None:
    text = report.markdown(("A",), [("<img src=x> | `code` [a](javascript:b) @team",)])
    assert not set("<`[@") & set(text.splitlines()[2])
    assert text.splitlines()[2].count("|") == 2


def test_markdown_shows_what_a_name_is() -> None:
    table = report.markdown(("NAME",), [("a_b*c&d#e",)])
    assert "a&#95;b&#42;c&#38;d&#35;e" in table


def test_json_escapes_what_is_no_utf8() -> None:
    unresolved = Unresolved(
        repository=Reference.parse("r.org/a:1").repository, reference=None, error=RegistryError("odd \udcff")
    )
    text = report.as_json(report.plan_json(Plan(unresolved=(unresolved,))))
    assert text.isascii()
    assert json.loads(text)["unresolved"][0]["error"] == "odd \udcff"


def test_the_note_for_users_is_written_only_when_it_says_something_new() -> None:
    published = {"r.org/a:1": record("r.org/a:1")}
    failures = {"r.org/b:1": Failure(since=1, last=2, error="no")}
    first = report.status_note(None, "ours", published, failures, 10)
    assert first is not None
    later = {"r.org/b:1": Failure(since=1, last=99, error="no", times=50)}
    assert report.status_note(first, "ours", published, later, 100) is None
    assert report.status_note(first, "ours", published, {}, 100) is not None
    other = report.status_note(first, "theirs", published, {}, 100)
    assert other is not None
    assert set(json.loads(other)["wishlists"]) == {"ours", "theirs"}
    assert report.status_note(b"damaged", "ours", published, failures, 10) is not None


@pytest.mark.parametrize("error", ["of type }, ", 'of type "}, ', "of type \\", 'of type \\"}, ', "}, }, "])
def test_the_note_for_users_is_json_whatever_an_error_quotes(error: str) -> None:
    failures = {f"r.org/{name}:1": Failure(since=1, last=2, error=error) for name in "bc"}
    note = report.status_note(None, "ours", {"r.org/a:1": record("r.org/a:1")}, failures, 10)
    assert note is not None
    assert [one["error"] for one in json.loads(note)["wishlists"]["ours"]["failing"].values()] == [error] * 2


def test_sizes_and_ages_are_readable() -> None:
    assert [report.size(n) for n in (0, 999, 1_234_567, 5_000_000_000)] == ["0 B", "999 B", "1.2 MB", "5.0 GB"]
    assert [report.age(n) for n in (5, 600, 10_000, 500_000)] == ["5 s", "10 min", "2 h", "5 d"]

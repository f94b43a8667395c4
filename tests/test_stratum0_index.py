"""The index of a native repository: true of its revision or compared with the links, and a part of it per publish."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from tests.cvmfs_repositories import NAME as REPOSITORY
from tests.cvmfs_repositories import NOW, SWISSKNIFE, swissknife_check
from tests.publisher_contract import MTIME, NAME, OTHER, publish, release, stored
from tests.test_publish_stratum0 import edit_by_hand, revision
from unpacker.cvmfs.check import check
from unpacker.cvmfs.reader import Reader
from unpacker.cvmfs.repository import Repository
from unpacker.errors import PublishError
from unpacker.publish import index as indexes
from unpacker.publish.index import DIRECTORY, Line, Part
from unpacker.publish.snapshot import Snapshot
from unpacker.publish.stratum0 import Stratum0Publisher
from unpacker.publish.unreferenced import collect
from unpacker.record import Unreadable
from unpacker.tree import Symlink

Opened = Callable[[], Stratum0Publisher]
THIRD = "registry.example.org/other/tool:3.0"


pytestmark = pytest.mark.usefixtures("no_sync")


@pytest.fixture
def target(tmp_path: Path) -> Path:
    Repository.create(str(tmp_path / "repo"), REPOSITORY, now=NOW)
    return tmp_path / "repo"


@pytest.fixture
def opened(target: Path) -> Opened:
    return lambda: Stratum0Publisher(
        str(target), clock=lambda: NOW + 1000, spool_root="/nowhere", configuration="/nowhere"
    )


@pytest.fixture
def publisher(opened: Opened) -> Stratum0Publisher:
    return opened()


def sound(target: Path) -> None:
    found = check(str(target), now=NOW + 1000, hashes=True, spool_root="/nowhere", configuration="/nowhere")
    assert [str(problem) for problem in found] == []
    if SWISSKNIFE is not None:
        swissknife_check("-c", "-r", str(target))


def files(target: Path) -> dict[str, int]:
    """The files of the index by their names, and the sizes of them."""
    repository = Repository.open(str(target))
    with Reader(repository.objects, repository.manifest().root) as reader:
        return {found.path.rpartition("/")[2]: found.row.size for found in reader.children(f"/{DIRECTORY}")}


def is_settled(publisher: Stratum0Publisher) -> bool:
    with publisher.snapshot() as found:
        return found.is_settled


def a_file(publisher: Stratum0Publisher, data: bytes) -> Any:
    return stored(publisher, {"x": data}).root.children["x"]


class TestSettled:
    """The revision that the index is true of."""

    def test_after_each_publish_the_index_is_true_of_its_revision(self, publisher: Stratum0Publisher) -> None:
        publish(publisher, NAME, {"motd": b"one"})
        assert is_settled(publisher)
        publish(publisher, OTHER, {"motd": b"two"}, seed="2")
        assert is_settled(publisher)
        with publisher.transaction("remove") as transaction:
            transaction.remove([NAME], now=2000)
        assert is_settled(publisher)

    def test_a_settled_index_is_read_without_looking_at_links(
        self, publisher: Stratum0Publisher, opened: Opened, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        record = publish(publisher, NAME, {"motd": b"one"})

        def walked(snapshot: Snapshot) -> Any:
            raise AssertionError

        monkeypatch.setattr(Snapshot, "links", walked)
        assert opened().published() == {NAME: record}

    def test_what_others_changed_is_seen_and_the_next_publish_settles_it(
        self, publisher: Stratum0Publisher, opened: Opened, target: Path
    ) -> None:
        """A name removed, one moved, one added, one in place of which a file stands."""
        fourth = "registry.example.org/team/tool:4.0"
        for name, seed in ((NAME, "1"), (OTHER, "2"), (THIRD, "3"), (fourth, "4")):
            publish(publisher, name, {"motd": seed.encode()}, seed=seed)
        foreign = "other.example.org/x/y:1"
        edit_by_hand(
            publisher,
            {
                f"/{NAME}": None,
                f"/{OTHER}": Symlink(0o777, 0, 0, MTIME, (), "../../elsewhere"),
                f"/{foreign}": Symlink(0o777, 0, 0, MTIME, (), "../../.flat/aa/aabb"),
                f"/{fourth}": a_file(publisher, b"x"),
            },
        )
        before = opened().published()
        assert not is_settled(publisher)
        assert set(before) == {OTHER, THIRD, foreign, fourth}
        assert {path for path, found in before.items() if isinstance(found, Unreadable)} == {OTHER, foreign, fourth}
        new = publish(opened(), "registry.example.org/new/tool:1", {"motd": b"five"}, seed="5")
        assert is_settled(publisher)
        after = opened().published()
        assert after.keys() == before.keys() | {new.public_path}
        assert {path for path, found in after.items() if isinstance(found, Unreadable)} == {OTHER, foreign, fourth}
        again = publish(opened(), OTHER, {"motd": b"six"}, seed="6")
        assert opened().published()[OTHER] == again
        with opened().transaction("remove") as transaction:
            transaction.remove([foreign], now=2000)
        assert set(opened().published()) == {OTHER, THIRD, fourth, new.public_path}
        edit_by_hand(publisher, {"/note": a_file(publisher, b"x")})
        assert opened().published() == publisher.published()
        assert set(opened().published()) == {OTHER, THIRD, fourth, new.public_path}
        sound(target)

    def test_a_root_that_somebody_took_away_is_told_and_not_forgotten(
        self, publisher: Stratum0Publisher, opened: Opened, target: Path
    ) -> None:
        """By the official tools, in one transaction: the names that led to it lead to nothing."""
        gone = publish(publisher, NAME, {"motd": b"one"})
        publish(publisher, OTHER, {"motd": b"two"}, seed="2")
        edit_by_hand(publisher, {f"/{gone.root}": None})
        found = opened().published()
        assert opened().lost(found) == {NAME}
        assert opened().root(gone.image_id, gone.rules) is None
        publish(opened(), THIRD, {"motd": b"three"}, seed="3")
        assert is_settled(publisher)
        assert opened().published()[NAME] == gone, "whose it is must not be forgotten with it"
        assert opened().lost(opened().published()) == {NAME}
        assert publish(opened(), NAME, {"motd": b"one"}).root == gone.root
        assert opened().lost(opened().published()) == frozenset()
        sound(target)

    def test_roots_are_looked_for_without_opening_them(
        self, publisher: Stratum0Publisher, opened: Opened, target: Path
    ) -> None:
        """There are as many as images; and one that is damaged must not keep the others from being published."""
        broken = publish(publisher, NAME, {"motd": b"one"})
        publish(publisher, OTHER, {"motd": b"two"}, seed="2")
        edit_by_hand(publisher, {"/note": a_file(publisher, b"x")})
        repository = Repository.open(str(target))
        with Reader(repository.objects, repository.manifest().root) as reader:
            group = reader._inside(f"/{broken.root.rpartition('/')[0]}")
            assert group is not None
            nested = group.nested(f"/{broken.root}")
            assert nested is not None
        (target / nested.hash.object_path("C")).unlink()
        assert opened().lost(opened().published()) == frozenset()
        publish(opened(), THIRD, {"motd": b"three"}, seed="3")
        assert set(opened().published()) == {NAME, OTHER, THIRD}

    def test_a_rollback_by_the_official_tools_is_no_longer_true_of_its_revision(
        self, publisher: Stratum0Publisher, opened: Opened
    ) -> None:
        record = publish(publisher, NAME, {"motd": b"one"})
        link = Symlink(0o777, 0, 0, MTIME, (), "../../" + record.root)
        publish(publisher, NAME, {"motd": b"two"}, seed="2")
        edit_by_hand(publisher, {f"/{NAME}": link})
        found = opened().published()[NAME]
        assert isinstance(found, Unreadable) and "its link leads to" in found.problem

    def test_a_name_that_moves_from_root_to_root_is_known_once(
        self, publisher: Stratum0Publisher, opened: Opened
    ) -> None:
        for seed in "123456":
            record = publish(publisher, NAME, {"motd": seed.encode()}, seed=seed)
        with opened().snapshot() as found:
            assert [path for part in found.parts() for path in part.names] == [NAME]
            assert sum(len(part.roots) for part in found.parts()) == 6
        assert opened().published() == {NAME: record}


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_any_sequence_of_changes_leaves_the_index_true_and_the_repository_sound(
    publisher: Stratum0Publisher, opened: Opened, target: Path, seed: int
) -> None:
    """Publishes, updates, new names of known images, removals, collections, and what others change in between."""
    chance = random.Random(seed)
    names = [f"registry{number % 2}.example.org/team{number % 3}/tool:{number}" for number in range(9)]
    standing: dict[str, Any] = {}
    for step in range(30):
        name = chance.choice(names)
        move = chance.choice(["publish", "publish", "publish", "again", "remove", "gc", "unlink", "other"])
        one = opened()
        if move == "publish":
            image = str(chance.randrange(6))
            known = {record.image_id for record in standing.values()}
            new = release(name, None, seed=image)
            tree = None if new.record.image_id in known else stored(one, {"motd": image.encode()})
            if tree is not None and one.root(new.record.image_id, new.record.rules) is not None:
                tree = None
            with one.transaction("publish") as transaction:
                standing[name] = transaction.publish(release(name, tree, seed=image, published=2000 + step))
        elif move == "again":
            with one.transaction("nothing"):
                pass
        elif move == "remove" and name in standing:
            with one.transaction("remove") as transaction:
                transaction.remove([name], now=3000 + step)
            del standing[name]
        elif move == "gc":
            collect(one, grace=0, keep=0, now=NOW + 10_000, dry_run=False)
        elif move == "unlink" and name in standing:
            edit_by_hand(one, {f"/{name}": None})
            del standing[name]
        elif move == "other":
            edit_by_hand(one, {"/theirs": a_file(one, b"%d" % step)})
        assert opened().published() == standing, f"after {move} in step {step}"
        with opened().snapshot() as found:
            if found.is_settled:
                assert dict(found.links()) == {path: record.root for path, record in standing.items()}
        if step % 6 == 5:
            problems = check(str(target), now=NOW + 1000, spool_root="/nowhere", configuration="/nowhere")
            assert [str(problem) for problem in problems] == []
    sound(target)


class TestLostObjects:
    """What a bad disk does to the index: all that it says of names is in their records, too."""

    @pytest.mark.parametrize("is_there", [True, False])
    @pytest.mark.parametrize("which", ["part", indexes.HEAD, indexes.OTHERS])
    def test_an_index_of_which_an_object_is_lost_or_damaged_is_made_anew(
        self, publisher: Stratum0Publisher, opened: Opened, target: Path, which: str, is_there: bool
    ) -> None:
        edit_by_hand(publisher, {f"/{THIRD}": Symlink(0o777, 0, 0, MTIME, (), "elsewhere")})
        record = publish(publisher, NAME, {"motd": b"one"})
        name = record.root.split("/")[1] if which == "part" else which
        lost = target / row(target, f"{DIRECTORY}/{name}").content_hash.object_path()
        if is_there:
            lost.write_bytes(b"x" * lost.stat().st_size)
        else:
            lost.unlink()
        again = opened()
        found = again.published()
        assert (set(found), found[NAME]) == ({NAME, THIRD}, record)
        other = publish(again, OTHER, {"motd": b"two"}, seed="2")
        found = opened().published()
        assert (set(found), found[NAME], found[OTHER]) == ({NAME, THIRD, OTHER}, record, other)
        if not is_there:
            sound(target)

    def test_an_index_that_cannot_be_read_just_now_is_an_error(
        self, publisher: Stratum0Publisher, opened: Opened, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        publish(publisher, NAME, {"motd": b"one"})

        def failed(token: str) -> Any:
            raise PublishError("reading it failed")

        again = opened()
        monkeypatch.setattr(again.contents, "open", failed)
        with pytest.raises(PublishError, match="reading it failed"):
            again.published()


class TestCost:
    """What a publish rewrites."""

    def test_a_publish_writes_one_part_and_an_update_two(self, publisher: Stratum0Publisher, target: Path) -> None:
        for number in range(40):
            publish(publisher, f"registry.example.org/t/i{number}:1", {"motd": b"%d" % number}, seed=str(number))
        before = hashes(target)
        publish(publisher, "registry.example.org/t/i0:2", {"motd": b"0"}, seed="0")
        between = hashes(target)
        assert len(changed(before, between)) == 2  # its part and the head
        publish(publisher, "registry.example.org/t/i0:2", {"motd": b"1"}, seed="1")
        assert len(changed(between, hashes(target))) == 3

    def test_a_transaction_that_publishes_what_stands_there_is_no_revision(
        self, publisher: Stratum0Publisher, target: Path
    ) -> None:
        publish(publisher, NAME, {"motd": b"hello"})
        with publisher.transaction("note") as transaction:
            transaction.note("status.json", b"{}")
        before = revision(target)
        with publisher.transaction("the same note") as transaction:
            transaction.note("status.json", b"{}")
        assert revision(target) == before

    def test_a_publish_leaves_files_that_stay_the_same_alone(self, publisher: Stratum0Publisher, target: Path) -> None:
        publish(publisher, NAME, {"motd": b"hello"}, published=1000)
        before = row(target, f".metadata/{NAME}/manifest.json"), row(target, ".metadata/unreferenced.json")
        with publisher.transaction("again") as transaction:
            transaction.publish(release(NAME, None, published=2000))
        assert (row(target, f".metadata/{NAME}/manifest.json"), row(target, ".metadata/unreferenced.json")) == before

    def test_a_long_note_of_which_a_line_changes_is_stored_again_in_part(
        self, publisher: Stratum0Publisher, target: Path
    ) -> None:
        lines = [f'"registry.example.org/team/tool{number}:1": "{number * 7919:064x}"\n' for number in range(20_000)]
        note(publisher, "".join(lines))
        before = stored_bytes(target)
        lines[12_345] = "changed\n"
        note(publisher, "".join(lines))
        grown = stored_bytes(target) - before
        assert publisher.noted("status.json") == "".join(lines).encode()
        assert len(row_chunks(target, ".metadata/status.json")) > 20
        assert grown < before / 8
        sound(target)


def note(publisher: Stratum0Publisher, text: str) -> None:
    with publisher.transaction("note") as transaction:
        transaction.note("status.json", text.encode())


def stored_bytes(target: Path) -> int:
    return sum(path.stat().st_size for path in (target / "data").glob("??/*"))


def row_chunks(target: Path, path: str) -> Any:
    repository = Repository.open(str(target))
    with Reader(repository.objects, repository.manifest().root) as reader:
        found = reader.lookup(f"/{path}")
        assert found is not None
        return found.chunks


def hashes(target: Path) -> dict[str, Any]:
    repository = Repository.open(str(target))
    with Reader(repository.objects, repository.manifest().root) as reader:
        return {found.path: found.row.hash for found in reader.children(f"/{DIRECTORY}")}


def changed(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    return {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}


def row(target: Path, path: str) -> Any:
    repository = Repository.open(str(target))
    with Reader(repository.objects, repository.manifest().root) as reader:
        found = reader.lookup(f"/{path}")
        assert found is not None
        return found.row


def old_form(publisher: Stratum0Publisher) -> bytes:
    """The index as version 1 wrote it."""
    with publisher.snapshot() as found:
        parts = found.parts()
    lines = b"".join(part.serialise() for part in parts).split(b"\n")[:-1]
    # Names first, then roots, then layers.
    lines.sort(key=lambda line: (b"nrl".index(line[:1]), line))
    return zstandard.ZstdCompressor().compress(b"\n".join((b"unpacker\t1", *lines, b"")))


class TestVersions:
    def test_the_index_of_version_1_is_read_and_the_next_publish_takes_its_place(
        self, publisher: Stratum0Publisher, opened: Opened, target: Path
    ) -> None:
        first = publish(publisher, NAME, {"motd": b"one"})
        gone = publish(publisher, OTHER, {"motd": b"two"}, seed="2")
        with publisher.transaction("remove") as transaction:
            transaction.remove([OTHER], now=2000)
        old = a_file(publisher, old_form(publisher))
        edit_by_hand(publisher, {f"/{DIRECTORY}": None, f"/{indexes.OLD}": old})
        assert opened().published() == {NAME: first}
        assert opened().root(gone.image_id, gone.rules) == gone.root, "roots without a name are known, too"
        third = publish(opened(), THIRD, {"motd": b"three"}, seed="3")
        with opened().snapshot() as found:
            assert found.is_settled and not found.has(indexes.OLD)
            assert found.facts(gone.root.rpartition("/")[2]) is not None
        assert opened().published() == {NAME: first, THIRD: third}
        sound(target)

    def test_an_index_of_version_1_beside_a_newer_one_was_written_later(
        self, publisher: Stratum0Publisher, opened: Opened
    ) -> None:
        publish(publisher, NAME, {"motd": b"one"})
        old = a_file(publisher, old_form(publisher))
        edit_by_hand(publisher, {f"/{indexes.OLD}": old})
        record = publish(opened(), NAME, {"motd": b"two"}, seed="2")
        assert opened().published() == {NAME: record}
        assert is_settled(opened())

    @pytest.mark.parametrize("data", [b"unpacker\t3\nrevision\t9\n", b"unpacker\t30\nrevision\t9\nmore\n"])
    def test_an_index_of_a_newer_version_is_refused(self, publisher: Stratum0Publisher, data: bytes) -> None:
        publish(publisher, NAME, {"motd": b"one"})
        edit_by_hand(publisher, {f"/{DIRECTORY}/head": a_file(publisher, data)})
        with pytest.raises(PublishError, match="another version"):
            publisher.published()


class TestParts:
    """The form of the files."""

    def test_a_part_reads_what_it_wrote(self) -> None:
        part = Part(
            {"r.example.org/a:1": Line(".flat/aa/aa1", b'{"a": 1}')}, {"aa1": b'{"b": 2}'}, frozenset({"bb", "cc"})
        )
        assert Part.parse(part.serialise()) == part
        assert indexes.EMPTY.serialise() == b""
        assert Part.parse(b"") == indexes.EMPTY

    @pytest.mark.parametrize("data", [b"name", b"name\tx", b"name\tx\n", b"layer\ta\tb\n", b"unknown\ta\n", b"\n"])
    def test_a_damaged_part_is_told(self, data: bytes) -> None:
        with pytest.raises(ValueError):
            Part.parse(data)

    @pytest.mark.parametrize("data", [b"", b"unpacker\t2\n", b"unpacker\t2\nrevision\tx\n", b"revision\t2\n", b"\xff"])
    def test_a_damaged_head_is_told(self, data: bytes) -> None:
        with pytest.raises(ValueError):
            indexes.parse_head(data, "it")

    def test_other_names_are_read_as_written(self) -> None:
        others = {"r.example.org/a:1": "elsewhere", "r.example.org/b:1": ""}
        others |= {"r.example.org/c\td:\n%": "%250A%09\n", "r.example.org/\udce9:1": "\t"}
        assert indexes.parse_others(indexes.serialise_others(others)) == others
        with pytest.raises(ValueError):
            indexes.parse_others(b"no root\n")

    def test_a_note_cannot_take_the_place_of_the_index(self, publisher: Stratum0Publisher) -> None:
        for name in ("published", "published.zst"):
            with pytest.raises(PublishError, match="not a name"), publisher.transaction("x") as transaction:
                transaction.note(name, b"x")

    def test_a_file_in_place_of_the_directory_is_told_by_name(self, publisher: Stratum0Publisher) -> None:
        record = publish(publisher, NAME, {"motd": b"one"})
        edit_by_hand(publisher, {f"/{DIRECTORY}": a_file(publisher, b"x")})
        assert publisher.published() == {NAME: record}
        with pytest.raises(PublishError, match=f"/{DIRECTORY}' of the repository is no directory"):
            publish(publisher, OTHER, {"motd": b"two"}, seed="2")

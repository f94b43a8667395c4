"""gc of a directory target: what has no name goes after its grace period; what is unknown stays."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.publisher_contract import NAME, OTHER, publish, release, stored
from unpacker.errors import Busy, PublishError
from unpacker.gc import Collected, collect
from unpacker.publish import posix
from unpacker.publish.directory import DirectoryPublisher
from unpacker.record import Published

DAY = 86_400.0


@pytest.fixture(autouse=True)
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here pulls the plug, and syncing a busy machine's disk takes seconds each time."""
    monkeypatch.setattr(posix, "syncfs", lambda fd: None)


@pytest.fixture
def publisher(tmp_path: Path) -> Iterator[DirectoryPublisher]:
    yield DirectoryPublisher(str(tmp_path / "target"))
    for path, _, _ in os.walk(tmp_path):
        os.chmod(path, 0o700)


@pytest.fixture
def now() -> float:
    return time.time()


def gc(publisher: DirectoryPublisher, now: float, *, grace: float = 7 * DAY, dry_run: bool = False) -> Collected:
    return collect(publisher, grace=grace, now=now, dry_run=dry_run)


def pooled(publisher: DirectoryPublisher) -> list[Path]:
    return [p for p in Path(publisher.path, ".unpacker/pool").rglob("*") if p.is_file()]


def snapshot(publisher: DirectoryPublisher) -> dict[str, tuple[int, int, int]]:
    found = {}
    for path in [Path(publisher.path), *Path(publisher.path).rglob("*")]:
        own = path.lstat()
        found[str(path)] = (own.st_ino, own.st_ctime_ns, own.st_size)
    return found


def remove(publisher: DirectoryPublisher, name: str, now: float) -> None:
    with publisher.transaction("remove") as transaction:
        transaction.remove([name], now=int(now))


def test_what_has_a_name_stays_for_ever(publisher: DirectoryPublisher, now: float) -> None:
    record = publish(publisher, NAME, {"motd": b"hello"})
    assert gc(publisher, now + 1000 * DAY, grace=0) == Collected(roots=(), waiting=0, contents=0, freed=0, records=())
    assert Path(publisher.path, record.root, "motd").read_bytes() == b"hello"


def test_a_root_without_a_name_goes_after_its_grace_period(publisher: DirectoryPublisher, now: float) -> None:
    gone = publish(publisher, NAME, {"motd": b"one" * 2000, "shared": b"x" * 5000}, seed="1")
    kept = publish(publisher, OTHER, {"motd": b"two", "shared": b"x" * 5000}, seed="2")
    remove(publisher, NAME, now)
    assert gc(publisher, now + 6 * DAY).waiting == 1
    assert Path(publisher.path, gone.root).exists()
    expected = gc(publisher, now + 8 * DAY, dry_run=True)
    found = gc(publisher, now + 8 * DAY)
    assert found == expected
    assert (found.roots, found.waiting, found.contents) == ((gone.root,), 0, 1)
    assert found.freed >= 6000
    assert not Path(publisher.path, gone.root).exists()
    assert {p.stat().st_nlink for p in pooled(publisher)} == {2}
    assert Path(publisher.path, kept.root, "shared").read_bytes() == b"x" * 5000
    assert publisher.root(gone.image_id, gone.rules) is None
    assert os.listdir(Path(publisher.path, ".unpacker/trash")) == []
    assert not [n for n in os.listdir(Path(publisher.path, ".unpacker/roots")) if gone.root[8:] in n]


def test_the_time_runs_from_the_loss_of_the_name_not_from_a_time_stamp(
    publisher: DirectoryPublisher, now: float
) -> None:
    record = publish(publisher, NAME, {"motd": b"one"})
    os.utime(Path(publisher.path, record.root), (0, 0))
    remove(publisher, NAME, now)
    assert gc(publisher, now + 6 * DAY).roots == ()


def test_a_root_first_seen_without_a_name_is_recorded_and_waits(publisher: DirectoryPublisher, now: float) -> None:
    record = publish(publisher, NAME, {"motd": b"one"})
    Path(publisher.path, NAME).unlink()
    assert gc(publisher, now + 100 * DAY).waiting == 1
    times = json.loads(Path(publisher.path, ".metadata/unreferenced.json").read_bytes())
    assert times == {record.root: int(now + 100 * DAY)}
    assert gc(publisher, now + 106 * DAY).roots == ()
    assert gc(publisher, now + 108 * DAY).roots == (record.root,)


def test_a_name_given_back_stops_the_clock(publisher: DirectoryPublisher, now: float) -> None:
    record = publish(publisher, NAME, {"motd": b"one"})
    remove(publisher, NAME, now)
    with publisher.transaction("publish") as transaction:
        transaction.publish(release(OTHER, None))
    assert gc(publisher, now + 8 * DAY).roots == ()
    remove(publisher, OTHER, now + 9 * DAY)
    assert gc(publisher, now + 15 * DAY).waiting == 1
    assert gc(publisher, now + 17 * DAY).roots == (record.root,)


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("latest", "{root}"),
        (".multiarch/arm64/registry.example.org/tool:1", "../../../{root}"),
        ("bin/motd", "../{root}/motd"),
        ("absolute", "{path}/{root}"),
        ("podmanStore/overlay/x/diff", "../../../{root}"),
    ],
)
def test_any_symlink_to_a_root_is_a_name(publisher: DirectoryPublisher, now: float, link: str, target: str) -> None:
    record = publish(publisher, NAME, {"motd": b"one"})
    remove(publisher, NAME, now)
    path = Path(publisher.path, link)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target.format(root=record.root, path=publisher.path))
    assert gc(publisher, now + 100 * DAY, grace=0).roots == ()
    path.unlink()
    assert gc(publisher, now + 100 * DAY, grace=0).roots == (record.root,)


def test_what_other_tools_made_is_left_alone(publisher: DirectoryPublisher, now: float) -> None:
    publish(publisher, NAME, {"motd": b"one"})
    theirs = Path(publisher.path, ".flat/ab/abcd")
    theirs.mkdir(parents=True)
    metadata = Path(publisher.path, ".metadata/registry.example.org/duccs:1")
    metadata.mkdir()
    (metadata / "manifest.json").write_text("{}")
    assert gc(publisher, now + 100 * DAY, grace=0).roots == ()
    assert theirs.exists()
    assert (metadata / "manifest.json").exists()


def test_orphaned_contents_go_after_the_grace_period(publisher: DirectoryPublisher, now: float) -> None:
    with publisher.lock():
        stored(publisher, {"orphan": b"x" * 5000})
    assert gc(publisher, now + 6 * DAY).contents == 0
    expected = gc(publisher, now + 8 * DAY, dry_run=True)
    found = gc(publisher, now + 8 * DAY)
    assert found == expected
    assert (found.contents, found.freed >= 5000) == (1, True)
    assert pooled(publisher) == []


def test_a_record_that_lost_its_link_goes_after_the_grace_period(publisher: DirectoryPublisher, now: float) -> None:
    publish(publisher, NAME, {"motd": b"one"})
    Path(publisher.path, NAME).unlink()
    assert gc(publisher, now + 6 * DAY).records == ()
    assert gc(publisher, now + 8 * DAY).records == (NAME,)
    assert not Path(publisher.path, ".metadata/registry.example.org").exists()


def test_a_dry_run_writes_nothing_at_all(publisher: DirectoryPublisher, now: float, tmp_path: Path) -> None:
    publish(publisher, NAME, {"motd": b"one", "d/e": b"x"}, seed="1")
    publish(publisher, OTHER, {"motd": b"two"}, seed="2")
    Path(publisher.path, NAME).unlink()
    remove(publisher, OTHER, now)
    before = snapshot(publisher)
    assert len(gc(publisher, now + 8 * DAY, dry_run=True).roots) == 1
    assert snapshot(publisher) == before
    fresh = DirectoryPublisher(str(tmp_path / "never made"))
    assert gc(fresh, now, dry_run=True).roots == ()
    assert not (tmp_path / "never made").exists()


def test_a_running_publisher_and_gc_exclude_each_other(publisher: DirectoryPublisher, now: float) -> None:
    other = DirectoryPublisher(publisher.path)
    with publisher.lock(), pytest.raises(Busy):
        gc(other, now)


def test_a_damaged_account_deletes_nothing(publisher: DirectoryPublisher, now: float) -> None:
    record = publish(publisher, NAME, {"motd": b"one"})
    remove(publisher, NAME, now)
    Path(publisher.path, ".metadata/unreferenced.json").write_text('{"damaged')
    with pytest.raises(PublishError, match="nothing is deleted"):
        gc(publisher, now + 100 * DAY, grace=0)
    assert Path(publisher.path, record.root).exists()


@pytest.mark.parametrize("call", ["scandir", "readlink", "listdir", "stat"])
def test_what_cannot_be_read_deletes_nothing(
    publisher: DirectoryPublisher, now: float, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    gone = publish(publisher, NAME, {"motd": b"one"}, seed="1")
    publish(publisher, OTHER, {"motd": b"two"}, seed="2")
    publish(publisher, "third.example.org/a/b:1", {"motd": b"two"}, seed="3")
    remove(publisher, NAME, now)
    Path(publisher.path, OTHER).unlink()
    before = {p for p in snapshot(publisher) if not p.endswith("lock")}
    real = getattr(os, call)
    failed = []

    def broken(path: object = ".", *args: object, **options: object) -> object:
        if "example.org" in str(path):
            failed.append(path)
            raise OSError(5, "Input/output error", str(path))
        return real(path, *args, **options)

    monkeypatch.setattr(os, call, broken)
    try:
        with pytest.raises(PublishError, match="nothing is deleted"):
            gc(publisher, now + 100 * DAY, grace=0)
    finally:
        monkeypatch.undo()
    assert failed
    assert {p for p in snapshot(publisher) if not p.endswith("lock")} == before
    assert Path(publisher.path, gone.root).exists()


def test_a_killed_gc_is_finished_by_the_next_run(
    publisher: DirectoryPublisher, now: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = publish(publisher, NAME, {"motd": b"one", "d/e": b"two"})
    remove(publisher, NAME, now)

    class Killed(BaseException):
        pass

    def kill(name: str, dir_fd: int) -> None:
        raise Killed

    monkeypatch.setattr(posix, "remove_tree", kill)
    with pytest.raises(Killed):
        gc(publisher, now + 8 * DAY)
    monkeypatch.undo()
    assert not Path(publisher.path, record.root).exists()
    with publisher.lock():
        assert os.listdir(Path(publisher.path, ".unpacker/trash")) == []
        assert os.listdir(Path(publisher.path, ".unpacker/roots")) == []


def test_roots_with_read_only_directories_can_be_collected(publisher: DirectoryPublisher, now: float) -> None:
    tree = stored(publisher, {"a/b/f": b"x", "a/g": b"y"})
    read_only = tree.root._replace(mode=0o555, children={})
    a = tree.root.children["a"]._replace(mode=0o555)
    read_only.children["a"] = a
    with publisher.transaction("publish") as transaction:
        record: Published = transaction.publish(release(NAME, tree._replace(root=read_only)))
    remove(publisher, NAME, now)
    assert gc(publisher, now + 8 * DAY).roots == (record.root,)
    assert not Path(publisher.path, record.root).exists()

"""The directory target: every publisher's contract, and what is its own: layout, order, recovery, owners."""

from __future__ import annotations

import importlib
import json
import os
import re
import stat
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.publisher_contract import (
    MTIME,
    NAME,
    OTHER,
    PublisherContract,
    publish,
    release,
    stored,
)
from unpacker import listing
from unpacker.changeset import Kind
from unpacker.contracts import Publisher
from unpacker.errors import PublishError
from unpacker.publish import posix
from unpacker.publish.directory import DirectoryPublisher
from unpacker.publish.roots import serialise_unreferenced
from unpacker.publish.transaction import DirectoryTransaction
from unpacker.record import Published, Unreadable
from unpacker.tree import Directory, File, Special, Symlink, Tree

IS_ROOT = os.geteuid() == 0
ME = (os.geteuid(), os.getegid())
UNREADABLE = 69
RECORD = ("record.json", "manifest.json", "listing.zst")


@pytest.fixture(autouse=True)
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here pulls the plug, and syncing a busy machine's disk takes seconds each time."""
    monkeypatch.setattr(posix, "syncfs", lambda fd: None)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "new" / "target"


@pytest.fixture
def publisher(target: Path) -> Iterator[DirectoryPublisher]:
    yield DirectoryPublisher(str(target))
    # Read-only directories: pytest, too, must be able to clear them away.
    for path, _, _ in os.walk(target):
        os.chmod(path, 0o700)


@pytest.fixture
def again(target: Path) -> Callable[[], Publisher]:
    return lambda: DirectoryPublisher(str(target))


@pytest.fixture
def visible(target: Path) -> Callable[[str], dict[str, str] | None]:
    def look(public_path: str) -> dict[str, str] | None:
        link = target / public_path
        if not os.path.lexists(link):
            return None
        assert link.is_symlink() and not os.readlink(link).startswith("/")
        return described(link.resolve(strict=True))

    return look


def described(root: Path) -> dict[str, str]:
    found = {}
    for path in [root, *root.rglob("*")]:
        name = str(path.relative_to(root)) if path != root else ""
        mode = stat.S_IMODE(path.lstat().st_mode)
        if path.is_symlink():
            found[name] = f"l {os.readlink(path)}"
        elif path.is_dir():
            found[name] = f"d {mode:04o}"
        else:
            found[name] = f"f {mode:04o} {path.read_bytes().decode('utf-8', 'surrogateescape')}"
    return found


def files(directory: Path) -> set[str]:
    """Every name below a directory but the pool's."""
    found = [p for p in directory.rglob("*") if p.is_symlink() or not p.is_dir()]
    return {str(p.relative_to(directory)) for p in found if "/pool/" not in str(p)}


class TestDirectoryPublisher(PublisherContract):
    """The contract of all publishers."""


class TestLayout:
    def test_names_lie_where_users_know_them(self, publisher: DirectoryPublisher, target: Path) -> None:
        record = publish(publisher, NAME, {"motd": b"hello"})
        identity = record.image_id.partition(":")[2]
        assert record.root == f".flat/{identity[:2]}/{identity}"
        assert os.readlink(target / NAME) == f"../../{record.root}"
        assert files(target) - {".unpacker/lock"} == {
            NAME,
            f"{record.root}/motd",
            f".metadata/{NAME}/manifest.json",
            f".metadata/{NAME}/record.json",
            f".metadata/{NAME}/listing.zst",
            ".metadata/unreferenced.json",
            f".unpacker/roots/{identity}.json",
            f".unpacker/roots/{identity}.zst",
        }

    def test_the_listing_is_that_of_the_tree(self, publisher: DirectoryPublisher, target: Path) -> None:
        tree = stored(publisher, {"motd": b"hello", "l": "motd"})
        with publisher.transaction("publish") as transaction:
            transaction.publish(release(NAME, tree))
        assert (target / ".metadata" / NAME / "listing.zst").read_bytes() == listing.listing(tree)

    def test_the_manifest_is_kept_byte_for_byte(self, publisher: DirectoryPublisher, target: Path) -> None:
        tree = stored(publisher, {"motd": b"hello"})
        what = release(NAME, tree)
        with publisher.transaction("publish") as transaction:
            transaction.publish(what)
        assert (target / ".metadata" / NAME / "manifest.json").read_bytes() == what.image.manifest.raw

    def test_everything_public_is_readable_whatever_the_umask(
        self, publisher: DirectoryPublisher, target: Path
    ) -> None:
        before = os.umask(0o077)
        try:
            publish(publisher, NAME, {"etc/motd": b"hello", "etc/empty": b""})
        finally:
            os.umask(before)
        for path in target.rglob("*"):
            if ".unpacker" not in str(path) and not path.is_symlink():
                assert path.stat().st_mode & 0o444 == 0o444, path
        assert stat.S_IMODE((target / ".unpacker").stat().st_mode) == 0o700

    def test_roots_of_known_layers_are_links_only(self, publisher: DirectoryPublisher, target: Path) -> None:
        one = publish(publisher, NAME, {"a": b"same", "b/c": b"same"}, seed="1")
        two = publish(publisher, OTHER, {"d": b"same"}, seed="2")
        inodes = {(target / r.root / p).stat().st_ino for r, p in [(one, "a"), (one, "b/c"), (two, "d")]}
        assert len(inodes) == 1
        assert (target / one.root / "a").stat().st_nlink == 4

    def test_metadata_of_every_kind_is_kept(self, publisher: DirectoryPublisher, target: Path) -> None:
        uid, gid = (1234, 4321) if IS_ROOT else ME
        xattrs = (("user.a", b"\x00\xff"), ("user.b", b""))
        tree = stored(publisher, {"f": b"x", "e": b"", "l": "f"}, uid=uid, gid=gid, mode=0o455, xattrs=xattrs)
        below = Directory(0o1555, uid, gid, 7_000_000_001, xattrs, {"f": tree.root.children["f"]})
        tree.root.children["d"] = below
        tree.root.children["p"] = Special(0o644, uid, gid, 9_000_000_009, (), Kind.FIFO, (0, 0))
        with publisher.transaction("publish") as transaction:
            record = transaction.publish(release(NAME, tree))
        root = target / record.root
        for name, mode, mtime in [
            ("f", 0o455, MTIME),
            ("e", 0o455, MTIME),
            ("d/f", 0o455, MTIME),
            ("d", 0o1555, 7_000_000_001),
            ("p", 0o644, 9_000_000_009),
        ]:
            own = (root / name).lstat()
            assert (stat.S_IMODE(own.st_mode), own.st_mtime_ns) == (mode, mtime), name
            assert (own.st_uid, own.st_gid) == (uid, gid), name
            if name != "p":
                assert {x: os.getxattr(root / name, x) for x in os.listxattr(root / name)} == dict(xattrs), name
        assert stat.S_ISFIFO((root / "p").lstat().st_mode)
        own = (root / "l").lstat()
        assert (own.st_mtime_ns, own.st_uid, own.st_gid) == (MTIME, uid, gid)
        assert root.lstat().st_mtime_ns == MTIME

    def test_a_directory_of_another_tool_is_neither_reused_nor_touched(
        self, publisher: DirectoryPublisher, target: Path
    ) -> None:
        identity = release(NAME, None).record.image_id.partition(":")[2]
        foreign = target / ".flat" / identity[:2] / identity
        foreign.mkdir(parents=True)
        (foreign / "theirs").write_text("x")
        assert publisher.root(f"sha256:{identity}", "rules") is None
        record = publish(publisher, NAME, {"motd": b"hello"})
        assert record.root == f".flat/{identity[:2]}/{identity}-2"
        assert described(foreign) == {"": "d 0755", "theirs": "f 0644 x"}

    def test_paths_as_long_as_the_kernel_takes_are_written_and_removed(
        self, publisher: DirectoryPublisher, target: Path
    ) -> None:
        path = "/".join(["d"] * 2047) + "/f"
        assert len(path) == 4095
        record = publish(publisher, NAME, {path: b"deep"})
        assert (record.entries, record.size) == (2048, 4)
        with publisher.lock():
            fd = publisher.layout.open(os.path.dirname(record.root))
            posix.remove_tree(os.path.basename(record.root), fd)
            os.close(fd)
        assert not (target / record.root).exists()

    def test_a_note_is_written_with_the_rest(self, publisher: DirectoryPublisher, target: Path) -> None:
        with publisher.transaction("note") as transaction:
            transaction.note("status.json", b"{}")
            assert not (target / ".metadata" / "status.json").exists()
        assert (target / ".metadata" / "status.json").read_bytes() == b"{}"

    @pytest.mark.parametrize("name", ["../up", "a/b", ".hidden", "unreferenced.json", ""])
    def test_a_note_cannot_lie_elsewhere(self, publisher: DirectoryPublisher, name: str) -> None:
        with pytest.raises(PublishError, match="not a name"), publisher.transaction("note") as transaction:
            transaction.note(name, b"")


class TestRemoval:
    def test_nothing_of_a_removed_name_is_left_but_its_root(self, publisher: DirectoryPublisher, target: Path) -> None:
        record = publish(publisher, NAME, {"motd": b"hello"})
        with publisher.transaction("remove") as transaction:
            transaction.remove([NAME], now=2000)
        assert not (target / "registry.example.org").exists()
        assert os.listdir(target / ".metadata") == ["unreferenced.json"]
        assert (target / record.root / "motd").read_bytes() == b"hello"

    def test_when_a_root_lost_its_last_name_is_recorded(self, publisher: DirectoryPublisher, target: Path) -> None:
        def unreferenced() -> Any:
            return json.loads((target / ".metadata" / "unreferenced.json").read_bytes())

        one = publish(publisher, NAME, {"motd": b"one"}, seed="1", published=1000)
        with publisher.transaction("publish") as transaction:
            transaction.publish(release(OTHER, None, seed="1", published=1001))
        publish(publisher, NAME, {"motd": b"two"}, seed="2", published=1002)
        assert unreferenced() == {}
        publish(publisher, OTHER, {"motd": b"two"}, seed="2", published=1003)
        assert unreferenced() == {one.root: 1003}
        with publisher.transaction("back") as transaction:
            transaction.publish(release(OTHER, None, seed="1", published=1004))
        assert unreferenced() == {}
        with publisher.transaction("remove") as transaction:
            transaction.remove([OTHER], now=1005)
        assert unreferenced() == {one.root: 1005}

    def test_a_damaged_account_of_roots_only_postpones_their_end(
        self, publisher: DirectoryPublisher, target: Path
    ) -> None:
        publish(publisher, NAME, {"motd": b"one"})
        (target / ".metadata" / "unreferenced.json").write_text("{damaged")
        publish(publisher, NAME, {"motd": b"two"}, seed="2")
        assert len(json.loads((target / ".metadata" / "unreferenced.json").read_bytes())) == 1


class TestWhatStandsPublished:
    def test_an_interrupted_update_reads_as_what_its_link_leads_to(
        self, publisher: DirectoryPublisher, target: Path
    ) -> None:
        first = publish(publisher, NAME, {"motd": b"one"}, seed="1")
        link = os.readlink(target / NAME)
        second = publish(publisher, NAME, {"motd": b"two"}, seed="2")
        (target / NAME).unlink()
        os.symlink(link, target / NAME)
        assert publisher.published() == {NAME: first}
        third = publish(publisher, NAME, {"motd": b"three"}, seed="3")
        assert third.replaces == first
        assert second.root != third.root
        assert publisher.published() == {NAME: third}

    def test_what_grows_with_the_target_is_read_whole(self, publisher: DirectoryPublisher, target: Path) -> None:
        publish(publisher, NAME, {"motd": b"one"})
        note = b"x" * (5 << 20)
        with publisher.lock(), publisher.transaction("note") as transaction:
            transaction.note("status.json", note)
        assert publisher.noted("status.json") == note
        times = {f".flat/{i:02}/{i:064}": i for i in range(60_000)}
        (target / ".metadata/unreferenced.json").write_bytes(serialise_unreferenced(times))
        assert publisher.layout.unreferenced() == times

    def test_a_record_without_a_link_is_not_published(self, publisher: DirectoryPublisher, target: Path) -> None:
        publish(publisher, NAME, {"motd": b"one"})
        (target / NAME).unlink()
        assert publisher.published() == {}

    @pytest.mark.parametrize(
        ("damage", "problem"),
        [
            (lambda record: record.unlink(), "no record.json"),
            (lambda record: record.write_bytes(record.read_bytes()[:100]), "damaged"),
            (lambda record: record.write_bytes(b"[" * 100_000), "damaged"),
            (lambda record: record.write_text(record.read_text().replace("1.0", "9.9")), "that of"),
            (lambda record: record.write_text(record.read_text().replace(".flat/", ".flat/x")), "leads to"),
        ],
    )
    def test_a_link_without_its_record_is_unreadable(
        self, publisher: DirectoryPublisher, target: Path, damage: Callable[[Path], Any], problem: str
    ) -> None:
        publish(publisher, NAME, {"motd": b"one"})
        other = publish(publisher, OTHER, {"motd": b"one"})
        damage(target / ".metadata" / NAME / "record.json")
        found = publisher.published()
        assert found[OTHER] == other
        unreadable = found[NAME]
        assert isinstance(unreadable, Unreadable)
        assert problem in unreadable.problem

    @pytest.mark.parametrize("make", [Path.mkdir, Path.touch])
    def test_what_is_no_link_is_none_of_ours_and_is_neither_replaced_nor_removed(
        self, publisher: DirectoryPublisher, target: Path, make: Callable[[Path], None]
    ) -> None:
        (target / NAME).parent.mkdir(parents=True)
        make(target / NAME)
        (found,) = publisher.published().values()
        assert isinstance(found, Unreadable) and found.is_foreign
        assert f"{target / NAME} is no symlink" in found.problem and "move it away" in found.problem
        with pytest.raises(PublishError, match=f"^{re.escape(found.problem)}$"):
            publish(publisher, NAME, {"motd": b"one"})
        with pytest.raises(PublishError, match="is no symlink"), publisher.transaction("remove") as transaction:
            transaction.remove([NAME], now=1)
        assert os.path.lexists(target / NAME) and not (target / NAME).is_symlink()
        assert not (target / ".metadata" / NAME).exists()
        os.rename(target / NAME, target / "elsewhere")
        publish(publisher, NAME, {"motd": b"one"})
        assert (target / NAME / "motd").exists()

    def test_what_stands_on_the_way_to_a_name_is_named_with_what_to_do(
        self, publisher: DirectoryPublisher, target: Path
    ) -> None:
        publish(publisher, OTHER.replace("team/", "other/"), {"motd": b"one"})
        (target / NAME).parent.touch()
        with pytest.raises(PublishError, match=r"registry.example.org/team stands where.*move it away"):
            publish(publisher, NAME, {"motd": b"one"})
        assert not (target / ".metadata" / NAME).exists()

    def test_what_operators_put_beside_is_no_name(self, publisher: DirectoryPublisher, target: Path) -> None:
        record = publish(publisher, NAME, {"motd": b"one"})
        (target / "README.md").write_text("hello")
        (target / "alias.example.org").symlink_to("registry.example.org")
        (target / "latest").symlink_to(NAME)
        (target / "registry.example.org" / "team" / "stable").symlink_to("tool:1.0")
        assert publisher.published() == {NAME: record}

    @pytest.mark.skipif(IS_ROOT, reason="root reads everything; the unprivileged run tests this")
    def test_what_cannot_be_read_is_not_taken_for_empty(self, publisher: DirectoryPublisher, target: Path) -> None:
        publish(publisher, NAME, {"motd": b"one"})
        (target / "registry.example.org").chmod(0)
        with pytest.raises(PublishError, match="Permission denied"):
            publisher.published()

    def test_a_target_that_is_a_file_is_an_error(self, tmp_path: Path) -> None:
        (tmp_path / "target").write_text("x")
        with pytest.raises(PublishError):
            DirectoryPublisher(str(tmp_path / "target")).published()
        with pytest.raises(PublishError), DirectoryPublisher(str(tmp_path / "target")).lock():
            pass

    def test_a_thousand_names_are_read_in_no_time(self, publisher: DirectoryPublisher, target: Path) -> None:
        first = publish(publisher, NAME, {"motd": b"one"})
        for i in range(1000):
            name = f"registry.example.org/team/tool:x{i}"
            (target / name).symlink_to(f"../../{first.root}")
            directory = target / ".metadata" / name
            directory.mkdir()
            (directory / "record.json").write_bytes(first.serialise().replace(b"tool:1.0", b"tool:x%d" % i))
        import time

        began = time.process_time()
        found = publisher.published()
        took = time.process_time() - began
        assert len(found) == 1001 and all(isinstance(value, Published) for value in found.values())
        assert took < 0.5


class TestSymlinksInTheWay:
    def test_a_symlink_among_the_public_directories_is_not_followed(
        self, publisher: DirectoryPublisher, target: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "elsewhere").mkdir()
        with publisher.lock():
            (target / "registry.example.org").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(PublishError, match="symlink"):
            publish(publisher, NAME, {"motd": b"hello"})
        assert os.listdir(tmp_path / "elsewhere") == []

    def test_a_file_among_the_public_directories_is_an_error(self, publisher: DirectoryPublisher, target: Path) -> None:
        with publisher.lock():
            (target / "registry.example.org").write_text("x")
        with pytest.raises(PublishError, match="stands where a directory belongs"):
            publish(publisher, NAME, {"motd": b"hello"})
        (target / "registry.example.org").unlink()
        record = publish(publisher, NAME, {"motd": b"hello"})
        assert publisher.published() == {NAME: record}

    def test_symlinks_of_an_image_lead_nowhere_while_it_is_written_or_removed(
        self, publisher: DirectoryPublisher, target: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "victim").mkdir()
        (tmp_path / "victim" / "file").write_text("x")
        record = publish(publisher, NAME, {"up": "../../../..", "abs": str(tmp_path / "victim"), "d/f": b"x"})
        with publisher.lock():
            fd = publisher.layout.open(os.path.dirname(record.root))
            posix.remove_tree(os.path.basename(record.root), fd)
            os.close(fd)
        assert (tmp_path / "victim" / "file").read_text() == "x"

    @pytest.mark.parametrize("name", ["a/b", "..", "."])
    def test_a_name_that_is_a_path_writes_nothing_outside(
        self, publisher: DirectoryPublisher, target: Path, name: str
    ) -> None:
        # No layer gives such names; should one ever, it must not get out of its root.
        below = Directory(0o755, *ME, MTIME, (), {"f": File(0o644, *ME, MTIME, (), 0, "")})
        tree = Tree(Directory(0o755, *ME, MTIME, (), {name: below}))
        with pytest.raises(PublishError), publisher.transaction("publish") as transaction:
            transaction.publish(release(NAME, tree))
        assert publisher.published() == {}

    def test_devices_are_refused(self, publisher: DirectoryPublisher) -> None:
        tree = Tree(Directory(0o755, *ME, MTIME, (), {"null": Special(0o666, 0, 0, 0, (), Kind.CHARACTER, (1, 3))}))
        with pytest.raises(PublishError, match="no device nodes"), publisher.transaction("publish") as transaction:
            transaction.publish(release(NAME, tree))


class TestRecovery:
    def test_hidden_files_of_others_beside_roots_stay(self, publisher: DirectoryPublisher, target: Path) -> None:
        record = publish(publisher, NAME, {"motd": b"hello"})
        theirs = target / os.path.dirname(record.root) / ".cvmfscatalog"
        theirs.write_text("")
        with DirectoryPublisher(str(target)).lock():
            assert theirs.exists()

    def test_leftovers_of_a_killed_run_are_cleared_by_the_next(
        self, publisher: DirectoryPublisher, target: Path
    ) -> None:
        record = publish(publisher, NAME, {"motd": b"hello"})
        before = files(target)
        stage = target / os.path.dirname(record.root) / ".0123.publish-1-ab"
        for left in (stage, target / ".unpacker/txn/batch-1-ab", target / ".unpacker/trash/0123"):
            (left / "d").mkdir(parents=True)
            (left / "d" / "f").write_text("x")
            (left / "d").chmod(0o500)
        half = target / ".metadata" / OTHER
        half.mkdir(parents=True)
        (half / "listing.zst").write_text("x")
        theirs = target / ".metadata" / "registry.example.org/duccs:1"
        theirs.mkdir()
        (theirs / "manifest.json").write_text("{}")
        (target / "half.example.org" / "team").mkdir(parents=True)
        (target / ".unpacker/roots/0123.json").write_text("{}")
        with publisher.lock():
            pass
        assert files(target) == before | {str(theirs.relative_to(target) / "manifest.json")}
        assert not (target / "half.example.org").exists()
        assert not half.exists()
        assert publisher.published() == {NAME: record}

    @pytest.mark.parametrize("step", ["_place_roots", "_place_records", "_switch_links", "_unpublish"])
    @pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
    def test_what_a_commit_that_broke_off_left_by_halves_is_cleared_by_the_next_run(
        self,
        publisher: DirectoryPublisher,
        target: Path,
        again: Callable[[], Publisher],
        monkeypatch: pytest.MonkeyPatch,
        step: str,
        error: BaseException,
    ) -> None:
        record = publish(publisher, NAME, {"motd": b"one"}, seed="1")
        before = files(target)
        tree = stored(publisher, {"motd": b"two"})
        place = DirectoryTransaction._place_records

        def broken(transaction: DirectoryTransaction) -> None:
            if step == "_place_records":
                place(transaction)
            raise error

        with monkeypatch.context() as patched, pytest.raises((PublishError, KeyboardInterrupt)):
            patched.setattr(DirectoryTransaction, step, broken)
            with publisher.transaction("publish") as transaction:
                transaction.publish(release(OTHER, tree, seed="2"))
        with again().lock():
            pass
        published = {NAME} if step != "_unpublish" else {NAME, OTHER}
        assert set(publisher.published()) == published
        left = {name for name in files(target) - before if not name.startswith((".flat/", ".unpacker/roots/"))}
        assert left == ({OTHER} | {f".metadata/{OTHER}/{name}" for name in RECORD} if OTHER in published else set())
        assert publisher.published()[NAME] == record

    @pytest.mark.parametrize("call", ["rename", "link", "symlink", "unlink", "mkdir", "syncfs"])
    def test_a_failing_call_in_the_middle_leaves_links_and_records_equal(
        self, publisher: DirectoryPublisher, target: Path, monkeypatch: pytest.MonkeyPatch, call: str
    ) -> None:
        publish(publisher, NAME, {"motd": b"one"}, seed="1")
        publish(publisher, OTHER, {"motd": b"one"}, seed="1")
        tree = stored(publisher, {"motd": b"two", "d/e": b"x", "l": "x"})
        third = "third.example.org/a/b:1"
        place: Any = posix if call == "syncfs" else os
        real = getattr(place, call)
        seen = failed = 0

        def broken(*args: Any, **options: Any) -> Any:
            nonlocal seen, failed
            seen += 1
            if seen == fail_at:
                failed += 1
                raise OSError(28, "No space left on device")
            return real(*args, **options)

        for fail_at in range(1, 40):
            seen = 0
            monkeypatch.setattr(place, call, broken)
            try:
                with publisher.transaction("publish") as transaction:
                    transaction.publish(release(NAME, tree, seed="2"))
                    transaction.publish(release(third, tree, seed="2"))
                    transaction.remove([OTHER], now=5)
            except PublishError as error:
                assert "free space" in str(error), (call, fail_at)
            else:
                break
            finally:
                monkeypatch.setattr(place, call, real)
            found = publisher.published()
            assert not [v for v in found.values() if isinstance(v, Unreadable)], (call, fail_at)
            for name, value in found.items():
                assert isinstance(value, Published)
                assert os.path.normpath(target / name / ".." / os.readlink(target / name)) == str(target / value.root)
                assert (target / name / "motd").exists()
            if found.get(OTHER) is None:
                # It got as far as the removal: then it stands as after a run that was not disturbed.
                with publisher.transaction("publish") as transaction:
                    transaction.publish(release(OTHER, None, seed="1"))
        else:
            pytest.fail("the transaction never got through")
        assert failed or call == "syncfs"
        assert set(publisher.published()) == {NAME, third}
        with publisher.lock():
            # What a failing sweep left, too.
            assert os.listdir(target / ".unpacker/txn") == []
            assert not [name for name in files(target / ".flat") if "publish-" in name]

    def test_no_final_name_is_given_before_its_sync(
        self, publisher: DirectoryPublisher, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls: list[str] = []

        def recorded(place: Any, name: str) -> None:
            real = getattr(place, name)

            def call(*args: Any, **options: Any) -> Any:
                calls.append(f"{name} {args[1]}" if name == "rename" else name)
                return real(*args, **options)

            monkeypatch.setattr(place, name, call)

        recorded(os, "rename")
        recorded(posix, "syncfs")
        with publisher.lock():
            tree = stored(publisher, {"motd": b"hello"})
            bytes_durable = list(calls)
            calls.clear()
            with publisher.transaction("publish") as transaction:
                root = transaction.publish(release(NAME, tree)).root.rpartition("/")[2]
        assert bytes_durable[0] == "syncfs" and bytes_durable[1].startswith("rename ")
        assert calls == [
            "syncfs",
            f"rename {root}.zst",
            f"rename {root}.json",
            f"rename {root}",
            "syncfs",
            "rename record.json",
            "rename manifest.json",
            "rename listing.zst",
            "rename .metadata/unreferenced.json",
            "syncfs",
            "rename tool:1.0",
            "syncfs",
        ]

    @pytest.mark.skipif(not IS_ROOT, reason="only root can mount a small tmpfs to fill")
    def test_a_disk_that_fills_up_loses_nothing(self, tmp_path: Path) -> None:
        place = tmp_path / "small"
        place.mkdir()
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True)
        if mounted.returncode:
            pytest.skip(f"cannot mount a small tmpfs to fill: {mounted.stderr.decode().strip()}")
        try:
            publisher = DirectoryPublisher(str(place / "target"))
            record = publish(publisher, NAME, {"motd": b"hello"})
            for size in (5_000_000, 900_000):
                with pytest.raises(PublishError, match=r"No space left.*gc"):
                    publish(publisher, OTHER, {f"{i}": bytes([i + 1]) * size for i in range(4)}, seed="2")
                assert publisher.published() == {NAME: record}
                assert os.listdir(place / "target/.unpacker/txn") == []
            many = {f"d{i}/l{j}": "x" * 2000 for i in range(10) for j in range(200)}
            with pytest.raises(PublishError, match=r"No space left.*gc"):
                publish(publisher, OTHER, many, seed="2")
            assert publisher.published() == {NAME: record}
            second = publish(publisher, OTHER, {"motd": b"fits"}, seed="3")
            assert publisher.published() == {NAME: record, OTHER: second}
        finally:
            subprocess.run(["umount", str(place)], check=True)


def test_symlinks_get_their_times_without_touching_what_they_lead_to(
    publisher: DirectoryPublisher, target: Path
) -> None:
    tree = stored(publisher, {"f": b"x"})
    tree.root.children["l"] = Symlink(0o777, *ME, 5_000_000_000, (), "f")
    with publisher.transaction("publish") as transaction:
        record = transaction.publish(release(NAME, tree))
    assert (target / record.root / "f").stat().st_mtime_ns == MTIME
    assert (target / record.root / "l").lstat().st_mtime_ns == 5_000_000_000


@pytest.mark.skipif(not IS_ROOT, reason="these tests run unprivileged already")
def test_all_of_this_holds_for_a_user_who_is_not_root() -> None:
    """Every test of the directory target once more, as nobody."""
    here = Path(__file__).parent
    tests = [str(here / f"test_{name}.py") for name in ("publish_directory", "pool", "gc", "verify")]
    # Not below a directory of pytest's, which is for its own user alone.
    with tempfile.TemporaryDirectory() as place, open(f"{place}/output", "w+b") as output:
        os.chown(place, 65534, 65534)
        with warnings.catch_warnings():
            # Newer Pythons warn of threads; the child starts none, and ends here.
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if not child:
            skipped = "not in_no_time and not as_long_as and not processes and not only_equal"
            _run_as_nobody(
                ["-q", "-x", "-k", skipped, "-p", "no:cacheprovider", f"--basetemp={place}/tests", *tests],
                output.fileno(),
            )
        _, status = os.waitpid(child, 0)
        output.seek(0)
        said = output.read().decode()
    code = os.waitstatus_to_exitcode(status)
    if code == UNREADABLE:
        pytest.skip("nobody cannot read this checkout: what is different for a user who is not root is not tested")
    assert code == 0, said[-8000:]
    assert " passed" in said


def _run_as_nobody(arguments: list[str], output: int) -> None:
    # In a fork, because nobody may not be allowed to start the Python that is running already.
    code = 70
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = sys.stderr = open(1, "w", closefd=False)  # noqa: SIM115
        # What is imported late must come while it can be read.
        for module in ("sysconfig", "multiprocessing", "hypothesis.internal.observability", "tests.test_pool"):
            importlib.import_module(module)
        pytest.main(["-q", "--collect-only", *arguments[1:]])
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        # These know who runs them, and are to learn it anew.
        for name in [name for name in sys.modules if name.startswith("tests.test_")]:
            del sys.modules[name]
        for name in [name for name in os.environ if name.startswith("PYTEST_")]:
            del os.environ[name]
        code = int(pytest.main(arguments)) if os.access(__file__, os.R_OK) else UNREADABLE
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        os._exit(code)

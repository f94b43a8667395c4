"""The stratum 0 target: every publisher's contract, and what is its own: one revision, index, presence, layers."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cvmfs_repositories import NAME as REPOSITORY
from tests.cvmfs_repositories import NOW
from tests.publisher_contract import MTIME, NAME, OTHER, PublisherContract, image, publish, release, stored
from unpacker.changeset import Changeset, Entry, Kind
from unpacker.contracts import Publisher, Release, Stacked
from unpacker.cvmfs.check import check
from unpacker.cvmfs.reader import Reader, node
from unpacker.cvmfs.repository import Repository
from unpacker.errors import Busy, PublishError
from unpacker.publish.stratum0 import Stratum0Publisher
from unpacker.record import Published, Unreadable
from unpacker.tree import EMPTY, Directory, File, Special, Symlink, Tree

pytestmark = pytest.mark.usefixtures("no_sync")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template")
    Repository.create(str(path / "repo"), REPOSITORY, now=NOW)
    return path


@pytest.fixture
def target(template: Path, tmp_path: Path) -> Path:
    shutil.copytree(template, tmp_path / "t")
    return tmp_path / "t" / "repo"


Opened = Callable[..., Stratum0Publisher]


@pytest.fixture
def opened(target: Path) -> Opened:
    def open_it(**options: Any) -> Stratum0Publisher:
        chosen: dict[str, Any] = {"clock": lambda: NOW + 1000, "spool_root": "/nowhere", "configuration": "/nowhere"}
        return Stratum0Publisher(str(target), **(chosen | options))

    return open_it


@pytest.fixture
def publisher(opened: Opened) -> Stratum0Publisher:
    return opened()


@pytest.fixture
def again(opened: Opened) -> Callable[[], Publisher]:
    return opened


@pytest.fixture
def visible(target: Path) -> Callable[[str], dict[str, str] | None]:
    return lambda public_path: seen(target, public_path)


def seen(target: Path, public_path: str) -> dict[str, str] | None:
    """What a client finds at the end of a public link, read anew from the signed manifest on."""
    repository = Repository.open(str(target))
    with Reader(repository.objects, repository.manifest().root) as reader:
        leads_to = _real(reader, f"/{public_path}")
        return None if leads_to is None else described(Stratum0Publisher(str(target)), reader, leads_to)


def _real(reader: Reader, path: str) -> str | None:
    """Where a client comes to that follows every symlink, its own variables unset."""
    at = ""
    for name in path.split("/")[1:]:
        at = f"{at}/{name}"
        while (found := reader.lookup(at)) is not None and found.row.symlink:
            target = re.sub(r"\$\([A-Z_]+:-([a-z0-9]*)\)", r"\1", found.row.symlink)
            real = _real(reader, os.path.normpath(os.path.join(os.path.dirname(at), target)))
            if real is None:
                return None
            at = real
        if found is None:
            return None
    return at


def described(publisher: Stratum0Publisher, reader: Reader, path: str) -> dict[str, str]:
    found = {}
    for each in reader.walk(path):
        name = each.path[len(path) + 1 :]
        what = node(each)
        if name.rpartition("/")[2] == ".cvmfscatalog":
            continue
        if isinstance(what, Symlink):
            found[name] = f"l {what.target}"
        elif isinstance(what, Directory):
            found[name] = f"d {what.mode:04o}"
        elif isinstance(what, File):
            with publisher.contents.open(what.token) as stream:
                found[name] = f"f {what.mode:04o} {stream.read(1000).decode('utf-8', 'surrogateescape')}"
        else:
            assert isinstance(what, Special)
            found[name] = f"{what.kind} {what.device[0]}/{what.device[1]}"
    return found


class TestStratum0Publisher(PublisherContract):
    """The contract of all publishers."""


def paths(target: Path, below: str = "") -> set[str]:
    """Every name below a path that is no directory, but the roots' and the markers."""
    repository = Repository.open(str(target))
    with Reader(repository.objects, repository.manifest().root) as reader:
        return {
            found.path[1:]
            for found in reader.walk(below)
            if not stat.S_ISDIR(found.row.mode) and not found.path.endswith("/.cvmfscatalog")
        }


def revision(target: Path) -> int:
    return Repository.open(str(target)).manifest().revision


class TestLayout:
    def test_names_lie_where_users_know_them(self, publisher: Stratum0Publisher, target: Path) -> None:
        record = publish(publisher, NAME, {"motd": b"hello"})
        identity = record.image_id.partition(":")[2]
        assert record.root == f".flat/{identity[:2]}/{identity}"
        assert paths(target) == {
            NAME,
            f"{record.root}/motd",
            f".metadata/{NAME}/manifest.json",
            f".metadata/{NAME}/record.json",
            f".metadata/published/{identity[:2]}",
            ".metadata/published/head",
            ".metadata/unreferenced.json",
        }

    def test_a_transaction_is_one_revision(self, publisher: Stratum0Publisher, target: Path) -> None:
        before = revision(target)
        tree = stored(publisher, {"motd": b"hello"})
        with publisher.transaction("two") as transaction:
            transaction.publish(release(NAME, tree))
            transaction.publish(release(OTHER, tree, seed="2"))
        assert revision(target) == before + 1

    def test_a_transaction_that_changes_nothing_is_no_revision(
        self, publisher: Stratum0Publisher, target: Path
    ) -> None:
        publish(publisher, NAME, {"motd": b"hello"})
        before = revision(target)
        with publisher.transaction("nothing"):
            pass
        with pytest.raises(RuntimeError), publisher.transaction("abort") as transaction:
            transaction.remove([NAME], now=1)
            raise RuntimeError
        assert revision(target) == before

    def test_removing_the_last_name_of_a_registry_removes_its_directories(
        self, publisher: Stratum0Publisher, target: Path
    ) -> None:
        record = publish(publisher, NAME, {"motd": b"hello"})
        with publisher.transaction("remove") as transaction:
            transaction.remove([NAME], now=2000)
        part = f".metadata/published/{record.root.split('/')[1]}"
        head = ".metadata/published/head"
        assert paths(target) == {f"{record.root}/motd", part, head, ".metadata/unreferenced.json"}
        data = publisher.noted("unreferenced.json")
        assert data is not None
        assert json.loads(data) == {record.root: 2000}

    def test_an_update_notes_when_the_root_before_lost_its_last_name(self, publisher: Stratum0Publisher) -> None:
        first = publish(publisher, NAME, {"motd": b"one"}, seed="1")
        publish(publisher, OTHER, {"motd": b"one"}, seed="1")
        publish(publisher, NAME, {"motd": b"two"}, seed="2", published=1500)
        assert publisher.noted("unreferenced.json") == b"{}\n"
        publish(publisher, OTHER, {"motd": b"two"}, seed="2", published=1600)
        data = publisher.noted("unreferenced.json")
        assert data is not None
        assert json.loads(data) == {first.root: 1600}

    def test_the_record_for_readers_is_the_record_in_the_index(self, publisher: Stratum0Publisher) -> None:
        record = publish(publisher, NAME, {"motd": b"hello"})
        data = publisher.noted(f"{NAME}/record.json")
        assert data is not None
        assert Published.parse(data) == record
        assert publisher.noted(f"{NAME}/manifest.json") == image(NAME, "1").manifest.raw

    def test_what_cvmfs_cannot_hold_is_left_out_and_counted(self, publisher: Stratum0Publisher) -> None:
        tree = stored(publisher, {"motd": b"hello"})
        bad = Symlink(0o777, 0, 0, MTIME, (), "x" * 5000)
        tree = Tree(tree.root._replace(children={**tree.root.children, "far": bad, "$": bad._replace(target="$(A)")}))
        with publisher.transaction("publish") as transaction:
            record = transaction.publish(release(NAME, tree))
        assert record.altered == {"modes": 2, "targets": 1, "variants": 1}
        assert record.entries == 2


class TestWhatOthersChange:
    """Edits by the official tools, made here by an edit of the catalogs."""

    def test_a_lost_index_is_made_anew_from_the_records(self, publisher: Stratum0Publisher, opened: Opened) -> None:
        record = publish(publisher, NAME, {"motd": b"hello"})
        edit_by_hand(publisher, {"/.metadata/published": None})
        assert opened().published() == {NAME: record}
        assert opened().root(record.image_id, record.rules) == record.root
        other = publish(opened(), OTHER, {"motd": b"hello"})
        assert opened().published() == {NAME: record, OTHER: other}

    def test_a_lost_index_and_record_leave_the_name_unreadable(
        self, publisher: Stratum0Publisher, opened: Opened
    ) -> None:
        publish(publisher, NAME, {"motd": b"hello"})
        edit_by_hand(publisher, {"/.metadata/published": None, f"/.metadata/{NAME}": None})
        assert opened().published() == {NAME: Unreadable(NAME, "it has no record (published by another tool?)")}

    def test_a_damaged_index_is_made_anew(self, publisher: Stratum0Publisher, opened: Opened) -> None:
        record = publish(publisher, NAME, {"motd": b"hello"})
        bad = stored(publisher, {"x": b"neither a name nor a root\n"}).root.children["x"]
        part = f"/.metadata/published/{record.root.split('/')[1]}"
        for path in (part, "/.metadata/published/head", "/.metadata/published/others"):
            edit_by_hand(publisher, {path: bad})
            assert opened().published() == {NAME: record}
        other = publish(opened(), OTHER, {"motd": b"two"}, seed="2")
        assert opened().published() == {NAME: record, OTHER: other}
        with opened().snapshot() as found:
            assert found.is_settled

    def test_a_link_that_somebody_moved_is_unreadable_and_an_update_mends_it(
        self, publisher: Stratum0Publisher
    ) -> None:
        publish(publisher, NAME, {"motd": b"hello"})
        edit_by_hand(publisher, {f"/{NAME}": Symlink(0o777, 0, 0, MTIME, (), "elsewhere")})
        found = publisher.published()[NAME]
        assert isinstance(found, Unreadable)
        assert "its link leads to" in found.problem
        record = publish(publisher, NAME, {"motd": b"two"}, seed="2")
        assert publisher.published() == {NAME: record}

    def test_what_is_no_link_is_none_of_ours_and_is_neither_replaced_nor_removed(
        self, publisher: Stratum0Publisher, target: Path
    ) -> None:
        publish(publisher, OTHER, {"motd": b"hello"})
        edit_by_hand(
            publisher, {f"/{NAME}": Directory(0o755, 0, 0, MTIME, (), {"own": Symlink(0o777, 0, 0, 1, (), "x")})}
        )
        found = publisher.published()[NAME]
        assert isinstance(found, Unreadable) and found.is_foreign
        with pytest.raises(PublishError, match=f"^/{re.escape(NAME)} is no symlink.*move it away"):
            publish(publisher, NAME, {"motd": b"two"}, seed="2")
        with pytest.raises(PublishError, match="is no symlink"), publisher.transaction("remove") as transaction:
            transaction.remove([NAME], now=NOW + 1001)
        assert paths(target, f"/{NAME}") == {f"{NAME}/own"}

    def test_a_link_that_somebody_removed_is_no_published_name(self, publisher: Stratum0Publisher) -> None:
        publish(publisher, NAME, {"motd": b"hello"})
        edit_by_hand(publisher, {f"/{NAME}": None})
        assert publisher.published() == {}
        record = publish(publisher, NAME, {"motd": b"hello"})
        assert publisher.published() == {NAME: record}

    def test_a_root_that_somebody_removed_is_no_root(self, publisher: Stratum0Publisher) -> None:
        record = publish(publisher, NAME, {"motd": b"hello"})
        edit_by_hand(publisher, {f"/{record.root}": None})
        assert publisher.root(record.image_id, record.rules) is None


def edit_by_hand(publisher: Stratum0Publisher, changes: dict[str, Any]) -> None:
    from unpacker.cvmfs.compose import Composition
    from unpacker.cvmfs.edit import edit
    from unpacker.cvmfs.transaction import transaction

    with publisher.lock():
        repository = publisher.repository
        with transaction(repository, now=NOW + 1000) as within:
            edited = edit(repository.objects, within.base.root, changes, Composition(last_modified=NOW + 1000))
            within.publish(edited.root, edited.size, now=NOW + 1000)


class TestPresence:
    def test_contents_that_were_collected_are_found_missing_before_anything_is_published(
        self, publisher: Stratum0Publisher, target: Path
    ) -> None:
        tree = stored(publisher, {"motd": b"hello"})
        (token,) = [n.token for n in tree.root.children.values() if isinstance(n, File)]
        os.unlink(target / "data" / token[2:4] / token[4:])
        before = revision(target)
        with (
            publisher.transaction("publish") as transaction,
            pytest.raises(PublishError, match=r"does not hold content .*the next run reads those layers again"),
        ):
            transaction.publish(release(NAME, tree))
        assert revision(target) == before


class TestReclaim:
    def test_what_a_run_stored_and_did_not_publish_is_freed_and_nothing_else(
        self, publisher: Stratum0Publisher, target: Path
    ) -> None:
        publish(publisher, NAME, {"motd": b"published before"})
        publish(publisher, NAME, {"motd": b"published, and replaced"}, seed="2")
        before = files(stored(publisher, {"x": b"stored by a run before"}))
        time.sleep(0.05)
        with publisher.lock():
            publish(publisher, OTHER, {"motd": b"published by this run"}, seed="3")
            there = set((target / "data").glob("??/*"))
            own = files(stored(publisher, {"x": b"too much", "y": b"stored by a run before"}))
            publisher.reclaim()
            assert publisher.contents.missing(own | before) == own - before != set()
            assert set((target / "data").glob("??/*")) == there
        problems = check(str(target), now=NOW + 1000, hashes=True, spool_root="/nowhere", configuration="/nowhere")
        assert [str(problem) for problem in problems] == []

    def test_nothing_is_freed_where_what_was_stored_may_be_of_the_official_tools(
        self, opened: Opened, tmp_path: Path
    ) -> None:
        (tmp_path / "spools" / REPOSITORY).mkdir(parents=True)
        publisher = opened(spool_root=str(tmp_path / "spools"), configuration=str(tmp_path / "none"))
        with publisher.lock():
            own = files(stored(publisher, {"x": b"perhaps not ours"}))
            publisher.reclaim()
            assert publisher.contents.missing(own) == set()


def files(tree: Tree) -> set[str]:
    return {node.token for node in tree.root.children.values() if isinstance(node, File)}


class TestLocks:
    def test_reading_needs_no_keys(self, publisher: Stratum0Publisher, opened: Opened, target: Path) -> None:
        record = publish(publisher, NAME, {"motd": b"hello"})
        shutil.rmtree(f"{target}.keys")
        assert opened().published() == {NAME: record}

    def test_missing_keys_are_told_before_any_work(self, opened: Opened, target: Path) -> None:
        os.unlink(f"{target}.keys/{REPOSITORY}.key")
        with pytest.raises(PublishError, match=r"\.key"), opened().lock():
            pass

    def test_a_run_does_not_keep_the_official_tools_out_but_a_transaction_does(
        self, opened: Opened, tmp_path: Path
    ) -> None:
        flag = tmp_path / "spools" / REPOSITORY / "in_transaction.lock"
        flag.parent.mkdir(parents=True)
        publisher = opened(spool_root=str(tmp_path / "spools"), configuration=str(tmp_path / "none"))
        with publisher.lock():
            assert not flag.exists()
            with publisher.transaction("nothing"):
                assert flag.exists()
            assert not flag.exists()

    def test_a_transaction_of_the_official_tools_is_busy_and_left_alone(self, opened: Opened, tmp_path: Path) -> None:
        flag = tmp_path / "spools" / REPOSITORY / "in_transaction.lock"
        flag.parent.mkdir(parents=True)
        flag.write_bytes(b"")
        publisher = opened(spool_root=str(tmp_path / "spools"), configuration=str(tmp_path / "none"))
        with pytest.raises(Busy, match="cvmfs_server"), publisher.transaction("nothing"):
            pass
        assert flag.exists()

    def test_the_base_is_read_again_under_the_locks(self, opened: Opened, target: Path) -> None:
        first, second = opened(), opened()
        one = publish(first, NAME, {"motd": b"one"})
        two = publish(second, OTHER, {"motd": b"two"}, seed="2")
        assert first.published() == {NAME: one, OTHER: two}


def changeset(*entries: Entry, **more: Any) -> Changeset:
    return Changeset(diff_id="sha256:" + "0" * 64, entries=entries, **more)


def with_layers(what: Release, *changesets: Changeset) -> Release:
    (layer,) = what.image.layers
    return Release(
        image=what.image,
        record=what.record,
        tree=what.tree,
        layers=tuple(Stacked(layer=layer, changeset=each, below=EMPTY) for each in changesets),
    )


class TestLayers:
    def test_a_layer_is_published_as_overlayfs_wants_it(self, publisher: Stratum0Publisher, target: Path) -> None:
        tree = stored(publisher, {"etc/motd": b"hello"})
        whole = tree.root.children["etc"]
        assert isinstance(whole, Directory)
        motd = whole.children["motd"]
        assert isinstance(motd, File)
        layer = changeset(
            Entry("etc", Kind.DIRECTORY, 0o755),
            Entry("etc/motd", Kind.FILE, 0o644, size=5, token=motd.token),
            whiteouts=("issue",),
            opaque=("etc",),
        )
        with publisher.transaction("publish") as transaction:
            what = with_layers(release(NAME, tree), layer)
            transaction.publish(what)
        digest = what.image.layers[0].descriptor.digest.hex
        repository = Repository.open(str(target))
        with Reader(repository.objects, repository.manifest().root) as reader:
            root = f"/.layers/{digest[:2]}/{digest}/layerfs"
            assert described(publisher, reader, root) == {
                "": "d 0755",
                "etc": "d 0755",
                "etc/motd": "f 0644 hello",
                "issue": "c 0/0",
            }
            found = reader.lookup(f"{root}/etc")
            assert found is not None
            assert node(found).xattrs == (("trusted.overlay.opaque", b"y"),)

    def test_a_layer_that_does_not_stand_alone_is_left_out_and_counted(
        self, publisher: Stratum0Publisher, target: Path
    ) -> None:
        tree = stored(publisher, {"motd": b"hello"})
        layer = changeset(Entry("again", Kind.HARDLINK, target="motd"))
        with publisher.transaction("publish") as transaction:
            record = transaction.publish(with_layers(release(NAME, tree), layer))
        assert record.altered == {"modes": 2, "layers": 1}
        assert not any(path.startswith(".layers") for path in paths(target))

    def test_without_the_view_layers_are_neither_asked_for_nor_published(self, opened: Opened, target: Path) -> None:
        publisher = opened(layers_view=False)
        assert not publisher.wants_layers
        tree = stored(publisher, {"motd": b"hello"})
        with publisher.transaction("publish") as transaction:
            transaction.publish(with_layers(release(NAME, tree), changeset()))
        assert not any(path.startswith(".layers") for path in paths(target))


class TestConcerns:
    def test_a_whitelist_near_its_end_is_a_concern(self, opened: Opened) -> None:
        day = 86_400
        assert opened(clock=lambda: NOW + 15 * day).concerns() == ()
        (concern,) = opened(clock=lambda: NOW + 25 * day).concerns()
        assert "expires in 5 days" in concern and "unpacker resign" in concern
        (concern,) = opened(clock=lambda: NOW + 40 * day).concerns()
        assert "has expired" in concern

    @pytest.mark.parametrize("data", [None, b"", b"damaged"])
    def test_a_whitelist_that_is_lost_or_damaged_is_a_concern(
        self, opened: Opened, target: Path, data: bytes | None
    ) -> None:
        os.unlink(target / ".cvmfswhitelist")
        if data is not None:
            (target / ".cvmfswhitelist").write_bytes(data)
        (concern,) = opened().concerns()
        assert ".cvmfswhitelist" in concern

    def test_of_no_repository_at_all_others_tell(self, tmp_path: Path) -> None:
        assert Stratum0Publisher(str(tmp_path / "none")).concerns() == ()

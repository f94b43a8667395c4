"""What every publisher promises, as tests: a class to inherit from, to run unchanged over each of them.

A subclass gives the fixtures `publisher` (a fresh, empty target), `again` (opens the same target as another process
would) and `visible` (what a reader finds below a public path: {path: description}, None if there is no such name).
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest

from tests import images
from unpacker.changeset import Entry, Kind
from unpacker.contracts import Publisher, Release
from unpacker.digest import Digest
from unpacker.errors import Busy, PublishError
from unpacker.image import Image, Layer, Pinned
from unpacker.multiarch import Place, front_target
from unpacker.oci import LINUX_AMD64, Descriptor, ImageConfig, Manifest, Platform, parse_manifest
from unpacker.record import Published
from unpacker.reference import Reference
from unpacker.tree import Directory, File, Node, Symlink, Tree

Contents = Mapping[str, bytes | str | None]
"""A tree by path: bytes are a file, text is the target of a symlink, None is a directory."""
Visible = Callable[[str], dict[str, str] | None]
MTIME = 1_600_000_000_123_456_789
NAME = "registry.example.org/team/tool:1.0"
OTHER = "registry.example.org/team/tool:2.0"


def entry(path: str, size: int, **meta: Any) -> Entry:
    return Entry(path, Kind.FILE, size=size, **({"mtime_ns": MTIME} | meta))


def stored(publisher: Publisher, contents: Contents, *, uid: int = 0, gid: int = 0, **meta: Any) -> Tree:
    """A prepared tree of these contents, its bytes put into the publisher's store."""
    root = Directory(0o755, uid, gid, MTIME, (), {})
    with publisher.contents.batch() as batch:
        for path, what in contents.items():
            *parents, name = path.split("/")
            directory = root
            for parent in parents:
                made = Directory(0o755, uid, gid, MTIME, (), {})
                below = directory.children.setdefault(parent, made)
                assert isinstance(below, Directory)
                directory = below
            node: Node
            if what is None:
                node = Directory(0o755, uid, gid, MTIME, (), {})
            elif isinstance(what, str):
                node = Symlink(0o777, uid, gid, MTIME, (), what)
            else:
                hint = entry(path, len(what), uid=uid, gid=gid, **meta)
                token = batch.put(io.BytesIO(what), len(what), hint)
                node = File(hint.mode, uid, gid, hint.mtime_ns, hint.xattrs, hint.size, token)
            directory.children[name] = node
    return Tree(root)


def image(name: str, seed: str) -> Image:
    """An image of one layer, another one for each seed."""
    built = images.image(images.layer(images.file("seed", seed.encode())))
    manifest = parse_manifest(built.manifest)
    assert isinstance(manifest, Manifest)
    config = ImageConfig.parse(built.config)
    descriptor = Descriptor(media_type=built.media_type, digest=Digest.parse(built.digest), size=len(built.manifest))
    return Image(
        pinned=Pinned(reference=Reference.parse(name), descriptor=descriptor, platform=LINUX_AMD64),
        manifest=manifest,
        manifest_digest=built.digest,
        config=config,
        layers=tuple(
            Layer(descriptor=d, diff_id=str(i)) for d, i in zip(manifest.layers, config.diff_ids, strict=True)
        ),
    )


def release(name: str, tree: Tree | None, *, seed: str = "1", rules: str = "rules", published: int = 1000) -> Release:
    what = image(name, seed)
    record = Published(
        reference=what.pinned.reference,
        digest=str(what.pinned.descriptor.digest),
        manifest_digest=what.manifest_digest,
        image_id=what.image_id,
        platform=LINUX_AMD64,
        root="",
        rules=rules,
        wishlist="https://git.example.org/wishlist.yaml",
        published=published,
        altered={"modes": 2} if tree is not None else {},
    )
    return Release(image=what, record=record, tree=tree)


def publish(publisher: Publisher, name: str, contents: Contents, **options: Any) -> Published:
    """Publishes one image in a transaction of its own."""
    with publisher.lock(), publisher.transaction(f"publish {name}") as transaction:
        return transaction.publish(release(name, stored(publisher, contents), **options))


def platform_release(name: str, tree: Tree | None, platform: str, **options: Any) -> Release:
    """One platform of several of an image."""
    what = release(name, tree, **options)
    record = replace(what.record, platform=Platform.parse(platform), place=Place.PLATFORM)
    return replace(what, record=record)


def front(publisher: Publisher, name: str, platform: str = "linux/amd64", **fields: Any) -> Published:
    """The record of the name before several platforms, this one first."""
    first = Platform.parse(platform)
    return replace(
        release(name, None).record,
        platform=first,
        root=front_target(name, first, variants=publisher.fills_in_variables),
        manifest_digest="",
        image_id="",
        rules="",
        place=Place.FRONT,
        **fields,
    )


def publish_platforms(publisher: Publisher, name: str, **contents: bytes) -> dict[str, Published]:
    """Publishes amd64 and arm64 of one image, and the front before them, in one transaction."""
    found = {}
    with publisher.lock(), publisher.transaction(f"publish {name}") as transaction:
        for architecture, content in contents.items():
            tree = stored(publisher, {"motd": content})
            what = platform_release(name, tree, f"linux/{architecture}", seed=architecture)
            found[architecture] = transaction.publish(what)
        found["front"] = transaction.point(front(publisher, name))
    return found


class PublisherContract:
    """The tests; see the module's first lines for what a subclass gives."""

    def test_a_fresh_target_has_nothing_published(self, publisher: Publisher) -> None:
        assert publisher.published() == {}

    def test_what_was_published_is_visible_and_recorded(self, publisher: Publisher, visible: Visible) -> None:
        contents = {"etc/motd": b"hello", "etc/empty": b"", "bin": "usr/bin", "srv": None, "a/b/c/d": b"deep"}
        record = publish(publisher, NAME, contents)
        found = visible(NAME)
        assert found is not None
        assert found["etc/motd"] == "f 0644 hello"
        assert found["etc/empty"] == "f 0644 "
        assert found["bin"] == "l usr/bin"
        assert found["srv"] == "d 0755"
        assert found["a/b/c/d"] == "f 0644 deep"
        assert publisher.published() == {NAME: record}

    def test_the_record_is_completed_by_the_publisher(self, publisher: Publisher) -> None:
        record = publish(publisher, NAME, {"etc/motd": b"hello", "etc/empty": b"", "bin": "usr/bin"})
        assert record.root
        assert (record.entries, record.size, dict(record.altered)) == (4, 5, {"modes": 2})
        assert record.replaces is None

    def test_another_process_reads_the_same(self, publisher: Publisher, again: Callable[[], Publisher]) -> None:
        record = publish(publisher, NAME, {"motd": b"hello"})
        assert again().published() == {NAME: record}
        assert again().root(record.image_id, record.rules) == record.root

    def test_nothing_is_visible_before_the_transaction_ends(self, publisher: Publisher, visible: Visible) -> None:
        tree = stored(publisher, {"motd": b"hello"})
        with publisher.transaction("publish") as transaction:
            record = transaction.publish(release(NAME, tree))
            assert visible(NAME) is None
            assert publisher.published() == {}
            assert publisher.root(record.image_id, record.rules) is None
        assert visible(NAME) == {"": "d 0755", "motd": "f 0644 hello"}

    def test_an_exception_aborts_and_goes_through_unchanged(self, publisher: Publisher, visible: Visible) -> None:
        before = publish(publisher, NAME, {"motd": b"one"})
        tree = stored(publisher, {"motd": b"two"})
        stop = RuntimeError("stop")
        with pytest.raises(RuntimeError) as raised, publisher.transaction("publish") as transaction:
            transaction.publish(release(NAME, tree, seed="2"))
            transaction.publish(release(OTHER, tree, seed="2"))
            transaction.remove([NAME], now=5)
            transaction.note("status.json", b"{}")
            raise stop
        assert raised.value is stop
        assert publisher.published() == {NAME: before}
        assert visible(NAME) == {"": "d 0755", "motd": "f 0644 one"}
        assert visible(OTHER) is None

    def test_an_update_replaces_and_keeps_what_it_replaced_in_its_record(
        self, publisher: Publisher, visible: Visible
    ) -> None:
        first = publish(publisher, NAME, {"motd": b"one"}, seed="1")
        second = publish(publisher, NAME, {"motd": b"two"}, seed="2")
        third = publish(publisher, NAME, {"motd": b"three"}, seed="3")
        assert first.root != second.root
        assert (second.replaces, third.replaces) == (first, _bare(second))
        assert publisher.published() == {NAME: third}
        assert visible(NAME) == {"": "d 0755", "motd": "f 0644 three"}

    def test_names_of_one_image_share_a_root_composed_once(self, publisher: Publisher, visible: Visible) -> None:
        tree = stored(publisher, {"motd": b"hello"})
        with publisher.transaction("publish") as transaction:
            first = transaction.publish(release(NAME, tree))
            second = transaction.publish(release(OTHER, tree))
        assert first.root == second.root
        assert visible(OTHER) == visible(NAME) == {"": "d 0755", "motd": "f 0644 hello"}

    def test_a_root_that_exists_needs_no_tree(self, publisher: Publisher, visible: Visible) -> None:
        first = publish(publisher, NAME, {"motd": b"hello"})
        assert publisher.root(first.image_id, first.rules) == first.root
        with publisher.transaction("publish") as transaction:
            second = transaction.publish(release(OTHER, None))
        assert (second.root, second.entries, second.altered) == (first.root, first.entries, first.altered)
        assert visible(OTHER) == {"": "d 0755", "motd": "f 0644 hello"}

    def test_a_release_without_tree_or_root_is_refused(self, publisher: Publisher) -> None:
        with pytest.raises(PublishError, match="no sound root"), publisher.transaction("publish") as transaction:
            transaction.publish(release(NAME, None))
        assert publisher.published() == {}

    def test_other_rules_make_another_root_and_leave_the_first_alone(
        self, publisher: Publisher, visible: Visible
    ) -> None:
        first = publish(publisher, NAME, {"motd": b"one"}, rules="old")
        second = publish(publisher, OTHER, {"motd": b"one", "more": b"x"}, rules="new")
        assert first.root != second.root
        assert publisher.root(first.image_id, "old") == first.root
        assert publisher.root(first.image_id, "new") == second.root
        assert publisher.root(first.image_id, "third") is None
        assert visible(NAME) == {"": "d 0755", "motd": "f 0644 one"}

    def test_a_tree_for_a_name_that_has_this_very_root_makes_a_new_one(
        self, publisher: Publisher, visible: Visible
    ) -> None:
        damaged = publish(publisher, NAME, {"motd": b"hello"})
        publish(publisher, OTHER, {"motd": b"hello"})
        repaired = publish(publisher, NAME, {"motd": b"hello"})
        assert repaired.root != damaged.root
        assert publisher.root(damaged.image_id, damaged.rules) == repaired.root
        assert visible(NAME) == visible(OTHER) == {"": "d 0755", "motd": "f 0644 hello"}

    def test_removed_names_are_gone_and_others_stay(self, publisher: Publisher, visible: Visible) -> None:
        publish(publisher, NAME, {"motd": b"one"}, seed="1")
        other = publish(publisher, OTHER, {"motd": b"two"}, seed="2")
        with publisher.transaction("remove") as transaction:
            transaction.remove([NAME], now=2000)
        assert publisher.published() == {OTHER: other}
        assert visible(NAME) is None
        assert visible(OTHER) == {"": "d 0755", "motd": "f 0644 two"}

    def test_removing_what_is_not_published_is_refused_as_a_whole(self, publisher: Publisher) -> None:
        record = publish(publisher, NAME, {"motd": b"one"})
        with pytest.raises(PublishError, match=r"not published.*tool:2\.0"), publisher.transaction("remove") as t:
            t.remove([NAME, OTHER], now=2000)
        assert publisher.published() == {NAME: record}

    def test_removing_and_publishing_may_share_a_transaction(self, publisher: Publisher, visible: Visible) -> None:
        publish(publisher, NAME, {"motd": b"one"}, seed="1")
        tree = stored(publisher, {"motd": b"two"})
        with publisher.transaction("both") as transaction:
            transaction.remove([NAME], now=2000)
            record = transaction.publish(release(OTHER, tree, seed="2"))
        assert publisher.published() == {OTHER: record}
        assert visible(NAME) is None

    def test_a_removed_name_can_be_published_again_with_its_root(self, publisher: Publisher) -> None:
        first = publish(publisher, NAME, {"motd": b"one"})
        with publisher.transaction("remove") as transaction:
            transaction.remove([NAME], now=2000)
        with publisher.transaction("publish") as transaction:
            second = transaction.publish(release(NAME, None))
        assert second.root == first.root
        assert publisher.published() == {NAME: second}

    def test_an_image_that_cannot_be_composed_leaves_the_transaction_usable(self, publisher: Publisher) -> None:
        good = stored(publisher, {"motd": b"hello"})
        lost = File(0o644, 0, 0, MTIME, (), 5, f"{'0' * 64}.{'0' * 16}")
        bad = Tree(Directory(0o755, 0, 0, MTIME, (), {"lost": lost}))
        with publisher.transaction("publish") as transaction:
            with pytest.raises(PublishError, match="does not hold content"):
                transaction.publish(release(OTHER, bad, seed="2"))
            record = transaction.publish(release(NAME, good))
        assert publisher.published() == {NAME: record}

    def test_an_empty_transaction_changes_nothing(self, publisher: Publisher) -> None:
        record = publish(publisher, NAME, {"motd": b"one"})
        with publisher.transaction("nothing"):
            pass
        assert publisher.published() == {NAME: record}

    def test_the_lock_excludes_others_and_names_its_holder(
        self, publisher: Publisher, again: Callable[[], Publisher]
    ) -> None:
        with publisher.lock(), publisher.lock(), pytest.raises(Busy, match=r"pid [0-9]+"), again().lock():
            pass
        with again().lock():
            pass

    def test_no_transaction_opens_on_a_busy_target(
        self, publisher: Publisher, again: Callable[[], Publisher], visible: Visible
    ) -> None:
        tree = stored(publisher, {"motd": b"hello"})
        with publisher.transaction("publish") as transaction:
            transaction.publish(release(NAME, tree))
            with pytest.raises(Busy), again().transaction("publish"):
                pass
        assert visible(NAME) == {"": "d 0755", "motd": "f 0644 hello"}

    def test_one_transaction_at_a_time(self, publisher: Publisher) -> None:
        with publisher.transaction("outer"), pytest.raises(PublishError, match="open already"):  # noqa: SIM117
            with publisher.transaction("inner"):
                pass

    def test_each_platform_is_a_name_of_its_own_and_the_front_leads_to_one(
        self, publisher: Publisher, visible: Visible, again: Callable[[], Publisher]
    ) -> None:
        records = publish_platforms(publisher, NAME, amd64=b"one", arm64=b"two")
        assert visible(NAME) == visible(f".multiarch/amd64/{NAME}") == {"": "d 0755", "motd": "f 0644 one"}
        assert visible(f".multiarch/arm64:v8/{NAME}") == {"": "d 0755", "motd": "f 0644 two"}
        expected = {
            NAME: records["front"],
            f".multiarch/amd64/{NAME}": records["amd64"],
            f".multiarch/arm64:v8/{NAME}": records["arm64"],
        }
        assert publisher.published() == again().published() == expected

    def test_platforms_are_found_by_what_machines_call_themselves(self, publisher: Publisher, visible: Visible) -> None:
        publish_platforms(publisher, NAME, amd64=b"one", arm64=b"two")
        publish_platforms(publisher, OTHER, amd64=b"one")
        for alias in ("x86_64", "x86-64"):
            assert visible(f".multiarch/{alias}/{OTHER}") == {"": "d 0755", "motd": "f 0644 one"}
        for alias in ("aarch64", "arm64"):
            assert visible(f".multiarch/{alias}/{NAME}") == {"": "d 0755", "motd": "f 0644 two"}
        assert visible(f".multiarch/i386/{NAME}") is None

    def test_one_platform_of_a_tag_shares_its_root_with_a_plain_name(self, publisher: Publisher) -> None:
        first = publish(publisher, OTHER, {"motd": b"one"}, seed="amd64")
        with publisher.transaction("publish") as transaction:
            second = transaction.publish(platform_release(NAME, None, "linux/amd64", seed="amd64"))
        assert second.root == first.root

    def test_a_plain_name_becomes_a_front_and_plain_again(self, publisher: Publisher, visible: Visible) -> None:
        plain = publish(publisher, NAME, {"motd": b"one"}, seed="amd64")
        records = publish_platforms(publisher, NAME, amd64=b"one", arm64=b"two")
        assert records["front"].replaces == plain
        assert records["amd64"].root == plain.root
        assert visible(NAME) == {"": "d 0755", "motd": "f 0644 one"}
        with publisher.transaction("plain") as transaction:
            after = transaction.publish(release(NAME, None, seed="arm64"))
            transaction.remove([f".multiarch/amd64/{NAME}", f".multiarch/arm64:v8/{NAME}"], now=2000)
        assert after.replaces == _bare(records["front"])
        assert publisher.published() == {NAME: after}
        assert visible(NAME) == {"": "d 0755", "motd": "f 0644 two"}
        assert visible(f".multiarch/amd64/{NAME}") is None

    def test_a_front_and_its_platforms_go_together_and_come_back(self, publisher: Publisher, visible: Visible) -> None:
        records = publish_platforms(publisher, NAME, amd64=b"one", arm64=b"two")
        other = publish_platforms(publisher, OTHER, amd64=b"one")
        with publisher.transaction("remove") as transaction:
            transaction.remove([record.public_path for record in records.values()], now=2000)
        assert set(publisher.published()) == {record.public_path for record in other.values()}
        assert visible(NAME) is None
        again = publish_platforms(publisher, NAME, amd64=b"one", arm64=b"two")
        assert {name: record.root for name, record in again.items()} == {
            name: record.root for name, record in records.items()
        }

    def test_a_front_is_aborted_with_all_else(self, publisher: Publisher, visible: Visible) -> None:
        before = publish(publisher, NAME, {"motd": b"one"})
        with pytest.raises(RuntimeError), publisher.transaction("publish") as transaction:
            transaction.point(front(publisher, NAME))
            raise RuntimeError("stop")
        assert publisher.published() == {NAME: before}
        assert visible(NAME) == {"": "d 0755", "motd": "f 0644 one"}

    def test_names_that_are_not_utf_8_survive(self, publisher: Publisher, visible: Visible) -> None:
        publish(publisher, NAME, {"caf\udce9": b"x", "l": "caf\udce9"})
        found = visible(NAME)
        assert found is not None
        assert found["caf\udce9"] == "f 0644 x"
        assert found["l"] == "l caf\udce9"

    def test_there_is_no_room_for_more_than_the_disk_has(self, publisher: Publisher) -> None:
        with publisher.lock():
            publisher.room(1000, 10)
            with pytest.raises(PublishError, match="no room"):
                publisher.room(1 << 60, 10)

    def test_the_store_gives_back_what_it_took(self, publisher: Publisher) -> None:
        with publisher.lock(), publisher.contents.batch() as batch:
            token = batch.put(io.BytesIO(b"hello"), 5, entry("motd", 5))
            assert batch.written == 5
        reopened = pickle.loads(pickle.dumps(publisher.contents.locator)).open()
        with reopened.open(token) as stream:
            assert stream.read(100) == b"hello"
            assert stream.read(100) == b""
        assert reopened.missing({token, f"{'0' * 64}.{'0' * 16}"}) == {f"{'0' * 64}.{'0' * 16}"}

    def test_a_batch_left_by_exception_forgets_its_tokens(self, publisher: Publisher) -> None:
        with publisher.lock():
            with pytest.raises(RuntimeError), publisher.contents.batch() as batch:
                token = batch.put(io.BytesIO(b"hello"), 5, entry("motd", 5))
                raise RuntimeError("stop")
            assert publisher.contents.missing({token}) == {token}


def _bare(record: Published) -> Published:
    return replace(record, replaces=None)

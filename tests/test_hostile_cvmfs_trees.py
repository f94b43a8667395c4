"""Trees that a catalog cannot hold as they are, and catalogs that are none: left out and counted, or refused, soon."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.catalog_check import check, database, new_store
from unpacker.changeset import Kind, Xattrs
from unpacker.cvmfs import deflation
from unpacker.cvmfs.catalog import Catalog
from unpacker.cvmfs.compose import Composed, Composition, compose
from unpacker.cvmfs.edit import create_root, edit
from unpacker.cvmfs.hash import ContentHash
from unpacker.cvmfs.objects import ObjectStore
from unpacker.cvmfs.reader import Reader, node
from unpacker.errors import PublishError
from unpacker.tree import Directory, File, Node, Special, Symlink, Tree

AT = "/.flat/ab/abcd"
PLAIN = Composition(last_modified=1)


@pytest.fixture(scope="module")
def objects() -> Iterator[ObjectStore]:
    with new_store() as store:
        yield store


def file(token: str = f"z:{'12' * 20}", size: int = 1, xattrs: Xattrs = ()) -> File:
    return File(0o644, 0, 0, 0, xattrs, size, token)


def link(target: str) -> Symlink:
    return Symlink(0o777, 0, 0, 0, (), target)


def directory(children: dict[str, Node] | None = None, xattrs: Xattrs = ()) -> Directory:
    return Directory(0o755, 0, 0, 0, xattrs, children or {})


def published(objects: ObjectStore, children: dict[str, Node], **settings: int) -> tuple[Composed, dict[str, Node]]:
    """What a tree became, and what is read from it; the catalogs are right in any case."""
    composition = Composition(last_modified=1, **settings)  # type: ignore[arg-type]
    composed = compose(Tree(directory(children)), AT, objects, composition)
    root = edit(objects, create_root(objects, PLAIN).root, {AT: composed.mount}, PLAIN).root
    assert check(objects, root) == []
    with Reader(objects, root) as reader:
        found = {f.path[len(AT) + 1 :]: node(f) for f in reader.walk(AT) if f.path != AT}
    return composed, {path: n for path, n in found.items() if path.rpartition("/")[2] != ".cvmfscatalog"}


# Names.


def test_markers_of_an_image_are_left_out_and_counted(objects: ObjectStore) -> None:
    composed, found = published(
        objects,
        {
            ".cvmfscatalog": file(),
            "a": directory({".cvmfscatalog": directory({"inside": file()}), "b": file()}),
            "c": directory({".cvmfscatalog": link("b")}),
        },
    )
    assert found.keys() == {"a", "a/b", "c"}
    assert composed.altered == {"markers": 3}


def test_a_marker_that_is_a_large_directory_is_no_place_to_cut(objects: ObjectStore) -> None:
    heavy = directory({f"f{n}": file() for n in range(50)})
    composed, found = published(objects, {".cvmfscatalog": heavy, "a": file()}, smallest=1, largest=10)
    assert found.keys() == {"a"}
    assert composed.catalogs == 1


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/", "a\0b", "x" * 256, "ü" * 128, "\udcff" * 256])
def test_names_that_no_file_has_are_left_out_with_what_is_in_them(objects: ObjectStore, name: str) -> None:
    composed, found = published(objects, {name: directory({"f": file()}), "kept": file()})
    assert found.keys() == {"kept"}
    assert composed.altered == {"names": 1}


def test_the_longest_names_are_kept(objects: ObjectStore) -> None:
    composed, found = published(objects, {"x" * 255: file(), "ü" * 127: file(), "\udcff" * 255: file()})
    assert len(found) == 3
    assert composed.altered == {}


@pytest.mark.parametrize("name", ["'; DROP TABLE catalog; --", "%s", "\n", "\x1b[31m", "-", "*", "\udc80", "\ufeff"])
def test_names_are_never_more_than_names(objects: ObjectStore, name: str) -> None:
    content = directory({name: file()})
    _, found = published(objects, {name: content}, smallest=1, largest=1)
    assert found.keys() == {name, f"{name}/{name}"}


def test_two_spellings_of_the_same_bytes_are_refused(objects: ObjectStore) -> None:
    """No layer gives them; a damaged cache of layers might."""
    with pytest.raises(PublishError, match="same path"):
        compose(Tree(directory({"ü": file(), "\udcc3\udcbc": file()})), AT, objects, PLAIN)


# Targets.


@pytest.mark.parametrize("target", ["", "x" * 4096, "ü" * 2048, "a\0b"])
def test_symlinks_that_clients_cannot_return_are_left_out(objects: ObjectStore, target: str) -> None:
    composed, found = published(objects, {"bad": link(target), "kept": link("x" * 4095)})
    assert found == {"kept": link("x" * 4095)}
    assert composed.altered == {"targets": 1}


@pytest.mark.parametrize(
    ("target", "is_counted"),
    [("$(HOME)/x", True), ("a$(X:-y)", True), ("$HOME", False), ("$(open", False), (")$(", False), ("$", False)],
)
def test_targets_that_clients_will_fill_in_are_kept_and_counted(
    objects: ObjectStore, target: str, is_counted: bool
) -> None:
    composed, found = published(objects, {"l": link(target)})
    assert found == {"l": link(target)}
    assert composed.altered == ({"variants": 1} if is_counted else {})


# Attributes.


def test_attributes_beyond_the_format_are_dropped_and_the_others_kept(objects: ObjectStore) -> None:
    xattrs = (("user.a", b"x" * 255), ("user.b", b"x" * 256), ("user." + "k" * 251, b""))
    composed, found = published(objects, {"f": file(xattrs=xattrs), "d": directory(xattrs=xattrs), "g": file()})
    assert found["f"].xattrs == found["d"].xattrs == (("user.a", b"x" * 255),)
    assert composed.altered == {"xattrs": 2}
    assert composed.mount.counters.own.xattr == 2


def test_a_file_whose_only_attribute_is_dropped_counts_as_one_without(objects: ObjectStore) -> None:
    composed, found = published(objects, {"f": file(xattrs=(("user.a", b"x" * 256),))})
    assert found["f"].xattrs == ()
    assert composed.mount.counters.own.xattr == 0


def test_of_too_many_attributes_the_first_are_kept(objects: ObjectStore) -> None:
    xattrs = tuple((f"user.{n:03}", b"") for n in range(300))
    composed, found = published(objects, {"f": file(xattrs=xattrs)})
    assert found["f"].xattrs == xattrs[:255]
    assert composed.altered == {"xattrs": 1}


# Numbers.


@pytest.mark.parametrize("mtime_ns", [2**88 * 10**9, -(2**88) * 10**9])
def test_times_beyond_all_clocks_become_the_furthest_there_is(objects: ObjectStore, mtime_ns: int) -> None:
    _, found = published(objects, {"f": file()._replace(mtime_ns=mtime_ns)})
    assert abs(found["f"].mtime_ns) == (2**63 - 1) * 10**9
    assert (found["f"].mtime_ns > 0) is (mtime_ns > 0)


def test_the_devices_of_whiteouts_are_kept(objects: ObjectStore) -> None:
    whiteout = Special(0, 0, 0, 0, (), Kind.CHARACTER, (0, 0))
    assert published(objects, {"w": whiteout})[1] == {"w": whiteout}


@pytest.mark.parametrize("token", ["", "z:", "z:" + "g" * 40, "z:" + "1" * 39, "sha256:" + "1" * 64, "zc:"])
def test_tokens_of_nothing_are_refused(objects: ObjectStore, token: str) -> None:
    with pytest.raises(PublishError, match="not a token"):
        compose(Tree(directory({"f": file(token)})), AT, objects, PLAIN)


def test_chunks_that_do_not_make_up_their_file_are_refused(objects: ObjectStore) -> None:
    with pytest.raises(PublishError, match="chunks of a file of 9 bytes have 7"):
        compose(Tree(directory({"f": file(f"zc:{'12' * 20}@4,{'34' * 20}@3", 9)})), AT, objects, PLAIN)


# Depth and floods.


def test_a_tree_two_thousand_deep_is_composed_cut_and_read(objects: ObjectStore) -> None:
    deep = directory({"f": file()})
    for _ in range(2_000):
        deep = directory({"d": deep})
    start = time.monotonic()
    composed, found = published(objects, {"d": deep}, smallest=1, largest=400)
    assert time.monotonic() - start < 30
    assert composed.catalogs > 4
    assert max(path.count("/") for path in found) == 2_001


def test_a_wide_directory_takes_linear_time(objects: ObjectStore) -> None:
    start = time.monotonic()
    composed = compose(Tree(directory({f"f{n}": file() for n in range(60_000)})), AT, objects, PLAIN)
    assert time.monotonic() - start < 20
    assert composed.catalogs == 1


# Catalogs that are none.


@pytest.mark.parametrize("data", [b"", b"SQLite format 3\0", b"x" * 5000, b"SQLite format 3\0" + b"\xff" * 4080])
def test_bytes_that_are_no_database_are_refused(data: bytes) -> None:
    with pytest.raises(PublishError, match="it"):
        Catalog.load(data, "it")


@pytest.mark.parametrize(
    "statement",
    [
        "DROP TABLE properties",
        "DROP TABLE catalog",
        "DROP TABLE nested_catalogs",
        "DROP TABLE statistics",
        "DELETE FROM statistics WHERE counter = 'self_chunks'",
        "DELETE FROM properties",
        "UPDATE properties SET value = 'x' WHERE key = 'revision'",
        "UPDATE properties SET value = '/elsewhere' WHERE key = 'schema_revision'",
        "INSERT INTO properties VALUES ('root_prefix', '/elsewhere')",
        "INSERT OR REPLACE INTO properties VALUES ('previous_revision', 'x')",
        "CREATE VIEW v AS SELECT 1",
        "CREATE TRIGGER t AFTER INSERT ON catalog BEGIN DELETE FROM catalog; END",
        "UPDATE catalog SET name = x'ff' WHERE name = 'a'",
        "UPDATE catalog SET size = 'x' WHERE name = 'a'",
        "UPDATE catalog SET hash = 'x' WHERE name = 'a'",
        "UPDATE catalog SET hash = x'00' WHERE name = 'a'",
        "UPDATE catalog SET hash = NULL WHERE name = 'a'",
        "UPDATE catalog SET xattr = x'09' WHERE name = 'a'",
        "UPDATE catalog SET flags = 3 WHERE name = 'a'",
        "UPDATE catalog SET flags = 68 WHERE name = 'a'",
        "UPDATE catalog SET flags = 4 | 7 << 8 WHERE name = 'a'",
        "DELETE FROM catalog WHERE name = ''",
        "DELETE FROM nested_catalogs",
        "UPDATE nested_catalogs SET sha1 = 'x'",
        "UPDATE nested_catalogs SET sha1 = '11' || substr(sha1, 3)",
        "UPDATE nested_catalogs SET size = 1",
    ],
)
def test_a_damaged_catalog_is_a_publish_error_and_never_less_than_there_is(
    objects: ObjectStore, statement: str
) -> None:
    root = create_root(objects, PLAIN).root
    root = edit(objects, root, {"/a": file(), "/r/i:t": link("x")}, PLAIN).root
    db = database(objects.read(root, "C"))
    db.execute(statement)
    db.commit()
    damaged = objects.put(deflation.stock(db.serialize()), "C")
    with pytest.raises(PublishError):
        _read_all(objects, damaged)


def _read_all(objects: ObjectStore, root: ContentHash) -> None:
    with Reader(objects, root) as reader:
        reader.root.all_nested()
        for found in reader.walk():
            node(found)

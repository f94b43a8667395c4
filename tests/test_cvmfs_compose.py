"""A tree becomes nested catalogs, from which the same tree can be read."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.catalog_check import check, database, new_store
from unpacker.changeset import Change, Kind
from unpacker.cvmfs.compose import Composed, Composition, compose
from unpacker.cvmfs.cuts import cuts, fans_out
from unpacker.cvmfs.deflation import EMPTY
from unpacker.cvmfs.edit import create_root, edit
from unpacker.cvmfs.hash import ContentHash
from unpacker.cvmfs.objects import ObjectStore
from unpacker.cvmfs.reader import Reader, node
from unpacker.tree import Directory, File, Node, Special, Symlink, Tree, walk

AT = "/.flat/ab/abcd"
TOKEN = f"z:{'12' * 20}"
PLAIN = Composition(last_modified=1_700_000_000)


@pytest.fixture(scope="module")
def objects() -> Iterator[ObjectStore]:
    with new_store() as store:
        yield store


def file(size: int = 1, token: str = TOKEN) -> File:
    return File(0o644, 1, 2, 3 * 10**9 + 4, (), size, token)


def directory(**children: Node) -> Directory:
    return Directory(0o755, 0, 0, 0, (), children)


def tree(**children: Node) -> Tree:
    return Tree(directory(**children))


def mounted(objects: ObjectStore, composed: Composed) -> ContentHash:
    """A repository that has nothing but this tree."""
    root = create_root(objects, PLAIN).root
    return edit(objects, root, {AT: composed.mount}, PLAIN).root


def read(objects: ObjectStore, root: ContentHash, at: str = AT) -> dict[str, Node]:
    """The names below a path and their nodes; a directory without its children, markers left out."""
    with Reader(objects, root) as reader:
        return {
            found.path[len(at) :].lstrip("/"): node(found)
            for found in reader.walk(at)
            if not found.path.endswith("/.cvmfscatalog")
        }


def bare(tree: Tree) -> dict[str, Node]:
    return {path: n._replace(children={}) if isinstance(n, Directory) else n for path, n in walk(tree)}


def tree_of(sizes: Mapping[str, int]) -> Tree:
    """Directories by path, parents first, each with so many files."""
    root = directory()
    made = {"": root}
    for path, files in sizes.items():
        if path:
            parent, _, name = path.rpartition("/")
            made[path] = made[parent].children[name] = directory()  # type: ignore[assignment]
        made[path].children.update({f"f{n}": file() for n in range(files)})
    return Tree(root)


# Round trips.

_NAMES = st.one_of(
    st.sampled_from(["a", "b", "usr", ".hidden", "ü", "\udcff", "%", "a'b", "x" * 255]),
    st.binary(min_size=1, max_size=4)
    .map(os.fsdecode)
    .filter(lambda n: n not in (".", "..") and not {"/", "\0"} & set(n)),
)
_META = {
    "mode": st.integers(0, 0o7777),
    "uid": st.sampled_from([0, 1000, 2**32 - 2]),
    "gid": st.sampled_from([0, 1000, 2**32 - 2]),
    "mtime_ns": st.sampled_from([0, -1, 1, 1_700_000_000_123_456_789, -(10**18), 2**33 * 10**9]),
    "xattrs": st.lists(
        st.tuples(st.sampled_from(["user.a", "user.\udcff", "trusted.overlay.opaque"]), st.binary(max_size=255)),
        unique_by=lambda x: x[0],
    ).map(lambda x: tuple(sorted(x))),
    "change": st.just(Change.NONE),
}
_HASHES = st.sampled_from([f"{n:040x}{tag}" for n in (0, 1, 2**159) for tag in ("", "-rmd160", "-shake128")])
_FILES = st.one_of(
    st.builds(File, **_META, size=st.integers(0, 2**40), token=_HASHES.map("z:{}".format)),
    st.builds(File, **_META, size=st.integers(0, 2**40), token=_HASHES.map("n:{}".format)),
    st.builds(File, **_META, size=st.just(7), token=_HASHES.map("zc:{0}@4,{0}@3".format)),
)
_LINKS = st.builds(Symlink, **{**_META, "mode": st.just(0o777)}, target=_NAMES.map("../{}".format))
_DEVICES = st.builds(
    Special,
    **_META,
    kind=st.sampled_from([Kind.CHARACTER, Kind.BLOCK]),
    device=st.sampled_from([(0, 0), (1, 3), (259, 70000), (2**32 - 1, 2**32 - 1)]),
)
_FIFOS = st.builds(Special, **_META, kind=st.just(Kind.FIFO), device=st.just((0, 0)))
_NODES = st.recursive(
    st.one_of(_FILES, _LINKS, _DEVICES, _FIFOS),
    lambda inner: st.builds(Directory, **_META, children=st.dictionaries(_NAMES, inner, max_size=4)),
    max_leaves=12,
)
_TREES = st.builds(Directory, **_META, children=st.dictionaries(_NAMES, _NODES, max_size=5)).map(Tree)


@settings(max_examples=60, deadline=None)
@given(tree=_TREES, largest=st.integers(1, 8), hidden=st.booleans())
def test_a_tree_is_read_from_its_catalogs_as_it_was_however_it_is_cut(
    objects: ObjectStore, tree: Tree, largest: int, hidden: bool
) -> None:
    composition = Composition(last_modified=1, smallest=1, largest=largest, hidden_markers=hidden)
    composed = compose(tree, AT, objects, composition)
    root = mounted(objects, composed)
    assert read(objects, root) == bare(tree)
    assert check(objects, root) == []
    assert composed.altered == {}


@settings(max_examples=30, deadline=None)
@given(tree=_TREES, largest=st.integers(1, 8), seed=st.randoms(use_true_random=False))
def test_the_order_in_which_a_tree_was_made_does_not_show(objects: ObjectStore, tree: Tree, largest: int, seed) -> None:  # type: ignore[no-untyped-def]
    def shuffled(node: Node) -> Node:
        if not isinstance(node, Directory):
            return node
        names = list(node.children)
        seed.shuffle(names)
        return node._replace(children={name: shuffled(node.children[name]) for name in names})

    composition = Composition(last_modified=1, smallest=1, largest=largest)
    other = shuffled(tree.root)
    assert isinstance(other, Directory)
    assert compose(Tree(other), AT, objects, composition) == compose(tree, AT, objects, composition)


# What a catalog says.


def test_a_catalog_has_the_schema_that_clients_know(objects: ObjectStore) -> None:
    composed = compose(tree(f=file()), AT, objects, PLAIN)
    data = objects.read(composed.mount.hash, "C")
    assert int.from_bytes(data[16:18], "big") == 1024
    assert data[18:20] == b"\1\1", "a database with a write-ahead log cannot be opened by clients"
    db = database(data)
    columns = [name for _, name, *_ in db.execute("PRAGMA table_info(catalog)")]
    assert columns[:7] == ["md5path_1", "md5path_2", "parent_1", "parent_2", "hardlinks", "hash", "size"]
    assert columns[7:] == ["mode", "mtime", "mtimens", "flags", "name", "symlink", "uid", "gid", "xattr"]
    assert dict(db.execute("SELECT key, value FROM properties")) == {
        "schema": "2.5",
        "schema_revision": "7",
        "revision": "1",
        "last_modified": "1700000000",
        "root_prefix": AT,
    }
    assert db.execute("SELECT name FROM sqlite_master WHERE name = 'idx_catalog_parent'").fetchone()


def test_the_rows_of_all_types_are_those_of_the_format(objects: ObjectStore) -> None:
    composed = compose(
        tree(
            chunked=file(7, f"zc:{'ab' * 20}@4,{'cd' * 20}@3"),
            device=Special(0o600, 0, 0, 0, (), Kind.BLOCK, (8, 1)),
            file=file(5),
            link=Symlink(0o755, 0, 0, 0, (), "file"),
            pipe=Special(0o644, 0, 0, 0, (), Kind.FIFO, (0, 0)),
            raw=file(5, f"n:{'34' * 20}"),
            shake=file(5, f"z:{'56' * 20}-shake128"),
            sub=directory(),
        ),
        AT,
        objects,
        PLAIN,
    )
    db = database(objects.read(composed.mount.hash, "C"))
    found = db.execute("SELECT name, flags, hardlinks, mode, size, hex(hash) FROM catalog ORDER BY rowid").fetchall()
    assert found == [
        ("abcd", 33, 3, 0o040755, 4096, ""),
        (".cvmfscatalog", 4, 1, 0o100644, 0, ContentHash.of(EMPTY).digest.hex().upper()),
        ("chunked", 68, 1, 0o100644, 7, ""),
        ("device", 20, 1, 0o060600, os.makedev(8, 1), ""),
        ("file", 4, 1, 0o100644, 5, "12" * 20),
        ("link", 12, 1, 0o120777, 4, ""),
        ("pipe", 20, 1, 0o010644, 0, ""),
        ("raw", 4 | 2048, 1, 0o100644, 5, "34" * 20),
        ("shake", 4 | 2 << 8, 1, 0o100644, 5, "56" * 20),
        ("sub", 1, 2, 0o040755, 4096, ""),
    ]
    assert db.execute("SELECT offset, size, hex(hash) FROM chunks ORDER BY offset").fetchall() == [
        (0, 4, "AB" * 20),
        (4, 3, "CD" * 20),
    ]


def test_the_marker_is_the_empty_file_and_it_is_in_the_store(objects: ObjectStore) -> None:
    objects.discard(ContentHash.of(EMPTY))
    compose(tree(), AT, objects, PLAIN)
    assert objects.read(ContentHash.of(EMPTY)) == b""


def test_a_hidden_marker_has_the_flag(objects: ObjectStore) -> None:
    composed = compose(tree(), AT, objects, Composition(last_modified=1, hidden_markers=True))
    db = database(objects.read(composed.mount.hash, "C"))
    assert db.execute("SELECT flags FROM catalog WHERE name = '.cvmfscatalog'").fetchone() == (0x8004,)


def test_the_same_tree_gives_the_same_object_and_writes_it_once(objects: ObjectStore) -> None:
    content = tree(a=file(), b=directory(c=file()))
    first = compose(content, AT, objects, PLAIN)
    inode = os.stat(objects.path(first.mount.hash, "C")).st_ino
    assert compose(content, AT, objects, PLAIN) == first
    assert os.stat(objects.path(first.mount.hash, "C")).st_ino == inode


def test_an_image_of_27000_entries_takes_moments(objects: ObjectStore) -> None:
    content = tree_of({"": 0, **{f"d{n}": 20 for n in range(1_285)}})
    start = time.process_time()
    composed = compose(content, AT, objects, PLAIN)
    # A third of a second on the machine it was made for; the bound is for one that is busy with other things.
    assert time.process_time() - start < 3
    assert composed.catalogs == 1
    assert composed.mount.counters.own.entries == 1_285 * 21 + 2


# Cuts.


def test_a_small_tree_is_not_cut() -> None:
    assert cuts([("", 3), ("a", 500), ("b", 500)]) == ()


def test_the_heaviest_parts_are_cut_until_the_rest_is_small_enough() -> None:
    assert cuts([("", 3), ("a", 60), ("b", 70), ("c", 20)], smallest=10, largest=100) == ("b",)
    assert cuts([("", 3), ("a", 60), ("b", 70), ("c", 50)], smallest=10, largest=100) == ("b", "a")


def test_a_cut_is_as_deep_as_it_must_be() -> None:
    assert cuts([("", 1), ("usr", 2), ("usr/a", 90), ("usr/b", 80)], smallest=10, largest=100) == ("usr/a",)


def test_the_deepest_cut_comes_first() -> None:
    chain = [("", 60), ("a", 60), ("a/b", 60), ("a/b/c", 60)]
    assert cuts(chain, smallest=10, largest=100) == ("a/b/c", "a/b", "a")


def test_one_directory_of_many_files_stays_too_large() -> None:
    assert cuts([("", 1), ("a", 1000)], smallest=10, largest=100) == ("a",)
    assert cuts([("", 1000)], smallest=10, largest=100) == ()


def test_parts_that_are_tiny_are_not_cut_and_small_ones_only_if_there_is_nothing_else() -> None:
    assert cuts([("", 200), *((f"d{n}", 4) for n in range(200))], smallest=100, largest=300) == ()
    small = cuts([("", 20), *((f"d{n:02}", 40) for n in range(20))], smallest=100, largest=300)
    assert small == tuple(f"d{n:02}" for n in range(14))


@given(
    st.recursive(
        st.integers(0, 30), lambda inner: st.tuples(st.integers(0, 30), st.lists(inner, max_size=4)), max_leaves=15
    ),
    st.integers(1, 60),
)
def test_after_the_cuts_every_catalog_is_small_enough_or_has_nothing_left_to_cut(shape, largest: int) -> None:  # type: ignore[no-untyped-def]
    sizes: dict[str, int] = {}
    pending = [("", shape)]
    while pending:
        path, value = pending.pop()
        files, inner = (value, []) if isinstance(value, int) else value
        sizes[path] = files + len(inner)
        pending.extend((f"{path}/{n}" if path else str(n), item) for n, item in enumerate(inner))
    found = cuts(sizes.items(), smallest=1, largest=largest)
    weights = dict.fromkeys(("", *found), 0)
    uncut = dict.fromkeys(weights, 0)
    for path, size in sizes.items():
        home = path
        while home not in weights:
            home = home.rpartition("/")[0]
        weights[home] += size
        uncut[home] += path != home and size > 0
    assert all(weights[home] < largest or not uncut[home] for home in weights)
    depths = [path.count("/") for path in found]
    assert all(found.index(b) < found.index(a) for a in found for b in found if b.startswith(a + "/")), depths


def test_a_large_image_is_cut_and_counted_right(objects: ObjectStore) -> None:
    content = tree_of({"": 3, "usr": 40, "usr/lib": 80, "usr/share": 70, "opt": 90})
    composed = compose(content, AT, objects, Composition(last_modified=1, smallest=10, largest=100))
    assert composed.catalogs == 4
    root = mounted(objects, composed)
    assert check(objects, root) == []
    with Reader(objects, root) as reader:
        cut = [found.path for found in reader.walk(AT) if found.nested]
    assert len(cut) == composed.catalogs - 1
    assert composed.mount.counters.total.entries == 3 + 40 + 80 + 70 + 90 + 5 + 2 * 3 + 1


# Fan-out.


@pytest.mark.parametrize(
    ("path", "is_catalog"),
    [
        (".flat", True),
        (".flat/ab", True),
        (".flat/ab/abcd", False),
        (".layers", True),
        (".layers/ab", True),
        (".layers/ab/abcd", False),
        (".metadata", True),
        (".metadata/registry.example.org:5000", True),
        (".metadata/registry.example.org/team", True),
        (".metadata/registry.example.org/team/image:tag", False),
        (".metadata/registry.example.org/team/image:sha256:ab", False),
        ("registry.example.org:5000", True),
        ("registry.example.org/team/group", True),
        ("registry.example.org/team/image:tag", False),
        (".multiarch", True),
        (".multiarch/arm64:v8", True),
        (".multiarch/arm64:v8/registry.example.org/team", True),
        (".metadata/.multiarch/arm64:v8/registry.example.org", True),
        (".other", False),
        ("", False),
    ],
)
def test_the_directories_on_the_way_to_images_are_catalogs(path: str, is_catalog: bool) -> None:
    assert fans_out(path) is is_catalog

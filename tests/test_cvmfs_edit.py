"""Changes below existing catalogs: the root catalog after them is as right as one written from nothing."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.catalog_check import check, database, new_store
from unpacker.changeset import Kind
from unpacker.cvmfs import deflation
from unpacker.cvmfs.compose import Composition, Mount, compose
from unpacker.cvmfs.edit import Change, Edited, create_root, edit
from unpacker.cvmfs.hash import ContentHash
from unpacker.cvmfs.objects import ObjectStore
from unpacker.cvmfs.reader import Reader, node, open_catalog
from unpacker.errors import PublishError
from unpacker.tree import Directory, File, Node, Special, Symlink, Tree

THEN = Composition(last_modified=1_700_000_000)
NOW = Composition(last_modified=1_700_000_500)
PLAIN_HIDDEN = Composition(last_modified=1, hidden_markers=True)


@pytest.fixture(scope="module")
def objects() -> Iterator[ObjectStore]:
    with new_store() as store:
        yield store


@pytest.fixture
def empty(objects: ObjectStore) -> ContentHash:
    return create_root(objects, THEN).root


def file(size: int = 1, fill: str = "12") -> File:
    return File(0o644, 0, 0, 0, (), size, f"z:{fill * 20}")


def link(target: str) -> Symlink:
    return Symlink(0o777, 0, 0, 0, (), target)


def directory(**children: Node) -> Directory:
    return Directory(0o755, 0, 0, 0, (), children)


def image(objects: ObjectStore, path: str, **children: Node) -> Mount:
    return compose(Tree(directory(**children)), path, objects, THEN).mount


def shown(objects: ObjectStore, root: ContentHash) -> dict[str, str]:
    """Every name but markers: `/` for a directory, `//` for a nested catalog, a size, a target."""
    names = {}
    with Reader(objects, root) as reader:
        for found in reader.walk():
            if not found.path.endswith("/.cvmfscatalog"):
                row = found.row
                names[found.path] = (
                    ("//" if found.nested else "/") if row.is_directory else row.symlink or str(row.size)
                )
    return names


def test_an_empty_repository_is_one_directory(objects: ObjectStore, empty: ContentHash) -> None:
    assert shown(objects, empty) == {"": "/"}
    assert check(objects, empty) == []


def test_an_image_and_its_name_make_the_fan_out_on_the_way(objects: ObjectStore, empty: ContentHash) -> None:
    changes: dict[str, Change] = {
        "/.flat/ab/abcd": image(objects, "/.flat/ab/abcd", f=file(), d=directory()),
        "/registry/team/image:tag": link("../../.flat/ab/abcd"),
        "/.metadata/registry/team/image:tag/record.json": file(7),
    }
    edited = edit(objects, empty, changes, NOW)
    assert shown(objects, edited.root) == {
        "": "/",
        "/.flat": "//",
        "/.flat/ab": "//",
        "/.flat/ab/abcd": "//",
        "/.flat/ab/abcd/d": "/",
        "/.flat/ab/abcd/f": "1",
        "/.metadata": "//",
        "/.metadata/registry": "//",
        "/.metadata/registry/team": "//",
        "/.metadata/registry/team/image:tag": "/",
        "/.metadata/registry/team/image:tag/record.json": "7",
        "/registry": "//",
        "/registry/team": "//",
        "/registry/team/image:tag": "../../.flat/ab/abcd",
    }
    assert check(objects, edited.root) == []
    assert (edited.revision, edited.written) == (2, 8)
    assert edited.size == len(objects.read(edited.root, "C"))


def test_the_new_root_names_its_predecessor_and_its_time(objects: ObjectStore, empty: ContentHash) -> None:
    edited = edit(objects, empty, {"/r/i:t": link("x")}, NOW)
    with Reader(objects, edited.root) as reader:
        assert (reader.root.revision, reader.root.last_modified) == (2, 1_700_000_500)
        assert reader.root.previous == empty
    again = edit(objects, edited.root, {"/r/i:t": link("y")}, NOW)
    with Reader(objects, again.root) as reader:
        assert (reader.root.revision, reader.root.previous) == (3, edited.root)
        found = reader.lookup("/r")
        assert found is not None
        assert found.nested is not None
    below = database(objects.read(found.nested.hash, "C"))
    assert dict(below.execute("SELECT key, value FROM properties"))["revision"] == "2"


def test_only_the_catalogs_on_the_way_are_written(objects: ObjectStore, empty: ContentHash) -> None:
    first = edit(objects, empty, {"/a/x:1": link("1"), "/b/x:1": link("1"), "/b/c/x:1": link("1")}, THEN)
    second = edit(objects, first.root, {"/b/x:1": link("2")}, NOW)
    assert second.written == 2
    with Reader(objects, first.root) as old, Reader(objects, second.root) as new:
        for path, is_same in (("/a", True), ("/b", False), ("/b/c", True)):
            before, after = old.lookup(path), new.lookup(path)
            assert before is not None
            assert after is not None
            assert (before.nested == after.nested) is is_same


def test_what_stands_already_is_no_change(objects: ObjectStore, empty: ContentHash) -> None:
    changes: dict[str, Change] = {
        "/.flat/ab/abcd": image(objects, "/.flat/ab/abcd", f=file()),
        "/r/i:t": link("1"),
        "/m": directory(f=file()),
    }
    edited = edit(objects, empty, changes, THEN)
    again = edit(objects, edited.root, changes, NOW)
    assert (again.root, again.written, again.revision) == (edited.root, 0, edited.revision)
    assert again.size == edited.size


def test_a_removed_image_takes_its_counters_and_empty_fan_out_along(objects: ObjectStore, empty: ContentHash) -> None:
    before = edit(objects, empty, {"/r/x:1": link("1")}, THEN)
    changes: dict[str, Change] = {
        "/.flat/ab/abcd": image(objects, "/.flat/ab/abcd", f=file(9), d=directory(g=file(9))),
        "/r/ns/i:t": link("1"),
    }
    full = edit(objects, before.root, changes, THEN)
    after = edit(objects, full.root, dict.fromkeys(changes), NOW)
    assert shown(objects, after.root) == shown(objects, before.root)
    assert check(objects, after.root) == []
    assert after.counters == before.counters


def test_a_fan_out_directory_with_something_left_stays(objects: ObjectStore, empty: ContentHash) -> None:
    full = edit(objects, empty, {"/r/a:1": link("1"), "/r/a:2": link("2")}, THEN)
    assert shown(objects, edit(objects, full.root, {"/r/a:1": None}, NOW).root) == {"": "/", "/r": "//", "/r/a:2": "2"}


def test_an_image_is_replaced_by_another_at_its_path(objects: ObjectStore, empty: ContentHash) -> None:
    path = "/.flat/ab/abcd"
    first = edit(objects, empty, {path: image(objects, path, f=file(5))}, THEN)
    second = edit(objects, first.root, {path: image(objects, path, g=file(6), h=directory())}, NOW)
    assert check(objects, second.root) == []
    assert {p for p in shown(objects, second.root) if p.startswith(path)} == {path, path + "/g", path + "/h"}


@pytest.mark.parametrize("before", ["file", "link", "directory", "image"])
@pytest.mark.parametrize("after", ["file", "link", "directory", "image"])
def test_anything_takes_the_place_of_anything(
    objects: ObjectStore, empty: ContentHash, before: str, after: str
) -> None:
    def make(kind: str, size: int) -> Change:
        choices: dict[str, Callable[[], Change]] = {
            "file": lambda: file(size),
            "link": lambda: link("x" * size),
            "directory": lambda: directory(inside=file(size), deep=directory()),
            "image": lambda: image(objects, "/top/at", inside=file(size), deep=directory()),
        }
        return choices[kind]()

    first = edit(objects, empty, {"/top/at": make(before, 1)}, THEN)
    second = edit(objects, first.root, {"/top/at": make(after, 2)}, NOW)
    fresh = edit(objects, empty, {"/top/at": make(after, 2)}, NOW)
    if (before, after) != ("image", "directory"):
        # A directory keeps what is in it, even its catalog.
        assert shown(objects, second.root) == shown(objects, fresh.root)
    assert check(objects, second.root) == []


def test_a_change_inside_an_image_goes_up_the_whole_chain(objects: ObjectStore, empty: ContentHash) -> None:
    path = "/.flat/ab/abcd"
    first = edit(objects, empty, {path: image(objects, path, f=file(5))}, THEN)
    given = Directory(0o700, 5, 6, 7, (("user.a", b""),), {})
    second = edit(objects, first.root, {path + "/d/e": file(2), path: given}, NOW)
    assert check(objects, second.root) == []
    with Reader(objects, second.root) as reader:
        found = reader.lookup(path)
        assert found is not None
        assert node(found) == given


def test_a_base_directory_shifts_the_fan_out(objects: ObjectStore, empty: ContentHash) -> None:
    edited = edit(objects, empty, {"/images/x/.flat/ab/f": file(), "/images/x/r/i:t": link("1")}, NOW, base="/images/x")
    names = shown(objects, edited.root)
    assert [path for path, what in names.items() if what == "//"] == [
        "/images/x/.flat",
        "/images/x/.flat/ab",
        "/images/x/r",
    ]
    assert shown(objects, edit(objects, edited.root, {"/images/x/r/i:t": None}, NOW, base="/images/x").root).keys() == (
        names.keys() - {"/images/x/r", "/images/x/r/i:t"}
    )
    assert check(objects, edited.root) == []


def test_what_is_in_a_batch_already_is_stored_before_the_edit(objects: ObjectStore, empty: ContentHash) -> None:
    with objects.batch() as batch:
        composed = compose(Tree(directory(f=file())), "/i", batch, THEN)
        edited = edit(objects, empty, {"/i": composed.mount}, NOW, batch=batch)
        assert not objects.has(edited.root, "C")
    assert check(objects, edited.root) == []


def test_an_edit_that_fails_stores_nothing(objects: ObjectStore, empty: ContentHash) -> None:
    before = sorted(p for p in Path(objects.root).rglob("*") if p.is_file())
    with pytest.raises(PublishError, match="not there"):
        edit(objects, empty, {"/r/i:t": link("1"), "/r/gone": None}, NOW)
    assert sorted(p for p in Path(objects.root).rglob("*") if p.is_file()) == before


def test_a_way_through_a_file_is_refused(objects: ObjectStore, empty: ContentHash) -> None:
    full = edit(objects, empty, {"/a": file()}, THEN)
    with pytest.raises(PublishError, match="'/a' of the repository is no directory"):
        edit(objects, full.root, {"/a/b": file()}, NOW)


@pytest.mark.parametrize("changes", [{"/a": None, "/a/b": file()}, {"/a": file(), "/a/b/c": None}])
def test_changes_that_contradict_each_other_are_refused(
    objects: ObjectStore, empty: ContentHash, changes: dict[str, Change]
) -> None:
    with pytest.raises(ValueError, match="in the same edit"):
        edit(objects, empty, changes, NOW)


@pytest.mark.parametrize("path", ["", "a", "/", "/a/", "/a//b", "/a/../b", "/.", "/a/.cvmfscatalog", "/" + "x" * 256])
def test_paths_that_cannot_be_are_refused(objects: ObjectStore, empty: ContentHash, path: str) -> None:
    with pytest.raises(ValueError, match="not a path"):
        edit(objects, empty, {path: file()}, NOW)


# The algebra: a sequence of edits against a plain dictionary.

_NAMES = st.sampled_from(["a", "b", "ns", "i:1", "i:2"])
_PATHS = st.lists(_NAMES, min_size=1, max_size=4).map(lambda names: "/" + "/".join(names))
_STEPS = st.lists(
    st.tuples(_PATHS, st.sampled_from(["file", "link", "directory", "image", "remove"]), st.integers(1, 9))
)


@settings(max_examples=60, deadline=None)
@given(steps=_STEPS, together=st.integers(1, 4))
def test_any_sequence_of_edits_leaves_the_tree_and_the_counters_right(
    objects: ObjectStore, steps: list[tuple[str, str, int]], together: int
) -> None:
    root = create_root(objects, THEN).root
    model: dict[str, str] = {"": "/"}
    pending: dict[str, Change] = {}

    def settle() -> None:
        nonlocal root, pending
        root = edit(objects, root, pending, NOW, catalogs=lambda path: path.endswith("ns")).root
        pending = {}

    for path, what, size in steps:
        parents = [path[:at] for at in range(1, len(path)) if path[at] == "/"]
        if any(model.get(parent, "/") != "/" for parent in parents) or (what == "remove" and path not in model):
            continue
        if len(pending) >= together or any(p.startswith(path) or path.startswith(p) for p in pending):
            settle()
            if any(model.get(parent, "/") != "/" for parent in parents) or (what == "remove" and path not in model):
                continue
        if what != "directory" or model.get(path) != "/":
            model = {p: text for p, text in model.items() if p != path and not p.startswith(path + "/")}
        if what != "remove":
            model |= dict.fromkeys(parents, "/")
        if what == "file":
            model[path], pending[path] = str(size), file(size)
        elif what == "link":
            model[path], pending[path] = "x" * size, link("x" * size)
        elif what == "directory":
            model |= {path: "/", path + "/in": str(size)}
            pending[path] = Directory(0o755, 0, 0, 0, (), {"in": file(size)})
        elif what == "image":
            model |= {path: "/", path + "/f": str(size)}
            pending[path] = image(objects, path, f=file(size))
        else:
            pending[path] = None
            _prune(model, path.rpartition("/")[0])
            settle()
    settle()
    found = {path: "/" if text == "//" else text for path, text in shown(objects, root).items()}
    assert found == model
    assert check(objects, root) == []


def _prune(model: dict[str, str], path: str) -> None:
    while path.endswith("/ns") and not any(p.startswith(path + "/") for p in model):
        del model[path]
        path = path.rpartition("/")[0]


def test_many_removals_leave_no_gaps_in_the_row_numbers(objects: ObjectStore, empty: ContentHash) -> None:
    full = edit(objects, empty, {f"/r/i:{n}": link(str(n)) for n in range(300)}, THEN)
    after = edit(objects, full.root, {f"/r/i:{n}": None for n in range(0, 300, 2)}, NOW)
    assert check(objects, after.root) == []  # looks at the gaps, too
    assert len(shown(objects, after.root)) == 152


# Catalogs made by other tools.


def altered(objects: ObjectStore, root: ContentHash, *statements: str) -> ContentHash:
    """The root catalog after these statements, stored as another tool would have stored it."""
    db = database(objects.read(root, "C"))
    for statement in statements:
        db.execute(statement)
    db.commit()
    return objects.put(deflation.stock(db.serialize()), "C")


OLD_COLUMNS = (
    "DROP INDEX idx_catalog_parent",
    "ALTER TABLE catalog RENAME TO newer",
    "CREATE TABLE catalog (md5path_1 INTEGER, md5path_2 INTEGER, parent_1 INTEGER, parent_2 INTEGER, hardlinks INTEGER,"
    " hash BLOB, size INTEGER, mode INTEGER, mtime INTEGER, flags INTEGER, name TEXT, symlink TEXT, uid INTEGER,"
    " gid INTEGER, xattr BLOB, PRIMARY KEY (md5path_1, md5path_2))",
    "INSERT INTO catalog SELECT md5path_1, md5path_2, parent_1, parent_2, hardlinks, hash, size, mode, mtime, flags,"
    " name, symlink, uid, gid, xattr FROM newer",
    "DROP TABLE newer",
    "CREATE INDEX idx_catalog_parent ON catalog (parent_1, parent_2)",
)


def test_a_catalog_without_nanoseconds_is_edited(objects: ObjectStore, empty: ContentHash) -> None:
    full = edit(objects, empty, {"/d/f": file(3)}, THEN, catalogs=lambda path: False)
    older = "UPDATE properties SET value = '6' WHERE key = 'schema_revision'"
    root = altered(objects, full.root, *OLD_COLUMNS, older)
    after = edit(objects, root, {"/d/g": file(4), "/d/f": None, "/e": link("x")}, NOW, catalogs=lambda path: False)
    assert shown(objects, after.root) == {"": "/", "/d": "/", "/d/g": "4", "/e": "x"}
    assert [p for p in check(objects, after.root) if "schema" not in p] == []


def test_columns_that_were_appended_later_are_found_by_name(objects: ObjectStore, empty: ContentHash) -> None:
    full = edit(objects, empty, {"/d/f": file(3)}, THEN, catalogs=lambda path: False)
    root = altered(objects, full.root, *OLD_COLUMNS, "ALTER TABLE catalog ADD mtimens INTEGER")
    after = edit(objects, root, {"/d/g": File(0o644, 1, 2, 3, (), 4, f"z:{'12' * 20}")}, NOW)
    assert check(objects, after.root) == []
    with Reader(objects, after.root) as reader:
        found = reader.lookup("/d/g")
        assert found is not None
        assert node(found) == File(0o644, 1, 2, 3, (), 4, f"z:{'12' * 20}")


def test_properties_that_others_set_are_kept(objects: ObjectStore, empty: ContentHash) -> None:
    root = altered(objects, empty, "INSERT INTO properties VALUES ('TTL', '900')")
    after = edit(objects, root, {"/a": file()}, NOW)
    properties = dict(database(objects.read(after.root, "C")).execute("SELECT key, value FROM properties"))
    assert properties["TTL"] == "900"


def test_another_hash_algorithm_goes_the_whole_way(tmp_path: Path) -> None:
    objects = ObjectStore.create(str(tmp_path / "shake"), "shake128")
    root = create_root(objects, THEN).root
    edited = edit(objects, root, {"/.flat/ab/x": image(objects, "/.flat/ab/x", f=file()), "/r/i:t": link("1")}, NOW)
    assert edited.root.algorithm == "shake128"
    assert check(objects, edited.root) == []
    gone = edit(objects, edited.root, {"/.flat/ab/x": None}, NOW)
    assert check(objects, gone.root) == []


@pytest.mark.parametrize("revision", ["8", "4"])
def test_catalogs_of_other_revisions_are_read_and_never_edited(
    objects: ObjectStore, empty: ContentHash, revision: str
) -> None:
    full = edit(objects, empty, {"/a": file()}, THEN)
    root = altered(objects, full.root, f"UPDATE properties SET value = '{revision}' WHERE key = 'schema_revision'")
    assert shown(objects, root) == {"": "/", "/a": "1"}
    with pytest.raises(PublishError, match=f"schema revision {revision}"):
        edit(objects, root, {"/a": None}, NOW)


def test_another_schema_is_refused(objects: ObjectStore, empty: ContentHash) -> None:
    root = altered(objects, empty, "UPDATE properties SET value = '2.4' WHERE key = 'schema'")
    with pytest.raises(PublishError, match=r"schema '2\.4'"):
        edit(objects, root, {"/a": file()}, NOW)


def test_hard_links_that_stay_behind_have_one_link_less(objects: ObjectStore, empty: ContentHash) -> None:
    full = edit(objects, empty, {f"/{name}": file() for name in "abc"}, THEN)
    root = altered(objects, full.root, f"UPDATE catalog SET hardlinks = {7 << 32 | 3} WHERE name IN ('a', 'b', 'c')")
    for change, left in ((None, 7 << 32 | 2), (file(5), 7 << 32 | 2)):
        after = edit(objects, root, {"/b": change}, NOW)
        with Reader(objects, after.root) as reader:
            links = {found.path: found.row.hardlinks for found in reader.children("")}
        assert {links["/a"], links["/c"]} == {left}
        assert links.get("/b", 1) == 1


def test_a_full_catalog_on_the_way_to_images_takes_in_names_but_no_more_of_what_is_below_them(
    objects: ObjectStore, empty: ContentHash
) -> None:
    """Two files for each name, as records have, one edit after the other; what stands stays as it is."""
    content = objects.put(deflation.dense(b"1"))
    record = file()._replace(token=f"z:{content.hex}")
    names = [f"/.metadata/registry/team/image:{number:02}" for number in range(30)]
    root, full = empty, 20
    for name in names:
        root = edit(objects, root, {f"{name}/a": record, f"{name}/b": record}, NOW, full=full).root
    found = shown(objects, root)
    assert [found[name] for name in names] == 6 * ["/"] + 24 * ["//"]
    with Reader(objects, root) as reader:
        team = reader.lookup("/.metadata/registry/team")
        assert team is not None and team.nested is not None
    with open_catalog(objects, team.nested.hash, "/.metadata/registry/team") as catalog:
        # Itself and its marker; names; the files of those that were first.
        assert catalog.count() == 2 + 30 + 2 * 6
    assert check(objects, root) == []
    removed: dict[str, Change] = dict.fromkeys(names[3:28])
    edited = edit(objects, root, removed | {f"{names[29]}/a": link("x")}, NOW, full=full)
    if shutil.which("cvmfs_swissknife") is not None:
        assert judged(objects, edited) == ""
    assert check(objects, edited.root) == []
    assert sum(kind == "//" for kind in shown(objects, edited.root).values()) == 3 + 2
    last = edit(objects, edited.root, dict.fromkeys([*names[:3], *names[28:]]), NOW, full=full)
    assert shown(objects, last.root) == {"": "/"}
    assert last.counters == create_root(objects, THEN).counters


# The judge.


def judged(objects: ObjectStore, edited: Edited) -> str:
    """What the official checker says of a revision, the existence of every object included; "" if it is content."""
    manifest = f"C{edited.root}\nB{edited.size}\nRd41d8cd98f00b204e9800998ecf8427e\nD240\nS{edited.revision}\n"
    manifest += "Ntest.example.org\nT1700000000\n"
    # A check of local files looks at no signature.
    signed = f"{manifest}--\n{ContentHash.of(manifest.encode()).hex}\nnone"
    with open(f"{objects.root}/.cvmfspublished", "w") as file:
        file.write(signed)
    with tempfile.TemporaryDirectory() as scratch:
        command = ["cvmfs_swissknife", "check", "-c", "-r", objects.root, "-t", scratch]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    output = result.stdout + result.stderr
    return "" if result.returncode == 0 and "no problems found" in output else output or "failed"


@pytest.mark.skipif(shutil.which("cvmfs_swissknife") is None, reason="cvmfs_swissknife is not on PATH")
def test_the_official_checker_is_content_with_a_life_of_edits(objects: ObjectStore) -> None:
    stored = objects.put(deflation.dense(b"1234")).hex
    pieces = [objects.put(deflation.dense(data), "P").hex for data in (b"1234", b"567")]
    content: dict[str, Node] = {
        "chunked": file()._replace(size=7, token=f"zc:{pieces[0]}@4,{pieces[1]}@3"),
        "raw": file()._replace(size=4, token=f"n:{objects.put(b'1234').hex}"),
        "\udcff'": file()._replace(size=4, token=f"z:{stored}", xattrs=(("user.a", b"\xff"),)),
        "null": Special(0o666, 0, 0, 0, (), Kind.CHARACTER, (1, 3)),
        "white": Special(0, 0, 0, 0, (), Kind.CHARACTER, (0, 0)),
        "pipe": Special(0o666, 0, 0, 0, (), Kind.FIFO, (0, 0)),
        "link": link("$(HOME)"),
        "deep": directory(a=directory(b=directory(c=link("x"), d=link("y"), e=link("z")), f=link("x"))),
    }
    cut = Composition(last_modified=1, smallest=1, largest=4)
    life: list[dict[str, Change]] = [
        {"/.flat/ab/abcd": compose(Tree(directory(**content)), "/.flat/ab/abcd", objects, cut).mount},
        {"/registry/team/image:1": link("x"), "/.metadata/registry/team/image:1": directory(**content)},
        {"/.flat/ab/abce": compose(Tree(directory(**content)), "/.flat/ab/abce", objects, PLAIN_HIDDEN).mount},
        {f"/registry/team/image:{n}": link("y") for n in range(40)},
        {f"/registry/team/image:{n}": None for n in range(1, 40)},
        {"/.flat/ab/abcd/deep/a": None, "/.flat/ab/abcd/deep/g/h": link("x")},
        {"/.flat/ab/abcd": image(objects, "/.flat/ab/abcd"), "/registry/team/image:0": directory()},
        {"/.flat/ab/abcd": None, "/.flat/ab/abce": None, "/.metadata/registry/team/image:1": None},
    ]
    edited = create_root(objects, THEN)
    assert judged(objects, edited) == ""
    for changes in life:
        edited = edit(objects, edited.root, changes, NOW)
        assert judged(objects, edited) == ""
        assert check(objects, edited.root) == []


@pytest.mark.skipif(shutil.which("cvmfs_swissknife") is None, reason="cvmfs_swissknife is not on PATH")
def test_the_official_checker_would_notice(objects: ObjectStore) -> None:
    edited = edit(objects, create_root(objects, THEN).root, {"/a": directory()}, NOW)
    root = altered(objects, edited.root, "UPDATE catalog SET hardlinks = 9 WHERE name = 'a'")
    assert judged(objects, replace(edited, root=root)) != ""

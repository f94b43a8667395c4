"""Given these layers, this tree: the OCI image specification's rules case by case, and the algebra of `apply`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unpacker.apply import apply
from unpacker.changeset import Changeset, Entry, Kind
from unpacker.errors import ImageError
from unpacker.tree import EMPTY, Directory, File, Node, Special, Symlink, Tree, lookup, rewrite, walk


def file(path: str, text: str = "", **meta: Any) -> Entry:
    """A file whose token is its text, so that a tree shows contents."""
    return Entry(path, Kind.FILE, size=len(text), token=text, **meta)


def directory(path: str, mode: int = 0o755, **meta: Any) -> Entry:
    return Entry(path, Kind.DIRECTORY, mode, **meta)


def symlink(path: str, target: str) -> Entry:
    return Entry(path, Kind.SYMLINK, 0o777, target=target)


def hardlink(path: str, target: str) -> Entry:
    return Entry(path, Kind.HARDLINK, target=target)


def layer(*entries: Entry, whiteouts: Iterable[str] = (), opaque: Iterable[str] = ()) -> Changeset:
    return Changeset(diff_id="sha256:test", entries=entries, whiteouts=tuple(whiteouts), opaque=tuple(opaque))


def flatten(*layers: Changeset) -> Tree:
    tree = EMPTY
    for changeset in layers:
        tree = apply(tree, changeset)
    return tree


def shown(node: Node) -> str:
    match node:
        case File():
            return node.token
        case Directory():
            return "/"
        case Symlink():
            return f"-> {node.target}"
        case Special():
            return f"{node.kind} {node.device[0]}:{node.device[1]}"


def names(tree: Tree) -> dict[str, str]:
    """Every name but the root's: `/` for a directory, the text of a file, `-> target` of a symlink."""
    return {path: shown(node) for path, node in walk(tree) if path}


def tree_of(*layers: Changeset) -> dict[str, str]:
    return names(flatten(*layers))


# Additions and modifications.


def test_entries_of_all_kinds_become_nodes_with_their_metadata() -> None:
    tree = flatten(
        layer(
            directory("bin", 0o1755, uid=1, gid=2, mtime_ns=3, xattrs=(("user.a", b"\xff"),)),
            file("bin/sh", "#!", mode=0o755, uid=4, gid=5, mtime_ns=6, xattrs=(("user.b", b""),)),
            symlink("sh", "bin/sh"),
            Entry("pipe", Kind.FIFO, 0o600),
            Entry("null", Kind.CHARACTER, 0o666, device=(1, 3)),
        )
    )
    sh = File(0o755, 4, 5, 6, (("user.b", b""),), 2, "#!")
    assert lookup(tree, "bin") == Directory(0o1755, 1, 2, 3, (("user.a", b"\xff"),), {"sh": sh})
    assert lookup(tree, "bin/sh") == sh
    assert lookup(tree, "sh") == Symlink(0o777, 0, 0, 0, (), "bin/sh")
    assert lookup(tree, "pipe") == Special(0o600, 0, 0, 0, (), Kind.FIFO, (0, 0))
    assert lookup(tree, "null") == Special(0o666, 0, 0, 0, (), Kind.CHARACTER, (1, 3))


def test_missing_parents_are_made_as_roots_of_epoch() -> None:
    tree = flatten(layer(file("a/b/c", "x")))
    made = lookup(tree, "a/b")
    assert isinstance(made, Directory)
    assert made[:5] == (0o755, 0, 0, 0, ())
    assert tree.implied == 2


def test_a_parent_that_comes_after_its_child_gives_its_metadata_and_keeps_the_child() -> None:
    tree = flatten(layer(file("a/b", "x"), directory("a", 0o700)))
    assert names(tree) == {"a": "/", "a/b": "x"}
    assert tree.root.children["a"].mode == 0o700


def test_a_directory_over_a_directory_replaces_metadata_and_keeps_children() -> None:
    tree = flatten(layer(directory("a", 0o700), file("a/b", "x")), layer(directory("a", 0o711, mtime_ns=5)))
    assert names(tree) == {"a": "/", "a/b": "x"}
    assert tree.root.children["a"][:4] == (0o711, 0, 0, 5)


def test_the_entry_of_the_root_sets_its_metadata() -> None:
    tree = flatten(layer(file("a"), directory("", 0o700, uid=7), file("b")))
    assert tree.root[:2] == (0o700, 7)
    assert names(tree) == {"a": "", "b": ""}


def test_of_duplicates_in_one_layer_the_last_wins() -> None:
    assert tree_of(layer(file("a", "1"), file("a", "2"), symlink("a", "x"), file("a", "3"))) == {"a": "3"}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("file", "symlink"),
        ("file", "directory"),
        ("symlink", "file"),
        ("symlink", "directory"),
        ("directory", "file"),
        ("directory", "symlink"),
        ("fifo", "directory"),
        ("directory", "fifo"),
    ],
)
def test_a_type_change_leaves_nothing_of_the_lower_node(before: str, after: str) -> None:
    make: dict[str, tuple[Entry, ...]] = {
        "file": (file("x", "old"),),
        "symlink": (symlink("x", "target"),),
        "directory": (directory("x", 0o700), file("x/y", "under")),
        "fifo": (Entry("x", Kind.FIFO),),
    }
    lower = layer(directory("target"), file("target/kept", "1"), *make[before])
    upper = layer(make[after][0])
    assert apply(flatten(lower), upper).root.children["x"] == flatten(upper).root.children["x"]
    assert tree_of(lower, upper)["target/kept"] == "1"


def test_a_parent_that_is_a_file_below_becomes_a_directory() -> None:
    assert tree_of(layer(file("a", "1")), layer(file("a/b", "2"))) == {"a": "/", "a/b": "2"}


def test_a_node_put_after_its_directory_went_lands_in_the_new_directory() -> None:
    """Remembered places must not outlive the directories they name."""
    changes = layer(file("d/a", "1"), file("d", "2"), file("d/b", "3"))
    assert tree_of(changes) == {"d": "/", "d/b": "3"}
    through = layer(symlink("s", "one"), file("s/a", "1"), symlink("s", "two"), file("s/a", "2"))
    assert tree_of(through) == {"one": "/", "one/a": "1", "s": "-> two", "two": "/", "two/a": "2"}


# Parents that are symlinks.


def test_an_entry_under_a_symlinked_parent_lands_in_what_it_points_at() -> None:
    lower = layer(directory("usr/lib"), symlink("lib", "usr/lib"))
    assert tree_of(lower, layer(file("lib/libc.so", "x"))) == {
        "lib": "-> usr/lib",
        "usr": "/",
        "usr/lib": "/",
        "usr/lib/libc.so": "x",
    }


@pytest.mark.parametrize(
    ("target", "lands"),
    [
        ("/data", "data/f"),
        ("../data", "data/f"),
        ("../../../../data", "data/f"),
        ("/../data/./", "data/f"),
        ("data", "a/data/f"),
        ("hop", "data/f"),
        ("/", "f"),
        ("..", "f"),
        (".", "a/f"),
    ],
)
def test_a_symlinked_parent_resolves_as_in_a_chroot(target: str, lands: str) -> None:
    lower = layer(directory("a"), directory("data"), symlink("a/link", target), symlink("a/hop", "/data"))
    tree = flatten(lower, layer(file("a/link/f", "x")))
    assert names(tree)[lands] == "x"


def test_dot_dot_in_a_symlink_leaves_the_directory_it_is_really_in() -> None:
    """`..` counts from where the links led, not from how the path is spelled."""
    lower = layer(directory("real/deep"), symlink("short", "real/deep"), symlink("real/deep/up", "../sibling"))
    assert names(flatten(lower, layer(file("short/up/f", "x"))))["real/sibling/f"] == "x"


def test_a_dangling_parent_makes_the_directories_it_points_to() -> None:
    tree = flatten(layer(symlink("run", "/var/run")), layer(file("run/lock/x", "1")))
    assert names(tree)["var/run/lock/x"] == "1"


def test_a_directory_over_a_symlink_to_a_directory_replaces_the_symlink() -> None:
    lower = layer(directory("d"), file("d/f", "1"), symlink("s", "d"))
    assert tree_of(lower, layer(directory("s"), file("s/g", "2"))) == {
        "d": "/",
        "d/f": "1",
        "s": "/",
        "s/g": "2",
    }


# Whiteouts.


def test_a_whiteout_hides_a_lower_name_with_all_below_it() -> None:
    lower = layer(file("a/b", "1"), file("a/c/d", "2"), file("e", "3"))
    assert tree_of(lower, layer(whiteouts=["a/c", "e"])) == {"a": "/", "a/b": "1"}


def test_a_whiteout_of_a_missing_name_is_no_error_and_changes_nothing() -> None:
    tree = flatten(layer(file("a", "1"), symlink("loop", "loop")))
    assert apply(tree, layer(whiteouts=["b", "c/d", "a/x", "loop/x"], opaque=["e", "a"])) is tree


def test_a_whiteout_hides_the_symlink_and_not_what_it_points_at() -> None:
    assert tree_of(layer(file("a", "1"), symlink("s", "a")), layer(whiteouts=["s"])) == {"a": "1"}


def test_a_whiteout_and_an_entry_of_one_name_leave_the_entry_only() -> None:
    lower = layer(directory("a", 0o700), file("a/old", "1"))
    for upper in (layer(directory("a"), whiteouts=["a"]), layer(directory("a"), file("a/new", "2"), whiteouts=["a"])):
        assert "a/old" not in tree_of(lower, upper)
        assert "a" in tree_of(lower, upper)


def test_a_whiteout_acts_on_lower_layers_only() -> None:
    lower = layer(file("a/b", "lower"))
    upper = layer(file("a/b", "this"), whiteouts=["a/b"])
    assert tree_of(lower, upper) == {"a": "/", "a/b": "this"}
    assert tree_of(upper) == {"a": "/", "a/b": "this"}


def test_an_opaque_directory_hides_all_lower_contents_and_keeps_its_own() -> None:
    lower = layer(directory("a", 0o700), file("a/b", "1"), file("a/c/d", "2"), file("e", "3"))
    upper = layer(file("a/new", "4"), opaque=["a"])
    tree = flatten(lower, upper)
    assert names(tree) == {"a": "/", "a/new": "4", "e": "3"}
    assert tree.root.children["a"].mode == 0o700


def test_an_opaque_root_hides_everything_below() -> None:
    assert tree_of(layer(file("a/b", "1")), layer(file("c", "2"), opaque=[""])) == {"c": "2"}


def test_a_whiteout_resolves_its_parents_in_the_lower_tree() -> None:
    lower = layer(file("usr/lib/x", "1"), file("usr/lib/y", "2"), symlink("lib", "usr/lib"))
    assert "usr/lib/x" not in tree_of(lower, layer(whiteouts=["lib/x"]))
    assert tree_of(lower, layer(opaque=["lib"])) == {"lib": "-> usr/lib", "usr": "/", "usr/lib": "/"}


@pytest.mark.parametrize("whiteouts", [["lib/x"], ["lib", "lib/x"]])
def test_a_whiteout_under_a_symlink_that_this_layer_replaces_spares_what_it_pointed_at(whiteouts: list[str]) -> None:
    lower = layer(file("usr/lib/x", "1"), symlink("lib", "usr/lib"))
    upper = layer(directory("lib"), file("lib/y", "2"), whiteouts=whiteouts)
    assert tree_of(lower, upper) == {"lib": "/", "lib/y": "2", "usr": "/", "usr/lib": "/", "usr/lib/x": "1"}


def test_an_opaque_directory_in_place_of_a_symlink_spares_what_it_pointed_at() -> None:
    lower = layer(file("d/real/x", "1"), symlink("d/link", "real"), symlink("s", "d"))
    upper = layer(directory("s/link"), opaque=["d/link"])
    assert tree_of(lower, upper)["d/real/x"] == "1"


def test_a_hidden_symlink_is_followed_by_no_other_whiteout() -> None:
    lower = layer(file("d/x", "1"), symlink("s", "d"))
    for whiteouts in (["s", "s/x"], ["s/x", "s"]):
        assert tree_of(lower, layer(whiteouts=whiteouts)) == {"d": "/", "d/x": "1"}


# Hard links.


def test_a_hard_link_is_its_target_by_another_name() -> None:
    tree = flatten(layer(file("a", "1", mode=0o600, uid=5), hardlink("d/b", "a")))
    assert lookup(tree, "d/b") == lookup(tree, "a")
    assert names(tree) == {"a": "1", "d": "/", "d/b": "1"}


def test_a_hard_link_may_name_a_file_of_a_lower_layer() -> None:
    assert tree_of(layer(file("a", "1")), layer(hardlink("b", "a")))["b"] == "1"


def test_a_hard_link_keeps_its_contents_when_a_later_layer_replaces_the_target() -> None:
    layers = layer(file("a", "1")), layer(hardlink("b", "a")), layer(file("a", "2"))
    assert tree_of(*layers) == {"a": "2", "b": "1"}
    assert tree_of(*layers, layer(whiteouts=["a"])) == {"b": "1"}


def test_a_hard_link_may_name_what_its_own_layer_hides() -> None:
    lower = layer(file("a/x", "1"))
    assert tree_of(lower, layer(hardlink("b", "a/x"), whiteouts=["a"])) == {"b": "1"}
    assert tree_of(lower, layer(hardlink("b", "a/x"), opaque=["a"])) == {"a": "/", "b": "1"}


def test_a_hard_link_sees_the_tree_as_it_is_when_it_comes() -> None:
    """As `tar -x`: the link made before its target is replaced keeps the earlier contents."""
    lower = layer(file("a", "lower"))
    assert tree_of(lower, layer(hardlink("b", "a"), file("a", "this"))) == {"a": "this", "b": "lower"}
    assert tree_of(lower, layer(file("a", "this"), hardlink("b", "a"))) == {"a": "this", "b": "this"}


def test_a_hard_link_to_a_later_entry_is_placed_when_that_has_come() -> None:
    assert tree_of(layer(hardlink("a", "b"), file("b", "1"))) == {"a": "1", "b": "1"}


def test_a_chain_of_links_to_later_entries_is_placed_in_any_order() -> None:
    chain = [hardlink("a", "b"), hardlink("c", "d"), hardlink("b", "c"), file("d", "1"), hardlink("e", "a")]
    assert tree_of(layer(*chain)) == dict.fromkeys("abcde", "1")


def test_what_comes_after_a_deferred_link_takes_its_place() -> None:
    assert tree_of(layer(hardlink("a", "b"), file("a", "2"), file("b", "1"))) == {"a": "2", "b": "1"}


def test_a_hard_link_to_a_symlink_is_that_symlink() -> None:
    assert tree_of(layer(symlink("s", "x"), hardlink("t", "s"))) == {"s": "-> x", "t": "-> x"}


def test_a_hard_link_to_a_special_is_that_special() -> None:
    assert tree_of(layer(Entry("p", Kind.FIFO), hardlink("q", "p"))) == {"p": "p 0:0", "q": "p 0:0"}


def test_the_parents_of_a_hard_links_target_are_resolved_and_its_last_name_is_not() -> None:
    lower = layer(file("usr/lib/x", "1"), symlink("lib", "/usr/lib"), symlink("usr/lib/s", "x"))
    tree = tree_of(lower, layer(hardlink("a", "lib/x"), hardlink("b", "lib/s")))
    assert (tree["a"], tree["b"]) == ("1", "-> x")


def test_a_hard_link_to_itself_changes_nothing() -> None:
    lower = layer(file("a", "1"))
    assert tree_of(lower, layer(hardlink("a", "a"))) == {"a": "1"}
    assert tree_of(lower, layer(hardlink("a", "a"), whiteouts=["a"])) == {"a": "1"}


def test_a_hard_link_in_place_of_a_directory_takes_a_file_out_of_it() -> None:
    assert tree_of(layer(file("d/f", "1"), file("d/g", "2"), hardlink("d", "d/f"))) == {"d": "1"}


# Reading a tree.


def test_walk_gives_a_directory_before_its_contents_and_names_by_their_bytes() -> None:
    raw = "\udcc3"  # the byte 0xc3 alone, which sorts before any of the characters below
    tree = flatten(layer(file("a/b"), file("a-"), file("é"), file("€"), file(raw), file("z\U0001f600"), file("z￿")))
    assert [path for path, _ in walk(tree)] == ["", "a", "a/b", "a-", "z￿", "z\U0001f600", raw, "é", "€"]


def test_lookup_answers_as_lstat_in_a_chroot() -> None:
    tree = flatten(layer(file("d/f", "1"), symlink("s", "/d"), symlink("loop", "loop")))
    assert lookup(tree, "") is tree.root
    assert lookup(tree, "s/f") == lookup(tree, "d/f")
    assert lookup(tree, "s") == Symlink(0o777, 0, 0, 0, (), "/d")
    assert lookup(tree, "s/..") is tree.root
    nested = flatten(layer(file("d/f", "1"), symlink("deep/er/s", "/d"), symlink("deep/up", "../d")))
    assert lookup(nested, "deep/er/s/f") == lookup(nested, "deep/up/f") == lookup(nested, "d/f")
    assert [lookup(tree, p) for p in ("x", "d/f/x", "loop/x", "x/y")] == [None] * 4


def test_rewrite_replaces_drops_and_shares() -> None:
    tree = flatten(layer(file("a/x", "1"), file("b/y", "2"), file("b/z", "3")))

    def rule(node: Node) -> Node | None:
        if isinstance(node, File):
            return None if node.token == "2" else node
        return node

    result = rewrite(tree, rule)
    assert names(result) == {"a": "/", "a/x": "1", "b": "/", "b/z": "3"}
    assert result.root.children["a"] is tree.root.children["a"]
    assert "b/y" in names(tree)
    assert rewrite(tree, lambda node: node) is tree


# The algebra.

_NAMES = st.sampled_from("abc")
_PATHS = st.lists(_NAMES, min_size=1, max_size=3).map("/".join)
_TARGETS = st.one_of(_PATHS, _PATHS.map("/".__add__), _PATHS.map("../".__add__), st.sampled_from(["..", "/", "."]))
_ENTRIES: st.SearchStrategy[Entry] = st.one_of(
    st.builds(file, _PATHS, st.sampled_from("1234"), mode=st.sampled_from([0o644, 0o755])),
    st.builds(directory, _PATHS, st.sampled_from([0o755, 0o700])),
    st.builds(symlink, _PATHS, _TARGETS),
    st.builds(hardlink, _PATHS, _PATHS),
)
_LAYERS = st.builds(
    lambda entries, whiteouts, opaque: layer(*entries, whiteouts=whiteouts, opaque=opaque),
    st.lists(_ENTRIES, max_size=8),
    st.lists(_PATHS, max_size=3),
    st.lists(_PATHS, max_size=2),
)


def snapshot(tree: Tree) -> list[tuple[str, Any]]:
    return [(path, n._replace(children={}) if isinstance(n, Directory) else n) for path, n in walk(tree)]


def outcome(tree: Tree, *layers: Changeset) -> list[tuple[str, Any]] | str:
    """The tree, or the error, of applying layers in order."""
    try:
        for changeset in layers:
            tree = apply(tree, changeset)
    except ImageError as error:
        return str(error)
    return snapshot(tree)


def some_tree(layers: list[Changeset]) -> Tree:
    tree = EMPTY
    for changeset in layers:
        try:
            tree = apply(tree, changeset)
        except ImageError:
            continue
    return tree


_TREES = st.lists(_LAYERS, max_size=3).map(some_tree)


@settings(deadline=None)
@given(tree=_TREES)
def test_an_empty_changeset_changes_nothing(tree: Tree) -> None:
    assert apply(tree, layer()) is tree


@settings(deadline=None)
@given(tree=_TREES, changeset=_LAYERS)
def test_applying_leaves_the_tree_given_as_it_is(tree: Tree, changeset: Changeset) -> None:
    before = snapshot(tree)
    outcome(tree, changeset)
    assert snapshot(tree) == before


@settings(deadline=None)
@given(tree=_TREES, entries=st.lists(_ENTRIES.filter(lambda e: e.kind in (Kind.FILE, Kind.DIRECTORY)), max_size=8))
def test_plain_files_and_directories_applied_twice_are_as_applied_once(tree: Tree, entries: list[Entry]) -> None:
    # An order in which no entry undoes another: one a path, and no file where another entry needs a directory.
    unique = {e.path: e for e in entries}
    paths = set(unique)
    kept = [e for p, e in unique.items() if e.kind is Kind.DIRECTORY or not any(q.startswith(p + "/") for q in paths)]
    once = outcome(tree, layer(*kept))
    # A symlink below may lead one entry to where another stands; the second time must then still agree with itself.
    if not any(isinstance(node, Symlink) for _, node in walk(tree)):
        assert outcome(tree, layer(*kept), layer(*kept)) == once


@settings(deadline=None)
@given(tree=_TREES, changeset=_LAYERS, shuffle=st.randoms(use_true_random=False))
def test_the_order_of_whiteouts_means_nothing(tree: Tree, changeset: Changeset, shuffle: Any) -> None:
    whiteouts, opaque = list(changeset.whiteouts), list(changeset.opaque)
    shuffle.shuffle(whiteouts)
    shuffle.shuffle(opaque)
    shuffled = layer(*changeset.entries, whiteouts=whiteouts * 2, opaque=opaque * 2)
    assert outcome(tree, shuffled) == outcome(tree, changeset)


@settings(deadline=None)
@given(tree=_TREES, changeset=_LAYERS)
def test_a_layer_over_a_hidden_tree_is_as_over_an_empty_one(tree: Tree, changeset: Changeset) -> None:
    plain = layer(*(e for e in changeset.entries if e.kind is not Kind.HARDLINK))
    hidden = layer(*plain.entries, opaque=[""])
    assert outcome(tree, hidden) == outcome(EMPTY, plain)


@settings(deadline=None)
@given(tree=_TREES, changeset=_LAYERS)
def test_hiding_and_placing_may_come_as_two_layers(tree: Tree, changeset: Changeset) -> None:
    """A layer is its whiteouts, then its entries; but for links to what it hides, and symlinks that it replaces."""
    entries = [e for e in changeset.entries if e.kind is not Kind.HARDLINK]
    hide = layer(whiteouts=changeset.whiteouts, opaque=changeset.opaque)
    if any(isinstance(node, Symlink) for _, node in walk(tree)):
        return
    both = layer(*entries, whiteouts=changeset.whiteouts, opaque=changeset.opaque)
    assert outcome(tree, hide, layer(*entries)) == outcome(tree, both)


@settings(deadline=None)
@given(tree=_TREES, path=_PATHS)
def test_directories_that_a_layer_does_not_touch_are_shared(tree: Tree, path: str) -> None:
    result = apply(tree, layer(file("new", "x")))
    for name, node in tree.root.children.items():
        assert result.root.children[name] is node


def naive(tree: Tree, changeset: Changeset) -> list[tuple[str, Any]]:
    """The entries one by one, each as a layer of its own: no place is ever remembered."""
    for entry in changeset.entries:
        tree = apply(tree, layer(entry))
    return snapshot(tree)


@settings(max_examples=300, deadline=None)
@given(tree=_TREES, entries=st.lists(_ENTRIES, max_size=12))
def test_entries_in_one_layer_act_as_one_after_the_other(tree: Tree, entries: list[Entry]) -> None:
    try:
        expected = naive(tree, layer(*entries))
    except ImageError:
        return  # a link loop, or a link to what comes later: the latter is more than one by one can do
    # Within one layer a link may also name what the lower tree had before this layer replaced it, so one by one fails
    # more often and never differs.
    assert outcome(tree, layer(*entries)) == expected

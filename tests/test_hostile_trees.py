"""Layers made to break the merge: loops, depth, floods, ways out. Each ends in a tree or an ImageError, soon."""

from __future__ import annotations

import time
from collections.abc import Iterable

import pytest

from unpacker.apply import apply
from unpacker.changeset import Changeset, Entry, Kind
from unpacker.errors import ImageError
from unpacker.limits import Limits
from unpacker.listing import listing, read
from unpacker.publish.holdable import Abilities, held
from unpacker.rootfs import Policy, prepare
from unpacker.tree import EMPTY, Tree, lookup, walk


def file(path: str, token: str = "x") -> Entry:
    return Entry(path, Kind.FILE, token=token)


def directory(path: str) -> Entry:
    return Entry(path, Kind.DIRECTORY, 0o755)


def symlink(path: str, target: str) -> Entry:
    return Entry(path, Kind.SYMLINK, 0o777, target=target)


def hardlink(path: str, target: str) -> Entry:
    return Entry(path, Kind.HARDLINK, target=target)


def layer(entries: Iterable[Entry], whiteouts: Iterable[str] = (), opaque: Iterable[str] = ()) -> Changeset:
    return Changeset(diff_id="sha256:test", entries=tuple(entries), whiteouts=tuple(whiteouts), opaque=tuple(opaque))


def test_names_that_the_official_tools_obey_are_left_out_soon_however_many_they_are() -> None:
    entries = [directory("flat"), directory("deep")]
    entries += [file(f"flat/.cvmfsgraft-{number}") for number in range(20_000)]
    for number in range(20_000):
        entries += [directory(f"deep/{number}"), file(f"deep/{number}/.cvmfscatalog"), file(f"deep/{number}/kept")]
    tree = apply(EMPTY, layer(entries), Limits())
    began = time.monotonic()
    kept, altered = held(tree, Abilities(xattrs=True, nanoseconds=True, specials=True))
    assert time.monotonic() - began < 5
    assert altered == {"markers": 40_000}
    assert len(paths(kept)) == 2 + 2 * 20_000


def paths(tree: Tree) -> set[str]:
    return {path for path, _ in walk(tree) if path}


# Loops.


@pytest.mark.parametrize(
    "links",
    [
        [symlink("a", "a")],
        [symlink("a", "b"), symlink("b", "a")],
        [symlink("a", "/b/x"), symlink("b", "./a/../a")],
        [symlink("a", "a/a")],
    ],
)
def test_a_loop_of_symlinks_on_the_way_is_refused(links: list[Entry]) -> None:
    with pytest.raises(ImageError, match="too many symbolic links"):
        apply(EMPTY, layer([*links, file("a/f")]))


def test_forty_links_on_the_way_are_followed_and_one_more_is_not() -> None:
    chain = [symlink(f"l{n}", f"l{n + 1}") for n in range(40)]
    assert "l40/f" in paths(apply(EMPTY, layer([*chain, file("l0/f")])))
    with pytest.raises(ImageError, match="too many symbolic links"):
        apply(EMPTY, layer([*chain, symlink("l40", "l41"), file("l0/f")]))


def test_a_hard_link_through_a_loop_names_nothing() -> None:
    with pytest.raises(ImageError, match="hard link to nothing"):
        apply(EMPTY, layer([symlink("a", "a"), hardlink("b", "a/f")]))


def test_a_loop_that_nothing_goes_through_is_just_a_symlink() -> None:
    assert paths(apply(EMPTY, layer([symlink("a", "a")], whiteouts=["a/b"], opaque=["a"]))) == {"a"}


# Ways out of the root.


@pytest.mark.parametrize("target", ["..", "/..", "../../..", "/../../etc", "../" * 1000 + "etc"])
def test_no_symlink_leads_out_of_the_root(target: str) -> None:
    tree = apply(EMPTY, layer([symlink("d/out", target), file("d/out/f")]))
    assert {p for p in paths(tree) if p.endswith("f")} <= {"f", "etc/f"}


@pytest.mark.parametrize("path", ["..", "a/..", "a/.", ".", "a//", "../..", "/"])
def test_no_name_of_a_tree_is_a_step_elsewhere(path: str) -> None:
    """The layer reader gives normal paths only; a damaged cache must not put `..` into a tree that is written out."""
    with pytest.raises(ImageError, match="no file system can hold"):
        apply(EMPTY, layer([file(path)]))


def test_steps_up_inside_an_entrys_path_stay_inside() -> None:
    assert paths(apply(EMPTY, layer([file("a/../../../b/f")]))) <= {"a", "b", "b/f"}


# Hard links that cannot be.


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([hardlink("a", "b")], "hard link to nothing"),
        ([hardlink("a", "a")], "hard link to nothing"),
        ([hardlink("a", "b"), hardlink("b", "a")], "hard link to nothing"),
        ([hardlink("a", "b"), hardlink("b", "c"), hardlink("c", "d")], "hard link to nothing"),
        ([directory("d"), hardlink("a", "d")], "hard link to a directory"),
        ([hardlink("a", "d"), directory("d")], "hard link to a directory"),
        ([hardlink("a", "")], "hard link to a directory"),
        ([file("f"), hardlink("a", "f/x")], "hard link to nothing"),
    ],
)
def test_a_hard_link_to_nothing_or_to_a_directory_is_refused(entries: list[Entry], message: str) -> None:
    with pytest.raises(ImageError, match=message):
        apply(EMPTY, layer(entries))


@pytest.mark.parametrize("kind", [k for k in Kind if k is not Kind.DIRECTORY])
def test_a_root_that_is_no_directory_is_refused(kind: Kind) -> None:
    with pytest.raises(ImageError, match="not a directory"):
        apply(EMPTY, layer([file("f"), Entry("", kind, target="f")]))


def test_messages_show_hostile_names_escaped_and_short() -> None:
    name = "\x1b[31m\n\udcff" + "x" * 4000
    with pytest.raises(ImageError) as caught:
        apply(EMPTY, layer([hardlink(name, "gone")]))
    text = str(caught.value)
    assert text.isascii()
    assert text.isprintable()
    assert len(text) < 500


# Depth: what recurses would fall over.

DEEP = "/".join(["d"] * 2000)


def test_a_tree_two_thousand_deep_goes_the_whole_way() -> None:
    tree = apply(EMPTY, layer([file(DEEP + "/f"), Entry(DEEP + "/null", Kind.CHARACTER, device=(1, 3))]))
    tree = apply(tree, layer([file(DEEP + "/g"), hardlink("h", DEEP + "/f")], whiteouts=[DEEP + "/f"]))
    prepared, counts = prepare(tree, (), Policy(owner=(1000, 1000)))
    rows = list(read(listing(prepared)))
    assert [r.path for r in rows][-2:] == [DEEP + "/g", "h"]
    assert counts == {"devices": 1, "owners": 2003}
    assert apply(tree, layer([], whiteouts=["d"])).root.children.keys() == {"h"}


def test_a_tree_cannot_be_made_deeper_through_symlinks_than_a_path_can_be_long() -> None:
    with pytest.raises(ImageError, match="no file system can hold"):
        apply(EMPTY, layer([file(DEEP + "/f"), symlink("s", DEEP), file("s/" + DEEP)]))
    with pytest.raises(ImageError, match="no file system can hold"):
        apply(EMPTY, layer([symlink("s", "x" * 200 + "/" + DEEP), file("s/" + "y" * 200)]))


# Floods: a little input that would become much work or memory.


def test_directories_that_paths_imply_are_bounded_over_all_layers() -> None:
    limits = Limits(image_entries=5000)
    tree = apply(EMPTY, layer([file(DEEP + "/f"), file("a/" + DEEP + "/f")]), limits)
    assert tree.implied == 4001
    with pytest.raises(ImageError, match="unlisted directories"):
        apply(tree, layer([file("b/" + DEEP + "/f")]), limits)


def test_symlinks_that_multiply_the_way_are_refused_before_they_take_long() -> None:
    """Forty links of 2,000 components each, for every entry anew because a link on the way is replaced each time."""
    chain = [symlink(f"l{n}", "./" * 1990 + f"l{n + 1}") for n in range(39)]
    hostile = [e for n in range(5000) for e in (symlink("l0", "./" * (n % 2) + "l1"), file("l0/f"))]
    start = time.process_time()
    with pytest.raises(ImageError, match="too long to follow"):
        apply(EMPTY, layer([*chain, *hostile]))
    assert time.process_time() - start < 30


def test_whiteouts_through_long_symlinks_are_refused_before_they_take_long() -> None:
    chain = [symlink(f"l{n}", "./" * 1990 + f"l{n + 1}") for n in range(39)]
    lower = apply(EMPTY, layer([*chain, directory("l39")]))
    start = time.process_time()
    with pytest.raises(ImageError, match="too long to follow"):
        apply(lower, layer([], whiteouts=[f"l0/{n}" for n in range(1_000)]))
    assert time.process_time() - start < 30


def test_long_chains_of_later_links_take_linear_time() -> None:
    """Shuffled by a step, so that neither order of looking at them is a good one."""
    count = 30_011
    order = [n * 7919 % count for n in range(count)]
    links = [hardlink(f"l{n}", f"l{n + 1}") for n in order]
    start = time.process_time()
    tree = apply(EMPTY, layer([*links, file(f"l{count}", "found")]))
    assert time.process_time() - start < 10
    assert lookup(tree, "l0") == lookup(tree, f"l{count}")


def test_many_directories_replaced_again_and_again_take_linear_time() -> None:
    entries = [e for n in range(20_000) for e in (file("a/b/c/d"), file("a/b"), directory("x"), file(f"x/{n}"))]
    start = time.process_time()
    tree = apply(EMPTY, layer(entries))
    assert time.process_time() - start < 10
    assert len(paths(tree)) == 20_003


def test_a_wide_directory_is_copied_once_a_layer() -> None:
    wide = apply(EMPTY, layer(file(f"d/{n}") for n in range(100_000)))
    start = time.process_time()
    tree = apply(
        wide, layer((file(f"d/{n}", "new") for n in range(1_000)), whiteouts=(f"d/{n}" for n in range(50_000)))
    )
    assert time.process_time() - start < 5
    assert len(paths(tree)) == 51_001

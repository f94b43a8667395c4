"""A layer as a directory for overlayfs: stacked as the kernel does it, the layers give the image's root."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from unpacker.apply import apply
from unpacker.changeset import Changeset, Entry, Kind
from unpacker.layersview import OPAQUE, layer_tree
from unpacker.limits import Limits
from unpacker.tree import EMPTY, Directory, Node, Special, Symlink, Tree, rewrite, walk

LIMITS = Limits()
DIFF_ID = "sha256:" + "0" * 64


def layer(*entries: Entry, **more: Any) -> Changeset:
    return Changeset(diff_id=DIFF_ID, entries=entries, **more)


def file(path: str, token: str = "t", **meta: Any) -> Entry:
    return Entry(path, Kind.FILE, size=1, token=token, **meta)


def directory(path: str, mode: int = 0o755, **meta: Any) -> Entry:
    return Entry(path, Kind.DIRECTORY, mode, **meta)


def symlink(path: str, target: str) -> Entry:
    return Entry(path, Kind.SYMLINK, 0o777, target=target)


def view(changeset: Changeset, below: Tree = EMPTY) -> dict[str, str] | None:
    tree = layer_tree(changeset, below, LIMITS)
    return None if tree is None else {path: shown(node) for path, node in walk(tree)}


def shown(node: Node) -> str:
    if isinstance(node, Directory):
        return f"d {node.mode:04o}{' opaque' if OPAQUE in node.xattrs else ''}"
    if isinstance(node, Symlink):
        return f"l {node.target}"
    if isinstance(node, Special):
        return f"{node.kind} {node.device[0]}/{node.device[1]}"
    return f"f {node.token}"


def test_a_whiteout_is_a_character_device_0_0() -> None:
    assert view(layer(directory("etc"), whiteouts=("etc/motd",))) == {
        "": "d 0755",
        "etc": "d 0755",
        "etc/motd": "c 0/0",
    }


def test_an_opaque_directory_says_so_by_its_attribute() -> None:
    below = apply(EMPTY, layer(file("etc/motd")))
    assert view(layer(directory("etc", 0o700), file("etc/a"), opaque=("etc",)), below) == {
        "": "d 0755",
        "etc": "d 0700 opaque",
        "etc/a": "f t",
    }


def test_a_directory_that_takes_the_place_of_a_hidden_one_does_not_merge_with_it() -> None:
    below = apply(EMPTY, layer(file("etc/motd")))
    assert view(layer(directory("etc"), file("etc/a"), whiteouts=("etc",)), below) == {
        "": "d 0755",
        "etc": "d 0755 opaque",
        "etc/a": "f t",
    }


def test_a_file_that_takes_the_place_of_a_hidden_one_needs_no_whiteout() -> None:
    assert view(layer(file("motd"), whiteouts=("motd",))) == {"": "d 0755", "motd": "f t"}


def test_a_directory_that_the_layer_only_goes_through_looks_as_below() -> None:
    below = apply(EMPTY, layer(directory("opt", 0o750, uid=7, mtime_ns=5)))
    tree = layer_tree(layer(file("opt/a")), below, LIMITS)
    assert tree is not None
    opt = tree.root.children["opt"]
    assert isinstance(opt, Directory)
    assert (opt.mode, opt.uid, opt.mtime_ns, list(opt.children)) == (0o750, 7, 5, ["a"])


def test_a_device_is_left_out_and_one_that_hides_something_is_a_whiteout() -> None:
    below = apply(EMPTY, layer(file("dev/null")))
    entries = (Entry("dev/null", Kind.CHARACTER, device=(1, 3)), Entry("dev/sda", Kind.BLOCK, device=(8, 0)))
    assert view(layer(directory("dev"), *entries), below) == {"": "d 0755", "dev": "d 0755", "dev/null": "c 0/0"}


def test_a_char_0_0_of_the_layer_itself_hides_nothing_that_is_not_there() -> None:
    assert view(layer(Entry("x", Kind.CHARACTER, device=(0, 0)))) == {"": "d 0755"}


def test_hard_links_within_a_layer_are_stacked() -> None:
    found = view(layer(file("a"), Entry("b", Kind.HARDLINK, target="a")))
    assert found == {"": "d 0755", "a": "f t", "b": "f t"}


def test_a_hard_link_into_a_lower_layer_does_not_stand_alone() -> None:
    below = apply(EMPTY, layer(file("a")))
    assert view(layer(Entry("b", Kind.HARDLINK, target="a")), below) is None
    # Where the layer brings such a name later, the link means the one below.
    assert view(layer(Entry("b", Kind.HARDLINK, target="a"), file("a", "new")), below) is None


def test_names_below_a_symlink_of_a_lower_layer_do_not_stand_alone() -> None:
    below = apply(EMPTY, layer(directory("usr/lib"), symlink("lib", "usr/lib")))
    assert view(layer(file("lib/a")), below) is None
    assert view(layer(whiteouts=("lib/a",)), below) is None
    assert view(layer(opaque=("lib",)), below) is None


def test_a_directory_of_the_layer_itself_takes_the_place_of_a_symlink_below() -> None:
    below = apply(EMPTY, layer(directory("usr/lib"), symlink("lib", "usr/lib")))
    assert view(layer(directory("lib"), file("lib/a")), below) == {"": "d 0755", "lib": "d 0755", "lib/a": "f t"}


def test_names_below_a_symlink_of_the_same_layer_do_not_stand_alone() -> None:
    assert view(layer(symlink("lib", "usr/lib"), file("lib/a"))) is None


def stacked(below: Node | None, above: Node | None) -> Node | None:
    """What overlayfs shows of one name in two layers, `below` being merged already."""
    if above is None:
        return below
    if isinstance(above, Special) and above.device == (0, 0) and above.kind is Kind.CHARACTER:
        return None
    if not isinstance(above, Directory):
        return above
    lower = below.children if isinstance(below, Directory) and OPAQUE not in above.xattrs else {}
    children: dict[str, Node] = {}
    for name in {*lower, *above.children}:
        node = stacked(lower.get(name), above.children.get(name))
        if node is not None:
            children[name] = node
    return above._replace(children=children, xattrs=tuple(x for x in above.xattrs if x != OPAQUE))


def publishable(tree: Tree) -> dict[str, Node]:
    def rule(node: Node) -> Node | None:
        return None if isinstance(node, Special) and node.kind is not Kind.FIFO else node

    return {path: bare(node) for path, node in walk(rewrite(tree, rule))}


def bare(node: Node) -> Node:
    return node._replace(children={}) if isinstance(node, Directory) else node


NAMES = st.sampled_from(["a", "b", "c"])
PATHS = st.lists(NAMES, min_size=1, max_size=3).map("/".join)
ENTRIES = st.one_of(
    st.builds(file, PATHS, st.sampled_from(["t1", "t2"])),
    st.builds(directory, PATHS, st.sampled_from([0o755, 0o711])),
    st.builds(symlink, PATHS, st.sampled_from(["a", "b/c", "/c"])),
    st.builds(lambda path: Entry(path, Kind.CHARACTER, device=(0, 0)), PATHS),
    st.builds(lambda path, target: Entry(path, Kind.HARDLINK, target=target), PATHS, PATHS),
)
LAYERS = st.builds(
    lambda entries, whiteouts, opaque: layer(*entries, whiteouts=tuple(whiteouts), opaque=tuple(opaque)),
    st.lists(ENTRIES, max_size=6),
    st.lists(PATHS, max_size=2),
    st.lists(PATHS, max_size=1),
)


@settings(max_examples=500, deadline=None)
@given(st.lists(LAYERS, min_size=1, max_size=3))
def test_layers_that_stand_alone_stack_to_the_root_of_the_image(layers: list[Changeset]) -> None:
    from unpacker.errors import ImageError

    tree, shows = EMPTY, EMPTY.root
    for changeset in layers:
        found = layer_tree(changeset, tree, LIMITS)
        if found is None:
            return
        try:
            tree = apply(tree, changeset, LIMITS)
        except ImageError:
            return
        merged = stacked(shows, found.root)
        assert isinstance(merged, Directory)
        shows = merged
    assert {path: bare(node) for path, node in walk(Tree(shows))} == publishable(tree)

"""What of an image becomes public, and how it is counted."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unpacker.apply import apply
from unpacker.changeset import Change, Changeset, Entry, Kind, Xattrs
from unpacker.rootfs import EARLIEST, LATEST, Policy, prepare, publishable
from unpacker.tree import EMPTY, Directory, Tree, lookup, walk

KEEP_OWNERS = Policy()
OURS = Policy(owner=(1000, 1001))


def tree_of(*entries: Entry) -> Tree:
    return apply(EMPTY, Changeset(diff_id="sha256:test", entries=entries))


def published(*entries: Entry, policy: Policy = KEEP_OWNERS) -> tuple[Tree, dict[str, int]]:
    """Entries as they go through both rules: each when it is read, the tree before it is published."""
    tree, counts = prepare(tree_of(*(publishable(e, policy) for e in entries)), (), policy)
    return tree, dict(counts)


@pytest.mark.parametrize(
    ("kind", "mode", "public", "change"),
    [
        (Kind.FILE, 0o644, 0o644, Change.NONE),
        (Kind.FILE, 0o600, 0o644, Change.MODE),
        (Kind.FILE, 0o000, 0o444, Change.MODE),
        (Kind.FILE, 0o700, 0o755, Change.MODE),
        (Kind.FILE, 0o010, 0o555, Change.MODE),
        (Kind.FILE, 0o4755, 0o755, Change.SETID),
        (Kind.FILE, 0o2710, 0o755, Change.SETID | Change.MODE),
        (Kind.FILE, 0o6644, 0o644, Change.SETID),
        (Kind.FILE, 0o666, 0o666, Change.NONE),
        (Kind.DIRECTORY, 0o755, 0o755, Change.NONE),
        (Kind.DIRECTORY, 0o700, 0o755, Change.MODE),
        (Kind.DIRECTORY, 0o000, 0o555, Change.MODE),
        (Kind.DIRECTORY, 0o1777, 0o1777, Change.NONE),
        (Kind.DIRECTORY, 0o3770, 0o1775, Change.SETID | Change.MODE),
        (Kind.FIFO, 0o600, 0o644, Change.MODE),
        (Kind.SYMLINK, 0o755, 0o777, Change.NONE),
        (Kind.SYMLINK, 0o6000, 0o777, Change.NONE),
    ],
)
def test_modes_become_readable_for_all_and_lose_their_setid_bits(
    kind: Kind, mode: int, public: int, change: Change
) -> None:
    entry = publishable(Entry("x", kind, mode), KEEP_OWNERS)
    assert (oct(entry.mode), entry.change) == (oct(public), change)


def test_user_xattrs_are_kept_except_those_that_container_tools_obey() -> None:
    xattrs: Xattrs = (
        ("security.capability", b"\x01"),
        ("trusted.overlay.opaque", b"y"),
        ("user.author", b"\xff\x00"),
        ("user.containers.override_stat", b"0:0:0755"),
        ("user.overlay.opaque", b"y"),
        ("user.overlayed", b"kept"),
    )
    entry = publishable(Entry("x", Kind.FILE, xattrs=xattrs), KEEP_OWNERS)
    assert entry.xattrs == (("user.author", b"\xff\x00"), ("user.overlayed", b"kept"))
    assert entry.change == Change.XATTR


def test_a_symlink_keeps_no_user_xattr_because_it_cannot_have_one() -> None:
    entry = publishable(Entry("x", Kind.SYMLINK, 0o777, target="y", xattrs=(("user.a", b""),)), KEEP_OWNERS)
    assert (entry.xattrs, entry.change) == ((), Change.XATTR)


def test_the_owner_is_replaced_only_where_the_policy_says_so_and_counts_only_where_it_differed() -> None:
    entry = Entry("x", Kind.FILE, uid=5, gid=6)
    assert publishable(entry, KEEP_OWNERS) is entry
    assert publishable(entry, OURS)[3:5] == (1000, 1001)
    assert publishable(entry, OURS).change == Change.OWNER
    ours = entry._replace(uid=1000, gid=1001)
    assert publishable(ours, OURS) is ours


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (EARLIEST - 1, EARLIEST),
        (-(1 << 80), EARLIEST),
        (LATEST + 1, LATEST),
        (1 << 80, LATEST),
        (EARLIEST, EARLIEST),
        (EARLIEST + 1, EARLIEST + 1),
        (LATEST - 1, LATEST - 1),
        (LATEST, LATEST),
        (-1, -1),
        (0, 0),
    ],
)
@pytest.mark.parametrize("kind", [Kind.FILE, Kind.DIRECTORY, Kind.SYMLINK, Kind.FIFO])
def test_times_that_no_file_system_holds_become_the_nearest_that_all_do(kind: Kind, given: int, kept: int) -> None:
    entry = publishable(Entry("x", kind, 0o755, mtime_ns=given), KEEP_OWNERS)
    assert (entry.mtime_ns, entry.change) == (kept, Change.NONE if kept == given else Change.TIME)
    tree, counts = published(entry)
    node = lookup(tree, "x")
    assert node is not None and node.mtime_ns == kept
    assert counts == ({} if kept == given else {"times": 1})


def test_the_file_system_of_a_target_gives_such_times_back_as_they_are(tmp_path: Path) -> None:
    for time in (EARLIEST, EARLIEST + 1, -1, LATEST - 1, LATEST):
        os.utime(tmp_path, ns=(time, time))
        assert tmp_path.stat().st_mtime_ns == time


def test_a_hard_link_passes_as_it_is() -> None:
    entry = Entry("x", Kind.HARDLINK, 0o4600, uid=5, target="y", xattrs=(("trusted.x", b""),))
    assert publishable(entry, OURS) is entry


_ENTRIES = st.builds(
    Entry,
    path=st.just("x"),
    kind=st.sampled_from(Kind),
    mode=st.integers(0, 0o7777),
    uid=st.sampled_from([0, 1000]),
    gid=st.sampled_from([0, 1001]),
    mtime_ns=st.sampled_from([0, 1_600_000_000 * 10**9, EARLIEST - 1, 1 << 80]),
    xattrs=st.lists(st.sampled_from([("user.a", b"1"), ("user.overlay.a", b""), ("security.a", b"")])).map(tuple),
)


@settings(deadline=None)
@given(entry=_ENTRIES, policy=st.sampled_from([KEEP_OWNERS, OURS]))
def test_publishable_is_idempotent(entry: Entry, policy: Policy) -> None:
    once = publishable(entry, policy)
    assert publishable(once, policy) == once


@settings(deadline=None)
@given(entry=_ENTRIES, policy=st.sampled_from([KEEP_OWNERS, OURS]))
def test_an_entry_that_changes_says_how(entry: Entry, policy: Policy) -> None:
    once = publishable(entry, policy)
    same = once._replace(change=Change.NONE) == entry
    assert same or once.change or (entry.kind is Kind.SYMLINK and once._replace(mode=entry.mode) == entry)
    assert once.change == Change.NONE or not same


@settings(deadline=None)
@given(entry=_ENTRIES.filter(lambda e: e.kind is not Kind.HARDLINK), policy=st.sampled_from([KEEP_OWNERS, OURS]))
def test_the_rule_for_a_node_is_the_rule_for_an_entry(entry: Entry, policy: Policy) -> None:
    """A file's token may cover its metadata: what was decided before its bytes were stored must stay."""
    early, _ = published(entry, policy=policy)
    late, _ = prepare(tree_of(entry), (), policy)
    assert early == late


def test_devices_are_dropped_and_counted_and_fifos_kept() -> None:
    tree, counts = published(
        Entry("dev/null", Kind.CHARACTER, 0o666, device=(1, 3)),
        Entry("dev/sda", Kind.BLOCK, 0o660, device=(8, 0)),
        Entry("hidden", Kind.CHARACTER, 0o644, device=(0, 0)),
        Entry("pipe", Kind.FIFO, 0o644),
    )
    assert [path for path, _ in walk(tree)] == ["", "dev", "pipe"]
    assert counts == {"devices": 3}


def test_directories_that_no_entry_asked_for_get_the_owner_too() -> None:
    tree, counts = published(Entry("a/b/c", Kind.FILE), policy=OURS)
    assert {(n.uid, n.gid) for _, n in walk(tree)} == {OURS.owner}
    assert counts == {"owners": 4}


def test_counts_are_those_of_the_published_tree() -> None:
    """What a later layer replaced is not counted; a file under two names counts for both."""
    first = [
        Entry("replaced", Kind.FILE, 0o4600),
        Entry("su", Kind.FILE, 0o4755),
        Entry("su2", Kind.HARDLINK, target="su"),
        Entry("secret", Kind.FILE, 0o600, xattrs=(("security.selinux", b"x"),)),
        Entry("replaced", Kind.FILE, 0o644),
    ]
    assert published(*first)[1] == {"modes": 1, "setid": 2, "xattrs": 1}


def test_nothing_to_change_gives_the_same_tree_and_no_counts() -> None:
    tree = tree_of(Entry("a/b", Kind.FILE), Entry("s", Kind.SYMLINK, 0o777, target="a"))
    prepared, counts = prepare(tree, (), KEEP_OWNERS)
    assert prepared is tree
    assert counts == {}


def test_directories_without_a_change_are_shared() -> None:
    tree = tree_of(Entry("a/b", Kind.FILE), Entry("c/null", Kind.CHARACTER, device=(1, 3)))
    prepared, _ = prepare(tree, (), KEEP_OWNERS)
    assert prepared.root.children["a"] is tree.root.children["a"]
    assert lookup(tree, "c/null") is not None
    assert prepared.root.children["c"] == Directory(0o755, 0, 0, 0, (), {})


def test_other_policies_are_other_rules() -> None:
    policies: list[Any] = [KEEP_OWNERS, OURS, Policy(owner=(0, 0))]
    assert len({p.rules for p in policies}) == 3
    assert Policy(owner=(1000, 1001)).rules == OURS.rules

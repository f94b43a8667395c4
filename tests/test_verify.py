"""verify names each difference between what was published and what is there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.publisher_contract import MTIME, NAME, OTHER, publish, release, stored
from unpacker.changeset import Kind
from unpacker.publish import posix
from unpacker.publish.directory import DirectoryPublisher
from unpacker.tree import Directory, File, Special, Tree
from unpacker.verify import Problem, verify

IS_ROOT = os.geteuid() == 0
ME = (os.geteuid(), os.getegid())


@pytest.fixture(autouse=True)
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here pulls the plug, and syncing a busy machine's disk takes seconds each time."""
    monkeypatch.setattr(posix, "syncfs", lambda fd: None)


@pytest.fixture
def publisher(tmp_path: Path) -> Iterator[DirectoryPublisher]:
    yield DirectoryPublisher(str(tmp_path / "target"))
    for path, _, _ in os.walk(tmp_path):
        os.chmod(path, 0o700)


def tree(publisher: DirectoryPublisher) -> Tree:
    xattrs = (("user.a", b"1"),)
    contents = {"etc/motd": b"hello", "etc/empty": b"", "etc.d/x": b"x", "link": "etc/motd", "caf\udce9": b"y"}
    made = stored(publisher, contents, uid=ME[0], gid=ME[1], xattrs=xattrs)
    made.root.children["pipe"] = Special(0o644, *ME, MTIME, (), Kind.FIFO, (0, 0))
    return made


@pytest.fixture
def root(publisher: DirectoryPublisher) -> Path:
    """A published root, of the name NAME."""
    with publisher.lock():
        made = tree(publisher)
        with publisher.transaction("publish") as transaction:
            record = transaction.publish(release(NAME, made))
    return Path(publisher.path, record.root)


def problems(publisher: DirectoryPublisher, *, quick: bool = False) -> list[tuple[str, str, str]]:
    found = verify(publisher.path, publisher.published().values(), quick=quick)
    return [(p.public_path, p.path, p.what.partition(":")[0]) for p in found]


def flip(root: Path) -> None:
    own = (root / "etc/motd").stat()
    with open(root / "etc/motd", "r+b") as file:
        file.write(b"j")
    os.utime(root / "etc/motd", ns=(own.st_atime_ns, own.st_mtime_ns))


def keeping_times(directory: str, change: Callable[[Path], object]) -> Callable[[Path], None]:
    """The change of what is in a directory, without its trace in that directory's mtime."""

    def changed(root: Path) -> None:
        change(root)
        os.utime(root / directory, ns=(MTIME, MTIME))

    return changed


def retyped(root: Path) -> None:
    (root / "etc/motd").unlink()
    (root / "etc/motd").mkdir()


def relinked(root: Path) -> None:
    (root / "link").unlink()
    (root / "link").symlink_to("etc/shadow")
    os.utime(root / "link", ns=(MTIME, MTIME), follow_symlinks=False)


DIFFERENCES: list[tuple[Callable[[Path], object], list[tuple[str, str]], bool]] = [
    (flip, [("etc/motd", "contents differ")], False),
    (keeping_times("etc", lambda r: (r / "etc/motd").unlink()), [("etc/motd", "missing")], True),
    (keeping_times("", lambda r: shutil.rmtree(r / "etc.d")), [("etc.d", "missing"), ("etc.d/x", "missing")], True),
    (keeping_times("etc", lambda r: (r / "etc/new").write_text("x")), [("etc/new", "extra")], True),
    (
        keeping_times("", lambda r: (r / "a/b").mkdir(parents=True)),
        [("a", "extra"), ("a/b", "extra")],
        True,
    ),
    (lambda r: (r / "etc/motd").chmod(0o600), [("etc/motd", "mode")], True),
    (lambda r: (r / "etc").chmod(0o700), [("etc", "mode")], True),
    (lambda r: os.utime(r / "etc/empty", (1, 1)), [("etc/empty", "mtime")], True),
    (
        lambda r: (os.truncate(r / "etc/motd", 2), os.utime(r / "etc/motd", ns=(MTIME, MTIME))),
        [("etc/motd", "size")],
        True,
    ),
    (keeping_times("", relinked), [("link", "link target")], True),
    (keeping_times("etc", retyped), [("etc/motd", "type")], True),
    (lambda r: os.setxattr(r / "etc", "user.new", b""), [("etc", "xattr user.new")], True),
    (lambda r: os.setxattr(r / "etc/motd", "user.a", b"2"), [("etc/motd", "xattr user.a")], True),
    (lambda r: os.removexattr(r / "etc/empty", "user.a"), [("etc/empty", "xattr user.a")], True),
    (keeping_times("", lambda r: (r / "pipe").unlink()), [("pipe", "missing")], True),
    (keeping_times("", lambda r: (r / "caf\udce9").unlink()), [("caf\udce9", "missing")], True),
]


def test_what_was_not_touched_has_no_problem(publisher: DirectoryPublisher, root: Path) -> None:
    assert problems(publisher) == problems(publisher, quick=True) == []


@pytest.mark.parametrize(("change", "expected", "seen_quickly"), DIFFERENCES)
def test_each_difference_is_named(
    publisher: DirectoryPublisher,
    root: Path,
    change: Callable[[Path], object],
    expected: list[tuple[str, str]],
    seen_quickly: bool,
) -> None:
    change(root)
    named = [(NAME, path, what) for path, what in expected]
    assert problems(publisher) == named
    assert problems(publisher, quick=True) == (named if seen_quickly else [])


@pytest.mark.skipif(not IS_ROOT, reason="only root can give files away")
def test_another_owner_is_named(publisher: DirectoryPublisher, root: Path) -> None:
    os.chown(root / "etc/motd", 7, 8)
    os.chown(root / "link", 7, 8, follow_symlinks=False)
    found = list(verify(publisher.path, publisher.published().values(), quick=True))
    assert [(p.path, p.what) for p in found] == [
        ("etc/motd", "owner: 0:0 was published, now 7:8"),
        ("link", "owner: 0:0 was published, now 7:8"),
    ]


def test_a_dangling_link_and_a_record_without_root_are_named(publisher: DirectoryPublisher, root: Path) -> None:
    root.rename(root.parent / "elsewhere")
    assert problems(publisher) == [(NAME, "", "dangling link"), (NAME, "", "record without root")]


def test_a_link_that_leads_elsewhere_is_named(publisher: DirectoryPublisher, root: Path) -> None:
    record = publisher.published()[NAME]
    link = Path(publisher.path, NAME)
    link.unlink()
    assert [p.what for p in verify(publisher.path, [record], quick=True)] == ["it has no public link"]
    link.symlink_to("/etc")
    (found,) = verify(publisher.path, [record], quick=True)
    assert found.what.startswith("its public link leads to /etc, the record names .flat/")
    assert [p.public_path for p in verify(publisher.path, publisher.published().values(), quick=True)] == [NAME]


def test_a_root_that_is_a_symlink_is_not_followed(publisher: DirectoryPublisher, root: Path) -> None:
    root.rename(root.parent / "elsewhere")
    root.symlink_to("elsewhere")
    assert (NAME, "", "record without root") in problems(publisher)


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda path: path.unlink(), "its listing.zst is missing"),
        (lambda path: path.write_bytes(b"nonsense"), "its listing.zst is damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:-20]), "its listing.zst is damaged"),
    ],
)
def test_a_missing_or_damaged_listing_is_named(
    publisher: DirectoryPublisher, root: Path, damage: Callable[[Path], object], what: str
) -> None:
    damage(Path(publisher.path, ".metadata", NAME, "listing.zst"))
    assert (NAME, "", what) in problems(publisher)


def test_a_listing_of_another_tree_is_named(publisher: DirectoryPublisher, root: Path) -> None:
    publish(publisher, OTHER, {"motd": b"x"}, seed="2")
    shutil.copy(
        Path(publisher.path, ".metadata", OTHER, "listing.zst"), Path(publisher.path, ".metadata", NAME, "listing.zst")
    )
    assert (NAME, "", "its listing.zst has 1 entries, the record says 8") in problems(publisher)


def test_an_unreadable_record_is_a_problem_of_its_own(publisher: DirectoryPublisher, root: Path) -> None:
    Path(publisher.path, ".metadata", NAME, "record.json").unlink()
    assert problems(publisher) == [(NAME, "", "it has no record.json (published by another tool?)")]


def test_a_root_of_many_names_is_read_once_and_reported_for_each(
    publisher: DirectoryPublisher, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with publisher.transaction("publish") as transaction:
        transaction.publish(release(OTHER, None))
    flip(root)
    opened = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, *a, **o: (opened.append(path), real(path, *a, **o))[1])
    assert problems(publisher) == [
        (NAME, "etc/motd", "contents differ"),
        (OTHER, "etc/motd", "contents differ"),
    ]
    assert opened.count("motd") == 1


def test_contents_shared_by_roots_are_hashed_once_and_reported_for_each(
    publisher: DirectoryPublisher, root: Path
) -> None:
    with publisher.lock():
        made = tree(publisher)
        with publisher.transaction("publish") as transaction:
            transaction.publish(release(OTHER, made, seed="2"))
    flip(root)
    assert problems(publisher) == [
        (NAME, "etc/motd", "contents differ"),
        (OTHER, "etc/motd", "contents differ"),
    ]


def test_symlinks_that_came_later_are_not_followed(publisher: DirectoryPublisher, root: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "motd").write_text("hello")
    shutil.rmtree(root / "etc")
    (root / "etc").symlink_to(tmp_path / "outside")
    os.utime(root, ns=(MTIME, MTIME))
    assert problems(publisher) == [
        (NAME, "etc", "type"),
        (NAME, "etc/empty", "missing"),
        (NAME, "etc/motd", "missing"),
    ]


@pytest.mark.skipif(IS_ROOT, reason="root reads everything; the unprivileged run tests this")
def test_what_cannot_be_read_is_named_and_the_rest_compared(publisher: DirectoryPublisher, root: Path) -> None:
    (root / "etc").chmod(0)
    (root / "etc.d" / "x").chmod(0)
    assert problems(publisher) == [
        (NAME, "etc", "what is below cannot be read"),
        (NAME, "etc", "mode"),
        (NAME, "etc.d/x", "mode"),
        (NAME, "etc.d/x", "contents cannot be read"),
    ]


def test_a_rebuilt_root_has_no_problem_even_where_its_contents_were_damaged(
    publisher: DirectoryPublisher, root: Path
) -> None:
    flip(root)
    (root / "etc.d/x").chmod(0o600)
    with publisher.lock():
        damaged = tree(publisher)
        etc = damaged.root.children["etc"]
        assert isinstance(etc, Directory) and isinstance(etc.children["motd"], File)
        tokens = {etc.children["motd"].token}
        assert publisher.contents.missing(tokens, check=True) == tokens
        made = tree(publisher)
        with publisher.transaction("rebuild") as transaction:
            record = transaction.publish(release(NAME, made))
    assert Path(publisher.path, record.root) != root
    assert problems(publisher) == []


def test_problems_are_values(publisher: DirectoryPublisher, root: Path) -> None:
    (root / "etc/motd").chmod(0o600)
    assert list(verify(publisher.path, publisher.published().values(), quick=True)) == [
        Problem(public_path=NAME, path="etc/motd", what="mode: 0644 was published, now 0600")
    ]

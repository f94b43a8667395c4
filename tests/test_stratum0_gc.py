"""Collection of a native repository as a target: what a dry run foretells, what is noted, what old revisions keep."""

from __future__ import annotations

import errno
import json
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cvmfs_repositories import NAME as REPOSITORY
from tests.cvmfs_repositories import NOW, SWISSKNIFE, swissknife_check
from tests.publisher_contract import MTIME, NAME, OTHER, publish
from tests.test_publish_stratum0 import edit_by_hand
from unpacker.cvmfs.check import check
from unpacker.cvmfs.gc import STATUS
from unpacker.cvmfs.repository import Repository
from unpacker.publish import posix, unreferenced
from unpacker.publish.stratum0 import Stratum0Publisher
from unpacker.publish.unreferenced import Collected, collect
from unpacker.tree import Symlink

LATER = NOW + 1_000_000
DAY = 86_400
LARGE = 200_000


pytestmark = pytest.mark.usefixtures("no_sync")


@pytest.fixture
def target(tmp_path: Path) -> Path:
    Repository.create(str(tmp_path / "repo"), REPOSITORY, now=NOW)
    return tmp_path / "repo"


Opened = Callable[[float], Stratum0Publisher]


@pytest.fixture
def opened(target: Path) -> Opened:
    return lambda now: Stratum0Publisher(
        str(target), clock=lambda: now, spool_root="/nowhere", configuration="/nowhere"
    )


def gc(publisher: Stratum0Publisher, now: float, *, keep: float = 0, dry_run: bool = False) -> Collected:
    return collect(publisher, grace=0, keep=keep, now=now, dry_run=dry_run)


def noise(seed: int) -> bytes:
    return random.Random(seed).randbytes(LARGE)


def two_images(opened: Opened) -> None:
    """One name gone, whose root shares a file with the other one."""
    shared = noise(1)
    publish(opened(NOW + 1), NAME, {"shared": shared, "own": noise(2)}, seed="1")
    publish(opened(NOW + 2), OTHER, {"shared": shared}, seed="2")
    with opened(NOW + 3).transaction("remove") as transaction:
        transaction.remove([NAME], now=NOW + 3)


def test_a_dry_run_tells_the_bytes_that_only_the_roots_have_which_it_would_unlink(opened: Opened, target: Path) -> None:
    two_images(opened)
    told = gc(opened(LATER), LATER, keep=3 * DAY, dry_run=True)
    assert len(told.roots) == 1
    assert LARGE < told.unlinked < LARGE + 50_000
    done = gc(opened(LATER), LATER, keep=3 * DAY)
    assert (done.roots, done.layers, done.unlinked) == (told.roots, told.layers, told.unlinked)
    assert done.freed < LARGE, "revisions that still show the root are kept"
    publish(opened(LATER + 1), OTHER, {"shared": noise(1), "x": b"1"}, seed="3")
    publish(opened(LATER + 2), OTHER, {"shared": noise(1), "x": b"2"}, seed="4")
    again = gc(opened(LATER + 10 * DAY), LATER + 10 * DAY, keep=3 * DAY)
    assert again.freed >= told.unlinked
    found = check(str(target), now=LATER, hashes=True, spool_root="/nowhere", configuration="/nowhere")
    assert [str(problem) for problem in found] == []
    if SWISSKNIFE is not None:
        swissknife_check("-c", "-r", str(target))


def test_what_a_tag_of_the_operators_keeps_is_not_told_as_free(opened: Opened) -> None:
    two_images(opened)
    publisher = opened(NOW + 4)
    with publisher.transaction("tagged") as transaction:
        transaction.note("a.json", b"{}")
    tag(publisher)
    assert gc(opened(LATER), LATER, dry_run=True).unlinked == 0


def tag(publisher: Stratum0Publisher) -> None:
    from tests.cvmfs_repositories import publish as publish_revision

    with publisher.lock():
        publish_revision(publisher.repository, NOW + 5, tags={"keep": "for ever"})


def test_revisions_are_kept_for_as_long_as_asked(opened: Opened) -> None:
    two_images(opened)
    # Of six revisions, the last two have the tags that every publish moves; the others were replaced at once.
    assert gc(opened(LATER), LATER, keep=LATER - NOW + 10, dry_run=True).revisions == 0
    assert gc(opened(LATER), LATER, keep=1, dry_run=True).revisions == 2
    assert gc(opened(LATER), LATER, keep=LATER - NOW - 2, dry_run=True).revisions == 2
    assert gc(opened(LATER), LATER, keep=LATER - NOW - 1, dry_run=True).revisions == 1


@pytest.mark.parametrize("is_root_due", [True, False])
def test_what_nothing_leads_to_makes_room_on_a_full_disk(
    opened: Opened, target: Path, monkeypatch: pytest.MonkeyPatch, is_root_due: bool
) -> None:
    """What was stored of an image too large for the disk goes before anything is written."""
    later = time.time() + DAY
    two_images(opened)
    if not is_root_due:
        gc(opened(later), later, keep=10 * LATER)
        for number in range(2):
            with opened(later).transaction("note") as transaction:
                transaction.note("a.json", b"%d" % number)
    store = opened(later).repository.objects
    large = Path(store.path(store.put(noise(9))))
    write_all = posix.write_all

    def written(fd: int, data: bytes) -> None:
        if large.exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_all(fd, data)

    monkeypatch.setattr(posix, "write_all", written)
    done = gc(opened(later), later)
    assert (len(done.roots), done.revisions > 0) == (int(is_root_due), True)
    assert done.freed > LARGE and not large.exists()
    found = check(str(target), now=LATER, hashes=True, spool_root="/nowhere", configuration="/nowhere")
    assert [str(problem) for problem in found] == []


def test_both_steps_of_gc_wait_for_the_official_tools(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flag = tmp_path / "spools" / REPOSITORY / "in_transaction.lock"
    flag.parent.mkdir(parents=True)
    publisher = Stratum0Publisher(str(target), spool_root=str(tmp_path / "spools"), configuration="/nowhere")
    collected = unreferenced.gc.collect

    def after_a_transaction_was_opened(*arguments: Any, **options: Any) -> Any:
        flag.touch()
        threading.Timer(0.3, flag.unlink).start()
        return collected(*arguments, **options)

    monkeypatch.setattr(unreferenced.gc, "collect", after_a_transaction_was_opened)
    with publisher.lock(30):
        gc(publisher, LATER)
    assert not flag.exists()


def test_what_is_in_the_images_of_another_tool_is_no_name(opened: Opened) -> None:
    record = publish(opened(NOW + 1), NAME, {"motd": b"hello"})
    inside = Symlink(0o777, 0, 0, MTIME, (), f"/cvmfs/{REPOSITORY}/{record.root}")
    edit_by_hand(opened(NOW + 2), {"/.images/ab/cd/opt/tool": inside, f"/{NAME}": None})
    assert gc(opened(LATER), LATER, dry_run=True).roots == (record.root,)


@pytest.mark.parametrize(
    ("before", "kept"),
    [
        (None, {}),
        (b'{"last_snapshot": "yesterday", "last_gc": "long ago"}', {"last_snapshot": "yesterday"}),
        (b"not JSON", {}),
        (b"[1]", {}),
    ],
)
def test_the_collection_is_noted_as_the_official_tools_do(
    opened: Opened, target: Path, before: bytes | None, kept: dict[str, str]
) -> None:
    if before is not None:
        (target / STATUS).write_bytes(before)
    gc(opened(LATER), 1_790_000_000, dry_run=True)
    assert ((target / STATUS).read_bytes() if before is not None else (target / STATUS).exists()) == (before or False)
    gc(opened(LATER), 1_790_000_000)
    assert json.loads((target / STATUS).read_bytes()) == kept | {"last_gc": "Mon Sep 21 14:13:20 UTC 2026"}

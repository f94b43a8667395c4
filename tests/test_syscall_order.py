"""In the order of real system calls nothing gets its final name before it is durable: a power cut at any moment finds
every public name whole.

One run is watched with strace. The order of Python's own calls is looked at in test_kills.py, by which the runs are
killed; here it is what the kernel was asked to do, by whatever library.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.fake_registry import FakeRegistry
from tests.images import directory, file, hardlink, image, layer, symlink
from tests.system_calls import Call, Final, finals, read, traced, why_not
from tests.test_cli import User

MIB = 1 << 20
BASE = layer(
    directory("etc"),
    file("etc/motd", b"hello"),
    file("etc/empty"),
    directory("usr/lib", mode=0o555),
    *(file(f"usr/lib/lib{i}.so", bytes([i]) * (100 + i)) for i in range(12)),
    file("usr/lib/large", os.urandom(MIB) * 3),
    hardlink("usr/lib/again.so", "usr/lib/lib1.so"),
    symlink("lib", "usr/lib"),
)
FIRST = image(BASE, layer(file("version", b"1")))
SECOND = image(BASE, layer(file("version", b"2"), symlink("etc/now", "motd")))
TEMPORARY = re.compile(r"\.unpacker/(txn|trash)/|\.flat/../\.")
"""What nobody reads: names that the next holder of the lock clears away."""

KINDS = {
    "content": r"\.unpacker/pool/",
    "facts": r"\.unpacker/roots/",
    "root": r"\.flat/../[0-9a-f]{64}$",
    "record": r"\.metadata/.*/record\.json$",
    "beside": r"\.metadata/.*/(manifest\.json|listing\.zst)$",
    "note": r"\.metadata/[a-z]+\.json$",
    "link": r"[^.].*:[^/]*$",
}


@dataclass(frozen=True)
class Watched:
    """A run: its target, how many layers it reads at once, its calls, and what got a final name."""

    target: str
    jobs: int
    calls: list[Call]

    @property
    def finals(self) -> list[Final]:
        return finals(self.calls, self.target, TEMPORARY)


def is_in_memory(path: Path) -> bool:
    """Whether a file system has nothing behind it that a sync could write to."""
    kind = subprocess.run(["stat", "-f", "-c", "%T", str(path)], capture_output=True, text=True, check=False).stdout
    return kind.strip() in ("tmpfs", "ramfs")


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory on a file system with a disk, if this machine has one to write to."""
    own = tmp_path_factory.mktemp("disk")
    others = (Path("/var/tmp"), Path(__file__).parent)
    places = [place for place in others if os.access(place, os.W_OK) and not is_in_memory(place)]
    if not is_in_memory(own) or not places:
        yield own
        return
    with tempfile.TemporaryDirectory(prefix=".order-", dir=places[0]) as name:
        yield Path(name)


@pytest.fixture(scope="module", params=[1, 2], ids=["one job", "two jobs"])
def watched(disk: Path, request: pytest.FixtureRequest) -> Watched:
    """A run that updates one name and makes another, in one process or with its layers read in two."""
    if reason := why_not():
        pytest.skip(f"{reason}: the order of system calls is not looked at")
    path = disk / str(request.param)
    path.mkdir()
    with FakeRegistry() as fake:
        user = User(path, fake)
        fake.add("org/app", "latest", FIRST)
        user.wishlist("HOST/org/app:*")
        before = user("reconcile")
        assert before.returncode == 0, before.stderr
        fake.add("org/app", "latest", SECOND)
        fake.add("org/app", "new", image(layer(file("other", b"x" * 2 * MIB), file("small", b"y"))))
        command = traced(user.command("reconcile", "--jobs", str(request.param)), path / "log")
        run = subprocess.run(
            command, cwd=path, env=user.environment(), capture_output=True, text=True, timeout=120, check=False
        )
    assert run.returncode == 0, run.stderr
    with open(path / "log", encoding="ascii", errors="backslashreplace") as log:
        calls = read(log)
    return Watched(str(user.target), request.param, calls)


def kinds(found: list[Final]) -> dict[str, list[Final]]:
    return {kind: [f for f in found if re.match(pattern, f.path)] for kind, pattern in KINDS.items()}


def test_the_run_was_seen_whole(watched: Watched) -> None:
    found = kinds(watched.finals)
    assert {kind: len(of) for kind, of in found.items() if kind not in ("content", "note")} == {
        "facts": 4,
        "root": 2,
        "record": 2,
        "beside": 4,
        "link": 2,
    }
    assert len(found["content"]) == 3, "of two new layers: two files, and one that the first run had not"
    assert len(found["note"]) >= 2
    assert sum(map(len, found.values())) == len(watched.finals), "every final name is of a kind that is known"


def faults(found: list[Final]) -> list[str]:
    """What a power cut could have shown halves of."""
    early = [f"{final.path} while {', '.join(final.lost)} could be lost" for final in found if final.lost]
    of = kinds(found)
    for before, after in (("content", "root"), ("root", "record"), ("beside", "link"), ("record", "link")):
        first = min(final.syncs for final in of[after])
        early += [f"{f.path}, and no sync before a {after}" for f in of[before] if f.syncs >= first]
    return early


def test_nothing_gets_its_final_name_before_it_is_durable_and_so_is_what_it_leads_to(watched: Watched) -> None:
    assert faults(watched.finals) == []


def test_a_root_has_its_name_after_its_facts_because_without_them_it_is_none_of_ours(watched: Watched) -> None:
    order = [final.path for final in watched.finals]
    for root in kinds(watched.finals)["root"]:
        name = root.path.rpartition("/")[2]
        facts = [order.index(f".unpacker/roots/{name}.{suffix}") for suffix in ("zst", "json")]
        assert max(facts) < order.index(root.path)


def test_the_run_ends_with_a_sync_after_its_last_final_name(watched: Watched) -> None:
    renames = [c for c in watched.calls if c.is_rename and c.paths[-1].startswith(watched.target)]
    syncs = [c for c in watched.calls if c.name == "syncfs" and c.paths[0].startswith(watched.target)]
    assert max(c.ended for c in renames) < max(c.began for c in syncs)


def test_without_any_one_of_its_syncs_the_order_would_be_found_wrong(watched: Watched) -> None:
    """The proof of the tests above: they see a sync that is missing. (Those after which nothing becomes final before
    the next one are for who asks whether the run is done.)"""
    syncs = sorted((c for c in watched.calls if c.is_sync), key=lambda c: c.ended)
    # Of two processes that store contents, the sync of one may do for the other.
    others = 0 if watched.jobs == 1 else len(kinds(watched.finals)["content"])
    needed = {final.syncs - 1 for final in watched.finals[others:]}
    assert len(needed) >= 3
    for number in needed:
        without = replace(watched, calls=[c for c in watched.calls if c is not syncs[number]])
        assert faults(without.finals), f"nothing needs the sync of line {syncs[number].began}"


def test_calls_of_threads_that_overlap_count_at_the_moment_that_is_the_worse_one() -> None:
    log = [
        '7 openat(5</t/txn>, "0", O_WRONLY|O_CREAT|O_EXCL, 0600) = 9</t/txn/0>',
        '7 write(9</t/txn/0>, "x", 1 <unfinished ...>',
        "8 syncfs(4</t> <unfinished ...>",
        "7 <... write resumed>) = 1",
        "8 <... syncfs resumed>) = 0",
        '7 renameat(5</t/txn>, "0", 6</t>, "final") = 0',
        '7 symlinkat("../x, \\"y", 5</t/txn>, "1") = 0',
        "8 fsync(4</t/txn/1>) = 0",
        '7 renameat2(5</t/txn>, "1", 6</t>, "link", RENAME_NOREPLACE) = 0',
        '7 rename("/t/gone", "/t/nowhere") = -1 ENOENT (No such file or directory)',
    ]
    assert [(f.path, f.lost) for f in finals(read(log), "/t", re.compile("txn/"))] == [
        ("final", ("/t/txn/0",)),
        ("link", ()),
    ]

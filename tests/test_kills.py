"""Killed anywhere, the next run converges and no reader saw half an image.

One run is killed before and after every change of a name and every sync: a sample here, all with `--torture`.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest

from tests.fake_registry import FakeRegistry
from tests.images import directory, file, hardlink, image, layer, symlink, whiteout
from unpacker.publish.directory import DirectoryPublisher
from unpacker.record import Published
from unpacker.verify import verify

SAMPLE = 30
SHARES = 6

BASE = layer(
    directory("etc"),
    file("etc/motd", b"hello"),
    file("etc/empty"),
    directory("usr/lib", mode=0o555),
    *(file(f"usr/lib/lib{i}.so", bytes([i]) * (100 + i)) for i in range(12)),
    hardlink("usr/lib/again.so", "usr/lib/lib1.so"),
    symlink("lib", "usr/lib"),
)
FIRST = image(BASE, layer(file("version", b"1")))
SECOND = image(BASE, layer(whiteout("etc/motd"), *(file(f"opt/{i}", b"new%d" % i) for i in range(8))))
THIRD = image(layer(*(file(f"other/{i}", b"third%d" % i) for i in range(8))))


@dataclass(frozen=True)
class Place:
    """A target before the run that is killed, and one after a run that was not."""

    path: Path
    points: int
    log: list[list[str]]

    def create(self, at: Path) -> None:
        """Makes what must be there before the first run."""

    def command(self, verb: str, at: Path) -> list[str]:
        common = ["--target", str(at / "target"), "--state", str(at / "state")]
        if verb == "gc":
            return ["gc", "--grace", "0", *common]
        return ["reconcile", str(self.path / "after.yaml"), "--jobs", "1", "--wishlist-id", "ours", *common]


P = TypeVar("P", bound=Place)


def run(point: int, log: Path, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.kill_at", str(point), str(log), "--", *arguments]
    root = Path(__file__).parent.parent
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60, check=False)


def copy(source: Path, target: Path) -> Path:
    subprocess.run(["cp", "-a", str(source), str(target)], check=True)
    return target


def discard(tree: Path) -> None:
    # Images have directories without write permission, which only root can empty as they are.
    subprocess.run(["chmod", "-R", "u+rwX", str(tree)], check=True)
    shutil.rmtree(tree)


def snapshot(root: Path) -> dict[str, object]:
    """Everything that can be told of a tree but inode numbers and the times that no rule sets."""
    found: dict[str, object] = {}
    for parent, directories, files in os.walk(root):
        for name in [*directories, *files]:
            path = Path(parent) / name
            status = path.lstat()
            relative = str(path.relative_to(root))
            content: object = None
            if stat.S_ISLNK(status.st_mode):
                content = os.readlink(path)
            elif stat.S_ISREG(status.st_mode):
                content = path.read_bytes()
            inside = ".flat/" in relative and relative.count("/") > 1
            found[relative] = (oct(status.st_mode), content, status.st_mtime_ns if inside else None)
    found.pop(".unpacker/lock", None)
    return found


def check_links(target: Path) -> None:
    """Every public link equals its record, and what it points at is complete to the last byte."""
    publisher = DirectoryPublisher(str(target))
    standing = publisher.published()
    records = []
    for path, record in standing.items():
        assert isinstance(record, Published), f"{path}: {record.problem}"
        link = target / path
        assert os.path.normpath(link.parent / os.readlink(link)) == str(target / record.root)
        records.append(record)
    assert not list(verify(str(target), records, quick=False))
    links = {str(p.relative_to(target)) for p in target.glob("[!.]*/**/*") if p.is_symlink()}
    assert links == set(standing)


@contextmanager
def prepared(kind: type[P], path: Path) -> Iterator[P]:
    """A place of that kind in `path`, while the registry runs that its wishlists name."""
    log = path / "log"
    with FakeRegistry() as fake:
        fake.add("org/app", "latest", FIRST)
        fake.add("org/gone", "1", image(layer(file("gone", b"gone"))))
        host = f"http://{fake.host}"
        (path / "before.yaml").write_text(f"version: 2\nimages: ['{host}/org/app:latest', '{host}/org/gone:1']\n")
        (path / "after.yaml").write_text(f"version: 2\nimages: ['{host}/org/app:*', '{host}/org/third:1']\n")
        before = kind(path, 0, [])
        before.create(path / "before")
        arguments = before.command("reconcile", path / "before")
        arguments[1] = str(path / "before.yaml")
        done = run(0, log, arguments)
        assert done.returncode == 0, done.stderr
        fake.add("org/app", "latest", SECOND)
        fake.add("org/app", "new", SECOND)
        fake.add("org/third", "1", THIRD)
        copy(path / "before", path / "after")
        log.unlink()
        done = run(0, log, before.command("reconcile", path / "after"))
        assert done.returncode == 0, done.stderr
        events = [json.loads(line) for line in log.read_text().splitlines()]
        yield kind(path, points(log), events)


def points(log: Path) -> int:
    """At how many points the run of that log could have been killed."""
    return 2 * sum(json.loads(line)[0] != "open" for line in log.read_text().splitlines())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with prepared(Place, tmp_path_factory.mktemp("kills")) as place:
        yield place


def chosen(points: int, share: int, config: pytest.Config) -> list[int]:
    everything = list(range(1, points + 1))
    if not config.getoption("--torture"):
        step = points / SAMPLE
        everything = [everything[int(i * step)] for i in range(SAMPLE)]
    return everything[share::SHARES]


def test_a_run_has_at_least_two_hundred_points_to_be_killed_at(place: Place) -> None:
    assert place.points >= 200


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("share", range(SHARES))
def test_a_killed_run_leaves_every_link_whole_and_the_next_run_converges(
    place: Place, share: int, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    wanted = snapshot(place.path / "after" / "target")
    for point in chosen(place.points, share, pytestconfig):
        here = copy(place.path / "before", tmp_path / f"at-{point}")
        killed = run(point, tmp_path / "log", place.command("reconcile", here))
        assert killed.returncode == -9, f"point {point} was not reached: {killed.stderr}"
        check_links(here / "target")
        again = run(0, tmp_path / "log", place.command("reconcile", here))
        assert again.returncode == 0, f"after a kill at {point}: {again.stderr}"
        check_links(here / "target")
        assert snapshot(here / "target") == wanted, f"after a kill at {point}"
        discard(here)


@pytest.mark.timeout(1800)
def test_a_killed_gc_leaves_every_link_whole_and_the_next_gc_converges(
    place: Place, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    whole = copy(place.path / "after", tmp_path / "whole")
    log = tmp_path / "log"
    assert run(0, log, place.command("gc", whole)).returncode == 0
    everything = list(range(1, points(log) + 1))
    wanted = snapshot(whole / "target")
    assert len(list((whole / "target" / ".flat").glob("*/*"))) == 2, "the two roots without a name are gone"
    if not pytestconfig.getoption("--torture"):
        everything = everything[:: max(1, len(everything) // 8)]
    for point in everything:
        here = copy(place.path / "after", tmp_path / f"at-{point}")
        assert run(point, tmp_path / "log", place.command("gc", here)).returncode == -9
        check_links(here / "target")
        again = run(0, tmp_path / "log", place.command("gc", here))
        assert again.returncode == 0, again.stderr
        assert snapshot(here / "target") == wanted, f"after a kill at {point}"
        discard(here)


def test_no_name_becomes_final_before_what_it_names_is_durable(place: Place) -> None:
    """In the recorded order of calls, whatever is renamed into place was written before the last sync before that."""
    target = str(place.path / "after" / "target")
    scratch = f"{target}/.unpacker/txn/"
    unsynced: set[str] = set()
    finals = 0
    for name, *paths in place.log:
        paths = [p for p in paths if p.startswith(target + "/")]
        if name == "syncfs" or name == "fsync":
            unsynced.clear()
        elif name in ("open", "symlink", "mkdir") and paths:
            unsynced.add(paths[0])
        elif name == "link" and len(paths) == 2:
            unsynced.add(paths[1])
        elif name in ("rename", "replace") and len(paths) == 2:
            source, final = paths
            if final.startswith(scratch):
                continue
            finals += 1
            late = [p for p in unsynced if p == source or p.startswith(source + "/")]
            hard = [p for p in late if not p.endswith(".listing")]
            assert not hard, f"{final} became final while not durable: {hard}"
    assert finals >= 20

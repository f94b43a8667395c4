"""A native repository, killed anywhere: a reader has the revision before or the one after, and the next run converges.

A sample of the points before and after every change of a name and every sync; all with `--torture`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cvmfs_repositories import SWISSKNIFE, swissknife_check
from tests.fake_registry import FakeRegistry
from tests.images import file, image, layer
from tests.test_kills import FIRST, SECOND, THIRD, Place, copy, run
from unpacker.audit import audit
from unpacker.cvmfs.reader import Reader
from unpacker.cvmfs.reflog import FILE as REFLOG
from unpacker.cvmfs.repository import Repository
from unpacker.publish.stratum0 import Stratum0Publisher
from unpacker.record import Published

SAMPLE = 5
NOW = 4_000_000_000


class StratumPlace(Place):
    def command(self, verb: str, at: Path) -> list[str]:
        common = ["--target", f"stratum0:{at / 'target'}", "--state", str(at / "state")]
        if verb == "gc":
            return ["gc", "--grace", "0", "--keep-revisions", "0", *common]
        return ["reconcile", str(self.path / "after.yaml"), "--jobs", "1", "--wishlist-id", "ours", *common]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StratumPlace]:
    path = tmp_path_factory.mktemp("kills")
    with FakeRegistry() as fake:
        fake.add("org/app", "latest", FIRST)
        fake.add("org/gone", "1", image(layer(file("gone", b"gone"))))
        host = f"http://{fake.host}"
        (path / "before.yaml").write_text(f"version: 2\nimages: ['{host}/org/app:latest', '{host}/org/gone:1']\n")
        (path / "after.yaml").write_text(f"version: 2\nimages: ['{host}/org/app:*', '{host}/org/third:1']\n")
        before = StratumPlace(path, fake, 0, [])
        Repository.create(str(path / "before" / "target"), "try.example.org", now=NOW - 1000)
        arguments = before.command("reconcile", path / "before")
        arguments[1] = str(path / "before.yaml")
        done = run(0, path / "log", arguments)
        assert done.returncode == 0, done.stderr
        fake.add("org/app", "latest", SECOND)
        fake.add("org/app", "new", SECOND)
        fake.add("org/third", "1", THIRD)
        copy(path / "before", path / "after")
        (path / "log").unlink()
        done = run(0, path / "log", before.command("reconcile", path / "after"))
        assert done.returncode == 0, done.stderr
        log = [json.loads(line) for line in (path / "log").read_text().splitlines()]
        yield StratumPlace(path, fake, 2 * sum(event[0] != "open" for event in log), log)


def names(target: Path) -> dict[str, str]:
    """What stands published, every tree of it complete to the last byte; a reference log ahead of its time is mended by
    the next transaction."""
    publisher = Stratum0Publisher(str(target))
    standing = publisher.published()
    problems = audit(publisher, standing, quick=False, now=NOW)
    assert [str(p) for p in problems if p.path != REFLOG] == []
    records = [record for record in standing.values() if isinstance(record, Published)]
    assert len(records) == len(standing)
    return {record.public_path: record.root for record in records}


def converged(target: Path) -> tuple[dict[str, str], set[str]]:
    """What a run must come to: names, and everything that a client finds."""
    repository = Repository.open(str(target))
    found = names(target)
    if SWISSKNIFE is not None:
        swissknife_check("-c", "-r", str(target))
    with Reader(repository.objects, repository.manifest().root) as reader:
        return found, {each.path for each in reader.walk()}


def sample(points: int, config: pytest.Config) -> list[int]:
    everything = list(range(1, points + 1))
    return everything if config.getoption("--torture") else everything[3 :: max(1, points // SAMPLE)]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("verb", ["reconcile", "gc"])
def test_a_killed_run_leaves_a_whole_revision_and_the_next_one_converges(
    place: StratumPlace, verb: str, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    start, points = place.path / "before", place.points
    whole = place.path / "after"
    if verb == "gc":
        start, whole = whole, copy(whole, tmp_path / "whole")
        assert run(0, tmp_path / "log", place.command("gc", whole)).returncode == 0
        points = 2 * sum(json.loads(line)[0] != "open" for line in (tmp_path / "log").read_text().splitlines())
    wanted = converged(whole / "target")
    possible = [names(start / "target"), wanted[0]]
    for point in sample(points, pytestconfig):
        here = copy(start, tmp_path / f"at-{point}")
        killed = run(point, tmp_path / "log", place.command(verb, here))
        assert killed.returncode == -9, f"point {point} was not reached: {killed.stderr}"
        found = names(here / "target")
        # What is no longer wished goes in a second transaction.
        assert {p: r for p, r in found.items() if "gone" not in p} in [
            {p: r for p, r in one.items() if "gone" not in p} for one in possible
        ], f"after a kill at {point}"
        again = run(0, tmp_path / "log", place.command(verb, here))
        assert again.returncode == 0, f"after a kill at {point}: {again.stderr}"
        assert converged(here / "target") == wanted, f"after a kill at {point}"
        shutil.rmtree(here)

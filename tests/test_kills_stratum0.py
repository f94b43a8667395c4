"""A native repository, killed anywhere: a reader has the revision before or the one after, and the next run converges.

A sample of the points before and after every change of a name and every sync; all with `--torture`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cvmfs_repositories import SWISSKNIFE, swissknife_check
from tests.test_kills import Place, copy, points, prepared, run
from unpacker.audit import audit
from unpacker.cvmfs.reader import Reader
from unpacker.cvmfs.reflog import FILE as REFLOG
from unpacker.cvmfs.repository import Repository
from unpacker.publish.stratum0 import Stratum0Publisher
from unpacker.record import Published

SAMPLE = 5
NOW = 4_000_000_000


class StratumPlace(Place):
    def create(self, at: Path) -> None:
        Repository.create(str(at / "target"), "try.example.org", now=NOW - 1000)

    def command(self, verb: str, at: Path) -> list[str]:
        common = ["--target", f"stratum0:{at / 'target'}", "--state", str(at / "state")]
        if verb == "gc":
            return ["gc", "--grace", "0", "--keep-revisions", "0", *common]
        return ["reconcile", str(self.path / "after.yaml"), "--jobs", "1", "--wishlist-id", "ours", *common]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StratumPlace]:
    with prepared(StratumPlace, tmp_path_factory.mktemp("kills")) as place:
        yield place


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
    start, most = place.path / "before", place.points
    whole = place.path / "after"
    if verb == "gc":
        start, whole = whole, copy(whole, tmp_path / "whole")
        assert run(0, tmp_path / "log", place.command("gc", whole)).returncode == 0
        most = points(tmp_path / "log")
    wanted = converged(whole / "target")
    possible = [names(start / "target"), wanted[0]]
    for point in sample(most, pytestconfig):
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

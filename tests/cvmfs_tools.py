"""The official tools as judges: what the checker says of a repository, what their garbage collection does to it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from typing import NamedTuple

import pytest

from tests.cvmfs_repositories import SWISSKNIFE

SERVER = shutil.which("cvmfs_server")
BWRAP = shutil.which("bwrap")
needs_collector = pytest.mark.skipif(
    SWISSKNIFE is None or BWRAP is None,
    reason="cvmfs_swissknife or bwrap is not installed: the official garbage collection has not met ours",
)


class Verdict(NamedTuple):
    """Whether the official checker found a repository sound, and all that it said."""

    is_sound: bool
    said: str


def judged(where: str, *arguments: str) -> Verdict:
    """What `cvmfs_swissknife check` says of the repository in a directory, every object looked for, or at a URL."""
    return _run("check", "-c", "-r", where, *arguments, good="no problems found")


def scrubbed(directory: str) -> Verdict:
    """What `cvmfs_swissknife scrub` says of the objects of a repository."""
    return _run("scrub", "-r", f"{directory}/data")


def collected(directory: str, url: str, name: str, keys: str, checksum: str, scratch: str, *, younger: int) -> Verdict:
    """Runs `cvmfs_swissknife gc`, which keeps tags and what is younger than that Unix time; `checksum` is its file of
    the hash of the reference log."""
    upstream = f"local,{directory}/data/txn,{directory}"
    arguments = ["-r", url, "-u", upstream, "-n", name, "-R", checksum, "-t", scratch, "-k", f"{keys}/{name}.pub"]
    # It insists on its statistics in this one place, which a test must not write to.
    inside = [str(BWRAP), "--dev-bind", "/", "/", "--tmpfs", "/var/spool", "--dir", f"/var/spool/cvmfs/{name}"]
    return _run("gc", *arguments, "-z", str(younger), "-l", inside=inside)


def _run(*arguments: str, good: str = "", inside: Sequence[str] = ()) -> Verdict:
    assert SWISSKNIFE is not None, "a test of the official tools runs only where they are"
    # Some of their messages quote names as they are.
    done = subprocess.run([*inside, SWISSKNIFE, *arguments], capture_output=True, timeout=60)
    said = (done.stdout + done.stderr).decode(errors="replace")
    return Verdict(done.returncode == 0 and good in said, said)

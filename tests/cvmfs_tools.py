"""The official tools as judges: what the checker says of a repository, what their garbage collection does to it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from typing import NamedTuple

import pytest

from tests.cvmfs_repositories import CVMFS2, SWISSKNIFE

SERVER = shutil.which("cvmfs_server")
BWRAP = shutil.which("bwrap")
needs_collector = pytest.mark.skipif(
    SWISSKNIFE is None or BWRAP is None,
    reason="cvmfs_swissknife or bwrap is not installed: the official garbage collection has not met ours",
)

needs_client = pytest.mark.skipif(
    CVMFS2 is None or os.geteuid() != 0 or not os.path.exists("/dev/fuse") or SWISSKNIFE is None,
    reason="cvmfs2 cannot mount here (not installed, no /dev/fuse, or not root): no client has seen what we publish",
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


def replicated(url: str, name: str, key: str, replica: str, replica_url: str, scratch: str) -> Verdict:
    """Brings a replica up to date as a stratum 1 does (`cvmfs_server snapshot`) and judges it; begins one if there is
    none. The checksum of its own reference log is kept beside it."""
    first = not os.path.exists(f"{replica}.chksum")
    for group in (*(f"{n:02x}" for n in range(256)), "txn"):
        os.makedirs(f"{replica}/data/{group}", exist_ok=True)
    upstream = f"local,{replica}/data/txn,{replica}"
    arguments = ["-m", name, "-u", url, "-w", replica_url, "-r", upstream, "-k", key, "-x", scratch]
    arguments += ["-R", f"{replica}.chksum", "-n", "4", "-t", "10", "-a", "2", "-i" if first else "-p"]
    done = _run("pull", *arguments)
    return judged(replica, "-R", f"{replica}.chksum") if done.is_sound else done


def _run(*arguments: str, good: str = "", inside: Sequence[str] = ()) -> Verdict:
    assert SWISSKNIFE is not None, "a test of the official tools runs only where they are"
    # Some of their messages quote names as they are.
    done = subprocess.run([*inside, SWISSKNIFE, *arguments], capture_output=True, timeout=60)
    said = (done.stdout + done.stderr).decode(errors="replace")
    return Verdict(done.returncode == 0 and good in said, said)

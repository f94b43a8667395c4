"""The official tools as judges: what the checker says of a repository, what their garbage collection does to it."""

from __future__ import annotations

import shutil
import subprocess
from typing import NamedTuple

from tests.cvmfs_repositories import SWISSKNIFE

SERVER = shutil.which("cvmfs_server")


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


def _run(*arguments: str, good: str = "") -> Verdict:
    assert SWISSKNIFE is not None, "a test of the official tools runs only where they are"
    # Some of their messages quote names as they are.
    done = subprocess.run([SWISSKNIFE, *arguments], capture_output=True, timeout=60)
    said = (done.stdout + done.stderr).decode(errors="replace")
    return Verdict(done.returncode == 0 and good in said, said)

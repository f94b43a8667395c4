"""Programs of Debian that the demonstration and the benchmark want: the installed one, else one unpacked for us.

A package is downloaded and unpacked into a directory of ours, which needs neither root nor an installation, and
starts no service.
"""

from __future__ import annotations

import os
import shutil
import subprocess

TIMEOUT = 120


def program(name: str, package: str, below: str) -> str | None:
    """The path of a program: installed here, else out of Debian's package; None where neither is to be had."""
    installed = shutil.which(name)
    if installed is not None:
        return installed
    unpacked = unpack(package, below)
    if unpacked is None:
        return None
    found = shutil.which(name, path=os.pathsep.join(os.path.join(unpacked, d) for d in ("usr/bin", "bin", "usr/sbin")))
    return found if found is not None and _starts(found) else None


def unpack(package: str, below: str) -> str | None:
    """The directory with a package's files, below `below`, downloaded once; None where apt cannot get it."""
    directory = os.path.abspath(os.path.join(below, package))
    if os.path.isdir(directory):
        return directory
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        return None
    archives = os.path.join(below, "archives", package)
    os.makedirs(archives, exist_ok=True)
    downloaded = _apt(["download", package], archives)
    if not downloaded and os.geteuid() == 0:
        # On a fresh machine apt has no lists yet, and only root can fetch them.
        downloaded = _apt(["update"], archives) and _apt(["download", package], archives)
    debs = [name for name in os.listdir(archives) if name.endswith(".deb")]
    if not downloaded or not debs:
        return None
    # Unpacked beside and renamed, so that an interrupted run leaves nothing that looks complete.
    partial = f"{directory}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    extraction = subprocess.run(["dpkg-deb", "-x", os.path.join(archives, debs[0]), partial], capture_output=True)
    if extraction.returncode != 0:
        return None
    os.rename(partial, directory)
    return directory


def _apt(arguments: list[str], directory: str) -> bool:
    """Whether apt-get did it. A machine without a network is an ordinary one here, so its complaint is not repeated."""
    command = ["apt-get", "-qq", "-o", "Acquire::Retries=1", "-o", "Acquire::http::Timeout=15", *arguments]
    try:
        return subprocess.run(command, cwd=directory, capture_output=True, timeout=TIMEOUT).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def _starts(path: str) -> bool:
    """Whether an unpacked program finds its libraries on this machine."""
    try:
        return subprocess.run([path, "--version"], capture_output=True, timeout=10).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False

"""Peak memory of a program and all that it starts, as the kernel accounts it: PSS, in which a page shared by n
processes counts one n-th in each, so that the sum over processes is memory really used."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

INTERVAL = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """The highest sum of PSS seen, in bytes, with how many processes it was and how often one looked."""

    peak: int
    processes: int
    samples: int
    status: int


def watch(command: Sequence[str], *, log: int, directory: str, environment: Mapping[str, str] | None = None) -> Usage:
    """Runs a command in a session of its own and samples the memory of that session until the command ends."""
    child = subprocess.Popen(
        command,
        cwd=directory,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
        env=environment,
    )
    peak = processes = samples = 0
    try:
        while child.poll() is None:
            sizes = [size for pid in members(child.pid) if (size := pss(pid)) is not None]
            samples += 1
            if sum(sizes) > peak:
                peak, processes = sum(sizes), len(sizes)
            time.sleep(INTERVAL)
    finally:
        if child.poll() is None:
            child.terminate()
            child.wait()
    return Usage(peak=peak, processes=processes, samples=samples, status=child.returncode)


def members(session: int) -> list[int]:
    """The processes of a session."""
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                # The program's name, in parentheses, may hold anything; behind it: state, parent, group, session.
                fields = file.read().rpartition(b")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # ended since the listing
        if int(fields[3]) == session:
            found.append(int(name))
    return found


def pss(pid: int) -> int | None:
    """The proportional set size of a process, in bytes; None when it has ended."""
    try:
        with open(f"/proc/{pid}/smaps_rollup", "rb") as file:
            for line in file:
                if line.startswith(b"Pss:"):
                    return int(line.split()[1]) * 1024
    except (FileNotFoundError, ProcessLookupError):
        pass
    return None

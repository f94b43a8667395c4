"""What a command costs: wall-clock seconds, and CPU seconds of it and of all that it started and waited for."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.contenders import failed


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """Seconds."""

    wall: float
    user: float
    system: float

    @property
    def cpu(self) -> float:
        return self.user + self.system


def measure(command: Sequence[str], directory: str, environment: Mapping[str, str] | None = None) -> Spent:
    """Runs a command with these variables set besides; Failed unless it ends with 0."""
    log = os.path.join(directory, "log")
    with open(log, "wb") as file:
        start = time.perf_counter()
        child = subprocess.Popen(
            command,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env=os.environ | dict(environment or {}),
        )
        # Of a process that was waited for, the kernel tells what it and its own children used.
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        raise failed(command, child.returncode, log)
    return Spent(wall=wall, user=usage.ru_utime, system=usage.ru_stime)

"""Publishes into a copy of a repository again and again, dying by SIGKILL at each point in turn.

    python -m tests.kill_switch REPOSITORY KEYS SPOOLS STEP

A point is before or after a rename, link, unlink or sync, or in the middle of a write. Copies are `REPOSITORY.<n>` and
`SPOOLS.<n>`, from 1 on, STEP apart; prints the number of the last one, in which nothing died.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import sys
from collections.abc import Callable
from typing import Any

from tests.cvmfs_repositories import NAME, NOW, publish
from unpacker.cvmfs.repository import Repository
from unpacker.publish import posix

CALLS = ("rename", "replace", "link", "unlink", "fsync")


def die_at(point: int) -> None:
    passed = 0

    def note() -> None:
        nonlocal passed
        passed += 1
        if passed == point:
            os.kill(os.getpid(), signal.SIGKILL)

    def wrap(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **keywords: Any) -> Any:
            note()
            result = call(*arguments, **keywords)
            note()
            return result

        return wrapped

    for name in CALLS:
        setattr(os, name, wrap(getattr(os, name)))
    write_all = posix.write_all

    def write_halves(fd: int, data: bytes) -> None:
        write_all(fd, data[: len(data) // 2])
        note()
        write_all(fd, data[len(data) // 2 :])

    posix.write_all = write_halves
    # What was synced does not show in a kill; that it was called does, and syncing for real takes long.
    os.fsync = wrap(lambda fd: None)
    posix.syncfs = wrap(lambda fd: None)


def main() -> None:
    repository, keys, spools, step = sys.argv[1:]
    for point in itertools.count(1, int(step)):
        shutil.copytree(repository, f"{repository}.{point}")
        shutil.copytree(spools, f"{spools}.{point}")
        child = os.fork()
        if child == 0:
            opened = Repository.open(
                f"{repository}.{point}", keys, spool_root=f"{spools}.{point}", configuration="/nowhere"
            )
            assert (opened.spool is not None) == os.path.isdir(f"{spools}.{point}/{NAME}")
            die_at(point)
            publish(opened, NOW + 1000)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        if status == 0:
            print(point)
            return
        if not os.WIFSIGNALED(status):
            sys.exit(f"point {point}: ended with status {status}")


if __name__ == "__main__":
    main()

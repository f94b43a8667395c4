"""Runs unpacker with every change of a name and every sync counted, and dies by SIGKILL at the one asked for.

    python -m tests.kill_at POINT LOG -- reconcile wishlist.yaml --target T …

Points are numbered from 1: one before and one after each call. POINT 0 never dies. LOG gets one JSON line per call, as
it happened: name, and the absolute paths it named. The clock stands still, so that runs can be compared.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

COUNTED = ("rename", "replace", "link", "symlink", "unlink", "remove", "rmdir", "mkdir")
NOW = 4_000_000_000.0
"""Later than anything a file system says, so that every grace period is over."""


class Killer:
    """Counts points; at the chosen one the process is gone."""

    def __init__(self, point: int, log: str) -> None:
        self._point = point
        self._passed = 0
        self._lock = threading.Lock()
        self._log = open(log, "a", encoding="ascii")  # noqa: SIM115 - open until the process dies

    def wrap(self, name: str, call: Callable[..., Any], *, counted: bool) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if not counted:
                result = call(*args, **kwargs)
                self._note(name, args, kwargs)
                return result
            self._pass()
            result = call(*args, **kwargs)
            self._note(name, args, kwargs)
            self._pass()
            return result

        return wrapped

    def _pass(self) -> None:
        with self._lock:
            self._passed += 1
            if self._passed == self._point:
                os.kill(os.getpid(), signal.SIGKILL)

    def _note(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name == "open" and not (args[1] if len(args) > 1 else kwargs.get("flags", 0)) & os.O_CREAT:
            return
        paths = []
        if name in ("rename", "replace", "link"):
            paths = [_absolute(args[0], kwargs.get("src_dir_fd")), _absolute(args[1], kwargs.get("dst_dir_fd"))]
        elif name == "symlink":
            paths = [_absolute(args[1], kwargs.get("dir_fd"))]
        elif name not in ("syncfs", "fsync"):
            paths = [_absolute(args[0], kwargs.get("dir_fd"))]
        with self._lock:
            self._log.write(json.dumps([name, *paths]) + "\n")
            self._log.flush()


def _absolute(path: Any, dir_fd: int | None) -> str:
    if isinstance(path, int):
        return os.readlink(f"/proc/self/fd/{path}")
    base = os.getcwd() if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
    return os.path.normpath(os.path.join(base, os.fsdecode(path)))


def main() -> None:
    point, log, _, *arguments = sys.argv[1:]
    killer = Killer(int(point), log)
    time.time = lambda: NOW
    # Imported after the clock stopped, so that defaults bound at import stand still, too.
    from unpacker import cli
    from unpacker.publish import posix

    for name in COUNTED:
        setattr(os, name, killer.wrap(name, getattr(os, name), counted=True))
    os.open = killer.wrap("open", os.open, counted=False)
    os.fsync = killer.wrap("fsync", os.fsync, counted=True)
    posix.syncfs = killer.wrap("syncfs", posix.syncfs, counted=True)
    sys.argv = ["unpacker", *arguments]
    cli.main()


if __name__ == "__main__":
    main()

"""One holder of a target at a time, across processes: an flock on a file that says who holds it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from unpacker.errors import Busy

_POLL = 0.1
_held: set[int] = set()


@contextmanager
def exclusive(path: str, what: str, wait: float = 0) -> Iterator[None]:
    """Holds the lock at `path`; Busy names the holder of `what` after at most `wait` seconds of waiting.

    The kernel releases it with the process, so a killed holder leaves no lock, only its name in the file. The file
    stays: a lock that is unlinked can be held twice. OSError if the file cannot be made.
    """
    deadline = time.monotonic() + wait
    while (fd := _try(path)) is None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise Busy(f"{what} is held by {_holder(path)}; wait for it to end, or look at that process")
        time.sleep(min(_POLL, left))
    _held.add(fd)
    try:
        _sign(fd)
        yield
    finally:
        if fd in _held:
            _held.remove(fd)
            try:
                os.ftruncate(fd, 0)
            finally:
                os.close(fd)


def _let_go() -> None:
    # A forked worker shares the lock, and would hold it on after its parent was killed.
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_let_go)


def _try(path: str) -> int | None:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Somebody may have replaced the file between the two calls: then this is a lock on nothing.
        if os.path.samestat(os.fstat(fd), os.stat(path)):
            _give_away(fd, path)
            return fd
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


def _give_away(fd: int, path: str) -> None:
    """Makes root's file one of who owns the directory: left as root's, it would lock its owner out."""
    if os.geteuid() == 0:
        owner = os.stat(os.path.dirname(path))
        if owner.st_uid != os.fstat(fd).st_uid:
            os.fchown(fd, owner.st_uid, owner.st_gid)


def _sign(fd: int) -> None:
    holder = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": int(time.time()),
        # The program and its verb; never more, because arguments may be secret.
        "command": " ".join([os.path.basename(sys.argv[0]), *sys.argv[1:2]]),
    }
    try:
        os.ftruncate(fd, 0)
        os.pwrite(fd, json.dumps(holder).encode(), 0)
    except OSError as error:
        # The name is a courtesy, the lock is held without it; and a full disk must not keep gc from emptying it.
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise


def _holder(path: str) -> str:
    try:
        with open(path, "rb") as file:
            value = json.loads(file.read(65536))
        age = max(0, int(time.time()) - int(value["started"]))
        return f"{value['command']!r} on {value['host']}, pid {value['pid']}, for {duration(age)}"
    except (OSError, ValueError, KeyError, TypeError):
        # Between taking the lock and signing it, the holder is not yet known.
        return "another process"


def duration(seconds: int) -> str:
    """How long somebody has held something."""
    if seconds < 120:
        return f"{seconds} s"
    return f"{seconds // 60} min" if seconds < 7200 else f"{seconds // 3600} h"

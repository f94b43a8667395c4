"""DUCC's lock, honoured while both are installed: it aborts, by force, any transaction that is in its way."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager

from unpacker.errors import Busy
from unpacker.publish import posix

LOCK = "/tmp/DUCC.lock"
_PROGRAM = "cvmfs_ducc"
_POLL = 0.2


@contextmanager
def beside_ducc(wait: float, path: str = LOCK) -> Iterator[None]:
    """Keeps DUCC from opening transactions, as its own processes keep each other; Busy after at most `wait` seconds.

    Does nothing where DUCC is not installed and has left no lock.
    """
    fd = _opened(path)
    if fd is None:
        yield
        return
    try:
        deadline = time.monotonic() + wait
        while not _taken(fd):
            left = deadline - time.monotonic()
            if left <= 0:
                raise Busy(f"DUCC is at work (it holds {path}): wait for its end, or use --lock-wait")
            time.sleep(min(_POLL, left))
        yield
    finally:
        os.close(fd)


def _opened(path: str) -> int | None:
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(path, flags)
    except FileNotFoundError:
        if shutil.which(_PROGRAM) is None:
            return None
    except OSError as error:
        raise posix.failure(error, f"opening {path}, which DUCC locks") from error
    try:
        return os.open(path, flags | os.O_CREAT, 0o666)
    except OSError as error:
        raise posix.failure(error, f"making {path}, which DUCC locks") from error


def _taken(fd: int) -> bool:
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise
    return True

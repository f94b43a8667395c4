"""The few small files of a repository that are replaced, never edited: read within a bound, written durably."""

from __future__ import annotations

import os
import secrets

from unpacker.publish import posix

TEMPORARY = ".unpacker-"
"""How names begin that a killed writer may leave."""


def read(path: str, limit: int) -> bytes:
    """All of a regular file, at most `limit` bytes of it and one more. OSError as it comes."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(fd, "rb") as file:
        return file.read(limit + 1)


def replace(path: str, data: bytes, *, scratch: str | None = None, mode: int = 0o644) -> None:
    """Puts a file in place in one step, durable on return; a reader finds the old one or the new one, whole.

    Written beside, or in the directory `scratch` of the same file system, so that what is served never shows it. Run
    by root, the file belongs to who owns the directory it comes into: the others who write there must be able to.
    OSError as it comes, and then the old file stands.
    """
    directory = os.path.dirname(path) or "."
    temporary = f"{scratch or directory}/{TEMPORARY}{os.getpid()}-{secrets.token_hex(6)}"
    fd = os.open(temporary, posix.CREATE_FLAGS, 0o600)
    try:
        try:
            posix.write_all(fd, data)
            if os.geteuid() == 0:
                owner = os.stat(directory)
                os.fchown(fd, owner.st_uid, owner.st_gid)
            os.fchmod(fd, mode)  # Whatever the umask.
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(temporary, path)
    except BaseException:
        try:
            os.unlink(temporary)
        except OSError:
            pass  # The next writer under the lock sweeps it away; the first error is the one to tell.
        raise
    sync_directory(directory)


def sync_directory(path: str) -> None:
    """Makes the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sweep(directory: str) -> None:
    """Removes what killed writers left. Nobody else may be writing there: call it under the lock."""
    for name in os.listdir(directory):
        if name.startswith(TEMPORARY):
            os.unlink(f"{directory}/{name}")

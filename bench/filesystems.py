"""Fresh file systems to measure on: a journalled ext4 on a loop device, and tmpfs.

A file system that has seen many deletions is slower than a new one, and one without a journal hides what durability
costs; so every measurement gets a new one and all contenders the same kind.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator

SHARED_MEMORY = "/dev/shm"


class Unavailable(Exception):
    """This machine, or this user, has no such file system; the message says why."""


def check(kind: str, room: int, below: str) -> None:
    """Raises Unavailable unless `fresh(kind)` will work with `room` bytes."""
    if kind == "ext4":
        if os.geteuid() != 0:
            raise Unavailable("ext4 on a loop device needs root: run the benchmark as root for it")
        if shutil.which("mkfs.ext4", path=_PATH) is None:
            raise Unavailable("mkfs.ext4 is not installed (apt install e2fsprogs)")
        if shutil.disk_usage(below).free < room:
            raise Unavailable(f"ext4 wants {room / 1e9:.0f} GB free in {below}")
        try:
            with fresh(kind, 64 << 20, below):
                pass
        except subprocess.CalledProcessError as error:
            reason = (error.stderr or b"").decode(errors="replace").strip()
            raise Unavailable(f"no loop device can be mounted here: {reason}") from None
    elif not os.path.isdir(SHARED_MEMORY) or shutil.disk_usage(SHARED_MEMORY).free < room:
        raise Unavailable(f"tmpfs wants {room / 1e9:.0f} GB free in {SHARED_MEMORY}")


@contextlib.contextmanager
def fresh(kind: str, room: int, below: str) -> Iterator[str]:
    """An empty directory on a new file system of this kind, gone after the `with`."""
    if kind == "ext4":
        with _loop(room, below) as directory:
            yield directory
    else:
        directory = tempfile.mkdtemp(prefix="unpacker-bench-", dir=SHARED_MEMORY)
        try:
            yield directory
        finally:
            remove(directory)


def settle() -> None:
    """Writes out what earlier work left, and as root forgets what it cached, so that nobody pays for another."""
    os.sync()
    if os.geteuid() == 0:
        try:
            with open("/proc/sys/vm/drop_caches", "w") as file:
                file.write("3")
        except OSError:
            pass  # in a container; the same for all contenders


def write_through(directory: str, size: int) -> float:
    """Seconds in which one file of `size` bytes gets to the disk: what no program can be faster than that ends with
    its data there."""
    piece = os.urandom(1 << 20)
    path = os.path.join(directory, "written-through")
    start = time.perf_counter()
    with open(path, "wb", buffering=0) as file:
        for _ in range(size // len(piece)):
            file.write(piece)
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    os.unlink(path)
    return seconds


def remove(directory: str) -> None:
    """Removes a tree that may hold read-only directories."""
    if os.geteuid() != 0:
        for at, _, _ in os.walk(directory):
            os.chmod(at, 0o700)
    shutil.rmtree(directory)


_PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))


@contextlib.contextmanager
def _loop(room: int, below: str) -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="ext4-", dir=below) as scratch:
        image, point = os.path.join(scratch, "image"), os.path.join(scratch, "mounted")
        with open(image, "wb") as file:
            file.truncate(room)
        os.mkdir(point)
        # All tables written now: the kernel would otherwise do it in the background of the first measurement.
        _run("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", image)
        _run("mount", "-o", "loop", image, point)
        try:
            # mkfs leaves a directory lost+found at the top.
            directory = os.path.join(point, "bench")
            os.mkdir(directory)
            yield directory
        finally:
            _run("umount", point)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"PATH": _PATH})

"""Where a read-only root must have something for a container system to mount on: `MountPoints` and the usual ones.

Pure. Systems that can put an overlay or an underlay below the mounts need none of them; on many hosts they may not.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

from unpacker.additions import Addition, directory, file, symlink

_DIRECTORIES = ("proc", "sys", "dev", "run", "home", "root", "srv", "mnt", "cvmfs")
_WRITABLE = ("tmp", "var/tmp")
_EMPTY_FILES = ("etc/hosts", "etc/resolv.conf", "etc/hostname")


def _utc() -> bytes:
    """A time zone file that says UTC (RFC 8536), as an image without /etc/localtime has it: an empty one would be an
    error to who reads it where nothing is mounted on it."""
    data = struct.pack(">6l", 0, 0, 0, 0, 1, 4) + struct.pack(">lbb", 0, 0, 0) + b"UTC\0"
    return 2 * (b"TZif2" + bytes(15) + data) + b"\nUTC0\n"


def additions(working_directory: str, more: Sequence[str]) -> Iterator[Addition]:
    """What is mounted on in a root, in the order of importance, and the directory that its programs start in.

    `more` are the operator's own, as `parse` gives them.
    """
    for path in _EMPTY_FILES:
        yield file(path, b"")
    # Not empty, so it is not made where a dangling link leads: that would be the file of some time zone.
    yield file("etc/localtime", _utc())
    yield symlink("etc/mtab", "/proc/mounts")  # podman makes it, and gives up where it cannot
    for path in _DIRECTORIES:
        yield directory(path)
    for path in _WRITABLE:
        yield directory(path, mode=0o1777)
    for path in more:
        yield directory(path)
    if working_directory.isascii() or _is_text(working_directory):
        yield directory(working_directory)


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def parse(paths: Sequence[str]) -> tuple[str, ...]:
    """The operator's mount points as paths of a root, sorted; ValueError says which of them is none."""
    found = set()
    for path in paths:
        parts = [part for part in path.split("/") if part not in ("", ".")]
        if not path.startswith("/") or not parts or ".." in parts or not path.isprintable():
            raise ValueError(f"not the absolute path of a directory: {path!r}")
        found.add("/".join(parts))
    return tuple(sorted(found))

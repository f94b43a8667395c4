"""Stores of files named by hashes, in directories `xx/`: what is there, for fewer calls than one for each name.

A call for one name costs as much as listing ten; and in a process with several threads much more, because each call
lets go of the interpreter, and has to wait until it may come back.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator

from unpacker.publish import posix

_LISTED_PER_NAME = 800
"""A directory is listed if it has no more bytes than this for each name that is looked for: an entry takes 50 to 80."""

_SMALL = 16 << 10
_FEW = 500
"""Bytes and names of a directory whose names are worth remembering, in each of 256 directories."""


def present(names: Iterable[str], store_fd: int) -> set[str]:
    """Which of these files are there for sure, by names such as `xxrest` for `xx/rest` in the open directory."""
    shards: dict[str, list[str]] = {}
    for name in names:
        shards.setdefault(name[:2], []).append(name)
    return {name for shard, wanted in shards.items() for name in _present(shard, wanted, store_fd)}


def _present(shard: str, names: Collection[str], store_fd: int) -> Iterator[str]:
    there = _listed(shard, store_fd, _LISTED_PER_NAME * len(names))
    if there is not None:
        yield from (name for name in names if name[2:] in there)
        return
    for name in names:
        # What cannot be listed may be asked for.
        if os.access(f"{shard}/{name[2:]}", os.F_OK, dir_fd=store_fd, follow_symlinks=False):
            yield name


class Shards:
    """What a store may hold, for one who adds to it for a while. Directories with few names are looked at once."""

    def __init__(self, store_fd: int) -> None:
        self._fd = store_fd
        self._names: dict[str, frozenset[str] | None] = {}

    def may_hold(self, path: str) -> bool:
        """Whether there may be a file `xx/rest`; not, if there was none when its directory was looked at.

        What others add after that is not known here: files named by hashes may be stored twice.
        """
        shard = path[:2]
        try:
            names = self._names[shard]
        except KeyError:
            names = self._names[shard] = _few(shard, self._fd)
        if names is not None:
            return path[3:] in names
        return os.access(path, os.F_OK, dir_fd=self._fd, follow_symlinks=False)

    def again(self) -> Shards:
        """The same, knowing nothing yet."""
        return Shards(self._fd)

    def remembers(self, path: str) -> bool:
        """Whether `may_hold` answers for this file from what it saw when it first looked at the directory."""
        return self._names.get(path[:2]) is not None


def _few(shard: str, store_fd: int) -> frozenset[str] | None:
    names = _listed(shard, store_fd, _SMALL)
    # The size of a directory is told in bytes by most file systems, in names by others.
    return names if names is None or len(names) <= _FEW else None


def _listed(shard: str, store_fd: int, most: int) -> frozenset[str] | None:
    """The names in a directory; None if it has more bytes than that, or cannot be read."""
    try:
        if os.stat(shard, dir_fd=store_fd).st_size >= most:
            return None
        fd = os.open(shard, posix.DIRECTORY_FLAGS, dir_fd=store_fd)
    except FileNotFoundError:
        return frozenset()
    except OSError:
        return None
    try:
        return frozenset(os.listdir(fd))
    except OSError:
        return None
    finally:
        os.close(fd)

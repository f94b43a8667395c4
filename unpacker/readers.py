"""A target as its users have it: names looked up one by one, where they are seen, nothing written and no state needed.

A mounted repository may have ten thousand names, each record a file to fetch: so who knows a name asks for that one.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from unpacker.errors import PublishError
from unpacker.lookup import Asked, near, only_by_tag
from unpacker.multiarch import MULTIARCH
from unpacker.publish import posix
from unpacker.publish.layout import Layout
from unpacker.publish.roots import FLAT, METADATA
from unpacker.record import Published, Unreadable

if TYPE_CHECKING:
    # Signatures and catalogs take a tenth of a second to import, which who has a directory as target does not pay.
    from unpacker.publish.stratum0 import Stratum0Publisher

_FILE_LIMIT = 64 << 20
"""What says how ten thousand names stand has some megabytes."""


class Reader(Protocol):
    """A target to look things up in. PublishError where it cannot be read."""

    @property
    def mount(self) -> str:
        """The absolute path at which users see the target."""

    @property
    def mounts(self) -> Sequence[str]:
        """All paths at which it may be seen, that one first."""

    def names(self) -> Iterable[str]:
        """Every public name, its record not looked at."""

    def standing(self, public_path: str) -> Published | Unreadable | None:
        """What stands published under one name."""

    def published(self) -> Mapping[str, Published | Unreadable]:
        """What stands published under all of them."""

    def platforms(self, front: str) -> tuple[str, ...]:
        """The directories of the platforms of which this name has an image."""

    def file(self, path: str) -> bytes | None:
        """A small file below the target, no symlink followed; None if there is none that can be read."""


class DirectoryReader:
    """A directory of this host, a mounted repository among them."""

    def __init__(self, path: str, mount: str | None = None) -> None:
        self._layout = Layout(os.path.abspath(path))
        self.mount = (mount or self._layout.path).rstrip("/") or "/"
        self.mounts = tuple(dict.fromkeys((self.mount, self._layout.path, os.path.realpath(self._layout.path))))

    def names(self) -> Iterable[str]:
        try:
            found = list(self._layout.public_names())
        except OSError as error:
            raise posix.failure(error, f"reading what is published in {self._layout.path}") from error
        if not found and not any(os.path.isdir(f"{self._layout.path}/{name}") for name in (FLAT, METADATA)):
            # Unknown is not empty: so looks a directory on which nothing is mounted just now.
            raise PublishError(f"there are no published images in {self._layout.path} (is the repository mounted?)")
        return found

    def standing(self, public_path: str) -> Published | Unreadable | None:
        try:
            return self._layout.in_force(public_path)
        except OSError as error:
            raise posix.failure(error, f"reading {public_path} in {self._layout.path}") from error

    def published(self) -> Mapping[str, Published | Unreadable]:
        found = ((path, self.standing(path)) for path in self.names())
        return {path: value for path, value in found if value is not None}

    def platforms(self, front: str) -> tuple[str, ...]:
        top = f"{self._layout.path}/{MULTIARCH}"
        names = sorted(self._layout.names(MULTIARCH))
        return tuple(n for n in names if not os.path.islink(f"{top}/{n}") and os.path.islink(f"{top}/{n}/{front}"))

    def file(self, path: str) -> bytes | None:
        directory, name = posixpath.split(path)
        try:
            # Directory by directory: in an image's root any of them may be a symlink that leads out of it.
            fd = self._layout.open(directory)
            try:
                file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=fd)
            finally:
                os.close(fd)
            with open(file, "rb") as opened:
                return opened.read(_FILE_LIMIT)
        except OSError:
            return None


class RepositoryReader:
    """A native repository in a directory of this host, as its clients see it below /cvmfs."""

    def __init__(self, publisher: Stratum0Publisher, mount: str | None = None) -> None:
        self._publisher = publisher
        self._known: Mapping[str, Published | Unreadable] | None = None
        self.mount = mount or f"/cvmfs/{publisher.repository.name}"
        self.mounts = tuple(dict.fromkeys((self.mount, f"/cvmfs/{publisher.repository.name}")))

    def names(self) -> Iterable[str]:
        return self.published().keys()

    def standing(self, public_path: str) -> Published | Unreadable | None:
        return self.published().get(public_path)

    def published(self) -> Mapping[str, Published | Unreadable]:
        if self._known is None:
            self._known = self._publisher.published()
        return self._known

    def platforms(self, front: str) -> tuple[str, ...]:
        top = f"{MULTIARCH}/"
        below = (path.removeprefix(top).partition("/") for path in self.published() if path.startswith(top))
        return tuple(sorted(directory for directory, _, path in below if path == front))

    def file(self, path: str) -> bytes | None:
        with self._publisher.snapshot() as snapshot:
            try:
                return snapshot.file(path, _FILE_LIMIT)
            except PublishError:
                return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A published name, its record if it has one that can be read, and the platforms it serves if they are several."""

    name: str
    record: Published | None
    platforms: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """Nothing stands published for what was asked; `near` are names that may be meant."""

    near: tuple[str, ...]


def find(asked: Asked, reader: Reader) -> Found | Missing:
    """The published name that is meant. What another tool published counts, though it has no record."""
    for path in asked.paths:
        standing = reader.standing(path)
        if isinstance(standing, Published) and (not asked.digest or asked.is_of(standing)):
            return _found(path, standing, reader)
        # Without a record only a name itself can say which digest it stands for.
        fits = not asked.digest or path.endswith(f":{asked.digest}")
        if isinstance(standing, Unreadable) and fits and not standing.is_foreign:
            return _found(path, None, reader)
    if asked.digest or asked.root:
        # Of names of one image the one before several platforms comes first, then those in the order of the alphabet.
        records = [p for p in reader.published().values() if isinstance(p, Published) and asked.is_of(p)]
        records.sort(key=lambda p: (p.public_path.startswith(MULTIARCH), p.public_path))
        if records:
            return _found(records[0].public_path, records[0], reader)
    names = list(reader.names())
    # `alpine` is what an image is called, and whoever asks for it does not mean `python:alpine`.
    tagged = only_by_tag(asked, names) if any(map(str.isdigit, asked.text)) else ()
    if len(tagged) == 1:
        standing = reader.standing(tagged[0])
        return _found(tagged[0], standing if isinstance(standing, Published) else None, reader)
    return Missing(near=near(asked, names))


def _found(path: str, record: Published | None, reader: Reader) -> Found:
    return Found(name=path, record=record, platforms=() if path.startswith(MULTIARCH) else reader.platforms(path))


def check(mount: str) -> str:
    """The path at which users see a target, absolute and fit to be written in a line; PublishError if it is not."""
    if not posixpath.isabs(mount) or not mount.isprintable():
        raise PublishError(f"users cannot open images at {mount!r}: published_at is an absolute path of printable text")
    return mount

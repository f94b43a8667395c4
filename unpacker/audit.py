"""A native repository as the names that it publishes: whatever is wrong with it, and which of them that concerns."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from unpacker.cvmfs.check import check
from unpacker.cvmfs.keys import PublicKey
from unpacker.cvmfs.reader import Reader
from unpacker.cvmfs.row import FILE, SPECIAL, SYMLINK, content_of
from unpacker.publish.roots import METADATA
from unpacker.publish.stratum0 import Stratum0Publisher
from unpacker.record import Published, Unreadable
from unpacker.verify import Problem

_FILES = FILE | SYMLINK | SPECIAL


def audit(
    publisher: Stratum0Publisher, published: Mapping[str, Published | Unreadable], *, quick: bool, now: float
) -> Iterator[Problem]:
    """Every problem of the repository, told for each of the published names that it concerns, or for none ("").

    `quick` looks whether objects are there, not at their bytes. PublishError if there is no repository at all.
    """
    public = f"{publisher.keys}/{publisher.repository.name}.pub"
    key = PublicKey.open(publisher.keys, publisher.repository.name) if os.path.exists(public) else None
    for value in published.values():
        if isinstance(value, Unreadable):
            yield Problem(public_path=value.public_path, path="", what=value.problem)
    names: dict[str, list[str]] = {}
    for path, value in published.items():
        names.setdefault(f"/{path}", []).append(path)
        names.setdefault(f"/{METADATA}/{path}", []).append(path)
        if isinstance(value, Published):
            names.setdefault(f"/{value.root}", []).append(path)
    damaged: dict[str, str] = {}
    for found in check(publisher.path, now=now, hashes=not quick, public_key=key):
        if found.where.startswith("data/"):
            damaged[found.where] = found.what
        yield from _told(names, found.where, found.what)
    if damaged:
        yield from _users(publisher, names, damaged)


def _users(
    publisher: Stratum0Publisher, names: Mapping[str, list[str]], damaged: Mapping[str, str]
) -> Iterator[Problem]:
    """The files whose objects are damaged."""
    repository = publisher.repository
    with Reader(repository.objects, repository.manifest().root) as reader:
        for found in reader.walk():
            if found.row.flags & _FILES != FILE:
                continue
            for name, suffix in content_of(found.row, found.chunks).objects:
                place = name.object_path(suffix)
                if place in damaged:
                    yield from _told(names, found.path, f"{place}: {damaged[place]}")


def _told(names: Mapping[str, list[str]], where: str, what: str) -> Iterator[Problem]:
    above = where
    while above.startswith("/") and above != "/":
        if above in names:
            for name in names[above]:
                yield Problem(public_path=name, path=where, what=what)
            return
        above = above.rpartition("/")[0]
    yield Problem(public_path="", path=where, what=what)

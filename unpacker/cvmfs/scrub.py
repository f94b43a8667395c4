"""Reads every object of a repository's store and compares it with its name; looks at how the store is laid out."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from unpacker.cvmfs.check_tree import Problem
from unpacker.cvmfs.hash import ContentHash
from unpacker.cvmfs.objects import ObjectStore
from unpacker.publish import posix

SCRATCH = "txn"

_GROUP = re.compile(r"[0-9a-f]{2}")
_OBJECT = re.compile(r"([0-9a-f]{38}(?:-rmd160|-shake128)?)([PCHXML]?)")


def scrub(directory: str) -> Iterator[Problem]:
    """Everything in `data/` that is no object with the bytes of its name; PublishError if it cannot be listed."""
    store = ObjectStore(directory)
    for group in listed(f"{directory}/data"):
        where = f"data/{group.name}"
        if group.is_symlink() or not group.is_dir():
            yield Problem(where, "only directories belong here")
        elif group.name == SCRATCH:
            continue
        elif not _GROUP.fullmatch(group.name):
            yield Problem(where, "a directory that holds no objects: its name is not two hex digits")
        else:
            for entry in listed(f"{directory}/{where}"):
                yield from _object(store, group.name, entry)


def parse_name(group: str, name: str) -> tuple[ContentHash, str] | None:
    """The hash and the suffix of an object by its directory and its name there; None if it is no object's name."""
    found = _OBJECT.fullmatch(name)
    return (ContentHash.parse(group + found[1]), found[2]) if found and _GROUP.fullmatch(group) else None


def listed(path: str) -> list[os.DirEntry[str]]:
    """What is in a directory, by names. PublishError if that cannot be told."""
    try:
        with os.scandir(path) as found:
            return sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise posix.failure(error, f"listing {path}") from error


def _object(store: ObjectStore, group: str, entry: os.DirEntry[str]) -> Iterator[Problem]:
    where = f"data/{group}/{entry.name}"
    if entry.is_symlink():
        yield Problem(where, "a symlink among the objects")
    elif entry.is_dir():
        yield Problem(where, "a directory among the objects")
    elif not entry.is_file():
        yield Problem(where, "neither a file nor anything else that belongs here")
    elif (parsed := parse_name(group, entry.name)) is None:
        yield Problem(where, "not the name of an object: a malformed hash, or an unknown suffix")
    elif not store.is_sound(*parsed) and os.path.lexists(entry.path):  # It may have been collected just now.
        yield Problem(where, "its bytes are not what its name says; run unpacker reconcile --rebuild, or restore it")

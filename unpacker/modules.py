"""Writes modulefiles of all published images and the wrapper, and takes away those of images that are gone.

What was written is listed in `.unpacker-modules.json` there, before it is written: so what a killed run left is known
to the next one, and nothing that is not listed is ever overwritten or removed.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass

from unpacker import lock
from unpacker.errors import PublishError
from unpacker.modulefiles import WRAPPER, Loadable, files, labels_of, wrapper
from unpacker.multiarch import MULTIARCH, Place, public_path
from unpacker.readers import Reader
from unpacker.record import Published, Unreadable
from unpacker.settings import Modules

LIST = ".unpacker-modules.json"
_LOCK = ".unpacker-modules.lock"
_LIMIT = 64 << 20
_IN_THE_WAY = b"\0not a file"


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What was done, by path in the directory. `foreign` are files in the way that are not ours, `changed` those to
    be removed that somebody changed since: both were left alone."""

    written: tuple[str, ...]
    removed: tuple[str, ...]
    unchanged: int
    foreign: tuple[str, ...]
    changed: tuple[str, ...]


def write_for(directory: str, reader: Reader, site: Modules) -> Written:
    """Writes what users of a target need to load its images as modules. What another tool published is among them; of a
    name whose record cannot be read, a modulefile that is there stays as it is."""
    sure: list[Loadable] = []
    unsure: list[Loadable] = []
    published = reader.published()
    for name, standing in published.items():
        if name.startswith(f"{MULTIARCH}/"):
            continue
        path = f"{reader.mount.rstrip('/')}/{name}"
        if isinstance(standing, Published):
            root = _root(standing, published)
            labels = labels_of(reader.file(f"{root}/.singularity.d/labels.json")) if root else {}
            sure.append(Loadable(name=name, path=path, gpu=standing.gpu, labels=labels))
        elif not standing.is_foreign:
            unsure.append(Loadable(name=name, path=path, labels={}))
    script = wrapper(site.apptainer, site.binds, site.gpu_options)
    where = os.path.join(os.path.abspath(directory), os.path.dirname(WRAPPER))
    return write(directory, files(sure, script, where), files(unsure, script, where))


def _root(record: Published, published: Mapping[str, Published | Unreadable]) -> str | None:
    """The root that says what an image is: of several platforms, that of the first."""
    if record.place is not Place.FRONT:
        return record.root
    first = published.get(public_path(record.public_path, Place.PLATFORM, record.platform))
    return first.root if isinstance(first, Published) else None


def write(directory: str, files: Mapping[str, str], unsure: Mapping[str, str] | None = None) -> Written:
    """Makes a directory hold these files, each by its path in it; of others that were written here before, all go.
    Those that are `unsure` are written where there are none yet, and stay as they are else. Each file is replaced
    whole. PublishError if it cannot be done, Busy if another run is doing it."""
    path = os.path.abspath(directory)
    try:
        os.makedirs(path, exist_ok=True)
        with lock.exclusive(f"{path}/{_LOCK}", f"the modulefiles in {path}"):
            return _write(path, files, unsure or {})
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        raise PublishError(f"cannot write modulefiles to {directory}: {error.strerror}{where}") from error


def _write(directory: str, files: Mapping[str, str], unsure: Mapping[str, str]) -> Written:
    listed = _listed(directory)
    wanted = {path: text for path, text in unsure.items() if path not in listed} | dict(files)
    # `a:1` is the file `a/1.lua`, so `a/1.lua:2` has no place: it must not keep all others from theirs.
    placed = {path: text for path, text in wanted.items() if wanted.keys().isdisjoint(_above(path))}
    data = {path: text.encode("utf-8", "surrogateescape") for path, text in placed.items()}
    ours: dict[str, bytes] = {}
    foreign: list[str] = []
    written: list[str] = []
    for path, content in sorted(data.items()):
        before = _content(f"{directory}/{path}")
        if before is not None and before != content and (path not in listed or before == _IN_THE_WAY):
            foreign.append(path)
            continue
        ours[path] = content
        if before != content:
            written.append(path)
    gone = sorted(path for path in listed if path not in data and path not in unsure)
    kept = {path: listed[path] for path in listed if path in unsure and path not in data}
    after = kept | {path: _digest(content) for path, content in ours.items()}
    if after | {path: listed[path] for path in gone} != listed:
        _store(directory, listed | after)
    for path in written:
        _replace(f"{directory}/{path}", ours[path], 0o755 if ours[path].startswith(b"#!") else 0o644)
    removed, changed = _remove(directory, gone, listed)
    if after != listed:
        _store(directory, after)
    return Written(
        written=tuple(written),
        removed=tuple(removed),
        unchanged=len(ours) - len(written),
        foreign=tuple(foreign),
        changed=tuple(changed),
    )


def _remove(directory: str, paths: list[str], listed: Mapping[str, str]) -> tuple[list[str], list[str]]:
    removed: list[str] = []
    changed: list[str] = []
    for path in paths:
        content = _content(f"{directory}/{path}")
        if content is None:
            continue
        if _digest(content) != listed[path] or not _is_where_it_says(directory, path):
            changed.append(path)
            continue
        os.unlink(f"{directory}/{path}")
        removed.append(path)
        parent = os.path.dirname(path)
        with suppress(OSError):  # not empty: other versions, or files of others
            while parent:
                os.rmdir(f"{directory}/{parent}")
                parent = os.path.dirname(parent)
    return removed, changed


def _listed(directory: str) -> dict[str, str]:
    """What was written here before, with the digest of each; PublishError if that cannot be told."""
    data = _content(f"{directory}/{LIST}")
    try:
        value = json.loads(data or b'{"files": {}}')["files"]
        return {str(path): str(digest) for path, digest in value.items() if _is_below(str(path))}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PublishError(
            f"{directory}/{LIST} is damaged ({error}), so it is not known which files are ours: choose an empty "
            "directory, or remove that file and the modulefiles"
        ) from error


def _is_below(path: str) -> bool:
    # The list lies in a directory that others may write to; it must not make us remove anything elsewhere.
    return not path.startswith("/") and ".." not in path.split("/") and "\0" not in path


def _is_where_it_says(directory: str, path: str) -> bool:
    """Whether no symlink on the way makes a file of another directory of it."""
    parent = os.path.dirname(path)
    return os.path.realpath(f"{directory}/{parent}") == os.path.normpath(f"{os.path.realpath(directory)}/{parent}")


def _above(path: str) -> Iterator[str]:
    while path := os.path.dirname(path):
        yield path


def _store(directory: str, listed: Mapping[str, str]) -> None:
    text = json.dumps({"schema": 1, "files": dict(sorted(listed.items()))}, indent=1) + "\n"
    _replace(f"{directory}/{LIST}", text.encode("ascii"), 0o644)


def _content(path: str) -> bytes | None:
    """The bytes of a file; None if there is none. What is no file is none of ours, whatever it is, and neither is what
    stands where its directory belongs."""
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            return _IN_THE_WAY
        with open(path, "rb") as file:
            return file.read(_LIMIT)
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        return _IN_THE_WAY


def _replace(path: str, data: bytes, mode: int) -> None:
    parent, name = os.path.split(path)
    os.makedirs(parent, exist_ok=True)
    # The lock keeps others from this name, which Lmod passes over; what a killed run left there is written over.
    temporary = f"{parent}/.{name}.tmp"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    with open(fd, "wb") as file:
        file.write(data)
        os.fchmod(fd, mode)
    os.replace(temporary, path)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()

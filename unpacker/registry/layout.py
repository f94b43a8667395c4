"""An OCI image-layout directory as a registry: what `skopeo copy … oci:PATH:TAG` writes.

Specification: OCI image specification, `image-layout.md`. Only an operator names one, on the command line; what lies in
it is still not trusted: blobs are regular files found without following any symlink, and verified like a registry's.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

from unpacker.digest import Digest, Stream, VerifiedReader
from unpacker.errors import ImageError, NotFound, RegistryError
from unpacker.limits import Limits
from unpacker.oci import Descriptor
from unpacker.reference import Reference, Repository

REF_NAME = "org.opencontainers.image.ref.name"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutPath:
    """A RegistryLocator for one layout directory."""

    path: str
    tag: str | None = None
    limits: Limits = field(default_factory=Limits)

    def open(self) -> Layout:
        return Layout(self.path, tag=self.tag, limits=self.limits)


class Layout:
    """A Registry (see contracts.py) of the images in one directory, under whatever repository they are asked for.

    The directory is read anew for each question, so it may change in between. RegistryError, with its path, if it
    cannot be read. With `tag` that one stands for whatever tag is asked for: an image may be published under another
    name than it has in its directory. Without, a sole image that has no name there stands for every one.
    """

    def __init__(self, path: str, *, tag: str | None = None, limits: Limits | None = None) -> None:
        self._path = path
        self._tag = tag
        self._limits = limits if limits is not None else Limits()

    @property
    def path(self) -> str:
        return self._path

    @property
    def is_there(self) -> bool:
        """Whether the directory looks like a layout."""
        return os.path.exists(f"{self._path}/index.json")

    @property
    def locator(self) -> LayoutPath:
        return LayoutPath(path=os.path.abspath(self._path), tag=self._tag, limits=self._limits)

    def tags(self, repository: Repository) -> list[str]:
        return [tag for tag, _ in self._entries() if tag is not None]

    def head(self, reference: Reference) -> Descriptor:
        wanted = self._tag or reference.tag
        entries = self._entries()
        if self._tag is None and [tag for tag, _ in entries] == [None]:
            wanted = None  # All that is there, and nobody gave it a name.
        for tag, entry in entries:
            descriptor = Descriptor.from_json(entry, f"{self._path}: index.json")
            named = tag == wanted if reference.digest is None else descriptor.digest == reference.digest
            if named:
                return descriptor
        if reference.digest is not None:
            # Not named by index.json itself, but perhaps by an index that is: the bytes are what counts.
            raw = self._read_blob(reference.digest, self._limits.manifest)
            return Descriptor(media_type=_media_type(raw), digest=reference.digest, size=len(raw))
        exist = ", ".join(sorted({tag for tag, _ in entries if tag is not None})[:10]) or "none"
        raise NotFound(f"{self._path}: no tag {wanted} (tags that exist: {exist})")

    def manifest(self, repository: Repository, digest: Digest) -> tuple[bytes, str]:
        raw = self._read_blob(digest, self._limits.manifest)
        return raw, _media_type(raw)

    @contextmanager
    def blob(self, repository: Repository, descriptor: Descriptor) -> Iterator[Stream]:
        what = f"blob {descriptor.digest} of {self._path}"
        with closing(_File(self._open_blob(descriptor.digest), what)) as file:
            yield VerifiedReader(file, descriptor.digest, descriptor.size, what)

    def is_public(self, repository: Repository, digest: Digest) -> bool:
        """Always: who named the directory decided that what is in it may be published."""
        return True

    def _entries(self) -> list[tuple[str | None, Any]]:
        """The tag, if any, and the descriptor of each manifest that index.json names."""
        raw = self._read("index.json", self._limits.manifest)
        try:
            manifests = json.loads(raw)["manifests"]
            if not isinstance(manifests, list):
                raise TypeError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ImageError(f"{self._path}: index.json is not an image index") from None
        found: list[tuple[str | None, Any]] = []
        for entry in manifests:
            annotations = entry.get("annotations") if isinstance(entry, dict) else None
            tag = annotations.get(REF_NAME) if isinstance(annotations, dict) else None
            found.append((tag if isinstance(tag, str) else None, entry))
        return found

    def _read_blob(self, digest: Digest, limit: int) -> bytes:
        what = f"{self._path}: blob {digest}"
        with closing(_File(self._open_blob(digest), what)) as file:
            return digest.check(file.read_whole(limit), what)

    def _read(self, name: str, limit: int) -> bytes:
        with closing(_File(self._open(name), f"{self._path}: {name}")) as file:
            return file.read_whole(limit)

    def _open_blob(self, digest: Digest) -> int:
        return self._open(os.path.join("blobs", digest.algorithm, digest.hex))

    def _open(self, name: str) -> int:
        """A descriptor of a regular file below the layout, no component of `name` being a symlink."""
        what = f"{self._path}: {name}"
        try:
            # The operator's own path may well lead through symlinks.
            directory = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                *parents, last = name.split(os.sep)
                for parent in parents:
                    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
                    below = os.open(parent, flags, dir_fd=directory)
                    os.close(directory)
                    directory = below
                # Without O_NONBLOCK a FIFO put there would hold us up for ever.
                flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
                file = os.open(last, flags, dir_fd=directory)
            finally:
                os.close(directory)
        except FileNotFoundError:
            raise NotFound(f"{what}: no such file in this image layout") from None
        except OSError as error:
            raise RegistryError(f"{what}: {error.strerror}") from None
        if not stat.S_ISREG(os.fstat(file).st_mode):
            os.close(file)
            raise RegistryError(f"{what}: not a regular file")
        return file


class _File:
    """An open file as a Stream, its errors told as the layout's."""

    def __init__(self, descriptor: int, what: str) -> None:
        self._descriptor = descriptor
        self._what = what

    def close(self) -> None:
        os.close(self._descriptor)

    def read(self, size: int, /) -> bytes:
        try:
            return os.read(self._descriptor, size)
        except OSError as error:
            raise RegistryError(f"{self._what}: {error.strerror}") from None

    def read_whole(self, limit: int) -> bytes:
        if os.fstat(self._descriptor).st_size > limit:
            raise ImageError(f"{self._what}: longer than the limit of {limit} bytes")
        pieces = []
        while piece := self.read(limit + 1):
            pieces.append(piece)
            if sum(map(len, pieces)) > limit:
                raise ImageError(f"{self._what}: longer than the limit of {limit} bytes")
        return b"".join(pieces)


def _media_type(raw: bytes) -> str:
    """The media type that a document gives itself; "" leaves it to its fields."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return ""  # whoever parses it will say what is wrong with it
    declared = value.get("mediaType") if isinstance(value, dict) else None
    return declared if isinstance(declared, str) else ""

"""The cache of read layers: changesets on local disk, keyed by blob digest, diff ID and the rules they were read under.

A changeset found here spares reading the layer again, if the target still has the files it names. May be deleted at
any time.
"""

from __future__ import annotations

import os
import time

from unpacker.changeset import HEAD, Changeset, written_size
from unpacker.image import Layer

_SUFFIX = ".changeset"


class ChangesetCache:
    """Changesets below `<state>/<target>/changesets/<rules>/`. Safe from many threads and processes."""

    def __init__(self, directory: str, rules: str) -> None:
        self._directory = os.path.join(directory, "changesets", rules)

    def has(self, layer: Layer) -> bool:
        """Whether it is worth while to `get` it."""
        return os.path.exists(self._path(layer))

    def size(self, layer: Layer) -> int:
        """How long the layer's changeset is, written out; 0 if it is not at hand."""
        try:
            with open(self._path(layer), "rb") as file:
                return written_size(file.read(HEAD))
        except OSError:
            return 0

    def get(self, layer: Layer) -> Changeset | None:
        """The layer's changeset if it is at hand and undamaged."""
        path = self._path(layer)
        try:
            with open(path, "rb") as file:
                changeset = Changeset.decode(file.read())
            os.utime(path)
        except (OSError, ValueError):
            return None
        return changeset if changeset.diff_id == layer.diff_id else None

    def put(self, layer: Layer, encoded: bytes) -> None:
        """Keeps an encoded changeset; a full or read-only disk costs time only, so it is no error."""
        path = self._path(layer)
        temporary = f"{path}.{os.getpid()}"
        try:
            os.makedirs(self._directory, exist_ok=True)
            with open(temporary, "wb") as file:
                file.write(encoded)
            os.replace(temporary, path)
        except OSError:
            return

    def _path(self, layer: Layer) -> str:
        return os.path.join(self._directory, layer.key + _SUFFIX)


def prune(directory: str, *, unused_for: float) -> int:
    """Deletes changesets (of whatever rules) not used for so many seconds; gives the bytes freed."""
    freed = 0
    horizon = time.time() - unused_for
    for parent, _, names in os.walk(os.path.join(directory, "changesets")):
        for name in names:
            path = os.path.join(parent, name)
            try:
                status = os.stat(path)
                if status.st_mtime < horizon:
                    os.unlink(path)
                    freed += status.st_size
            except FileNotFoundError:
                continue
    return freed

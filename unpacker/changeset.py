"""One layer as metadata: Entry and Changeset. The files' bytes are in a ContentStore, named by token.

OCI image specification, `layer.md`: a layer is a changeset of additions, modifications and removals (whiteouts).
Paths are `str` with surrogateescape, relative, normalised, without `.` and `..`; the root itself is `""`.
"""

from __future__ import annotations

import enum
import json
from dataclasses import dataclass
from typing import NamedTuple

import zstandard

_FORMAT = 1

Xattrs = tuple[tuple[str, bytes], ...]
"""Extended attributes, sorted by name."""


class Kind(enum.StrEnum):
    """What an entry is; the letters are those of `find -type`, hard links apart."""

    FILE = "f"
    DIRECTORY = "d"
    SYMLINK = "l"
    HARDLINK = "h"
    CHARACTER = "c"
    BLOCK = "b"
    FIFO = "p"


class Change(enum.IntFlag):
    """What the publishing policy altered in an entry, so that it can be counted in the published tree."""

    NONE = 0
    MODE = 1
    """Made readable for all."""
    SETID = 2
    """Set-uid or set-gid bit dropped."""
    XATTR = 4
    """At least one extended attribute dropped."""
    OWNER = 8
    """Owner replaced by the publishing user, who may not give files away."""
    TIME = 16
    """Modification time moved to the nearest that file systems can hold."""


class Entry(NamedTuple):
    """One entry of a layer. A NamedTuple, because an image has up to millions of them.

    `mode` has permission bits only; `target` is the target of a symbolic or (as a path of the image) hard link;
    `device` is (major, minor); `token` names the bytes of a file in its ContentStore.
    """

    path: str
    kind: Kind
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    size: int = 0
    target: str = ""
    device: tuple[int, int] = (0, 0)
    xattrs: Xattrs = ()
    token: str = ""
    change: Change = Change.NONE


@dataclass(frozen=True, slots=True, kw_only=True)
class Changeset:
    """The entries of one layer in the order of its tar, its whiteouts and its opaque directories.

    `whiteouts` are the paths they hide (without `.wh.`), `opaque` the directories whose lower contents they hide.
    `size` is the length of the uncompressed tar, `content_size` the sum of all file sizes.
    """

    diff_id: str
    entries: tuple[Entry, ...]
    whiteouts: tuple[str, ...] = ()
    opaque: tuple[str, ...] = ()
    size: int = 0
    content_size: int = 0

    def encode(self) -> bytes:
        """For the cache and for other processes: zstd of JSON, so that nothing read back can execute."""
        # A kind is its text, and a change its number: an entry is a row as it is, unless it has bytes.
        rows = [
            (*e[:9], [(name, value.hex()) for name, value in e.xattrs], *e[10:]) if e.xattrs else e
            for e in self.entries
        ]
        head = (_FORMAT, self.diff_id, self.whiteouts, self.opaque, self.size, self.content_size)
        return zstandard.ZstdCompressor(level=1).compress(json.dumps((head, rows)).encode("ascii"))

    @classmethod
    def decode(cls, data: bytes) -> Changeset:
        """Reads `encode`'s bytes; ValueError for any others."""
        try:
            with zstandard.ZstdDecompressor().stream_reader(data) as reader:
                head, rows = json.loads(reader.read())
            version, diff_id, whiteouts, opaque, size, content_size = head
            if version != _FORMAT:
                raise ValueError(f"changeset of format {version}")
            kinds = {str(k): k for k in Kind}
            changes = {bits: Change(bits) for bits in range(32)}
            no_device = (0, 0)
            entries = tuple(
                [
                    # As Entry(…), at half its price.
                    Entry._make(
                        (
                            path,
                            kinds[kind],
                            mode,
                            uid,
                            gid,
                            mtime_ns,
                            length,
                            target,
                            no_device if device == [0, 0] else (device[0], device[1]),
                            tuple([(name, bytes.fromhex(value)) for name, value in xattrs]) if xattrs else (),
                            token,
                            changes[change],
                        )
                    )
                    for path, kind, mode, uid, gid, mtime_ns, length, target, device, xattrs, token, change in rows
                ]
            )
            return cls(
                diff_id=diff_id,
                entries=entries,
                whiteouts=tuple(whiteouts),
                opaque=tuple(opaque),
                size=size,
                content_size=content_size,
            )
        except (zstandard.ZstdError, TypeError, KeyError, IndexError, RecursionError) as error:
            raise ValueError(f"not a changeset: {error}") from None


HEAD = 18
"""How many bytes of an encoded changeset `written_size` needs: the longest header of a zstd frame."""


def written_size(encoded: bytes) -> int:
    """How long an encoded changeset is before it is compressed, from its first bytes; 0 for any others."""
    try:
        return max(0, zstandard.frame_content_size(encoded))
    except zstandard.ZstdError:
        return 0

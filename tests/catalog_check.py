"""What `cvmfs_swissknife check` looks at in catalogs, counted again from the raw database of each."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import struct
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from unpacker.cvmfs.hash import ContentHash
from unpacker.cvmfs.objects import ObjectStore

COUNTERS = ("regular", "symlink", "special", "dir", "nested", "chunked", "chunks", "file_size", "chunked_size")
COUNTERS += ("xattr", "external", "external_file_size")
SELECTION = (
    "md5path_1, md5path_2, parent_1, parent_2, hardlinks, hash, size, mode, mtime, mtimens, flags,"
    " CAST(name AS BLOB), CAST(symlink AS BLOB), uid, gid, xattr"
)


def path_key(path: bytes) -> tuple[int, int]:
    first, second = struct.unpack("<qq", hashlib.md5(path).digest())
    return first, second


def database(data: bytes) -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:")
    connection.deserialize(data)
    return connection


@contextmanager
def new_store() -> Iterator[ObjectStore]:
    """A store for many tests, because each has 256 directories; in memory where the system has that, because every
    batch waits for the disk."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as path:
        yield ObjectStore.create(f"{path}/repository")


def check(objects: ObjectStore, root: ContentHash) -> list[str]:
    """Everything wrong with the catalogs of a repository, in words; nothing is wrong if the list is empty."""
    problems: list[str] = []
    data = objects.read(root, "C")
    _catalog(objects, data, b"", None, problems)
    return problems


def _catalog(
    objects: ObjectStore, data: bytes, prefix: bytes, transition: tuple[object, ...] | None, problems: list[str]
) -> Counter[str]:
    """Checks one catalog and those below it; gives the sum of all their own counters."""

    def wrong(what: str) -> None:
        problems.append(f"{prefix.decode(errors='replace')}: {what}")

    db = database(data)
    if db.execute("PRAGMA integrity_check").fetchone() != ("ok",):
        wrong("not sound")
    properties = dict(db.execute("SELECT key, CAST(value AS BLOB) FROM properties"))
    if properties.get("root_prefix", b"") != prefix:
        wrong(f"root_prefix is {properties.get('root_prefix')!r}")
    if (properties["schema"], properties["schema_revision"]) != (b"2.5", b"7"):
        wrong("schema")
    columns = {name for _, name, *_ in db.execute("PRAGMA table_info(catalog)")}
    selection = SELECTION if "mtimens" in columns else SELECTION.replace("mtimens", "NULL")
    rows = {row[:2]: row for row in db.execute(f"SELECT {selection} FROM catalog")}
    types = set(db.execute("SELECT typeof(name), typeof(symlink) FROM catalog"))
    if types != {("text", "text")}:
        wrong(f"types of texts are {types}")
    listings: dict[tuple[int, int], list[tuple[int, ...]]] = {}
    for row in rows.values():
        listings.setdefault(row[2:4], []).append(row)
    nested = {
        path: (text, size)
        for path, text, size in db.execute("SELECT CAST(path AS BLOB), sha1, size FROM nested_catalogs")
    }
    chunks: dict[tuple[int, int], list[tuple[int, int, bytes]]] = {}
    for first, second, *chunk in db.execute("SELECT * FROM chunks ORDER BY offset"):
        chunks.setdefault((first, second), []).append(tuple(chunk))
    own: Counter[str] = Counter(nested=len(nested), chunks=sum(map(len, chunks.values())))
    below: Counter[str] = Counter()
    top = rows.get(path_key(prefix))
    if top is None:
        wrong("no row of its root")
        return own
    if top[2:4] != ((0, 0) if not prefix else path_key(prefix.rpartition(b"/")[0])):
        wrong("parent of the root")
    if top[10] != (33 if prefix else 1):
        wrong(f"flags of the root are {top[10]}")
    if transition is not None and (top[:10], top[11:]) != (transition[:10], transition[11:]):
        wrong("the transition point differs from the root")
    seen, mounts = 1, 0
    pending = [(prefix, top)]
    while pending:
        path, row = pending.pop()
        hardlinks, digest, size, mode, _, _, flags, name, symlink, _, _, xattr = row[4:]
        own["xattr"] += xattr is not None
        if path and name != path.rpartition(b"/")[2]:
            wrong(f"name of {path!r} is {name!r}")
        if flags & 1:
            own["dir"] += 1
            if digest is not None or mode >> 12 != 0o04 or symlink or hardlinks >> 32:
                wrong(f"directory {path!r}")
            children = listings.get(row[:2], [])
            if flags & 2:
                mounts += 1
                if children:
                    wrong(f"mount point {path!r} has children here")
                text, announced = nested[path]
                child = objects.read(ContentHash.parse(text), "C")
                if len(child) != announced:
                    wrong(f"size of the catalog of {path!r}")
                below += _catalog(objects, child, path, row, problems)
                continue
            if hardlinks != 2 + sum(child[10] & 1 for child in children):
                wrong(f"link count of {path!r} is {hardlinks}")
            is_marked = any(child[11] == b".cvmfscatalog" for child in children)
            if is_marked != (path == prefix and path != b""):
                wrong(f"marker of {path!r}")
            seen += len(children)
            pending.extend((path + b"/" + child[11], child) for child in children)
        elif flags & 8:
            own["symlink"] += 1
            if flags != 12 or digest is not None or mode != 0o120777 or size != len(symlink) or not symlink:
                wrong(f"symlink {path!r}")
        elif flags & 16:
            own["special"] += 1
            if flags != 20 or digest is not None or symlink or (mode >> 12 == 0o01 and size):
                wrong(f"special {path!r}")
        else:
            own["regular"] += 1
            own["file_size"] += size
            pieces = chunks.get(row[:2], [])
            if flags & 64:
                own["chunked"] += 1
                own["chunked_size"] += size
                at = 0
                for offset, length, _ in pieces:
                    if offset != at or length <= 0:
                        wrong(f"chunks of {path!r}")
                    at += length
                if at != size:
                    wrong(f"size of the chunks of {path!r}")
            if bool(pieces) != bool(flags & 64) or (digest is None) != bool(pieces) or mode >> 12 != 0o10:
                wrong(f"file {path!r}")
        if not flags & 1 and not hardlinks & 0xFFFFFFFF:
            wrong(f"links of {path!r}")
    if seen != len(rows):
        wrong(f"{len(rows)} rows, of which {seen} can be reached")
    if mounts != len(nested):
        wrong(f"{len(nested)} nested catalogs at {mounts} mount points")
    (last,) = db.execute("SELECT max(rowid) FROM catalog").fetchone()
    if last - len(rows) > len(rows) // 4:
        wrong("row numbers have gaps")
    counters = dict(db.execute("SELECT counter, value FROM statistics"))
    for kind, tally in (("self", own), ("subtree", below)):
        for name in COUNTERS:
            value = counters.pop(f"{kind}_{name}", None)
            if value != tally[name]:
                wrong(f"{kind}_{name} is {value} instead of {tally[name]}")
    if counters:
        wrong(f"foreign counters {sorted(counters)}")
    return own + below

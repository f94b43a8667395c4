"""A small sound repository with one of everything, and ways to break one thing in it and leave all others right.

Catalogs that are changed are hashed, linked and counted again up to the manifest, which is signed and listed again.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import struct
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from tests.cvmfs_repositories import NAME, NOW, open_again
from unpacker.changeset import Kind as NodeKind
from unpacker.cvmfs import deflation, files, manifest, objects, reflog
from unpacker.cvmfs.compose import Composition
from unpacker.cvmfs.edit import Change, edit
from unpacker.cvmfs.hash import ContentHash
from unpacker.cvmfs.manifest import Manifest
from unpacker.cvmfs.reflog import Kind, Ref, Reflog
from unpacker.cvmfs.repository import Repository
from unpacker.cvmfs.transaction import transaction
from unpacker.tree import Directory, File, Node, Special, Symlink

Break = Callable[[sqlite3.Connection], object]

_OWN = (
    ("regular", "SELECT count(*) FROM catalog WHERE flags & 4 AND NOT flags & 24"),
    ("symlink", "SELECT count(*) FROM catalog WHERE flags & 8"),
    ("special", "SELECT count(*) FROM catalog WHERE flags & 16"),
    ("dir", "SELECT count(*) FROM catalog WHERE flags & 1"),
    ("nested", "SELECT count(*) FROM nested_catalogs"),
    ("chunked", "SELECT count(*) FROM catalog WHERE flags & 64"),
    ("chunks", "SELECT count(*) FROM chunks"),
    ("file_size", "SELECT coalesce(sum(size), 0) FROM catalog WHERE flags & 4 AND NOT flags & 24"),
    ("chunked_size", "SELECT coalesce(sum(size), 0) FROM catalog WHERE flags & 64"),
    ("xattr", "SELECT count(*) FROM catalog WHERE xattr IS NOT NULL"),
)


def file(repository: Repository, data: bytes, *, xattrs: tuple[tuple[str, bytes], ...] = ()) -> File:
    name = repository.objects.put(deflation.dense(data))
    return File(0o644, 0, 0, 0, xattrs, len(data), f"z:{name.hex}")


def chunked(repository: Repository, *pieces: bytes) -> File:
    names = [repository.objects.put(deflation.dense(piece), "P") for piece in pieces]
    token = ",".join(f"{name.hex}@{len(piece)}" for name, piece in zip(names, pieces, strict=True))
    return File(0o644, 0, 0, 0, (), sum(map(len, pieces)), f"zc:{token}")


def directory(**children: Node) -> Directory:
    return Directory(0o755, 0, 0, 0, (), children)


def link(target: str) -> Symlink:
    return Symlink(0o777, 0, 0, 0, (), target)


def publish_tree(repository: Repository, changes: Mapping[str, Change], now: int, **arguments: Any) -> Manifest:
    """One revision in which these paths stand as they say; `/nested` and `/nested/deep` are catalogs of their own."""
    with transaction(repository, now=now) as within:
        edited = edit(
            repository.objects,
            within.base.root,
            changes,
            Composition(last_modified=now),
            catalogs=lambda path: path in ("nested", "nested/deep"),
        )
        return within.publish(edited.root, edited.size, now=now, **arguments)


def one_of_everything(path: str) -> Repository:
    """A sound repository of three catalogs, its keys beside it."""
    repository = open_again(Repository.create(path, NAME, days=3650, now=NOW))
    same = file(repository, b"linked")
    fifo = Special(0o644, 0, 0, 0, (), NodeKind.FIFO, (0, 0))
    device = Special(0o644, 0, 0, 0, (), NodeKind.CHARACTER, (1, 3))
    changes: dict[str, Change] = {
        "/d": directory(
            whole=file(repository, b"whole", xattrs=(("user.x", b"1"),)),
            empty=file(repository, b""),
            chunked=chunked(repository, b"abc", b"de"),
            one=same,
            two=same,
            link=link("whole"),
            fifo=fifo,
            device=device,
            inner=directory(deeper=directory()),
        ),
        "/nested": directory(f=file(repository, b"in nested"), d=directory(g=file(repository, b"g"))),
        "/nested/deep": directory(h=file(repository, b"in deep"), l=link("h")),
    }
    publish_tree(repository, changes, NOW + 100, tags={"named": "a tag"})
    grouped = f"UPDATE catalog SET hardlinks = {1 << 32 | 2} WHERE name IN ('one', 'two')"
    rebuild(repository, {"": lambda db: db.execute(grouped)})
    data = b'{"administrator": "somebody"}'
    sign(repository, meta_info=repository.store(data, objects.META_INFO))
    for name in os.listdir(f"{path}/data"):
        if name != "txn" and not os.listdir(f"{path}/data/{name}"):
            os.rmdir(f"{path}/data/{name}")  # Copies are made of it again and again.
    return repository


def rebuild(repository: Repository, breaks: Mapping[str, Break], *, recount: bool = True) -> None:
    """Changes catalogs by their mount points; what comes of it takes the place of what is published, tags and all."""
    old = repository.manifest()
    assert old.history is not None
    name, size, _ = _rebuilt(repository, "", old.root, breaks, recount)
    tags = database(repository.objects.read(old.history, objects.HISTORY))
    tags.execute("UPDATE tags SET hash = ?, size = ? WHERE hash = ?", (name.hex, size, old.root.hex))
    history = repository.store(tags.serialize(), objects.HISTORY)
    write_log(repository, log_of(repository).without({old.root, old.history} - {name, history}))
    sign(repository, root=name, root_size=size, history=history)


def sign(repository: Repository, *, listed: bool = True, **changes: Any) -> None:
    """Publishes the manifest with other fields, and what they name in the reference log."""
    assert repository.key is not None
    following = replace(repository.manifest(), **changes)
    log = log_of(repository)
    kinds = {
        "root": Kind.CATALOG,
        "history": Kind.HISTORY,
        "meta_info": Kind.META_INFO,
        "certificate": Kind.CERTIFICATE,
    }
    if listed:
        log = log.with_refs(Ref(changes[name], kind, NOW + 200) for name, kind in kinds.items() if changes.get(name))
        repository.write(reflog.FILE, log.data)
        if "reflog" not in changes:
            following = replace(following, reflog=log.checksum(repository.algorithm))
    repository.write(manifest.FILE, following.sealed(repository.key))


def write_log(repository: Repository, log: Reflog) -> None:
    """Puts another reference log in place, and its hash in the manifest."""
    repository.write(reflog.FILE, log.data)
    sign(repository, listed=False, reflog=log.checksum(repository.algorithm))


def log_of(repository: Repository) -> Reflog:
    return Reflog(NAME, files.read(f"{repository.directory}/{reflog.FILE}", reflog.LIMIT))


def at(path: str) -> str:
    """The condition that selects the row of a path, or its chunks."""
    return "md5path_1 = {} AND md5path_2 = {}".format(*path_key(path))


def below(path: str) -> str:
    """The condition that selects what is directly in a directory."""
    return "parent_1 = {} AND parent_2 = {}".format(*path_key(path))


def path_key(path: str) -> tuple[int, int]:
    first, second = struct.unpack("<qq", hashlib.md5(path.encode()).digest())
    return first, second


def sql(*statements: str) -> Break:
    """Runs statements, each of which must change a row."""

    def run(db: sqlite3.Connection) -> None:
        for statement in statements:
            assert db.execute(statement).rowcount > 0, statement

    return run


def insert(path: str, **columns: object) -> str:
    """A row like that of an empty file."""
    parent, _, name = path.rpartition("/")
    values: dict[str, object] = {
        "hardlinks": 1,
        "hash": f"X'{ContentHash.of(deflation.EMPTY).hex}'",
        "size": 0,
        "mode": 0o100644,
        "mtime": 0,
        "flags": 4,
        "name": f"'{name}'",
        "symlink": "''",
        "uid": 0,
        "gid": 0,
    } | columns
    own, above = path_key(path), path_key(parent)
    names = ("md5path_1", "md5path_2", "parent_1", "parent_2", *values)
    return f"INSERT INTO catalog ({', '.join(names)}) VALUES {(*own, *above)}".removesuffix(")") + (
        f", {', '.join(map(str, values.values()))})"
    )


def database(data: bytes) -> sqlite3.Connection:
    db = sqlite3.connect(":memory:", isolation_level=None)
    db.deserialize(data)
    return db


def _rebuilt(
    repository: Repository, path: str, name: ContentHash, breaks: Mapping[str, Break], recount: bool
) -> tuple[ContentHash, int, dict[str, int]]:
    """The new hash and size of a catalog, and the sum of the counters of it and of all below it."""
    db = database(repository.objects.read(name, objects.CATALOG))
    total: dict[str, int] = {counter: 0 for counter, _ in _OWN}
    for inner, text in db.execute("SELECT path, sha1 FROM nested_catalogs").fetchall():
        hash, size, counted = _rebuilt(repository, inner, ContentHash.parse(text), breaks, recount)
        db.execute("UPDATE nested_catalogs SET sha1 = ?, size = ? WHERE path = ?", (hash.hex, size, inner))
        total = {counter: total[counter] + counted[counter] for counter in total}
    if path in breaks:
        breaks[path](db)
    for counter, query in _OWN:
        (own,) = db.execute(query).fetchone()
        if recount:
            for kind, value in (("self", own), ("subtree", total[counter])):
                db.execute("UPDATE statistics SET value = ? WHERE counter = ?", (value, f"{kind}_{counter}"))
        total[counter] += own
    data = db.serialize()
    db.close()
    return repository.store(data, objects.CATALOG), len(data), total

"""Garbage of a repository that is written to through `cvmfs_server`: roots without a name, and the local pool.

Roots go in a transaction of their own. Their objects are the official tools' to delete, which keep what older revisions
need; the pool of contents is a cache, and keeps what a layer read before would give again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from unpacker import logs
from unpacker.changeset import Changeset
from unpacker.errors import PublishError
from unpacker.gc import Collected, judge
from unpacker.publish import posix
from unpacker.publish.pool import pool_path
from unpacker.publish.server import LocalContents, ServerPublisher

log = logs.Log()

_YOUNG = 86_400
"""Seconds for which contents stay that no layer is known to have: a run may just have stored them."""


def collect(
    publisher: ServerPublisher, state: str, *, grace: float, keep: float, now: float, dry_run: bool
) -> Collected:
    """Removes roots that have been without a name for more than `grace` seconds, under the lock; then lets
    `cvmfs_server gc` collect revisions older than `keep` seconds, where it may. `state` has the cache of read layers.

    `dry_run` writes nothing. PublishError if anything cannot be read that may refer to a root.
    """
    published = publisher.server.published(publisher.subdirectory)
    assert published == publisher.layout.path
    if dry_run:
        due = judge(publisher.layout, grace=grace, now=now, known_as=publisher.path)
        contents, freed = _prune(publisher.contents, state, now, dry_run=True)
    else:
        with publisher.lock():
            due = judge(publisher.layout, grace=grace, now=now, known_as=publisher.path)
            if due.roots or due.records or due.waiting != due.recorded:
                with publisher.transaction(f"gc of {len(due.roots)} roots") as transaction:
                    transaction.drop(due.roots, due.records, due.waiting)
            contents, freed = _prune(publisher.contents, state, now, dry_run=False)
            _collect_objects(publisher, int(now - keep))
    return Collected(
        roots=tuple(due.roots),
        waiting=len(due.waiting),
        contents=contents,
        freed=freed,
        records=tuple(due.records),
    )


def _collect_objects(publisher: ServerPublisher, before: int) -> None:
    server = publisher.server
    if server.is_gateway:
        log.info("objects are collected on the gateway, by cvmfs_server gc", repository=server.name)
    elif not server.is_collectable:
        log.info("objects stay: CVMFS_GARBAGE_COLLECTION is not true", repository=server.name)
    else:
        publisher.session.collect(before)


def _prune(contents: LocalContents, state: str, now: float, *, dry_run: bool) -> tuple[int, int]:
    """Deletes contents that no cached layer names; gives their number and bytes."""
    needed = set(_needed(state))
    count = freed = 0
    try:
        for path, own in _stored(contents):
            name = "/".join(path.split("/")[-2:])
            if name not in needed and own.st_ctime < now - _YOUNG:
                if not dry_run:
                    os.unlink(path)
                count += 1
                freed += own.st_blocks * 512
    except OSError as error:
        raise posix.failure(error, f"clearing the pool of contents in {contents.root}") from error
    return count, freed


def _stored(contents: LocalContents) -> Iterator[tuple[str, os.stat_result]]:
    for parent, _, names in os.walk(contents.directory):
        for name in names:
            yield f"{parent}/{name}", os.stat(f"{parent}/{name}", follow_symlinks=False)


def _needed(state: str) -> Iterator[str]:
    for parent, _, names in os.walk(f"{state}/changesets"):
        for name in names:
            try:
                with open(f"{parent}/{name}", "rb") as file:
                    changeset = Changeset.decode(file.read())
            except (OSError, ValueError):
                continue  # What cannot be read will not be recalled either.
            for entry in changeset.entries:
                try:
                    yield pool_path(entry.token)
                except PublishError:
                    continue  # A file that the fast way stored, or nothing that has contents.

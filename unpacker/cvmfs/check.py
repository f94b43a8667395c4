"""Checks a whole repository, native or of the official tools: what they check, from the signature to the last row.

    manifest and its certificate, whitelist → meta info → reference log → history → the tree (see `check_tree`)

With `hashes` also the bytes of every object and how the store is laid out (see `scrub`). Needs no key and no lock;
what somebody publishes or collects meanwhile may show as a problem, so that who can hold the lock should.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

from unpacker.cvmfs import database, files, manifest, objects, reflog
from unpacker.cvmfs import spool as spools
from unpacker.cvmfs import whitelist as whitelists
from unpacker.cvmfs.check_tree import Problem, check_tree
from unpacker.cvmfs.hash import ContentHash
from unpacker.cvmfs.history import History
from unpacker.cvmfs.keys import Certificate, PublicKey
from unpacker.cvmfs.manifest import Manifest
from unpacker.cvmfs.objects import ObjectStore
from unpacker.cvmfs.reflog import Kind, Reflog
from unpacker.cvmfs.repository import published_bytes
from unpacker.cvmfs.scrub import scrub
from unpacker.cvmfs.signing import LIMIT, Letter
from unpacker.cvmfs.spool import Spool
from unpacker.cvmfs.whitelist import Whitelist
from unpacker.errors import PublishError

_SMALL_LIMIT = 1 << 20
_ALTERNATIVE = ".cvmfsalt-"


def check(
    directory: str,
    *,
    now: float,
    hashes: bool = False,
    public_key: PublicKey | None = None,
    spool_root: str = spools.SPOOLS,
    configuration: str = spools.CONFIGURATION,
) -> Iterator[Problem]:
    """Everything wrong with the repository in a directory, as it is found; nothing if it is sound at `now`.

    The whitelist's signature is verified if the master key's public half is given. Holds one catalog at a time in
    memory. PublishError only where no repository is at all.
    """
    path = f"{directory}/{manifest.FILE}"
    if not os.path.isdir(f"{directory}/data"):
        raise PublishError(f"there is no repository in {directory}: mount it, or look at the target's path")
    try:
        letter = Letter.parse(published_bytes(directory), path)
        found = Manifest.parse(letter, path)
    except PublishError as error:
        yield Problem(manifest.FILE, str(error))
        return
    store = ObjectStore(directory, found.root.algorithm)
    yield from _trust(store, letter, found, now, public_key)
    yield from _meta_info(store, found)
    yield from _reflog(directory, found, spool_root, configuration)
    yield from _history(store, found)
    yield from _alternatives(directory, found)
    yield from check_tree(store, found.root, found.root_size, revision=found.revision)
    if hashes:
        yield from scrub(directory)


def _trust(
    store: ObjectStore, letter: Letter, found: Manifest, now: float, public_key: PublicKey | None
) -> Iterator[Problem]:
    certificate = None
    try:
        what = f"the certificate {found.certificate}"
        certificate = Certificate.parse(store.read(found.certificate, objects.CERTIFICATE, limit=_SMALL_LIMIT), what)
        certificate.verify(letter, "it")
    except PublishError as error:
        yield Problem(manifest.FILE, str(error))
    try:
        data = _read(f"{store.root}/{whitelists.FILE}", LIMIT)
        if data is None:
            raise PublishError("there is none, so that no client can mount the repository: run unpacker resign")
        whitelist = Whitelist.parse(data, "it", key=public_key)
    except PublishError as error:
        yield Problem(whitelists.FILE, str(error))
        return
    if whitelist.name != found.name:
        yield Problem(whitelists.FILE, f"it is of {whitelist.name!a}, where the manifest is of {found.name!a}")
    if whitelist.issued > whitelist.expires:
        yield Problem(whitelists.FILE, "it expires before it was issued")
    if whitelist.expires <= now:
        yield Problem(whitelists.FILE, f"it expired {-whitelist.days_left(int(now))} days ago: run unpacker resign")
    if certificate is not None and not whitelist.admits(certificate):
        yield Problem(whitelists.FILE, f"it does not admit the certificate {found.certificate} of the manifest")


def _meta_info(store: ObjectStore, found: Manifest) -> Iterator[Problem]:
    if found.meta_info is None:
        return
    try:
        json.loads(store.read(found.meta_info, objects.META_INFO, limit=_SMALL_LIMIT))
    except PublishError as error:
        yield Problem("meta info", str(error))
    except (ValueError, RecursionError) as error:
        yield Problem("meta info", f"object {found.meta_info} is not JSON: {error}")


def _reflog(directory: str, found: Manifest, spool_root: str, configuration: str) -> Iterator[Problem]:
    try:
        data = _read(f"{directory}/{reflog.FILE}", reflog.LIMIT)
        expected = _checksum(directory, found, spool_root, configuration)
        if data is None:
            if expected is not None:
                yield Problem(reflog.FILE, "there is none; the next publish makes it anew")
            return
        log = Reflog(found.name, data, "it")
        if expected is None:
            yield Problem(reflog.FILE, "nothing says which hash it has to have; the next publish does")
        elif log.checksum(expected.algorithm) != expected:
            yield Problem(reflog.FILE, f"its hash is not {expected}, as it has to be; the next publish mends that")
        listed = {ref.hash: ref.kind for ref in log.refs()}
    except PublishError as error:
        yield Problem(reflog.FILE, str(error))
        return
    for name, kind in (
        (found.root, Kind.CATALOG),
        (found.certificate, Kind.CERTIFICATE),
        (found.history, Kind.HISTORY),
        (found.meta_info, Kind.META_INFO),
    ):
        if name is not None and listed.get(name) is not kind:
            what = kind.name.lower().replace("_", " ")
            yield Problem(reflog.FILE, f"it does not list the {what} {name}, which is published")


def _checksum(directory: str, found: Manifest, spool_root: str, configuration: str) -> ContentHash | None:
    """What the reference log must have: the official tools' word, where they have one, goes before the manifest's."""
    try:
        spool = Spool.find(directory, found.name, spools=spool_root, configuration=configuration)
    except PublishError:
        spool = Spool(f"{spool_root}/{found.name}")  # Of a replica, which can be checked like any other.
    return (spool and spool.checksum()) or found.reflog


def _history(store: ObjectStore, found: Manifest) -> Iterator[Problem]:
    if found.history is None:
        return
    where = "history"
    try:
        data = store.read(found.history, objects.HISTORY, limit=reflog.LIMIT)
        what = f"object {found.history}"
        tags = History(found.name, data, what).tags()
        with database.opened(data, what, ("branches",)) as connection:
            rows = connection.execute("SELECT branch, parent, initial_revision FROM branches").fetchall()
        branches: dict[str, tuple[str | None, int]] = {}
        for branch, parent, start in rows:
            if not isinstance(branch, str) or not isinstance(parent, str | None) or type(start) is not int:
                raise PublishError(f"{what}: a malformed branch {str(branch)[:100]!a}")
            branches[branch] = (parent, start)
    except PublishError as error:
        yield Problem(where, str(error))
        return
    for branch, (parent, _) in branches.items():
        if (parent is None) is not (branch == "") or (parent is not None and parent not in branches):
            yield Problem(where, f"the branch {branch!a} has no valid parent")
    for branch in sorted(branches.keys() - {tag.branch for tag in tags}):
        yield Problem(where, f"no tag is on the branch {branch!a}")
    for tag in tags:
        if tag.branch not in branches:
            yield Problem(where, f"the tag {tag.name!a} is on the branch {tag.branch!a}, which there is not")
        elif tag.revision < branches[tag.branch][1]:
            yield Problem(where, f"the tag {tag.name!a} is older than its branch {tag.branch!a}")
        try:
            if not store.has(tag.root, objects.CATALOG):
                yield Problem(where, f"the tag {tag.name!a} is on a revision whose root catalog {tag.root} is missing")
        except PublishError as error:
            yield Problem(where, str(error))


def _alternatives(directory: str, found: Manifest) -> Iterator[Problem]:
    if not found.alternative_paths:
        return
    for name, suffix in ((found.root, objects.CATALOG), (found.certificate, objects.CERTIFICATE)):
        link = f"{_ALTERNATIVE}{name}{suffix}"
        if not os.path.exists(f"{directory}/{link}"):
            yield Problem(link, "the alternative path that the manifest promises is missing, or leads nowhere")


def _read(path: str, limit: int) -> bytes | None:
    """All of a file, or None if there is none."""
    try:
        data = files.read(path, limit)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise PublishError(f"it cannot be read: {error.strerror}") from error
    if len(data) > limit:
        raise PublishError(f"it is longer than {limit} bytes")
    return data

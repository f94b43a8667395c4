"""From settings and flags to the objects of a run: which publisher, which registry, whose wishlist."""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from unpacker import journal
from unpacker.contracts import Registry
from unpacker.errors import PublishError, SettingsError, WishlistError
from unpacker.oci import Descriptor
from unpacker.publish.directory import DirectoryPublisher
from unpacker.readers import DirectoryReader, Reader, RepositoryReader, check
from unpacker.record import Published, Unreadable
from unpacker.reference import Reference
from unpacker.registry.client import Access
from unpacker.registry.layout import Layout
from unpacker.rootfs import Policy
from unpacker.settings import Settings, wishlist_identity
from unpacker.survey import Request
from unpacker.verify import Problem, verify
from unpacker.wishlist import Wishlist

if TYPE_CHECKING:
    # Signatures and catalogs take a tenth of a second to import, which who has a directory as target does not pay.
    from unpacker.cvmfs.server import Server
    from unpacker.gc import Collected
    from unpacker.publish.managed import Way
    from unpacker.publish.stratum0 import Stratum0Publisher
    from unpacker.publish.unreferenced import Collected as NativelyCollected

    Target = DirectoryPublisher | Stratum0Publisher


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The flags that decide what one run does. `layout` is an OCI image layout that stands for every registry;
    `anonymous` means that no wishlist asks, but a person at the command line."""

    only: str | None = None
    rebuild: bool = False
    adopt: bool = False
    allow_removals: bool = False
    anonymous: bool = False
    layout: str | None = None


_CVMFS = "/cvmfs/"
_STRATUM0 = "stratum0:"
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_DAY = 86_400
_PATTERNS_LIMIT = 1 << 20


def publisher(settings: Settings) -> Target:
    """The target that the settings name; SettingsError if there is none, or of a kind this version cannot write."""
    target = settings.target
    if not target:
        raise SettingsError(
            "no target: say --target DIRECTORY, /cvmfs/NAME or stratum0:DIRECTORY, or set it in unpacker.toml or "
            "UNPACKER_TARGET"
        )
    if target.startswith(_STRATUM0):
        from unpacker.publish.stratum0 import Stratum0Publisher

        directory = stratum0(target)
        return Stratum0Publisher(
            directory,
            settings.keys,
            index=f"{journal.directory(settings.state_directory, os.path.realpath(directory))}/known-contents",
            layers_view=settings.layers_view,
            limits=settings.limits,
        )
    if target.startswith(_CVMFS):
        return _managed_publisher(settings)
    if _SCHEME.match(target) and not os.path.lexists(target):
        raise SettingsError(
            f"not a target: {target!r} (expected a directory, /cvmfs/NAME or stratum0:DIRECTORY; a directory of that "
            f"name is ./{target})"
        )
    return DirectoryPublisher(target)


def _managed(settings: Settings) -> tuple[Server, str, Way]:
    """The repository of `cvmfs_server` that is the target, the directory in it, and the way to write to it."""
    from unpacker.cvmfs.server import Server, place
    from unpacker.publish.managed import choose

    name, subdirectory = place(settings.target or "")
    server = Server.find(name, **({"keys": settings.keys} if settings.keys else {}))
    return server, subdirectory, choose(server, subdirectory, settings.way, layers_view=settings.layers_view)


def _managed_publisher(settings: Settings) -> DirectoryPublisher | Stratum0Publisher:
    from unpacker.publish.managed import FAST, ManagedPublisher
    from unpacker.publish.server import ServerPublisher

    server, subdirectory, way = _managed(settings)
    if way.name != FAST:
        return ServerPublisher(server, subdirectory, state=state(settings))
    index = f"{state(settings)}/known-contents"
    return ManagedPublisher(server, index=index, layers_view=settings.layers_view, limits=settings.limits)


def way(settings: Settings) -> str | None:
    """How the target will be written to, and why, if that is a matter of choice."""
    if settings.target is None or not settings.target.startswith(_CVMFS):
        return None
    return str(_managed(settings)[2])


def stratum0(target: str) -> str:
    """The directory of a repository, from how a target names it; SettingsError if it names something else."""
    directory = target.removeprefix(_STRATUM0)
    if directory == target or not directory:
        raise SettingsError(f"not a native repository: {target!r}; name it as stratum0:DIRECTORY")
    # Shells do not, behind a colon.
    return os.path.abspath(os.path.expanduser(directory))


def problems(
    target: Target, standing: Mapping[str, Published | Unreadable], wanted: Collection[str], *, quick: bool
) -> Iterator[Problem]:
    """What is wrong with some of the published names; if it is all, with a native repository as a whole, too."""
    if isinstance(target, DirectoryPublisher):
        names = [standing[name] for name in wanted]
        yield from verify(target.layout.path, names, quick=quick, unlisted=target.marker)
        return
    from unpacker.audit import audit

    for problem in audit(target, standing, quick=quick, now=time.time()):
        if problem.public_path in wanted or len(wanted) == len(standing):
            yield problem


def collect(target: Target, settings: Settings, *, dry_run: bool) -> Collected | NativelyCollected:
    """Removes from a target what nothing refers to any more, under its lock."""
    grace, now = settings.grace_days * _DAY, time.time()
    keep = settings.keep_revisions_days * _DAY
    if isinstance(target, DirectoryPublisher):
        from unpacker import gc

        if target.marker is not None:
            from unpacker import collection
            from unpacker.publish.server import ServerPublisher

            assert isinstance(target, ServerPublisher)
            return collection.collect(target, state(settings), grace=grace, keep=keep, now=now, dry_run=dry_run)
        return gc.collect(target, grace=grace, now=now, dry_run=dry_run)
    from unpacker.publish import unreferenced

    return unreferenced.collect(target, grace=grace, keep=keep, now=now, dry_run=dry_run)


def reader(settings: Settings) -> Reader:
    """The target as its users have it, which may be a mounted repository; PublishError if there is none."""
    target = settings.target
    if target and not target.startswith(_STRATUM0):
        if not os.path.isdir(target):
            raise PublishError(f"there is no target at {target} (is the repository mounted?)")
        found: Reader = DirectoryReader(target, settings.published_at)
    else:
        from unpacker.publish.stratum0 import Stratum0Publisher

        publisher = existing(settings)
        assert isinstance(publisher, Stratum0Publisher)
        found = RepositoryReader(publisher, settings.published_at)
    check(found.mount)
    return found


def existing(settings: Settings) -> Target:
    """The target, which must be there: where nothing is, nothing can be verified, collected or removed, and a path
    with a typing error would look like a target in the best of order."""
    target = publisher(settings)
    try:
        is_directory = stat.S_ISDIR(os.stat(target.path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        is_directory = False
    except OSError as error:
        raise PublishError(f"cannot look at the target {target.path}: {error.strerror}") from None
    if not is_directory:
        if os.path.lexists(target.path):
            raise PublishError(f"{target.path} is no directory, so it is no target")
        first = "`unpacker init`" if (settings.target or "").startswith(_STRATUM0) else "a first `unpacker reconcile`"
        raise PublishError(f"there is no target at {target.path}; {first} makes it")
    return target


def ignored(found: Wishlist, environment: Mapping[str, str]) -> tuple[str, ...]:
    """The patterns of images whose failures do not count: those of a recipe, and those of DUCC's file, a line each."""
    path = environment.get("DUCC_IGNORE_ERRORS_FILE")
    if not path:
        return found.ignore_errors
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            lines = [line.strip() for line in file.read(_PATTERNS_LIMIT).splitlines()]
    except OSError as error:
        raise SettingsError(f"DUCC_IGNORE_ERRORS_FILE: cannot read {path}: {error.strerror}") from None
    return (*found.ignore_errors, *(line for line in lines if line and not line.startswith("#")))


def prepare_state(settings: Settings) -> tuple[str, ...]:
    """Makes the state directory; PublishError if nothing can be written there. Asked before a run, not after it.

    Gives what its user should be told once, before the first run on a target.
    """
    path = state(settings)
    is_first = not os.path.isdir(path)
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise PublishError(f"cannot make {path}: {error.strerror} (choose another --state)") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise PublishError(f"cannot write to {path} (choose another --state, or run as the user who owns it)")
    if is_first and not publisher(settings).keeps_owners:
        return ("not root: files get the publishing user as owner, not the image's owners",)
    return ()


def state(settings: Settings) -> str:
    """Where the journal and the cache of this target live."""
    return journal.directory(settings.state_directory, _place(settings))


def _place(settings: Settings) -> str:
    """The target by the one name that all its spellings have."""
    if settings.target and settings.target.startswith(_CVMFS):
        from unpacker.cvmfs.server import MOUNTS, place

        # Not by how it is written to: that may change.
        return "/".join((MOUNTS, *filter(None, place(settings.target))))
    return os.path.realpath(publisher(settings).path)


def access(settings: Settings) -> Access:
    """How registries are reached."""
    return Access(
        docker_config=settings.docker_config,
        insecure_registries=settings.insecure_registries,
        connections_per_host=settings.connections_per_host,
        timeout=settings.timeout,
        attempts=settings.attempts,
        limits=settings.limits,
    )


def registry(settings: Settings) -> Registry:
    return access(settings).open()


def source(image: str, name: str | None) -> tuple[str | None, str]:
    """An image of the command line → the layout it lies in, if it does, and the name to publish it under."""
    if not image.startswith("oci:"):
        if name is not None and name != image:
            raise WishlistError("--as is for oci:PATH:TAG; an image of a registry is published under its own name")
        return None, image
    if name is None:
        raise WishlistError(f"{image} has no public name: say --as registry/repository:tag")
    try:
        Reference.parse(name)
    except ValueError as error:
        raise WishlistError(f"--as: {error}") from None
    return image.removeprefix("oci:"), name


def request(found: Wishlist, path: str, settings: Settings, choice: Choice) -> Request:
    """Everything one run needs."""
    target = publisher(settings)
    owner = None if target.keeps_owners else (os.geteuid(), os.getegid())
    asked: Registry = registry(settings) if choice.layout is None else _layout(choice.layout, settings)
    damaged: frozenset[str] = frozenset()
    if choice.rebuild:
        standing = target.published()
        damaged = frozenset(p.public_path for p in problems(target, standing, standing, quick=False)) - {""}
    return Request(
        wishes=found.wishes,
        owner=None if choice.anonymous else settings.wishlist_id or wishlist_identity(path),
        sound=found.sound,
        publisher=target,
        registry=asked,
        policy=Policy(owner=owner, mount_points=settings.mount_points),
        limits=settings.limits,
        state=state(settings),
        jobs=settings.jobs,
        may_become_public=settings.may_become_public,
        only=choice.only,
        removals=not choice.anonymous,
        rebuild=choice.rebuild,
        damaged=damaged,
        allow_removals=choice.allow_removals,
        keep_vanished=settings.keep_vanished_days,
        predecessors=target.view() if choice.adopt else None,
        lock_wait=settings.lock_wait,
        transaction_entries=settings.transaction_entries,
        transaction_bytes=settings.transaction_bytes,
        attach=None if choice.layout is not None else attach(settings, target),
    )


def _layout(text: str, settings: Settings) -> Layout:
    """`PATH:TAG`, or `PATH` where the tag is the public name's. What exists tells where the path ends: it may have a
    colon, and so may the tag, which some tools make a whole name (`localhost/tool:1`)."""
    found = Layout(text, limits=settings.limits)
    path = text
    while not found.is_there and ":" in path:
        path = path.rpartition(":")[0]
        found = Layout(path, tag=text[len(path) + 1 :], limits=settings.limits)
    if not found.is_there:
        where = text if os.path.isdir(text) else text.rpartition(":")[0] or text
        raise WishlistError(f"{where} is no OCI image layout: it has no index.json (expected oci:PATH:TAG)")
    return found


def attach(settings: Settings, target: Target) -> Callable[[Published, Descriptor], object] | None:
    """What attaches a receipt to what a tag points at, if the settings ask for it."""
    if settings.receipts is None or not settings.receipts.enabled:
        return None
    # oras brings requests and jsonschema: a fifth of a second that only who wants receipts pays.
    from unpacker.receipts import Receipts

    mount = seen_at(settings, target)
    receipts = Receipts(access(settings), repository=settings.receipts.repository)
    return lambda published, subject: receipts.attach(published, subject, mount)


def seen_at(settings: Settings, target: Target) -> str:
    """Where users find what is published, as far as the publisher can know."""
    if settings.published_at:
        return settings.published_at
    if (settings.target or "").startswith(_STRATUM0) and not isinstance(target, DirectoryPublisher):
        return f"{_CVMFS}{target.repository.name}"
    return _place(settings)

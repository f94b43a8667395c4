"""From settings and flags to the objects of a run: which publisher, which registry, whose wishlist."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

from unpacker import journal
from unpacker.contracts import Registry
from unpacker.errors import PublishError, SettingsError, WishlistError
from unpacker.image import Image
from unpacker.publish.directory import DirectoryPublisher
from unpacker.reconcile import Request
from unpacker.record import Published
from unpacker.reference import Reference
from unpacker.registry.client import Access
from unpacker.registry.layout import Layout
from unpacker.rootfs import Policy
from unpacker.settings import Settings, wishlist_identity
from unpacker.wishlist import Wishlist


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The flags that decide what one run does. `layout` is an OCI image layout that stands for every registry;
    `anonymous` means that no wishlist asks, but a person at the command line."""

    only: str | None = None
    rebuild: bool = False
    allow_removals: bool = False
    anonymous: bool = False
    layout: str | None = None


def publisher(settings: Settings) -> DirectoryPublisher:
    """The target that the settings name; SettingsError if there is none, or of a kind this version cannot write."""
    target = settings.target
    if not target:
        raise SettingsError("no target: say --target DIRECTORY, or set it in unpacker.toml or UNPACKER_TARGET")
    if target.startswith("stratum0:"):
        raise SettingsError("stratum0: targets are not supported by this version; name a directory")
    if target.startswith("/cvmfs/"):
        raise SettingsError("targets below /cvmfs are not supported by this version; name a directory")
    return DirectoryPublisher(target)


def existing(settings: Settings) -> DirectoryPublisher:
    """The target, which must be there: where nothing is, nothing can be verified, collected or removed, and a path
    with a typing error would look like a target in the best of order."""
    target = publisher(settings)
    if not os.path.isdir(target.path):
        raise PublishError(f"there is no target at {target.path}; a first `unpacker reconcile` makes it")
    return target


def prepare_state(settings: Settings) -> None:
    """Makes the state directory; PublishError if nothing can be written there. Asked before a run, not after it."""
    path = state(settings)
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise PublishError(f"cannot make {path}: {error.strerror} (choose another --state)") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise PublishError(f"cannot write to {path} (choose another --state, or run as the user who owns it)")


def state(settings: Settings) -> str:
    """Where the journal and the cache of this target live."""
    return journal.directory(settings.state_directory, _place(settings))


def _place(settings: Settings) -> str:
    """The target by the one name that all its spellings have."""
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
    if owner is not None and not os.path.exists(state(settings)):
        # Once for a target, not once a run: cron sends every line to somebody.
        print("unpacker: not root: files get the publishing user as owner, not the image's owners", file=sys.stderr)
    asked: Registry = registry(settings) if choice.layout is None else _layout(choice.layout, settings)
    damaged: frozenset[str] = frozenset()
    if choice.rebuild:
        from unpacker.verify import verify

        standing = target.published().values()
        damaged = frozenset(p.public_path for p in verify(target.path, list(standing), quick=False))
    return Request(
        wishes=found.wishes,
        owner=None if choice.anonymous else settings.wishlist_id or wishlist_identity(path),
        sound=found.sound,
        publisher=target,
        registry=asked,
        policy=Policy(owner=owner),
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
        lock_wait=settings.lock_wait,
        attach=None if choice.layout is not None else _attach(settings),
    )


def _layout(text: str, settings: Settings) -> Layout:
    """`PATH:TAG`, or `PATH` where the tag is the public name's; a path with a colon is told by what exists."""
    path, colon, tag = text.rpartition(":")
    if not colon or os.path.isdir(text):
        return Layout(text, limits=settings.limits)
    return Layout(path, tag=tag, limits=settings.limits)


def _attach(settings: Settings) -> Callable[[Published, Image], object] | None:
    """What attaches receipts, if the settings ask for it."""
    if settings.receipts is None or not settings.receipts.enabled:
        return None
    # oras brings requests and jsonschema: a fifth of a second that only who wants receipts pays.
    from unpacker.receipts import Receipts

    target = _place(settings)
    receipts = Receipts(access(settings), repository=settings.receipts.repository)

    def attach(published: Published, image: Image) -> None:
        receipts.attach(published, image.pinned.descriptor, target)

    return attach

"""What is known of an image that is not published: whether it is wished for, and what keeps it from being there.

Read from what the target says for its users, from the journal of this host if there is one, and from a wishlist.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from unpacker import journal
from unpacker.digest import Digest
from unpacker.errors import PublishError, SettingsError
from unpacker.lookup import Asked
from unpacker.multiarch import MULTIARCH
from unpacker.publish.roots import METADATA
from unpacker.readers import Reader
from unpacker.reference import Reference
from unpacker.settings import Settings
from unpacker.wish import Wish
from unpacker.wishlist import Wishlist


@dataclass(frozen=True, slots=True, kw_only=True)
class Pending:
    """How it stands: `state` is failing, pending or unknown, `told` says it to a person. `since` is Unix seconds."""

    state: str
    told: str
    name: str = ""
    since: int | None = None
    error: str = ""


def pending(asked: Asked, reader: Reader, settings: Settings, wishlist: Wishlist | None) -> Pending:
    """What is known of the names that may be meant, the first of which anything is known."""
    failures = _noted(reader.file(f"{METADATA}/status.json")) | _journalled(reader, settings)
    for path in asked.paths:
        known = next((name for name in failures if name == path or name.endswith(f"/{path}")), None)
        if known is not None:
            since, error = failures[known]
            return Pending(
                state="failing", told=f"it is asked for and fails: {error}", name=path, since=since, error=error
            )
    for path in asked.paths:
        # A wish whose tags could not be listed fails under the name of its repository.
        repository = path.rpartition(":")[0]
        known = next((name for name in failures if repository and name == repository), None)
        if known is not None:
            since, error = failures[known]
            told = f"the tags of {known}, which may be asked for, cannot be listed: {error}"
            return Pending(state="failing", told=told, name=path, since=since, error=error)
    if wishlist is None:
        return Pending(state="unknown", told="whether it is asked for, --wishlist WISHLIST tells")
    for path in asked.paths:
        wish = _wish_for(path, wishlist.wishes)
        if wish is not None:
            told = f"it is asked for in {wishlist.name}, line {wish.line}, and no run has brought it yet"
            return Pending(state="pending", told=told, name=path)
    return Pending(state="unknown", told=f"nor is it asked for in {wishlist.name}")


def _wish_for(path: str, wishes: Iterable[Wish]) -> Wish | None:
    plain = path.split("/", 2)[-1] if path.startswith(f"{MULTIARCH}/") else path
    head, _, last = plain.rpartition("/")
    name, _, tag = last.partition(":")
    try:
        if ":" in tag:
            reference = Reference(
                repository=Reference.parse(f"{head}/{name}:x").repository, tag=None, digest=Digest.parse(tag)
            )
        else:
            reference = Reference.parse(plain)
    except ValueError:
        return None
    return next((w for w in wishes if w.may_ask_for(reference) and path in w.public_paths(reference)), None)


def _noted(data: bytes | None) -> dict[str, tuple[int | None, str]]:
    """What fails, as the target tells its users; nothing if it does not tell."""
    try:
        wishlists: Mapping[str, Any] = json.loads(data or b"{}").get("wishlists", {})
        return {
            str(name): (None, str(failure["error"]))
            for one in wishlists.values()
            for name, failure in one["failing"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _journalled(reader: Reader, settings: Settings) -> dict[str, tuple[int | None, str]]:
    target = settings.target or ""
    if target.startswith("stratum0:"):
        # Shells do not, behind a colon.
        target = os.path.expanduser(target.removeprefix("stratum0:"))
    try:
        found = journal.load(journal.directory(settings.state_directory, os.path.realpath(target)))
    except (SettingsError, PublishError):
        return {}  # Who only uses images need not have, or may not read, what the publisher's runs left behind.
    return {name: (failure.since, failure.error) for name, failure in found.failures.items()}

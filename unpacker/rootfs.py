"""From a merged tree to the tree that is published: the rules of what becomes public.

Pure. `publishable` is the rule for one entry, applied before its bytes are stored; `prepare` the rules that need
the whole tree.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from unpacker.changeset import Change, Entry, Kind
from unpacker.oci import ImageConfig
from unpacker.tree import Tree

VERSION = 1
"""Raised whenever these rules would give another tree for the same image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The operator's choices about published trees. `owner` is None where the target keeps the image's owners,
    else the (uid, gid) everything gets, because only root may give files away."""

    owner: tuple[int, int] | None = None

    @property
    def rules(self) -> str:
        """A hash of everything that decides the published tree, kept in each record."""
        value = json.dumps([VERSION, asdict(self)], sort_keys=True)
        return hashlib.sha256(value.encode("ascii")).hexdigest()[:16]


def publishable(entry: Entry, policy: Policy) -> Entry:
    """One entry as it will be published."""
    raise NotImplementedError


def prepare(tree: Tree, config: ImageConfig, policy: Policy) -> tuple[Tree, Mapping[str, int]]:
    """The tree to publish, and the count of what was altered or dropped, by word."""
    raise NotImplementedError

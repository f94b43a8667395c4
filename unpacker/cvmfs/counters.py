"""The statistics of a catalog: what it holds itself, and what the catalogs below it hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from unpacker.errors import PublishError


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """How much of everything. The names are those of the `statistics` table, without `self_` or `subtree_`.

    `dir` counts a catalog's own root and its nested mount points too, so a transition point counts in both catalogs.
    """

    regular: int = 0
    symlink: int = 0
    special: int = 0
    dir: int = 0
    nested: int = 0
    chunked: int = 0
    chunks: int = 0
    file_size: int = 0
    chunked_size: int = 0
    xattr: int = 0
    external: int = 0
    external_file_size: int = 0

    def plus(self, other: Tally) -> Tally:
        return Tally(**{name: getattr(self, name) + getattr(other, name) for name in NAMES})

    def minus(self, other: Tally) -> Tally:
        return Tally(**{name: getattr(self, name) - getattr(other, name) for name in NAMES})

    @property
    def entries(self) -> int:
        """Names of all kinds; a transition point that is in the tally with both its rows counts twice."""
        return self.regular + self.symlink + self.special + self.dir


NAMES = tuple(field.name for field in fields(Tally))
NOTHING = Tally()


@dataclass(frozen=True, slots=True)
class Counters:
    """`own`: rows of this catalog. `below`: the sum over all catalogs below it, this one left out."""

    own: Tally = NOTHING
    below: Tally = NOTHING

    @property
    def total(self) -> Tally:
        """What this catalog adds to `below` of its parent."""
        return self.own.plus(self.below)

    def rows(self) -> list[tuple[str, int]]:
        """The rows of the `statistics` table, all 24: a catalog that lacks one cannot be opened by clients."""
        return [
            (f"{prefix}_{name}", getattr(tally, name))
            for prefix, tally in (("self", self.own), ("subtree", self.below))
            for name in NAMES
        ]

    @classmethod
    def of(cls, values: Mapping[str, int], what: str) -> Counters:
        """From the rows of a `statistics` table; a missing or negative one is a PublishError about `what`."""
        tallies = []
        for prefix in ("self", "subtree"):
            found = {name: values.get(f"{prefix}_{name}") for name in NAMES}
            for name, value in found.items():
                if type(value) is not int or value < 0:
                    raise PublishError(
                        f"{what}: the counter {prefix}_{name} is {'missing' if value is None else repr(value)[:50]};"
                        " check the repository with cvmfs_server check"
                    )
            tallies.append(Tally(**{name: value for name, value in found.items() if value is not None}))
        return cls(*tallies)

"""What stands published: Published, one per public name, and its form in record.json.

`<root>/.metadata/<public path>/record.json`; written in the same transaction as the root it describes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from unpacker.multiarch import Place, public_path
from unpacker.oci import Platform
from unpacker.reference import Reference

SCHEMA = 1
ADOPTED = "adopted"
"""In place of the hash of rules: the root is another tool's, made under rules that nobody knows."""

_YEAR_10000 = 253_402_300_800


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """One published name. A name whose record cannot be read is `Unreadable`, never absent.

    `digest` is what the tag pointed at (index or manifest), `root` the root's path below the target's root, `rules` the
    hash of the rules it was composed under, `wishlist` the identity of the wishlist that asked for it (None: adopted
    from another tool, removed only by name), `also` others that ask for it, too. `published` is Unix time in seconds.
    `altered` counts what the policy changed, by word. `replaces` is what the name stood for before: until the public
    link is switched, that one is in force, and the link tells which.

    A front, which leads to the names of several platforms, has no root of its own: `root` is where it leads to, below
    the target's root, perhaps with a variable in it that clients fill in; `platform` is the first of its platforms, and
    what describes one image is empty.
    """

    reference: Reference
    digest: str
    manifest_digest: str
    image_id: str
    platform: Platform
    root: str
    rules: str
    wishlist: str | None
    published: int
    also: tuple[str, ...] = ()
    entries: int = 0
    size: int = 0
    compressed: int = 0
    layers: tuple[str, ...] = ()
    altered: Mapping[str, int] = field(default_factory=dict)
    gpu: bool = False
    place: Place = Place.PLAIN
    tool: str = ""
    replaces: Published | None = None

    @property
    def public_path(self) -> str:
        return public_path(self.reference.public_path, self.place, self.platform)

    @property
    def is_adopted(self) -> bool:
        """Whether the root is another tool's, of which no listing was made and no entry counted."""
        return self.rules == ADOPTED

    @property
    def owners(self) -> tuple[str, ...]:
        """The wishlists that ask for it. The name goes when the last of them no longer does."""
        return () if self.wishlist is None else (self.wishlist, *self.also)

    def succeeding(self, before: Published | Unreadable | None) -> Published:
        """This record as that of a name which stood for `before`."""
        return replace(self, replaces=replace(before, replaces=None) if isinstance(before, Published) else None)

    def to_json(self) -> dict[str, Any]:
        value: dict[str, Any] = {
            "schema": SCHEMA,
            "reference": str(self.reference),
            "digest": self.digest,
            "manifest_digest": self.manifest_digest,
            "image_id": self.image_id,
            "platform": str(self.platform),
            "root": self.root,
            "rules": self.rules,
            "wishlist": self.wishlist,
            "also": list(self.also),
            "published": self.published,
            "entries": self.entries,
            "size": self.size,
            "compressed": self.compressed,
            "layers": list(self.layers),
            "altered": dict(sorted(self.altered.items())),
            "gpu": self.gpu,
            "place": self.place.value,
            "tool": self.tool,
        }
        if self.replaces is not None:
            value["replaces"] = self.replaces.to_json()
        return value

    @classmethod
    def from_json(cls, value: Any) -> Published:
        """ValueError (or KeyError, TypeError as one) says what is wrong with the record."""
        try:
            if value["schema"] != SCHEMA:
                raise ValueError(f"record of schema {value['schema']!r}, written by a newer version?")
            replaces = value.get("replaces")
            return cls(
                reference=Reference.parse(value["reference"]),
                digest=str(value["digest"]),
                manifest_digest=str(value["manifest_digest"]),
                image_id=str(value["image_id"]),
                platform=_platform(value["platform"]),
                root=str(value["root"]),
                rules=str(value["rules"]),
                wishlist=value["wishlist"],
                also=tuple(map(str, value.get("also", ()))),
                published=_moment(value["published"]),
                entries=int(value["entries"]),
                size=int(value["size"]),
                compressed=int(value["compressed"]),
                layers=tuple(map(str, value["layers"])),
                altered={str(k): int(v) for k, v in value["altered"].items()},
                gpu=bool(value["gpu"]),
                place=Place(value.get("place", Place.PLAIN)),
                tool=str(value["tool"]),
                replaces=None if replaces is None else cls.from_json(replaces),
            )
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"not a record: {type(error).__name__} {error}") from None

    def serialise(self) -> bytes:
        """The bytes of record.json."""
        return (json.dumps(self.to_json(), indent=1) + "\n").encode("ascii")

    @classmethod
    def parse(cls, data: bytes) -> Published:
        """Reads record.json; ValueError says what is wrong."""
        return cls.from_json(json.loads(data))


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A public name whose record is missing, damaged or at odds with its link. Never treated as unpublished garbage.

    `is_foreign`: it is no link at all, hence none of ours, and is neither replaced nor removed.
    """

    public_path: str
    problem: str
    is_foreign: bool = False


def _moment(value: Any) -> int:
    """Unix seconds of a year that can be written down; ValueError for any other number."""
    seconds = int(value)
    if not 0 <= seconds < _YEAR_10000:
        raise ValueError(f"published at {seconds} s of Unix time")
    return seconds


@lru_cache(maxsize=256)
def _platform(text: str) -> Platform:
    """Remembered: a target has thousands of records of very few platforms."""
    return Platform.parse(text)

"""What every target keeps of its roots, wherever it keeps it: names, facts, and when they lost their last name. Pure.

Also which names are public ones: those are told from an operator's own by their form alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from unpacker.digest import Digest
from unpacker.errors import PublishError
from unpacker.record import Published, Unreadable

FLAT = ".flat"
METADATA = ".metadata"
LAYERS = ".layers"
UNREFERENCED = f"{METADATA}/unreferenced.json"

_NOTE = re.compile(r"[a-z0-9][a-z0-9._-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class RootFacts:
    """What is known of one root. A directory in `.flat` without facts is not ours.

    `damaged`: verify found it changed; it stays as it is while names refer to it, and is never published again.
    """

    image_id: str
    rules: str
    entries: int
    size: int
    altered: Mapping[str, int] = field(default_factory=dict)
    layers: tuple[str, ...] = ()
    damaged: bool = False

    def completed(self, record: Published, root: str, before: Published | Unreadable | None) -> Published:
        """The record of a name that stands for this root at `root`, and stood for `before`."""
        completed = replace(record, root=root, entries=self.entries, size=self.size, altered=self.altered)
        return completed.succeeding(before)

    def serialise(self) -> bytes:
        return (json.dumps(asdict(self), indent=1) + "\n").encode("ascii")

    @classmethod
    def parse(cls, data: bytes) -> RootFacts:
        """ValueError says what is wrong."""
        try:
            value = json.loads(data)
            return cls(
                image_id=str(value["image_id"]),
                rules=str(value["rules"]),
                entries=int(value["entries"]),
                size=int(value["size"]),
                altered={str(k): int(v) for k, v in value["altered"].items()},
                layers=tuple(str(d) for d in value["layers"]),
                damaged=bool(value["damaged"]),
            )
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"not the facts of a root: {type(error).__name__} {error}") from None


def foreign(public_path: str, place: str = "") -> Unreadable:
    """What stands under a public name of the target at `place`, and is no symlink."""
    problem = f"{place}/{public_path} is no symlink, so it is none of ours and stays as it is: move it away, and the "
    return Unreadable(public_path, f"{problem}next run publishes the name", is_foreign=True)


def refuse_foreign(standing: Published | Unreadable | None) -> None:
    """PublishError if a name is not ours to change."""
    if isinstance(standing, Unreadable) and standing.is_foreign:
        raise PublishError(standing.problem)


def root_path(name: str) -> str:
    """The path of the root called `name`, below the target."""
    return f"{FLAT}/{name[:2]}/{name}"


def layer_path(hexadecimal: str) -> str:
    """The path of the directory of a layer, below the target, by the hex of its blob's digest."""
    return f"{LAYERS}/{hexadecimal[:2]}/{hexadecimal}"


def free_name(image_id: str, taken: Collection[str]) -> str:
    """What to call one more root of this image. What is there, ours or foreign, is left alone."""
    hexadecimal = Digest.parse(image_id).hex
    name, n = hexadecimal, 1
    while name in taken:
        n += 1
        name = f"{hexadecimal}-{n}"
    return name


def names_of(image_id: str, names: Collection[str]) -> list[str]:
    """Those of `names` that are roots of this image, the first one made first."""
    hexadecimal = Digest.parse(image_id).hex
    own = re.compile(rf"{hexadecimal}(?:-([0-9]+))?")
    found = (own.fullmatch(name) for name in names if name.startswith(hexadecimal))
    return [name for _, name in sorted((int(match[1] or 1), match[0]) for match in found if match)]


def parse_unreferenced(data: bytes) -> dict[str, int]:
    """When each root lost its last name, in Unix seconds; ValueError if these are not the bytes of such a file."""
    value: Any = json.loads(data)
    if not isinstance(value, dict) or not all(type(time) is int for time in value.values()):
        raise ValueError("not a mapping of roots to Unix seconds")
    return value


def serialise_unreferenced(times: Mapping[str, int]) -> bytes:
    """The bytes of unreferenced.json."""
    return (json.dumps(dict(sorted(times.items())), indent=1) + "\n").encode("ascii")


def is_public_name(path: str) -> bool:
    """Whether a path has the form of a public one, `<registry>/<name…>:<tag>`."""
    # A registry's own name may have a colon, before its port.
    _, slash, last = path.rpartition("/")
    return bool(slash) and ":" in last


def may_be_registry(name: str) -> bool:
    """Whether a top-level name can be a registry's."""
    return not name.startswith(".") and ("." in name or ":" in name or name == "localhost")


def is_note(name: str) -> bool:
    """Whether `.metadata/<name>` can be a note: no registry, nothing of the target's own."""
    return bool(_NOTE.fullmatch(name)) and f"{METADATA}/{name}" != UNREFERENCED

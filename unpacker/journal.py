"""What a target's runs left behind on this host: failures since when, vanished names, each wish's last tags.

`<state>/<target>/journal.json`. Losing it loses history, nothing else; so a damaged one is set aside, not believed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from unpacker.errors import PublishError
from unpacker.status import Failure

_SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Journal:
    """`failures` by public path or wish, `vanished` since by public path, `expansions` of wishes by their text."""

    failures: Mapping[str, Failure] = field(default_factory=dict)
    vanished: Mapping[str, int] = field(default_factory=dict)
    expansions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    finished: int | None = None

    def after(
        self,
        *,
        failed: Mapping[str, str],
        vanished: frozenset[str],
        expansions: Mapping[str, tuple[str, ...]],
        seen: frozenset[str] | None,
        now: int,
    ) -> Journal:
        """The journal after a run. `seen` are the names the run looked at, None for all: the others stay as noted."""
        failures = {} if seen is None else {k: v for k, v in self.failures.items() if k not in seen}
        for name, error in failed.items():
            old = self.failures.get(name)
            since, times = (old.since, old.times + 1) if old else (now, 1)
            failures[name] = Failure(since=since, last=now, error=error, times=times)
        kept = {} if seen is None else {k: v for k, v in self.vanished.items() if k not in seen}
        return Journal(
            failures=failures,
            vanished=kept | {name: self.vanished.get(name, now) for name in vanished},
            expansions={**self.expansions, **expansions} if seen is not None else dict(expansions),
            finished=now,
        )


def directory(state: str, target: str) -> str:
    """The state directory of one target: readable, and unique for the target's path."""
    slug = re.sub(r"[^A-Za-z0-9]+", "-", target).strip("-")[-40:]
    return os.path.join(state, f"{slug}-{hashlib.sha256(os.fsencode(target)).hexdigest()[:8]}")


def load(path: str) -> Journal:
    """Reads `<path>/journal.json`; an absent one is empty, a damaged one is set aside as journal.json.damaged."""
    name = os.path.join(path, "journal.json")
    try:
        with open(name, "rb") as file:
            return _decode(json.load(file))
    except FileNotFoundError:
        return Journal()
    except (ValueError, KeyError, TypeError, AttributeError):
        os.replace(name, name + ".damaged")
        return Journal()
    except OSError as error:
        raise PublishError(f"cannot read {name}: {error.strerror}") from error


def store(path: str, journal: Journal) -> None:
    """Writes `<path>/journal.json`, beside and renamed."""
    name = os.path.join(path, "journal.json")
    try:
        os.makedirs(path, exist_ok=True)
        temporary = f"{name}.{os.getpid()}"
        with open(temporary, "w", encoding="ascii") as file:
            json.dump({"schema": _SCHEMA, **asdict(journal)}, file)
        os.replace(temporary, name)
    except OSError as error:
        raise PublishError(f"cannot write {name}: {error.strerror} (choose another --state)") from error


def _decode(value: dict[str, Any]) -> Journal:
    if value["schema"] != _SCHEMA:
        raise ValueError(f"journal of schema {value['schema']!r}")
    return Journal(
        failures={str(k): Failure(**v) for k, v in value["failures"].items()},
        vanished={str(k): int(v) for k, v in value["vanished"].items()},
        expansions={str(k): tuple(str(t) for t in v) for k, v in value["expansions"].items()},
        finished=value["finished"],
    )

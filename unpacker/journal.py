"""What a target's runs left behind on this host: failures since when, vanished names, each wish's last tags.

`<state>/<target>/journal.json`. Losing it loses history, nothing else; so a damaged one is set aside, not believed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from unpacker.errors import PublishError
from unpacker.status import Failure

_SCHEMA = 2
_FORGOTTEN = 30 * 86_400


@dataclass(frozen=True, slots=True, kw_only=True)
class Journal:
    """What one wishlist's runs left: `failures` by public path or wish, `vanished` since by public path, `expansions`
    of wishes by their text, when the last run `finished`."""

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
        unknown: frozenset[str] = frozenset(),
        now: int,
    ) -> Journal:
        """The journal after a run. `seen` are the names the run looked at, None for all: the others stay as noted, and
        so do those of which it could learn nothing, the `unknown`: what does not answer has not been mended."""

        def stays(name: str) -> bool:
            return name in unknown or (seen is not None and name not in seen)

        failures = {name: failure for name, failure in self.failures.items() if stays(name)}
        for name, error in failed.items():
            old = self.failures.get(name)
            since, times = (old.since, old.times + 1) if old else (now, 1)
            failures[name] = Failure(since=since, last=now, error=error, times=times)
        kept = {name: since for name, since in self.vanished.items() if stays(name)}
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


def load(path: str, wishlist: str | None = None) -> Journal:
    """Reads what `<path>/journal.json` says of one wishlist, or (None) of all together.

    An absent file is an empty journal; a damaged one is set aside as journal.json.damaged, if it can be.
    """
    journals = _load(path)
    if wishlist is not None:
        return journals.get(wishlist, Journal())
    failures: dict[str, Failure] = {}
    vanished: dict[str, int] = {}
    expansions: dict[str, tuple[str, ...]] = {}
    for one in journals.values():
        failures.update(one.failures)
        vanished.update(one.vanished)
        for text, tags in one.expansions.items():
            expansions[text] = tuple(dict.fromkeys((*expansions.get(text, ()), *tags)))
    finished = max((one.finished for one in journals.values() if one.finished is not None), default=None)
    return Journal(failures=failures, vanished=vanished, expansions=expansions, finished=finished)


def store(path: str, journal: Journal, wishlist: str = "") -> None:
    """Writes what one wishlist's run has to say into `<path>/journal.json`, beside and renamed; what the others said
    stays, unless they have not run for a month."""
    name = os.path.join(path, "journal.json")
    horizon = (journal.finished or 0) - _FORGOTTEN
    journals = {key: one for key, one in _load(path).items() if (one.finished or 0) >= horizon} | {wishlist: journal}
    value = {"schema": _SCHEMA, "wishlists": {key: asdict(one) for key, one in journals.items()}}
    try:
        os.makedirs(path, exist_ok=True)
        temporary = f"{name}.{os.getpid()}"
        with open(temporary, "w", encoding="ascii") as file:
            json.dump(value, file)
        os.replace(temporary, name)
    except OSError as error:
        raise PublishError(f"cannot write {name}: {error.strerror} (choose another --state)") from error


def _load(path: str) -> dict[str, Journal]:
    name = os.path.join(path, "journal.json")
    try:
        with open(name, "rb") as file:
            value = json.load(file)
        if value["schema"] != _SCHEMA:
            raise ValueError(f"journal of schema {value['schema']!r}")
        return {str(key): _decode(one) for key, one in value["wishlists"].items()}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        # Who may only read (`status`, `plan`) leaves it where it is.
        with suppress(OSError):
            os.replace(name, name + ".damaged")
        return {}
    except OSError as error:
        raise PublishError(f"cannot read {name}: {error.strerror}") from error


def _decode(value: dict[str, Any]) -> Journal:
    finished = value["finished"]
    return Journal(
        failures={str(k): _decode_failure(v) for k, v in value["failures"].items()},
        vanished={str(k): int(v) for k, v in value["vanished"].items()},
        expansions={str(k): tuple(str(t) for t in v) for k, v in value["expansions"].items()},
        finished=None if finished is None else int(finished),
    )


def _decode_failure(value: dict[str, Any]) -> Failure:
    return Failure(
        since=int(value["since"]), last=int(value["last"]), error=str(value["error"]), times=int(value["times"])
    )

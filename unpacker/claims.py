"""Which wish claims which public name, so that no two wishes of one list mean different images by one name.

Wishes may meet on a name only if they would publish the same there. Which names a pattern comes to is not known
before the tags are; here are compared the names written in full, and the same rule written twice.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from unpacker.document import Findings, shown
from unpacker.reference import TagPattern
from unpacker.wish import Wish

_Rule: TypeAlias = tuple[str, tuple[TagPattern, ...], tuple[TagPattern, ...], str | None, int | None]


@dataclass(frozen=True, slots=True)
class Claims:
    """The wishes of one list so far, by what they claim."""

    wishes: dict[Wish, Wish] = field(default_factory=dict)
    _rules: dict[_Rule, Wish] = field(default_factory=dict)
    _paths: dict[str, Wish] = field(default_factory=dict)

    def admit(self, wish: Wish, findings: Findings) -> bool:
        """Takes a wish among the others, or says why it cannot stand beside one that stands before it.

        An exact duplicate is a warning and is not taken again.
        """
        place = (wish.line, wish.column)
        meaning = wish.meaning
        twin = self.wishes.get(meaning)
        if twin is not None:
            findings.warn(place, f"{shown(wish.text)} is wished already in line {twin.line}; counted once")
            return False
        rule = (str(wish.repository), meaning.tags, meaning.exclude, meaning.versions, meaning.newest)
        paths = [reference.public_path for reference in wish.literal_references]
        met = [(path, self._paths[path]) for path in paths if path in self._paths]
        if wish.tags and rule in self._rules:
            met.append((f"{wish.repository}:{wish.tags[0]}", self._rules[rule]))
        for path, other in met:
            difference = _difference(other, wish)
            if difference:
                message = f"the name {shown(path, 160)} is wished already in line {other.line}, {difference}"
                findings.fault(place, f"{message}: one name can be one image only (leave one of the two out)")
                return False
        if met:
            path, other = met[0]
            findings.warn(place, f"{shown(path, 160)} is wished already in line {other.line}, too; published once")
        self.wishes[meaning] = wish
        self._rules.setdefault(rule, wish)
        for path in paths:
            self._paths.setdefault(path, wish)
        return True


def _difference(first: Wish, second: Wish) -> str:
    """In what two wishes differ that publish under one name, or nothing if it is the same image either way."""
    if first.repository.scheme != second.repository.scheme:
        return f"there over {first.repository.scheme}, here over {second.repository.scheme}"
    if first.digest != second.digest:
        return f"there {_pin(first)}, here {_pin(second)}"
    if (first.meaning.platform, first.meaning.platforms) != (second.meaning.platform, second.meaning.platforms):
        return f"there for {_platforms(first)}, here for {_platforms(second)}"
    if first.gpu != second.gpu:
        return f"there {_gpu(first)}, here {_gpu(second)}"
    return ""


def _pin(wish: Wish) -> str:
    return f"pinned to {wish.digest.algorithm}:{wish.digest.short}…" if wish.digest else "not pinned to a digest"


def _platforms(wish: Wish) -> str:
    if not wish.platforms:
        return str(wish.platform)
    return f"the platforms {', '.join(map(str, wish.platforms))}"


def _gpu(wish: Wish) -> str:
    return "with gpu" if wish.gpu else "without gpu"

"""Plan, Outcome, Status → plain tables, JSON, Markdown. Pure: values in, text out.

JSON is the interface for programs: keys are added, never renamed; what is no UTF-8 is escaped (ASCII JSON).
"""

from __future__ import annotations

import datetime
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unpacker.image import Unresolved
from unpacker.multiarch import Place
from unpacker.plan import Action, Done, Outcome, Plan, Verb
from unpacker.record import Published, Unreadable
from unpacker.status import Failure, State, Status

_EPOCH = datetime.datetime(1970, 1, 1)
_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
_quoted = json.JSONEncoder().encode


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, width: int | None = None) -> str:
    """Columns separated by two blanks, the last one as long as it is; nothing for no rows.

    A table wider than `width` has two lines for each row, without a header: the first two cells, then, indented,
    those of the others that say anything. Names are never cut, because they are there to be copied.
    """
    lines = [[one_line(cell) for cell in row] for row in rows]
    if not lines:
        return ""
    widths = [max(len(row[i]) for row in (header, *lines)) for i in range(len(header) - 1)]
    text = "".join(
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[-1]]).rstrip() + "\n"
        for row in (header, *lines)
    )
    if width is None or all(len(line) <= width for line in text.splitlines()):
        return text
    return "".join(
        f"{row[0].ljust(widths[0])}  {row[1]}\n"
        + (f"    {'  '.join(cell for cell in row[2:] if cell)}\n" if any(row[2:]) else "")
        for row in lines
    )


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The same as a Markdown table; what a registry or a wishlist says cannot become markup."""
    lines = [f"| {' | '.join(header)} |", f"|{'|'.join(' --- ' for _ in header)}|"]
    lines += [f"| {' | '.join(_escape(cell) for cell in row)} |" for row in rows]
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def markdown_list(lines: Iterable[str]) -> str:
    """Lines of others as a Markdown list."""
    return "".join(f"- {_escape(line)}\n" for line in lines)


def one_line(cell: str) -> str:
    """A text with nothing in it but what can be seen, and blanks."""
    # A control character in a name or an error must not move the cursor of who reads the table.
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in cell)


_MARKUP = {ord(character): f"&#{ord(character)};" for character in "\\`*_[]<>|&#@"}


def _escape(cell: str) -> str:
    return one_line(cell).translate(_MARKUP)


def as_json(value: object) -> str:
    return json.dumps(value, indent=1) + "\n"


def size(count: int | None) -> str:
    """1234567 → 1.2 MB."""
    if count is None:
        return ""
    value = float(count)
    for unit in _UNITS:
        if value < 1000 or unit == _UNITS[-1]:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError("unreachable")


def age(seconds: float) -> str:
    """How long ago, in the one unit that matters."""
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def moment(unix: int | None) -> str | None:
    """Unix seconds as ISO 8601 in UTC."""
    if unix is None:
        return None
    # Many thousands of them are written at a time, and datetimes without a zone in half the time of others.
    return (_EPOCH + datetime.timedelta(seconds=unix)).isoformat(timespec="seconds") + "Z"


# -- plan -------------------------------------------------------------------------------------------------------


def plan_rows(plan: Plan, *, all_actions: bool = False) -> list[tuple[str, str, str]]:
    """What would change and what could not be known; with `all_actions` what stays, too."""
    rows = [(a.verb.value, a.public_path, a.reason) for a in plan.actions if a.changes or all_actions or a.vanished]
    rows += [("held", a.public_path, f"{a.reason}; needs --allow-removals") for a in plan.held]
    rows += [("error", u.name, str(u.error)) for u in plan.unresolved]
    return rows


PLAN_HEADER = ("ACTION", "NAME", "REASON")


def plan_summary(plan: Plan) -> str:
    """One line that says it all."""
    counts = Counter(a.verb for a in plan.actions)
    shown = [verb for verb in Verb if counts[verb] or verb not in (Verb.ADOPT, Verb.REPAIR)]
    text = ", ".join(f"{counts[verb]} to {verb.value}" for verb in shown)
    if plan.held:
        text += f", {len(plan.held)} removals held: {plan.refusal}"
    if plan.unresolved:
        text += f", {len(plan.unresolved)} not resolved"
    return text + "\n"


def plan_json(plan: Plan) -> dict[str, Any]:
    return {
        "actions": [_action_json(a) for a in plan.actions],
        "held": [_action_json(a) for a in plan.held],
        "refusal": plan.refusal or None,
        "unresolved": [_unresolved_json(u) for u in plan.unresolved],
        "warnings": list(plan.warnings),
    }


def _action_json(action: Action) -> dict[str, Any]:
    before, after = action.before, action.after
    return {
        "action": action.verb.value,
        "name": action.public_path,
        "reason": action.reason,
        "vanished": action.vanished,
        "before": before.to_json() if isinstance(before, Published) else None,
        "problem": before.problem if isinstance(before, Unreadable) else None,
        "after": None
        if after is None
        else {"digest": str(after.descriptor.digest), "platform": str(after.platform), "gpu": after.gpu},
    }


def _unresolved_json(unresolved: Unresolved) -> dict[str, Any]:
    return {
        "name": unresolved.name,
        "error": str(unresolved.error),
        "kind": type(unresolved.error).__name__,
        "temporary": bool(getattr(unresolved.error, "temporary", False)),
    }


# -- outcomes ---------------------------------------------------------------------------------------------------

OUTCOME_HEADER = ("RESULT", "NAME", "TIME", "READ", "REASON")


def outcome_rows(outcomes: Iterable[Outcome], unresolved: Iterable[Unresolved] = ()) -> list[tuple[str, ...]]:
    """What was done and what failed; what was kept only if it has vanished upstream."""
    rows: list[tuple[str, ...]] = []
    for o in outcomes:
        if o.done is Done.KEPT and not o.action.vanished:
            continue
        text = str(o.error) if o.error else o.action.reason
        rows.append((o.done.value, o.action.public_path, f"{o.seconds:.1f} s" if o.seconds else "", size(o.size), text))
    rows += [("failed", u.name, "", "", str(u.error)) for u in unresolved]
    return rows


def outcome_summary(outcomes: Sequence[Outcome], unresolved: Sequence[Unresolved], seconds: float) -> str:
    counts = Counter(o.done for o in outcomes)
    failed = counts[Done.FAILED] + len(unresolved)
    parts = [f"{counts[d]} {d.value}" for d in Done if counts[d] and d is not Done.FAILED]
    if failed:
        parts.append(f"{failed} failed")
    return f"{', '.join(parts) or 'nothing wished'} in {seconds:.1f} s\n"


def outcomes_json(outcomes: Iterable[Outcome], unresolved: Iterable[Unresolved]) -> dict[str, Any]:
    return {
        "outcomes": [
            {
                "result": o.done.value,
                "name": o.action.public_path,
                "reason": o.action.reason,
                "seconds": round(o.seconds, 3),
                "read": o.size,
                "error": None if o.error is None else str(o.error),
                "kind": None if o.error is None else type(o.error).__name__,
                "published": None if o.published is None else o.published.to_json(),
            }
            for o in outcomes
        ],
        "unresolved": [_unresolved_json(u) for u in unresolved],
    }


def status_note(
    before: bytes | None, owner: str, published: Mapping[str, Published], failures: Mapping[str, Failure], now: int
) -> bytes | None:
    """`.metadata/status.json`, for users to read beside the images; None if it would say nothing new.

    It has every published name, and what fails of each wishlist since when; so a run in which nothing changed, or
    another wishlist's run, writes nothing.
    """
    standing = ((path, published[path]) for path in sorted(published))
    # A name to a line, put together here: thousands of them are written with every change.
    lines = (
        f'{_quoted(path)}: {{"image_id": {_quoted(p.image_id)}, "published": "{moment(p.published)}"}}'
        for path, p in standing
    )
    names = ('{"schema": 1, "names": {' + ",\n".join(lines) + '}, "wishlists": ').encode("ascii")
    failing = {name: {"since": moment(f.since), "error": f.error} for name, f in sorted(failures.items())}
    lists: dict[str, Any] = {}
    try:
        old = json.loads(before or b"null")
        lists = dict(old["wishlists"])
        if before and before.startswith(names) and lists[owner]["failing"].keys() == failing.keys():
            return None
    except (ValueError, TypeError, KeyError, AttributeError):
        pass  # there is none yet, or not one of ours: it is written anew
    lists[owner] = {"finished": moment(now), "failing": failing}
    return names + f"{json.dumps(lists)}}}\n".encode("ascii")


# -- status -----------------------------------------------------------------------------------------------------

STATUS_HEADER = ("STATE", "NAME", "DIGEST", "IMAGE", "AGE", "SIZE", "NOTE")


def status_rows(rows: Iterable[Status], now: int) -> list[tuple[str, ...]]:
    texts: list[tuple[str, ...]] = []
    for row in rows:
        p = row.published
        note = row.error
        if row.since is not None:
            note = f"for {age(now - row.since)}" + (f": {note}" if note else "")
        if row.state is State.UNWISHED and p is not None:
            note = f"not in this wishlist; published for {', '.join(p.owners) or 'nobody'}"
        if not note and p is not None and p.place is Place.FRONT:
            note = f"leads to {p.root.rpartition(f'/{p.public_path}')[0]}"
        texts.append(
            (
                row.state.value,
                row.name,
                _short(p.digest) if p else "",
                _short(p.image_id) if p else "",
                age(now - p.published) if p else "",
                size(p.size) if p and p.place is not Place.FRONT else "",
                note,
            )
        )
    return texts


def _short(digest: str) -> str:
    return digest.partition(":")[2][:12]


def status_json(rows: Iterable[Status]) -> list[dict[str, Any]]:
    return [
        {
            "name": row.name,
            "state": row.state.value,
            "since": moment(row.since),
            "error": row.error or None,
            "published": row.published.to_json() if row.published else None,
        }
        for row in rows
    ]


# -- a merge request --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """One name that a merge request adds or changes (or drops: no digest), with what its image would bring.

    `platforms` are those that exist, `compressed` the bytes of the layers for the wished one.
    """

    name: str
    change: str
    digest: str = ""
    platform: str = ""
    platforms: tuple[str, ...] = ()
    layers: int = 0
    compressed: int = 0
    error: str = ""

    @property
    def would_fail(self) -> bool:
        """Whether it could not be published. What is dropped needs no registry's answer."""
        return bool(self.error) and self.change != "drop"


PROPOSAL_HEADER = ("CHANGE", "NAME", "PLATFORM", "LAYERS", "SIZE", "NOTE")


def proposal_rows(proposals: Iterable[Proposal]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for p in proposals:
        others = [x for x in p.platforms if x != p.platform]
        note = p.error or (f"also exists for {', '.join(others)}" if others else "")
        layers = str(p.layers) if p.layers else ""
        rows.append((p.change, p.name, p.platform, layers, size(p.compressed) if p.compressed else "", note))
    return rows


def proposal_summary(proposals: Sequence[Proposal]) -> str:
    counts = Counter(p.change for p in proposals)
    total = sum(p.compressed for p in proposals if not p.error)
    failed = sum(1 for p in proposals if p.would_fail)
    text = ", ".join(f"{n} {change}" for change, n in sorted(counts.items())) or "nothing changes"
    return f"{text}; {size(total)} to read at most" + (f"; {failed} would fail" if failed else "") + "\n"

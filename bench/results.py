"""From samples to medians, ratios and goals; printed as a table and kept as JSON. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

MB = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One job done once: seconds by part. `flush` is what `sync -f` then took: only with it is a root on disk, and
    only unpacker's has been by then. It is no part of the whole."""

    filesystem: str
    job: str
    contender: str
    parts: Mapping[str, float]
    flush: float

    @property
    def whole(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """One promise, what was measured, and whether it is kept; `reached` is None where nothing could be measured."""

    text: str
    measured: str
    reached: bool | None

    def __str__(self) -> str:
        word = {True: "reached", False: "NOT REACHED", None: "not measured"}[self.reached]
        return f"{word:<13} {self.text}: {self.measured}"


def seconds(samples: Sequence[Sample], filesystem: str, job: str, contender: str, part: str = "") -> float | None:
    """The median over the rounds of the whole, of one part, of the `flush`, or of whole and flush together
    (`durable`); None where there is no sample."""
    chosen = [s for s in samples if (s.filesystem, s.job, s.contender) == (filesystem, job, contender)]
    if part == "flush":
        return median(s.flush for s in chosen) if chosen else None
    if part == "durable":
        return median(s.whole + s.flush for s in chosen) if chosen else None
    values = [s.parts[part] if part else s.whole for s in chosen]
    return median(values) if values else None


def table(samples: Sequence[Sample]) -> list[str]:
    """One line per file system, job and contender: medians, spread, parts, and the ratio to unpacker."""
    lines = [
        f"{'':<7}{'job':<8}{'contender':<14}{'seconds':>8}  {'range':<13}{'ratio':>6}  {'then sync':>9}  parts",
    ]
    keys = dict.fromkeys((s.filesystem, s.job, s.contender) for s in samples)
    for filesystem, job, contender in sorted(keys, key=lambda key: (key[0], _JOBS.index(key[1]))):
        whole = seconds(samples, filesystem, job, contender)
        ours = seconds(samples, filesystem, job, "unpacker")
        flush = seconds(samples, filesystem, job, contender, "flush")
        chosen = [s for s in samples if (s.filesystem, s.job, s.contender) == (filesystem, job, contender)]
        assert whole is not None and flush is not None
        parts = {name: median(s.parts[name] for s in chosen) for name in chosen[0].parts}
        told = ", ".join(f"{name} {value:.2f}" for name, value in parts.items()) if len(parts) > 1 else ""
        span = f"{min(s.whole for s in chosen):.2f}–{max(s.whole for s in chosen):.2f}"
        ratio = "" if ours is None else f"{whole / ours:.2f}"
        lines.append(
            f"{filesystem:<7}{job:<8}{contender:<14}{whole:>8.2f}  {span:<13}{ratio:>6}  {flush:>9.2f}  {told}".rstrip()
        )
    return lines


_JOBS = ("first", "update", "second")
CONTENDERS = ("unpacker", "skopeo+umoci", "tar loop")


def speed_goals(samples: Sequence[Sample], filesystem: str) -> list[Goal]:
    """What was promised about times. Where there is a disk, the ratio with everybody's root on it is told too."""
    ours, update = (seconds(samples, filesystem, job, "unpacker") for job in ("first", "update"))
    umoci = seconds(samples, filesystem, "first", "skopeo+umoci")
    umoci_alone = seconds(samples, filesystem, "update", "skopeo+umoci", "unpack")
    loop = seconds(samples, filesystem, "first", "tar loop")
    loop_alone = seconds(samples, filesystem, "first", "tar loop", "unpack")
    goals = [
        _ratio(f"{filesystem}: at least 4 times as fast as skopeo + umoci", umoci, ours, 4),
        _ratio(f"{filesystem}: at least 1.5 times as fast as curl + gzip | tar", loop, ours, 1.5, loop_alone),
        _ratio(
            f"{filesystem}: an update of the top layer at least 10 times as fast as umoci unpacking all of it",
            umoci_alone, update, 10,
        ),
    ]  # fmt: skip
    if filesystem == "tmpfs":
        return goals
    durable = {name: seconds(samples, filesystem, "first", name, "durable") for name in CONTENDERS}
    return [
        *goals,
        *(
            _ratio(
                f"{filesystem}: the same with both on disk (`sync -f` included), {name}",
                durable[name],
                durable["unpacker"],
                wanted,
            )
            for name, wanted in (("skopeo+umoci", 4), ("tar loop", 1.5))
        ),
    ]


def _ratio(text: str, other: float | None, ours: float | None, wanted: float, bare: float | None = None) -> Goal:
    if other is None or ours is None:
        return Goal(text=text, measured="a contender is missing here", reached=None)
    measured = f"{other / ours:.2f} ({other:.2f} s to {ours:.2f} s)"
    if bare is not None:
        measured += f"; without their download, but with ours, {bare / ours:.2f}"
    return Goal(text=text, measured=measured, reached=other / ours >= wanted)


def noop_goal(tags: int, seconds: Sequence[float]) -> Goal:
    text = f"a run over {tags:,} unchanged tags takes at most 3 s"
    if not seconds:
        return Goal(text=text, measured="not run", reached=None)
    return Goal(text=text, measured=f"{median(seconds):.2f} s", reached=median(seconds) <= 3)


def memory_goals(peaks: Mapping[str, int]) -> list[Goal]:
    """`peaks` by layer: `small` and `large` are the two of the promise."""
    under = "peak memory under 300 MB"
    close = "peak memory with both layers differs by less than 10 %"
    if "small" not in peaks or "large" not in peaks:
        return [Goal(text=text, measured="not run", reached=None) for text in (under, close)]
    highest = max(peaks.values())
    small, large = peaks["small"], peaks["large"]
    difference = abs(large - small) / min(large, small)
    told = ", ".join(f"{name} {value / MB:.0f} MB" for name, value in peaks.items())
    return [
        Goal(text=under, measured=told, reached=highest < 300 * MB),
        Goal(text=close, measured=f"{difference:.1%}", reached=difference < 0.10),
    ]

"""From what the stratum 0 part measured to its tables and goals. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from bench.results import MB, Goal
from bench.usage import Spent

INGEST = "cvmfs_server ingest"
DUCC = {"fresh": (33.0, 36.0), "update": (3.4, 3.8), "new tag": (4.5, 4.5)}
"""User CPU seconds of DUCC 2.12 with cvmfs_server on an image of this shape, flat images only, on another day and with
other contents: ratios to it are derived, not measured. Promises are judged by the lower figures."""
INGEST_THEN = (21.0, 23.0)
"""The same of `cvmfs_server ingest` for the flattened tree of that image, that day: measured again here, it tells how
much more or less these contents on this machine ask for."""
FASTER = {"dense": (3.5, 2.0), "fast": (8.0, 4.0)}
"""How many times less a fresh publish shall take than DUCC, and than `cvmfs_server ingest`."""
DEFAULT_VIEW = "layers"
STARTUP = "start-up"
"""The job of a run that has nothing to do, as no image is wished for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """One job done once. `setup` is a compression and what is published, or INGEST."""

    setup: str
    job: str
    spent: Spent


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """Bytes in a repository after its first publish: of the files of the flattened image, of all files (those that
    upper layers hide included), and of catalogs and the like."""

    image: int
    files: int
    others: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """A repository with so many images: what publishing one more costs, how long the list of all published names takes
    to read, and the bytes of its root catalog."""

    images: int
    publish: tuple[Spent, ...]
    published: float
    root_catalog: int


def table(costs: Sequence[Cost], stored: Mapping[str, Stored]) -> list[str]:
    """One line per setup and job: medians, and ratios to what others took for the same."""
    lines = [
        f"{'':<20}{'job':<9}{'user':>7}{'system':>8}{'CPU':>7}{'wall':>8}"
        f"  {'ingest: CPU':>11}{'wall':>7}  {'DUCC (derived)':>14}"
    ]
    ingest = _middle(costs, INGEST, "fresh")
    for setup, job in dict.fromkeys((cost.setup, cost.job) for cost in costs):
        spent = _middle(costs, setup, job)
        assert spent is not None
        line = f"{setup:<20}{job:<9}{spent.user:>7.2f}{spent.system:>8.2f}{spent.cpu:>7.2f}{spent.wall:>8.2f}"
        if setup != INGEST:
            if job == "fresh" and ingest is not None:
                line += f"  {ingest.cpu / spent.cpu:>9.1f} ×{ingest.wall / spent.wall:>5.1f} ×"
            else:
                line += " " * 20
            if job in DUCC:
                low, high = (seconds / spent.user for seconds in DUCC[job])
                line += f"  {f'{low:.1f}–{high:.1f} ×' if high > low else f'{low:.1f} ×':>14}"
        lines.append(line.rstrip())
    lines += ["", f"{'bytes stored':<20}{'image':>12}{'all files':>12}{'catalogs':>12}"]
    lines += [f"{name:<20}{s.image:>12,}{s.files:>12,}{s.others:>12,}" for name, s in stored.items()]
    return lines


def growth_table(growths: Sequence[Growth]) -> list[str]:
    """One line per size of repository."""
    lines = [f"{'images':>7}  {'publish one more: CPU':>21}{'wall':>8}  {'published()':>11}  {'root catalog':>12}"]
    for growth in growths:
        cpu, wall = _publish(growth)
        lines.append(
            f"{growth.images:>7,}  {cpu:>19.2f} s{wall:>6.2f} s  {growth.published:>9.3f} s"
            f"  {growth.root_catalog / 1000:>9.1f} kB"
        )
    return lines


def goals(costs: Sequence[Cost], stored: Mapping[str, Stored], peaks: Mapping[str, int]) -> list[Goal]:
    """What was promised of the jobs, their bytes and their memory."""
    found = []
    ingest = _middle(costs, INGEST, "fresh")
    for compression, (times_ducc, times_ingest) in FASTER.items():
        setup = f"{compression}, {DEFAULT_VIEW}"
        fresh, update, tag = (_middle(costs, setup, job) for job in ("fresh", "update", "new tag"))
        for job, spent, times in (("fresh publish", fresh, times_ducc), ("update", update, 5.0)):
            found.append(_ducc(f"{compression}: {job}", job.split()[0], spent, ingest, times))
        for what in ("CPU", "wall"):
            found.append(_ingest(f"{compression}: fresh publish, {what} time", what, ingest, fresh, times_ingest))
        found.append(_tag(f"{compression}: a new tag", tag, _middle(costs, setup, STARTUP)))
    found.append(_bytes(stored))
    highest = max(peaks.values(), default=0)
    told = ", ".join(f"{name} {value / MB:.0f} MB" for name, value in peaks.items()) or "not run"
    found.append(Goal(text="peak memory under 400 MB", measured=told, reached=highest < 400 * MB if peaks else None))
    return found


def growth_goals(growths: Sequence[Growth]) -> list[Goal]:
    """What was promised of a repository that grows."""
    if len(growths) < 2:
        return []
    small, large = growths[0], growths[-1]
    (cpu, wall), (cpu_then, wall_then) = _publish(small), _publish(large)
    times = cpu_then / cpu
    return [
        Goal(
            text=f"from {small.images:,} to {large.images:,} images a publish costs at most 1.5 times as much",
            measured=f"{times:.2f} times the CPU ({cpu:.2f} to {cpu_then:.2f} s), {wall_then / wall:.2f} the wall time",
            reached=times <= 1.5,
        ),
        Goal(
            text=f"{large.images:,} published names are read in at most 1 s",
            measured=f"{large.published:.2f} s",
            reached=large.published <= 1,
        ),
        Goal(
            text=f"with {large.images:,} images the root catalog has at most 100 kB",
            measured=f"{large.root_catalog / 1000:.1f} kB",
            reached=large.root_catalog <= 100_000,
        ),
    ]


def _middle(costs: Sequence[Cost], setup: str, job: str) -> Spent | None:
    """The medians over the rounds; None where there is no sample."""
    spent = [cost.spent for cost in costs if (cost.setup, cost.job) == (setup, job)]
    if not spent:
        return None
    return Spent(
        wall=median(s.wall for s in spent), user=median(s.user for s in spent), system=median(s.system for s in spent)
    )


def _publish(growth: Growth) -> tuple[float, float]:
    return median(s.cpu for s in growth.publish), median(s.wall for s in growth.publish)


def _ducc(what: str, job: str, spent: Spent | None, ingest: Spent | None, times: float) -> Goal:
    low, high = DUCC[job]
    text = f"{what}, user CPU: at least {times:g} times less than DUCC ({low:g}–{high:g} s, not measured here)"
    if spent is None:
        return Goal(text=text, measured="not run", reached=None)
    told = f"{low / spent.user:.1f} to {high / spent.user:.1f} ({spent.user:.2f} s)"
    if ingest is not None and job == "fresh":
        slower = ingest.user / median(INGEST_THEN)
        told += f"; {low * slower / spent.user:.1f} to {high * slower / spent.user:.1f}, scaled by this run's ingest"
    return Goal(text=text, measured=told, reached=low / spent.user >= times)


def _ingest(what: str, which: str, ingest: Spent | None, spent: Spent | None, times: float) -> Goal:
    text = f"{what}: at least {times:g} times less than {INGEST}"
    if ingest is None or spent is None:
        return Goal(text=text, measured="one of them was not run", reached=None)
    theirs, ours = (s.cpu if which == "CPU" else s.wall for s in (ingest, spent))
    return Goal(
        text=text, measured=f"{theirs / ours:.1f} ({theirs:.2f} s to {ours:.2f} s)", reached=theirs / ours >= times
    )


def _tag(what: str, spent: Spent | None, start: Spent | None) -> Goal:
    text = f"{what} takes under 0.3 s of CPU beyond start-up"
    if spent is None or start is None:
        return Goal(text=text, measured="not run", reached=None)
    beyond = spent.cpu - start.cpu
    return Goal(
        text=text,
        measured=f"{beyond:.2f} s ({spent.cpu:.2f} s, of which start-up {start.cpu:.2f} s)",
        reached=beyond < 0.3,
    )


def _bytes(stored: Mapping[str, Stored]) -> Goal:
    text = f"dense: the image's files take no more bytes than after {INGEST}"
    ours, theirs = stored.get(f"dense, {DEFAULT_VIEW}"), stored.get(INGEST)
    if ours is None or theirs is None:
        return Goal(text=text, measured="one of them was not run", reached=None)
    return Goal(
        text=text,
        measured=f"{ours.image / theirs.image - 1:+.2%} ({ours.image:,} to {theirs.image:,})",
        reached=ours.image <= theirs.image,
    )

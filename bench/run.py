"""`make bench`: unpacker beside skopeo + umoci and beside curl + gzip + tar, in one run on one machine.

What is measured and how to read it: docs/benchmarks.md. Results go to stdout and to `.bench/results.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from bench import contenders, filesystems, memory, results, scaling, stratum0, stratum0_results
from bench.contenders import Failed
from bench.library import (
    APP,
    FULL,
    LARGE,
    QUICK,
    TAGS_PER_WISH,
    TINY,
    Library,
    NoRegistry,
    Scale,
    layered,
    library,
    warm,
)
from bench.results import Goal, Sample, speed_goals

HERE = os.path.abspath(".bench")
FILESYSTEMS = ("ext4", "tmpfs")
PARTS = ("speed", "noop", "memory", "stratum0", "scaling")
NATIVE = ("stratum0", "scaling")
ROOM = 6_000_000_000
QUICK_ROOM = 500_000_000


def main() -> int:
    options = _arguments()
    signal.signal(signal.SIGTERM, _on_terminate)
    _clean_environment()
    scale = QUICK if options.quick else FULL
    os.makedirs(HERE, exist_ok=True)
    print("\n".join(f"{name:<12}{value}" for name, value in machine().items()))
    measured: dict[str, Any] = {"scale": asdict(scale), "rounds": options.rounds}
    try:
        if set(options.only) - set(NATIVE):
            with library(scale, HERE) as stock:
                measured |= measure(stock, scale, options)
        if set(options.only) & set(NATIVE):
            with layered(scale, HERE) as stock:
                measured |= measure_native(stock, scale, options)
    except (Failed, NoRegistry) as error:
        print(f"\nThe benchmark failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    goals = report(measured, scale)
    with open(options.output, "w", encoding="utf-8") as file:
        document = measured | {
            "machine": machine(),
            "goals": goals,
        }
        json.dump(document, file, indent=1, default=asdict)
        file.write("\n")
    print(f"\nAll samples are in {os.path.relpath(options.output)}.")
    return 1 if options.check and any(goal.reached is False for goal in goals) else 0


def measure(stock: Library, scale: Scale, options: argparse.Namespace) -> dict[str, Any]:
    """What was asked for of the directory target, as it goes into the JSON file."""
    _describe(stock)
    samples: list[Sample] = []
    noop: list[float] = []
    peaks: dict[str, int] = {}
    room = QUICK_ROOM if options.quick else ROOM
    if "speed" in options.only:
        for kind in options.filesystems:
            try:
                filesystems.check(kind, room, HERE)
            except filesystems.Unavailable as error:
                print(f"\nSKIPPED {kind}: {error}")
                continue
            with filesystems.fresh(kind, room, HERE) as directory:
                floor = filesystems.write_through(directory, stock.facts["unpacked"])
            print(f"\n{kind}: to write that many bytes into one file, fsync included, takes {floor:.2f} s", end="")
            samples += speed(stock, scale, kind, room, options)
    if "noop" in options.only:
        noop = unchanged(stock, scale, options)
    if "memory" in options.only:
        peaks = peak_memory(stock, scale, options)
    return {"samples": samples, "noop": noop, "peaks": peaks}


def measure_native(stock: Library, scale: Scale, options: argparse.Namespace) -> dict[str, Any]:
    """What was asked for of the stratum 0 target."""
    _describe(stock)
    measured: dict[str, Any] = {}
    if "stratum0" in options.only:
        measured["stratum0"] = stratum0.run(stock, scale, options, HERE)
    if "scaling" in options.only:
        measured["growths"] = scaling.run(stock, scale, options, HERE)
    return measured


def _describe(stock: Library) -> None:
    facts = stock.facts
    print(
        f"\nimage       {facts['files']:,} files in three layers, {facts['unpacked'] / 1e6:.0f} MB of tar,"
        f" {facts['compressed'] / 1e6:.0f} MB of gzip"
    )


def speed(stock: Library, scale: Scale, kind: str, room: int, options: argparse.Namespace) -> list[Sample]:
    """All contenders in turn, `rounds` times; who goes first changes from round to round."""
    names = []
    for name in contenders.NEEDS:
        lacking = contenders.missing(name)
        if lacking:
            print(f"\nSKIPPED {name}: not installed: {', '.join(lacking)}")
        else:
            names.append(name)
    samples = []
    for number in range(options.rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            print(f"\n{kind}, round {number + 1} of {options.rounds}, {name}:", end="", flush=True)
            with filesystems.fresh(kind, room, HERE) as directory:
                samples += _one_contender(stock, scale, kind, name, directory, options)
    print()
    return samples


def _one_contender(
    stock: Library, scale: Scale, kind: str, name: str, directory: str, options: argparse.Namespace
) -> list[Sample]:
    filesystems.settle()
    warm(HERE, scale.key)
    # Programs and libraries come into memory with a small job that is not measured.
    _contender(name, os.path.join(directory, "warm"), options).run("first", stock.tiny())
    contender = _contender(name, os.path.join(directory, "measured"), options)
    samples = []
    for job, version, tag in (("first", "v1", "current"), ("update", "v2", "current"), ("second", "v3", "other")):
        stock.tag(version, tag)
        os.sync()
        done = contender.run(job, stock.source(version, tag))
        start = time.perf_counter()
        subprocess.run(["sync", "-f", directory], check=True)
        flush = time.perf_counter() - start
        sample = Sample(filesystem=kind, job=job, contender=name, parts=done.parts, flush=flush)
        print(f"  {job} {sample.whole:.2f} s", end="", flush=True)
        samples.append(sample)
        wrong = contenders.differences(stock.listings[version], done.root)
        if wrong:
            raise Failed(f"the root that {name} made is not the image: {', '.join(wrong)}")
    return samples


def _contender(name: str, directory: str, options: argparse.Namespace) -> contenders.Contender:
    os.mkdir(directory)
    return contenders.make(name, directory, options.jobs)


def unchanged(stock: Library, scale: Scale, options: argparse.Namespace) -> list[float]:
    """Seconds of runs in which all of many tags are as they were."""
    print(f"\n{scale.tags:,} tags of as many images:", end="", flush=True)
    with tempfile.TemporaryDirectory(prefix="tags-", dir=HERE) as directory:
        patterns = range((scale.tags - 1) // TAGS_PER_WISH + 1)
        wishlist = contenders.write_wishlist(directory, [f"http://{stock.host}/{TINY}:{n}-*" for n in patterns])
        command = contenders.reconcile(wishlist, directory, _options(options))
        print(f"  all new {contenders.timed(command, directory):.2f} s, unchanged", end="", flush=True)
        published = os.listdir(os.path.join(directory, "target", stock.host, os.path.dirname(TINY)))
        if len(published) != scale.tags:
            raise Failed(f"{len(published)} of {scale.tags} tags were published")
        seconds = []
        for _ in range(options.rounds):
            seconds.append(contenders.timed(command, directory))
            print(f" {seconds[-1]:.2f} s", end="", flush=True)
    print()
    return seconds


def peak_memory(stock: Library, scale: Scale, options: argparse.Namespace) -> dict[str, int]:
    """The highest memory of first publishes: an image of one small layer, of one large layer, and the large image."""
    if shutil.disk_usage(HERE).free < 2 * scale.large_layer:
        print(f"\nSKIPPED memory: {2 * scale.large_layer / 1e9:.0f} GB free are wanted in {HERE}")
        return {}
    stock.tag("v1", "current")
    peaks = {}
    # A short run gives few samples, so the short ones are repeated.
    for name, image, runs in (
        ("small", f"{LARGE}:small", 3),
        ("large", f"{LARGE}:large", 1),
        ("image", f"{APP}:current", 3),
    ):
        print(f"\nmemory, {name}:", end="", flush=True)
        peaks[name] = max(_peak(f"http://{stock.host}/{image}", options) for _ in range(runs))
    print()
    return peaks


def _peak(wish: str, options: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix="memory-", dir=HERE) as directory:
        command = contenders.reconcile(contenders.write_wishlist(directory, [wish]), directory, _options(options))
        log = os.path.join(directory, "log")
        with open(log, "wb") as file:
            usage = memory.watch(command, log=file.fileno(), directory=directory)
        if usage.status != 0:
            raise contenders.failed(command, usage.status, log)
        print(f"  {usage.peak / 1e6:.0f} MB in {usage.processes} process(es)", end="", flush=True)
        return usage.peak


def report(measured: dict[str, Any], scale: Scale) -> list[Goal]:
    goals: list[Goal] = []
    if "samples" in measured:
        samples: list[Sample] = measured["samples"]
        if samples:
            print("\n" + "\n".join(results.table(samples)))
        goals += [goal for kind in dict.fromkeys(s.filesystem for s in samples) for goal in speed_goals(samples, kind)]
        goals += [results.noop_goal(scale.tags, measured["noop"]), *results.memory_goals(measured["peaks"])]
    if "stratum0" in measured:
        native = measured["stratum0"]
        print("\n" + "\n".join(stratum0_results.table(native["costs"], native["stored"])))
        goals += stratum0_results.goals(**native)
    if "growths" in measured:
        print("\n" + "\n".join(stratum0_results.growth_table(measured["growths"])))
        goals += stratum0_results.growth_goals(measured["growths"])
    print("\n" + "\n".join(str(goal) for goal in goals))
    if scale != FULL:
        print("\nThese were small images: start-up dominates, and neither times nor goals mean anything.")
    return goals


def machine() -> dict[str, str]:
    """Where this ran, for whoever reads the figures."""
    model = platform.machine()
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return {
        "cpu": f"{os.cpu_count()} × {names[0] if names else model}",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.0f} GB",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": " ".join(f"{value:.2f}" for value in os.getloadavg()),
        "user": "root" if os.geteuid() == 0 else "not root",
        **{name: _version(name) for name in ("skopeo", "umoci", "tar", "gzip")},
    }


def _version(program: str) -> str:
    if shutil.which(program) is None:
        return "not installed"
    return subprocess.run([program, "--version"], capture_output=True, text=True).stdout.partition("\n")[0]


def _options(options: argparse.Namespace) -> list[str]:
    return [] if options.jobs is None else ["--jobs", str(options.jobs)]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench", description="Compares unpacker with the tools of the trade.")
    parser.add_argument("--quick", action="store_true", help="small images: tries this script, measures nothing")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="how often each is measured (default 3)")
    parser.add_argument("--jobs", type=int, metavar="N", help="unpacker's --jobs (default: its own)")
    parser.add_argument("--filesystems", type=_choices(FILESYSTEMS), default=FILESYSTEMS, metavar="ext4,tmpfs")
    parser.add_argument("--only", type=_choices(PARTS), default=PARTS, metavar="speed,noop,memory,stratum0,scaling")
    parser.add_argument("--output", default=os.path.join(HERE, "results.json"), metavar="FILE")
    parser.add_argument(
        "--check", action="store_true", help="end with 1 unless all goals that were measured are reached"
    )
    return parser.parse_args()


def _choices(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        chosen = tuple(text.split(","))
        unknown = [name for name in chosen if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not one of {', '.join(known)}")
        return chosen

    return parse


def _clean_environment() -> None:
    """Forgets settings of unpacker's, so that what is measured is what it does by default."""
    for name in [name for name in os.environ if name.startswith(("UNPACKER_", "DUCC_"))]:
        del os.environ[name]
    # An installed program has its bytecode; this one, run from the checkout, gets it with the job that is not measured.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    # A proxy would not know the registry on this machine's loopback.
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"


def _on_terminate(*_: object) -> None:
    # Through the `with` blocks, which unmount and end the registry.
    raise SystemExit(143)


if __name__ == "__main__":
    sys.exit(main())

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
from collections.abc import Sequence
from dataclasses import asdict

from bench import contenders, filesystems, memory, results
from bench.contenders import Failed, Source
from bench.library import APP, FULL, LARGE, QUICK, TINY, Library, NoRegistry, Scale, library, warm
from bench.results import Goal, Sample

HERE = os.path.abspath(".bench")
PARTS = ("speed", "noop", "memory")
ROOM = 6_000_000_000
QUICK_ROOM = 500_000_000


def main() -> int:
    options = _arguments()
    signal.signal(signal.SIGTERM, _on_terminate)
    _clean_environment()
    scale = QUICK if options.quick else FULL
    os.makedirs(HERE, exist_ok=True)
    print("\n".join(f"{name:<12}{value}" for name, value in machine().items()))
    try:
        with library(scale, HERE) as stock:
            measured = measure(stock, scale, options)
    except (Failed, NoRegistry) as error:
        print(f"\nThe benchmark failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    goals = report(measured, scale)
    with open(options.output, "w", encoding="utf-8") as file:
        json.dump(measured | {"machine": machine(), "goals": [asdict(goal) for goal in goals]}, file, indent=1)
        file.write("\n")
    print(f"\nAll samples are in {os.path.relpath(options.output)}.")
    return 1 if options.check and any(goal.reached is False for goal in goals) else 0


def measure(stock: Library, scale: Scale, options: argparse.Namespace) -> dict[str, object]:
    """Everything that was asked for, as it goes into the JSON file."""
    facts = stock.facts
    print(f"image       {facts['unpacked'] / 1e6:.0f} MB of tar, {facts['compressed'] / 1e6:.0f} MB of gzip, three layers")
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
            samples += speed(stock, scale, kind, room, options)
    if "noop" in options.only:
        noop = unchanged(stock, scale, options)
    if "memory" in options.only:
        peaks = peak_memory(stock, scale, options)
    return {
        "scale": asdict(scale),
        "rounds": options.rounds,
        "samples": [asdict(sample) for sample in samples],
        "noop": noop,
        "peaks": peaks,
    }


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
    contender = contenders.make(name, directory, options.jobs)
    samples = []
    for job, version, tag in (("first", "v1", "current"), ("update", "v2", "current"), ("second", "v3", "other")):
        stock.tag(version, tag)
        if job == "first":
            filesystems.settle()
        else:
            os.sync()
        _warm(scale)
        source = Source(repository=f"{stock.host}/{APP}", tag=tag, layers=stock.layers(version))
        done = contender.run(job, source)
        start = time.perf_counter()
        subprocess.run(["sync", "-f", directory], check=True)
        flush = time.perf_counter() - start
        sample = Sample(filesystem=kind, job=job, contender=name, parts=done.parts, flush=flush)
        print(f"  {job} {sample.whole:.2f} s", end="", flush=True)
        samples.append(sample)
        _compare(done.root, job, name, kind)
    return samples


_reference: dict[str, set[tuple[str, str]]] = {}

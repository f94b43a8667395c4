"""The stratum 0 part of the benchmark: publishing into a CernVM-FS repository, beside `cvmfs_server ingest`.

Four jobs follow each other in one repository, each a command of its own:

    fresh      an image that the repository has never seen
    update     its tag moved to an image of which only the top layer differs
    new tag    another tag of that same image
    no-op      nothing changed

Before them comes the same command with an empty wishlist, which tells what starting up costs.

`cvmfs_server ingest` can do one thing: publish the tar of the tree, already flattened by somebody else.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from bench import contenders, filesystems, images, memory
from bench.contenders import UNPACKER, Failed, Source
from bench.library import Library, Scale, warm
from bench.stratum0_results import INGEST, STARTUP, Cost, Stored
from bench.usage import Spent, measure
from tests.cvmfs_managed import managed
from unpacker.cvmfs.reader import Reader
from unpacker.cvmfs.repository import Repository
from unpacker.cvmfs.row import content_of

NAME = "bench.example.org"
JOBS = (("fresh", "v1", "current"), ("update", "v2", "current"), ("new tag", "v2", "other"), ("no-op", "v2", "other"))
ROOM = 8_000_000_000
"""Of bytes on the disk, for the repositories of one round and the flattened tar."""


@dataclass(frozen=True, slots=True)
class Setup:
    """How a repository is made and written to."""

    compression: str
    layers_view: bool

    def __str__(self) -> str:
        return f"{self.compression}, {'layers' if self.layers_view else 'roots only'}"


SETUPS = tuple(Setup(compression, view) for compression in ("dense", "fast") for view in (True, False))


def run(stock: Library, scale: Scale, options: argparse.Namespace, here: str) -> dict[str, Any]:
    """All of it: what the jobs cost, what they stored, how much memory the first one took, by setup."""
    room = int(ROOM * scale.app) + 500_000_000
    if shutil.disk_usage(here).free < room:
        print(f"\nSKIPPED stratum0: {room / 1e9:.0f} GB free are wanted in {here}")
        return {"costs": [], "stored": {}, "peaks": {}}
    costs: list[Cost] = []
    stored: dict[str, Stored] = {}
    peaks: dict[str, int] = {}
    with tempfile.TemporaryDirectory(prefix="stratum0-", dir=here) as directory:
        tar = _flattened(stock, directory)
        for number in range(options.rounds):
            for setup in SETUPS[number % len(SETUPS) :] + SETUPS[: number % len(SETUPS)]:
                print(f"\nround {number + 1} of {options.rounds}, {setup}:", end="", flush=True)
                costs += _jobs(stock, scale, setup, directory, here, options, stored)
            costs += _ingest(tar, stock, directory, stored)
        for setup in SETUPS[::2]:
            print(f"\nmemory, {setup}:", end="", flush=True)
            peaks[str(setup)] = _peak(stock, setup, directory, options)
    print()
    return {"costs": costs, "stored": stored, "peaks": peaks}


def _jobs(
    stock: Library,
    scale: Scale,
    setup: Setup,
    directory: str,
    here: str,
    options: argparse.Namespace,
    stored: dict[str, Stored],
) -> Iterator[Cost]:
    filesystems.settle()
    warm(here, scale.layered_key)
    with target(directory, setup) as made:
        wishes: dict[str, str] = {}
        yield Cost(setup=str(setup), job=STARTUP, spent=made.reconcile([], options))
        for job, version, tag in JOBS:
            stock.tag(version, tag)
            source = stock.source(version, tag)
            wishes[tag] = f"http://{source.repository}:{tag}"
            spent = made.reconcile(list(wishes.values()), options)
            print(f"  {job} {spent.cpu:.2f} s", end="", flush=True)
            yield Cost(setup=str(setup), job=job, spent=spent)
            if job == "fresh":
                stored[str(setup)] = _examined(made.repository, source, stock.listings[version])


def _ingest(tar: str, stock: Library, directory: str, stored: dict[str, Stored]) -> Iterator[Cost]:
    print(f"\n{INGEST}:", end="", flush=True)
    filesystems.settle()
    with open(tar, "rb") as file:
        while file.read(1 << 20):
            pass
    try:
        with managed("bench") as repository:
            command = ["cvmfs_server", "ingest", "-t", tar, "-b", "image", repository.name]
            spent = measure(command, directory)
            print(f"  fresh {spent.cpu:.2f} s", end="", flush=True)
            files, others = _sizes(str(repository.storage))
            stored[INGEST] = Stored(image=files, files=files, others=others)
    except pytest.skip.Exception as reason:
        print(f"  SKIPPED: {reason}", end="")
        return
    yield Cost(setup=INGEST, job="fresh", spent=spent)


@dataclass(frozen=True, slots=True)
class Target:
    """A repository of ours in a directory of its own, and how to publish into it."""

    directory: str
    setup: Setup

    @property
    def repository(self) -> str:
        return os.path.join(self.directory, "repository")

    def command(self, wishes: list[str], options: argparse.Namespace) -> list[str]:
        wishlist = contenders.write_wishlist(self.directory, wishes)
        jobs = [] if options.jobs is None else ["--jobs", str(options.jobs)]
        state = os.path.join(self.directory, "state")
        return [UNPACKER, "reconcile", wishlist, "--target", f"stratum0:{self.repository}", "--state", state, *jobs]

    @property
    def environment(self) -> dict[str, str]:
        return {"UNPACKER_LAYERS_VIEW": str(self.setup.layers_view).lower()}

    def reconcile(self, wishes: list[str], options: argparse.Namespace) -> Spent:
        """What it costs to publish these, and no others."""
        return measure(self.command(wishes, options), self.directory, self.environment)


@contextmanager
def target(below: str, setup: Setup) -> Iterator[Target]:
    """An empty repository, gone after the `with`."""
    with tempfile.TemporaryDirectory(prefix="target-", dir=below) as directory:
        made = Target(directory, setup)
        where = f"stratum0:{made.repository}"
        measure([UNPACKER, "init", where, "--name", NAME, "--compression", setup.compression], directory)
        yield made


def _examined(directory: str, source: Source, listing: images.Listing) -> Stored:
    """What a repository stores; Failed unless the image in it is the one that was to be published."""
    repository = Repository.open(directory)
    sizes: dict[str, int] = {}
    left = dict(listing)
    with Reader(repository.objects, repository.manifest().root) as reader:
        link = reader.lookup(f"/{source.repository}:{source.tag}")
        if link is None:
            raise Failed(f"{source.repository}:{source.tag} was not published")
        root = os.path.normpath(os.path.join(os.path.dirname(link.path), link.row.symlink))
        for found in reader.walk(root):
            path = found.path.removeprefix(root).removeprefix("/")
            kind, what, _ = left.pop(path, ("", "", 0))
            if kind == "file":
                if found.row.size != what:
                    raise Failed(f"{path} was published with {found.row.size} bytes, but has {what}")
                for name, suffix in content_of(found.row, found.chunks).objects:
                    where = repository.objects.path(name, suffix)
                    sizes[where] = os.path.getsize(where)
            elif kind == "symlink" and found.row.symlink != what:
                raise Failed(f"{path} was published as a link to {found.row.symlink}, but leads to {what}")
    if left:
        raise Failed(f"not in what was published: {', '.join(list(left)[:5])}")
    files, others = _sizes(directory)
    return Stored(image=sum(sizes.values()), files=files, others=others)


def _sizes(directory: str) -> tuple[int, int]:
    """Bytes of the contents of files, and of catalogs and all else, in the object store of a repository."""
    files = others = 0
    for at, _, names in os.walk(os.path.join(directory, "data")):
        for name in names:
            size = os.path.getsize(os.path.join(at, name))
            if name[-1] in "CHXM":
                others += size
            else:
                files += size
    return files, others


def _flattened(stock: Library, directory: str) -> str:
    """The tar of the flattened image, as somebody must have made it for `cvmfs_server ingest`."""
    stock.tag("v1", "current")
    loop = os.path.join(directory, "loop")
    os.mkdir(loop)
    root = contenders.TarLoop(loop).run("first", stock.source("v1", "current")).root
    tar = os.path.join(directory, "flat.tar")
    subprocess.run(["tar", "--numeric-owner", "-C", root, "-cf", tar, "."], check=True)
    filesystems.remove(loop)
    return tar


def _peak(stock: Library, setup: Setup, directory: str, options: argparse.Namespace) -> int:
    """The highest memory of a fresh publish, in a run of its own, as looking at it costs time."""
    stock.tag("v1", "current")
    source = stock.source("v1", "current")
    with target(directory, setup) as made:
        command = made.command([f"http://{source.repository}:{source.tag}"], options)
        log = os.path.join(made.directory, "log")
        with open(log, "wb") as file:
            usage = memory.watch(
                command, log=file.fileno(), directory=made.directory, environment=os.environ | made.environment
            )
        if usage.status != 0:
            raise contenders.failed(command, usage.status, log)
    print(f"  {usage.peak / 1e6:.0f} MB in {usage.processes} process(es)", end="", flush=True)
    return usage.peak

"""How a CernVM-FS repository of ours bears many images: the same small publish into one with few and one with many.

The many are made by our own publisher, with tiny roots, because it is names, catalogs and records that grow; the image
that is published then is like them, so that nothing of its own hides what the others cost.
"""

from __future__ import annotations

import argparse
import os
import time
from statistics import median

from bench.library import Library, Scale
from bench.stratum0 import NAME, Setup, Target, target
from bench.stratum0_results import Growth
from tests.publisher_contract import Contents, release, stored
from unpacker.cvmfs.repository import Repository
from unpacker.publish.stratum0 import Stratum0Publisher

FEW = 10
TAGS = 20
"""Of one repository of the registry; the repositories are spread over as many namespaces as it takes."""
BATCH = 1_000
TINY: Contents = {"etc/motd": b"one of many\n", "usr/bin/tool": b"#!/bin/sh\n", "usr/lib/tool": "../bin/tool"}


def run(stock: Library, scale: Scale, options: argparse.Namespace, directory: str) -> list[Growth]:
    """What there is to tell of a repository with few images, and of one with many."""
    found = []
    for images in (FEW, scale.images):
        print(f"\nrepository of {images:,} images:", end="", flush=True)
        with target(directory, Setup("dense", True)) as made:
            start = time.perf_counter()
            fill(made.repository, images)
            print(f"  made in {time.perf_counter() - start:.1f} s", end="", flush=True)
            found.append(_grown(stock, made, images, options))
    print()
    return found


def fill(directory: str, images: int) -> None:
    """Publishes so many images, each with a root of its own."""
    publisher = Stratum0Publisher(directory, layers_view=False)
    with publisher.lock():
        tree = stored(publisher, TINY)
        for first in range(0, images, BATCH):
            with publisher.transaction(NAME) as transaction:
                for number in range(first, min(first + BATCH, images)):
                    transaction.publish(release(name(number), tree, seed=str(number)))


def name(number: int) -> str:
    repository, tag = divmod(number, TAGS)
    return f"registry.example.org/team{repository // TAGS}/tool{repository}:{tag}"


def _grown(stock: Library, made: Target, images: int, options: argparse.Namespace) -> Growth:
    wishes: list[str] = []
    spent = []
    for source in stock.tinies():
        wishes.append(f"http://{source.repository}:{source.tag}")
        spent.append(made.reconcile(wishes, options))
        print(f"  {spent[-1].cpu:.2f} s", end="", flush=True)
    reading = []
    for _ in range(3):
        publisher = Stratum0Publisher(made.repository)
        start = time.perf_counter()
        names = len(publisher.published())
        reading.append(time.perf_counter() - start)
    assert names == images + len(wishes), f"{names} names"
    root = Repository.open(os.path.abspath(made.repository)).manifest().root_size
    # The first one reads the layer that all of them have.
    return Growth(images=images, publish=tuple(spent[1:]), published=median(reading), root_catalog=root)

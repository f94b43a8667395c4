"""The three ways from a registry to a directory that the benchmark compares.

Each does the same three jobs, one after the other, in one fresh directory:

    first    a tag that this directory has never seen
    update   the same tag, moved to an image of which only the top layer differs
    second   another tag, of an image whose layers are all known by then

and tells for each job how long its parts took, in seconds, and where the root lies. What a way can keep between the
jobs it keeps: unpacker its pool and its cache, skopeo its image layout (it fetches only what is new), the loop its
blobs. No way has another's knowledge.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from bench import images

UNPACKER = os.path.join(os.path.dirname(sys.executable), "unpacker")
JOBS = ("first", "update", "second")


class Failed(Exception):
    """A contender did not do its job; the message ends with what it said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """One job done: seconds by part (they add up to the whole), and the root that it made."""

    parts: Mapping[str, float]
    root: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What to fetch: `repository` is `127.0.0.1:PORT/name`, `layers` the digests of the image behind the tag now."""

    repository: str
    tag: str
    layers: tuple[str, ...]


class Contender(Protocol):
    """One way. An instance has one directory and does the jobs in order."""

    def run(self, job: str, source: Source) -> Done: ...


class Unpacker:
    """A: one command, durable when it returns; layers are fetched, verified, unpacked and pooled as they stream."""

    def __init__(self, directory: str, jobs: int | None) -> None:
        self._directory = directory
        self._options = [] if jobs is None else ["--jobs", str(jobs)]
        self._wishes: dict[str, str] = {}

    def run(self, job: str, source: Source) -> Done:
        self._wishes[source.tag] = f"http://{source.repository}:{source.tag}"
        wishlist = write_wishlist(self._directory, self._wishes.values())
        seconds = timed(reconcile(wishlist, self._directory, self._options), self._directory)
        root = os.path.join(self._directory, "target", f"{source.repository}:{source.tag}")
        return Done(parts={"reconcile": seconds}, root=root)


class SkopeoUmoci:
    """B: `skopeo copy` into an OCI image layout, then `umoci unpack`."""

    def __init__(self, directory: str) -> None:
        self._directory = directory

    def run(self, job: str, source: Source) -> Done:
        layout, bundle = os.path.join(self._directory, "layout"), os.path.join(self._directory, f"bundle-{job}")
        download = timed(
            ["skopeo", "--insecure-policy", "copy", "--quiet", "--src-tls-verify=false",
             f"docker://{source.repository}:{source.tag}", f"oci:{layout}:{job}"],
            self._directory,
        )  # fmt: skip
        rootless = [] if os.geteuid() == 0 else ["--rootless"]
        unpack = timed(["umoci", "unpack", *rootless, "--image", f"{layout}:{job}", bundle], self._directory)
        return Done(parts={"download": download, "unpack": unpack}, root=os.path.join(bundle, "rootfs"))


class TarLoop:
    """C: `curl` of each blob, then `gzip -dc | tar -x` of one after the other. Verifies nothing, knows no whiteouts."""

    def __init__(self, directory: str) -> None:
        self._directory = directory

    def run(self, job: str, source: Source) -> Done:
        root = os.path.join(self._directory, f"root-{job}")
        host, _, name = source.repository.partition("/")
        blobs = [os.path.join(self._directory, digest.partition(":")[2]) for digest in source.layers]
        fetch = [
            f"curl -sSf --noproxy '*' -o {blob} http://{host}/v2/{name}/blobs/{digest}"
            for blob, digest in zip(blobs, source.layers, strict=True)
            if not os.path.exists(blob)
        ]
        extract = [f"mkdir {root}", *(f"gzip -dc {blob} | tar -xp --numeric-owner -C {root}" for blob in blobs)]
        script = "set -e -o pipefail\n{}\n"
        download = timed(["bash", "-c", script.format("\n".join(fetch))], self._directory) if fetch else 0.0
        unpack = timed(["bash", "-c", script.format("\n".join(extract))], self._directory)
        return Done(parts={"download": download, "unpack": unpack}, root=root)


NEEDS = {"unpacker": (), "skopeo+umoci": ("skopeo", "umoci"), "tar loop": ("curl", "gzip", "tar", "bash")}


def make(name: str, directory: str, jobs: int | None) -> Contender:
    if name == "unpacker":
        return Unpacker(directory, jobs)
    return SkopeoUmoci(directory) if name == "skopeo+umoci" else TarLoop(directory)


def missing(name: str) -> list[str]:
    """The programs that a contender needs and this machine lacks."""
    return [program for program in NEEDS[name] if shutil.which(program) is None]


def write_wishlist(directory: str, wishes: Iterable[str]) -> str:
    path = os.path.join(directory, "wishlist.yaml")
    with open(path, "w", encoding="ascii") as file:
        # A JSON document is a YAML document.
        json.dump({"version": 2, "images": list(wishes)}, file)
    return path


def reconcile(wishlist: str, directory: str, options: Sequence[str]) -> list[str]:
    """The command line of a run whose target and state lie in `directory`."""
    target, state = os.path.join(directory, "target"), os.path.join(directory, "state")
    return [UNPACKER, "reconcile", wishlist, "--target", target, "--state", state, *options]


def timed(command: Sequence[str], directory: str) -> float:
    """Wall-clock seconds of a command, start-up included. Failed unless it ends with 0."""
    log = os.path.join(directory, "log")
    with open(log, "wb") as file:
        start = time.perf_counter()
        answer = subprocess.run(command, cwd=directory, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
        seconds = time.perf_counter() - start
    if answer.returncode != 0:
        raise failed(command, answer.returncode, log)
    return seconds


def failed(command: Sequence[str], status: int, log: str) -> Failed:
    with open(log, encoding="utf-8", errors="replace") as file:
        said = "".join(file.readlines()[-15:])
    return Failed(f"`{' '.join(command[:3])} …` ended with {status}:\n{said}")


def differences(listing: images.Listing, root: str) -> list[str]:
    """The first few paths that a root lacks or holds otherwise; of every tenth file the contents are compared too."""
    found = []
    for path, (kind, what, checksum) in listing.items():
        full = os.path.join(root, path)
        try:
            if kind == "file":
                same = not os.path.islink(full) and os.path.getsize(full) == what
                if same and checksum % 10 == 0:
                    with open(full, "rb") as file:
                        same = zlib.crc32(file.read()) == checksum
            else:
                same = os.readlink(full) == what if kind == "symlink" else os.path.isdir(full)
        except OSError:
            same = False
        if not same:
            found.append(path)
    return found[:5]

"""The registry of the benchmark: images generated and pushed once, kept under `.bench/` for later runs."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import images
from bench.contenders import Source
from demo import debian
from tests.docker_registry import DockerRegistry
from tests.images import BuiltImage
from unpacker import oci

APP, TINY, LARGE, LAYERED = "bench/app", "bench/tiny", "bench/large", "bench/layered"
TAGS_PER_WISH = 250
FEW_TINIES = 4
TINY_SHAPE = images.Shape(name="tiny", files=40, directories=10)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How large the images are, in bytes; `app` is the share of the full images of 900 and 830 MB, `images` how many a
    large repository has."""

    app: float = 1.0
    tags: int = 1_000
    small_layer: int = 100_000_000
    large_layer: int = 4_000_000_000
    images: int = 10_000

    @property
    def key(self) -> str:
        return f"{images.GENERATOR}-{images.SEED}-{self.app:g}-{self.tags}-{self.small_layer}-{self.large_layer}"

    @property
    def layered_key(self) -> str:
        return f"layered-{images.GENERATOR}-{images.SEED}-{self.app:g}"


FULL = Scale()
QUICK = Scale(app=0.02, tags=40, small_layer=10_000_000, large_layer=50_000_000, images=60)


class NoRegistry(Exception):
    """There is nothing to fetch from."""


class Library:
    """A running registry with the images in it."""

    def __init__(self, server: DockerRegistry, document: dict[str, Any], repository: str = APP) -> None:
        self._server = server
        self._repository = repository
        self._manifests: dict[str, str] = document["manifests"]
        self.host = server.host
        self.facts: dict[str, int] = document["facts"]
        """What the large image is: its numbers of files and bytes, by word."""
        self.listings: dict[str, images.Listing] = document["listings"]
        """What a root of each version of the large image holds."""

    def tag(self, name: str, tag: str) -> None:
        """Lets a tag of the large image point at its version `name`."""
        self._server.push_manifest(self._repository, tag, self._manifests[name].encode(), oci.OCI_MANIFEST)

    def source(self, name: str, tag: str) -> Source:
        """The large image's version `name`, which `tag` points at."""
        return Source(repository=f"{self.host}/{self._repository}", tag=tag, layers=self._layers(name))

    def tiny(self) -> Source:
        return Source(repository=f"{self.host}/{TINY}", tag="0-0", layers=self._layers(TINY))

    def tinies(self) -> list[Source]:
        """A few images of the same small layer."""
        layers = self._layers(TINY)
        return [Source(repository=f"{self.host}/{TINY}", tag=f"0-{n}", layers=layers) for n in range(FEW_TINIES)]

    def _layers(self, name: str) -> tuple[str, ...]:
        return tuple(layer["digest"] for layer in json.loads(self._manifests[name])["layers"])


@contextlib.contextmanager
def library(scale: Scale, below: str) -> Iterator[Library]:
    """The registry for the time of the `with`; the first run on a machine makes and pushes the images."""
    with _kept(os.path.join(below, f"registry-{scale.key}"), below, lambda server: _fill(server, scale)) as found:
        yield Library(*found)


@contextlib.contextmanager
def layered(scale: Scale, below: str) -> Iterator[Library]:
    """A registry with the image of the stratum 0 part alone."""
    with _kept(os.path.join(below, f"registry-{scale.layered_key}"), below, lambda s: _fill_layered(s, scale)) as found:
        yield Library(*found, LAYERED)


@contextlib.contextmanager
def _kept(
    directory: str, below: str, fill: Callable[[DockerRegistry], dict[str, object]]
) -> Iterator[tuple[DockerRegistry, dict[str, Any]]]:
    program = debian.program("docker-registry", "docker-registry", os.path.join(below, "packages"))
    if program is None:
        raise NoRegistry("docker-registry is not installed and cannot be fetched: apt install docker-registry")
    complete = os.path.join(directory, "images.json")
    with DockerRegistry(Path(directory), program=program) as server:
        if not os.path.exists(complete):
            print(
                "Generating the images and pushing them into a registry under .bench (once; minutes, in full size)",
                flush=True,
            )
            document = fill(server)
            with open(f"{complete}.partial", "w", encoding="ascii") as file:
                json.dump(document, file)
            os.rename(f"{complete}.partial", complete)
        with open(complete, encoding="ascii") as file:
            yield server, json.load(file)


def warm(below: str, key: str) -> None:
    """Reads what the registry of this key will serve, so that it answers from memory: this compares no disks."""
    for at, _, files in os.walk(os.path.join(below, f"registry-{key}", "root")):
        for name in files:
            with open(os.path.join(at, name), "rb") as file:
                while file.read(1 << 20):
                    pass


def _fill(server: DockerRegistry, scale: Scale) -> dict[str, object]:
    first, other = images.app(scale.app)
    manifests = {
        "v1": _push(server, APP, "v1", first.layers, label="v1"),
        "v2": _push(server, APP, "v2", other.layers, label="v2"),
        "v3": _push(server, APP, "v3", other.layers, label="v3"),
    }
    tiny = images.build(images.tree(TINY_SHAPE, [], "tiny", []))
    for number in range(scale.tags):
        manifests[TINY] = _push(
            server, TINY, f"{number // TAGS_PER_WISH}-{number}", [tiny], label=str(number), known=number > 0
        )
    for name, size in (("small", scale.small_layer), ("large", scale.large_layer)):
        _push(server, LARGE, name, [images.build(images.few_large_files(size), level=1)], label=name)
    return {
        "manifests": manifests,
        "facts": _facts(first),
        "listings": {"v1": first.listing, "v2": other.listing, "v3": other.listing},
    }


def _fill_layered(server: DockerRegistry, scale: Scale) -> dict[str, object]:
    first, other = images.app(scale.app, images.LAYERED)
    manifests = {
        "v1": _push(server, LAYERED, "v1", first.layers, label="v1"),
        "v2": _push(server, LAYERED, "v2", other.layers, label="v2"),
    }
    tiny = images.build(images.tree(TINY_SHAPE, [], "tiny", []))
    for number in range(FEW_TINIES):
        manifests[TINY] = _push(server, TINY, f"0-{number}", [tiny], label=str(number), known=number > 0)
    return {
        "manifests": manifests,
        "facts": _facts(first),
        "listings": {"v1": first.listing, "v2": other.listing},
    }


def _facts(version: images.Version) -> dict[str, int]:
    return {
        "unpacked": sum(layer.unpacked for layer in version.layers),
        "compressed": sum(len(layer.blob) for layer in version.layers),
        "files": sum(1 for kind, *_ in version.listing.values() if kind == "file"),
        "entries": len(version.listing),
    }


def _push(
    server: DockerRegistry,
    repository: str,
    tag: str,
    layers: Sequence[images.Layer],
    *,
    label: str,
    known: bool = False,
) -> str:
    """Pushes an image; gives its manifest. `known`: the layers are there from another one."""
    raw, config = images.manifest(layers, label)
    blobs = {} if known else {layer.digest: layer.blob for layer in layers}
    blobs[json.loads(raw)["config"]["digest"]] = config
    server.push(repository, tag, BuiltImage(manifest=raw, config=config, blobs=blobs))
    return raw.decode()

"""The registry of the benchmark: images generated and pushed once, kept under `.bench/` for later runs."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench import images
from demo import debian
from tests.docker_registry import DockerRegistry
from tests.images import BuiltImage
from unpacker import oci

APP, TINY, LARGE = "bench/app", "bench/tiny", "bench/large"
TINY_SHAPE = images.Shape(name="tiny", files=40, directories=10)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How large the images are. `app` is the share of the full image of about 900 MB; sizes are in bytes."""

    app: float = 1.0
    tags: int = 1_000
    small_layer: int = 100_000_000
    large_layer: int = 4_000_000_000

    @property
    def key(self) -> str:
        return f"{images.GENERATOR}-{images.SEED}-{self.app:g}-{self.tags}-{self.small_layer}-{self.large_layer}"


FULL = Scale()
QUICK = Scale(app=0.02, tags=40, small_layer=10_000_000, large_layer=50_000_000)


class NoRegistry(Exception):
    """There is nothing to fetch from."""


class Library:
    """A running registry with the images in it."""

    def __init__(self, server: DockerRegistry, manifests: dict[str, str], facts: dict[str, float]) -> None:
        self._server = server
        self._manifests = manifests
        self.host = server.host
        self.facts = facts
        """What the large image is: its numbers of files and bytes, by word."""

    def tag(self, name: str, tag: str) -> None:
        """Lets a tag of the large image point at its version `name`."""
        self._server.push_manifest(APP, tag, self._manifests[name].encode(), oci.OCI_MANIFEST)

    def layers(self, name: str) -> tuple[str, ...]:
        return tuple(layer["digest"] for layer in json.loads(self._manifests[name])["layers"])


@contextlib.contextmanager
def library(scale: Scale, below: str, jobs_say: object = print) -> Iterator[Library]:
    """The registry for the time of the `with`; the first run on a machine makes and pushes the images."""
    program = debian.program("docker-registry", "docker-registry", os.path.join(below, "packages"))
    if program is None:
        raise NoRegistry("docker-registry is not installed and cannot be fetched: apt install docker-registry")
    directory = os.path.join(below, f"registry-{scale.key}")
    complete = os.path.join(directory, "images.json")
    with DockerRegistry(Path(directory), program=program) as server:
        if not os.path.exists(complete):
            document = _fill(server, scale)
            with open(f"{complete}.partial", "w", encoding="ascii") as file:
                json.dump(document, file)
            os.rename(f"{complete}.partial", complete)
        with open(complete, encoding="ascii") as file:
            kept = json.load(file)
        yield Library(server, kept["manifests"], kept["facts"])


def warm(below: str, scale: Scale) -> None:
    """Reads what the registry will serve, so that it answers from memory: this compares no disks."""
    for at, _, files in os.walk(os.path.join(below, f"registry-{scale.key}", "root")):
        for name in files:
            with open(os.path.join(at, name), "rb") as file:
                while file.read(1 << 20):
                    pass


def _fill(server: DockerRegistry, scale: Scale) -> dict[str, object]:
    print("Generating the images and pushing them into a registry under .bench (once; some minutes in full size)")
    layers, other_top = images.app_layers(scale.app)
    versions = {"v1": layers, "v2": [*layers[:2], other_top], "v3": [*layers[:2], other_top]}
    manifests = {name: _push(server, APP, name, stack, label=name) for name, stack in versions.items()}
    tiny = images.build(images.tree(TINY_SHAPE, [], "tiny", []))
    for number in range(scale.tags):
        _push(server, TINY, f"{number // 250}-{number % 250}", [tiny], label=str(number), known=number > 0)
    for name, size in (("small", scale.small_layer), ("large", scale.large_layer)):
        _push(server, LARGE, name, [images.build(images.few_large_files(size), level=1)], label=name)
    unpacked, compressed = sum(layer.unpacked for layer in layers), sum(len(layer.blob) for layer in layers)
    return {"manifests": manifests, "facts": {"unpacked": unpacked, "compressed": compressed}}


def _push(
    server: DockerRegistry, repository: str, tag: str, layers: list[images.Layer], *, label: str, known: bool = False
) -> str:
    """Pushes an image; gives its manifest. `known`: the layers are there from another one."""
    raw, config = images.manifest(layers, label)
    blobs = {} if known else {layer.digest: layer.blob for layer in layers}
    blobs[json.loads(raw)["config"]["digest"]] = config
    server.push(repository, tag, BuiltImage(manifest=raw, config=config, blobs=blobs))
    return raw.decode()

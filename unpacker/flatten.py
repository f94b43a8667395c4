"""The layers of one run: read at most once each, wherever they are wanted, and applied to trees as they come in.

An image grows while its upper layers are still being read; images that share their lower layers share those trees.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from unpacker.cache import ChangesetCache
from unpacker.changeset import Changeset
from unpacker.contracts import ContentStore, RegistryLocator, Stacked
from unpacker.errors import ImageError, IntegrityError, RegistryError
from unpacker.image import Image, Layer
from unpacker.layer import LayerJob, read_layer
from unpacker.limits import Limits
from unpacker.pools import Pools
from unpacker.reference import Repository
from unpacker.rootfs import Policy
from unpacker.tree import EMPTY, Tree, apply

_CHAINS_KEPT = 8


class Layers:
    """Reads layers and keeps their changesets while an image in progress needs them. For one thread."""

    def __init__(
        self,
        *,
        pools: Pools,
        cache: ChangesetCache,
        registry: RegistryLocator,
        contents: ContentStore,
        policy: Policy,
        limits: Limits,
        keep_layers: bool = False,
    ) -> None:
        """With `keep_layers` a grown image has its layers at hand, too."""
        self.keep_layers = keep_layers
        self._pools = pools
        self._cache = cache
        self._registry = registry
        self._contents = contents
        self._policy = policy
        self._limits = limits
        self._reading: dict[str, Future[bytes]] = {}
        self._recalling: dict[str, Future[Changeset | None]] = {}
        self._changesets: dict[str, Changeset] = {}
        self._jobs: dict[str, LayerJob] = {}
        self._retried: set[str] = set()
        self._refused: dict[tuple[str, Repository], Exception] = {}
        self._chains: dict[tuple[str, ...], Tree] = {}

    def start(self, image: Image, *, check: bool = False) -> Growing:
        """Has the layers recalled that the cache knows and the others read, and gives the image that will grow from
        them. With `check` the stored files of a recalled layer are read, too, before they count."""
        for layer in self._unknown(image):
            if self._cache.has(layer):
                self._recalling[layer.key] = self._pools.asking.submit(self._recall, layer, check)
            else:
                self._read(layer, image)
        return Growing(image, self, self._limits)

    def compressed(self, image: Image) -> int:
        """Bytes that would be read for this image, by what the cache knows now."""
        return sum(layer.descriptor.size for layer in self._unknown(image) if not self._cache.has(layer))

    def _unknown(self, image: Image) -> list[Layer]:
        return [
            layer
            for layer in {layer.key: layer for layer in image.layers}.values()
            if not any(layer.key in known for known in (self._changesets, self._reading, self._recalling))
        ]

    def _recall(self, layer: Layer, check: bool) -> Changeset | None:
        """A changeset that spares reading the layer: cached, and every file it names is still stored."""
        changeset = self._cache.get(layer)
        if changeset is None:
            return None
        tokens = {entry.token for entry in changeset.entries if entry.token}
        return None if self._contents.missing(tokens, check=check) else changeset

    def _read(self, layer: Layer, image: Image) -> None:
        job = self._jobs[layer.key] = LayerJob(
            repository=image.pinned.reference.repository,
            layer=layer,
            registry=self._registry,
            store=self._contents.locator,
            policy=self._policy,
            limits=self._limits,
        )
        self._reading[layer.key] = self._pools.read(read_layer, job)

    def was_read(self, layer: Layer) -> bool:
        """Whether this run read the layer, rather than know it."""
        return layer.key in self._jobs

    def pending(self, images: Iterable[Image]) -> set[Future[Any]]:
        """What these images wait for."""
        keys = {layer.key for image in images for layer in image.layers}
        futures: list[Future[Any]] = [f for key, f in self._reading.items() if key in keys]
        futures += [f for key, f in self._recalling.items() if key in keys]
        return {future for future in futures if not future.done()}

    def replace_broken(self, images: Iterable[Image]) -> None:
        """Reads layers again, each in a process of its own, after a process died: one of them killed it, not all."""
        for image in images:
            for layer in image.layers:
                future = self._reading.get(layer.key)
                if future is None or not future.done() or not isinstance(future.exception(), BrokenProcessPool):
                    continue
                if layer.key not in self._retried:
                    self._retried.add(layer.key)
                    self._reading[layer.key] = self._pools.alone(read_layer, self._jobs[layer.key])

    def changeset(self, layer: Layer, image: Image) -> Changeset | None:
        """The layer's changeset, None while it is being read or recalled; raises what reading it raised."""
        known = self._changesets.get(layer.key)
        if known is not None:
            return known
        recalled = self._recalling.get(layer.key)
        if recalled is not None:
            if not recalled.done():
                return None
            known = recalled.result()
            del self._recalling[layer.key]
            if known is None:
                self._read(layer, image)
                return None
        else:
            future = self._reading[layer.key]
            if not future.done():
                return None
            if self._shall_ask_again(layer, image, future):
                return None
            encoded = future.result()
            self._cache.put(layer, encoded)
            known = Changeset.decode(encoded)
            del self._reading[layer.key]
        self._changesets[layer.key] = known
        return known

    def _shall_ask_again(self, layer: Layer, image: Image, future: Future[bytes]) -> bool:
        """Whether another image's repository failed to give the layer, so that this image's own is asked now."""
        error = future.exception()
        if not isinstance(error, RegistryError | IntegrityError):
            return False
        asked, own = self._jobs[layer.key].repository, image.pinned.reference.repository
        self._refused[layer.key, asked] = error
        refused = self._refused.get((layer.key, own))
        if refused is not None:
            raise refused
        self._read(layer, image)
        return True

    def chain(self, keys: tuple[str, ...]) -> Tree | None:
        """The tree of these layers, if an image before had them."""
        return self._chains.get(keys)

    def keep_chain(self, keys: tuple[str, ...], tree: Tree) -> None:
        """Remembers the tree of these layers for the next images; trees share what they do not change."""
        self._chains[keys] = tree
        while len(self._chains) > _CHAINS_KEPT:
            del self._chains[next(iter(self._chains))]

    def forget_all_but(self, images: Iterable[Image]) -> None:
        """Drops what no image in progress needs; the cache on disk has it if another one comes."""
        needed = {layer.key for image in images for layer in image.layers}
        self._changesets = {key: known for key, known in self._changesets.items() if key in needed}
        self._reading = {key: future for key, future in self._reading.items() if key in needed}
        self._recalling = {key: future for key, future in self._recalling.items() if key in needed}
        self._refused = {key: error for key, error in self._refused.items() if key[0] in needed}


class Growing:
    """An image whose layers are being applied, in order, as they come in."""

    def __init__(self, image: Image, layers: Layers, limits: Limits) -> None:
        self.image = image
        self.tree = EMPTY
        self.entries = 0
        self.stacked: list[Stacked] = []
        self._size = 0
        self._applied = 0
        self._layers = layers
        self._limits = limits

    def advance(self) -> bool:
        """Applies what has come in; True once that is all. ImageError beyond the limits, and what reading raised."""
        keys = tuple(layer.key for layer in self.image.layers)
        while self._applied < len(keys):
            changeset = self._layers.changeset(self.image.layers[self._applied], self.image)
            if changeset is None:
                return False
            self._count(changeset)
            if self._layers.keep_layers:
                layer = self.image.layers[self._applied]
                self.stacked.append(Stacked(layer=layer, changeset=changeset, below=self.tree))
            self._applied += 1
            known = self._layers.chain(keys[: self._applied])
            self.tree = known if known is not None else apply(self.tree, changeset, self._limits)
            self._layers.keep_chain(keys[: self._applied], self.tree)
        return True

    def _count(self, changeset: Changeset) -> None:
        self.entries += len(changeset.entries)
        self._size += changeset.content_size
        limits = self._limits
        if self.entries > limits.image_entries or self._size > limits.image_unpacked:
            raise ImageError(
                f"{self.image.pinned.reference}: {self.entries} entries of {self._size} bytes in its first "
                f"{self._applied + 1} layers, more than the {limits.image_entries} and {limits.image_unpacked} "
                f"that the operator allows"
            )

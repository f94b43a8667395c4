"""The layers of one run: read at most once each, wherever they are wanted, and applied to trees as they come in.

An image grows while its upper layers are still being read; images that share their lower layers share those trees.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from unpacker import budget
from unpacker.apply import apply
from unpacker.cache import ChangesetCache
from unpacker.changeset import Changeset, written_size
from unpacker.contracts import ContentStore, RegistryLocator, Stacked
from unpacker.errors import ImageError, IntegrityError, RegistryError
from unpacker.image import Image, Layer
from unpacker.layer import Crowded, LayerJob, read_layer
from unpacker.limits import Limits
from unpacker.pools import Pools
from unpacker.reference import Repository
from unpacker.rootfs import Policy
from unpacker.tree import EMPTY, Tree

_CHAINS_KEPT = 8
_AHEAD = 256 << 20
"""How many compressed bytes of layers wait at most for a process that reads them, so that none is ever idle; and how
many bytes of what came of layers may wait for those below them."""


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A layer that is not yet being loaded, for the first image that wants it."""

    layer: Layer
    image: Image
    check: bool
    recall: bool


class Layers:
    """Reads layers and keeps their changesets while an image in progress needs them. For one thread.

    What is wanted is loaded when `feed` finds that there is room for it (see `budget`).
    """

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
        self._waiting: dict[str, _Wanted] = {}
        self._large: set[str] = set()
        self._first: Image | None = None
        self._held = 0
        self._weights: dict[str, int] = {}
        self.reads = 0
        """How many layers were begun to be read."""
        self._reading: dict[str, Future[bytes]] = {}
        self._abandoned: set[Future[bytes]] = set()
        self._recalling: dict[str, Future[Changeset | None]] = {}
        self._changesets: dict[str, Changeset] = {}
        self._jobs: dict[str, LayerJob] = {}
        self._retried: set[str] = set()
        self._refused: dict[tuple[str, Repository], Exception] = {}
        self._chains: dict[bytes, tuple[Tree, int]] = {}

    def start(self, image: Image, *, check: bool = False) -> Growing:
        """Wants the layers, those recalled that the cache knows and the others read, and gives the image that will grow
        from them. With `check` the stored files of a recalled layer are read, too, before they count."""
        for layer in self._unknown(image):
            self._waiting[layer.key] = _Wanted(layer, image, check, recall=self._cache.has(layer))
        return Growing(image, self, self._limits)

    def feed(self, images: Sequence[Image], beside: int = 0) -> None:
        """Begins to load what there is room for beside what is held for `images`, which are growing, in the order of
        their start, and `beside` of others. There is always room for the layer that the first of them needs next: it
        waits for no other."""
        self._held = beside + sum(self._weights.get(layer.key, 0) for image in images for layer in image.layers)
        self._first = images[0] if images else None
        self._has_room()
        first = {layer.key for layer in images[0].layers} if images else set()
        missing = (layer.key for image in images[:1] for layer in image.layers if layer.key not in self._changesets)
        needed = next(missing, None)
        reading = {key for key, future in self._reading.items() if not future.done()}
        loading = reading | {key for key, future in self._recalling.items() if not future.done()}
        queued = sum(self._jobs[key].layer.descriptor.size for key in reading)
        # What was read waits here for the layers below it, however long these take and whatever it weighs.
        done = [future for future in self._reading.values() if future.done() and future.exception() is None]
        is_piled_up = sum(len(future.result()) for future in done) > _AHEAD
        for key, wanted in sorted(self._waiting.items(), key=lambda each: (each[0] != needed, each[0] not in first)):
            is_next = key == needed
            if not self._large.isdisjoint(loading):
                return
            if key in self._large:
                if key not in first:
                    continue
                if loading or self.abandoned():
                    return  # What is large has the memory for itself; what is being loaded comes to its end before.
                if is_piled_up and not is_next:
                    continue
                self._read(wanted)
            elif wanted.recall:
                most = budget.at_most(self._cache.size(wanted.layer))
                if not is_next and not self._has_room(most):
                    continue
                self._hold(key, most)
                self._recalling[key] = self._pools.asking.submit(self._recall, wanted.layer, wanted.check)
            else:
                queued += wanted.layer.descriptor.size
                if not is_next and (is_piled_up or (len(reading) > self._pools.jobs and queued > _AHEAD)):
                    continue
                if key not in first and not self._has_room():
                    continue
                self._read(wanted)
                reading.add(key)
            loading.add(key)
            del self._waiting[key]

    def _has_room(self, weight: int = 0) -> bool:
        """Whether so much more may be held. What is kept for images that may come goes first."""
        left = budget.together(self._limits) - self._held - weight
        self._shorten_chains(left)
        return left >= 0

    def _hold(self, key: str, weight: int) -> None:
        self._held += weight - self._weights.get(key, 0)
        self._weights[key] = weight

    def _shorten_chains(self, most: int) -> None:
        kept = sum(weight for _, weight in self._chains.values())
        while self._chains and (kept > most or len(self._chains) > _CHAINS_KEPT):
            kept -= self._chains.pop(next(iter(self._chains)))[1]

    def compressed(self, image: Image) -> int:
        """Bytes that would be read for this image, by what the cache knows now."""
        return sum(layer.descriptor.size for layer in self._unknown(image) if not self._cache.has(layer))

    def _unknown(self, image: Image) -> list[Layer]:
        return [
            layer
            for layer in {layer.key: layer for layer in image.layers}.values()
            if not any(layer.key in k for k in (self._changesets, self._reading, self._recalling, self._waiting))
        ]

    def _recall(self, layer: Layer, check: bool) -> Changeset | None:
        """A changeset that spares reading the layer: cached, and every file it names is still stored."""
        changeset = self._cache.get(layer)
        if changeset is None:
            return None
        tokens = {entry.token for entry in changeset.entries if entry.token}
        return None if self._contents.missing(tokens, check=check) else changeset

    def _read(self, wanted: _Wanted) -> None:
        key = wanted.layer.key
        self.reads += 1
        job = self._jobs[key] = LayerJob(
            repository=wanted.image.pinned.reference.repository,
            layer=wanted.layer,
            registry=self._registry,
            store=self._contents.locator,
            policy=self._policy,
            limits=self._limits,
            share=0 if key in self._large or self._pools.jobs == 1 else budget.share(self._limits),
        )
        self._reading[key] = self._pools.read(read_layer, job)

    def _want_read(self, layer: Layer, image: Image) -> None:
        self._reading.pop(layer.key, None)
        self._weights.pop(layer.key, None)
        self._waiting[layer.key] = _Wanted(layer, image, check=False, recall=False)

    def was_read(self, layer: Layer) -> bool:
        """Whether this run read the layer, rather than know it."""
        return layer.key in self._jobs

    def pending(self, images: Iterable[Image]) -> set[Future[Any]]:
        """What these images wait for."""
        keys = {layer.key for image in images for layer in image.layers}
        futures: list[Future[Any]] = [f for key, f in self._reading.items() if key in keys]
        futures += [f for key, f in self._recalling.items() if key in keys]
        if not self._large.isdisjoint(self._waiting):
            futures += self._abandoned  # What is large is not begun beside them.
        return {future for future in futures if not future.done()}

    def abandoned(self) -> set[Future[bytes]]:
        """What is still being read though nobody needs it any more: until its end it takes memory and room."""
        self._abandoned = {future for future in self._abandoned if not future.done()}
        return self._abandoned

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
        """The layer's changeset, None while it is being read or recalled, or while there is no room for it; raises what
        reading it raised."""
        known = self._changesets.get(layer.key)
        if known is not None:
            return known
        if layer.key in self._waiting:
            return None
        recalled = self._recalling.get(layer.key)
        if recalled is not None:
            if not recalled.done():
                return None
            known = recalled.result()
            del self._recalling[layer.key]
            if known is None:
                self._want_read(layer, image)
                return None
            written = self._cache.size(layer)
        else:
            future = self._reading[layer.key]
            if not future.done():
                return None
            if self._shall_read_again(layer, image, future):
                self._want_read(layer, image)
                return None
            encoded = future.result()
            written = written_size(encoded)
            if image is not self._first and not self._has_room(budget.at_most(written)):
                return None
            self._cache.put(layer, encoded)
            known = Changeset.decode(encoded)
            del self._reading[layer.key]
        self._hold(layer.key, budget.weight(known, written))
        self._changesets[layer.key] = known
        return known

    def weight(self, layer: Layer) -> int:
        """What a layer weighs whose changeset is at hand."""
        return self._weights[layer.key]

    def _shall_read_again(self, layer: Layer, image: Image, future: Future[bytes]) -> bool:
        """Whether the layer is too large to be read beside others; or another image's repository failed to give it, so
        that this image's own is asked now."""
        error = future.exception()
        if isinstance(error, Crowded):
            self._large.add(layer.key)
            return True
        if not isinstance(error, RegistryError | IntegrityError):
            return False
        asked, own = self._jobs[layer.key].repository, image.pinned.reference.repository
        self._refused[layer.key, asked] = error
        refused = self._refused.get((layer.key, own))
        if refused is not None:
            raise refused
        return True

    def chain(self, identity: bytes) -> Tree | None:
        """The tree of these layers in this order, if an image before had them."""
        known = self._chains.get(identity)
        return None if known is None else known[0]

    def keep_chain(self, identity: bytes, tree: Tree, weight: int) -> None:
        """Remembers the tree of these layers for the next images; trees share what they do not change."""
        self._chains[identity] = tree, weight
        self._shorten_chains(budget.together(self._limits))

    def forget_all_but(self, images: Iterable[Image]) -> None:
        """Drops what no image in progress needs; the cache on disk has it if another one comes."""
        needed = {layer.key for image in images for layer in image.layers}
        self._waiting = {key: wanted for key, wanted in self._waiting.items() if key in needed}
        self._weights = {key: weight for key, weight in self._weights.items() if key in needed}
        self._changesets = {key: known for key, known in self._changesets.items() if key in needed}
        for key in [key for key in self._reading if key not in needed]:
            # What another has begun to read comes to its end, for nothing; what waits need not begin.
            future = self._reading.pop(key)
            if not future.cancel():
                self._abandoned.add(future)
        self._recalling = {key: future for key, future in self._recalling.items() if key in needed}
        self._refused = {key: error for key, error in self._refused.items() if key[0] in needed}


class Growing:
    """An image whose layers are being applied, in order, as they come in."""

    def __init__(self, image: Image, layers: Layers, limits: Limits) -> None:
        self.image = image
        self.tree = EMPTY
        self.entries = 0
        self.weight = 0
        self.stacked: list[Stacked] = []
        self._size = 0
        self._applied = 0
        self._chain = b""
        self._layers = layers
        self._limits = limits

    @property
    def size(self) -> int:
        """Bytes of the files in the layers applied so far."""
        return self._size

    def advance(self) -> bool:
        """Applies what has come in; True once that is all. ImageError beyond the limits, and what reading raised."""
        for layer in self.image.layers[self._applied :]:
            changeset = self._layers.changeset(layer, self.image)
            if changeset is None:
                return False
            self._count(changeset, self._layers.weight(layer))
            if self._layers.keep_layers:
                self.stacked.append(Stacked(layer=layer, changeset=changeset, below=self.tree))
            self._applied += 1
            # Of all layers so far, as the specification makes chain IDs.
            self._chain = sha256(self._chain + layer.key.encode("ascii")).digest()
            known = self._layers.chain(self._chain)
            self.tree = known if known is not None else apply(self.tree, changeset, self._limits)
            self._layers.keep_chain(self._chain, self.tree, self.weight)
        return True

    def _count(self, changeset: Changeset, weight: int) -> None:
        self.entries += len(changeset.entries)
        self.weight += weight
        self._size += changeset.content_size
        limits = self._limits
        if self.entries > limits.image_entries or self._size > limits.image_unpacked:
            raise ImageError(
                f"{self.image.pinned.reference}: {self.entries} entries of {self._size} bytes in its first "
                f"{self._applied + 1} layers, more than the {limits.image_entries} and {limits.image_unpacked} "
                f"that the operator allows (limits.image_entries, limits.image_unpacked)"
            )
        if self.weight > budget.heaviest(limits):
            raise ImageError(
                f"{self.image.pinned.reference}: names and extended attributes in its first {self._applied + 1} layers "
                f"that fill the memory of {self.weight} entries, more than twice the {limits.image_entries} that the "
                f"operator allows (limits.image_entries)"
            )

"""Images that come together to fill the memory: what a run holds of all of them at a time has a bound."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.fake_registry import FakeRegistry
from tests.images import BuiltImage, file, image, layer
from tests.publisher_contract import image as one_layer
from tests.test_reconcile import Site, done, failures
from unpacker import budget, flatten
from unpacker.budget import at_most, heaviest, share, together, weight
from unpacker.cache import ChangesetCache
from unpacker.changeset import HEAD, Changeset, Entry, Kind, written_size
from unpacker.digest import Digest
from unpacker.errors import ImageError
from unpacker.flatten import Layers
from unpacker.image import Image, Layer
from unpacker.layer import LayerJob
from unpacker.limits import Limits
from unpacker.oci import Descriptor
from unpacker.publish import posix
from unpacker.rootfs import Policy

ENTRIES = 60
SMALL_HOST = Limits(image_entries=100)
"""Room for one image of 60 entries that is being done, and for one more beside it, but not for a third."""


def large(name: str, layers: int = 2) -> BuiltImage:
    parts = [
        layer(*(file(f"{name}/{part}/{i}", f"{name}{i}".encode()) for i in range(ENTRIES // layers)))
        for part in range(layers)
    ]
    return image(*parts)


@pytest.fixture(autouse=True)
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here pulls the plug, and syncing a busy machine's disk takes seconds each time."""
    monkeypatch.setattr(posix, "syncfs", lambda fd: None)


@pytest.fixture
def site(tmp_path: Path, registry: FakeRegistry) -> Site:
    site = Site(tmp_path, registry)
    for tag in "abcdef":
        registry.add("org/app", tag, large(tag))
    return site


class Held:
    """How many entries of changesets and trees a run has at hand for its images, counted beside its own account."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.most = 0
        self.images = 0
        feed, start = Layers.feed, Layers.start

        def counted(layers: Layers, images: Sequence[Image], beside: int = 0) -> None:
            keys = [layer.key for image in images for layer in image.layers]
            held = sum(len(layers._changesets[key].entries) for key in keys if key in layers._changesets)
            self.most = max(self.most, held + beside)
            feed(layers, images, beside)

        def counting(layers: Layers, image: Image, *, check: bool = False) -> flatten.Growing:
            self.images += 1
            return start(layers, image, check=check)

        monkeypatch.setattr(Layers, "feed", counted)
        monkeypatch.setattr(Layers, "start", counting)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Held:
    return Held(monkeypatch)


@pytest.mark.parametrize("jobs", [1, 2])
def test_what_all_images_of_a_run_hold_together_has_a_bound_and_all_of_them_are_done(
    site: Site, held: Held, jobs: int
) -> None:
    result = site.run("HOST/org/app:*", limits=SMALL_HOST, jobs=jobs)
    assert done(result) == {f"org/app:{tag}": "published" for tag in "abcdef"}
    assert held.images == 6
    assert held.most <= 100 + ENTRIES, "what may be together, and the one image that is next to be done"


def test_what_the_cache_knows_is_bounded_as_well(site: Site, held: Held) -> None:
    site.run("HOST/org/app:*")
    for tag in "abcdef":
        site.fake.add("org/app", tag, image(*_layers(large(tag)), Env=["A=1"]))
    held.most = 0
    result = site.run("HOST/org/app:*", limits=SMALL_HOST, jobs=2)
    assert set(done(result).values()) == {"updated"}
    assert 0 < held.most <= 100 + ENTRIES


def _layers(built: BuiltImage) -> Iterator[bytes]:
    import gzip

    return (gzip.decompress(blob) for digest, blob in built.blobs.items() if digest != built.image_id)


def test_usual_images_are_loaded_at_once(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound is for what is not usual: here nothing ever waits for it."""
    answers: set[bool] = set()
    has_room = Layers._has_room

    def noted(layers: Layers, weight: int = 0) -> bool:
        answers.add(has_room(layers, weight))
        return has_room(layers, weight)

    monkeypatch.setattr(Layers, "_has_room", noted)
    assert set(done(site.run("HOST/org/app:*", jobs=2)).values()) == {"published"}
    assert answers == {True}


def test_trees_kept_for_images_that_may_come_give_way(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []
    keep = Layers.keep_chain

    def noted(layers: Layers, *arguments: Any) -> None:
        keep(layers, *arguments)
        kept.append(sum(weight for _, weight in layers._chains.values()))

    monkeypatch.setattr(Layers, "keep_chain", noted)
    site.run("HOST/org/app:*", limits=SMALL_HOST)
    assert 0 < max(kept) <= 100


@pytest.mark.parametrize("jobs", [2, 3])
def test_a_layer_too_large_to_be_read_beside_others_is_read_alone_and_its_image_is_published(
    site: Site, monkeypatch: pytest.MonkeyPatch, jobs: int
) -> None:
    monkeypatch.setattr(budget, "_SHARE", 20)
    site.fake.add("org/app", "small", image(layer(file("small", b"x"))))
    alone: list[tuple[int, int]] = []
    read = Layers._read

    def noted(layers: Layers, wanted: Any) -> None:
        loading = sum(not load.done() for loads in (layers._reading, layers._recalling) for load in loads.values())
        read(layers, wanted)
        alone.append((layers._jobs[wanted.layer.key].share, loading))

    monkeypatch.setattr(Layers, "_read", noted)
    result = site.run("HOST/org/app:*", limits=Limits(image_entries=160), jobs=jobs)
    assert set(done(result).values()) == {"published"} and len(done(result)) == 7
    assert (site.root("org/app:f") / "f/1/29").read_bytes() == b"f29"
    assert [loading for share, loading in alone if share == 0] == [0] * 12
    assert [share for share, _ in alone if share] == [20] * 13


def test_one_layer_at_a_time_needs_no_share(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "_SHARE", 20)
    assert set(done(site.run("HOST/org/app:*", limits=Limits(image_entries=160), jobs=1)).values()) == {"published"}
    assert site.fake.count("GET", "/blobs/") == 6 * 3, "two layers and a config each, once"


def test_an_image_that_is_too_large_by_itself_fails_alone(site: Site) -> None:
    site.fake.add("org/app", "huge", large("huge", layers=1))
    result = site.run("HOST/org/app:[ah]*", limits=Limits(image_entries=ENTRIES - 1), jobs=2)
    assert set(failures(result)) == {"org/app:a", "org/app:huge"}
    assert all(isinstance(outcome.error, ImageError) for outcome in failures(result).values())


def test_names_count_though_they_are_few_and_each_of_their_layers_is_within_its_bounds(site: Site) -> None:
    long = "/".join(["n" * 250] * 15)
    parts = [layer(*(file(f"{part}/{long}/{i}") for i in range(10))) for part in range(6)]
    site.fake.add("org/names", "1", image(*parts))
    limits = Limits(image_entries=500)
    assert done(site.run("HOST/org/names:1", limits=limits)) == {"org/names:1": "failed"}
    result = site.run("HOST/org/names:1", limits=limits)
    (failed,) = failures(result).values()
    assert "fill the memory of" in str(failed.error)
    assert done(site.run("HOST/org/names:1", limits=Limits(image_entries=5000))) == {"org/names:1": "published"}


# -- what waits for the layers below it ------------------------------------------------------------------------


class Hand:
    """Pools that read what they are told to, when they are told to."""

    jobs = 2

    def __init__(self) -> None:
        self.begun: dict[str, Future[bytes]] = {}

    def read(self, function: object, job: LayerJob) -> Future[bytes]:
        future: Future[bytes] = Future()
        self.begun[job.layer.diff_id] = future
        return future

    def finish(self, *, but: str = "") -> None:
        for diff_id, future in self.begun.items():
            if diff_id != but and not future.done():
                future.set_result(Changeset(diff_id=diff_id, entries=()).encode())


def test_what_was_read_before_its_turn_does_not_pile_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flatten, "_AHEAD", 1)
    digests = [Digest.of(bytes([number])) for number in range(12)]
    stack = tuple(
        Layer(descriptor=Descriptor(media_type="", digest=digest, size=9), diff_id=str(digest)) for digest in digests
    )
    tall, hand = replace(one_layer("registry.example.org/tall:1", "1"), layers=stack), Hand()
    layers = Layers(
        pools=cast(Any, hand),
        cache=ChangesetCache(str(tmp_path), "rules"),
        registry=cast(Any, None),
        contents=cast(Any, SimpleNamespace(locator=None)),
        policy=Policy(),
        limits=Limits(),
    )
    growing = layers.start(tall)
    for _ in range(20):
        layers.feed([tall])
        assert not growing.advance()
        hand.finish(but=stack[0].diff_id)
    assert list(hand.begun) == [layer.diff_id for layer in stack[:3]], "one for each process, and the one after them"
    hand.finish()
    while not growing.advance():
        layers.feed([tall])
        assert layers.pending([tall]), "else nobody would wake us"
        hand.finish()
    assert len(hand.begun) == 12


def test_an_image_of_many_known_layers_has_them_at_hand_one_after_the_other(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.run("HOST/org/app:*")
    site.fake.add("org/all", "1", image(*(part for tag in "abcdef" for part in _layers(large(tag)))))
    at_hand: list[int] = []
    feed = Layers.feed

    def noted(layers: Layers, images: Sequence[Image], beside: int = 0) -> None:
        feed(layers, images, beside)
        recalled = (future.result() for future in layers._recalling.values())
        known = [*layers._changesets.values(), *(one for one in recalled if one is not None)]
        at_hand.append(sum(len(one.entries) for one in known))

    monkeypatch.setattr(Layers, "feed", noted)
    assert set(failures(site.run("HOST/org/all:1", limits=SMALL_HOST))) == {"org/all:1"}
    assert 0 < max(at_hand) <= 100 + ENTRIES, "what one image may have, and the layer that is too much"


# -- the rules -------------------------------------------------------------------------------------------------


def changeset(count: int, length: int) -> Changeset:
    entries = tuple(Entry(f"{i:0{length}}", Kind.FILE, token="t" * 81, mtime_ns=10**18) for i in range(count))
    return Changeset(diff_id="sha256:" + "0" * 64, entries=entries)


@pytest.mark.parametrize(("length", "per_entry"), [(4, 1), (40, 1), (400, 2), (4000, 20)])
def test_an_entry_weighs_one_unless_its_names_are_long(length: int, per_entry: int) -> None:
    some = changeset(1000, length)
    written = written_size(some.encode())
    assert weight(some, written) // 1000 == per_entry
    assert weight(some, written) <= at_most(written)


def test_the_length_of_a_changeset_is_told_by_the_first_bytes_of_its_encoding() -> None:
    for count in (0, 1, 10_000):
        encoded = changeset(count, 50).encode()
        assert 0 < written_size(encoded[:HEAD]) == written_size(encoded)
    assert written_size(b"") == written_size(b"no changeset at all") == 0


def test_whiteouts_weigh_too() -> None:
    hidden = Changeset(diff_id="x", entries=(), whiteouts=("a",) * 50, opaque=("b",) * 50)
    assert weight(hidden, 0) == 100


def test_the_bounds_follow_the_operators_limit_and_a_usual_layer_has_its_share_under_any() -> None:
    assert together(Limits(image_entries=7)) == 7
    assert heaviest(Limits(image_entries=7)) == 14
    assert share(Limits()) == 5_000_000 // 8
    assert share(Limits(image_entries=7)) >= 300_000

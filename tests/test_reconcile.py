"""The main job end to end: a registry of ours, a real directory, and what a user then finds there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.fake_registry import FakeRegistry
from tests.images import BuiltImage, directory, file, image, layer, symlink, whiteout
from unpacker import journal
from unpacker.errors import Denied, ImageError, IntegrityError, RegistryError, WishlistError
from unpacker.limits import Limits
from unpacker.plan import Done, Outcome
from unpacker.publish.directory import DirectoryPublisher
from unpacker.reconcile import Result, exit_code, reconcile
from unpacker.record import Published
from unpacker.registry.client import Access
from unpacker.rootfs import Policy
from unpacker.survey import Request, survey
from unpacker.wishlist import parse

BASE = layer(directory("etc"), file("etc/motd", b"hello"), file("etc/gone", b"x"), symlink("sh", "bin/sh"))
TOP = layer(whiteout("etc/gone"), directory("bin"), file("bin/tool", b"#!/bin/sh\n", mode=0o755))
APP = image(BASE, TOP, Env=["A=1"])


class Site:
    """A target, a registry and a wishlist, and runs of unpacker over them."""

    def __init__(self, path: Path, fake: FakeRegistry) -> None:
        self.path = path
        self.fake = fake
        self.target = path / "target"
        self.policy = Policy(owner=None if os.geteuid() == 0 else (os.geteuid(), os.getegid()))

    def request(self, *images: str, text: str | None = None, **options: Any) -> Request:
        written = text if text is not None else "version: 2\nimages:\n" + "".join(f"- '{i}'\n" for i in images)
        found = parse(written.replace("HOST", f"http://{self.fake.host}").encode(), "wishlist.yaml")
        access = Access(backoff=0.01, attempts=3, timeout=5, limits=options.get("limits", Limits()))
        defaults: dict[str, Any] = {
            "wishes": found.wishes,
            "owner": "ours",
            "sound": found.sound,
            "publisher": DirectoryPublisher(str(self.target)),
            "registry": access.open(),
            "policy": self.policy,
            "limits": Limits(),
            "state": str(self.path / "state"),
            "jobs": 1,
        }
        return Request(**{**defaults, **options})

    def run(self, *images: str, **options: Any) -> Result:
        self.fake.clear()
        return reconcile(self.request(*images, **options))

    def root(self, name: str) -> Path:
        return self.target / self.fake.host / name

    def names(self) -> set[str]:
        found = DirectoryPublisher(str(self.target)).published()
        return {path.removeprefix(f"{self.fake.host}/") for path, p in found.items() if isinstance(p, Published)}

    def requested(self) -> list[str]:
        return sorted(f"{r.method} {r.path.partition('/v2/')[2]}" for r in self.fake.requests)


@pytest.fixture
def site(tmp_path: Path, registry: FakeRegistry) -> Site:
    return Site(tmp_path, registry)


def done(result: Result) -> dict[str, str]:
    return {o.action.public_path.partition("/")[2]: o.done.value for o in result.outcomes}


def failures(result: Result) -> dict[str, Outcome]:
    return {o.action.public_path.partition("/")[2]: o for o in result.outcomes if o.done is Done.FAILED}


# -- what is published ------------------------------------------------------------------------------------------


def test_a_wildcard_publishes_every_matching_tag_as_one_flattened_root(site: Site) -> None:
    site.fake.add("org/app", "1.0", image(BASE))
    site.fake.add("org/app", "1.1", APP)
    site.fake.add("org/app", "2.0", APP)
    result = site.run("HOST/org/app:1.*")
    assert done(result) == {"org/app:1.0": "published", "org/app:1.1": "published"}
    assert (site.root("org/app:1.0") / "etc/gone").read_bytes() == b"x"
    root = site.root("org/app:1.1")
    assert not (root / "etc/gone").exists()
    assert (root / "bin/tool").stat().st_mode & 0o777 == 0o755
    assert exit_code(result, sound=True) == 0


def test_what_is_excluded_is_not_published_where_all_tags_are_named_in_full(site: Site) -> None:
    for tag in ("1.0", "1.1", "1.1-dev"):
        site.fake.add("org/app", tag, APP)
    text = (
        'version: 2\nimages:\n  - {image: HOST/org/app, tags: ["1.0", "1.1", "1.1-dev"], exclude: ["1.0", "*-dev"]}\n'
    )
    result = site.run(text=text)
    assert done(result) == {"org/app:1.1": "published"}
    assert exit_code(result, sound=True) == 0
    nothing = text.replace('"*-dev"', '"*"')
    assert done(site.run(text=nothing, allow_removals=True)) == {"org/app:1.1": "removed"}


def test_the_public_name_is_a_relative_link_to_the_image_id_below_flat(site: Site) -> None:
    site.fake.add("org/app", "1.1", APP)
    site.run("HOST/org/app:1.1")
    identity = APP.image_id.partition(":")[2]
    assert os.readlink(site.root("org/app:1.1")) == f"../../.flat/{identity[:2]}/{identity}"


def test_a_wish_by_digest_is_published_under_its_digest(site: Site) -> None:
    site.fake.add("org/app", "1.1", APP)
    site.run(f"HOST/org/app@{APP.digest}")
    assert (site.root(f"org/app:{APP.digest}") / "etc/motd").read_bytes() == b"hello"


def test_a_run_in_which_nothing_changed_costs_one_listing_per_wildcard_and_one_head_per_reference(site: Site) -> None:
    for tag in ("1.0", "1.1", "1.2"):
        site.fake.add("org/app", tag, image(BASE, layer(file("tag", tag.encode()))))
    site.fake.add("org/tool", "x", APP)
    wishes = ("HOST/org/app:1.*", "HOST/org/app:?.0", "HOST/org/tool:x")
    site.run(*wishes)
    result = site.run(*wishes)
    assert set(done(result).values()) == {"kept"}
    assert site.requested() == [
        "GET org/app/tags/list",
        "HEAD org/app/manifests/1.0",
        "HEAD org/app/manifests/1.1",
        "HEAD org/app/manifests/1.2",
        "HEAD org/tool/manifests/x",
    ]


def test_a_layer_shared_by_images_is_read_once(site: Site) -> None:
    for tag in ("1", "2", "3"):
        site.fake.add("org/app", tag, image(BASE, layer(file("tag", tag.encode()))))
    site.run("HOST/org/app:*")
    base = next(d for d, blob in APP.blobs.items() if blob == image(BASE).blobs.get(d))
    assert sum(base in r.path for r in site.fake.requests) == 1


def test_an_image_of_known_layers_costs_no_blob_but_its_config(site: Site) -> None:
    site.fake.add("org/app", "1", APP)
    site.run("HOST/org/app:*")
    again = image(BASE, TOP, Env=["A=2"])
    site.fake.add("org/app", "2", again)
    result = site.run("HOST/org/app:*")
    assert done(result)["org/app:2"] == "published"
    assert [r.path.rpartition("/")[2] for r in site.fake.requests if "/blobs/" in r.path] == [again.image_id]


def test_two_tags_of_one_digest_share_one_root(site: Site) -> None:
    site.fake.add("org/app", "1", APP)
    site.fake.add("org/app", "latest", APP)
    site.run("HOST/org/app:*")
    assert os.readlink(site.root("org/app:1")) == os.readlink(site.root("org/app:latest"))
    assert len(list((site.target / ".flat").glob("*/*"))) == 1


def test_a_tag_that_moves_gets_a_new_root_and_the_old_root_stays_as_it_was(site: Site) -> None:
    site.fake.add("org/app", "latest", APP)
    site.run("HOST/org/app:latest")
    old = site.root("org/app:latest").resolve()
    site.fake.add("org/app", "latest", image(BASE))
    result = site.run("HOST/org/app:latest")
    assert done(result) == {"org/app:latest": "updated"}
    assert (site.root("org/app:latest") / "etc/gone").exists()
    assert (old / "bin/tool").exists()


def test_the_wished_platform_of_an_index_is_published(site: Site) -> None:
    arm = image(layer(file("arch", b"arm")), architecture="arm64", variant="v8")
    site.fake.add_index("org/app", "1", image(layer(file("arch", b"amd")), architecture="amd64"), arm)
    text = "version: 2\nimages:\n- image: HOST/org/app:1\n  platform: linux/arm64\n"
    site.run(text=text)
    assert (site.root("org/app:1") / "arch").read_bytes() == b"arm"


def test_two_jobs_read_layers_in_processes(site: Site) -> None:
    for tag in ("1", "2", "3"):
        site.fake.add("org/app", tag, image(BASE, layer(file("tag", tag.encode()))))
    assert set(done(site.run("HOST/org/app:*", jobs=2)).values()) == {"published"}
    assert (site.root("org/app:3") / "tag").read_bytes() == b"3"


def test_rebuilding_under_other_rules_makes_a_new_root_beside_the_old_one(site: Site) -> None:
    site.fake.add("org/app", "1", APP)
    site.run("HOST/org/app:1", policy=Policy(owner=(os.geteuid(), os.getegid())))
    old = site.root("org/app:1").resolve()
    other = Policy() if os.geteuid() == 0 else Policy(owner=(os.geteuid(), os.getegid() + 0))
    if other.rules == Policy(owner=(os.geteuid(), os.getegid())).rules:
        pytest.skip("an unprivileged user has one policy only")
    assert done(site.run("HOST/org/app:1", policy=other)) == {"org/app:1": "kept"}
    assert done(site.run("HOST/org/app:1", policy=other, rebuild=True)) == {"org/app:1": "updated"}
    assert site.root("org/app:1").resolve().name == old.name + "-2"
    assert (old / "etc/motd").exists()


# -- what fails, fails alone ------------------------------------------------------------------------------------


def lying() -> BuiltImage:
    """An image whose config names other diff IDs than its layers have."""
    true = image(BASE)
    config = true.config.replace(b'"diff_ids": ["sha256:', b'"diff_ids": ["sha256:').replace(
        b"sha256:", b"sha256:0000", 1
    )
    wrong = config.replace(b"sha256:0000", b"sha256:", 1)
    digits = wrong.partition(b"sha256:")[2][:64]
    wrong = wrong.replace(digits, b"0" * 64)
    built = image(BASE)
    manifest = built.manifest.replace(built.image_id.encode(), str(_digest(wrong)).encode())
    manifest = manifest.replace(f'"size": {len(built.config)}'.encode(), f'"size": {len(wrong)}'.encode())
    return BuiltImage(manifest=manifest, config=wrong, blobs={**built.blobs, str(_digest(wrong)): wrong})


def _digest(data: bytes) -> object:
    from unpacker.digest import Digest

    return Digest.of(data)


def test_a_corrupt_layer_fails_its_image_and_no_other(site: Site) -> None:
    bad = image(layer(file("bad", b"bad")))
    site.fake.add("org/app", "bad", bad)
    site.fake.add("org/app", "good", APP)
    site.fake.corrupt.add(next(d for d in bad.blobs if d != bad.image_id))
    result = site.run("HOST/org/app:*")
    assert done(result) == {"org/app:bad": "failed", "org/app:good": "published"}
    assert isinstance(failures(result)["org/app:bad"].error, IntegrityError)
    assert not site.root("org/app:bad").exists()
    assert exit_code(result, sound=True) == 1


def test_a_config_that_lies_about_its_layers_is_refused_even_if_the_layers_are_known(site: Site) -> None:
    site.fake.add("org/app", "1", image(BASE))
    site.run("HOST/org/app:*")
    site.fake.add("org/app", "2", lying())
    result = site.run("HOST/org/app:*")
    assert isinstance(failures(result)["org/app:2"].error, IntegrityError)


@pytest.mark.parametrize(
    ("limits", "word"),
    [
        (Limits(image_entries=3), "entries"),
        (Limits(image_unpacked=5), "bytes"),
        (Limits(image_compressed=10), "compressed"),
        (Limits(config=10), "config"),
        (Limits(manifest=10), "manifest"),
    ],
)
def test_an_image_beyond_a_limit_is_refused_alone(site: Site, limits: Limits, word: str) -> None:
    site.fake.add("org/app", "1", APP)
    result = site.run("HOST/org/app:1", limits=limits)
    errors = [o.error for o in result.outcomes] + [u.error for u in result.survey.plan.unresolved]
    assert any(isinstance(e, ImageError) for e in errors), errors
    assert word in str(errors[0])
    assert site.names() == set()


def test_limits_hold_for_the_sum_of_layers_that_are_small_each(site: Site) -> None:
    site.fake.add("org/app", "1", image(*(layer(file(f"f{i}", b"x" * 1000)) for i in range(5))))
    result = site.run("HOST/org/app:1", limits=Limits(image_unpacked=12_000))
    assert done(result) == {"org/app:1": "published"}
    site.fake.add("org/app", "2", image(*(layer(file(f"g{i}", b"y" * 9_000)) for i in range(2))))
    result = site.run("HOST/org/app:2", limits=Limits(image_unpacked=12_000))
    assert done(result)["org/app:2"] == "failed"


def test_more_tags_than_the_operator_allows_are_a_failure_of_that_wish(site: Site) -> None:
    for i in range(6):
        site.fake.add("org/many", f"t{i}", APP)
    site.fake.add("org/app", "1", APP)
    result = site.run("HOST/org/many:*", "HOST/org/app:1", limits=Limits(tags_per_wish=5))
    assert done(result) == {"org/app:1": "published"}
    assert isinstance(result.survey.plan.unresolved[0].error, WishlistError)


def test_a_pattern_that_matches_nothing_is_said(site: Site) -> None:
    site.fake.add("org/app", "1", APP)
    result = site.run("HOST/org/app:typo-*")
    assert "matches none" in str(result.survey.plan.unresolved[0].error)
    assert exit_code(result, sound=True) == 1


def test_a_private_image_is_refused_unless_the_operator_allows_it(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.fake.add("org/secret", "1", APP)
    site.fake.auth = "bearer"
    site.fake.private.add("org/secret")
    site.fake.users["robot"] = "pass"
    monkeypatch.setenv("DUCC_AUTH_REGISTRIES", "A")
    monkeypatch.setenv("DUCC_A_IDENT", site.fake.host)
    monkeypatch.setenv("DUCC_A_USER", "robot")
    monkeypatch.setenv("DUCC_A_PASS", "pass")
    fresh = Access(backoff=0.01, attempts=2, timeout=5, connections_per_host=3).open()
    refused = site.run("HOST/org/secret:1", registry=fresh)
    assert isinstance(failures(refused)["org/secret:1"].error, Denied)
    assert "may_become_public" in str(failures(refused)["org/secret:1"].error)
    assert site.names() == set()
    allowed = frozenset({f"{site.fake.host}/org/secret"})
    assert done(site.run("HOST/org/secret:1", registry=fresh, may_become_public=allowed)) == {
        "org/secret:1": "published"
    }


def test_no_registry_reached_is_exit_code_3(site: Site) -> None:
    site.fake.stop()
    result = site.run("HOST/org/app:*", "HOST/org/tool:1")
    assert exit_code(result, sound=True) == 3
    assert all(isinstance(u.error, RegistryError) for u in result.survey.plan.unresolved)


# -- nothing is lost --------------------------------------------------------------------------------------------


def test_an_outage_forgets_neither_since_when_a_tag_failed_nor_since_when_one_is_gone(site: Site) -> None:
    site.fake.add("org/app", "1.0", APP)
    site.fake.add("org/app", "1.1", image(layer(file("../../escape", b"x"))))
    site.fake.add("org/app", "1.2", APP)
    site.run("HOST/org/app:1.*", clock=lambda: 1000)
    site.fake.remove("org/app", "1.2")
    site.run("HOST/org/app:1.*", clock=lambda: 2000)
    site.fake.fault(status=500, times=100, path="tags/list")
    site.run("HOST/org/app:1.*", clock=lambda: 3000)
    site.fake.faults.clear()
    site.run("HOST/org/app:1.*", clock=lambda: 4000)
    noted = journal.load(str(site.path / "state"))
    assert {name.rpartition("/")[2]: failure.since for name, failure in noted.failures.items()} == {"app:1.1": 1000}
    assert {name.rpartition("/")[2]: since for name, since in noted.vanished.items()} == {"app:1.2": 2000}


def test_two_wishlists_alternating_ten_times_remove_nothing_of_each_other(site: Site) -> None:
    for name in ("a", "b"):
        for tag in ("1", "2"):
            site.fake.add(f"org/{name}", tag, image(BASE, layer(file(name, tag.encode()))))
    for _ in range(10):
        site.run("HOST/org/a:*", owner="list A")
        site.run("HOST/org/b:*", owner="list B")
        assert {"org/a:1", "org/a:2"} <= site.names()
    assert site.names() == {"org/a:1", "org/a:2", "org/b:1", "org/b:2"}


def test_a_name_that_two_wishlists_ask_for_stays_until_neither_does(site: Site) -> None:
    site.fake.add("org/app", "1", APP)
    site.fake.add("org/app", "2", image(BASE))
    site.run("HOST/org/app:1", "HOST/org/app:2", owner="A")
    assert done(site.run("HOST/org/app:1", owner="B")) == {"org/app:1": "updated"}
    assert done(site.run("HOST/org/app:1", owner="B")) == {"org/app:1": "kept"}
    link = os.readlink(site.root("org/app:1"))
    assert done(site.run("HOST/org/app:2", owner="A"))["org/app:1"] == "updated"
    assert os.readlink(site.root("org/app:1")) == link
    assert done(site.run("HOST/org/app:2", owner="A")) == {"org/app:2": "kept"}
    site.run("HOST/org/app:2", owner="B")
    assert site.names() == {"org/app:2"}


def test_a_name_that_no_wishlist_published_is_removed_only_by_name(site: Site) -> None:
    site.fake.add("org/app", "1", APP)
    site.fake.add("org/app", "2", APP)
    site.run("HOST/org/app:1", owner=None, removals=False)
    site.fake.add("org/app", "1", image(BASE))
    assert done(site.run("HOST/org/app:1", "HOST/org/app:2"))["org/app:1"] == "updated"
    site.run("HOST/org/app:2")
    assert site.names() == {"org/app:1", "org/app:2"}


@pytest.fixture
def published(site: Site) -> Site:
    for tag in ("1", "2", "3"):
        site.fake.add("org/app", tag, image(BASE, layer(file("tag", tag.encode()))))
    site.run("HOST/org/app:*")
    assert site.names() == {"org/app:1", "org/app:2", "org/app:3"}
    return site


ALL = {"org/app:1", "org/app:2", "org/app:3"}


def test_an_empty_wishlist_removes_nothing(published: Site) -> None:
    result = published.run(text="version: 2\nimages: []\n")
    assert published.names() == ALL
    assert exit_code(result, sound=True) == 6


def test_one_faulty_wish_removes_nothing(published: Site) -> None:
    published.run(text="version: 2\nimages:\n- HOST/org/app:1\n- not an image\n")
    assert published.names() == ALL


def test_an_unreachable_registry_removes_nothing(published: Site) -> None:
    published.fake.stop()
    published.run("HOST/org/app:*")
    assert published.names() == ALL


@pytest.mark.parametrize("damage", ["truncated", "error in the middle", "other host", "endless"])
def test_a_tag_list_that_cannot_be_read_to_its_end_removes_nothing(published: Site, damage: str) -> None:
    fake = published.fake
    fake.page_size = 1
    if damage == "truncated":
        fake.fault(status=200, times=100, path=r"tags/list", body=b'{"name": "org/app", "tags": ["1", "2')
    elif damage == "error in the middle":
        fake.link = "/v2/org/gone/tags/list?last=1"
    elif damage == "other host":
        fake.link = "http://127.0.0.2:1/v2/org/app/tags/list?last=1"
    else:
        fake.paging = "endless"
    result = published.run("HOST/org/app:*")
    assert published.names() == ALL
    assert result.survey.plan.unresolved
    assert exit_code(result, sound=True) in (1, 3)


def test_what_is_no_longer_wished_is_unlinked_and_its_root_stays(published: Site) -> None:
    root = published.root("org/app:3").resolve()
    result = published.run("HOST/org/app:[12]")
    assert done(result)["org/app:3"] == "removed"
    assert published.names() == {"org/app:1", "org/app:2"}
    assert (root / "tag").read_bytes() == b"3"


def test_a_tag_that_vanished_upstream_is_kept_and_noted(published: Site) -> None:
    published.fake.repositories["org/app"].tags.pop("3")
    result = published.run("HOST/org/app:*")
    assert published.names() == ALL
    assert exit_code(result, sound=True) == 0
    path = f"{published.fake.host}/org/app:3"
    assert path in journal.load(str(published.path / "state")).vanished


def test_only_looks_at_what_matches_and_removes_nothing(published: Site) -> None:
    published.fake.add("org/tool", "1", APP)
    published.run("HOST/org/tool:1", only=f"{published.fake.host}/org/tool*")
    assert published.names() == ALL | {"org/tool:1"}
    published.fake.clear()
    survey(published.request("HOST/org/app:*", "HOST/org/tool:1", only=f"{published.fake.host}/org/tool:1"))
    assert published.requested() == ["HEAD org/tool/manifests/1"]


# -- what is remembered -----------------------------------------------------------------------------------------


def test_failures_are_remembered_since_they_began_and_forgotten_when_they_end(site: Site) -> None:
    site.run("HOST/org/app:1", clock=lambda: 1000.0)
    site.run("HOST/org/app:1", clock=lambda: 2000.0)
    failure = journal.load(str(site.path / "state")).failures[f"{site.fake.host}/org/app:1"]
    assert (failure.since, failure.last, failure.times) == (1000, 2000, 2)
    site.fake.add("org/app", "1", APP)
    site.run("HOST/org/app:1", clock=lambda: 3000.0)
    assert not journal.load(str(site.path / "state")).failures


def test_losing_the_state_directory_costs_time_only(published: Site) -> None:
    import shutil

    shutil.rmtree(published.path / "state")
    assert set(done(published.run("HOST/org/app:*")).values()) == {"kept"}
    assert published.names() == ALL


def test_a_cache_that_names_contents_the_target_lost_is_not_believed(published: Site) -> None:
    import shutil

    shutil.rmtree(published.target)
    result = published.run("HOST/org/app:*")
    assert set(done(result).values()) == {"published"}
    assert (published.root("org/app:2") / "etc/motd").read_bytes() == b"hello"


def test_a_root_that_somebody_took_away_is_made_again_without_being_asked_for(site: Site) -> None:
    site.fake.add("org/app", "1.0", APP)
    site.run("HOST/org/app:1.0")
    shutil.rmtree(site.root("org/app:1.0").resolve())
    assert done(site.run("HOST/org/app:1.0")) == {"org/app:1.0": "updated"}
    assert (site.root("org/app:1.0") / "etc/motd").read_bytes() == b"hello"
    assert done(site.run("HOST/org/app:1.0")) == {"org/app:1.0": "kept"}

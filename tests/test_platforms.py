"""Several platforms of one tag: a name for each, one name before them all, in both targets and through every change."""

from __future__ import annotations

import ctypes
import json
import os
import platform as machine
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.cvmfs_repositories import NAME as REPOSITORY
from tests.cvmfs_repositories import NOW, SWISSKNIFE, mounted, served, swissknife_check
from tests.cvmfs_tools import needs_client
from tests.fake_registry import FakeRegistry
from tests.images import directory, file, image, layer
from tests.publisher_contract import front, platform_release, stored
from tests.test_cli import User
from tests.test_kills import discard, run, snapshot
from tests.test_reconcile import Site
from unpacker.cvmfs.reader import Reader
from unpacker.cvmfs.repository import Repository
from unpacker.image import Unresolved
from unpacker.limits import Limits
from unpacker.lookup import read
from unpacker.multiarch import Place, aliases
from unpacker.multiarch import directory as directory_of
from unpacker.oci import Platform
from unpacker.plan import Done
from unpacker.publish.directory import DirectoryPublisher
from unpacker.publish.stratum0 import Stratum0Publisher
from unpacker.readers import DirectoryReader, Found, find
from unpacker.reconcile import Result, exit_code, reconcile
from unpacker.record import Published
from unpacker.survey import Request
from unpacker.verify import verify
from unpacker.wishlist import parse

COMMON = layer(directory("etc"), file("etc/common", b"both"))


def built(architecture: str, text: str = "", variant: str | None = None) -> Any:
    motd = f"{architecture} {text}".strip().encode()
    return image(COMMON, layer(file("etc/motd", motd)), architecture=architecture, variant=variant)


AMD, ARM, S390 = built("amd64"), built("arm64", variant="v8"), built("s390x")
BOTH = "- {image: 'HOST/org/app:1', platforms: [linux/amd64, linux/arm64/v8]}"
ARM_FIRST = "- {image: 'HOST/org/app:1', platforms: [linux/arm64, linux/amd64]}"
ONE = "- {image: 'HOST/org/app:1'}"
AMD_ONLY = "- {image: 'HOST/org/app:1', platforms: [linux/amd64]}"


class Target:
    """A site whose names are seen without its registry in front."""

    def __init__(self, site: Site, publisher: Callable[[], Any]) -> None:
        self.site = site
        self.publisher = publisher

    def request(self, *wishes: str, **options: Any) -> Request:
        text = (
            "version: 2\nimages:\n" + "".join(f"{wish}\n" for wish in wishes) if wishes else "version: 2\nimages: []\n"
        )
        return self.site.request(text=text, **{"publisher": self.publisher(), "allow_removals": True, **options})

    def run(self, *wishes: str, **options: Any) -> dict[str, str]:
        return {self.short(o.action.public_path): o.done.value for o in self.result(*wishes, **options).outcomes}

    def result(self, *wishes: str, **options: Any) -> Result:
        self.site.fake.clear()
        return reconcile(self.request(*wishes, **options))

    def short(self, path: str) -> str:
        return path.replace(f"{self.site.fake.host}/", "")

    def names(self) -> dict[str, str]:
        found = self.publisher().published()
        assert all(isinstance(p, Published) for p in found.values()), found
        return {self.short(path): p.place.value for path, p in found.items()}

    def record(self, short: str) -> Published:
        top, _, rest = short.rpartition("org/")
        found = self.publisher().published()[f"{top}{self.site.fake.host}/org/{rest}"]
        assert isinstance(found, Published)
        return found


pytestmark = pytest.mark.usefixtures("no_sync")


@pytest.fixture
def site(tmp_path: Path, registry: FakeRegistry) -> Site:
    registry.add_index("org/app", "1", AMD, ARM)
    return Site(tmp_path, registry)


@pytest.fixture(params=["directory", "stratum0"])
def target(site: Site, tmp_path: Path, request: pytest.FixtureRequest) -> Target:
    if request.param == "directory":
        return Target(site, lambda: DirectoryPublisher(str(site.target)))
    repository = str(tmp_path / "repository")
    Repository.create(repository, REPOSITORY, now=NOW)
    options: dict[str, Any] = {"clock": lambda: NOW + 1000, "spool_root": "/nowhere", "configuration": "/nowhere"}
    return Target(site, lambda: Stratum0Publisher(repository, **options))


FULL = {"org/app:1": "front", ".multiarch/amd64/org/app:1": "platform", ".multiarch/arm64:v8/org/app:1": "platform"}


# -- what is published ------------------------------------------------------------------------------------------


def test_each_platform_is_published_and_one_name_before_them(target: Target) -> None:
    assert set(target.run(BOTH).values()) == {"published"}
    assert target.names() == FULL
    assert set(target.run(BOTH).values()) == {"kept"}


def test_a_run_in_which_nothing_changed_asks_once_for_all_platforms(target: Target) -> None:
    target.run(BOTH)
    target.run(BOTH)
    assert target.site.requested() == ["HEAD org/app/manifests/1"]


def test_a_layer_of_several_platforms_is_read_once(target: Target) -> None:
    target.run(BOTH)
    blobs = [r for r in target.site.requested() if "/blobs/" in r]
    assert len(blobs) == len(set(blobs)) == 5, "two configs, a layer of each, and the one that both have"


def test_the_front_of_a_directory_leads_to_the_first_platform(site: Site) -> None:
    target = Target(site, lambda: DirectoryPublisher(str(site.target)))
    target.run(ARM_FIRST)
    path = f"{site.fake.host}/org/app:1"
    assert os.readlink(site.target / path) == f"../../.multiarch/arm64:v8/{path}"
    assert (site.target / path / "etc/motd").read_bytes() == b"arm64"
    target.run(BOTH)
    assert (site.target / path / "etc/motd").read_bytes() == b"amd64"
    assert os.readlink(site.target / ".multiarch/aarch64") == "arm64:v8"
    assert (site.target / ".multiarch/x86_64" / path / "etc/motd").read_bytes() == b"amd64"


def test_records_lie_where_ducc_has_the_manifests_of_platforms(site: Site) -> None:
    Target(site, lambda: DirectoryPublisher(str(site.target))).run(BOTH)
    below = site.target / ".metadata/.multiarch/arm64:v8" / f"{site.fake.host}/org/app:1"
    assert sorted(path.name for path in below.iterdir()) == ["listing.zst", "manifest.json", "record.json"]
    assert json.loads((below / "manifest.json").read_bytes()) == json.loads(ARM.manifest)
    front = site.target / ".metadata" / f"{site.fake.host}/org/app:1"
    assert [path.name for path in front.iterdir()] == ["record.json"]


def test_a_platform_that_the_index_lacks_fails_alone(target: Target) -> None:
    result = target.result("- {image: 'HOST/org/app:1', platforms: [linux/amd64, linux/s390x, linux/arm64]}")
    assert target.names() == FULL
    failed = [o for o in result.outcomes if o.done is Done.FAILED]
    assert [target.short(o.action.public_path) for o in failed] == [".multiarch/s390x/org/app:1"]
    assert "platforms that exist: linux/amd64, linux/arm64/v8" in str(failed[0].error)
    assert exit_code(result, sound=True) == 1


def test_without_its_first_platform_only_a_target_where_each_machine_goes_its_own_way_has_the_front(
    target: Target,
) -> None:
    result = target.result("- {image: 'HOST/org/app:1', platforms: [linux/s390x, linux/arm64]}")
    variants = target.publisher().fills_in_variables
    assert ("org/app:1" in target.names()) is variants
    assert ".multiarch/arm64:v8/org/app:1" in target.names()
    told = {target.short(o.action.public_path): str(o.error) for o in result.outcomes if o.done is Done.FAILED}
    assert set(told) == {".multiarch/s390x/org/app:1"} | (set() if variants else {"org/app:1"})
    assert all("no image for linux/s390x" in error for error in told.values())


def test_a_platform_that_comes_later_is_added(target: Target) -> None:
    wish = "- {image: 'HOST/org/app:1', platforms: [linux/s390x, linux/amd64]}"
    target.run(wish)
    target.site.fake.add_index("org/app", "1", AMD, S390)
    target.run(wish)
    assert target.names() == {
        "org/app:1": "front",
        ".multiarch/amd64/org/app:1": "platform",
        ".multiarch/s390x/org/app:1": "platform",
    }


def test_an_image_without_an_index_is_published_for_its_own_platform(target: Target) -> None:
    target.site.fake.add("org/app", "1", AMD)
    result = target.result(BOTH)
    assert set(target.names()) == {"org/app:1", ".multiarch/amd64/org/app:1"}
    failed = [o for o in result.outcomes if o.done is Done.FAILED]
    assert "is for linux/amd64, wished for linux/arm64/v8" in str(failed[0].error)


def test_a_tag_that_moves_updates_all_of_its_names(target: Target) -> None:
    target.run(BOTH)
    before = {name: target.record(name) for name in FULL}
    digest = target.site.fake.add_index("org/app", "1", built("amd64", "two"), built("arm64", "two", "v8"))
    assert set(target.run(BOTH).values()) == {"updated"}
    for name in FULL:
        record = target.record(name)
        assert record.digest == digest
        assert record.replaces == _bare(before[name])


def test_a_wish_by_digest_of_an_index_has_all_its_platforms(target: Target) -> None:
    digest = target.site.fake.add_index("org/app", None, AMD, ARM)
    target.run(f"- {{image: 'HOST/org/app@{digest}', platforms: [linux/amd64, linux/arm64]}}")
    assert set(target.names()) == {name.replace(":1", f":{digest}") for name in FULL}


def test_a_wildcard_has_all_platforms_of_each_tag(target: Target) -> None:
    target.site.fake.add_index("org/app", "2", AMD, ARM)
    target.run("- {image: 'HOST/org/app:*', platforms: [linux/amd64, linux/arm64]}")
    assert set(target.names()) == set(FULL) | {name.replace(":1", ":2") for name in FULL}


# -- through every change ---------------------------------------------------------------------------------------


def test_a_plain_name_becomes_several_platforms_and_shares_the_root_that_there_was(target: Target) -> None:
    target.run(ONE)
    plain = target.record("org/app:1")
    assert target.run(BOTH)["org/app:1"] == "updated"
    assert target.names() == FULL
    assert target.record(".multiarch/amd64/org/app:1").root == plain.root


def test_several_platforms_become_one_plain_name(target: Target) -> None:
    target.run(BOTH)
    done = target.run(ONE)
    assert done == {
        "org/app:1": "updated",
        ".multiarch/amd64/org/app:1": "removed",
        ".multiarch/arm64:v8/org/app:1": "removed",
    }
    assert target.names() == {"org/app:1": "plain"}


def test_a_platform_no_longer_asked_for_goes_alone(target: Target) -> None:
    target.run(BOTH)
    assert target.run(AMD_ONLY)[".multiarch/arm64:v8/org/app:1"] == "removed"
    assert set(target.names()) == {"org/app:1", ".multiarch/amd64/org/app:1"}


def test_what_a_name_still_leads_to_is_not_removed_while_its_change_fails(target: Target) -> None:
    target.run(BOTH)
    target.site.fake.add("org/app", "1", built("arm64", "no amd64 any more"))
    result = target.result(ONE)
    assert [o.done for o in result.outcomes if target.short(o.action.public_path) == "org/app:1"] == [Done.FAILED]
    assert target.names() == FULL, "the plain name could not be published, so nothing of what stood went"


def test_nobody_loses_the_image_that_a_plain_name_has_because_its_platform_fails(target: Target) -> None:
    target.run(ONE)
    target.site.fake.add_index("org/app", "1", built("amd64", "two"), built("arm64", "two", "v8"))
    _, top, _ = built("amd64", "two").blobs
    target.site.fake.repository("org/app").blobs.pop(top)
    result = target.result(BOTH)
    assert {target.short(o.action.public_path) for o in result.outcomes if o.done is Done.FAILED} >= {"org/app:1"}
    assert target.names()["org/app:1"] == "plain"


def test_the_limit_of_tags_counts_each_for_all_its_platforms(target: Target) -> None:
    target.site.fake.add_index("org/app", "2", AMD, ARM)
    wish = "- {image: 'HOST/org/app:*', platforms: [linux/amd64, linux/arm64]}"
    result = target.result(wish, limits=Limits(tags_per_wish=3))
    assert "matches 2 tags for 2 platforms, more than the 3" in str(result.survey.plan.unresolved[0].error)


def test_a_front_that_the_target_refuses_fails_alone(site: Site) -> None:
    target = Target(site, lambda: DirectoryPublisher(str(site.target)))
    target.run(BOTH)
    site.fake.add_index("blocked/app", "1", AMD, ARM)
    site.fake.add_index("other/app", "1", AMD, ARM)
    (site.target / site.fake.host / "blocked").write_text("in the way")
    done = target.run(AMD_ONLY, BOTH.replace("org/", "blocked/"), BOTH.replace("org/", "other/"))
    assert done["blocked/app:1"] == "failed"
    assert done["other/app:1"] == "published"
    assert done[".multiarch/arm64:v8/org/app:1"] == "removed"
    assert {"other/app:1", ".multiarch/amd64/blocked/app:1"} <= set(target.names())


def test_all_names_of_a_tag_go_together(target: Target) -> None:
    target.run(BOTH)
    assert set(target.run().values()) == {"removed"}
    assert target.names() == {}


def test_a_tag_of_several_platforms_counts_once_for_the_gate_of_removals(target: Target) -> None:
    for tag in "12345":
        target.site.fake.add_index("org/app", tag, AMD, ARM)
    wish = "- {image: 'HOST/org/app:*', platforms: [linux/amd64, linux/arm64]}"
    target.run(wish)
    result = target.result("- {image: 'HOST/org/app:1', platforms: [linux/amd64, linux/arm64]}", allow_removals=False)
    assert not result.survey.plan.held, "four tags of fifteen names"
    assert target.names() == FULL


def test_nothing_goes_while_the_registry_does_not_answer(target: Target) -> None:
    target.run(BOTH)
    target.site.fake.fault(status=500, times=50, path="org/app")
    result = target.result(AMD_ONLY)
    assert result.survey.plan.unresolved
    assert target.names() == FULL


def test_a_tag_that_vanished_keeps_all_its_platforms(target: Target) -> None:
    target.run(BOTH)
    target.site.fake.remove("org/app", "1")
    result = target.result(BOTH)
    assert {target.short(a.public_path) for a in result.survey.plan.actions if a.vanished} == set(FULL)
    assert target.names() == FULL
    assert exit_code(result, sound=True) == 0


def test_an_only_pattern_of_the_public_name_takes_its_platforms_along(target: Target) -> None:
    target.site.fake.add_index("org/other", "1", AMD, ARM)
    other = BOTH.replace("org/app", "org/other")
    target.run(BOTH, other, only=f"{target.site.fake.host}/org/app:*")
    assert target.names() == FULL


# -- two wishlists ----------------------------------------------------------------------------------------------


def test_two_wishlists_may_ask_for_different_platforms_of_one_tag(target: Target) -> None:
    target.run(BOTH, owner="first")
    target.run(AMD_ONLY, owner="second")
    assert target.record("org/app:1").owners == ("first", "second")
    assert target.record(".multiarch/arm64:v8/org/app:1").owners == ("first",)
    target.run(owner="first")
    assert set(target.names()) == {"org/app:1", ".multiarch/amd64/org/app:1"}
    assert target.record("org/app:1").owners == ("second",)
    target.run(owner="second")
    assert target.names() == {}


@pytest.mark.parametrize(("standing", "asked"), [(ONE, BOTH), (BOTH, ONE), (BOTH, ARM_FIRST)])
def test_two_wishlists_cannot_make_one_name_two_things(target: Target, standing: str, asked: str) -> None:
    target.run(standing, owner="first")
    before = target.record("org/app:1")
    result = target.result(asked, owner="second")
    conflict = [u for u in result.survey.plan.unresolved if isinstance(u, Unresolved)]
    assert "two wishlists cannot wish one name" in str(conflict[0].error)
    assert target.record("org/app:1") == before


def test_a_gpu_asked_for_later_is_noted_without_reading_anything(target: Target) -> None:
    target.run(BOTH)
    assert set(target.run(BOTH.replace("}", ", gpu: true}")).values()) == {"updated"}
    assert not [r for r in target.site.requested() if "layer" in r or r.count("blobs") > 2]
    assert all(target.record(name).gpu for name in FULL)


# -- the wishlist -----------------------------------------------------------------------------------------------


def wishes(text: str) -> Any:
    return parse(f"version: 2\n{text}".encode(), "w")


def test_platforms_may_stand_under_defaults_and_an_image_may_have_its_own() -> None:
    found = wishes(
        "defaults: {platforms: [linux/amd64, linux/arm64]}\n"
        "images:\n- h.org/a:1\n- {image: 'h.org/b:1', platform: linux/arm64}\n"
        "- {image: 'h.org/c:1', platforms: [linux/riscv64]}\n"
    )
    assert found.sound
    printed = [(str(w.platform), [str(p) for p in w.platforms]) for w in found.wishes]
    assert printed == [
        ("linux/amd64", ["linux/amd64", "linux/arm64"]),
        ("linux/arm64", []),
        ("linux/riscv64", ["linux/riscv64"]),
    ]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("platforms: linux/amd64", "platforms is a list"),
        ("platforms: []", "platforms is a list"),
        ("platforms: [linux]", "not a platform"),
        ("platforms: [../../etc]", "not a platform"),
        ("platforms: [linux/.ssh]", "not a platform"),
        ("platforms: [[linux/amd64]]", "one text"),
        ("platforms: [windows/amd64]", "cannot stand among several"),
        ("platforms: [linux/arm64, linux/arm64/v8]", "the same platform as linux/arm64"),
        ("platforms: [linux/amd64], platform: linux/amd64", "platform and platforms besides"),
        (f"platforms: [{', '.join(f'linux/a{i}' for i in range(21))}]", "more than 20"),
    ],
)
def test_a_fault_in_platforms_is_told_and_the_entry_is_no_wish(entry: str, message: str) -> None:
    for text in (f"images: [{{image: 'h.org/a:1', {entry}}}]", f"defaults: {{{entry}}}\nimages: [h.org/a:1]"):
        found = wishes(text + "\n")
        assert any(message in fault.message for fault in found.faults), found.faults
        assert found.wishes == ()


@pytest.mark.parametrize(
    ("first", "second", "agree"),
    [
        ("[linux/amd64, linux/arm64]", "[linux/amd64, linux/arm64/v8]", True),
        ("[linux/amd64, linux/arm64, linux/s390x]", "[linux/amd64, linux/s390x, linux/arm64]", True),
        ("[linux/amd64, linux/arm64]", "[linux/arm64, linux/amd64]", False),
        ("[linux/amd64, linux/arm64]", "[linux/amd64]", False),
    ],
)
def test_wishes_for_one_name_agree_if_their_platforms_do(first: str, second: str, agree: bool) -> None:
    found = wishes(
        f"images:\n- {{image: 'h.org/a:1', platforms: {first}}}\n- {{image: 'h.org/a:1', platforms: {second}}}\n"
    )
    assert len(found.wishes) == 1
    assert found.sound is agree


def test_patterns_that_meet_with_other_platforms_are_told_when_their_tags_are_known(target: Target) -> None:
    result = target.result(
        "- {image: 'HOST/org/app', tags: ['1*'], platforms: [linux/amd64]}",
        "- {image: 'HOST/org/app', tags: ['*'], platforms: [linux/amd64, linux/arm64]}",
    )
    assert "wished on line" in str(result.survey.plan.unresolved[0].error)


@pytest.mark.parametrize(
    ("platform", "name"),
    [
        ("linux/amd64", "amd64"),
        ("linux/x86_64", "amd64"),
        ("linux/amd64/v1", "amd64"),
        ("linux/amd64/v3", "amd64:v3"),
        ("linux/arm64", "arm64:v8"),
        ("linux/aarch64", "arm64:v8"),
        ("linux/arm", "arm:v7"),
        ("linux/arm/v6", "arm:v6"),
        ("linux/386", "386"),
        ("linux/ppc64le", "ppc64le"),
    ],
)
def test_every_spelling_of_a_platform_is_one_directory(platform: str, name: str) -> None:
    assert directory_of(Platform.parse(platform)) == name


def test_the_aliases_are_those_of_ducc_and_of_uname() -> None:
    found = aliases({"amd64", "arm64:v8", "arm:v6", "arm:v7", "386"})
    ducc = {"x86_64": "amd64", "x86-64": "amd64", "arm64": "arm64:v8", "aarch64": "arm64:v8", "armel": "arm:v6"}
    assert ducc.items() <= found.items()
    assert found["i386"] == found["i686"] == "386"
    assert aliases({"s390x"}) == {}


def test_aliases_of_another_tool_that_lead_elsewhere_are_warned_of(user: User) -> None:
    """DUCC has a directory `arm64` of its own, and lets `aarch64` lead there."""
    (user.target / ".multiarch" / "arm64").mkdir(parents=True)
    (user.target / ".multiarch" / "aarch64").symlink_to("arm64")
    for done in (user("plan"), user("reconcile"), user("plan")):
        said = [line for line in done.stderr.splitlines() if ".multiarch" in line]
        assert len(said) == 2, done.stderr
        assert any(".multiarch/arm64 is no link" in line and "link to arm64:v8" in line for line in said)
        assert any(".multiarch/aarch64 leads to arm64, so machines that ask for aarch64" in line for line in said)
    (user.target / ".multiarch" / "arm64").rmdir()
    (user.target / ".multiarch" / "arm64").symlink_to("arm64:v8")
    (user.target / ".multiarch" / "aarch64").unlink()
    assert ".multiarch" not in user("plan").stderr


# -- killed -----------------------------------------------------------------------------------------------------

KILLS = 3


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("before", "after"), [(ONE, BOTH), (BOTH, ONE), (BOTH, ARM_FIRST)])
def test_killed_in_a_change_of_platforms_every_name_leads_to_a_whole_root(
    before: str, after: str, tmp_path: Path, registry: FakeRegistry, pytestconfig: pytest.Config
) -> None:
    registry.add_index("org/app", "1", AMD, ARM)
    for name, wish in (("before", before), ("after", after)):
        text = f"version: 2\nimages:\n{wish}\n".replace("HOST", f"http://{registry.host}")
        (tmp_path / f"{name}.yaml").write_text(text)

    def command(at: Path, wishlist: str) -> list[str]:
        where = ["--target", str(at / "target"), "--state", str(at / "state")]
        return ["reconcile", str(tmp_path / wishlist), "--jobs", "1", "--wishlist-id", "ours", *where]

    log = tmp_path / "log"
    assert run(0, log, command(tmp_path / "start", "before.yaml")).returncode == 0
    shutil.copytree(tmp_path / "start", tmp_path / "whole", symlinks=True)
    log.unlink()
    assert run(0, log, command(tmp_path / "whole", "after.yaml")).returncode == 0
    wanted = snapshot(tmp_path / "whole" / "target")
    points = list(range(1, 1 + 2 * sum(json.loads(line)[0] != "open" for line in log.read_text().splitlines())))
    if not pytestconfig.getoption("--torture"):
        points = points[:: max(1, len(points) // KILLS)]
    for point in points:
        here = tmp_path / f"at-{point}"
        subprocess.run(["cp", "-a", str(tmp_path / "start"), str(here)], check=True)
        assert run(point, log, command(here, "after.yaml")).returncode == -9
        _check(here / "target", f"{registry.host}/org/app:1")
        again = run(0, log, command(here, "after.yaml"))
        assert again.returncode == 0, again.stderr
        assert snapshot(here / "target") == wanted, f"after a kill at {point}"
        discard(here)


def _check(target: Path, name: str) -> None:
    standing = DirectoryPublisher(str(target)).published()
    assert isinstance(standing[name], Published)
    for path, record in standing.items():
        assert isinstance(record, Published), f"{path}: {record.problem}"
        assert (target / path / "etc/motd").read_bytes() in (b"amd64", b"arm64")
    records = [record for record in standing.values() if isinstance(record, Published)]
    assert not list(verify(str(target), records, quick=False))


# -- as users and operators have it -----------------------------------------------------------------------------


@pytest.fixture
def user(tmp_path: Path, registry: FakeRegistry) -> User:
    registry.add_index("org/app", "1", AMD, ARM)
    one = User(tmp_path, registry)
    one.wishlist("{image: 'HOST/org/app:1', platforms: [linux/amd64, linux/arm64]}")
    return one


def test_status_has_a_line_for_each_platform_before_and_after(user: User) -> None:
    def states() -> list[str]:
        value = json.loads(user("status", "wishlist.yaml", "--json").stdout)
        return [one["state"] for one in value["names"]]

    assert states() == ["pending"] * 3
    assert user("reconcile").returncode == 0
    assert states() == ["published"] * 3


def test_verify_and_remove_by_the_public_name_mean_all_platforms(user: User) -> None:
    name = f"{user.fake.host}/org/app:1"
    user("reconcile")
    assert "3 names checked, 0 problems" in user("verify", name).stdout
    (user.target / f".multiarch/arm64:v8/{name}").unlink()
    (user.target / f".multiarch/arm64:v8/{name}").symlink_to("../nowhere")
    assert user("verify", name).returncode == 5
    assert user("remove", name).returncode == 0
    assert not list(user.target.glob("**/app:1"))


def test_a_front_that_leads_only_machines_of_other_kinds_somewhere_is_no_problem(site: Site) -> None:
    publisher = DirectoryPublisher(str(site.target))
    name = "quay.io/org/many:1"
    root = f".multiarch/$(CVMFS_ARCH:-amd64)/{name}"
    with publisher.lock(), publisher.transaction("publish") as transaction:
        transaction.publish(platform_release(name, stored(publisher, {"motd": b"arm"}), "linux/arm64"))
        transaction.point(replace(front(publisher, name, "linux/arm64"), root=root))
    problems = verify(str(site.target), publisher.published().values(), quick=False)
    # Only root can give the files the owner that they have in the image.
    assert [p for p in problems if os.geteuid() == 0 or "owner" not in p.what] == []
    (site.target / f".multiarch/arm64:v8/{name}").unlink()
    (problem,) = verify(str(site.target), [publisher.published()[name]], quick=False)
    assert "dangling" in problem.what


def test_gc_keeps_the_roots_of_all_platforms_and_takes_them_when_their_names_are_gone(user: User) -> None:
    user("reconcile")
    roots = sorted(user.target.glob(".flat/*/*"))
    assert user("gc", "--grace", "0").returncode == 0
    assert sorted(user.target.glob(".flat/*/*")) == roots
    assert len(roots) == 2
    user("remove", f"{user.fake.host}/org/app:1")
    assert user("gc", "--grace", "0").returncode == 0
    assert not list(user.target.glob(".flat/*/*"))
    assert user("verify").returncode == 0


def test_a_merge_request_is_told_what_each_platform_brings(user: User) -> None:
    user.wishlist("{image: 'HOST/org/app:1'}", name="old.yaml")
    value = json.loads(user("plan", "--against", "old.yaml", "--json").stdout)
    assert {(p["name"].split("/")[1], p["change"], p["error"]) for p in value["proposals"]} == {
        ("amd64", "add", ""),
        ("arm64:v8", "add", ""),
    }
    value = json.loads(user("plan", "old.yaml", "--against", "wishlist.yaml", "--json").stdout)
    changes = sorted((p["change"], p["name"].startswith(".multiarch")) for p in value["proposals"])
    assert changes == [("change", False), ("drop", True), ("drop", True)]


# -- CernVM-FS --------------------------------------------------------------------------------------------------


def test_the_front_of_a_repository_is_a_link_with_the_variable_of_clients(site: Site, tmp_path: Path) -> None:
    path = str(tmp_path / "repository")
    Repository.create(path, REPOSITORY, now=NOW)
    options: dict[str, Any] = {"clock": lambda: NOW + 1000, "spool_root": "/nowhere", "configuration": "/nowhere"}
    Target(site, lambda: Stratum0Publisher(path, **options)).run(BOTH)
    repository = Repository.open(path)
    name = f"{site.fake.host}/org/app:1"
    with Reader(repository.objects, repository.manifest().root) as reader:
        front = reader.lookup(f"/{name}")
        assert front is not None
        assert front.row.symlink == f"../../.multiarch/$(CVMFS_ARCH:-amd64)/{name}"
    if SWISSKNIFE is not None:
        swissknife_check("-c", "-r", path)


@pytest.fixture
def repository(tmp_path: Path, registry: FakeRegistry) -> Iterator[tuple[Path, str]]:
    """A repository with two platforms, published by the command line, and the public name."""
    registry.add_index("org/app", "1", AMD, ARM, built("386"))
    operator = User(tmp_path, registry)
    operator.wishlist("{image: 'HOST/org/app:1', platforms: [linux/arm64, linux/amd64, linux/386]}")
    where = f"stratum0:{tmp_path}/repository"
    assert operator("init", where, "--name", REPOSITORY).returncode == 0
    done = operator("reconcile", "--target", where)
    assert done.returncode == 0, done.stderr
    done = operator("verify", "--target", where)
    assert done.returncode == 0, done.stdout
    yield tmp_path / "repository", f"{registry.host}/org/app:1"


@contextmanager
def persona(number: int) -> Iterator[None]:
    """As another kind of Linux: processes started meanwhile have what `uname -m` says there."""
    library = ctypes.CDLL(None)
    before = library.personality(0xFFFFFFFF)
    library.personality(number)
    try:
        yield
    finally:
        library.personality(before)


PER_LINUX32 = 8


@needs_client
@pytest.mark.skipif(machine.machine() != "x86_64", reason="no client of this machine can be told that it is a 386")
def test_the_same_path_leads_a_client_of_another_machine_to_another_platform(
    repository: tuple[Path, str], tmp_path: Path
) -> None:
    path, name = repository
    key = Path(f"{path}.keys/{REPOSITORY}.pub")
    with persona(PER_LINUX32), served(path) as url, mounted(url, key, tmp_path / "client") as mount:
        assert os.readlink(f"{mount}/{name}") == f"../../.multiarch/i686/{name}"
        assert Path(mount, name, "etc/motd").read_text() == "386"


@needs_client
def test_a_client_is_led_to_the_platform_of_its_machine(repository: tuple[Path, str], tmp_path: Path) -> None:
    path, name = repository
    key = Path(f"{path}.keys/{REPOSITORY}.pub")
    expected = {"x86_64": "amd64", "aarch64": "arm64"}.get(machine.machine())
    if expected is None:
        pytest.skip(f"no image for a {machine.machine()}: no client of this machine has seen the link")
    with served(path) as url, mounted(url, key, tmp_path / "client") as mount:
        assert Path(mount, name, "etc/motd").read_text() == expected
        assert machine.machine() in os.readlink(f"{mount}/{name}")
        for alias, text in (("aarch64", "arm64"), ("arm64", "arm64"), ("x86_64", "amd64"), ("amd64", "amd64")):
            assert Path(mount, ".multiarch", alias, name, "etc/motd").read_text() == text
        standing = DirectoryPublisher(mount).published()
        assert {p.place for p in standing.values() if isinstance(p, Published)} == {Place.FRONT, Place.PLATFORM}
        assert len(standing) == 4, "as a directory the mounted repository says the same of itself"
        reader = DirectoryReader(mount)
        found = find(read(f"docker://{name}", reader.mounts), reader)
        assert isinstance(found, Found)
        assert (found.name, found.platforms) == (name, ("386", "amd64", "arm64:v8"))
        assert found.record is not None


def _bare(record: Published) -> Published:
    return replace(record, replaces=None)

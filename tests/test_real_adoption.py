"""A repository of `cvmfs_server` that DUCC filled, taken over in one step: by every way to write to it.

The tree is laid by our generator (tests/predecessor_trees.py) inside a transaction of the official tools, nested
catalogs included. They judge the repository after every step; users look through its mount.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cvmfs_managed import Managed, managed
from tests.fake_registry import FakeRegistry
from tests.images import directory, file, image, layer, symlink, whiteout
from tests.predecessor_trees import DuccTree, Generation, OsgTree
from tests.test_cli import User

BASE = layer(directory("etc"), file("etc/motd", b"hello"), file("etc/gone", b"x"), symlink("motd", "etc/motd"))
SOUND = image(BASE, layer(whiteout("etc/gone"), file("version", b"1")))
CUT = image(BASE, layer(file("version", b"2")))
LOST = image(BASE, layer(file("version", b"3")))
FRESH = image(BASE, layer(file("version", b"4")))
WAYS = ("fast", "plain")


class Switching(User):
    """An operator who switches from DUCC."""

    def __init__(self, path: Path, fake: FakeRegistry, server: Managed, way: str) -> None:
        super().__init__(path, fake)
        self.server = server
        self.way = way

    def environment(self, **extra: str) -> dict[str, str]:
        return super().environment(UNPACKER_TARGET=str(self.server.mount), UNPACKER_WAY=self.way, **extra)

    def outcomes(self, *arguments: str) -> dict[str, str]:
        said = self("reconcile", *arguments, "--json")
        assert said.returncode == 0, said.stdout + said.stderr
        return {one["name"].partition("/")[2]: one["result"] for one in json.loads(said.stdout)["outcomes"]}

    def check(self) -> None:
        self.server("check", self.server.name)
        said = self("verify")
        assert said.returncode == 0, said.stdout + said.stderr

    def read(self, path: str) -> bytes:
        return (self.server.mount / self.fake.host / path).read_bytes()


@pytest.fixture(params=WAYS)
def switching(request: pytest.FixtureRequest, tmp_path: Path, registry: FakeRegistry) -> Iterator[Switching]:
    with managed("adopt") as server:
        yield Switching(tmp_path, registry, server, request.param)


def lay(server: Managed, tree: Path) -> None:
    with server.transaction() as mount:
        for top in tree.iterdir():
            shutil.copytree(top, mount / top.name, symlinks=True)


@pytest.mark.parametrize("generation", ["2.12", "2.14"])
def test_a_repository_of_ducc_is_taken_over(
    switching: Switching, registry: FakeRegistry, generation: Generation
) -> None:
    for name, built in (("sound", SOUND), ("cut", CUT), ("lost", LOST), ("fresh", FRESH)):
        registry.add(f"org/{name}", "1", built)
    ducc = DuccTree(switching.path / "tree", generation)
    for name, built in (("sound", SOUND), ("cut", CUT), ("lost", LOST)):
        ducc.publish(f"{registry.host}/org/{name}:1", built)
    ducc.cut_layer_off(CUT, 1)
    ducc.lose_root(LOST)
    lay(switching.server, ducc.path)
    switching.wishlist(*(f"HOST/org/{name}:1" for name in ("sound", "cut", "lost", "fresh")))
    link = os.readlink(switching.server.mount / registry.host / "org/sound:1")

    said = switching("plan", "--adopt", "--json")
    assert said.returncode == 0, said.stderr
    assert {a["name"].partition("/org/")[2]: a["action"] for a in json.loads(said.stdout)["actions"]} == {
        "sound:1": "adopt",
        "cut:1": "repair",
        "lost:1": "repair",
        "fresh:1": "publish",
    }
    registry.clear()
    assert switching.outcomes("--adopt") == {
        "org/sound:1": "adopted",
        "org/cut:1": "repaired",
        "org/lost:1": "repaired",
        "org/fresh:1": "published",
    }
    switching.check()
    assert os.readlink(switching.server.mount / registry.host / "org/sound:1") == link
    for number, name in enumerate(("sound", "cut", "lost", "fresh"), 1):
        assert switching.read(f"org/{name}:1/version") == b"%d" % number
    assert set(switching.outcomes().values()) == {"kept"}

    # The tag moves: an adopted name is updated like any other.
    registry.add("org/sound", "1", FRESH)
    assert switching.outcomes()["org/sound:1"] == "updated"
    assert switching.read("org/sound:1/version") == b"4"
    switching.check()


def test_a_repository_of_osg_is_taken_over_and_its_paths_keep_working(
    switching: Switching, registry: FakeRegistry
) -> None:
    registry.add("org/sound", "1", SOUND)
    osg = OsgTree(switching.path / "tree", str(switching.server.mount))
    osg.publish("org/sound:1", SOUND)
    lay(switching.server, osg.path)
    switching.wishlist("HOST/org/sound:1")
    assert switching.outcomes("--adopt") == {"org/sound:1": "adopted"}
    switching.check()
    assert switching.read("org/sound:1/version") == b"1"
    assert (switching.server.mount / "org/sound:1/version").read_bytes() == b"1"


def test_an_adopted_image_is_removed_by_name_only(switching: Switching, registry: FakeRegistry) -> None:
    registry.add("org/sound", "1", SOUND)
    registry.add("org/fresh", "1", FRESH)
    ducc = DuccTree(switching.path / "tree")
    ducc.publish(f"{registry.host}/org/sound:1", SOUND)
    lay(switching.server, ducc.path)
    switching.wishlist("HOST/org/fresh:1")
    assert switching.outcomes("--adopt") == {"org/sound:1": "adopted", "org/fresh:1": "published"}
    assert switching.outcomes() == {"org/fresh:1": "kept"}
    assert switching.read("org/sound:1/version") == b"1"
    said = switching("remove", f"{registry.host}/org/sound:1")
    assert said.returncode == 0, said.stderr
    assert not os.path.lexists(switching.server.mount / registry.host / "org/sound:1")
    assert (switching.server.mount / ducc.flat(SOUND)).is_dir()
    switching.check()

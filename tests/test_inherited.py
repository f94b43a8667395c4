"""What becomes of names that other tools published: these notes and links → adopt, repair, update, keep or remove."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.fake_registry import FakeRegistry
from tests.images import directory, file, image, layer, whiteout
from tests.predecessor_trees import DuccTree, Generation, OsgTree
from unpacker.errors import WishlistError
from unpacker.inherited import Maker, root_of
from unpacker.limits import Limits
from unpacker.plan import Inheritance, Verb
from unpacker.predecessors import Estate, Source, inherit, reference_of
from unpacker.publish.directory import DirectoryPublisher
from unpacker.publish.view import DirectoryView
from unpacker.registry.client import Access
from unpacker.resolve import resolve
from unpacker.wishlist import parse

BASE = layer(directory("etc"), file("etc/motd", b"hello"), file("etc/gone", b"x"))
TOP = layer(whiteout("etc/gone"), file("etc/new", b"n"))
APP = image(BASE, TOP)
OTHER = image(BASE, layer(file("etc/other", b"o")))
BOTH: list[Generation] = ["2.12", "2.14"]


class Old:
    """A tree of another tool, the registry it was made from, and the judgement over it."""

    def __init__(self, path: Path, fake: FakeRegistry) -> None:
        self.path = path / "target"
        self.fake = fake

    def ducc(self, generation: Generation = "2.14") -> DuccTree:
        return DuccTree(self.path, generation)

    def name(self, rest: str) -> str:
        return f"{self.fake.host}/{rest}"

    def judge(self, *wishes: str) -> Estate:
        text = "version: 2\nimages: []\n"
        if wishes:
            text = "version: 2\nimages:\n" + "".join(f"- {wish}\n" for wish in wishes)
        found = parse(text.replace("HOST", f"http://{self.fake.host}").encode(), "wishlist.yaml")
        assert found.sound, found.faults
        registry = Access(backoff=0.01, attempts=2, timeout=5, limits=Limits()).open()
        source = Source(
            view=DirectoryView(str(self.path)), registry=registry, limits=Limits(), may_become_public=frozenset()
        )
        published = DirectoryPublisher(str(self.path)).published()
        with ThreadPoolExecutor(4) as asking:
            return inherit(source, resolve(found.wishes, registry, asking, Limits()), published, asking)

    def one(self, *wishes: str) -> Inheritance:
        estate = self.judge(*wishes)
        assert not estate.unresolved, [str(u.error) for u in estate.unresolved]
        (found,) = estate.names.values()
        return found


@pytest.fixture
def old(tmp_path: Path, registry: FakeRegistry) -> Old:
    return Old(tmp_path, registry)


# -- sound ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("generation", BOTH)
def test_a_sound_image_of_either_generation_is_adopted_with_its_root(old: Old, generation: Generation) -> None:
    old.fake.add("org/app", "1.0", APP)
    ducc = old.ducc(generation)
    ducc.publish(old.name("org/app:1.0"), APP)
    found = old.one("HOST/org/app:1.0")
    assert (found.verb, found.root) == (Verb.ADOPT, ducc.flat(APP))
    assert found.reason == "published by DUCC, sound"


def test_an_image_that_came_from_an_index_is_found_where_2_14_notes_it(old: Old) -> None:
    old.fake.add_index("org/app", "1.0", APP)
    old.ducc().publish(old.name("org/app:1.0"), APP, index="amd64")
    assert old.one("HOST/org/app:1.0").reason == "published by DUCC, sound"


def test_of_two_notes_after_an_upgrade_the_stale_one_does_not_count(old: Old) -> None:
    old.fake.add("org/app", "1.0", APP)
    old.ducc("2.12")._write_manifest(old.name("org/app:1.0"), OTHER, None)
    ducc = old.ducc()
    ducc.publish(old.name("org/app:1.0"), APP, index="amd64")
    ducc.lose_layer(APP, 1)
    assert old.one("HOST/org/app:1.0").verb is Verb.REPAIR


def test_an_image_converted_without_layers_is_adopted_and_the_reason_says_what_is_not_proven(old: Old) -> None:
    old.fake.add("org/app", "1.0", APP)
    old.ducc().publish(old.name("org/app:1.0"), APP, layers=False)
    found = old.one("HOST/org/app:1.0")
    assert (found.verb, found.reason) == (
        Verb.ADOPT,
        "published by DUCC, sound as far as can be told: it kept no layers",
    )


def test_nothing_but_manifest_and_config_is_asked_of_the_registry(old: Old) -> None:
    old.fake.add("org/app", "1.0", APP)
    old.ducc().publish(old.name("org/app:1.0"), APP)
    old.judge("HOST/org/app:1.0")
    layers = {digest for digest in APP.blobs if digest != APP.image_id}
    assert not [r for r in old.fake.requests if r.path.rpartition("/")[2] in layers]


# -- damaged ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("generation", BOTH)
@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda ducc: ducc.lose_layer(APP, 1), "is missing"),
        (lambda ducc: ducc.leave_layer_unfinished(APP, 0), "was never finished"),
        (lambda ducc: ducc.cut_layer_off(APP, 0), "was cut off or altered while it was unpacked"),
        (lambda ducc: ducc.lose_singularity(APP), "it lacks .singularity.d/runscript"),
        (lambda ducc: ducc.lose_root(APP), "its link leads to nothing"),
    ],
    ids=["layer-missing", "layer-unfinished", "layer-cut-off", "no-singularity", "dangling"],
)
def test_damage_that_the_old_tools_leave_is_found_and_repaired(
    old: Old, generation: Generation, damage: Any, told: str
) -> None:
    old.fake.add("org/app", "1.0", APP)
    ducc = old.ducc(generation)
    ducc.publish(old.name("org/app:1.0"), APP)
    damage(ducc)
    found = old.one("HOST/org/app:1.0")
    assert (found.verb, found.root) == (Verb.REPAIR, None)
    assert found.reason.startswith("published by DUCC, damaged: ")
    assert told in found.reason


def test_a_note_that_is_no_json_counts_as_a_layer_never_finished(old: Old) -> None:
    old.fake.add("org/app", "1.0", APP)
    ducc = old.ducc()
    ducc.publish(old.name("org/app:1.0"), APP)
    (ducc.layer(APP, 0) / ".metadata" / "layers.json").write_text("[{")
    assert "was never finished" in old.one("HOST/org/app:1.0").reason


def test_a_tag_that_moved_since_is_an_update(old: Old) -> None:
    old.fake.add("org/app", "1.0", OTHER)
    old.ducc().publish(old.name("org/app:1.0"), APP)
    found = old.one("HOST/org/app:1.0")
    assert found.verb is Verb.UPDATE
    assert found.reason.startswith("published by DUCC from another image")


# -- not wished -------------------------------------------------------------------------------------------------


def test_what_nobody_wishes_is_adopted_too(old: Old) -> None:
    old.fake.add("org/app", "1.0", APP)
    old.ducc().publish(old.name("org/app:1.0"), APP)
    assert old.one().verb is Verb.ADOPT


def test_what_nobody_wishes_and_the_registry_lost_is_kept_as_it_is(old: Old) -> None:
    old.fake.add("org/else", "1.0", OTHER)
    old.ducc().publish(old.name("org/app:1.0"), APP)
    found = old.one()
    assert (found.verb, found.reason) == (
        Verb.KEEP,
        "kept as DUCC left it: gone from the registry, so nothing can prove it",
    )


def test_a_dangling_name_that_nobody_wishes_and_the_registry_lost_is_removed(old: Old) -> None:
    old.fake.add("org/else", "1.0", OTHER)
    ducc = old.ducc()
    ducc.publish(old.name("org/app:1.0"), APP)
    ducc.lose_root(APP)
    assert old.one().verb is Verb.REMOVE


def test_a_name_that_leads_into_another_repository_is_not_removed_for_leading_nowhere_here(old: Old) -> None:
    ducc = old.ducc()
    ducc.publish(old.name("org/app:1.0"), APP)
    name = old.path / old.name("org/app:1.0")
    name.unlink()
    name.symlink_to(f"/cvmfs/other.example.org/{ducc.flat(OTHER)}")
    old.fake.add("org/else", "1.0", OTHER)
    assert old.one().verb is Verb.KEEP


def test_a_registry_that_does_not_answer_removes_nothing(old: Old) -> None:
    ducc = old.ducc()
    ducc.publish(old.name("org/app:1.0"), APP)
    ducc.lose_root(APP)
    old.fake.fault(status=500, times=1000)
    assert old.one().verb is Verb.KEEP


def test_a_wished_image_that_cannot_be_judged_is_a_failure_of_its_own(old: Old) -> None:
    old.fake.add("org/app", "1.0", APP)
    old.fake.add("org/app", "2.0", OTHER)
    ducc = old.ducc()
    ducc.publish(old.name("org/app:1.0"), APP)
    ducc.publish(old.name("org/app:2.0"), OTHER)
    old.fake.fault(status=500, times=1000, method="GET", path=OTHER.digest)
    estate = old.judge("HOST/org/app:1.0", "HOST/org/app:2.0")
    assert [one.verb for one in estate.names.values()] == [Verb.ADOPT]
    assert [u.name for u in estate.unresolved] == [f"{old.fake.host}/org/app:2.0"]


# -- several platforms ------------------------------------------------------------------------------------------


def test_a_link_for_several_platforms_wished_for_one_is_a_fault_that_says_what_to_wish(old: Old) -> None:
    old.fake.add("org/app", "1.0", APP)
    old.ducc().publish_variants(old.name("org/app:1.0"), amd64=APP)
    (unresolved,) = old.judge("HOST/org/app:1.0").unresolved
    assert isinstance(unresolved.error, WishlistError)
    assert "platforms:" in str(unresolved.error)


def test_a_link_that_a_client_has_filled_in_already_is_for_several_platforms_too(old: Old) -> None:
    """As a mounted repository shows it."""
    old.fake.add("org/app", "1.0", APP)
    name = old.name("org/app:1.0")
    old.ducc().publish_variants(name, amd64=APP)
    (old.path / name).unlink()
    (old.path / name).symlink_to("../" * name.count("/") + f".multiarch/x86_64/{name}")
    (unresolved,) = old.judge("HOST/org/app:1.0").unresolved
    assert "platforms:" in str(unresolved.error)


def test_a_link_for_several_platforms_that_nobody_wishes_is_kept(old: Old) -> None:
    old.fake.add("org/app", "1.0", APP)
    old.ducc().publish_variants(old.name("org/app:1.0"), amd64=APP)
    assert {one.verb for one in old.judge().names.values()} == {Verb.KEEP}


# -- OSG --------------------------------------------------------------------------------------------------------


def test_an_image_of_osg_is_found_by_its_name_without_the_registry_and_by_the_hash_of_its_layers(old: Old) -> None:
    old.fake.add("org/app", "1.0", APP)
    osg = OsgTree(old.path)
    osg.publish("org/app:1.0", APP)
    found = old.judge("HOST/org/app:1.0").names[old.name("org/app:1.0")]
    assert (found.verb, found.root, found.reason) == (
        Verb.ADOPT,
        osg.images(APP),
        "published by cvmfs-singularity-sync, sound",
    )


def test_an_image_of_osg_that_came_from_an_index_is_told_by_the_digest_of_the_index(old: Old) -> None:
    digest = old.fake.add_index("org/app", "1.0", APP)
    OsgTree(old.path).publish("org/app:1.0", APP, of_index=digest)
    assert old.one("HOST/org/app:1.0").verb is Verb.ADOPT


def test_an_image_of_osg_from_another_registry_is_not_taken_for_this_one(old: Old) -> None:
    old.fake.add("org/app", "1.0", APP)
    OsgTree(old.path).publish("org/app:1.0", OTHER)
    assert old.one("HOST/org/app:1.0").verb is Verb.UPDATE


def test_an_image_of_osg_whose_build_was_not_finished_is_repaired(old: Old) -> None:
    old.fake.add("org/app", "1.0", APP)
    osg = OsgTree(old.path)
    osg.publish("org/app:1.0", APP)
    osg.leave_unfinished(APP)
    assert "it lacks srv, cvmfs" in old.one("HOST/org/app:1.0").reason


# -- names and links --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("link", "at", "root"),
    [
        ("../../.flat/ab/" + "ab" + "0" * 62, "r.org/o/a:1", ".flat/ab/ab" + "0" * 62),
        ("../.flat/ab/" + "ab" + "0" * 62, "r.org/a:1", ".flat/ab/ab" + "0" * 62),
        ("/cvmfs/x.org/.flat/ab/" + "ab" + "0" * 62, "r.org/a:1", ".flat/ab/ab" + "0" * 62),
    ],
)
def test_a_link_relative_or_by_the_mount_point_leads_to_its_root(link: str, at: str, root: str) -> None:
    found = root_of(link, at)
    assert found is not None
    assert (found.path, found.maker) == (root, Maker.DUCC)


@pytest.mark.parametrize(
    "link",
    [
        "../../../.flat/ab/" + "ab" + "0" * 62,  # out of the tree
        "../.flat/cd/" + "ab" + "0" * 62,  # another group than its name says
        "../.flat/ab/" + "ab" + "0" * 61,
        "/etc/passwd",
        "../.images/ab/short",
        "../elsewhere",
        "",
    ],
)
def test_a_link_that_leads_anywhere_else_is_none_of_theirs(link: str) -> None:
    assert root_of(link, "r.org/a:1") is None


def test_a_name_by_digest_is_read_as_ducc_writes_it() -> None:
    reference = reference_of("r.org/o/a:sha256:" + "0" * 64)
    assert reference is not None
    assert (reference.tag, str(reference.digest)) == (None, "sha256:" + "0" * 64)


def test_a_name_that_no_image_can_have_is_left_alone() -> None:
    assert reference_of("not a name:1") is None


def test_what_ducc_left_besides_images_is_told(old: Old) -> None:
    old.fake.add("org/app", "1.0", APP)
    old.ducc("2.12").publish(old.name("org/app:1.0"), APP)
    (hint,) = old.judge("HOST/org/app:1.0").hints
    assert hint.startswith(".chains, which DUCC left, may be removed by hand")


def test_a_symlink_inside_an_image_is_not_followed_for_the_proof_that_it_is_finished(old: Old, tmp_path: Path) -> None:
    old.fake.add("org/app", "1.0", APP)
    ducc = old.ducc()
    ducc.publish(old.name("org/app:1.0"), APP)
    ducc.lose_singularity(APP)
    (tmp_path / "outside" / "env").mkdir(parents=True)
    (tmp_path / "outside" / "runscript").touch()
    (tmp_path / "outside" / "env" / "10-docker2singularity.sh").touch()
    (old.path / ducc.flat(APP) / ".singularity.d").symlink_to(tmp_path / "outside")
    assert old.one("HOST/org/app:1.0").verb is Verb.REPAIR

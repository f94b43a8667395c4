"""Pinned × published → plan: each claim is about one public name, or about what must never happen to many."""

from __future__ import annotations

from dataclasses import replace

import pytest

from unpacker.digest import Digest
from unpacker.errors import NotFound, RegistryError
from unpacker.image import Pinned, Unresolved
from unpacker.oci import OCI_MANIFEST, Descriptor, Platform
from unpacker.plan import DAY, Plan, Resolution, Rules, Verb, plan
from unpacker.record import Published, Unreadable
from unpacker.reference import Reference
from unpacker.wish import Wish
from unpacker.wishlist import parse

AMD64 = Platform(os="linux", architecture="amd64")
ARM64 = Platform(os="linux", architecture="arm64")
OURS = "https://git.example.org/site/wishes//wishlist.yaml"


def digest(n: int) -> Digest:
    return Digest.of(str(n).encode())


def pinned(name: str, n: int = 1, platform: Platform = AMD64) -> Pinned:
    descriptor = Descriptor(media_type=OCI_MANIFEST, digest=digest(n), size=1)
    return Pinned(reference=Reference.parse(name), descriptor=descriptor, platform=platform)


def published(name: str, n: int = 1, *, owner: str | None = OURS, rules: str = "r1") -> Published:
    return Published(
        reference=Reference.parse(name),
        digest=str(digest(n)),
        manifest_digest=str(digest(n)),
        image_id=str(digest(n)),
        platform=AMD64,
        root=f".flat/xx/{n}",
        rules=rules,
        wishlist=owner,
        published=1000,
    )


def standing(*records: Published) -> dict[str, Published | Unreadable]:
    return {r.public_path: r for r in records}


def wishes(*images: str) -> tuple[Wish, ...]:
    found = parse(("version: 2\nimages:\n" + "".join(f"- '{i}'\n" for i in images)).encode(), "w")
    assert found.sound, found.faults
    return found.wishes


def decide(
    wished: tuple[Wish, ...], resolution: Resolution, stands: dict[str, Published | Unreadable], **rules: object
) -> Plan:
    return plan(wished, resolution, stands, replace(Rules(owner=OURS), **rules))  # type: ignore[arg-type]


def verbs(result: Plan) -> dict[str, str]:
    return {a.public_path: a.verb.value for a in result.actions}


A1 = "reg.example.org/a:1"
REPOSITORY = Reference.parse(A1).repository


def test_what_is_not_published_is_published() -> None:
    result = decide(wishes(A1), Resolution(pinned=(pinned(A1),)), {})
    assert verbs(result) == {A1: "publish"}


def test_what_is_as_wished_is_kept() -> None:
    result = decide(wishes(A1), Resolution(pinned=(pinned(A1),)), standing(published(A1)))
    assert verbs(result) == {A1: "keep"}
    assert not result.changes


@pytest.mark.parametrize(
    ("wanted", "stands", "reason"),
    [
        (pinned(A1, 2), published(A1, 1), "moved"),
        (pinned(A1, 1, ARM64), published(A1, 1), "linux/arm64"),
        (pinned(A1), Unreadable(A1, "cut off"), "cut off"),
    ],
)
def test_a_difference_is_an_update_with_its_reason(wanted: Pinned, stands: Published | Unreadable, reason: str) -> None:
    result = decide(wishes(A1), Resolution(pinned=(wanted,)), {A1: stands})
    assert verbs(result) == {A1: "update"}
    assert reason in result.actions[0].reason


def test_other_rules_are_an_update_only_when_rebuilding() -> None:
    resolution, now = Resolution(pinned=(pinned(A1),)), standing(published(A1, rules="old"))
    assert verbs(decide(wishes(A1), resolution, now)) == {A1: "keep"}
    assert verbs(decide(wishes(A1), resolution, now, rebuild="new")) == {A1: "update"}


def test_a_damaged_root_is_an_update() -> None:
    result = decide(wishes(A1), Resolution(pinned=(pinned(A1),)), standing(published(A1)), damaged=frozenset({A1}))
    assert "damaged" in result.changes[0].reason


def test_a_tag_that_the_wishlist_no_longer_asks_for_is_removed() -> None:
    b = "reg.example.org/b:1"
    result = decide(wishes(A1), Resolution(pinned=(pinned(A1),)), standing(published(A1), published(b)))
    assert verbs(result) == {A1: "keep", b: "remove"}


@pytest.mark.parametrize("owner", ["https://git.example.org/other//wishlist.yaml", None])
def test_only_what_this_wishlist_published_is_removed(owner: str | None) -> None:
    b = "reg.example.org/b:1"
    result = decide(wishes(A1), Resolution(pinned=(pinned(A1),)), standing(published(A1), published(b, owner=owner)))
    assert b not in verbs(result)


def test_a_single_image_of_nobody_removes_no_other_image_of_nobody() -> None:
    result = decide(
        wishes(A1), Resolution(pinned=(pinned(A1),)), standing(published("r.org/b:1", owner=None)), owner=None
    )
    assert verbs(result) == {A1: "publish"}


@pytest.mark.parametrize("rules", [{"sound": False}, {"removals": False}])
def test_a_faulty_file_or_a_partial_run_removes_nothing(rules: dict[str, bool]) -> None:
    b = "reg.example.org/b:1"
    result = decide(wishes(A1), Resolution(pinned=(pinned(A1),)), standing(published(b)), **rules)
    assert verbs(result)[b] == "keep"


def test_a_list_that_could_not_be_read_removes_nothing_of_its_repository_but_others_go() -> None:
    a2, b = "reg.example.org/a:2", "reg.example.org/b:1"
    wished = wishes("reg.example.org/a:*")
    unknown = Unresolved(repository=wished[0].repository, reference=None, error=RegistryError("down"))
    result = decide(wished, Resolution(unresolved=(unknown,)), standing(published(a2), published(b)))
    assert verbs(result) == {a2: "keep", b: "remove"}


def test_a_tag_gone_from_the_registry_is_kept_and_shown_as_vanished() -> None:
    a2 = "reg.example.org/a:2"
    resolution = Resolution(pinned=(pinned(A1),), listed={REPOSITORY: frozenset({"1"})})
    result = decide(wishes("reg.example.org/a:*"), resolution, standing(published(A1), published(a2)))
    gone = next(a for a in result.actions if a.public_path == a2)
    assert (gone.verb, gone.vanished) == (Verb.KEEP, True)


def test_what_is_not_ours_in_the_place_of_a_name_is_an_error_of_that_name_only() -> None:
    foreign = Unreadable(A1, "/srv/a:1 is no symlink: move it away", is_foreign=True)
    b = "reg.example.org/b:1"
    result = decide(wishes(A1, b), Resolution(pinned=(pinned(A1), pinned(b))), {A1: foreign})
    assert verbs(result) == {b: "publish"}
    assert [(u.name, str(u.error)) for u in result.unresolved] == [(A1, foreign.problem)]


def test_a_tag_list_over_http_says_nothing_of_what_is_gone_over_https() -> None:
    a2 = "reg.example.org/a:2"
    plain = replace(REPOSITORY, scheme="http")
    listed = {REPOSITORY: frozenset({"1", "2"}), plain: frozenset({"1"})}
    resolution = Resolution(pinned=(pinned(A1),), listed=listed)
    wished = wishes("https://reg.example.org/a:1*", "http://reg.example.org/a:2*")
    result = decide(wished, resolution, standing(published(A1), published(a2)))
    assert [a.public_path for a in result.actions if a.vanished] == [a2], "wished over http only, and gone there"


def test_a_literal_tag_gone_from_the_registry_is_vanished_not_failed() -> None:
    wished = wishes(A1)
    missing = Unresolved(
        repository=wished[0].repository, reference=Reference.parse(A1), error=NotFound("no such tag", status=404)
    )
    result = decide(wished, Resolution(missing=(missing,)), standing(published(A1)))
    assert result.actions[0].vanished
    assert not result.unresolved


def test_a_literal_tag_that_never_was_is_a_failure() -> None:
    wished = wishes(A1)
    missing = Unresolved(
        repository=wished[0].repository, reference=Reference.parse(A1), error=NotFound("no such tag", status=404)
    )
    result = decide(wished, Resolution(missing=(missing,)), {})
    assert [u.name for u in result.unresolved] == [A1]


def test_vanished_names_go_after_the_time_the_operator_set() -> None:
    a2 = "reg.example.org/a:2"
    resolution = Resolution(pinned=(pinned(A1),), listed={REPOSITORY: frozenset({"1"})})
    now = standing(published(A1), published(a2))
    for days, verb in ((29, "keep"), (30, "remove")):
        result = decide(
            wishes("reg.example.org/a:*"),
            resolution,
            now,
            keep_vanished=30.0,
            vanished_since={a2: 0},
            now=days * DAY,
        )
        assert verbs(result)[a2] == verb


def test_a_tag_pushed_out_of_the_newest_is_removed_not_vanished() -> None:
    old, new = "reg.example.org/a:1", "reg.example.org/a:2"
    found = parse(b"version: 2\nimages:\n- image: reg.example.org/a\n  tags: ['*']\n  newest: 1\n", "w")
    resolution = Resolution(pinned=(pinned(new),), listed={REPOSITORY: frozenset({"1", "2"})})
    assert verbs(decide(found.wishes, resolution, standing(published(old), published(new))))[old] == "remove"


@pytest.mark.parametrize(("count", "gone", "held"), [(20, 5, False), (20, 6, True), (100, 10, False), (100, 11, True)])
def test_more_removals_than_a_program_should_decide_are_held_for_a_person(count: int, gone: int, held: bool) -> None:
    names = [f"reg.example.org/a{i}:1" for i in range(count)]
    kept = names[gone:]
    now = standing(*(published(n) for n in names))
    result = decide(wishes(*kept), Resolution(pinned=tuple(pinned(n) for n in kept)), now)
    assert len(result.held) == (gone if held else 0)
    assert sum(v == "remove" for v in verbs(result).values()) == (0 if held else gone)
    assert bool(result.refusal) == held
    allowed = decide(wishes(*kept), Resolution(pinned=tuple(pinned(n) for n in kept)), now, allow_removals=True)
    assert sum(v == "remove" for v in verbs(allowed).values()) == gone


def test_an_empty_wishlist_removes_nothing_by_itself_however_little_stands() -> None:
    result = decide((), Resolution(), standing(published(A1)))
    assert not result.changes
    assert [a.public_path for a in result.held] == [A1]


def test_two_wishlists_cannot_fight_over_the_platform_of_one_name() -> None:
    result = decide(
        wishes(A1), Resolution(pinned=(pinned(A1, 1, ARM64),)), standing(published(A1, owner="somebody else's"))
    )
    assert not result.changes
    assert "somebody else's" in str(result.unresolved[0].error)

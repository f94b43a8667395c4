"""Wishlists of all three formats: what they wish for, and every fault with its place."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import yaml

from unpacker.errors import WishlistError
from unpacker.oci import LINUX_AMD64, Platform
from unpacker.reference import TagPattern
from unpacker.wishlist import Wish, Wishlist, parse

FOLDER = os.environ.get("UNPACKER_WISHLISTS")
"""Taken when the tests are collected: each test runs without the variables of whoever runs them."""

HEX = "0123456789abcdef" * 4
ARM64 = Platform.parse("linux/arm64")


def read(text: str, name: str = "w.yaml") -> Wishlist:
    return parse(text.encode(), name)


def images(*entries: str) -> Wishlist:
    """A wishlist of version 2 with these entries, of which the first stands in line 3."""
    return read("version: 2\nimages:\n" + "".join(f"  - {entry}\n" for entry in entries))


def one(wishlist: Wishlist) -> Wish:
    assert wishlist.faults == ()
    (wish,) = wishlist.wishes
    return wish


def faults(wishlist: Wishlist) -> list[str]:
    return [str(fault) for fault in wishlist.faults]


def warnings(wishlist: Wishlist) -> list[str]:
    assert all(warning.is_warning for warning in wishlist.warnings)
    return [str(warning) for warning in wishlist.warnings]


def test_an_image_is_a_wish() -> None:
    wish = one(images("https://registry.hub.docker.com/library/alpine:3.20"))
    assert str(wish.repository) == "registry.hub.docker.com/library/alpine"
    assert wish.tags == (TagPattern("3.20"),)
    assert (wish.line, wish.column) == (3, 5)
    assert wish.text == "https://registry.hub.docker.com/library/alpine:3.20"
    assert not wish.needs_listing
    assert wish.select([]) == ("3.20",)


def test_a_wildcard_is_a_wish_for_the_tags_it_matches() -> None:
    wish = one(images("https://registry.hub.docker.com/library/alpine:3.*"))
    assert wish.needs_listing
    assert wish.select(["3.9", "3.20", "edge", "2.7"]) == ("3.20", "3.9")


def test_a_digest_is_a_wish_that_asks_for_no_tag_list() -> None:
    wish = one(images(f"ghcr.io/org/tool@sha256:{HEX}"))
    assert (wish.tags, str(wish.digest)) == ((), f"sha256:{HEX}")
    assert not wish.needs_listing
    assert wish.select(["1.0"]) == ()


def test_a_tag_pinned_to_a_digest_is_a_wish_for_that_tag() -> None:
    wish = one(images(f"ghcr.io/org/tool:1.0@sha256:{HEX}"))
    assert (wish.select([]), str(wish.digest)) == (("1.0",), f"sha256:{HEX}")
    assert not wish.needs_listing


def test_a_mapping_says_all_of_a_wish() -> None:
    wish = one(
        read(
            """\
version: 2
defaults: {platform: linux/amd64}
images:
  - image: gitlab-registry.cern.ch/atlas/athena/analysisbase
    tags: ["24.2.*", "25.*"]
    exclude: ["*-rc*", "*-dev"]
    versions: ">=24.2,<26"
    newest: 5
    platform: linux/arm64
    gpu: true
"""
        )
    )
    assert str(wish.repository) == "gitlab-registry.cern.ch/atlas/athena/analysisbase"
    assert wish.tags == (TagPattern("24.2.*"), TagPattern("25.*"))
    assert wish.exclude == (TagPattern("*-rc*"), TagPattern("*-dev"))
    assert (wish.versions, wish.newest, wish.platform, wish.gpu) == (">=24.2,<26", 5, ARM64, True)
    assert (wish.line, wish.column, wish.text) == (4, 5, "gitlab-registry.cern.ch/atlas/athena/analysisbase")


def test_a_tag_may_stand_in_image_beside_other_rules() -> None:
    wish = one(images('{image: "ghcr.io/a/b:1.*", exclude: ["*-rc*"], newest: 1}'))
    assert wish.select(["1.0", "1.1", "1.2-rc1"]) == ("1.1",)


def test_a_list_of_tags_in_full_needs_no_tag_list_unless_a_rule_chooses_among_them() -> None:
    assert not one(images("{image: ghcr.io/a/b, tags: [a, b], exclude: ['*-rc']}")).needs_listing
    assert one(images("{image: ghcr.io/a/b, tags: [a, b], newest: 1}")).needs_listing
    assert one(images("{image: ghcr.io/a/b, tags: [a, b], versions: '>1'}")).needs_listing
    assert one(images("{image: ghcr.io/a/b, tags: [a, 'b*']}")).needs_listing


def test_a_number_stays_the_text_that_was_written() -> None:
    wish = one(images("{image: ghcr.io/a/b, tags: [3.10, 010, 1e3, 2024-01-01, yes, 0x10, 1_0]}"))
    assert set(wish.select([])) == {"3.10", "010", "1e3", "2024-01-01", "yes", "0x10", "1_0"}


@pytest.mark.parametrize(
    ("text", "gpu"), [("true", True), ("yes", True), ("'on'", True), ("False", False), ("no", False)]
)
def test_gpu_is_any_word_of_yaml_for_true_and_false(text: str, gpu: bool) -> None:
    assert one(images(f"{{image: 'ghcr.io/a/b:1', gpu: {text}}}")).gpu is gpu


def test_the_platform_is_the_wishs_else_the_files_else_the_operators() -> None:
    text = "version: 2\n%simages: ['ghcr.io/a/b:1', {image: 'ghcr.io/a/c:1', platform: linux/s390x}]\n"
    s390x = Platform.parse("linux/s390x")
    of_the_file = read(text % "defaults: {platform: linux/arm64, gpu: true}\n")
    assert [(w.platform, w.gpu) for w in of_the_file.wishes] == [(ARM64, True), (s390x, True)]
    of_the_operator = parse((text % "").encode(), "w.yaml", default_platform=ARM64)
    assert [w.platform for w in of_the_operator.wishes] == [ARM64, s390x]
    assert [w.platform for w in read(text % "").wishes] == [LINUX_AMD64, s390x]


@pytest.mark.parametrize(
    "text", ["", "# nothing\n", "version: 2\nimages: []\n", "version: 2\nimages:\n", "---\n", "version: 1\ninput: []\n"]
)
def test_a_file_may_wish_for_nothing_with_a_warning(text: str) -> None:
    wishlist = read(text)
    assert (wishlist.wishes, wishlist.faults, wishlist.sound) == ((), (), True)
    assert warnings(wishlist) == ["w.yaml:1:1: no images are wished for"]


@pytest.mark.parametrize(
    ("entry", "fault"),
    [
        (
            "alpine:3",
            "3:5: no registry host in 'alpine:3' (for Docker Hub write registry.hub.docker.com/library/alpine:3)",
        ),
        (
            "ghcr.io/a/b",
            "3:5: neither tag nor digest in 'ghcr.io/a/b' "
            "(write :latest or :* behind it, or use the keys image: and tags:, if that is meant)",
        ),
        ("{image: ghcr.io/a/b}", "3:13: neither tag nor digest in 'ghcr.io/a/b'"),
        ("{image: ghcr.io/a/b, newest: 3}", "3:13: neither tag nor digest in 'ghcr.io/a/b'"),
        ("{image: ghcr.io/a/b, tags: []}", "3:32: tags is empty"),
        ("{image: 'ghcr.io/a/b:1', tags: ['2']}", "3:13: a tag in image, '1', and tags besides (write all under tags)"),
        ("{tags: ['2']}", "3:5: image is missing"),
        ("{image: [x], tags: ['2']}", "3:13: image is missing"),
        ("{image: ~, tags: ['2']}", "3:13: an empty entry"),
        ("", "3:4: an empty entry"),
        ("['ghcr.io/a/b:1']", "3:5: a list within the list of images"),
        ("ghcr.io/A/b:1", "3:5: not a repository name: 'A/b'"),
        ("'ghcr.io/a/b:1+2'", "3:5: not a tag or tag pattern: '1+2'"),
        (f"ghcr.io/a/b:1*@sha256:{HEX}", "3:5: a pattern cannot be pinned to one digest"),
        (f"{{image: 'ghcr.io/a/b@sha256:{HEX}', newest: 1}}", "3:100: newest has nothing to choose from"),
        ("{image: ghcr.io/a/b, tags: '1.*'}", '3:32: not a list (expected for example ["1.*"])'),
        ("{image: ghcr.io/a/b, tags: [[a]]}", "3:33: a tag or pattern is one text"),
        ("{image: ghcr.io/a/b, tags: ['*'], exclude: ['[']}", "3:49: not a tag or tag pattern: '['"),
        ("{image: ghcr.io/a/b, tags: ['*'], exclude: [-rc]}", "3:49: no tag starts with '-': '-rc' (write '*-rc' if"),
        ("{image: ghcr.io/a/b, tags: ['*'], versions: 24}", "3:49: not a version range: '24' (expected for example"),
        ("{image: ghcr.io/a/b, tags: ['*'], versions: ['>1']}", "3:49: versions is one text"),
        ("{image: ghcr.io/a/b, tags: ['*'], newest: 0}", "3:47: newest is how many tags to take: 1 or more, not '0'"),
        ("{image: ghcr.io/a/b, tags: ['*'], newest: -1}", "3:47: newest is how many tags to take: 1 or more, not '-1'"),
        ("{image: ghcr.io/a/b, tags: ['*'], newest: five}", "3:47: newest is how many"),
        ("{image: ghcr.io/a/b, tags: ['*'], newest: 1.5}", "3:47: newest is how many"),
        ("{image: ghcr.io/a/b, tags: ['*'], newest: [1]}", "3:47: newest is how many"),
        ("{image: ghcr.io/a/b, tags: ['*'], newest: ~}", "3:47: newest has no value"),
        ("{image: 'ghcr.io/a/b:1', platform: arm64}", "3:40: not a platform: 'arm64' (expected os/architecture"),
        ("{image: 'ghcr.io/a/b:1', platform: [linux/arm64]}", "3:40: platform is one text"),
        ("{image: 'ghcr.io/a/b:1', gpu: 1}", "3:35: gpu is true or false"),
        ("{image: 'ghcr.io/a/b:1', platfrom: linux/arm64}", "3:30: unknown key 'platfrom' (did you mean platform?)"),
        ("{image: 'ghcr.io/a/b:1', tag: '1'}", "3:30: unknown key 'tag' (did you mean tags?)"),
        ("{image: 'ghcr.io/a/b:1', colour: red}", "3:30: unknown key 'colour' (an image has image, tags, exclude,"),
        ("{image: 'ghcr.io/a/b:1', <<: {gpu: true}}", "3:30: unknown key '<<' (keys are not merged"),
        (
            "{image: 'ghcr.io/a/b:1', image: 'ghcr.io/a/c:1'}",
            "3:30: the key 'image' stands here twice (first in line 3)",
        ),
        ("{[a]: b, image: 'ghcr.io/a/b:1'}", "3:6: a key must be a word"),
        ("!image ghcr.io/a/b:1", "3:5: the YAML tag '!image' means nothing here"),
    ],
)
def test_a_fault_names_its_place_and_stops_no_other_entry(entry: str, fault: str) -> None:
    wishlist = images(entry, "ghcr.io/fine/one:1.0")
    (found,) = faults(wishlist)
    assert found.startswith(f"w.yaml:{fault}")
    assert not wishlist.sound
    assert [wish.text for wish in wishlist.wishes] == ["ghcr.io/fine/one:1.0"]


@pytest.mark.parametrize(
    "key", ["target", "path", "root", "password", "token", "max_tags", "limits", "credentials", "proxy", "image_path"]
)
def test_what_belongs_to_the_operator_is_no_key_of_any_place_and_its_value_is_not_repeated(key: str) -> None:
    wishlist = read(
        f"version: 2\n{key}: hunter2\ndefaults: {{{key}: hunter2}}\n"
        f"images:\n  - {{image: 'ghcr.io/a/b:1', {key}: hunter2}}\n"
    )
    assert [f.line for f in wishlist.faults] == [2, 3, 5]
    assert all("belongs to the operator's settings" in f.message for f in wishlist.faults)
    assert "hunter2" not in "".join(faults(wishlist))


def test_all_faults_of_a_file_are_found_at_once_and_in_order() -> None:
    wishlist = read(
        """\
version: 2
imagse: []
images:
  - image: ghcr.io/a/b
    newest: 0
    platform: x
    tags: ["[", "ok", "-"]
  - alpine
"""
    )
    places = [(f.line, f.column) for f in wishlist.faults]
    assert places == [(2, 1), (5, 13), (6, 15), (7, 12), (7, 23), (8, 5)]


def test_an_exact_duplicate_is_one_wish_with_a_warning() -> None:
    wishlist = images(
        "ghcr.io/a/b:1", "https://ghcr.io/a/b:1", "{image: ghcr.io/a/b, tags: ['1'], platform: linux/amd64}"
    )
    assert len(wishlist.wishes) == 1
    assert wishlist.sound
    assert warnings(wishlist) == [
        "w.yaml:4:5: 'https://ghcr.io/a/b:1' is wished already in line 3; counted once",
        "w.yaml:5:5: 'ghcr.io/a/b' is wished already in line 3; counted once",
    ]


def test_the_same_patterns_in_another_order_are_a_duplicate() -> None:
    wishlist = images("{image: ghcr.io/a/b, tags: ['1*', '2*']}", "{image: ghcr.io/a/b, tags: ['2*', '1*', '1*']}")
    assert (len(wishlist.wishes), len(wishlist.warnings)) == (1, 1)


@pytest.mark.parametrize(
    ("first", "second", "difference"),
    [
        ("https://ghcr.io/a/b:1", "http://ghcr.io/a/b:1", "there over https, here over http"),
        ("ghcr.io/a/b:1", f"ghcr.io/a/b:1@sha256:{HEX}", "there not pinned to a digest, here pinned to sha256:0123"),
        (
            "ghcr.io/a/b:1",
            "{image: 'ghcr.io/a/b:1', platform: linux/arm64}",
            "there for linux/amd64, here for linux/arm64",
        ),
        ("ghcr.io/a/b:1", "{image: 'ghcr.io/a/b:1', gpu: true}", "there without gpu, here with gpu"),
        ("ghcr.io/a/b:1", "{image: ghcr.io/a/b, tags: ['0', '1'], gpu: true}", "there without gpu, here with gpu"),
        ("ghcr.io/a/b:1.*", "http://ghcr.io/a/b:1.*", "there over https, here over http"),
        ("ghcr.io/a/b:1.*", "{image: 'ghcr.io/a/b:1.*', platform: linux/arm64}", "there for linux/amd64"),
        (
            f"ghcr.io/a/b@sha256:{HEX}",
            f"{{image: 'ghcr.io/a/b@sha256:{HEX}', platform: linux/arm64}}",
            "there for linux/amd64, here for linux/arm64",
        ),
    ],
)
def test_two_different_wishes_for_one_public_name_are_a_fault_and_the_first_stands(
    first: str, second: str, difference: str
) -> None:
    wishlist = images(first, second)
    (fault,) = wishlist.faults
    assert (fault.line, fault.column) == (4, 5)
    assert "is wished already in line 3" in fault.message
    assert difference in fault.message
    assert [wish.line for wish in wishlist.wishes] == [3]


def test_two_wishes_that_meet_in_the_same_image_both_stand_with_a_warning() -> None:
    wishlist = images("ghcr.io/a/b:1", "{image: ghcr.io/a/b, tags: ['1', '2']}")
    assert (len(wishlist.wishes), wishlist.faults) == (2, ())
    assert warnings(wishlist) == ["w.yaml:4:5: 'ghcr.io/a/b:1' is wished already in line 3, too; published once"]


def test_the_same_image_under_two_spellings_of_docker_hub_has_two_names() -> None:
    wishlist = images("docker.io/library/alpine:3", "registry.hub.docker.com/library/alpine:3")
    assert (len(wishlist.wishes), wishlist.faults, wishlist.warnings) == (2, (), ())


def test_a_tag_both_asked_for_and_excluded_is_a_warning() -> None:
    wishlist = images("{image: ghcr.io/a/b, tags: ['1', '2'], exclude: ['1*']}")
    assert one(wishlist).select([]) == ("2",)
    assert warnings(wishlist) == ["w.yaml:3:13: the tag 1 is both asked for and excluded, so it is not published"]


@pytest.mark.parametrize(
    "defaults", ["defaults: {platfrom: linux/arm64}", "defaults: {platform: arm}", "defaults: arm"]
)
def test_while_defaults_are_faulty_no_image_takes_its_platform_from_them(defaults: str) -> None:
    wishlist = read(
        f"version: 2\n{defaults}\nimages: ['ghcr.io/a/b:1', {{image: 'ghcr.io/a/c:1', platform: linux/s390x}}]\n"
    )
    assert [f.line for f in wishlist.faults] == [2]
    assert [wish.text for wish in wishlist.wishes] == ["ghcr.io/a/c:1"]
    assert "w.yaml:2:" in warnings(wishlist)[0]


@pytest.mark.parametrize(
    ("key", "fault"),
    [
        ("default: {platform: linux/arm64}", "unknown key 'default' (did you mean defaults?)"),
        ("platform: linux/arm64", "platform for all images stands under defaults (write `defaults: {platform: …}`)"),
        ("platfrom: linux/arm64", "unknown key 'platfrom' (did you mean platform?)"),
    ],
)
def test_misspelt_or_misplaced_defaults_count_as_faulty_defaults(key: str, fault: str) -> None:
    wishlist = read(f"version: 2\n{key}\nimages: ['ghcr.io/a/b:1']\n")
    assert faults(wishlist) == [f"w.yaml:2:1: {fault}"]
    assert wishlist.wishes == ()
    assert "w.yaml:2:1: until the defaults are right" in warnings(wishlist)[0]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("version: 2\n", "1:1: no images"),
        ("version: 2\nimages: ghcr.io/a/b:1\n", "2:9: images is a list"),
        ("version: 2\nimages: {a: b}\n", "2:9: images is a list"),
        ("version: 1\n", "1:1: a recipe of version 1 without input"),
        ("version: 2\nversion: 1\nimages: []\n", "2:1: the key 'version' stands here twice"),
        ("version: 2\nimages: []\n---\nversion: 2\n", "3:1: a second document begins here"),
    ],
)
def test_a_fault_of_the_whole_file_leaves_it_unsound(text: str, fault: str) -> None:
    wishlist = read(text)
    assert faults(wishlist)[0].startswith(f"w.yaml:{fault}")
    assert not wishlist.sound


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("hello\n", "1:1: not a wishlist but a text without keys"),
        ("- ghcr.io/a/b:1\n", "1:1: not a wishlist but a list without keys"),
        ("name: x\njobs: []\n", "1:1: not a wishlist: it has neither version nor images"),
        ("{}\n", "1:1: not a wishlist"),
        ("version: 3\nimages: []\n", "1:10: version is '3' (expected 2"),
        ("version: 2.0\nimages: []\n", "1:10: version is '2.0'"),
        ("version: [2]\nimages: []\n", "1:10: version is no number"),
        ("version: 2\nimages: [\n", "3:1: not YAML: "),
        ("version: 2\nimages:\n\t- a\n", "3:1: not YAML: found character "),
        ('version: "2\n', "2:1: not YAML: found unexpected end of stream"),
    ],
)
def test_what_is_no_wishlist_at_all_is_an_error_with_its_place(text: str, problem: str) -> None:
    with pytest.raises(WishlistError) as caught:
        read(text)
    assert str(caught.value).startswith(f"w.yaml:{problem}")


@pytest.mark.parametrize("entry", ["- *rc*", "tags: [*]", "tags: [*-rc, x]", "- *"])
def test_a_pattern_without_its_quotes_is_told_to_have_them(entry: str) -> None:
    with pytest.raises(WishlistError, match=r'w\.yaml:3:[0-9]+: .*between quotes: "\*-rc\*"'):
        read(f"version: 2\nimages:\n  {entry}\n")


def test_tabs_are_told_to_be_blanks() -> None:
    with pytest.raises(WishlistError, match="indent with blanks"):
        read("version: 2\nimages:\n\t- a\n")


def test_images_without_a_version_are_read_with_a_warning() -> None:
    wishlist = read("images:\n  - ghcr.io/a/b:1\n")
    assert len(wishlist.wishes) == 1
    assert warnings(wishlist) == ["w.yaml:1:1: no version, read as version 2 because of images (write `version: 2`)"]


def test_an_alias_stands_for_what_it_names() -> None:
    wishlist = images("{image: ghcr.io/a/b, tags: &t ['1', '2']}", "{image: ghcr.io/a/c, tags: *t}")
    assert [wish.select([]) for wish in wishlist.wishes] == [("2", "1"), ("2", "1")]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_line_ends_and_byte_order_mark_do_not_matter(newline: str, mark: bytes) -> None:
    for text, name in (
        ("version: 2\nimages:\n  - ghcr.io/a/b:1\n  - alpine\n", "w.yaml"),
        ("#\n\na/b\na.b/c:1\n", "w.txt"),
    ):
        wishlist = parse(mark + text.replace("\n", newline).encode(), name)
        assert [str(f).partition(": ")[0] for f in wishlist.faults] == [f"{name}:4:{5 if name == 'w.yaml' else 1}"]


# DUCC's recipe


def test_a_recipe_of_ducc_is_read_with_notices_for_what_it_cannot_say_here() -> None:
    wishlist = read(
        """\
version: 1
user: cvmfsunpacker
cvmfs_repo: 'unpacked.cern.ch'
output_format: 'https://gitlab-registry.cern.ch/unpacked/sync/$(image)'
colour: red
ignoreErrors: ['https://quay.io/*']
input:
    - 'https://registry.hub.docker.com/library/centos:centos7'
    - 'https://registry.hub.docker.com/library/centos:centos7'
    - quay.io/stimela/casa:1.7.1
    - 'http://localhost:5000/x/y:*'
"""
    )
    assert wishlist.faults == ()
    assert [str(w.repository) for w in wishlist.wishes] == [
        "registry.hub.docker.com/library/centos",
        "quay.io/stimela/casa",
        "localhost:5000/x/y",
    ]
    assert [w.repository.scheme for w in wishlist.wishes] == ["https", "https", "http"]
    assert wishlist.wishes[1].text == "quay.io/stimela/casa:1.7.1"
    assert wishlist.ignore_errors == ("https://quay.io/*",)
    assert [(w.line, w.message.partition(" is ")[0]) for w in wishlist.warnings] == [
        (2, "user"),
        (3, "cvmfs_repo"),
        (4, "output_format"),
        (5, "unknown key 'colour'"),
        (9, "'https://registry.hub.docker.com/library/centos:centos7'"),
    ]


def test_a_recipe_asks_over_https_wherever_it_does_not_say_http() -> None:
    wishlist = read("version: 1\ninput: ['localhost:5000/x/y:1']\n")
    assert one(wishlist).repository.scheme == "https"


@pytest.mark.parametrize(("tag", "found"), [("3.*", "."), ("1.[0-9]*", ". ["), ("v?*", "?"), ("v1?", "?")])
def test_a_pattern_that_ducc_reads_as_a_regular_expression_is_a_warning(tag: str, found: str) -> None:
    wishlist = read(f"version: 1\ninput: ['quay.io/a/b:{tag}']\n")
    assert one(wishlist).tags == (TagPattern(tag),)
    assert f"w.yaml:2:9: DUCC reads {found} in '{tag}' as a regular expression" in warnings(wishlist)[0]


@pytest.mark.parametrize("tag", ["*", "latest-*", "1.0"])
def test_a_pattern_that_means_the_same_in_ducc_is_none(tag: str) -> None:
    assert read(f"version: 1\ninput: ['quay.io/a/b:{tag}']\n").warnings == ()


def test_an_entry_that_stops_ducc_is_that_entrys_fault() -> None:
    wishlist = read("version: 1\ninput:\n  - quay.io/a/b\n  - \n  - [x]\n  - quay.io/a/b:(1|2)\n  - quay.io/a/c:1\n")
    assert [f.line for f in wishlist.faults] == [3, 4, 5, 6]
    assert [w.text for w in wishlist.wishes] == ["quay.io/a/c:1"]


@pytest.mark.parametrize(
    "text", ["input: x", "input: {a: b}", "ignoreErrors: x\ninput: []", "ignoreErrors: [[]]\ninput: []"]
)
def test_a_recipes_lists_are_lists_of_texts(text: str) -> None:
    assert len(read(f"version: 1\n{text}\n").faults) == 1


# OSG's list


def test_a_list_of_osg_is_read_by_its_own_defaults() -> None:
    wishlist = read(
        """\
# comment
alpine
rootproject/root:6.*

opensciencegrid/osgvo-el7:[12]*
containers.ligo.org/lscsoft/lalsuite/lalsuite-v6.53
hub.opensciencegrid.org:443/htc/ubuntu:22.04
""",
        "docker_images.txt",
    )
    assert wishlist.faults == ()
    assert [f"{w.repository}:{w.tags[0]}" for w in wishlist.wishes] == [
        "registry.hub.docker.com/library/alpine:latest",
        "registry.hub.docker.com/rootproject/root:6.*",
        "registry.hub.docker.com/opensciencegrid/osgvo-el7:[12]*",
        "containers.ligo.org/lscsoft/lalsuite/lalsuite-v6.53:latest",
        "hub.opensciencegrid.org:443/htc/ubuntu:22.04",
    ]
    assert [(w.line, w.text) for w in wishlist.wishes][:2] == [(2, "alpine"), (3, "rootproject/root:6.*")]


def test_a_fault_of_a_line_names_the_line_and_stops_no_other() -> None:
    wishlist = read("a/b:1\n  a b\nghcr.io/tool:1\nhttps://ghcr.io/a/b:1\nA/b\nx/y/z:1\na/b:1\n", "docker_images.txt")
    assert [(f.line, f.column) for f in wishlist.faults] == [(2, 3), (3, 1), (4, 1), (5, 1), (6, 1)]
    assert [w.text for w in wishlist.wishes] == ["a/b:1"]
    assert [w.line for w in wishlist.warnings] == [7]


def test_formats_are_told_apart_by_content() -> None:
    assert len(read("a/b:1\nc/d:*\n", "wishlist").wishes) == 2
    assert len(read("version: 2\nimages: ['ghcr.io/a/b:1']\n", "wishlist.txt").wishes) == 1
    assert len(read("version: 1\ninput: ['ghcr.io/a/b:1']\n", "recipe").wishes) == 1
    assert len(read("alpine:3\n", "images.txt").wishes) == 1


# The whole


@pytest.mark.skipif(not yaml.__with_libyaml__, reason="PyYAML was built without libyaml, and is five times slower")
def test_two_thousand_images_are_read_in_well_under_a_third_of_a_second() -> None:
    entries = "".join(
        f"  - image: ghcr.io/group{i % 50}/tool{i}\n    tags: ['1.{i}.*', '2.*']\n    newest: 3\n" for i in range(1000)
    ) + "".join(f"  - ghcr.io/group{i % 50}/tool{i}:0.{i}\n" for i in range(1000))
    text = f"version: 2\nimages:\n{entries}"
    # Processor time and the best of three: other work on the machine is not what is measured.
    seconds = []
    for _ in range(3):
        before = time.process_time()
        wishlist = read(text)
        seconds.append(time.process_time() - before)
    assert len(wishlist.wishes) == 2000
    assert min(seconds) < 0.3


def test_the_wishlist_we_ship_is_without_fault_or_warning() -> None:
    path = Path(__file__).parent.parent / "wishlist.yaml"
    wishlist = parse(path.read_bytes(), "wishlist.yaml")
    assert (faults(wishlist), warnings(wishlist)) == ([], [])
    assert any(wish.needs_listing for wish in wishlist.wishes)
    assert any(wish.digest for wish in wishlist.wishes)


def test_real_wishlists_are_read_without_fault() -> None:
    if not FOLDER:
        pytest.skip("UNPACKER_WISHLISTS names no folder of real wishlists: none was read")
    paths = [path for path in sorted(Path(FOLDER).iterdir()) if path.is_file()]
    assert paths, f"no file in {FOLDER}"
    for path in paths:
        wishlist = parse(path.read_bytes(), str(path))
        assert faults(wishlist) == []
        assert wishlist.wishes

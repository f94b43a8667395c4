"""Which tags a wish selects of those that a registry lists."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unpacker.reference import TagPattern, is_tag
from unpacker.tags import check_versions, in_versions, newest_first, select, version_of


def patterns(*texts: str) -> tuple[TagPattern, ...]:
    return tuple(TagPattern.parse(text) for text in texts)


@pytest.mark.parametrize("tag", ["3.10", "v1.2.3", "V2", "24.2.40", "25.0rc1", "1.7.1-dev", "1.6.9-1", "20240101"])
def test_a_tag_that_pep_440_reads_is_a_version(tag: str) -> None:
    assert version_of(tag) is not None


@pytest.mark.parametrize("tag", ["latest", "3.10-alpine", "22.07-py3", "main", "a1b2c3", "1.0-gpu", "rhel8.9_v4", "v"])
def test_any_other_tag_is_no_version(tag: str) -> None:
    assert version_of(tag) is None


def test_versions_are_in_version_order_and_not_in_text_order() -> None:
    assert newest_first(["3.9", "3.10", "3.2", "10.0"]) == ("10.0", "3.10", "3.9", "3.2")


def test_a_release_candidate_is_older_than_its_release() -> None:
    assert newest_first(["25.0rc1", "25.0", "24.9"]) == ("25.0", "25.0rc1", "24.9")


def test_tags_that_are_no_versions_come_after_all_versions_in_text_order() -> None:
    assert newest_first(["latest", "0.0.1", "edge", "1.0"]) == ("1.0", "0.0.1", "latest", "edge")


def test_tags_of_equal_version_are_in_text_order() -> None:
    assert newest_first(["1.0", "v1.0", "1.0.0"]) == ("v1.0", "1.0.0", "1.0")


def test_a_pattern_selects_the_listed_tags_that_match_it_whole() -> None:
    listed = ["3.1", "3.10", "13.1", "3.1-rc1", "4.0"]
    assert select(listed, tags=patterns("3.1*")) == ("3.10", "3.1", "3.1-rc1")
    assert select(listed, tags=patterns("3.?")) == ("3.1",)
    assert select(listed, tags=patterns("[34].[!1]")) == ("4.0",)


def test_a_full_stop_in_a_pattern_is_a_full_stop() -> None:
    assert select(["1.2", "1x2"], tags=patterns("1.2*")) == ("1.2",)


def test_patterns_are_case_sensitive() -> None:
    assert select(["V1", "v1"], tags=patterns("v*")) == ("v1",)


def test_excluded_tags_are_not_selected_even_if_named_in_full() -> None:
    tags = select(["1.0", "1.1-rc1", "1.1"], tags=patterns("1.*", "2.0-rc1"), exclude=patterns("*-rc*"))
    assert tags == ("1.1", "1.0")


def test_a_tag_named_in_full_is_selected_whether_it_is_listed_or_not() -> None:
    assert select(["1.1"], tags=patterns("1.*", "latest")) == ("1.1", "latest")


def test_newest_and_versions_choose_among_tags_that_exist() -> None:
    assert select(["1.0"], tags=patterns("1.0", "9.9"), newest=1) == ("1.0",)
    assert select(["1.0"], tags=patterns("1.0", "9.9"), versions=">=1") == ("1.0",)


def test_newest_takes_the_first_of_what_is_left_after_everything_else() -> None:
    listed = ["24.2.9", "24.2.10", "25.0.0-rc1", "25.1", "26.0", "latest"]
    tags = select(listed, tags=patterns("*"), exclude=patterns("*-rc*"), versions=">=24.2,<26", newest=2)
    assert tags == ("25.1", "24.2.10")


def test_newest_falls_back_on_tags_that_are_no_versions_only_when_versions_run_out() -> None:
    assert select(["a", "b", "1.0"], tags=patterns("*"), newest=2) == ("1.0", "b")


def test_a_version_range_selects_no_tag_that_is_no_version() -> None:
    assert select(["latest", "1.0", "1.0-alpine"], tags=patterns("*"), versions=">=0") == ("1.0",)


def test_a_version_range_takes_pre_releases_only_if_it_names_one() -> None:
    assert not in_versions("2.0rc1", ">=1.0")
    assert in_versions("2.0rc1", ">=2.0rc1")
    assert in_versions("2.0", ">=2.0rc1")


def test_a_listed_tag_outside_the_grammar_is_never_selected() -> None:
    listed = ["..", ".hidden", "-x", "a/b", "a b", "a\n", "", "ä", "x" * 129, "ok"]
    assert select(listed, tags=patterns("*")) == ("ok",)
    assert select(listed, tags=patterns("*"), newest=100) == ("ok",)


def test_what_is_attached_to_an_image_is_selected_by_no_pattern() -> None:
    attached = "sha256-" + "0123456789abcdef" * 4
    listed = [attached, f"{attached}.sig", f"{attached}.att", f"{attached}-1", "sha256-tool"]
    assert select(listed, tags=patterns("*")) == ("sha256-tool", f"{attached}-1")
    assert select(listed, tags=patterns(attached)) == (attached,)


@pytest.mark.parametrize("text", ["", "  ", "24", ">=x", "latest", ">=1,,<", "=>1", ">=1 and <2", ">=1" + ",>=1" * 100])
def test_a_range_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="version range"):
        check_versions(text)


@pytest.mark.parametrize("text", [">=24.2,<26", "~=3.1", "==1.*", "!=2.0", ">= 1.0 , < 2"])
def test_a_range_of_packaging_is_accepted(text: str) -> None:
    check_versions(text)


TAGS = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,8}", fullmatch=True) | st.sampled_from(
    ["1.0", "v1.0", "1.0.0", "1.0rc1", "1.0-dev", "2", "10", "latest"]
)


@given(st.lists(TAGS), st.integers(1, 5))
def test_the_newest_n_are_a_beginning_of_all_whatever_the_order_listed(listed: list[str], newest: int) -> None:
    everything = select(listed, tags=patterns("*"))
    assert set(everything) == set(listed)
    assert select(reversed(listed), tags=patterns("*")) == everything
    assert select(listed, tags=patterns("*"), newest=newest) == everything[:newest]


@given(st.lists(TAGS | st.text(max_size=4)))
def test_selected_and_excluded_are_a_partition_of_the_tags(listed: list[str]) -> None:
    left = select(listed, tags=patterns("*"), exclude=patterns("*.*"))
    right = select(listed, tags=patterns("*.*"))
    assert not set(left) & set(right)
    assert {*left, *right} == {tag for tag in listed if is_tag(tag)}

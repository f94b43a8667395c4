"""Wishlists written to hurt: whatever stands in the file, reading it ends soon and in bounded memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from unpacker import document
from unpacker.errors import WishlistError
from unpacker.wishlist import Wishlist, parse

HEAD = b"version: 2\nimages:\n"


@pytest.fixture(autouse=True)
def soon_and_in_bounded_memory() -> Iterator[None]:
    """Each test here may take 10 seconds of processor time and 400 MB more than was taken before."""
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    yield
    assert time.process_time() - started < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 400 << 10


def refused(data: bytes, match: str) -> None:
    with pytest.raises(WishlistError, match=match) as caught:
        parse(data, "w.yaml")
    assert str(caught.value).startswith("w.yaml:")
    assert len(str(caught.value)) < 1_000


def messages(wishlist: Wishlist) -> list[str]:
    assert all(len(fault.message) < 3_000 for fault in wishlist.faults)
    return [fault.message for fault in wishlist.faults]


@pytest.mark.parametrize("opening", [b"[", b"{a: ", b"- ", b"? ", b"{? ", b"[{a: "])
def test_deep_nesting_is_refused_where_it_gets_deep(opening: bytes) -> None:
    refused(HEAD + b"  - " + opening * 100_000, "nested deeper than 32 levels")


def test_deep_nesting_by_indentation_is_refused() -> None:
    deep = b"".join(b" " * n + b"a:\n" for n in range(500))
    refused(b"version: 2\n" + deep, "nested deeper than 32 levels")


def test_aliases_of_aliases_do_not_multiply() -> None:
    lists = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    lists += [f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join(['*' + chr(97 + n)] * 10)}]" for n in range(9)]
    refused("\n".join(["version: 2", *lists, "images: *j"]).encode(), "more than 100,000 values, aliases counted")


def test_a_long_list_named_again_and_again_is_counted_each_time() -> None:
    tags = ", ".join(["x"] * 150)
    entries = "".join(f"  - {{image: ghcr.io/a/b{n}, tags: *t}}\n" for n in range(1_000))
    refused(f"version: 2\nx: &t [{tags}]\nimages:\n{entries}".encode(), "more than 100,000 values")


@pytest.mark.parametrize("text", [b"&a [*a]", b"&a {k: *a}", b"&a {*a : k}", b"[&a [[*a]]]"])
def test_an_alias_of_what_contains_it_is_refused(text: bytes) -> None:
    refused(HEAD + b"  - " + text + b"\n", r"w\.yaml:3:[0-9]+: the alias \*a stands for a value that contains it")


def test_a_file_beyond_its_bound_is_refused_before_it_is_read() -> None:
    refused(b"#" * (document.SIZE_LIMIT + 1), "larger than 8 MiB")


def test_a_file_at_its_bound_is_read() -> None:
    comment = b"#" * (document.SIZE_LIMIT - len(HEAD) - 1)
    assert parse(comment + b"\n" + HEAD, "w.yaml").sound


def test_more_values_than_any_wishlist_has_are_refused() -> None:
    refused(HEAD + b"  - a\n" * 110_000, "more than 100,000 values")


def test_ten_thousand_faults_are_a_thousand_and_a_count() -> None:
    found = messages(parse(HEAD + b"  - a\n" * 10_000, "w.yaml"))
    assert len(found) == document.FINDINGS_LIMIT + 1
    assert found[-1] == "and 9000 more like these"


def test_fifteen_thousand_unknown_keys_are_faults_soon() -> None:
    keys = b"".join(b"platfor%d: x\n" % n for n in range(15_000))
    assert not parse(keys + HEAD, "w.yaml").sound


def test_a_mapping_of_forty_thousand_duplicates_is_read_soon() -> None:
    assert not parse(HEAD + b"  - {" + b"image: x, " * 40_000 + b"}\n", "w.yaml").sound


@pytest.mark.parametrize("length", [1_025, 1 << 20])
def test_a_long_name_is_refused_without_being_repeated_at_length(length: int) -> None:
    long = b"a" * length
    for entry in (
        b"  - ghcr.io/" + long + b":1\n",
        b"  - ghcr.io/a/b:" + long + b"\n",
        b"  - ghcr.io/a/b@sha256:" + long + b"\n",
        b"  - {image: ghcr.io/a/b, tags: [" + long + b"]}\n",
        b"  - {image: ghcr.io/a/b, tags: ['*'], versions: '" + long + b"'}\n",
        b"  - {image: ghcr.io/a/b, tags: ['*'], newest: '" + b"9" * length + b"'}\n",
        b"  - {image: 'ghcr.io/a/b:1', platform: " + long + b"}\n",
        b"  - {image: 'ghcr.io/a/b:1', gpu: " + long + b"}\n",
        b"  - {image: 'ghcr.io/a/b:1', ? " + long + b": x}\n",
        b"  - {image: 'ghcr.io/a/b:1', tags: " + long + b"}\n",
        b"  - !<" + long + b"> ghcr.io/a/b:1\n",
    ):
        try:
            wishlist = parse(HEAD + entry, "w.yaml")
        except WishlistError as error:
            assert len(str(error)) < 1_000
        else:
            assert len(messages(wishlist)) >= 1
            assert wishlist.wishes == ()


def test_more_patterns_than_are_matched_in_time_are_a_fault() -> None:
    tags = ", ".join(f"'*{n}*'" for n in range(201))
    wishlist = parse(HEAD + f"  - {{image: ghcr.io/a/b, tags: [{tags}]}}\n".encode(), "w.yaml")
    assert messages(wishlist) == ["201 patterns, more than 200 (write fewer and wider ones)"]


def test_ten_thousand_different_patterns_are_read_soon() -> None:
    entries = "".join(
        f"  - {{image: 'ghcr.io/a/b{n}:1', exclude: [{', '.join(f'x{n}-{m}*' for m in range(10))}]}}\n"
        for n in range(1_000)
    )
    assert len(parse(HEAD + entries.encode(), "w.yaml").wishes) == 1_000


def test_a_pattern_that_would_make_an_expression_explode_is_matched_soon() -> None:
    (wish,) = parse(HEAD + b"  - 'ghcr.io/a/b:" + b"*a" * 100 + b"*b'\n", "w.yaml").wishes
    assert wish.select(["a" * 128] * 1_000) == ()


def test_numbers_of_any_length_in_tags_are_ordered_soon() -> None:
    (wish,) = parse(HEAD + b"  - {image: ghcr.io/a/b, tags: ['*'], versions: '>=1', newest: 1}\n", "w.yaml").wishes
    listed = ["1" + "0" * n for n in range(128)] + [".".join("1" * n) for n in range(1, 64)] + ["1." * 63 + "1"] * 1_000
    assert wish.select(listed) == ("1" + "0" * 127,)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"version: 2\nimages:\n  - \xff\n", "w.yaml:3:5: not UTF-8"),
        (b"\xef\xbb\xbf# \xc3\xa4\n\xff", "w.yaml:2:1: not UTF-8"),
        ("version: 2\nimages: []\n".encode("utf-16"), "w.yaml:1:1: not UTF-8"),
        (b"version: 2\nimages:\n  - a\x00b\n", r"w.yaml:3:6: control character '\\x00'"),
        (b"version: 2\r\nimages:\r\n  - a\x1bb\r\n", r"w.yaml:3:6: control character '\\x1b'"),
        (b"\xed\xa0\x80", "w.yaml:1:1: not UTF-8"),
        (b"v: \xf4\x90\x80\x80", "w.yaml:1:4: not UTF-8"),
        (b"\x7fELF\x02\x01\x01", "w.yaml:1:1: control character"),
        (b"\x1f\x8b\x08\x00", "w.yaml:1:2: not UTF-8"),
    ],
)
def test_what_is_no_text_is_refused_with_its_place(data: bytes, match: str) -> None:
    refused(data, match)


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system", "!!binary", "!!timestamp", "!include", "!!merge"])
def test_a_tag_makes_nothing_happen(tag: str) -> None:
    wishlist = parse(HEAD + f"  - {tag} [ghcr.io/a/b:1]\n  - {tag} ghcr.io/a/b:1\n".encode(), "w.yaml")
    assert wishlist.wishes == ()
    assert not wishlist.sound


@pytest.mark.parametrize(
    "name",
    [
        *(
            "ghcr.io/../../etc:1",
            "ghcr.io/a/../b:1",
            "../ghcr.io/a:1",
            "/ghcr.io/a:1",
            "ghcr.io//a:1",
            "ghcr.io/.flat/a:1",
        ),
        *(
            "ghcr.io/a:..",
            "ghcr.io/a:.metadata",
            "ghcr.io/a:1/../../x",
            ".unpacker/pool:1",
            ".flat.io/a:1",
            "~/a.b/c:1",
        ),
        *("file:///etc/passwd", "oci:/etc:1", "https://ghcr.io/a/b:1#x", "https://ghcr.io/a/b:1?x=1", "$HOME/a.b/c:1"),
        *("ghcr.io/a/b:$(id)", "ghcr.io/a/b:`id`", "ghcr.io/a\\b:1", "ghcr.io/a%2f..:1", "ghcr.io/ａ:1", "ghcr.іo/a:1"),
    ],
)
@pytest.mark.parametrize("form", ["version: 2\nimages: ['%s']\n", "version: 1\ninput: ['%s']\n", "a/b\n%s\n"])
def test_a_name_that_would_leave_its_place_is_a_fault_in_every_format(name: str, form: str) -> None:
    wishlist = parse((form % name).encode(), "w.yaml" if "version" in form else "w.txt")
    assert len(wishlist.faults) == 1
    assert [wish.text for wish in wishlist.wishes] in ([], ["a/b"])


@given(st.binary(max_size=64))
def test_any_bytes_are_a_wishlist_or_a_wishlist_error(data: bytes) -> None:
    for name in ("w.yaml", "w.txt"):
        try:
            parse(data, name)
        except WishlistError as error:
            assert str(error).startswith(f"{name}:")


VALUES = st.recursive(
    st.sampled_from(["ghcr.io/a/b:1", "ghcr.io/a/b", "1.*", "", "~", "x", "5", "[", "linux/arm64", ">=1"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["image", "tags", "exclude", "versions", "newest", "platform", "gpu", "target"]), inner
        )
    ),
    max_leaves=12,
)


@settings(deadline=None)
@given(st.sampled_from(["images", "input", "defaults"]), VALUES, st.sampled_from(["1", "2"]))
def test_any_shape_of_values_is_read_to_its_end(key: str, value: object, version: str) -> None:
    text = yaml.safe_dump({"version": version, key: value, "images" if version == "2" else "input": [value]})
    wishlist = parse(text.replace("'1'", "1", 1).replace("'2'", "2", 1).encode(), "w.yaml")
    assert all(wish.tags or wish.digest for wish in wishlist.wishes)
    assert wishlist.sound or wishlist.faults

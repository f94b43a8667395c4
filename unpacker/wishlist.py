"""The wishlist: which images are to be published. wishlist.yaml (version 2), DUCC's recipe (version 1), OSG's list.

    version: 2
    defaults: {platform: linux/amd64}
    images:
      - https://registry.hub.docker.com/library/alpine:3.*
      - image: gitlab-registry.cern.ch/atlas/athena/analysisbase
        tags: ["24.2.*", "25.*"]
        exclude: ["*-rc*", "*-dev"]
        versions: ">=24.2,<26"
        newest: 5
        platforms: [linux/amd64, linux/arm64/v8]
        gpu: true

Every fault of a file is found at once and names its place; an entry with a fault is no wish and stops no other. Anyone
who can open a merge request writes this file, so no key of it sets a target, a credential, a path or a limit.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import TypeVar

from unpacker.claims import Claims
from unpacker.document import Fault, Findings, Mapping, Node, Scalar, Sequence, decode, read_yaml, shown, unreadable
from unpacker.imagelist import read_imagelist
from unpacker.oci import LINUX_AMD64, Platform
from unpacker.recipe import read_recipe
from unpacker.reference import TagPattern
from unpacker.tags import check_versions
from unpacker.wish import Wish, read_image

__all__ = ["Fault", "Wish", "Wishlist", "parse"]

PATTERNS_LIMIT = 200
"""Of the entries of one `tags` or `exclude`: matching costs their number times the tags of the repository."""
PLATFORMS_LIMIT = 20
_COMPARED = 10
"""So many exclusions are compared with the tags named in full: a courtesy, not worth quadratic time."""

_TOP_KEYS = ("version", "defaults", "images")
_DEFAULT_KEYS = ("platform", "platforms", "gpu")
_IMAGE_KEYS = ("image", "tags", "exclude", "versions", "newest", "platform", "platforms", "gpu")
_CHOOSING_KEYS = ("tags", "exclude", "versions", "newest")
_OPERATORS_WORD = re.compile(
    r"(?<![a-z])(target|publisher?|cvmfs|repo(sitory)?|root|path|dir(ectory)?|dest(ination)?|state|credential|user(name)?|"
    r"pass(word|wd)?|token|secret|auth|login|api|limit|max|min|size|timeout|retries|jobs|insecure|registry|registries|"
    r"proxy|grace|allow|receipt|rebuild|removal)s?(?![a-z])"
)
_TRUE = frozenset({"true", "yes", "on"})
_FALSE = frozenset({"false", "no", "off"})
_NUMBER = re.compile(r"[0-9]{1,9}")
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishlist:
    """What one file wishes for, and all that is wrong with it.

    A wish stands here only if nothing is wrong with its entry. While `sound` is false it is not known what else the
    file was meant to ask for. `ignore_errors` are DUCC's patterns (`filepath.Match` on the whole image name) of
    failures that are not to change the exit code.
    """

    name: str
    wishes: tuple[Wish, ...]
    faults: tuple[Fault, ...] = ()
    warnings: tuple[Fault, ...] = ()
    ignore_errors: tuple[str, ...] = ()

    @property
    def sound(self) -> bool:
        """Whether the whole file was understood."""
        return not self.faults


def parse(data: bytes, name: str, *, default_platform: Platform = LINUX_AMD64) -> Wishlist:
    """Reads a wishlist of any of the three formats, told apart by content; a `name` in .txt only helps to tell.

    WishlistError, in the form `file:line:column: message`, only for a file of which nothing can be used.
    """
    text = decode(data, name)
    findings = Findings(name)
    claims = Claims()
    ignore_errors: tuple[str, ...] = ()
    if _is_imagelist(text, name):
        read_imagelist(text, default_platform, claims, findings)
    else:
        root = read_yaml(text, findings)
        if isinstance(root, Mapping):
            if _version(root, findings) == 1:
                ignore_errors = read_recipe(root, default_platform, claims, findings)
            else:
                _read_images(root, default_platform, claims, findings)
        elif root is not None and not (isinstance(root, Scalar) and root.is_null):
            what = "a list without keys" if isinstance(root, Sequence) else "a text without keys"
            message = f"not a wishlist but {what} (expected `version: 2` and below it `images:` with a list)"
            raise unreadable(name, root.line, root.column, message)
    wishes = tuple(claims.wishes.values())
    if not wishes and not findings.count:
        findings.warn((1, 1), "no images are wished for")
    return Wishlist(
        name=name,
        wishes=wishes,
        faults=findings.sorted(warnings=False),
        warnings=findings.sorted(warnings=True),
        ignore_errors=ignore_errors,
    )


def _is_imagelist(text: str, name: str) -> bool:
    """Whether the first line that is no comment is an image and nothing else, rather than the beginning of YAML."""
    for line in text.splitlines():
        line = line.strip()
        if line and not line.startswith("#"):
            if line[0] in "-{}[]\"'%&*!|>?,@`" or line.endswith(":") or re.match(r"[^\s:/]+\s*:\s", line):
                return False
            return name.endswith(".txt") or ("/" in line and not re.search(r"\s", line))
    return False


def _version(root: Mapping, findings: Findings) -> int:
    node = root.get("version")
    if isinstance(node, Scalar) and node.text in ("1", "2"):
        return int(node.text)
    if node is not None:
        found = shown(node.text) if isinstance(node, Scalar) else "no number"
        message = f"version is {found} (expected 2 for a wishlist, 1 for a recipe of DUCC)"
        raise unreadable(findings.file, node.line, node.column, message)
    for key, version in (("images", 2), ("input", 1)):
        if root.get(key) is not None:
            findings.warn(root, f"no version, read as version {version} because of {key} (write `version: {version}`)")
            return version
    message = "not a wishlist: it has neither version nor images (expected `version: 2` and `images:` with a list)"
    raise unreadable(findings.file, root.line, root.column, message)


@dataclass(frozen=True, slots=True)
class _Defaults:
    platform: Platform
    platforms: tuple[Platform, ...] = ()
    gpu: bool = False
    is_sound: bool = True
    """If not, no wish may take its platform from here: another than meant would be published."""


def _read_images(root: Mapping, default_platform: Platform, claims: Claims, findings: Findings) -> None:
    meant = _unknown_keys(root, _TOP_KEYS, "a wishlist", findings, elsewhere=_DEFAULT_KEYS)
    for key, _ in root.entries:
        if key.text in _DEFAULT_KEYS:
            findings.fault(
                key, f"{key.text} for all images stands under defaults (write `defaults: {{{key.text}: …}}`)"
            )
            meant.append((key, "defaults"))
    node = root.get("defaults")
    defaults = _read_defaults(node, default_platform, findings)
    misspelt = [key for key, known in meant if known in ("defaults", *_DEFAULT_KEYS)]
    if misspelt or not defaults.is_sound:
        defaults = replace(defaults, is_sound=False)
        message = "until the defaults are right, images without a platform of their own are left alone"
        findings.warn(misspelt[0] if misspelt else node or root, message)
    images = root.get("images")
    if images is None:
        findings.fault(root, "no images (expected `images:` with a list; `images: []` wishes for nothing)")
    elif isinstance(images, Sequence):
        for node in images.items:
            wish = _read_entry(node, defaults, findings)
            if wish is not None:
                claims.admit(wish, findings)
    elif not (isinstance(images, Scalar) and images.is_null):
        findings.fault(images, "images is a list, one image per line, each after a dash")


def _read_defaults(node: Node | None, platform: Platform, findings: Findings) -> _Defaults:
    defaults = _Defaults(platform)
    if node is None or (isinstance(node, Scalar) and node.is_null):
        return defaults
    if not isinstance(node, Mapping):
        findings.fault(node, "defaults are keys with values (expected for example {platform: linux/amd64})")
        return replace(defaults, is_sound=False)
    before = findings.count
    _unknown_keys(node, _DEFAULT_KEYS, "defaults", findings)
    chosen = _read_platforms(node, findings) or (platform, ())
    gpu = _value(node, "gpu", _flag, findings) or False
    return _Defaults(*chosen, gpu, is_sound=findings.count == before and not node.faults)


def _read_entry(node: Node, defaults: _Defaults, findings: Findings) -> Wish | None:
    if isinstance(node, Sequence):
        findings.fault(node, "a list within the list of images (expected an image, or keys with image: among them)")
        return None
    before = findings.count
    chosen, gpu = None, None
    if isinstance(node, Scalar):
        wish = _read_name(node, findings)
        if wish is not None and not wish.tags and wish.digest is None:
            _lacks_tag(node, findings)
    else:
        _unknown_keys(node, _IMAGE_KEYS, "an image", findings)
        wish = _read_mapping(node, findings)
        chosen = _read_platforms(node, findings)
        gpu = _value(node, "gpu", _flag, findings)
    if wish is None or findings.count > before or node.faults or (chosen is None and not defaults.is_sound):
        return None
    platform, platforms = chosen or (defaults.platform, defaults.platforms)
    return replace(
        wish,
        platform=platform,
        platforms=platforms,
        gpu=defaults.gpu if gpu is None else gpu,
        line=node.line,
        column=node.column,
    )


def _read_name(node: Scalar, findings: Findings) -> Wish | None:
    if node.is_null or not node.text:
        findings.fault(node, "an empty entry (expected an image, for example ghcr.io/org/tool:1.0)")
        return None
    return read_image(node.text, node, findings)


def _lacks_tag(node: Scalar, findings: Findings) -> None:
    findings.fault(
        node,
        f"neither tag nor digest in {shown(node.text)} "
        f"(write :latest or :* behind it, or use the keys image: and tags:, if that is meant)",
    )


def _read_mapping(node: Mapping, findings: Findings) -> Wish | None:
    """A wish of the keys that choose; options are for the caller. All of the keys are read, whatever is wrong."""
    tags = _value(node, "tags", _patterns, findings)
    exclude = _value(node, "exclude", _patterns, findings)
    versions = _value(node, "versions", _versions, findings)
    newest = _value(node, "newest", _count, findings)
    image = node.get("image")
    if not isinstance(image, Scalar):
        findings.fault(image or node, "image is missing (expected for example `image: ghcr.io/org/tool`)")
        return None
    wish = _read_name(image, findings)
    if wish is None:
        return None
    if wish.digest is not None:
        for key, _ in node.entries:
            if key.text in _CHOOSING_KEYS:
                findings.fault(key, f"{key.text} has nothing to choose from: the image is pinned to one digest")
    elif wish.tags and node.get("tags") is not None:
        findings.fault(image, f"a tag in image, {shown(str(wish.tags[0]))}, and tags besides (write all under tags)")
    elif not wish.tags and node.get("tags") is None:
        _lacks_tag(image, findings)
    elif not wish.tags and tags == ():
        findings.fault(node.get("tags") or node, 'tags is empty (expected for example tags: ["1.*"])')
    wish = replace(wish, tags=wish.tags or tags or (), exclude=exclude or (), versions=versions, newest=newest)
    for pattern in wish.tags:
        if pattern.is_literal and any(e.matches(pattern.glob) for e in wish.exclude[:_COMPARED]):
            findings.warn(image, f"the tag {pattern.glob} is both asked for and excluded, so it is not published")
    return wish


def _unknown_keys(
    node: Mapping, known: tuple[str, ...], what: str, findings: Findings, *, elsewhere: tuple[str, ...] = ()
) -> list[tuple[Scalar, str | None]]:
    """A fault for each key that is not known; gives each with what it was likely meant to be. Keys that belong
    `elsewhere` are for the caller to judge. Values are not repeated: what belongs to the operator may be a secret."""
    meant: list[tuple[Scalar, str | None]] = []
    for key, _ in node.entries:
        if key.text in known or key.text in elsewhere:
            continue
        close = get_close_matches(key.text, (*known, *elsewhere), n=1, cutoff=0.7) if len(key.text) <= 20 else []
        meant.append((key, close[0] if close else None))
        if close:
            why = f"did you mean {close[0]}?"
        elif _OPERATORS_WORD.search(key.text[:80].lower()):
            why = "it belongs to the operator's settings, not into a wishlist"
        elif key.text == "<<":
            why = "keys are not merged; write them out, or under defaults"
        else:
            why = f"{what} has {', '.join(known)}"
        findings.fault(key, f"unknown key {shown(key.text)} ({why})")
    return meant


def _value(node: Mapping, key: str, read: Callable[[Node, Findings], T | None], findings: Findings) -> T | None:
    """The value of a key as `read` takes it; None if the key is not there or its value is a fault."""
    value = node.get(key)
    if value is None:
        return None
    if isinstance(value, Scalar) and value.is_null:
        findings.fault(value, f"{key} has no value (leave the key out if nothing is meant)")
        return None
    return read(value, findings)


def _patterns(node: Node, findings: Findings) -> tuple[TagPattern, ...] | None:
    if not isinstance(node, Sequence):
        example = f'["{node.text}"]' if isinstance(node, Scalar) and len(node.text) < 40 else '["1.*", "2.*"]'
        findings.fault(node, f"not a list (expected for example {example})")
        return None
    if len(node.items) > PATTERNS_LIMIT:
        findings.fault(node, f"{len(node.items):,} patterns, more than {PATTERNS_LIMIT} (write fewer and wider ones)")
        return None
    before = findings.count
    patterns = []
    for item in node.items:
        if not isinstance(item, Scalar) or item.is_null:
            findings.fault(item, "a tag or pattern is one text (put it between quotes if YAML reads it otherwise)")
            continue
        try:
            patterns.append(TagPattern.parse(item.text))
        except ValueError as error:
            findings.fault(item, str(error))
    return tuple(patterns) if findings.count == before else None


def _versions(node: Node, findings: Findings) -> str | None:
    if not isinstance(node, Scalar):
        findings.fault(node, 'versions is one text (expected for example ">=24.2,<26")')
        return None
    try:
        check_versions(node.text)
    except ValueError as error:
        findings.fault(node, str(error))
        return None
    return node.text


def _count(node: Node, findings: Findings) -> int | None:
    if not isinstance(node, Scalar) or not _NUMBER.fullmatch(node.text) or int(node.text) < 1:
        found = f", not {shown(node.text)}" if isinstance(node, Scalar) else ""
        findings.fault(node, f"newest is how many tags to take: 1 or more{found}")
        return None
    return int(node.text)


def _platform(node: Node, findings: Findings) -> Platform | None:
    if not isinstance(node, Scalar):
        findings.fault(node, "platform is one text (expected os/architecture[/variant], for example linux/arm64)")
        return None
    try:
        return Platform.parse(node.text)
    except ValueError as error:
        findings.fault(node, str(error))
        return None


def _platforms(node: Node, findings: Findings) -> tuple[Platform, ...] | None:
    if not isinstance(node, Sequence) or not node.items:
        findings.fault(node, "platforms is a list of them (expected for example [linux/amd64, linux/arm64])")
        return None
    if len(node.items) > PLATFORMS_LIMIT:
        findings.fault(node, f"{len(node.items):,} platforms, more than {PLATFORMS_LIMIT}")
        return None
    before = findings.count
    found: dict[Platform, Platform] = {}
    for item in node.items:
        platform = _platform(item, findings)
        if platform is None:
            continue
        if platform.os != "linux":
            findings.fault(item, f"{platform} cannot stand among several platforms, which are all of linux")
        elif platform.normal in found:
            findings.fault(item, f"{platform} is the same platform as {found[platform.normal]} before it")
        found[platform.normal] = platform
    return tuple(found.values()) if findings.count == before else None


def _read_platforms(node: Mapping, findings: Findings) -> tuple[Platform, tuple[Platform, ...]] | None:
    """The one platform, or the first one and all of them, that a mapping asks for; None if it does not."""
    platform = _value(node, "platform", _platform, findings)
    platforms = _value(node, "platforms", _platforms, findings)
    both = next((key for key, _ in node.entries if key.text == "platforms" and node.get("platform") is not None), None)
    if both is not None:
        findings.fault(both, "platform and platforms besides (write all under platforms, or one under platform)")
    if platforms:
        return platforms[0], platforms
    return None if platform is None else (platform, ())


def _flag(node: Node, findings: Findings) -> bool | None:
    word = node.text.lower() if isinstance(node, Scalar) else None
    if word not in _TRUE | _FALSE:
        findings.fault(node, "gpu is true or false")
        return None
    return word in _TRUE

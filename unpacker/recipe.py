"""DUCC's recipe (version 1) read as a wishlist, as DUCC reads it.

An image starts with its registry, and is read over https unless it says http. Where this program's globs differ from
DUCC's patterns, which are regular expressions by accident, a warning says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from unpacker.claims import Claims
from unpacker.document import Findings, Mapping, Node, Scalar, Sequence, shown
from unpacker.oci import Platform
from unpacker.wish import read_image

_NOTICES = {
    "user": "ignored: it is for pushing thin images, which are not made",
    "output_format": "ignored: it names thin images, which are not made",
    "cvmfs_repo": "ignored: the target belongs to the operator's settings (--target)",
}
_GLOB = re.compile(r"\[\^?(?:\\.|[^\]\\])+\]|\\.|.", re.DOTALL)
_KNOWN = frozenset({"version", "input", "ignoreErrors", *_NOTICES})


def read_recipe(root: Mapping, platform: Platform, claims: Claims, findings: Findings) -> tuple[str, ...]:
    """Reads all of a recipe; gives its `ignoreErrors` patterns."""
    for key, _ in root.entries:
        if key.text in _NOTICES:
            findings.warn(key, f"{key.text} is {_NOTICES[key.text]}")
        elif key.text not in _KNOWN:
            findings.warn(key, f"unknown key {shown(key.text)} is ignored, as DUCC does")
    inputs = root.get("input")
    if inputs is None:
        findings.fault(root, "a recipe of version 1 without input (expected a list of images under input:)")
    for node in _items(inputs, "input", findings):
        _read_input(node, platform, claims, findings)
    return tuple(node.text for node in _items(root.get("ignoreErrors"), "ignoreErrors", findings))


def is_ignored(name: str, patterns: Iterable[str]) -> bool:
    """Whether failures of an image, by its name without a scheme, are not to change the exit code.

    The patterns are Go's `filepath.Match` on the image as a recipe writes it: `*` and `?` stop at a slash. One that Go
    would call malformed matches nothing.
    """
    return any(_matches(pattern, text) for pattern in patterns for text in (name, f"https://{name}", f"http://{name}"))


def _matches(pattern: str, text: str) -> bool:
    parts = []
    for part in _GLOB.findall(pattern):
        if part in ("*", "?"):
            parts.append("[^/]*" if part == "*" else "[^/]")
        elif part == "[":
            return False
        elif part[0] == "[":
            # A set means the same to both, but for the slash, which an escaped or plain one in it may match.
            parts.append(part)
        else:
            parts.append(re.escape(part[-1]))
    try:
        return re.fullmatch("".join(parts), text) is not None
    except re.error:
        return False


def _items(node: Node | None, key: str, findings: Findings) -> tuple[Scalar, ...]:
    if node is None or (isinstance(node, Scalar) and node.is_null):
        return ()
    if not isinstance(node, Sequence):
        findings.fault(node, f"{key} is a list, one entry per line, each after a dash")
        return ()
    usable = []
    for item in node.items:
        if not isinstance(item, Scalar) or item.is_null or not item.text:
            findings.fault(item, f"an entry of {key} is one text (expected for example 'https://host/repository:tag')")
        elif not item.faults:
            usable.append(item)
    return tuple(usable)


def _read_input(node: Scalar, platform: Platform, claims: Claims, findings: Findings) -> None:
    text = node.text if "://" in node.text else f"https://{node.text}"
    wish = read_image(text, node, findings, platform)
    if wish is None:
        return
    if not wish.tags and wish.digest is None:
        findings.fault(node, f"neither tag nor digest in {shown(node.text)} (write :latest behind it if that is meant)")
        return
    if claims.admit(wish, findings) and wish.tags and not wish.tags[0].is_literal:
        differing = [c for c in ".?[" if c in wish.tags[0].glob]
        if differing:
            found = " ".join(differing)
            message = f"DUCC reads {found} in {shown(wish.tags[0].glob)} as a regular expression does, and so may match"
            findings.warn(node, f"{message} other tags; here . is a full stop, ? one character, [..] one of a set")

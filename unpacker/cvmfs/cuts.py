"""Where a large tree is cut into nested catalogs, and which directories on the way to images are catalogs. Pure."""

from __future__ import annotations

from collections.abc import Iterable

SMALLEST = 1_000
LARGEST = 100_000
"""Rows of a catalog below and above which clients waste requests, or time and memory."""

FULL = 5_000
"""Rows of a catalog on the way to images from which on every directory made in it becomes a catalog of its own: what is
in them does not make it grow any more, though their names do, for which there is no help."""

_BARELY = 10
"""Where no piece of the smallest size is left to cut, pieces this many times smaller are better than no cut."""


def cuts(
    directories: Iterable[tuple[str, int]], *, smallest: int = SMALLEST, largest: int = LARGEST
) -> tuple[str, ...]:
    """The directories that become nested catalogs of their own, deepest first.

    `directories` are those that may be cut, by path, a directory before those in it, with the number of names directly
    in each; the first is the root, which is never among the cuts. From the bottom up, each directory that would hold
    more than `largest` rows gives away its heaviest parts until it does not; a part weighs at least `smallest`, unless
    only lighter ones are left. What has no parts that heavy (one directory of many files) stays too large.
    The same input gives the same cuts.
    """
    order = list(directories)
    weights = dict(order)
    if sum(weights.values()) < largest:
        return ()
    above = {path: path.rpartition("/")[0] for path, _ in order[1:]}
    inside: dict[str, list[str]] = {}
    found: list[str] = []
    for path, _ in reversed(order):
        parts = inside.pop(path, [])
        weight = weights[path] + sum(weights[part] for part in parts)
        if weight >= largest:
            for part in sorted(parts, key=lambda part: (-weights[part], part)):
                if weight < largest or weights[part] < max(smallest // _BARELY, 1):
                    break
                weight -= weights[part]
                found.append(part)
        weights[path] = weight
        if path in above:
            inside.setdefault(above[path], []).append(path)
    # A part of a directory is found after all parts of that part, so the order is the one in which to write them.
    return tuple(found)


def fans_out(path: str) -> bool:
    """Whether a directory on the way to images is a catalog of its own; `path` is relative to where images go.

    That keeps what is rewritten by every publish, and what clients search, small: `.flat` and `.layers` with their 256
    parts, and every registry and namespace, both of public names and of their records.
    """
    names = path.split("/")
    if names[0] in (".flat", ".layers"):
        return len(names) <= 2
    if names[0] == ".metadata":
        names = names[1:]
        # The index, which changes with every revision, as all above it does.
        if names == ["published"]:
            return False
    if names[:1] == [".multiarch"]:
        names = names[2:]
    elif names[:1] and names[0].startswith("."):
        return False
    # `registry:5000` is a registry; any later name with a colon is `repository:tag`, a link or a directory of records.
    return path != "" and not any(":" in name for name in names[1:])

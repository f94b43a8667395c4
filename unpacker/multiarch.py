"""Where images of several platforms lie: a name for each platform, one name before them all, and aliases.

    .multiarch/<architecture[:variant]>/<public path>   one platform of a tag
    .multiarch/<alias>                                  → the directory of a platform, as `uname -m` and others call it
    <public path>                                       → one of them: the front

Names and aliases are those of DUCC 2.14, so that paths known from there work; aliases for further answers of
`uname -m` are added, because that is what a CernVM-FS client puts in for `CVMFS_ARCH`.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping

from unpacker.oci import Platform

MULTIARCH = ".multiarch"
VARIANT = "$(CVMFS_ARCH:-amd64)"
"""What a client replaces when it reads a symlink, by a variable of its own; amd64 if that is not set."""

_ALIASES = {
    "x86_64": "amd64",
    "x86-64": "amd64",
    "arm64": "arm64:v8",
    "aarch64": "arm64:v8",
    "arm": "arm:v7",
    "armhf": "arm:v7",
    "armv7l": "arm:v7",
    "armel": "arm:v6",
    "armv6l": "arm:v6",
    "i386": "386",
    "i686": "386",
    "loongarch64": "loong64",
}


class Place(enum.StrEnum):
    """What kind of name one is: the only one of an image, that of one platform of several, or the one before these."""

    PLAIN = "plain"
    PLATFORM = "platform"
    FRONT = "front"


def directory(platform: Platform) -> str:
    """The directory of a platform below `.multiarch`: the same for every spelling of the platform."""
    normal = platform.normal
    variant = "" if (normal.architecture, normal.variant) == ("amd64", "v1") else normal.variant
    return f"{normal.architecture}:{variant}" if variant else normal.architecture


def public_path(public_path: str, place: Place, platform: Platform) -> str:
    """The path of a name of this kind, below the published root."""
    return f"{MULTIARCH}/{directory(platform)}/{public_path}" if place is Place.PLATFORM else public_path


def without_alias(path: str) -> str:
    """The path of a name of one platform by the directory that it is in, where an alias stands in place of that."""
    top, _, rest = path.partition("/")
    alias, slash, below = rest.partition("/")
    return f"{top}/{_ALIASES[alias]}/{below}" if top == MULTIARCH and slash and alias in _ALIASES else path


def is_platform_of(name: str, front: str) -> bool:
    """Whether a name is that of one platform of what this front stands before."""
    top, _, rest = name.partition("/")
    return top == MULTIARCH and rest.partition("/")[2] == front


def leads_to(recorded: str, found: str, front: str) -> bool:
    """Whether a link leads to where its record says; if that has a variable in it, a client may have filled it in."""
    return found == recorded or (VARIANT in recorded and is_platform_of(found, front))


def front_target(public_path: str, platform: Platform, *, variants: bool) -> str:
    """Where a front leads to: where clients fill in variables, to what each of them asks for, else to one platform."""
    return f"{MULTIARCH}/{VARIANT if variants else directory(platform)}/{public_path}"


def aliases(directories: Collection[str]) -> Mapping[str, str]:
    """Other names of these directories of platforms, each with the one that it leads to."""
    return {alias: of for alias, of in _ALIASES.items() if of in directories}

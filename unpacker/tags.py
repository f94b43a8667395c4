"""Which tags of a repository a wish selects: patterns, exclusions, versions, the newest N. Pure rules on text.

A tag is a version if PEP 440 reads it as one, a leading `v` allowed: `3.10`, `v1.2.3`, `24.2.40`, `25.0rc1`,
`1.7.1-dev`, `1.6.9-1` are versions, `latest`, `3.10-alpine`, `22.07-py3` are not. Order, newest first: versions by
PEP 440; those of equal version (`1.0`, `v1.0`, `1.0.0`) by their text, the greater first; then all tags that are no
versions, by their text, the greater first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import InvalidVersion, Version

from unpacker.reference import TagPattern, is_tag

VERSIONS_LENGTH_LIMIT = 256
_BELOW_ALL = Version("0.dev0")
_ATTACHED = re.compile(r"sha(256-[0-9a-f]{64}|512-[0-9a-f]{64,128})(\.[A-Za-z0-9._-]+)?")
"""Tags that name what is attached to an image, not images: lists of referrers (OCI distribution specification 1.1,
"Referrers Tag Schema"), and cosign's signatures, attestations and bills of materials (`….sig`, `….att`, `….sbom`)."""


def version_of(tag: str) -> Version | None:
    """The version that a tag names, or None."""
    if not any(character.isdigit() for character in tag):
        return None
    try:
        return Version(tag)
    except InvalidVersion:
        return None


def newest_first(tags: Iterable[str]) -> tuple[str, ...]:
    """Tags in the order of this module's first paragraph, each once."""
    return tuple(sorted(set(tags), key=_age, reverse=True))


def _age(tag: str) -> tuple[bool, Version, str]:
    version = version_of(tag)
    return (version is not None, version or _BELOW_ALL, tag)


def check_versions(text: str) -> None:
    """ValueError says what is wrong with a version range."""
    if len(text) > VERSIONS_LENGTH_LIMIT:
        raise ValueError(f"a version range longer than {VERSIONS_LENGTH_LIMIT} characters")
    if not text.strip():
        raise ValueError('an empty version range (expected for example ">=24.2,<26")')
    try:
        SpecifierSet(text)
    except InvalidSpecifier:
        raise ValueError(f'not a version range: {text!r} (expected for example ">=24.2,<26" or "~=3.1")') from None


@lru_cache(maxsize=256)
def _specifiers(text: str) -> tuple[SpecifierSet, bool]:
    specifiers = SpecifierSet(text)
    named = (version_of(s.version) for s in specifiers)
    return specifiers, any(v is not None and v.is_prerelease for v in named)


def in_versions(tag: str, versions: str) -> bool:
    """Whether a tag is a version in this range; a pre-release only if the range itself names a pre-release."""
    version = version_of(tag)
    if version is None:
        return False
    specifiers, with_prereleases = _specifiers(versions)
    if version.is_prerelease and not with_prereleases:
        return False
    return specifiers.contains(version, prereleases=True)


def _matched(tag: str, globs: Iterable[TagPattern]) -> bool:
    return not _ATTACHED.fullmatch(tag) and any(glob.matches(tag) for glob in globs)


def select(
    listed: Iterable[str],
    *,
    tags: tuple[TagPattern, ...],
    exclude: tuple[TagPattern, ...] = (),
    versions: str | None = None,
    newest: int | None = None,
) -> tuple[str, ...]:
    """The tags selected of those listed, newest first.

    A tag named in full is selected whether it is listed or not, so that one that has vanished is missed and not
    forgotten; unless `versions` or `newest` choose, which choose among tags that exist. What `exclude` matches is
    never selected. A listed tag outside the tag grammar is never selected, nor by a glob one that names no image but
    what is attached to one, such as a receipt or a signature.
    """
    literals = {pattern.glob for pattern in tags if pattern.is_literal}
    globs = [pattern for pattern in tags if not pattern.is_literal]
    among_listed = versions is not None or newest is not None
    chosen = set() if among_listed else set(literals)
    chosen.update(t for t in listed if is_tag(t) and (t in literals or _matched(t, globs)))
    chosen = {t for t in chosen if not any(pattern.matches(t) for pattern in exclude)}
    if versions is not None:
        chosen = {t for t in chosen if in_versions(t, versions)}
    return newest_first(chosen)[:newest]

"""Wish: one entry of a wishlist, whatever the format of the list it stands in."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from unpacker import tags as tag_rules
from unpacker.digest import Digest
from unpacker.document import Findings, Scalar, shown
from unpacker.multiarch import Place, public_path
from unpacker.oci import LINUX_AMD64, Platform
from unpacker.reference import Reference, Repository, TagPattern, split


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """A repository, the rule that selects its tags (or a digest), options, and where in the file it stands.

    `tags` is empty only for a wish by digest alone; with `repository:tag@digest` it is that one tag. `platforms` is
    empty where one image is wished; else all that are, side by side, and `platform` is the first of them. `text` is
    the image as written, for reports.
    """

    repository: Repository
    tags: tuple[TagPattern, ...]
    digest: Digest | None = None
    exclude: tuple[TagPattern, ...] = ()
    versions: str | None = None
    newest: int | None = None
    platform: Platform = LINUX_AMD64
    platforms: tuple[Platform, ...] = ()
    gpu: bool = False
    line: int = 0
    column: int = 0
    text: str = ""

    @property
    def needs_listing(self) -> bool:
        """Whether the repository's tags must be listed to know what is wished."""
        if self.digest is not None:
            return False
        return self.versions is not None or self.newest is not None or not all(t.is_literal for t in self.tags)

    def select(self, listed: Iterable[str]) -> tuple[str, ...]:
        """The tags wished, of those that the registry lists, newest first (see `unpacker.tags`).

        Where `needs_listing` is false the answer does not depend on `listed`; for a wish by digest it is its tag, or
        nothing.
        """
        if self.digest is not None:
            return tuple(t.glob for t in self.tags)
        return tag_rules.select(
            listed, tags=self.tags, exclude=self.exclude, versions=self.versions, newest=self.newest
        )

    @property
    def literal_references(self) -> tuple[Reference, ...]:
        """The references that are named in full: what they claim is known without asking a registry."""
        if not self.tags:
            return (Reference(repository=self.repository, digest=self.digest),)
        literals = (p.glob for p in self.tags if p.is_literal and not self._excludes(p.glob))
        return tuple(Reference(repository=self.repository, tag=tag, digest=self.digest) for tag in literals)

    def _excludes(self, tag: str) -> bool:
        return any(pattern.matches(tag) for pattern in self.exclude)

    @property
    def places(self) -> tuple[tuple[Place, Platform], ...]:
        """What each reference becomes: one name, or one for each platform and then the one before them all."""
        if not self.platforms:
            return ((Place.PLAIN, self.platform),)
        return (*((Place.PLATFORM, platform) for platform in self.platforms), (Place.FRONT, self.platform))

    def public_paths(self, reference: Reference) -> tuple[str, ...]:
        """All names that one reference of this wish becomes."""
        return tuple(public_path(reference.public_path, place, platform) for place, platform in self.places)

    def may_ask_for(self, reference: Reference) -> bool:
        """Whether this wish chooses a reference, as far as that is known without its repository's tags: what is pushed
        out of the `newest` by others is asked for all the same."""
        if str(reference.repository) != str(self.repository):
            return False
        if reference.tag is None:
            return reference.digest == self.digest
        if self.digest is not None:
            return any(p.glob == reference.tag for p in self.tags)
        return any(p.matches(reference.tag) for p in self.tags) and not self._excludes(reference.tag)

    @property
    def meaning(self) -> Wish:
        """This wish without what does not change what is wished: place, spelling, order and repetition of patterns."""
        return replace(
            self,
            tags=tuple(sorted(set(self.tags), key=str)),
            exclude=tuple(sorted(set(self.exclude), key=str)),
            platform=self.platform.normal,
            # Which one is the first matters, the order of the others does not.
            platforms=tuple(
                p.normal for p in sorted(self.platforms, key=lambda p: (p != self.platform, str(p.normal)))
            ),
            line=0,
            column=0,
            text="",
        )


def read_image(text: str, at: Scalar, findings: Findings, platform: Platform = LINUX_AMD64) -> Wish | None:
    """Takes `[scheme://]registry/repository[:tag or pattern][@digest]` for a wish, or says what is wrong with it.

    `text` is what the rules of the list's format make of what stands at `at`. Whether a wish without tag and digest is
    complete is for the caller to say.
    """
    try:
        name = split(text)
        tags = () if name.tag is None else (TagPattern.parse(name.tag),)
    except ValueError as error:
        findings.fault(at, str(error))
        return None
    if name.digest is not None and tags and not tags[0].is_literal:
        findings.fault(
            at, f"a pattern cannot be pinned to one digest: {shown(text)} (write the tag, or the digest alone)"
        )
        return None
    return Wish(
        repository=name.repository,
        tags=tags,
        digest=name.digest,
        platform=platform,
        line=at.line,
        column=at.column,
        text=at.text,
    )

"""What a user calls an image → the published names that may be meant, and those that are near. Pure.

Users know an image as `docker://alpine:3.10`, as a URL of its registry, as a path that somebody published, by its tag
or its digest. Published names are spelled as a wishlist spelled them.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from unpacker.digest import Digest
from unpacker.multiarch import MULTIARCH, without_alias
from unpacker.record import Published
from unpacker.reference import DOCKER_HUB_API, DOCKER_HUB_SPELLINGS, TEXT_LIMIT, Reference, Repository, is_tag

DEFAULT_TAG = "latest"
NEAR_LIMIT = 8
# The spelling that most wishlists have, and users' scripts with them, is tried before the others.
_HUB = (
    "registry.hub.docker.com",
    "docker.io",
    *sorted(DOCKER_HUB_SPELLINGS - {"registry.hub.docker.com", "docker.io"}),
)
_SCHEME = re.compile(r"(?:docker|https?)://")
_SHORT_ID = re.compile(r"[0-9a-f]{12,64}")
_DIGEST = re.compile(r"sha(256|512):")


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a text may mean: `paths` below the target, the likeliest first, and the `repositories` of these; `digest`,
    as much as was given of one; `root`, the path of one. `tag` and `name`, without a registry, are for what is near."""

    text: str
    paths: tuple[str, ...] = ()
    repositories: tuple[str, ...] = ()
    digest: str = ""
    root: str = ""
    name: str = ""
    tag: str = ""

    def is_of(self, record: Published) -> bool:
        """Whether a record is of the image whose digest, of any kind, or root was given."""
        if self.root:
            return record.root == self.root
        known = (record.digest, record.manifest_digest, record.image_id)
        same = any(d == self.digest or d.partition(":")[2].startswith(self.digest) for d in known if d)
        return same and (not self.repositories or str(record.reference.repository) in self.repositories)


def read(text: str, mounts: Sequence[str]) -> Asked:
    """Takes what a user wrote apart; `mounts` are the paths at which the target may be seen. ValueError says what is
    wrong with a text that can name no image."""
    if not text or len(text) > TEXT_LIMIT or not text.isprintable():
        raise ValueError("an image name is one line of at most 1,024 characters")
    if text.startswith("/"):
        return _path(text, mounts)
    rest = text[match.end() :] if (match := _SCHEME.match(text)) else text
    if rest == text and _SHORT_ID.fullmatch(text.removeprefix("sha256:")):
        return Asked(text=text, digest=text.removeprefix("sha256:"))
    if rest == text and re.fullmatch(r"sha512:[0-9a-f]{128}", text):
        return Asked(text=text, digest=text)
    if rest.partition("/")[0] == MULTIARCH:
        return Asked(text=text, paths=_spellings(rest))
    try:
        return _name(text, rest)
    except ValueError:
        if not is_tag(text):
            raise
        return Asked(text=text, tag=text)


def _path(text: str, mounts: Sequence[str]) -> Asked:
    path = posixpath.normpath(text)
    for mount in sorted(mounts, key=len, reverse=True):
        below = path.removeprefix(mount.rstrip("/") + "/")
        if below != path:
            break
    else:
        # Another repository's path, copied from somebody's script: the name in it is what counts.
        _, _, below = path.removeprefix("/cvmfs/").partition("/")
        if not path.startswith("/cvmfs/") or not below:
            raise ValueError(f"{text!r} is not below the target, which is {mounts[0]}")
    if below.startswith(".flat/"):
        return Asked(text=text, root="/".join(below.split("/")[:3]))
    found = _tagged(below)
    if found is None:
        raise ValueError(f"{text!r} names no image (expected …/registry/repository:tag)")
    return Asked(text=text, paths=_spellings(below), name=found[0], tag=found[1])


def _spellings(path: str) -> tuple[str, ...]:
    """A path, and before it the one by which it is recorded, if an alias of a platform is in it."""
    return tuple(dict.fromkeys((without_alias(path), path)))


def only_by_tag(asked: Asked, names: Iterable[str]) -> tuple[str, ...]:
    """The names that have what was asked for as their tag, if it may be a tag and nothing else."""
    if not is_tag(asked.text):
        return ()
    return tuple(p for p in sorted(names) if not p.startswith(f"{MULTIARCH}/") and p.rpartition(":")[2] == asked.text)


def _tagged(path: str) -> tuple[str, str] | None:
    if path.startswith(f"{MULTIARCH}/"):
        _, _, path = path.removeprefix(f"{MULTIARCH}/").partition("/")
    head, _, last = path.rpartition("/")
    name, colon, tag = last.partition(":")
    return (f"{head.partition('/')[2]}/{name}".lstrip("/"), tag) if colon else None


def _name(text: str, rest: str) -> Asked:
    rest, at, digest_text = rest.partition("@")
    head, slash, last = rest.rpartition("/")
    last, _, tag = last.partition(":")
    if _DIGEST.match(tag):
        digest_text, tag = tag, ""  # as published names have it
    elif tag and not is_tag(tag):
        raise ValueError(f"not a tag: {tag!r}")
    digest = Digest.parse(digest_text) if at or digest_text else None
    repositories = _repositories(f"{head}{slash}{last}")
    tag = tag or ("" if digest else DEFAULT_TAG)
    references = (Reference(repository=r, tag=tag or None, digest=None if tag else digest) for r in repositories)
    return Asked(
        text=text,
        paths=tuple(reference.public_path for reference in references),
        repositories=tuple(map(str, repositories)),
        digest=str(digest or ""),
        name=repositories[0].name,
        tag=tag,
    )


def _repositories(name: str) -> list[Repository]:
    """The repositories that a name without tag may be, the likeliest first: one, or all spellings of one of Docker
    Hub, which is also meant where no registry is named."""
    first, slash, below = name.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost"):
        found = Repository.parse(name)
        if found.api_host != DOCKER_HUB_API:
            return [found]
        registries = tuple(dict.fromkeys((first, *_HUB)))
    else:
        registries, below = _HUB, name
    bare = below.removeprefix("library/")
    names = (below,) if "/" in bare else (f"library/{bare}", bare)
    return [Repository.parse(f"{registry}/{each}") for registry in registries for each in names]


def near(asked: Asked, names: Iterable[str]) -> tuple[str, ...]:
    """Published names that may be meant instead, the likeliest first: the same image elsewhere or under other tags,
    images that have the text as their tag, names spelled alike."""
    known: dict[str, tuple[str, str]] = {}
    for path in names:
        found = _tagged(path) if not path.startswith(f"{MULTIARCH}/") else None
        if found is not None:
            known[path] = found
    wanted = asked.name.removeprefix("library/")
    same_name = [p for p, (name, _) in sorted(known.items()) if wanted and name.removeprefix("library/") == wanted]
    same_end = [p for p, (name, _) in sorted(known.items()) if wanted and name.endswith(f"/{wanted}")]
    by_tag = sorted((*same_name, *same_end), key=lambda p: (known[p][1] != asked.tag, _unlike(known[p][1], asked.tag)))
    spelled: dict[str, str] = {}
    for path, (name, tag) in sorted(known.items()):
        spelled.setdefault(f"{name.removeprefix('library/')}:{tag}", path)
    alike = get_close_matches(f"{wanted}:{asked.tag}", spelled, n=NEAR_LIMIT, cutoff=0.75) if wanted else []
    return tuple(dict.fromkeys((*only_by_tag(asked, known), *by_tag, *(spelled[a] for a in alike))))[:NEAR_LIMIT]


def _unlike(tag: str, wanted: str) -> int:
    """How far a tag is from the one wanted: by what they begin with alike."""
    return -len(posixpath.commonprefix((tag, wanted)))

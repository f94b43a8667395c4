"""Names of images: Repository, Reference, TagPattern; their grammar, parsing, printing and matching.

Grammar: OCI distribution specification, "Pulling manifests" (name and reference), and the `reference` package of the
distribution project for the registry's host. A registry is kept as written, because it is part of the public path.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache

from unpacker.digest import Digest

DOCKER_HUB_SPELLINGS = frozenset(
    {"docker.io", "index.docker.io", "registry-1.docker.io", "registry.hub.docker.com", "hub.docker.com"}
)
DOCKER_HUB_API = "registry-1.docker.io"

_HOST_LABEL = r"(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])"
_HOST = re.compile(rf"(?P<host>{_HOST_LABEL}(?:\.{_HOST_LABEL})*|\[[0-9a-fA-F:]+\])(?::(?P<port>[0-9]{{1,5}}))?")
_NAME_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_NAME = re.compile(rf"{_NAME_COMPONENT}(?:/{_NAME_COMPONENT})*")
_PAGE = re.compile(r"r/(?P<named>[^/]+/[^/]+)|_/(?P<official>[^/]+)")
"""Of an image, on Docker Hub's web site."""
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_GLOB_CHARACTERS = frozenset("*?[")
_GLOB = re.compile(r"(?:[A-Za-z0-9_.*?-]|\[!?[A-Za-z0-9_.-]+\])+")
_SET = re.compile(r"\[!?(.*?)\]")
_RANGE = re.compile(r"(.)-(.)")
_CREDENTIALS = re.compile(r"(?:[^/]*://)?[^/]*@[^/]*/")
_QUERY = re.compile(r"\?[^/\[\]]*[=&]")
HOST_LIMIT = 253
HOST_LABEL_LIMIT = 63
"""RFC 1035, section 2.3.4; more cannot even be looked up."""
NAME_LIMIT = 255
LAST_PART_LIMIT = 119
"""With `:` and the longest tag or digest behind it, the last part is one file name of at most 255 bytes."""
PATTERN_LIMIT = 256
TEXT_LIMIT = 1024
"""Of a whole image name as written: scheme, repository, the longest pattern, the longest digest, and some."""


def is_tag(text: str) -> bool:
    """Whether a registry may call a tag that: at most 128 of `A-Za-z0-9_.-`, not starting with `.` or `-`."""
    return _TAG.fullmatch(text) is not None


class _NoHost(ValueError):
    """An image name that starts with no registry."""

    def __init__(self, text: str) -> None:
        name = text.rpartition("://")[2]
        hint = f"registry.hub.docker.com/{name if '/' in name else 'library/' + name}"
        super().__init__(f"no registry host in {text!r} (for Docker Hub write {hint})")


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Repository:
    """Where images of one name live. `registry` is `host[:port]` as written; `scheme` is https or http."""

    registry: str
    name: str
    scheme: str = "https"

    @classmethod
    def parse(cls, text: str) -> Repository:
        """Reads `[https://|http://]host[:port]/name`; ValueError says what is wrong and what would be right.

        Without a scheme it is https, except on loopback, where a registry for tests speaks plain http.
        """
        scheme, separator, rest = text.partition("://")
        if not separator:
            scheme, rest = "", text
        elif scheme not in ("https", "http"):
            raise ValueError(f"{scheme}:// is not a registry's scheme (expected https://registry/repository)")
        registry, slash, name = rest.partition("/")
        if not slash or not _is_registry(registry):
            raise _NoHost(text)
        if registry.lower() in DOCKER_HUB_SPELLINGS and (page := _PAGE.fullmatch(name)):
            named = page["named"] or f"library/{page['official']}"
            raise ValueError(f"{text!r} is the address of a page (the image is registry.hub.docker.com/{named})")
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"not a repository name: {name!r} (lower-case letters, digits, separators . _ - between them, "
                f"parts joined by /)"
            )
        if len(name.rpartition("/")[2]) > LAST_PART_LIMIT:
            raise ValueError(f"last part of the name longer than {LAST_PART_LIMIT} characters: {text!r}")
        if len(registry) + 1 + len(name) > NAME_LIMIT:
            raise ValueError(f"repository name longer than {NAME_LIMIT} characters: {text!r}")
        return cls(registry=registry, name=name, scheme=scheme or ("http" if is_loopback(registry) else "https"))

    @property
    def api_host(self) -> str:
        """The `host[:port]` that is called; all spellings of Docker Hub are one host with one rate budget."""
        registry = self.registry.lower()
        return DOCKER_HUB_API if registry in DOCKER_HUB_SPELLINGS else registry

    @property
    def api_name(self) -> str:
        """The repository as the registry knows it; Docker Hub's own images live under `library/`."""
        if self.api_host == DOCKER_HUB_API and "/" not in self.name:
            return f"library/{self.name}"
        return self.name

    def __str__(self) -> str:
        return f"{self.registry}/{self.name}"


@lru_cache(maxsize=1024)
def _is_registry(text: str) -> bool:
    """Whether this is `host[:port]`, and not the first part of a name; ValueError if the host or the port cannot be.

    Remembered: a target has thousands of names of very few registries.
    """
    match = _HOST.fullmatch(text)
    if not match or not ("." in text or ":" in text or text == "localhost"):
        return False
    if not _may_be_host(match["host"]):
        raise ValueError(f"no such host: {text!r} (neither a name nor an address)")
    if match["port"] and not 0 < int(match["port"]) < 65536:
        raise ValueError(f"no such port: {text!r}")
    return True


def _may_be_host(host: str) -> bool:
    """Whether what looks like an address is one, and what is a name could be in the domain name system."""
    if host.startswith("[") or re.fullmatch(r"[0-9.]+", host):
        try:
            ipaddress.ip_address(host.strip("[]"))
        except ValueError:
            return False
        return True
    return len(host) <= HOST_LIMIT and all(len(label) <= HOST_LABEL_LIMIT for label in host.split("."))


@lru_cache(maxsize=1024)
def is_loopback(registry: str) -> bool:
    """Whether `host[:port]` is spelled as this machine's loopback."""
    host = registry.lower()
    if host.startswith("["):
        return host.startswith("[::1]")
    host = host.partition(":")[0]
    return host == "localhost" or re.fullmatch(r"127(\.[0-9]{1,3}){3}", host) is not None


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Reference:
    """One image of a repository: by tag, by digest, or by tag nailed to a digest."""

    repository: Repository
    tag: str | None = None
    digest: Digest | None = None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Reads `[scheme://]registry/repository[:tag][@digest]`; ValueError says what is wrong."""
        head, _, tag = text.rpartition(":")
        repository = _bare(head)
        if repository is not None and is_tag(tag):
            return cls(repository=repository, tag=tag)
        name = split(text)
        if name.tag is None and name.digest is None:
            raise ValueError(f"neither tag nor digest in {text!r} (write {text}:latest if that is meant)")
        if name.tag is not None and not is_tag(name.tag):
            raise ValueError(f"not a tag: {name.tag!r}")
        return cls(repository=name.repository, tag=name.tag, digest=name.digest)

    @property
    def public_path(self) -> str:
        """The path below the published root: `registry/repository:tag`, or `…:sha256:<hex>` without a tag."""
        return f"{self.repository}:{self.tag if self.tag is not None else self.digest}"

    @property
    def spec(self) -> str:
        """What the distribution API calls a reference: the digest if there is one, else the tag."""
        return str(self.digest) if self.digest is not None else str(self.tag)

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag is not None else ""
        digest = f"@{self.digest}" if self.digest is not None else ""
        return f"{self.repository}{tag}{digest}"


@dataclass(frozen=True, slots=True)
class ImageName:
    """An image name taken apart, its tag not yet checked: it may be a pattern."""

    repository: Repository
    tag: str | None
    digest: Digest | None


@lru_cache(maxsize=4096)
def _bare(text: str) -> Repository | None:
    """The repository, if that is all that the text is. Remembered: a target has many tags of each repository."""
    try:
        name = split(text)
    except ValueError:
        return None
    return name.repository if name.tag is None and name.digest is None else None


def split(text: str) -> ImageName:
    """Takes `[scheme://]registry/repository[:tag or pattern][@digest]` apart; ValueError says what is wrong."""
    if len(text) > TEXT_LIMIT:
        raise ValueError(f"an image name longer than {TEXT_LIMIT:,} characters")
    if not text or " " in text or not text.isprintable():
        raise ValueError(f"not an image name: {text!r} (empty, or with blanks or control characters)")
    # Neither is repeated in the message: what stands there is likely a secret.
    if _CREDENTIALS.match(text):
        raise ValueError("an image name holds no user or password (credentials belong to the operator's settings)")
    if _QUERY.search(text):
        raise ValueError("an image name has no query string (expected registry/repository:tag)")
    rest, at, digest_text = text.partition("@")
    digest = Digest.parse(digest_text) if at else None
    scheme, separator, path = rest.rpartition("://")
    head, slash, last = path.rpartition("/")
    last, colon, tag = last.partition(":")
    if colon and not slash:
        # `host:5000` or `alpine:3`: the registry is what is missing, and Repository.parse says so.
        last, colon, tag = path, "", ""
    try:
        repository = Repository.parse(f"{scheme}{separator}{head}{slash}{last}")
    except _NoHost:
        raise _NoHost(text) from None  # with its tag, so that what the message says to write is whole
    if colon and not tag:
        raise ValueError(f"empty tag in {text!r}")
    return ImageName(repository, tag if colon else None, digest)


@dataclass(frozen=True, slots=True)
class TagPattern:
    """A glob over tags: `*`, `?`, `[..]`, `[!..]`; case-sensitive, the whole tag, never a regular expression."""

    glob: str

    @classmethod
    def parse(cls, text: str) -> TagPattern:
        """ValueError says what is wrong with a pattern, one that could never match a tag included."""
        if len(text) > PATTERN_LIMIT:
            raise ValueError(f"a tag or tag pattern longer than {PATTERN_LIMIT} characters")
        if not _GLOB.fullmatch(text):
            raise ValueError(
                f"not a tag or tag pattern: {text!r} (tags have A-Za-z0-9_.- ; globs add * ? [abc] [a-z] [!abc])"
            )
        if text[0] in ".-":
            raise ValueError(f"no tag starts with {text[0]!r}: {text!r} (write '*{text}' if that is meant)")
        for characters in _SET.findall(text):
            for first, last in _RANGE.findall(characters):
                if first > last:
                    raise ValueError(f"an empty range {first}-{last} in tag pattern {text!r} (write {last}-{first})")
        if _GLOB_CHARACTERS.isdisjoint(text) and not is_tag(text):
            raise ValueError(f"not a tag: {text!r} (a tag has at most 128 characters)")
        return cls(text)

    @property
    def is_literal(self) -> bool:
        """Whether the pattern is just one tag, which needs no tag list."""
        return _GLOB_CHARACTERS.isdisjoint(self.glob)

    def matches(self, tag: str) -> bool:
        return fnmatchcase(tag, self.glob)

    def __str__(self) -> str:
        return self.glob

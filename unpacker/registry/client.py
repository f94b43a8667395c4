"""The distribution API: tags, manifests and blobs of every registry that the wishes name, through one Client.

Specification: OCI distribution specification 1.1, "Pulling manifests", "Pulling blobs", "Listing tags".
"""

from __future__ import annotations

import functools
import json
import os
import re
import threading
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from typing import TypeVar

import httpx

from unpacker import oci
from unpacker.digest import Digest, Stream, VerifiedReader
from unpacker.errors import Denied, ImageError, IntegrityError, NotFound, RegistryError
from unpacker.limits import Limits
from unpacker.oci import Descriptor
from unpacker.reference import Reference, Repository
from unpacker.registry.auth import Doorkeeper, Endpoint
from unpacker.registry.blob import ResumingStream
from unpacker.registry.credentials import Keychain
from unpacker.registry.retry import Gate, Later, Policy
from unpacker.registry.transport import Answer, Origin, Transport

_ACCEPT = ", ".join(oci.MANIFEST_TYPES)
_PAGE = 1000
"""Tags asked for at a time: the most that common registries give."""
_ROUND = 50
"""Registries that give fewer than asked for cap at a multiple of this."""
_PAGES = 5_000
_TAGS = 200_000
_PAGE_BYTES = 16 << 20
_LINK_LENGTH = 8 << 10
# RFC 8288. Possessive quantifiers: a long run of blanks is tried in one way only.
_LINK = re.compile(r'<([^<>]*)>((?:\s*+;\s*+[A-Za-z*]++\s*+(?:=\s*+(?:"[^"]*+"|[^\s;,"]*+))?)*)')
_REL_NEXT = re.compile(r';\s*rel\s*=\s*(?:"(?:[^"]*\s)?next(?:\s[^"]*)?"|next(?![^\s;]))', re.IGNORECASE)

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """How this run may reach registries: the operator's settings, and a RegistryLocator.

    `docker_config` is the path of a config.json of docker's; None looks where docker and podman look.
    `insecure_registries` are `host[:port]` that may get credentials over plain http. `attempts` and `backoff` (seconds,
    the first pause) are the retry policy; `timeout` (seconds) is for connecting and for each wait for bytes.
    """

    docker_config: str | None = None
    insecure_registries: frozenset[str] = frozenset()
    connections_per_host: int = 8
    timeout: float = 60
    attempts: int = 5
    backoff: float = 1.0
    limits: Limits = field(default_factory=Limits)

    def open(self) -> Client:
        """The Client of this process for these settings, made with the first call."""
        with _opening:
            key = (os.getpid(), self)
            client = _clients.get(key)
            if client is None or client.is_closed:
                client = _clients[key] = Client(self)
            return client


_opening = threading.Lock()
_clients: dict[tuple[int, Access], Client] = {}
"""By process: a child of fork must not speak on its parent's connections, so it makes its own. The parent's entry
stays, for to close it there would say goodbye in the parent's name."""


def _forget_lock() -> None:
    global _opening
    _opening = threading.Lock()


os.register_at_fork(after_in_child=_forget_lock)


class Client:
    """A Registry (see contracts.py) for all hosts. `close()` ends it, retries that sleep included.

    At most `connections_per_host` requests run at a time per API host, a blob counting until its `with` is left: one
    thread must not hold more blobs open than that.
    """

    def __init__(self, access: Access) -> None:
        self._access = access
        self._closing = threading.Event()
        self._policy = Policy(attempts=access.attempts, backoff=access.backoff, closing=self._closing)
        self._transport = Transport(timeout=access.timeout, insecure_registries=access.insecure_registries)
        self._keychain = Keychain(access.docker_config, os.environ)
        self._door = Doorkeeper(self._transport, self._keychain)
        self._gates: dict[str, Gate] = {}
        self._lock = threading.Lock()

    @property
    def locator(self) -> Access:
        return self._access

    @property
    def is_closed(self) -> bool:
        return self._closing.is_set()

    def close(self) -> None:
        """Ends all connections and all waiting; what is under way fails with a RegistryError."""
        self._closing.set()
        self._transport.close()

    def has_credentials(self, repository: Repository) -> bool:
        """Whether requests for this repository may be made with credentials."""
        return self._door.credentials(self._endpoint(repository)) is not None

    def tags(self, repository: Repository) -> list[str]:
        endpoint = self._endpoint(repository)
        what = f"listing the tags of {endpoint.name} at {endpoint.host}"
        tags: dict[str, None] = {}
        seen: set[str] = set()
        fullest = 0
        page_url: str | None = endpoint.url(f"tags/list?n={_PAGE}")
        while page_url is not None:
            if page_url in seen:
                raise RegistryError(f"{what}: its pages go in circles", status=200)
            seen.add(page_url)
            page, link = self._page(endpoint, page_url, what, first=not tags)
            fullest = max(fullest, len(page))
            before = len(tags)
            tags.update(dict.fromkeys(page))
            if len(tags) > _TAGS or len(seen) > _PAGES:
                raise RegistryError(f"{what}: no end after {len(tags)} tags on {len(seen)} pages", status=200)
            if link is not None:
                page_url = _next_page(endpoint, page_url, link, what)
            elif len(tags) > before and (len(page) >= _PAGE or (len(page) == fullest and len(page) % _ROUND == 0)):
                # A full page without a link: what may follow is asked for by the last name. A registry that knows
                # neither gives the same page again, which is nothing new, and the end.
                last = urllib.parse.quote(page[-1], safe="", errors="surrogatepass")
                page_url = endpoint.url(f"tags/list?n={_PAGE}&last={last}")
            else:
                page_url = None
        return list(tags)

    def head(self, reference: Reference) -> Descriptor:
        endpoint = self._endpoint(reference.repository)
        what = f"looking up {endpoint.name}:{reference.tag} at {endpoint.host}"
        if reference.digest is not None:
            what = f"looking up {endpoint.name}@{reference.digest} at {endpoint.host}"
        path = f"manifests/{reference.spec}"

        def look() -> Descriptor | None:
            with self._ask(endpoint, "HEAD", endpoint.url(path), what, accept=_ACCEPT) as answer:
                return _described(answer, reference, what)

        def get() -> Descriptor:
            with self._ask(endpoint, "GET", endpoint.url(path), what, accept=_ACCEPT) as answer:
                raw = answer.read(self._access.limits.manifest)
                if reference.digest is not None:
                    reference.digest.check(raw, what)
                return Descriptor(
                    media_type=_media_type(answer), digest=reference.digest or Digest.of(raw), size=len(raw)
                )

        try:
            described = self._run(endpoint, look)
        except RegistryError as error:
            if error.status not in (405, 501):
                raise
            described = None  # it has no HEAD
        return described if described is not None else self._run(endpoint, get)

    def manifest(self, repository: Repository, digest: Digest) -> tuple[bytes, str]:
        endpoint = self._endpoint(repository)
        what = f"reading manifest {digest} of {endpoint.name} at {endpoint.host}"

        def get() -> tuple[bytes, str]:
            url = endpoint.url(f"manifests/{digest}")
            with self._ask(endpoint, "GET", url, what, accept=_ACCEPT) as answer:
                return answer.read(self._access.limits.manifest), _media_type(answer)

        raw, media_type = self._run(endpoint, get)
        return digest.check(raw, what), media_type

    @contextmanager
    def blob(self, repository: Repository, descriptor: Descriptor) -> Iterator[Stream]:
        endpoint = self._endpoint(repository)
        what = f"reading blob {descriptor.digest} of {endpoint.name} at {endpoint.host}"
        url = endpoint.url(f"blobs/{descriptor.digest}")
        ask = functools.partial(self._ask, endpoint, "GET", url, what)
        with self._gate(endpoint).slots:
            stream = ResumingStream(lambda headers: ask(headers=headers), descriptor.size, self._policy, what)
            with closing(stream):
                yield VerifiedReader(stream, descriptor.digest, descriptor.size, what)

    def is_public(self, repository: Repository, digest: Digest) -> bool:
        """Whether a request without credentials can read this manifest.

        Costs no request where no credentials are known: then all that was read was read without. Behind a pull-through
        cache it is the registry itself that is asked, because the cache may hold credentials of its own.
        """
        own = _called(repository)
        mirrored = self._endpoint(repository) != own
        if not mirrored and not self.has_credentials(repository):
            return True
        what = f"asking {own.host} whether {own.name}@{digest} can be read without credentials"

        def look() -> bool:
            url = own.url(f"manifests/{digest}")
            with self._ask(own, "HEAD", url, what, accept=_ACCEPT, anonymous=True):
                return True

        try:
            return self._run(own, look)
        except (Denied, NotFound):
            return False

    def _endpoint(self, repository: Repository) -> Endpoint:
        own = _called(repository)
        mirror = self._keychain.mirror(own.host, own.name)
        if mirror is None:
            return own
        url = f"{mirror.scheme}://{mirror.host}"
        try:
            origin = Origin.of(httpx.URL(url))
        except (httpx.InvalidURL, ValueError):
            raise RegistryError(f"the pull-through cache for {repository.registry} is no host") from None
        return Endpoint(origin=origin, name=f"{mirror.path}/{own.name}" if mirror.path else own.name)

    def _gate(self, endpoint: Endpoint) -> Gate:
        with self._lock:
            gate = self._gates.get(endpoint.host)
            if gate is None:
                gate = self._gates[endpoint.host] = Gate(self._access.connections_per_host, self._closing)
            return gate

    def _run(self, endpoint: Endpoint, act: Callable[[], _T]) -> _T:
        """Does a whole exchange, from the request to the last byte of its answer, as often as the policy allows."""

        gate = self._gate(endpoint)

        def in_slot() -> _T:
            with gate.slots:
                return act()

        try:
            result = replace(self._policy, attempts=gate.attempts(self._policy.attempts)).run(in_slot)
        except RegistryError as error:
            gate.failed(error) if error.temporary else gate.answered()
            raise
        gate.answered()
        return result

    @contextmanager
    def _ask(
        self,
        endpoint: Endpoint,
        method: str,
        url: str,
        what: str,
        *,
        accept: str | None = None,
        headers: Mapping[str, str] | None = None,
        anonymous: bool = False,
    ) -> Iterator[Answer]:
        """One attempt at a request, let in as the registry wants it; gives a successful answer, raises the others."""
        if self.is_closed:
            raise RegistryError(f"{what}: not asked, because the program is ending")
        gate = self._gate(endpoint)
        gate.wait(what)
        sent = {**({"Accept": accept} if accept else {}), **(headers or {})}
        try:
            grant = self._door.grant(endpoint, anonymous=anonymous, what=what)
            while True:
                with self._transport.send(
                    method, url, what, headers=sent, authorization=grant.header or None
                ) as answer:
                    if 200 <= answer.status < 300:
                        yield answer
                        return
                    failure = answer.failure(grant.secrets)
                further = None
                if answer.status == 401 and not grant.final:
                    further = self._door.answer(endpoint, answer, grant, anonymous=anonymous, what=what)
                if further is None:
                    raise failure
                grant = further
        except Denied as error:
            if anonymous:
                raise
            raise Denied(f"{error}{self._door.why_anonymous(endpoint)}", status=error.status) from None
        except Later as error:
            if error.status == 429 and error.retry_after is not None:
                gate.hold(error.retry_after)
            raise

    def _page(self, endpoint: Endpoint, url: str, what: str, *, first: bool) -> tuple[list[str], str | None]:
        """One page of tags, and its Link headers."""

        def get() -> tuple[bytes, list[str]]:
            with self._ask(endpoint, "GET", url, what) as answer:
                return answer.read(_PAGE_BYTES), answer.headers.get_list("Link")

        try:
            raw, links = self._run(endpoint, get)
        except ImageError as error:
            raise RegistryError(str(error), status=200) from None
        except RegistryError as error:
            if not (first and error.status == 400 and url.endswith(f"?n={_PAGE}")):
                raise
            # Some refuse an `n` above a maximum of their own instead of giving what they can.
            return self._page(endpoint, url.partition("?")[0], what, first=False)
        return _tags(raw, what), ", ".join(links) or None


def _called(repository: Repository) -> Endpoint:
    try:
        origin = Origin.of(httpx.URL(f"{repository.scheme}://{repository.api_host}"))
    except (httpx.InvalidURL, ValueError):
        # Of ValueErrors: a label that starts with xn-- and is no letters of any alphabet.
        raise RegistryError(f"{repository.registry} is no host that can be called") from None
    return Endpoint(origin=origin, name=repository.api_name)


def _media_type(answer: Answer) -> str:
    return str(answer.headers.get("Content-Type", "")).partition(";")[0].strip().lower()


def _described(answer: Answer, reference: Reference, what: str) -> Descriptor | None:
    """What the headers of a HEAD say, None if they do not say enough."""
    text = answer.headers.get("Docker-Content-Digest")
    # Some answer HEAD with a length of 0.
    if text is None or not answer.length:
        return None
    try:
        digest = Digest.parse(text.strip())
    except ValueError:
        return None
    if reference.digest is not None and digest != reference.digest:
        if digest.algorithm != reference.digest.algorithm:
            return None
        raise IntegrityError(f"{what}: the registry answers with {digest}")
    return Descriptor(media_type=_media_type(answer), digest=digest, size=answer.length)


def _tags(raw: bytes, what: str) -> list[str]:
    """The names on a page, whatever they look like; RegistryError if it is not a page of tags."""
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError):
        raise RegistryError(f"{what}: what it answered is not JSON", status=200) from None
    if not isinstance(document, dict) or "tags" not in document:
        raise RegistryError(f"{what}: what it answered is no list of tags", status=200)
    tags = document["tags"]
    if tags is None:
        return []  # written so for a repository that has lost its last tag
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise RegistryError(f"{what}: what it answered is no list of tags", status=200)
    return tags


def _next_page(endpoint: Endpoint, current: str, link: str, what: str) -> str | None:
    """The URL of the next page, always at the endpoint itself; None if the header names none."""
    if len(link) > _LINK_LENGTH:
        raise RegistryError(f"{what}: the link to the next page is too long", status=200)
    for match in _LINK.finditer(link):
        if not _REL_NEXT.search(match[2]):
            continue
        try:
            url = httpx.URL(current).join(match[1])
            named = Origin.of(url)
        except (httpx.InvalidURL, ValueError):
            raise RegistryError(f"{what}: the link to the next page is no URL", status=200) from None
        own = endpoint.origin
        # A registry behind a proxy that ends TLS often believes itself to be plain http: its path is taken, its scheme
        # is not.
        same_host = named.host == own.host and (named.port == own.port or {named.port, own.port} == {80, 443})
        if not same_host or url.scheme not in ("https", "http") or url.userinfo:
            raise RegistryError(f"{what}: the link to the next page leads to another host: refused", status=200)
        return str(httpx.URL(endpoint.url("")).copy_with(raw_path=url.raw_path))
    return None

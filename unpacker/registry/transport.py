"""One request to one address: connections, TLS, proxies, redirects, and which addresses may be called at all.

- HTTP/1.1 through one shared httpx.Client, safe from many threads.
- Redirects are followed here, by hand: at most five, Authorization only as long as scheme, host and port stay the same,
  never from https to http unless the operator listed that host as insecure.
- The addresses of `address.py` are refused before a byte is sent: literal ones and names before connecting, names that
  resolve to one when the connection stands. (Behind a proxy it is the proxy that resolves names.)
- What fails is a RegistryError that says what was being done, without query strings.
"""

from __future__ import annotations

import json
import os
import re
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.cookiejar import CookieJar, DefaultCookiePolicy

import httpcore
import httpx

from unpacker.errors import Denied, ImageError, NotFound, RegistryError, SettingsError
from unpacker.registry import tls
from unpacker.registry.address import why_refused
from unpacker.registry.retry import RETRY_AFTER_CAP, Later, Unreachable, is_temporary, parse_retry_after
from unpacker.registry.watch import ForbiddenPeer, Watch

REDIRECTS = 5
_ERROR_BODY = 64 << 10
_ERROR_TEXT = 300
_DRAINED = 16 << 10
_SLOWEST = 1024
"""Bytes a second below which a body that has kept us waiting for a whole timeout counts as broken."""
_DEFAULT_PORT = {"https": 443, "http": 80}

# How much is read of a connection at once. With the usual 64 kB, fetching a layer takes twice the time of a core.
httpcore.HTTP11Connection.READ_NUM_BYTES = 256 << 10


class Refused(RegistryError):
    """A request that is never made, wherever the address came from."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Scheme, host and port: what credentials and insecure settings are about."""

    scheme: str
    host: str
    port: int

    @classmethod
    def of(cls, url: httpx.URL) -> Origin:
        return cls(url.scheme, url.host.lower(), url.port or _DEFAULT_PORT.get(url.scheme, 0))

    @property
    def netloc(self) -> str:
        """`host[:port]` as a setting would name it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _DEFAULT_PORT.get(self.scheme) else f"{host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        return self.host in ("localhost", "::1") or re.fullmatch(r"127(\.[0-9]{1,3}){3}", self.host) is not None


class Answer:
    """A response whose body is still to be read. Usable only inside the `with` that gave it."""

    def __init__(
        self, response: httpx.Response, what: str, asked: Origin, timeout: float, watch: Watch | None = None
    ) -> None:
        self._response = response
        self._what = what
        self._timeout = timeout
        self._watch = watch if watch is not None else Watch(timeout)
        self.status = response.status_code
        self.headers = response.headers
        self.url = response.url
        self.came_from_elsewhere = Origin.of(response.url) != asked
        """Whether a redirect led to another host: then this host's challenge is not the registry's own."""

    @property
    def length(self) -> int | None:
        """Content-Length, None where the server did not say or did not make sense."""
        text = self.headers.get("Content-Length", "")
        return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None

    def pieces(self) -> Iterator[bytes]:
        """The body as it arrives, never decoded. One that breaks, stalls or trickles is a Later."""
        waited = 0.0
        received = 0
        chunks = self._response.iter_raw()
        try:
            while True:
                before = time.monotonic()
                with self._watch.in_time():
                    piece = next(chunks, b"")
                waited += time.monotonic() - before
                if not piece:
                    return
                received += len(piece)
                if waited > self._timeout and received < waited * _SLOWEST:
                    raise Later(f"{self._what}: less than {_SLOWEST} bytes/s came", status=self.status)
                yield piece
        except httpx.HTTPError as error:
            raise Later(f"{self._what}: {_reason(error)}", status=self.status) from None

    def read(self, limit: int) -> bytes:
        """The whole body, ImageError if it is longer than `limit`."""
        too_long = ImageError(f"{self._what}: longer than the limit of {limit} bytes")
        if (self.length or 0) > limit:
            raise too_long
        body = bytearray()
        for piece in self.pieces():
            body += piece
            if len(body) > limit:
                raise too_long
        return bytes(body)

    def failure(self, secrets: tuple[str, ...] = ()) -> RegistryError:
        """The error that this response is. What the registry itself says is quoted, bounded, without `secrets`."""
        said = self._said(secrets)
        message = f"{self._what}: HTTP {self.status}{f' ({said})' if said else ''}"
        if is_temporary(self.status):
            after = parse_retry_after(self.headers.get("Retry-After"), time.time())
            if after is not None and after > RETRY_AFTER_CAP:
                message += f"; it asks to be left alone for {after:.0f} s"
            return Later(message, status=self.status, retry_after=after)
        if self.status in (404, 410):
            message += "; no such repository, tag or blob there"
        kind = {401: Denied, 403: Denied, 404: NotFound, 410: NotFound}.get(self.status, RegistryError)
        return kind(message, status=self.status)

    def _said(self, secrets: tuple[str, ...]) -> str:
        body = bytearray()
        try:
            for piece in self.pieces():
                body += piece
                if len(body) > _ERROR_BODY:
                    return ""
            document = json.loads(bytes(body))
        except (RegistryError, ValueError, RecursionError):
            return ""  # the status is the news; a body that breaks or is no JSON adds nothing to it
        errors = document.get("errors") if isinstance(document, dict) else None
        first = errors[0] if isinstance(errors, list) and errors else document
        if not isinstance(first, dict):
            return ""
        parts = (first.get("code"), first.get("message"), first.get("details"))
        return printable(": ".join(p for p in parts if isinstance(p, str) and p), secrets)


class Transport:
    """Makes requests. Safe from many threads; `close()` ends all connections."""

    def __init__(self, *, timeout: float, insecure_registries: frozenset[str]) -> None:
        self._timeout = timeout
        self._insecure = frozenset(r.lower() for r in insecure_registries)
        self._watch = Watch(timeout)
        self._lock = threading.Lock()
        self._shared = self._client(tls.context(os.environ))
        self._clients: dict[str, httpx.Client] = {}
        """By host, where a host has certificates of its own; else the shared one."""

    def _client(self, trusting: ssl.SSLContext) -> httpx.Client:
        try:
            return httpx.Client(
                verify=trusting,
                http2=False,
                follow_redirects=False,
                timeout=httpx.Timeout(self._timeout, connect=min(self._timeout, 20.0), pool=None),
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=30),
                # Bodies are compared with digests and sizes of what is stored, so they must come as stored.
                headers={"Accept-Encoding": "identity", "User-Agent": "unpacker"},
                # A cookie given to a user would make the next anonymous request that user's.
                cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
            )
        except (ImportError, ValueError, httpx.InvalidURL) as error:
            # What httpx makes of variables such as ALL_PROXY. Their values may hold a password.
            raise SettingsError(
                "cannot use the proxy that HTTP_PROXY, HTTPS_PROXY or ALL_PROXY names: expected http://host:port or "
                f"https://host:port ({type(error).__name__})"
            ) from None

    def _client_for(self, origin: Origin) -> httpx.Client:
        if origin.scheme == "http":
            return self._shared
        with self._lock:
            client = self._clients.get(origin.netloc)
            if client is None:
                own = tls.context_for(origin.netloc, os.environ)
                client = self._clients[origin.netloc] = self._shared if own is None else self._client(own)
            return client

    def close(self) -> None:
        for client in {self._shared, *self._clients.values()}:
            client.close()

    def is_insecure(self, origin: Origin) -> bool:
        """Whether the operator lets this host do without TLS."""
        return origin.netloc in self._insecure or f"{origin.host}:{origin.port}" in self._insecure

    def may_carry_secrets(self, origin: Origin) -> bool:
        """Whether credentials may go there at all: over TLS, to loopback, or to a host listed as insecure."""
        return origin.scheme == "https" or origin.is_loopback or self.is_insecure(origin)

    @contextmanager
    def send(
        self,
        method: str,
        url: str | httpx.URL,
        what: str,
        *,
        headers: Mapping[str, str] | None = None,
        authorization: str | None = None,
        form: Mapping[str, str] | None = None,
    ) -> Iterator[Answer]:
        """The answer to a request, redirects followed; `what` says in errors what was being done."""
        target = _parse(url, what)
        asked = Origin.of(target)
        sent = dict(headers or {})
        if authorization is not None:
            if not self.may_carry_secrets(asked):
                raise Refused(f"{what}: credentials are not sent over plain http (list the host as insecure)")
            sent["Authorization"] = authorization
        for _ in range(REDIRECTS + 1):
            response = self._send_once(method, target, sent, form, what)
            try:
                answer = Answer(response, what, asked, self._timeout, self._watch)
                location = response.headers.get("Location")
                if response.status_code not in (301, 302, 303, 307, 308) or location is None:
                    yield answer
                    return
                if form is not None:
                    raise RegistryError(
                        f"{what}: redirected, which a request with secrets does not follow", status=response.status_code
                    )
                target = self._follow(target, location, what, response.status_code)
                _drain(answer)
                if Origin.of(target) != asked:
                    # For good: a way back to the first host is another's idea of what to ask there.
                    sent.pop("Authorization", None)
            finally:
                response.close()
        raise RegistryError(f"{what}: more than {REDIRECTS} redirects", status=response.status_code)

    def _follow(self, target: httpx.URL, location: str, what: str, status: int) -> httpx.URL:
        try:
            following = target.join(location)
        except (httpx.InvalidURL, ValueError):
            raise RegistryError(f"{what}: redirected to what is no URL", status=status) from None
        following = _parse(following, f"{what}: redirected")
        if target.scheme == "https" and following.scheme == "http" and not self.is_insecure(Origin.of(following)):
            raise Refused(
                f"{what}: redirected from https to plain http at {printable(Origin.of(following).netloc)}",
                status=status,
            )
        return following

    def _send_once(
        self, method: str, url: httpx.URL, headers: dict[str, str], form: Mapping[str, str] | None, what: str
    ) -> httpx.Response:
        if (reason := why_refused(url.host)) is not None:
            raise Refused(f"{what}: {printable(url.host)} is never called: {reason}")
        try:
            client = self._client_for(Origin.of(url))
            request = client.build_request(method, url, headers=headers, data=form)
            # A callback of the request, because a connection is made for the request that needs one.
            request.extensions["trace"] = self._watch
            return client.send(request, stream=True)
        except ForbiddenPeer as error:
            raise Refused(f"{what}: {printable(url.host)} is never called: {error}") from None
        except (httpx.InvalidURL, httpx.UnsupportedProtocol, httpx.LocalProtocolError, ValueError) as error:
            raise RegistryError(f"{what}: not a request that can be sent ({type(error).__name__})") from None
        except httpx.HTTPError as error:
            if _is_bad_certificate(error):
                raise RegistryError(f"{what}: {_reason(error)}") from None
            kind = Unreachable if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout) else Later
            raise kind(f"{what}: {_reason(error)}") from None


def _drain(answer: Answer) -> None:
    """Reads a short body nobody needs, so that the connection can be used again."""
    try:
        if answer.length is not None and answer.length <= _DRAINED:
            for _ in answer.pieces():
                pass
    except Later:
        pass  # then the connection is not used again


def _parse(url: str | httpx.URL, what: str) -> httpx.URL:
    try:
        parsed = httpx.URL(url)
        host = parsed.host
    except (httpx.InvalidURL, ValueError):
        raise RegistryError(f"{what}: not a URL") from None
    if parsed.scheme not in _DEFAULT_PORT or not host:
        raise Refused(f"{what}: not an http or https URL with a host")
    if parsed.userinfo:
        # httpx would send them as Basic credentials of somebody else's choice.
        raise Refused(f"{what}: a URL with a user name in it")
    return parsed


def printable(text: str, secrets: tuple[str, ...] = ()) -> str:
    """What a server said, fit for a message: bounded, on one line, without queries and without `secrets`."""
    for secret in secrets:
        if secret:
            text = text.replace(secret, "…")
    text = re.sub(r"(?i)\b(bearer|basic)\s+\S+", r"\1 …", text)
    text = re.sub(r"\?[^\s\"'<>]+", "?…", text)
    text = "".join(c if c.isprintable() else " " for c in text[: 4 * _ERROR_TEXT])
    text = " ".join(text.split())
    return text if len(text) <= _ERROR_TEXT else text[:_ERROR_TEXT] + "…"


def _reason(error: httpx.HTTPError) -> str:
    words = {
        httpx.ConnectTimeout: "no connection in time",
        httpx.ReadTimeout: "no answer in time",
        httpx.WriteTimeout: "it took no request in time",
        httpx.RemoteProtocolError: "the connection was closed early, or what came was not HTTP",
        httpx.ReadError: "the connection broke",
        httpx.WriteError: "the connection broke",
        httpx.ProxyError: "the proxy refused",
    }
    for kind, said in words.items():
        if isinstance(error, kind):
            return said
    # Of ConnectError: "Connection refused", "Name or service not known", what is wrong with a certificate.
    return printable(re.sub(r"^\[[^\]]*\]\s*", "", str(error))) or type(error).__name__


def _is_bad_certificate(error: httpx.HTTPError) -> bool:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return True
        cause = cause.__cause__ or cause.__context__
    return False

"""How a registry lets us in: challenges, tokens and their cache, Basic.

Whose secrets go where: the credentials of a host go to that host, and to the token server (realm) that this host
itself named in a 401, and only where `Transport.may_carry_secrets`. A token got for one host goes to that host only.
"""

from __future__ import annotations

import base64
import json
import re
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import httpx

from unpacker.errors import Denied, ImageError, RegistryError
from unpacker.registry.credentials import Credentials, Keychain
from unpacker.registry.transport import Answer, Origin, Refused, Transport, printable

_CLIENT_ID = "unpacker"
_TOKEN_ANSWER = 1 << 20
_TOKEN = re.compile(r"[\x21-\x7e]{1,65536}")
_DEFAULT_EXPIRY = 60.0
"""Of a token that does not say it (distribution specification of tokens: "for compatibility with older clients")."""
_LONGEST_EXPIRY = 86400.0

_TOKEN_CHARACTERS = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_SCHEME = re.compile(rf"({_TOKEN_CHARACTERS})(?=[ \t,]|$)")
# Some registries leave URLs unquoted, so an unquoted value ends only at a comma or blank.
_PARAMETER = re.compile(rf'({_TOKEN_CHARACTERS})[ \t]*=[ \t]*(?:"((?:[^"\\]|\\.)*)"|([^\s",]+))(?=[ \t]*(?:,|$))')
_SKIPPED = re.compile(r"[ \t,]*")
_TOKEN68 = re.compile(r"[A-Za-z0-9._~+/-]+=*(?=[ \t]*(?:,|$))")


@dataclass(frozen=True, slots=True)
class Challenge:
    """One way in that a 401 offers: a scheme in lower case and its parameters."""

    scheme: str
    parameters: Mapping[str, str]


def parse_challenges(headers: Iterable[str]) -> list[Challenge]:
    """All challenges of WWW-Authenticate headers (RFC 9110, 11.6.1), in order; several may share one header.

    A comma separates challenges as well as parameters, and may stand inside a quoted scope. What does not follow the
    grammar ends its header: the challenges before it count.
    """
    found: list[Challenge] = []
    for header in headers:
        position = _end(_SKIPPED, header, 0)
        parameters: dict[str, str] | None = None
        while position < len(header):
            if parameters is not None and (match := _PARAMETER.match(header, position)):
                value = re.sub(r"\\(.)", r"\1", match[2]) if match[2] is not None else match[3]
                parameters.setdefault(match[1].lower(), value)
            elif match := _SCHEME.match(header, position):
                parameters = {}
                found.append(Challenge(match[1].lower(), parameters))
                blank = _end(_SKIPPED, header, match.end())
                # Such as Negotiate's: one opaque word instead of parameters.
                if (word := _TOKEN68.match(header, blank)) and not _SCHEME.match(header, blank):
                    match = word
            else:
                break
            position = _end(_SKIPPED, header, match.end())
    return found


def _end(expression: re.Pattern[str], text: str, position: int) -> int:
    match = expression.match(text, position)
    return match.end() if match else position


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """A repository as it is called: where, and under which name there."""

    origin: Origin
    name: str

    @property
    def host(self) -> str:
        return self.origin.netloc

    def url(self, path: str) -> str:
        """Of a path below the repository, such as `tags/list`."""
        host = f"[{self.origin.host}]" if ":" in self.origin.host else self.origin.host
        return f"{self.origin.scheme}://{host}:{self.origin.port}/v2/{self.name}/{path}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """What opens: a header, until when, and the secrets in it that no message may quote."""

    header: str = field(repr=False)
    expires: float
    secrets: tuple[str, ...] = field(repr=False)
    final: bool = False
    """Whether it answers a challenge just given: if it does not open, nothing will."""


NOTHING = Grant(header="", expires=float("inf"), secrets=())


@dataclass(frozen=True, slots=True)
class _Way:
    """How a host was seen to let in: so the next repository of it needs no 401 first."""

    challenge: Challenge
    name: str


class Doorkeeper:
    """Gives requests their Authorization. Safe from many threads; tokens are kept per host and scope until expiry."""

    def __init__(self, transport: Transport, keychain: Keychain) -> None:
        self._transport = transport
        self._keychain = keychain
        self._lock = threading.Lock()
        self._ways: dict[tuple[Origin, bool], _Way] = {}
        self._grants: dict[tuple[Origin, str, bool], Grant] = {}
        self._fetching: dict[tuple[Origin, str, bool], threading.Lock] = {}

    def credentials(self, endpoint: Endpoint) -> Credentials | None:
        """What is known for this repository, whether or not it may be sent there."""
        return self._keychain.find(endpoint.host, endpoint.name)

    def grant(self, endpoint: Endpoint, *, anonymous: bool, what: str) -> Grant:
        """What to send with a first request, by what this host asked for before; nothing where it never asked."""
        way = self._ways.get((endpoint.origin, anonymous))
        if way is None:
            return NOTHING
        challenge = way.challenge
        if challenge.scheme == "bearer" and way.name != endpoint.name:
            scope = challenge.parameters.get("scope", "")
            own = scope.replace(f"repository:{way.name}:", f"repository:{endpoint.name}:")
            challenge = Challenge("bearer", {**challenge.parameters, "scope": own})
        elif challenge.scheme == "basic" and self._usable(endpoint, anonymous) is None:
            return NOTHING
        return self._open(endpoint, challenge, anonymous, what)

    def answer(self, endpoint: Endpoint, refusal: Answer, used: Grant, *, anonymous: bool, what: str) -> Grant | None:
        """What to send after a 401; None if there is nothing that was not already tried."""
        if refusal.came_from_elsewhere:
            return None
        challenges = parse_challenges(refusal.headers.get_list("WWW-Authenticate"))
        with self._lock:
            # Expired early or revoked: whoever else holds it finds out alike.
            for key in [k for k, grant in self._grants.items() if grant is used]:
                del self._grants[key]
        for challenge in challenges:
            if challenge.scheme == "bearer" and challenge.parameters.get("realm"):
                break
        else:
            basic = [c for c in challenges if c.scheme == "basic"]
            if not basic or self._usable(endpoint, anonymous) is None or used.header.startswith("Basic "):
                return None
            challenge = basic[0]
        grant = self._open(endpoint, challenge, anonymous, what)
        self._ways[endpoint.origin, anonymous] = _Way(challenge, endpoint.name)
        return replace(grant, final=True)

    def why_anonymous(self, endpoint: Endpoint) -> str:
        """For the message of a refusal: what kept us from giving credentials, "" if nothing did."""
        if self.credentials(endpoint) is None:
            return f"; no credentials are known for {endpoint.host}, or there is no such repository"
        if not self._transport.may_carry_secrets(endpoint.origin):
            return "; the credentials known for it are not sent over plain http (list the host as insecure)"
        return ""

    def _usable(self, endpoint: Endpoint, anonymous: bool) -> Credentials | None:
        if anonymous or not self._transport.may_carry_secrets(endpoint.origin):
            return None
        return self.credentials(endpoint)

    def _open(self, endpoint: Endpoint, challenge: Challenge, anonymous: bool, what: str) -> Grant:
        if challenge.scheme == "basic":
            credentials = self._usable(endpoint, anonymous)
            assert credentials is not None
            if credentials.identity_token is not None and not credentials.password:
                raise Denied(f"{what}: it asks for a password, and only an identity token is known for it", status=401)
            return _basic(credentials)
        realm = challenge.parameters["realm"]
        scope = challenge.parameters.get("scope") or f"repository:{endpoint.name}:pull"
        key = (endpoint.origin, f"{realm} {scope}", anonymous)
        with self._lock:
            # One thread fetches a token, the others of this scope wait for it.
            fetching = self._fetching.setdefault(key, threading.Lock())
        with fetching:
            grant = self._grants.get(key)
            if grant is None or grant.expires <= time.monotonic():
                service = challenge.parameters.get("service")
                grant = self._fetch(endpoint, realm, service, scope, anonymous, what)
                self._grants[key] = grant
            return grant

    def _fetch(
        self, endpoint: Endpoint, realm: str, service: str | None, scope: str, anonymous: bool, what: str
    ) -> Grant:
        try:
            url = httpx.URL(realm)
            server = Origin.of(url)
        except (httpx.InvalidURL, ValueError):
            raise RegistryError(f"{what}: its token server is no URL", status=401) from None
        what = f"{what}: asking {printable(server.netloc)} for a token"
        if endpoint.origin.scheme == "https" and server.scheme != "https" and not self._transport.is_insecure(server):
            raise Refused(f"{what}: that is plain http, named by an https registry", status=401)
        credentials = self._usable(endpoint, anonymous)
        if credentials is not None and not self._transport.may_carry_secrets(server):
            raise Refused(f"{what}: credentials are not sent over plain http (list the host as insecure)", status=401)
        query = {"scope": scope} | ({"service": service} if service is not None else {})
        if credentials is not None and credentials.identity_token is not None:
            form = {"grant_type": "refresh_token", "refresh_token": credentials.identity_token, "client_id": _CLIENT_ID}
            secrets: tuple[str, ...] = (credentials.identity_token,)
            sending = self._transport.send("POST", url, what, form=query | form)
        else:
            basic = _basic(credentials) if credentials is not None else NOTHING
            secrets = basic.secrets
            # Several scopes are several parameters of that name.
            pairs = [("scope", s) for s in scope.split()] + [(k, v) for k, v in query.items() if k != "scope"]
            for name, value in pairs:
                url = url.copy_add_param(name, value)
            sending = self._transport.send("GET", url, what, authorization=basic.header or None)
        with sending as answer:
            if answer.status != 200:
                raise answer.failure(secrets)
            return _token(answer, what, secrets)


def _basic(credentials: Credentials) -> Grant:
    pair = f"{credentials.user}:{credentials.password}"
    encoded = base64.b64encode(pair.encode()).decode()
    return Grant(header=f"Basic {encoded}", expires=float("inf"), secrets=(encoded, credentials.password))


def _token(answer: Answer, what: str, secrets: tuple[str, ...]) -> Grant:
    try:
        document = json.loads(answer.read(_TOKEN_ANSWER))
        token = document.get("token") or document.get("access_token")
        expires_in = document.get("expires_in")
    except (ValueError, AttributeError, RecursionError, ImageError):
        raise RegistryError(f"{what}: what it answered is no token", status=answer.status) from None
    if not isinstance(token, str) or not _TOKEN.fullmatch(token):
        raise RegistryError(f"{what}: what it answered is no token", status=answer.status)
    seconds = _DEFAULT_EXPIRY
    if isinstance(expires_in, int | float) and not isinstance(expires_in, bool) and expires_in > 0:
        seconds = min(float(expires_in), _LONGEST_EXPIRY)
    # Given up a little early, for clocks and for the request that is already on its way.
    expires = time.monotonic() + seconds - min(30.0, seconds / 5)
    return Grant(header=f"Bearer {token}", expires=expires, secrets=(token, *secrets))

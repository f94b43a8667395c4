"""A registry of ours, in this process, that serves literal images, misbehaves on request and records every request.

>>> with FakeRegistry() as fake:
...     fake.add("org/app", "1.0", image(layer(file("etc/motd", b"hello"))))
...     fake.fault(status=429, times=2, headers={"Retry-After": "0"})
...     …
...     assert [r.method for r in fake.requests] == ["HEAD", "HEAD", "HEAD"]

All switches are plain attributes of FakeRegistry and may be changed while it serves.
"""

from __future__ import annotations

import base64
import itertools
import json
import re
import ssl
import threading
import time
import urllib.parse
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from tests.images import BuiltImage, index
from unpacker.digest import Digest


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request as it arrived."""

    method: str
    path: str
    query: dict[str, str]
    authorization: str | None
    """The scheme of the Authorization header ("Basic", "Bearer"), None if there was none."""
    headers: dict[str, str]
    """All headers, names in lower case."""
    body: str = ""

    @property
    def authorized(self) -> bool:
        return self.authorization is not None


@dataclass(kw_only=True)
class Fault:
    """The next `times` matching requests are answered so; status 0 closes the connection without an answer."""

    status: int
    times: int
    method: str | None
    path: str
    headers: dict[str, str]
    body: bytes

    def takes(self, method: str, path: str) -> bool:
        return self.times > 0 and self.method in (None, method) and re.search(self.path, path) is not None


@dataclass
class Repository:
    tags: dict[str, str] = field(default_factory=dict)
    """Tag → digest."""
    manifests: dict[str, tuple[bytes, str]] = field(default_factory=dict)
    """Digest → bytes and media type."""
    blobs: dict[str, bytes] = field(default_factory=dict)


class FakeRegistry:
    """Speaks the distribution API on a free loopback port; a context manager."""

    def __init__(self, *, tls: ssl.SSLContext | None = None, address: str = "127.0.0.1") -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []

        # Authentication.
        self.auth: str | None = None
        """None (open to all), "bearer", "basic", "both" (two challenges in one header), "two-headers",
        "no-header" (a 401 without a challenge), or "raw" (the challenge is `self.challenge`)."""
        self.challenge = ""
        self.users: dict[str, str] = {}
        self.identity_tokens: set[str] = set()
        self.private: set[str] = set()
        """Repositories that only a known user may read; where empty, "basic" still asks everybody for a user."""
        self.realm: str | None = None
        """The token server in the challenge; None is this registry's own /token."""
        self.actions = "pull"
        """What the scope in the challenge asks for; "pull,push" puts a comma into it."""
        self.token_field = "token"
        self.token_expires: int | None = 300
        self.token_refuses_anonymous = False
        self.reject_tokens = 0
        """As many requests with a Bearer token are answered 401, as after an early expiry."""

        # Answers.
        self.faults: list[Fault] = []
        self.content_digest = "right"
        """The Docker-Content-Digest header: "right", "wrong" or "missing"."""
        self.content_length = True
        self.page_size: int | None = None
        """At most so many tags a page, whatever `n` asks for; None is as many as `n` asks for."""
        self.paging = "link"
        """"link"; "last" (honours n and last, sends no Link); "ignore-last" (cuts at n, always from the start);
        "whole" (ignores n and last, as docker-registry 2.8); "endless" (every page names a next one);
        "circular" (every page links to itself)."""
        self.link: str | None = None
        """Sent as the Link header's target instead of the right one."""
        self.listed_tags: dict[str, list[Any]] = {}
        """Listed besides the real ones: hostile names."""
        self.redirect_blobs: str | None = None
        """A scheme://host:port to which blobs are redirected (307)."""
        self.redirect: dict[str, str] = {}
        """Path → Location of a 307."""
        self.ranges = True
        self.corrupt: set[str] = set()
        """Digests of blobs and manifests with their last byte changed."""
        self.slow: tuple[int, float] | None = None
        """Bodies go out in pieces of so many bytes with so many seconds before each."""
        self.drip: str | None = None
        """"header": a header that never ends, a byte at a time; "chunk": the same inside a body's chunk."""
        self.delay = 0.0
        """Seconds before each answer."""
        self.fixed: dict[str, tuple[bytes, dict[str, str]]] = {}
        """Path → body and headers of a 200, whatever should be there."""
        self.busiest = 0
        """The most requests that were being answered at one time."""
        self._busy = 0
        self._truncations: dict[str | None, list[int]] = {}

        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._server = _Server((address, 0), _Handler)
        self._server.fake = self
        self._server.tls = tls
        self.port: int = self._server.server_address[1]
        self.host = f"{address}:{self.port}"
        self.url = f"{'https' if tls else 'http'}://{self.host}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.005,), daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """From now on nobody answers on this port."""
        self._server.shutdown()
        self._server.server_close()
        self._server.cut_connections()
        self._thread.join()

    def add(self, repository: str, tag: str | None, built: BuiltImage) -> str:
        """Serves an image; gives its digest. The same tag again moves the tag."""
        self.repository(repository).blobs.update(built.blobs)
        return self.add_manifest(repository, tag, built.manifest, built.media_type)

    def add_index(self, repository: str, tag: str | None, *built: BuiltImage, **options: bool) -> str:
        """Serves an index of these images; gives its digest."""
        for one in built:
            self.add(repository, None, one)
        return self.add_manifest(repository, tag, *index(*built, **options))

    def add_manifest(self, repository: str, tag: str | None, raw: bytes, media_type: str) -> str:
        """Serves any bytes as a manifest: huge, malformed, schema 1."""
        digest = str(Digest.of(raw))
        entry = self.repository(repository)
        entry.manifests[digest] = (raw, media_type)
        if tag is not None:
            entry.tags[tag] = digest
        return digest

    def add_blob(self, repository: str, data: bytes) -> str:
        digest = str(Digest.of(data))
        self.repository(repository).blobs[digest] = data
        return digest

    def remove(self, repository: str, tag: str | None = None) -> None:
        """Forgets one tag, or the whole repository."""
        if tag is None:
            del self.repositories[repository]
        else:
            del self.repositories[repository].tags[tag]

    def repository(self, name: str) -> Repository:
        return self.repositories.setdefault(name, Repository())

    def fault(
        self,
        *,
        status: int,
        times: int = 1,
        method: str | None = None,
        path: str = r"^/v2/",
        headers: dict[str, str] | None = None,
        body: bytes = b"",
    ) -> None:
        """The next `times` requests whose path is found by the expression `path` are answered with `status`;
        status 0 closes the connection unanswered."""
        self.faults.append(
            Fault(status=status, times=times, method=method, path=path, headers=headers or {}, body=body)
        )

    def truncate(self, at: int, *, times: int = 1, digest: str | None = None) -> None:
        """Breaks the next `times` blob bodies (of `digest`, or of any) after `at` bytes of that answer."""
        self._truncations.setdefault(digest, []).extend([at] * times)

    def clear(self) -> None:
        """Forgets the recorded requests."""
        with self._lock:
            self.requests.clear()

    def count(self, method: str | None = None, path: str = "") -> int:
        """How many recorded requests had this method and a path that the expression finds."""
        return sum(1 for r in self.requests if method in (None, r.method) and re.search(path, r.path))

    # What the handler asks.

    def record(self, request: Request) -> None:
        with self._lock:
            self.requests.append(request)

    def busy(self, change: int) -> None:
        with self._lock:
            self._busy += change
            self.busiest = max(self.busiest, self._busy)

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self._lock:
            for fault in self.faults:
                if fault.takes(method, path):
                    fault.times -= 1
                    return fault
        return None

    def take_truncation(self, digest: str) -> int | None:
        with self._lock:
            for key in (digest, None):
                if self._truncations.get(key):
                    return self._truncations[key].pop(0)
        return None

    def take_rejection(self) -> bool:
        with self._lock:
            if self.reject_tokens:
                self.reject_tokens -= 1
                return True
        return False

    def issue(self, user: str | None, scope: str) -> str:
        """A token says itself whom it was given to: so one fake may serve the tokens of another."""
        claim = {"user": user, "scope": scope, "n": next(self._numbers)}
        return base64.urlsafe_b64encode(json.dumps(claim).encode()).decode()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    fake: FakeRegistry
    tls: ssl.SSLContext | None = None

    def __init__(self, *args: Any) -> None:
        self._open: set[Any] = set()
        super().__init__(*args)

    def server_bind(self) -> None:
        # HTTPServer looks up the name of the host here, which asks a name server.
        self.socket.bind(self.server_address)
        address = self.socket.getsockname()
        self.server_address = address
        self.server_name, self.server_port = address[0], address[1]

    def finish_request(self, request: Any, client_address: Any) -> None:
        if self.tls is not None:
            try:
                # In the connection's own thread, so that a client that never shakes hands holds up nobody.
                request = self.tls.wrap_socket(request, server_side=True)
            except (ssl.SSLError, OSError):
                return
        self._open.add(request)
        try:
            _Handler(request, client_address, self)
        except (ConnectionError, ssl.SSLError, ValueError, OSError):
            pass  # the client went away, which tests make it do
        finally:
            self._open.discard(request)
            request.close()

    def cut_connections(self) -> None:
        for request in list(self._open):
            try:
                request.shutdown(2)
            except OSError:
                pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 1 << 16
    server: _Server

    def log_message(self, *_: object) -> None:
        """Silence."""

    def do_GET(self) -> None:
        self.server.fake.busy(+1)
        try:
            self._answer()
        finally:
            self.server.fake.busy(-1)

    do_HEAD = do_POST = do_GET

    def _answer(self) -> None:
        fake = self.server.fake
        # As a proxy it is asked for whole URLs; it is whatever host they name.
        path, _, query = re.sub(r"^http://[^/]*", "", self.path).partition("?")
        path = urllib.parse.unquote(path)
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length).decode() if length else ""
        authorization = self.headers.get("Authorization")
        values = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
        fake.record(
            Request(
                method=self.command,
                path=path,
                query=values,
                authorization=authorization.partition(" ")[0] if authorization else None,
                headers={k.lower(): v for k, v in self.headers.items()},
                body=body,
            )
        )
        time.sleep(fake.delay)
        if fake.drip is not None:
            self._drip(fake.drip)
            return
        fault = fake.take_fault(self.command, path)
        if fault is not None:
            if fault.status == 0:
                self.close_connection = True
                return
            self._send(fault.status, fault.body, fault.headers)
            return
        if path in fake.redirect:
            self._send(307, b"", {"Location": fake.redirect[path]})
            return
        if path in fake.fixed:
            self._send(200, *fake.fixed[path])
            return
        if path == "/token":
            self._token(values | dict(urllib.parse.parse_qsl(body)))
            return
        match = re.fullmatch(r"/v2/(?P<name>.+)/(?P<kind>tags|manifests|blobs)/(?P<what>[^/]+)", path)
        name = match["name"] if match else ""
        if not self._allowed(name, authorization):
            return
        if path == "/v2/":
            self._send(200, b"{}")
            return
        repository = fake.repositories.get(name)
        if match is None or repository is None:
            self._error(404, "NAME_UNKNOWN", "repository name not known to registry")
        elif match["kind"] == "tags":
            self._tags(name, repository, values)
        elif match["kind"] == "manifests":
            self._manifest(repository, match["what"])
        else:
            self._blob(repository, match["what"])

    def _drip(self, where: str) -> None:
        self.close_connection = True
        self.wfile.write(b"HTTP/1.1 200 OK\r\n")
        self.wfile.write(b"X-Slow: " if where == "header" else b"Transfer-Encoding: chunked\r\n\r\n5;")
        for _ in range(200):
            self.wfile.write(b"a")
            self.wfile.flush()
            time.sleep(0.05)

    # Authentication.

    def _token(self, values: dict[str, str]) -> None:
        fake = self.server.fake
        user = None
        scheme, _, credentials = (self.headers.get("Authorization") or "").partition(" ")
        if scheme == "Basic":
            user, _, password = base64.b64decode(credentials).decode().partition(":")
            if fake.users.get(user) != password:
                self._error(401, "UNAUTHORIZED", "incorrect username or password")
                return
        elif values.get("grant_type") == "refresh_token":
            if values.get("refresh_token") not in fake.identity_tokens:
                self._error(401, "UNAUTHORIZED", "refresh token not known")
                return
            user = "<identity>"
        elif fake.token_refuses_anonymous:
            self._error(401, "UNAUTHORIZED", "no anonymous access")
            return
        answer: dict[str, Any] = {fake.token_field: fake.issue(user, values.get("scope", ""))}
        if fake.token_expires is not None:
            answer["expires_in"] = fake.token_expires
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _allowed(self, name: str, authorization: str | None) -> bool:
        fake = self.server.fake
        if fake.auth is None:
            return True
        scheme, _, credentials = (authorization or "").partition(" ")
        needs_user = name in fake.private
        if scheme == "Basic" and fake.auth in ("basic", "both", "two-headers"):
            user, _, password = base64.b64decode(credentials).decode().partition(":")
            if fake.users.get(user) == password:
                return True
        if scheme == "Bearer" and fake.auth != "basic" and not fake.take_rejection():
            claim = json.loads(base64.urlsafe_b64decode(credentials))
            if f"repository:{name}:{fake.actions}" in claim["scope"].split() and (claim["user"] or not needs_user):
                return True
        if fake.auth == "basic" and fake.private and not needs_user:
            return True
        realm = fake.realm or f"{fake.url}/token"
        bearer = f'Bearer realm="{realm}",service="fake, registry",scope="repository:{name}:{fake.actions}"'
        basic = 'Basic realm="fake \\"registry\\""'
        challenges = {
            "bearer": [bearer],
            "basic": [basic],
            "both": [f"{basic}, {bearer}"],
            "two-headers": [basic, bearer],
            "no-header": [],
            "raw": [fake.challenge.replace("{realm}", realm).replace("{name}", name)],
        }[fake.auth]
        error = {"errors": [{"code": "UNAUTHORIZED", "message": "authentication required"}]}
        self._send(401, json.dumps(error).encode(), [("WWW-Authenticate", c) for c in challenges])
        return False

    # The distribution API.

    def _tags(self, name: str, repository: Repository, query: dict[str, str]) -> None:
        fake = self.server.fake
        tags: list[Any] = [*sorted(repository.tags), *fake.listed_tags.get(name, [])]
        headers = {"Content-Type": "application/json"}
        asked = int(query["n"]) if query.get("n", "").isdigit() else None
        size = min((s for s in (asked, fake.page_size) if s is not None), default=None)
        base = f"/v2/{name}/tags/list"
        if fake.paging == "endless":
            number = int(query.get("last") or 0)
            page: list[Any] = [str(number + i + 1) for i in range(size or 10)]
            headers["Link"] = f'<{base}?last={number + len(page)}>; rel="next"'
        elif fake.paging == "whole":
            page = tags
        else:
            start = 0
            if query.get("last") and fake.paging != "ignore-last":
                start = next((i + 1 for i, t in enumerate(tags) if t == query["last"]), len(tags))
            page = tags[start:] if size is None else tags[start : start + size]
            more = start + len(page) < len(tags)
            if fake.paging == "link" and more:
                last = urllib.parse.quote(str(page[-1]), safe="")
                headers["Link"] = f'<{base}?n={size}&last={last}>; rel="next"'
            elif fake.paging == "circular":
                headers["Link"] = f'<{base}?{urllib.parse.urlencode(query)}>; rel="next"'
        if fake.link is not None:
            headers["Link"] = f'<{fake.link}>; rel="next"'
        self._send(200, json.dumps({"name": name, "tags": page}).encode(), headers)

    def _manifest(self, repository: Repository, what: str) -> None:
        fake = self.server.fake
        digest = repository.tags.get(what, what)
        if digest not in repository.manifests:
            self._error(404, "MANIFEST_UNKNOWN", "manifest unknown")
            return
        raw, media_type = repository.manifests[digest]
        headers = {"Content-Type": media_type}
        if fake.content_digest == "right":
            headers["Docker-Content-Digest"] = digest
        elif fake.content_digest == "wrong":
            headers["Docker-Content-Digest"] = "sha256:" + "0" * 64
        self._send(200, self._spoilt(digest, raw), headers)

    def _blob(self, repository: Repository, digest: str) -> None:
        fake = self.server.fake
        if digest not in repository.blobs:
            self._error(404, "BLOB_UNKNOWN", "blob unknown to registry")
            return
        if fake.redirect_blobs is not None:
            self._send(307, b"", {"Location": f"{fake.redirect_blobs}{self.path}?signature=secret"})
            return
        data = self._spoilt(digest, repository.blobs[digest])
        headers = {"Content-Type": "application/octet-stream", "Docker-Content-Digest": digest}
        status = 200
        first = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        body = memoryview(data)
        if first and fake.ranges:
            start = int(first[1])
            if start >= len(data):
                self._send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
                return
            status, body = 206, body[start:]
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        cut = fake.take_truncation(digest) if self.command == "GET" else None
        self._send(status, body, headers, cut=cut)

    def _spoilt(self, digest: str, data: bytes) -> bytes:
        if digest in self.server.fake.corrupt and data:
            return data[:-1] + bytes([data[-1] ^ 1])
        return data

    # HTTP.

    def _error(self, status: int, code: str, message: str) -> None:
        body = json.dumps({"errors": [{"code": code, "message": message}]}).encode()
        self._send(status, body, {"Content-Type": "application/json"})

    def _send(
        self,
        status: int,
        body: bytes | memoryview,
        headers: dict[str, str] | list[tuple[str, str]] | None = None,
        *,
        cut: int | None = None,
    ) -> None:
        fake = self.server.fake
        self.send_response(status)
        for name, value in headers.items() if isinstance(headers, dict) else headers or []:
            self.send_header(name, value)
        if fake.content_length:
            self.send_header("Content-Length", str(len(body)))
        else:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        if self.command == "HEAD":
            return
        if cut is not None and cut < len(body):
            body = body[:cut]
            self.close_connection = True
        if fake.slow is None:
            self.wfile.write(body)
        else:
            piece, seconds = fake.slow
            for start in range(0, len(body), piece):
                self.wfile.flush()
                time.sleep(seconds)
                self.wfile.write(body[start : start + piece])
        self.wfile.flush()

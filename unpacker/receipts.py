"""Receipts: what was published where, attached in a registry, so that who looks at an image there finds its path.

A receipt is a small artefact (one JSON layer, the empty config) whose *subject* is the image, as the OCI image
specification 1.1 has it (`manifest.md`, "Guidelines for Artifact Usage"). It is pushed with oras and found by any tool
that lists referrers:

    oras discover registry.example.org/org/tool:1.0

A receipt says nothing but what the record says, so that attaching it again is attaching the same bytes. Importing this
module imports oras, which takes a fifth of a second: do so only where receipts are enabled.
"""

from __future__ import annotations

import json
import os
import ssl
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

import httpx
import requests
import urllib3
from oras.container import Container
from oras.provider import Registry as OrasRegistry

from unpacker.contracts import Registry
from unpacker.digest import Digest
from unpacker.errors import Denied, NotFound, RegistryError, SettingsError
from unpacker.multiarch import Place
from unpacker.oci import OCI_INDEX, OCI_MANIFEST, Descriptor
from unpacker.record import Published, Unreadable
from unpacker.reference import Reference, Repository
from unpacker.registry.address import why_refused
from unpacker.registry.auth import Doorkeeper, Endpoint
from unpacker.registry.client import Access
from unpacker.registry.credentials import Keychain
from unpacker.registry.retry import Gate, Later, Policy, Unreachable
from unpacker.registry.transport import Answer, Origin, Refused, Transport
from unpacker.resolve import unforeseen

ARTIFACT_TYPE = "application/vnd.unpacker.receipt.v1+json"
EMPTY_TYPE = "application/vnd.oci.empty.v1+json"
SCHEMA = 1
_EMPTY = b"{}"
_INDEX_LIMIT = 4 << 20
"""Bytes of a list of referrers: what the distribution specification asks registries to take as a manifest."""
_ANSWER_LIMIT = 64 << 10
_ATTEMPTS = 3
_BUDGET = 120.0
"""Seconds for one receipt, waiting included: a note about a publish must not hold up the next one."""
_ROUNDS = 5
"""How often a list of referrers is merged again because others write it at the same time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What one publish came to, for people who know the image by its registry.

    `path` is the public path with the target in front, `root` the root's path below the target, `published` Unix time.
    """

    reference: str
    path: str
    digest: str
    image_id: str
    platform: str
    root: str
    published: int
    tool: str

    @classmethod
    def of(cls, published: Published, target: str) -> Receipt:
        """`target` is the published root as its users see it, such as `/cvmfs/unpacked.example.org`."""
        return cls(
            reference=str(published.reference),
            path=f"{target.rstrip('/')}/{published.public_path}",
            digest=published.digest,
            image_id=published.image_id,
            platform=str(published.platform),
            root=published.root,
            published=published.published,
            tool=published.tool,
        )

    @property
    def created(self) -> str:
        """RFC 3339, as the pre-defined annotation `org.opencontainers.image.created` asks for."""
        return datetime.fromtimestamp(self.published, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "reference": self.reference,
            "path": self.path,
            "digest": self.digest,
            "image_id": self.image_id,
            "platform": self.platform,
            "root": self.root,
            "published": self.published,
            "tool": self.tool,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Artefact:
    """A receipt in the form that a registry stores: a manifest and the two blobs it names."""

    manifest: dict[str, Any]
    blobs: tuple[tuple[dict[str, Any], bytes], ...]
    """Descriptor and bytes of each blob."""

    @property
    def entry(self) -> dict[str, Any]:
        """The descriptor under which a list of referrers names it; distribution specification, "Listing Referrers":
        with the manifest's artifactType and annotations."""
        raw = serialise(self.manifest)
        return {
            "mediaType": OCI_MANIFEST,
            "digest": str(Digest.of(raw)),
            "size": len(raw),
            "artifactType": ARTIFACT_TYPE,
            "annotations": self.manifest["annotations"],
        }


def artefact(receipt: Receipt, subject: Descriptor) -> Artefact:
    """Puts a receipt into the form of an artefact about `subject`; the same receipt gives the same bytes."""
    layer = serialise(receipt.to_json())
    title = {"org.opencontainers.image.title": "receipt.json"}  # the file name that `oras pull` gives it
    layer_descriptor = _descriptor(ARTIFACT_TYPE, layer) | {"annotations": title}
    config = _descriptor(EMPTY_TYPE, _EMPTY)
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "artifactType": ARTIFACT_TYPE,
        "config": config,
        "layers": [layer_descriptor],
        "subject": {**subject.to_json(), "mediaType": subject.media_type or OCI_MANIFEST},
        "annotations": {
            "org.opencontainers.image.created": receipt.created,
            # In the list of referrers too, so that the path is seen without fetching anything.
            "vnd.unpacker.receipt.image": receipt.reference,
            "vnd.unpacker.receipt.path": receipt.path,
        },
    }
    return Artefact(manifest=manifest, blobs=((config, _EMPTY), (layer_descriptor, layer)))


def serialise(document: dict[str, Any]) -> bytes:
    """The one spelling of a document, so that equal documents have equal digests."""
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode("ascii")


def _descriptor(media_type: str, data: bytes) -> dict[str, Any]:
    return Descriptor(media_type=media_type, digest=Digest.of(data), size=len(data)).to_json()


def referrers_tag(subject: Digest) -> str:
    """The tag of the list of referrers where a registry keeps none itself: distribution specification 1.1,
    "Referrers Tag Schema": the algorithm cut to 32 characters, the hex to 64."""
    return f"{subject.algorithm[:32]}-{subject.hex[:64]}"


def with_entry(index: dict[str, Any] | None, entry: dict[str, Any]) -> dict[str, Any] | None:
    """The list of referrers with `entry` in it, None if it is there already.

    What others wrote stays as it is, keys we do not know included. An older receipt for the same path is replaced:
    the same image composed again lies at the same path in another root, and the older one is no longer true.
    """
    if index is None:
        return {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entry]}
    present = index["manifests"]
    if any(isinstance(e, dict) and e.get("digest") == entry["digest"] for e in present):
        return None
    return index | {"manifests": [e for e in present if not _same_path(e, entry)] + [entry]}


def _same_path(one: Any, other: dict[str, Any]) -> bool:
    if not isinstance(one, dict) or one.get("artifactType") != ARTIFACT_TYPE:
        return False
    annotations = one.get("annotations")
    key = "vnd.unpacker.receipt.path"
    return isinstance(annotations, dict) and annotations.get(key) == other["annotations"][key]


class Receipts:
    """Attaches receipts: to the images in their own registries, or all in one `repository` of the operator's choice.

    `access` is that of the registry client, so that the same rules say who is called and whose credentials go where.
    SettingsError if `repository` is no repository's name. Safe from many threads; receipts for one repository are
    attached one after another. `close()` ends it, waiting for a next attempt included.
    """

    def __init__(self, access: Access, repository: str | None = None, *, budget: float = _BUDGET) -> None:
        try:
            self._repository = Repository.parse(repository) if repository is not None else None
        except ValueError as error:
            raise SettingsError(f"receipts.repository: {error}") from None
        self.timeout = access.timeout
        self.budget = budget
        self.keychain = Keychain(access.docker_config, os.environ)
        self.transport = Transport(timeout=access.timeout, insecure_registries=access.insecure_registries)
        self._closing = threading.Event()
        attempts = min(access.attempts, _ATTEMPTS)
        self.policy = Policy(attempts=attempts, backoff=access.backoff, closing=self._closing)
        self._lock = threading.Lock()
        self._gates: dict[Repository, Gate] = {}

    def close(self) -> None:
        self._closing.set()
        self.transport.close()

    def attach(self, published: Published, subject: Descriptor, target: str) -> str:
        """Attaches the receipt of one publish and gives the artefact's digest; again is no change.

        `subject` is what the image's registry said of the tag (media type, digest, size), `target` the published root
        as its users see it. Raises RegistryError, and no other error of this program.

        In a repository of the operator's choice there is no manifest that the subject names, which the specification
        allows: a registry takes it, and lists the receipt as a referrer of that digest all the same. There the list is
        kept under its tag in any case, for people to find by the digest and so that no clean-up of untagged manifests
        takes the receipts.
        """
        if str(subject.digest) != published.digest:
            raise RegistryError(f"attach a receipt to {published.reference}: it is now {subject.digest}, not published")
        repository = self._repository or published.reference.repository
        attached = artefact(Receipt.of(published, target), subject)
        what = f"attach a receipt for {published.reference} in {repository}"
        with self._lock:
            gate = self._gates.setdefault(repository, Gate(1, self._closing))
        try:
            with gate.slots:
                gate.wait(what)
                with _Pusher(self._endpoint(repository), what, self) as pusher:
                    listed = pusher.push(attached)
                    if self._repository is not None or not listed:
                        pusher.add_referrer(attached.entry, referrers_tag(subject.digest))
        except RegistryError as error:
            if error.temporary and error.status is None:
                # No answer is as good as no connection: otherwise a thousand receipts would each be waited for.
                gate.failed(Unreachable(str(error)))
            raise
        except SettingsError as error:  # of a credential helper, asked only now
            raise RegistryError(f"{what}: {error}") from None
        except OSError as error:
            raise RegistryError(f"{what}: cannot write a temporary file: {error.strerror}") from None
        return str(attached.entry["digest"])

    def _endpoint(self, repository: Repository) -> Endpoint:
        # Never a mirror: a pull-through cache takes no pushes, and its list of referrers may be old.
        url = httpx.URL(f"{repository.scheme}://{repository.api_host}")
        return Endpoint(origin=Origin.of(url), name=repository.api_name)


class _Pusher(OrasRegistry):  # type: ignore[misc]  # oras has no complete annotations
    """oras, held to our rules, for one attach in one repository.

    oras knows how blobs and manifests are uploaded; every request of it goes through `do_request`, which is ours: the
    original has no timeout, tries every error five times, keeps one token for all repositories, reads credentials of
    its own and sends Authorization wherever an upload is directed.
    """

    def __init__(self, endpoint: Endpoint, what: str, owner: Receipts) -> None:
        super().__init__(insecure=endpoint.origin.scheme == "http")
        self._endpoint = endpoint
        self._what = what
        self._transport = owner.transport
        # One for each attach, so that no token for pushing is used, or asked for, anywhere else.
        self._doorkeeper = Doorkeeper(owner.transport, owner.keychain)
        self._policy = owner.policy
        self._timeout = owner.timeout
        self._deadline = time.monotonic() + owner.budget
        self._authorities = authorities(os.environ)
        # Without this, requests looks for credentials in ~/.netrc by itself.
        self.session.auth = _leave_as_is

    def __enter__(self) -> _Pusher:
        return self

    def __exit__(self, *_: object) -> None:
        self.session.close()

    def push(self, attached: Artefact) -> bool:
        """Uploads blobs, then the manifest; gives whether the registry itself lists it among the subject's referrers:
        it then answers with `OCI-Subject` (distribution specification, "Pushing Manifests with Subject")."""
        with tempfile.TemporaryDirectory(prefix="unpacker-receipt-") as directory:
            path = os.path.join(directory, "blob")  # oras uploads files
            for descriptor, data in attached.blobs:
                with open(path, "wb") as file:
                    file.write(data)
                try:
                    self.upload_blob(path, self._container("latest"), descriptor)
                except ValueError:
                    raise RegistryError(f"{self._what}: it did not say where to upload a blob") from None
        digest = attached.entry["digest"]
        answer = self.upload_manifest(attached.manifest, self._container(digest))
        return bool(answer.headers.get("OCI-Subject") == attached.manifest["subject"]["digest"])

    def add_referrer(self, entry: dict[str, Any], tag: str) -> None:
        """Puts an entry into the list of referrers under its tag, and what others put there stays.

        There is no lock and no conditional request that registries agree on. So the list is read again after it was
        written, and merged again if somebody else's took its place; who writes an old list later still can take an
        entry out, which the specification accepts. The artefact itself stays.
        """
        url = f"{self.prefix}://{self._container(tag).manifest_url()}"
        for _ in range(_ROUNDS):
            updated = with_entry(self._read_index(url, tag), entry)
            if updated is None:
                return
            self.do_request(url, "PUT", data=serialise(updated), headers={"Content-Type": OCI_INDEX})
        raise RegistryError(f"{self._what}: others keep changing the list {tag}", temporary=True)

    def _read_index(self, url: str, tag: str) -> dict[str, Any] | None:
        answer = self.do_request(url, "GET", headers={"Accept": f"{OCI_INDEX}, {OCI_MANIFEST}"})
        if answer.status_code == 404:
            return None
        try:
            index = json.loads(answer.content)
        except (ValueError, RecursionError):
            index = None
        if (
            not isinstance(index, dict)
            or not isinstance(index.get("manifests"), list)
            or index.get("mediaType", OCI_INDEX) != OCI_INDEX
        ):
            raise RegistryError(f"{self._what}: the tag {tag} is no list of referrers; it was left as it is")
        return index

    def _container(self, reference: str) -> Container:
        # Never parsed from text: oras takes `localhost/x` for a repository of Docker Hub, and a first part with a dot
        # for a registry.
        container = Container("placeholder", registry=self._endpoint.host)
        namespace, _, repository = self._endpoint.name.rpartition("/")
        container.namespace, container.repository = namespace or None, repository
        container.tag, container.digest = reference, None
        return container

    def do_request(
        self,
        url: str,
        method: str = "GET",
        data: bytes | None = None,
        headers: dict[str, str] | None = None,
        json: dict[str, Any] | None = None,
        stream: bool = False,
    ) -> requests.Response:
        """One request: authorised, in bounded time, tried again where waiting may help. The response is a success, or
        a 404 to a question; everything else is raised as RegistryError."""
        body = serialise(json) if json is not None else data
        response: requests.Response = self._policy.run(lambda: self._attempt(method, url, body, headers or {}))
        return response

    def _attempt(self, method: str, url: str, body: bytes | None, headers: Mapping[str, str]) -> requests.Response:
        try:
            return self._authorised(method, url, body, headers)
        except Later as error:
            if time.monotonic() + (error.retry_after or 0) < self._deadline:
                raise
            raise RegistryError(f"{error}; given up for this time", status=error.status, temporary=True) from None

    def _authorised(self, method: str, url: str, body: bytes | None, headers: Mapping[str, str]) -> requests.Response:
        url = self._at_home(url)
        grant = self._doorkeeper.grant(self._endpoint, anonymous=False, what=self._what)
        response = self._send(method, url, body, headers, grant.header)
        if response.status_code == 401:
            refusal = self._answer(response)
            renewed = self._doorkeeper.answer(self._endpoint, refusal, grant, anonymous=False, what=self._what)
            if renewed is not None:
                grant = renewed
                response = self._send(method, url, body, headers, grant.header)
        if response.ok and not response.is_redirect:
            return response
        if response.status_code == 404 and method in ("GET", "HEAD"):
            return response
        failure = self._answer(response).failure(grant.secrets)
        if isinstance(failure, Denied):
            why = self._doorkeeper.why_anonymous(self._endpoint)
            raise Denied(f"{failure}{why}", status=failure.status)
        raise failure

    def _at_home(self, url: str) -> str:
        """The URL, which must lead to the registry itself: where an upload goes is its choice, and it could choose any
        host that this one can reach."""
        own = self._endpoint.origin
        try:
            parsed = httpx.URL(url)
            named = Origin.of(parsed)
        except (httpx.InvalidURL, ValueError):
            raise RegistryError(f"{self._what}: told to upload to what is no URL") from None
        # A registry behind a proxy that ends TLS often believes itself to be plain http: its path is taken, its scheme
        # is not.
        same = named.host == own.host and (named.port == own.port or {named.port, own.port} == {80, 443})
        if not same or parsed.userinfo:
            raise Refused(f"{self._what}: told to upload to another host: refused")
        return str(httpx.URL(self._endpoint.url("")).copy_with(raw_path=parsed.raw_path))

    def _send(
        self, method: str, url: str, body: bytes | None, headers: Mapping[str, str], authorization: str
    ) -> requests.Response:
        if authorization and not self._transport.may_carry_secrets(self._endpoint.origin):
            raise Refused(f"{self._what}: credentials are not sent over plain http (list the host as insecure)")
        if (reason := why_refused(self._endpoint.origin.host)) is not None:
            raise Refused(f"{self._what}: {self._endpoint.host} is never called: {reason}")
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise RegistryError(f"{self._what}: given up for this time, because it takes too long")
        wait = min(self._timeout, left)
        try:
            response: requests.Response = self.session.request(
                method,
                url,
                data=body,
                headers={**headers, "Accept-Encoding": "identity", "User-Agent": "unpacker"}
                | ({"Authorization": authorization} if authorization else {}),
                timeout=(min(wait, 20.0), wait),
                allow_redirects=False,
                stream=True,
                verify=self._authorities,
            )
            # Read here, bounded; later accesses to `content` find it.
            response._content = self._read(response, _INDEX_LIMIT if method == "GET" else _ANSWER_LIMIT)
        except requests.exceptions.SSLError:
            raise RegistryError(f"{self._what}: its certificate is not one to trust") from None
        except (requests.ConnectionError, requests.Timeout) as error:
            raise Later(f"{self._what}: {_words(error)}") from None
        except urllib3.exceptions.HTTPError:
            raise Later(f"{self._what}: the answer broke off") from None
        except requests.RequestException as error:
            raise RegistryError(f"{self._what}: not a request that can be sent ({type(error).__name__})") from None
        return response

    def _read(self, response: requests.Response, limit: int) -> bytes:
        body = bytearray()
        try:
            # iter_content would wait for a whole piece, however slowly its bytes come.
            while piece := response.raw.read1(65536, decode_content=False):
                body += piece
                if len(body) > limit:
                    raise RegistryError(f"{self._what}: an answer longer than the limit of {limit} bytes")
                if time.monotonic() > self._deadline:
                    raise RegistryError(f"{self._what}: the answer did not come in time")
        finally:
            response.close()
        return bytes(body)

    def _answer(self, response: requests.Response) -> Answer:
        """The response in the form that our own client's rules read."""
        copied = httpx.Response(
            response.status_code,
            headers=list(response.headers.items()),
            stream=httpx.ByteStream(response.content),
            request=httpx.Request(str(response.request.method), self._endpoint.url("")),
        )
        what = f"{self._what}: {response.request.method}"
        return Answer(copied, what, self._endpoint.origin, self._timeout)


class Attached(NamedTuple):
    """What came of attaching one receipt. `is_gone`: no registry has the image (any more), so it cannot have one."""

    public_path: str
    error: str = ""
    is_gone: bool = False


def attach_again(
    published: Iterable[Published | Unreadable],
    registry: Registry,
    attach: Callable[[Published, Descriptor], object],
    executor: Executor,
) -> Iterator[Attached]:
    """Attaches the receipts of what stands published; tells what came of each image. Fronts are none."""

    def one(record: Published | Unreadable) -> Attached:
        name = record.public_path
        if isinstance(record, Unreadable):
            return Attached(name, error=record.problem)
        try:
            subject = Reference(repository=record.reference.repository, digest=Digest.parse(record.digest))
            try:
                found = registry.head(subject)
            except NotFound:
                return Attached(name, is_gone=True)
            attach(record, found)
        except Exception as error:  # noqa: BLE001 - whatever it is, the others get theirs
            return Attached(name, error=str(unforeseen(error)))
        return Attached(name)

    return executor.map(one, [p for p in published if isinstance(p, Unreadable) or p.place is not Place.FRONT])


def authorities(environment: Mapping[str, str]) -> str | bool:
    """Whom requests shall trust, by the same order as our own client: SSL_CERT_FILE, SSL_CERT_DIR, REQUESTS_CA_BUNDLE,
    the system's authorities; True leaves it to requests, which brings certifi's."""
    defaults = ssl.get_default_verify_paths()
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE"):
        if environment.get(name):
            return environment[name]
    if defaults.cafile is not None:
        return defaults.cafile
    if defaults.capath is not None and os.listdir(defaults.capath):
        return defaults.capath
    return True


def _leave_as_is(request: requests.PreparedRequest) -> requests.PreparedRequest:
    return request


def _words(error: requests.RequestException) -> str:
    if isinstance(error, requests.ConnectTimeout):
        return "no connection in time"
    if isinstance(error, requests.Timeout):
        return "no answer in time"
    if isinstance(error, requests.exceptions.ProxyError):
        return "the proxy refused"
    return "the connection could not be made, or broke"

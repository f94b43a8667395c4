"""Registries that lie, stall, flood, or send us elsewhere: refused, bounded, and never shown a secret."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from contextlib import closing
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fake_registry import FakeRegistry
from tests.images import file, image, layer
from unpacker.digest import Digest
from unpacker.errors import Denied, ImageError, IntegrityError, RegistryError, UnpackerError
from unpacker.limits import Limits
from unpacker.oci import Descriptor
from unpacker.reference import Reference, Repository
from unpacker.registry import address
from unpacker.registry import client as client_module
from unpacker.registry.address import why_refused
from unpacker.registry.auth import parse_challenges
from unpacker.registry.client import Access, Client
from unpacker.registry.transport import printable

APP = image(layer(file("etc/motd", b"hello\n")))
DIGEST = Digest.parse(APP.digest)
SECRETS = ("s3cret", "refresh-me")


@pytest.fixture
def client() -> Iterator[Client]:
    with closing(Client(Access(backoff=0.001, timeout=0.5, attempts=3))) as client:
        yield client


@pytest.fixture
def trusting(tmp_path: Path, registry: FakeRegistry) -> Iterator[Client]:
    """A client with credentials for the registry."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"auths": {registry.host: {"username": "ada", "password": "s3cret"}}}))
    registry.users = {"ada": "s3cret"}
    with closing(Client(Access(docker_config=str(path), backoff=0.001, timeout=2, attempts=2))) as client:
        yield client


def place(registry: FakeRegistry) -> Repository:
    return Repository.parse(f"{registry.url}/org/app")


def app(registry: FakeRegistry) -> Reference:
    return Reference(repository=place(registry), tag="1.0")


def blob(data: bytes) -> Descriptor:
    return Descriptor(media_type="", digest=Digest.of(data), size=len(data))


def read(client: Client, registry: FakeRegistry, descriptor: Descriptor) -> bytes:
    with client.blob(place(registry), descriptor) as stream:
        return b"".join(iter(lambda: stream.read(1 << 18), b""))


# Tag lists.


def test_a_next_page_on_another_host_is_refused(client: Client, registry: FakeRegistry) -> None:
    registry.add("org/app", "1.0", APP)
    with FakeRegistry() as other:
        for link in (f"{other.url}/v2/org/app/tags/list", f"//{other.host}/x", "http://user:pw@localhost/", "ftp://x/"):
            registry.link = link
            with pytest.raises(RegistryError, match="another host: refused"):
                client.tags(place(registry))
        assert other.requests == []


@pytest.mark.timeout(20)
@pytest.mark.parametrize("link", ["</x>;a" + " " * 7000 + "!", "</x>" + ';rel="' * 1300, "<" * 8000, "</x>;" * 1600])
def test_no_link_header_takes_long_to_read(client: Client, registry: FakeRegistry, link: str) -> None:
    registry.fixed["/v2/org/app/tags/list"] = (b'{"tags": ["1.0"]}', {"Link": link})
    before = time.monotonic()
    assert client.tags(place(registry)) == ["1.0"]
    assert time.monotonic() - before < 5
    registry.fixed["/v2/org/app/tags/list"] = (b'{"tags": ["1.0"]}', {"Link": link + " " * 9000 + "x"})
    with pytest.raises(RegistryError, match="too long"):
        client.tags(place(registry))


@pytest.mark.timeout(20)
@pytest.mark.parametrize("piece", ["a ", "a=", 'a="', "a=b,", " ", ",", 'a="\\"', "\t="])
def test_no_challenge_takes_long_to_parse(piece: str) -> None:
    before = time.monotonic()
    parse_challenges(["Bearer " + piece * (90_000 // len(piece))])
    assert time.monotonic() - before < 5


def test_pages_without_end_are_an_error_not_a_list(
    client: Client, registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "_TAGS", 5_000)
    registry.add("org/app", "1.0", APP)
    registry.paging = "endless"
    with pytest.raises(RegistryError, match=r"no end after 5010 tags on [0-9]+ pages"):
        client.tags(place(registry))


def test_empty_pages_without_end_are_an_error(
    client: Client, registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "_PAGES", 20)
    for i in range(30):
        link = {"Link": f'</v2/org/app/tags/list?last={i}>; rel="next"'}
        registry.fault(status=200, body=b'{"tags": []}', headers=link)
    with pytest.raises(RegistryError, match="no end after 0 tags on 21 pages"):
        client.tags(place(registry))


def test_pages_in_a_circle_are_an_error(client: Client, registry: FakeRegistry) -> None:
    registry.add("org/app", "1.0", APP)
    registry.paging = "circular"
    with pytest.raises(RegistryError, match="circles"):
        client.tags(place(registry))
    assert registry.count() == 1


def test_hostile_names_are_listed_as_they_are(client: Client, registry: FakeRegistry) -> None:
    """Who asked reports those outside the grammar; here they must not break the paging."""
    hostile = ["../../etc", "a b", "x\x00y", "ü", "\ud800", "a&n=1#?", ".wh.x", "", "a" * 5000]
    registry.add("org/app", "1.0", APP)
    registry.listed_tags["org/app"] = hostile
    registry.paging, registry.page_size = "whole", None
    assert client.tags(place(registry)) == ["1.0", *hostile]
    registry.listed_tags["org/app"] = ["\ud800&n=1"] * 50 + [f"\ud800 #{i}" for i in range(49)]
    assert len(client.tags(place(registry))) == 51


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{}", b'{"tags": {}}', b'{"tags": [1]}', b'{"tags": [null]}', b"\xff", b"[" * 100_000]
)
def test_what_is_no_tag_list_is_an_error(client: Client, registry: FakeRegistry, body: bytes) -> None:
    registry.fixed["/v2/org/app/tags/list"] = (body, {})
    with pytest.raises(RegistryError, match="listing the tags of org/app"):
        client.tags(place(registry))


def test_a_huge_page_is_not_read(client: Client, registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_PAGE_BYTES", 1000)
    registry.fixed["/v2/org/app/tags/list"] = (b'{"tags": ["' + b"a" * 5000 + b'"]}', {})
    with pytest.raises(RegistryError, match="longer than the limit"):
        client.tags(place(registry))


# Manifests and blobs.


@pytest.mark.parametrize("content_length", [True, False])
def test_a_huge_manifest_is_not_read(registry: FakeRegistry, content_length: bool) -> None:
    huge = registry.add_manifest("org/app", "1.0", b"{" + b" " * 100_000 + b"}", "application/json")
    registry.content_length = content_length
    registry.content_digest = "missing"
    with closing(Client(Access(backoff=0.001, limits=Limits(manifest=50_000)))) as client:
        with pytest.raises(ImageError, match="longer than the limit of 50000 bytes"):
            client.manifest(place(registry), Digest.parse(huge))
        with pytest.raises(ImageError, match="longer than the limit of 50000 bytes"):
            client.head(app(registry))


def test_a_manifest_with_other_bytes_is_refused(client: Client, registry: FakeRegistry) -> None:
    registry.corrupt.add(registry.add("org/app", "1.0", APP))
    with pytest.raises(IntegrityError, match=f"reading manifest {DIGEST} of org/app"):
        client.manifest(place(registry), DIGEST)


def test_a_digest_in_a_header_is_not_believed_over_the_one_asked_for(client: Client, registry: FakeRegistry) -> None:
    registry.add("org/app", "1.0", APP)
    registry.content_digest = "wrong"
    with pytest.raises(IntegrityError, match="answers with sha256:0000"):
        client.head(Reference(repository=place(registry), digest=DIGEST))
    assert client.manifest(place(registry), DIGEST)[0] == APP.manifest


@pytest.mark.parametrize("value", ["", "sha256:short", "md5:00", "sha256:" + "Z" * 64, "\xff"])
def test_a_digest_that_is_none_is_not_used(client: Client, registry: FakeRegistry, value: str) -> None:
    headers = {"Docker-Content-Digest": value}
    registry.fixed["/v2/org/app/manifests/1.0"] = (APP.manifest, headers)
    assert client.head(app(registry)).digest == DIGEST


def test_a_corrupted_blob_is_refused(client: Client, registry: FakeRegistry) -> None:
    registry.corrupt.add(registry.add_blob("org/app", b"x" * 1_000_000))
    with pytest.raises(IntegrityError, match="reading blob"):
        read(client, registry, blob(b"x" * 1_000_000))


@pytest.mark.parametrize("content_length", [True, False])
@pytest.mark.parametrize("length", [0, 999_999, 1_000_001])
def test_a_blob_of_another_size_is_refused(
    client: Client, registry: FakeRegistry, content_length: bool, length: int
) -> None:
    wanted = blob(b"x" * 1_000_000)
    registry.content_length = content_length
    registry.repository("org/app").blobs[str(wanted.digest)] = b"x" * length
    with pytest.raises((IntegrityError, RegistryError)):
        read(client, registry, wanted)


def test_the_rest_of_another_blob_is_refused(client: Client, registry: FakeRegistry) -> None:
    data, other = b"x" * 500_000, b"y" * 500_000
    digest = registry.add_blob("org/app", data)
    registry.truncate(100_000)
    with client.blob(place(registry), blob(data)) as stream:
        got = stream.read(1000)
        registry.repository("org/app").blobs[digest] = other
        with pytest.raises(IntegrityError):
            while piece := stream.read(1 << 18):
                got += piece
    assert len(got) < len(data)


@pytest.mark.parametrize("content_range", ["bytes 0-99/100", "bytes x", ""])
def test_another_range_than_asked_for_is_refused(client: Client, registry: FakeRegistry, content_range: str) -> None:
    registry.add_blob("org/app", b"x" * 1000)
    registry.truncate(500)
    with client.blob(place(registry), blob(b"x" * 1000)) as stream:
        registry.fault(status=206, times=9, body=b"x" * 500, headers={"Content-Range": content_range})
        with pytest.raises(RegistryError, match="another range"):
            while stream.read(1000):
                pass


def test_encoded_bodies_are_neither_asked_for_nor_decoded(client: Client, registry: FakeRegistry) -> None:
    """A bomb in the transport's own compression would otherwise go off before any digest is checked."""
    digest = Digest.of(b"bomb")
    registry.fixed[f"/v2/org/app/blobs/{digest}"] = (b"bomb", {"Content-Encoding": "gzip"})
    assert read(client, registry, blob(b"bomb")) == b"bomb"
    assert registry.requests[0].headers["accept-encoding"] == "identity"


def test_a_body_that_stalls_is_given_up(client: Client, registry: FakeRegistry) -> None:
    registry.add_blob("org/app", b"x" * 3000)
    registry.slow = (1000, 0.8)
    before = time.monotonic()
    with pytest.raises(RegistryError, match="no answer in time") as caught:
        read(client, registry, blob(b"x" * 3000))
    assert caught.value.temporary
    assert time.monotonic() - before < 10


def test_a_body_that_trickles_is_given_up(client: Client, registry: FakeRegistry) -> None:
    """Each byte comes in time, the whole never would."""
    registry.slow = (1, 0.05)
    registry.add("org/app", "1.0", APP)
    before = time.monotonic()
    with pytest.raises(RegistryError, match="less than 1024 bytes/s"):
        client.manifest(place(registry), DIGEST)
    assert time.monotonic() - before < 10


@pytest.mark.parametrize("where", ["header", "chunk"])
def test_an_answer_that_drips_is_given_up(client: Client, registry: FakeRegistry, where: str) -> None:
    """No byte is late, but the header, or the chunk, never ends."""
    registry.drip = where
    before = time.monotonic()
    with pytest.raises(RegistryError, match="no answer in time") as caught:
        client.manifest(place(registry), DIGEST)
    assert caught.value.temporary
    assert time.monotonic() - before < 5


def test_a_slow_body_that_comes_is_read(client: Client, registry: FakeRegistry) -> None:
    registry.add_blob("org/app", b"x" * 50_000)
    registry.slow = (5_000, 0.06)
    assert read(client, registry, blob(b"x" * 50_000)) == b"x" * 50_000


# Addresses.


@pytest.mark.parametrize(
    "host",
    [
        "169.254.169.254", "169.254.0.1", "[fe80::1]", "[fe80::1%eth0]", "[::ffff:169.254.169.254]", "[fd00:ec2::254]",
        "[64:ff9b::a9fe:a9fe]", "[2002:a9fe:a9fe::1]", "100.100.100.200", "168.63.129.16", "metadata.google.internal",
        "Metadata.Google.Internal.", "instance-data.ec2.internal", "0.0.0.0", "0.1.2.3", "[::]", "224.0.0.1",
        "[ff02::1]", "255.255.255.255", "[::ffff:0.0.0.0]",
    ],
)  # fmt: skip
def test_some_addresses_are_never_called(host: str) -> None:
    assert why_refused(host) is not None


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "[::1]", "10.0.0.1", "192.168.1.1", "registry.example", "[2001:db8::1]", "metadata.example"]
)
def test_other_addresses_may_be(host: str) -> None:
    assert why_refused(host) is None


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("host", ["169.254.169.254", "metadata.google.internal", "[fe80::1]:5000", "0.0.0.0:5000"])
def test_a_wish_cannot_name_them(client: Client, scheme: str, host: str) -> None:
    before = time.monotonic()
    with pytest.raises(RegistryError, match="never called") as caught:
        client.tags(Repository(registry=host, name="latest/meta-data", scheme=scheme))
    assert not caught.value.temporary
    assert time.monotonic() - before < 0.5


@pytest.mark.parametrize("target", ["http://169.254.169.254/latest", "http://[::ffff:a9fe:a9fe]/", "//0.0.0.0:1/"])
def test_a_redirect_cannot_name_them(client: Client, registry: FakeRegistry, target: str) -> None:
    registry.redirect["/v2/org/app/manifests/1.0"] = target
    with pytest.raises(RegistryError, match="never called"):
        client.head(app(registry))


def test_a_token_server_cannot_be_one(client: Client, registry: FakeRegistry) -> None:
    registry.add("org/app", "1.0", APP)
    registry.auth, registry.realm = "bearer", "http://169.254.169.254/latest/api/token"
    with pytest.raises(RegistryError, match=r"169\.254\.169\.254 is never called: it is a link-local"):
        client.head(app(registry))


def test_a_name_that_leads_to_one_gets_no_byte(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """The address behind a name is looked at when the connection stands. Loopback plays the metadata service here."""
    addresses = address._METADATA_ADDRESSES | {ip_address("127.0.0.7")}
    monkeypatch.setattr(address, "_METADATA_ADDRESSES", addresses)
    with FakeRegistry(address="127.0.0.7") as metadata:
        name = f"0x7f000007:{metadata.port}"  # a way of writing 127.0.0.7 that only the resolver understands
        assert why_refused("0x7f000007") is None
        with pytest.raises(RegistryError, match="0x7f000007 is never called: it is the address of a metadata service"):
            client.tags(Repository(registry=name, name="org/app", scheme="http"))
        assert metadata.requests == []


# Redirects.


def test_redirects_without_end_are_given_up(client: Client, registry: FakeRegistry) -> None:
    registry.redirect["/v2/org/app/manifests/1.0"] = "/v2/org/app/manifests/1.0"
    with pytest.raises(RegistryError, match="more than 5 redirects"):
        client.head(app(registry))
    assert registry.count() == 6


def test_a_body_beside_a_redirect_is_not_waited_for(client: Client, registry: FakeRegistry) -> None:
    registry.slow = (1, 0.05)
    with FakeRegistry() as quick:
        quick.add("org/app", "1.0", APP)
        registry.fault(status=307, headers={"Location": quick.url + "/v2/org/app/tags/list"}, body=b"x" * 10_000)
        before = time.monotonic()
        assert client.tags(place(registry)) == ["1.0"]
        assert time.monotonic() - before < 5


@pytest.mark.parametrize("target", ["file:///etc/passwd", "http://user:pw@127.0.0.1/", "gopher://x/"])
def test_a_redirect_to_what_is_no_registry_is_refused(client: Client, registry: FakeRegistry, target: str) -> None:
    registry.redirect["/v2/org/app/manifests/1.0"] = target
    with pytest.raises(RegistryError):
        client.head(app(registry))
    assert registry.count() == 1


def test_a_redirect_to_another_host_and_back_carries_no_credentials(trusting: Client, registry: FakeRegistry) -> None:
    registry.auth, registry.private = "basic", {"org/app"}
    registry.add("org/app", "1.0", APP)
    trusting.head(app(registry))
    registry.clear()
    with FakeRegistry() as other:
        path = "/v2/org/app/manifests/1.0"
        registry.redirect[path] = other.url + path
        other.redirect[path] = registry.url + "/v2/org/app/manifests/" + APP.digest
        with pytest.raises(Denied):
            trusting.head(app(registry))
        assert [r.authorized for r in other.requests] == [False] * len(other.requests)
        assert all(not r.authorized for r in registry.requests if r.path.endswith(APP.digest))


def test_a_challenge_from_where_a_redirect_led_gets_no_credentials(trusting: Client, registry: FakeRegistry) -> None:
    with FakeRegistry() as other:
        other.auth = "bearer"
        registry.redirect["/v2/org/app/manifests/1.0"] = other.url + "/v2/org/app/manifests/1.0"
        with pytest.raises(Denied):
            trusting.head(app(registry))
        assert [r.path for r in other.requests] == ["/v2/org/app/manifests/1.0"]


def test_a_token_server_that_redirects_takes_no_credentials_along(trusting: Client, registry: FakeRegistry) -> None:
    registry.auth = "bearer"
    registry.add("org/app", "1.0", APP)
    with FakeRegistry() as other:
        registry.redirect["/token"] = other.url + "/token"
        with pytest.raises(Denied):
            trusting.head(app(registry))
        assert [(r.path, r.authorized) for r in other.requests] == [("/token", False)]


# Secrets.


def test_plain_http_carries_no_credentials_beyond_loopback(
    registry: FakeRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy stands for the registry, which so has a name that is not loopback's."""
    registry.auth, registry.private, registry.users = "basic", {"org/app"}, {"ada": "s3cret"}
    registry.add("org/app", "1.0", APP)
    monkeypatch.setenv("HTTP_PROXY", registry.url)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"auths": {"reg.example:5000": {"username": "ada", "password": "s3cret"}}}))
    away = Reference.parse("http://reg.example:5000/org/app:1.0")
    with closing(Client(Access(docker_config=str(path), backoff=0.001))) as client:
        with pytest.raises(Denied, match="not sent over plain http"):
            client.head(away)
        assert not any(r.authorized for r in registry.requests)
    insecure = frozenset({"reg.example:5000"})
    with closing(Client(Access(docker_config=str(path), insecure_registries=insecure))) as client:
        assert client.head(away).digest == DIGEST


def test_a_token_server_on_plain_http_elsewhere_gets_no_credentials(trusting: Client, registry: FakeRegistry) -> None:
    registry.auth, registry.realm = "bearer", "http://192.0.2.1/token"
    registry.add("org/app", "1.0", APP)
    with pytest.raises(RegistryError, match=r"192\.0\.2\.1 for a token: credentials are not sent over plain http"):
        trusting.head(app(registry))


@pytest.mark.parametrize("path", ["^/v2/", "^/token$"])
@pytest.mark.parametrize("status", [400, 401, 403, 404, 429, 500])
def test_what_a_registry_says_back_is_not_repeated(
    trusting: Client, registry: FakeRegistry, path: str, status: int
) -> None:
    registry.auth = "bearer"
    registry.add("org/app", "1.0", APP)
    encoded = base64.b64encode(b"ada:s3cret").decode()
    said = f"bad password s3cret in Basic {encoded} for https://x/y?sig=s3cret \x1b[31m\nBearer s3cret " + "x" * 10_000
    body = json.dumps({"errors": [{"code": "C\x07ODE", "message": said}]}).encode()
    with pytest.raises(RegistryError) as caught:
        if path == "^/v2/":
            trusting.head(app(registry))
        registry.fault(status=status, times=9, path=path, body=body)
        trusting.manifest(place(registry), DIGEST)
    message = str(caught.value)
    assert all(c.isprintable() for c in message)
    assert len(message) < 700
    assert encoded not in message and "sig=" not in message
    if path == "^/token$":
        assert "s3cret" not in message


@pytest.mark.parametrize(
    "answer",
    [
        b"", b"[]", b"{}", b'{"token": 1}', b'{"token": ""}', b'{"token": "a\\r\\nX-Evil: 1"}', b'{"token": "\\u00e9"}',
        b'{"token": ["x"]}', b"[" * 100_000, b'{"token": "' + b"a" * 100_000 + b'"}', b" " * 2_000_000,
    ],
)  # fmt: skip
def test_what_is_no_token_is_an_error(client: Client, registry: FakeRegistry, answer: bytes) -> None:
    registry.auth = "bearer"
    registry.fixed["/token"] = (answer, {})
    with pytest.raises(RegistryError, match="is no token"):
        client.head(app(registry))


@pytest.mark.parametrize("expires", ["soon", -1, 0, 1e300, [], True])
def test_a_strange_expiry_does_no_harm(client: Client, registry: FakeRegistry, expires: Any) -> None:
    registry.auth = "bearer"
    registry.token_expires = expires
    registry.add("org/app", "1.0", APP)
    for _ in range(2):
        assert client.head(app(registry)).digest == DIGEST


@pytest.mark.parametrize(
    "challenge",
    ["", "Bearer", 'Bearer realm=""', 'Bearer realm="relative"', 'Bearer realm="file:///x"', "Digest realm=x",
     'Bearer realm="http://u:p@127.0.0.1/"', 'Bearer realm="http://["', "\x80\xff", "Basic " * 2000],
)  # fmt: skip
def test_a_challenge_that_makes_no_sense_is_an_error(trusting: Client, registry: FakeRegistry, challenge: str) -> None:
    registry.auth, registry.challenge, registry.users = "raw", challenge, {}
    with pytest.raises(RegistryError) as caught:
        trusting.head(app(registry))
    assert caught.value.status is not None or "URL" in str(caught.value)


@given(st.lists(st.text(alphabet=st.sampled_from('Bearr ,="\\ab:/\t'), max_size=60), max_size=3))
def test_no_header_upsets_the_parser(headers: list[str]) -> None:
    for challenge in parse_challenges(headers):
        assert challenge.scheme == challenge.scheme.lower() != ""


@given(st.text())
def test_what_is_said_is_made_printable_and_short(text: str) -> None:
    said = printable(text + " s3cret?s3cret", SECRETS)
    assert all(c.isprintable() for c in said)
    assert len(said) <= 301 and "s3cret" not in said


# HTTP itself.


@pytest.mark.parametrize("status", [204, 206, 304, 999])
def test_odd_statuses_are_errors(client: Client, registry: FakeRegistry, status: int) -> None:
    registry.add("org/app", "1.0", APP)
    registry.fault(status=status, times=99)
    with pytest.raises(UnpackerError):
        client.manifest(place(registry), DIGEST)


def test_a_flood_of_headers_is_given_up(client: Client, registry: FakeRegistry) -> None:
    registry.fault(status=200, times=9, headers={f"X-{i}": "y" * 1000 for i in range(300)})
    with pytest.raises(RegistryError, match="not HTTP"):
        client.head(app(registry))

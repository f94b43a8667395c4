"""Reading registries: tags, manifests, blobs, what is tried again, and through whom requests go."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import ssl
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import closing
from email.utils import formatdate
from pathlib import Path

import pytest

from tests.docker_registry import DockerRegistry
from tests.fake_registry import FakeRegistry
from tests.images import BuiltImage, file, image, index, layer
from unpacker.digest import Digest, Stream
from unpacker.errors import NotFound, RegistryError, SettingsError
from unpacker.oci import OCI_INDEX, OCI_MANIFEST, Descriptor
from unpacker.reference import Reference, Repository
from unpacker.registry import tls as tls_module
from unpacker.registry.client import Access, Client
from unpacker.registry.retry import parse_retry_after

APP = image(layer(file("etc/motd", b"hello\n")))
FAST = Access(backoff=0.001, timeout=5)


@pytest.fixture
def client() -> Iterator[Client]:
    with closing(Client(FAST)) as client:
        yield client


def repository(registry: FakeRegistry | DockerRegistry, name: str = "org/app") -> Repository:
    return Repository.parse(f"{registry.url}/{name}")


def app(registry: FakeRegistry, tag: str = "1.0") -> Reference:
    return Reference(repository=repository(registry), tag=tag)


def blob(data: bytes) -> Descriptor:
    return Descriptor(media_type="application/octet-stream", digest=Digest.of(data), size=len(data))


def whole(stream: Stream, size: int = 1 << 20) -> bytes:
    return b"".join(iter(lambda: stream.read(size), b""))


# The same for every registry, ours and the real one.


@pytest.fixture(params=["ours", "docker-registry"])
def any_registry(request: pytest.FixtureRequest) -> FakeRegistry | DockerRegistry:
    name = {"ours": "registry", "docker-registry": "docker_registry"}[request.param]
    running: FakeRegistry | DockerRegistry = request.getfixturevalue(name)
    if isinstance(running, FakeRegistry):
        for tag in ("1.0", "2.0"):
            running.add("contract/app", tag, APP)
        running.add_index("contract/app", "multi", APP)
    else:
        for tag in ("1.0", "2.0"):
            running.push("contract/app", tag, APP)
        running.push_index("contract/app", "multi", APP)
    return running


def test_all_tags_are_listed(client: Client, any_registry: FakeRegistry | DockerRegistry) -> None:
    assert sorted(client.tags(repository(any_registry, "contract/app"))) == ["1.0", "2.0", "multi"]


def test_head_describes_what_a_tag_points_at(client: Client, any_registry: FakeRegistry | DockerRegistry) -> None:
    place = repository(any_registry, "contract/app")
    assert client.head(Reference(repository=place, tag="1.0")) == Descriptor(
        media_type=OCI_MANIFEST, digest=Digest.parse(APP.digest), size=len(APP.manifest)
    )
    assert client.head(Reference(repository=place, tag="multi")).media_type == OCI_INDEX


def test_a_manifest_is_read_by_its_digest(client: Client, any_registry: FakeRegistry | DockerRegistry) -> None:
    place = repository(any_registry, "contract/app")
    assert client.manifest(place, Digest.parse(APP.digest)) == (APP.manifest, OCI_MANIFEST)
    assert client.manifest(place, Digest.of(index(APP)[0])) == index(APP)


def test_a_blob_is_read_to_its_end(client: Client, any_registry: FakeRegistry | DockerRegistry) -> None:
    place = repository(any_registry, "contract/app")
    for data in APP.blobs.values():
        with client.blob(place, blob(data)) as stream:
            assert whole(stream, 7) == data


def test_what_is_not_there_is_not_found(client: Client, any_registry: FakeRegistry | DockerRegistry) -> None:
    place = repository(any_registry, "contract/app")
    with pytest.raises(NotFound, match=r"contract/app:9\.9 at 127\.0\.0\.1:[0-9]+: HTTP 404") as caught:
        client.head(Reference(repository=place, tag="9.9"))
    assert caught.value.status == 404
    assert not caught.value.temporary
    with pytest.raises(NotFound, match="HTTP 404 \\(MANIFEST_UNKNOWN: manifest unknown"):
        client.manifest(place, Digest.of(b"nothing"))
    with pytest.raises(NotFound), client.blob(place, blob(b"nothing")):
        pytest.fail("entered")
    with pytest.raises(NotFound, match="listing the tags of no/such"):
        client.tags(repository(any_registry, "no/such"))


def test_what_anybody_can_read_is_public(client: Client, any_registry: FakeRegistry | DockerRegistry) -> None:
    assert client.is_public(repository(any_registry, "contract/app"), Digest.parse(APP.digest))


# Tags.


def fill(registry: FakeRegistry, count: int) -> list[str]:
    tags = [f"v{i:04}" for i in range(count)]
    for tag in tags:
        registry.add("org/app", tag, APP)
    return tags


@pytest.mark.parametrize(
    ("paging", "page_size", "count", "pages"),
    [
        ("link", 10, 35, 4),
        ("link", 10, 40, 4),
        ("last", 50, 120, 3),
        ("last", 100, 200, 3),  # only the empty third page says that the second was the last
        ("last", None, 1200, 2),
        ("whole", None, 1100, 2),  # ignores n and last: the same again is nothing new
        ("whole", None, 50, 2),
        ("whole", None, 1049, 1 + 1),
        ("link", None, 7, 1),
    ],
)
def test_pages_of_tags_are_followed_to_the_end(
    client: Client, registry: FakeRegistry, paging: str, page_size: int | None, count: int, pages: int
) -> None:
    tags = fill(registry, count)
    registry.paging, registry.page_size = paging, page_size
    assert client.tags(repository(registry)) == tags
    assert registry.count("GET", "/tags/list$") == pages == len(registry.requests)


def test_a_registry_that_refuses_a_large_page_is_asked_without_a_size(client: Client, registry: FakeRegistry) -> None:
    fill(registry, 3)
    registry.fault(status=400, times=1, path="/tags/list")
    assert len(client.tags(repository(registry))) == 3
    assert [r.query for r in registry.requests] == [{"n": "1000"}, {}]


def test_a_repository_without_tags_has_none(client: Client, registry: FakeRegistry) -> None:
    registry.fixed["/v2/org/app/tags/list"] = (b'{"name": "org/app", "tags": null}', {})
    assert client.tags(repository(registry)) == []


def test_a_list_that_cannot_be_read_to_its_end_is_no_list(client: Client, registry: FakeRegistry) -> None:
    link = {"Link": '</v2/org/app/tags/list?last=a>; rel="next"'}
    registry.fault(status=200, path="/tags/list", body=b'{"tags": ["a"]}', headers=link)
    registry.fault(status=500, path="/tags/list", times=9)
    with pytest.raises(RegistryError, match="HTTP 500"):
        client.tags(repository(registry))


# HEAD.


def test_an_image_is_looked_up_with_one_head(client: Client, registry: FakeRegistry) -> None:
    registry.add("org/app", "1.0", APP)
    client.head(app(registry))
    assert [r.method for r in registry.requests] == ["HEAD"]
    accepted = registry.requests[0].headers["accept"]
    assert OCI_INDEX in accepted and "manifest.list.v2" in accepted and "manifest.v2" in accepted


def test_without_a_digest_in_the_answer_the_manifest_is_read_and_hashed(client: Client, registry: FakeRegistry) -> None:
    registry.add("org/app", "1.0", APP)
    registry.content_digest = "missing"
    assert client.head(app(registry)) == Descriptor(
        media_type=OCI_MANIFEST, digest=Digest.parse(APP.digest), size=len(APP.manifest)
    )
    assert [r.method for r in registry.requests] == ["HEAD", "GET"]


def test_without_a_length_in_the_answer_the_manifest_is_read(client: Client, registry: FakeRegistry) -> None:
    registry.add("org/app", "1.0", APP)
    registry.content_length = False
    assert client.head(app(registry)).size == len(APP.manifest)


def test_a_registry_that_knows_no_head_is_asked_with_get(client: Client, registry: FakeRegistry) -> None:
    registry.add("org/app", "1.0", APP)
    registry.fault(status=405, method="HEAD")
    assert str(client.head(app(registry)).digest) == APP.digest


def test_a_digest_is_looked_up_as_such(client: Client, registry: FakeRegistry) -> None:
    registry.add("org/app", "1.0", APP)
    pinned = Reference(repository=repository(registry), tag="other", digest=Digest.parse(APP.digest))
    assert client.head(pinned).digest == pinned.digest
    assert registry.requests[0].path == f"/v2/org/app/manifests/{APP.digest}"


# Trying again.


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504, 0])
def test_what_waiting_may_help_is_tried_again(client: Client, registry: FakeRegistry, status: int) -> None:
    registry.add("org/app", "1.0", APP)
    registry.fault(status=status, times=4)
    assert str(client.head(app(registry)).digest) == APP.digest
    assert registry.count() == 5


@pytest.mark.parametrize("status", [400, 403, 404, 418])
def test_what_waiting_cannot_help_is_not_tried_again(client: Client, registry: FakeRegistry, status: int) -> None:
    registry.fault(status=status, times=9)
    with pytest.raises(RegistryError) as caught:
        client.head(app(registry))
    assert (caught.value.status, caught.value.temporary, registry.count()) == (status, False, 1)


def test_in_the_end_the_last_failure_is_told(client: Client, registry: FakeRegistry) -> None:
    body = b'{"errors": [{"code": "TOOMANYREQUESTS", "message": "slow down, see https://x.example/?token=secret"}]}'
    registry.fault(status=429, times=9, body=body)
    with pytest.raises(RegistryError) as caught:
        client.manifest(repository(registry), Digest.of(b""))
    assert (caught.value.status, caught.value.temporary, registry.count()) == (429, True, 5)
    assert "reading manifest" in str(caught.value)
    assert "HTTP 429 (TOOMANYREQUESTS: slow down, see https://x.example/?…)" in str(caught.value)


def test_retry_after_is_honoured(client: Client, registry: FakeRegistry) -> None:
    registry.add("org/app", "1.0", APP)
    registry.fault(status=429, headers={"Retry-After": "1"})
    before = time.monotonic()
    client.head(app(registry))
    assert 1 <= time.monotonic() - before < 4


def test_one_refusal_holds_back_all_threads(client: Client, registry: FakeRegistry) -> None:
    registry.add("org/app", "1.0", APP)
    registry.fault(status=429, headers={"Retry-After": "2"})
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.head, app(registry))
        while registry.count() == 0:
            time.sleep(0.01)
        time.sleep(0.1)
        before = time.monotonic()
        client.head(app(registry))
        assert time.monotonic() - before > 0.5
        first.result()


def test_nobody_waits_for_hours(client: Client, registry: FakeRegistry) -> None:
    registry.fault(status=429, headers={"Retry-After": "21600"})
    with pytest.raises(RegistryError, match="asks to be left alone for 21600 s") as caught:
        client.head(app(registry))
    assert caught.value.temporary
    assert registry.count() == 1


def test_retry_after_is_seconds_or_a_date() -> None:
    now = 1_800_000_000.0
    assert parse_retry_after("120", now) == 120
    assert parse_retry_after(formatdate(now + 90, usegmt=True), now) == 90
    assert parse_retry_after(formatdate(now - 90, usegmt=True), now) == 0
    assert parse_retry_after("1.5", now) == 1.5
    assert parse_retry_after("soon", now) is None
    assert parse_retry_after("-1", now) is None
    assert parse_retry_after(None, now) is None


@pytest.mark.parametrize(
    "text", ["Sun, 06 Nov 1994 08:49:37 GMT", "Sunday, 06-Nov-94 08:49:37 GMT", "Sun Nov  6 08:49:37 1994"]
)
@pytest.mark.parametrize("zone", ["UTC", "EST5EDT"])
def test_all_three_forms_of_a_date_mean_greenwich_wherever_this_runs(
    text: str, zone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        with monkeypatch.context() as patched:
            patched.setenv("TZ", zone)
            time.tzset()
            assert parse_retry_after(text, 784_111_777.0 - 60) == 60
    finally:
        time.tzset()


def test_nobody_answering_has_no_status(registry: FakeRegistry) -> None:
    registry.stop()
    with pytest.raises(RegistryError, match="Connection refused") as caught:
        Client(Access(backoff=0.001, attempts=2)).head(app(registry))
    assert caught.value.status is None
    assert caught.value.temporary


def test_a_dead_host_is_not_waited_for_by_every_reference(registry: FakeRegistry) -> None:
    registry.stop()
    with closing(Client(Access(backoff=0.2, attempts=3))) as client:
        before = time.monotonic()
        with pytest.raises(RegistryError, match="Connection refused"):
            client.head(app(registry))
        for _ in range(50):
            with pytest.raises(RegistryError, match="out of reach a moment ago") as caught:
                client.head(app(registry))
            assert (caught.value.status, caught.value.temporary) == (None, True)
        assert time.monotonic() - before < 2


def test_a_host_that_always_fails_is_no_longer_asked_twice(registry: FakeRegistry) -> None:
    registry.add("org/app", "1.0", APP)
    registry.fault(status=503, times=3 * 5 + 2)
    with closing(Client(FAST)) as client:
        for _ in range(5):
            with pytest.raises(RegistryError, match="HTTP 503"):
                client.head(app(registry))
        assert registry.count() == 3 * 5 + 2
        client.head(app(registry))
        registry.fault(status=503, times=4)
        client.head(app(registry))  # it is well again, and so is patience


def test_closing_the_client_ends_its_waiting(registry: FakeRegistry) -> None:
    client = Client(Access(backoff=30))
    registry.fault(status=503, times=9)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.head, app(registry))
        while registry.count() == 0:
            time.sleep(0.01)
        before = time.monotonic()
        client.close()
        with pytest.raises(RegistryError):
            waiting.result()
        assert time.monotonic() - before < 5


# Blobs.

BIG = bytes(range(256)) * 8000


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("content_length", [True, False])
def test_a_broken_blob_is_resumed(client: Client, registry: FakeRegistry, ranges: bool, content_length: bool) -> None:
    registry.add_blob("org/app", BIG)
    registry.ranges, registry.content_length = ranges, content_length
    registry.truncate(1_000_000)
    registry.truncate(1_500_000 if not ranges else 300_000)
    with client.blob(repository(registry), blob(BIG)) as stream:
        assert whole(stream) == BIG
    assert registry.count("GET", "/blobs/") == 3
    ranges_asked = [r.headers.get("range") for r in registry.requests]
    assert ranges_asked[0] is None and all(r and r.startswith("bytes=") for r in ranges_asked[1:])


def test_a_blob_that_always_breaks_is_given_up(client: Client, registry: FakeRegistry) -> None:
    registry.add_blob("org/app", BIG)
    registry.truncate(1000, times=99)
    with (
        client.blob(repository(registry), blob(BIG)) as stream,
        pytest.raises(RegistryError, match=r"reading blob sha256:.* \(after 5000 of 2048000 bytes") as caught,
    ):
        whole(stream)
    assert caught.value.temporary
    assert registry.count("GET", "/blobs/") == 5


def test_an_empty_blob_is_read(client: Client, registry: FakeRegistry) -> None:
    registry.add_blob("org/app", b"")
    with client.blob(repository(registry), blob(b"")) as stream:
        assert stream.read(100) == b""


def test_small_and_large_reads_give_the_same_bytes(client: Client, registry: FakeRegistry) -> None:
    registry.add_blob("org/app", BIG)
    for size in (1000, 65536, 1 << 24):
        with client.blob(repository(registry), blob(BIG)) as stream:
            assert whole(stream, size) == BIG


def test_a_blob_read_in_part_leaves_the_client_usable(client: Client, registry: FakeRegistry) -> None:
    registry.add_blob("org/app", BIG)
    for _ in range(20):
        with client.blob(repository(registry), blob(BIG)) as stream:
            stream.read(10)


def test_a_blob_may_live_on_another_host(client: Client, registry: FakeRegistry) -> None:
    with FakeRegistry() as storage:
        registry.add_blob("org/app", BIG)
        storage.add_blob("org/app", BIG)
        registry.redirect_blobs = storage.url
        storage.truncate(1_000_000)
        with client.blob(repository(registry), blob(BIG)) as stream:
            assert whole(stream) == BIG
        assert storage.count("GET", "/blobs/") == 2
        assert storage.requests[1].headers["range"].startswith("bytes=")


# Many at once.


def test_a_host_gets_only_so_many_requests_at_a_time(registry: FakeRegistry) -> None:
    registry.add("org/app", "1.0", APP)
    registry.delay = 0.02
    client = Client(Access(connections_per_host=3))
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(client.head, [app(registry)] * 40))
    assert {str(d.digest) for d in found} == {APP.digest}
    assert registry.busiest == 3


def test_connections_are_used_again(client: Client, docker_registry: DockerRegistry) -> None:
    """Hundreds of look-ups by eight threads are quick, as a run in which nothing changed must be."""
    docker_registry.push("org/quick", "1.0", APP)
    reference = Reference(repository=repository(docker_registry, "org/quick"), tag="1.0")
    before = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        assert len(list(pool.map(client.head, [reference] * 400))) == 400
    assert time.monotonic() - before < 20


def _head(access: Access, reference: Reference) -> tuple[int, str]:
    return os.getpid(), str(access.open().head(reference).digest)


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_another_process_opens_its_own_client(registry: FakeRegistry, method: str) -> None:
    registry.add("org/app", "1.0", APP)
    assert FAST.open() is FAST.open()
    FAST.open().head(app(registry))
    locator = pickle.loads(pickle.dumps(FAST.open().locator))
    assert locator == FAST and hash(locator) == hash(FAST)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(method)) as pool:
        pid, digest = pool.submit(_head, locator, app(registry)).result()
    assert (pid != os.getpid(), digest) == (True, APP.digest)
    assert str(FAST.open().head(app(registry)).digest) == APP.digest


# Proxies and TLS.


def test_a_proxy_is_used_where_the_environment_says_so(registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.add("org/app", "1.0", APP)
    monkeypatch.setenv("HTTP_PROXY", registry.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    away = Reference.parse("http://registry.example:8080/org/app:1.0")
    assert str(Client(FAST).head(away).digest) == APP.digest
    assert registry.requests[0].headers["host"] == "registry.example:8080"
    with FakeRegistry() as near:
        near.add("org/app", "1.0", APP)
        Client(FAST).head(app(near))
        assert near.count() == 1


@pytest.mark.parametrize("proxy", ["socks5://user:s3cret@127.0.0.1:1080", "gopher://127.0.0.1:1", "http://[:s3cret"])
def test_a_proxy_that_cannot_be_used_is_said(monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy)
    with pytest.raises(SettingsError, match="cannot use the proxy") as caught:
        Client(FAST)
    assert "s3cret" not in str(caught.value)


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for 127.0.0.1 that is its own authority, and its key, in one file."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed: nothing tested over TLS")
    path = tmp_path_factory.mktemp("tls") / "registry.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
         "-keyout", path, "-out", path.with_suffix(".crt"), "-days", "2", "-subj", "/CN=registry of a test",
         "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"],
        check=True, capture_output=True,
    )  # fmt: skip
    path.write_text(path.read_text() + path.with_suffix(".crt").read_text())
    return path


def tls(certificate: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"])
def test_a_site_brings_its_own_authority(certificate: Path, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    with FakeRegistry(tls=tls(certificate)) as secure:
        secure.add("org/app", "1.0", APP)
        secure.add_blob("org/app", BIG)
        with pytest.raises(RegistryError, match="certificate verify failed") as caught:
            Client(FAST).head(app(secure))
        assert not caught.value.temporary
        assert secure.requests == []
        monkeypatch.setenv(variable, str(certificate.with_suffix(".crt")))
        assert str(Client(FAST).head(app(secure)).digest) == APP.digest
        with Client(FAST).blob(repository(secure), blob(BIG)) as stream:
            assert whole(stream) == BIG


def test_a_registry_has_certificates_of_its_own(
    certificate: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tls_module, "CERTIFICATE_DIRECTORIES", (str(tmp_path),))
    with FakeRegistry(tls=tls(certificate)) as known, FakeRegistry(tls=tls(certificate)) as unknown:
        known.add("org/app", "1.0", APP)
        (tmp_path / known.host).mkdir()
        (tmp_path / known.host / "ca.crt").write_bytes(certificate.with_suffix(".crt").read_bytes())
        with closing(Client(FAST)) as client:
            assert str(client.head(app(known)).digest) == APP.digest
            with pytest.raises(RegistryError, match="certificate verify failed"):
                client.head(app(unknown))


def test_an_authority_that_cannot_be_read_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/nonexistent/ca.pem")
    with pytest.raises(SettingsError, match=r"/nonexistent/ca\.pem: cannot read certificate authorities"):
        Client(FAST)


def test_https_never_becomes_http(client: Client, registry: FakeRegistry) -> None:
    registry.add("org/app", "1.0", APP)
    reference = Reference.parse(f"https://{registry.host}/org/app:1.0")
    with pytest.raises(RegistryError):
        Client(Access(backoff=0.001, attempts=1)).head(reference)
    assert registry.requests == []


def test_all_spellings_of_docker_hub_share_one_budget(client: Client) -> None:
    names = ("docker.io/alpine", "registry.hub.docker.com/library/alpine", "index.docker.io/library/alpine")
    endpoints = {client._endpoint(Repository.parse(name)) for name in names}
    assert len(endpoints) == 1
    (endpoint,) = endpoints
    assert endpoint.url("tags/list") == "https://registry-1.docker.io:443/v2/library/alpine/tags/list"


def test_an_image_of_both_kinds_is_served_by_our_registry_as_built(registry: FakeRegistry) -> None:
    built: BuiltImage = image(layer(file("a")), docker=True)
    assert registry.add("org/app", "d", built) == built.digest

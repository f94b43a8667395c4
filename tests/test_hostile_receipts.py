"""A registry that wants more than a receipt: our secrets, our patience, our memory, our access to other hosts."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import responses

from tests.fake_registry import FakeRegistry
from tests.test_receipts import BASE, DIGEST, SUBJECT, TARGET, published, requests_made, take_pushes, with_credentials
from unpacker.errors import RegistryError
from unpacker.oci import OCI_INDEX
from unpacker.receipts import Receipts, referrers_tag
from unpacker.registry.client import Access

RECORD = published("registry.example.org/org/app:1.0")


@pytest.fixture
def receipts(tmp_path: Path) -> Iterator[Receipts]:
    made = Receipts(with_credentials(tmp_path / "config.json", "registry.example.org"))
    yield made
    made.close()


@responses.activate
@pytest.mark.parametrize(
    "location",
    [
        "https://elsewhere.example/upload?token=abc",
        "http://169.254.169.254/latest/api/token",
        "https://registry.example.org:8443/upload",
        "https://user:password@registry.example.org/upload",
        "https://registry.example.org.elsewhere.example/upload",
        "http://",
    ],
)
def test_an_upload_is_never_sent_to_another_host(receipts: Receipts, location: str) -> None:
    responses.add(responses.HEAD, re.compile(f"{BASE}/blobs/.*"), status=404)
    responses.add(responses.POST, f"{BASE}/blobs/uploads/", status=202, headers={"Location": location})
    with pytest.raises(RegistryError, match="told to upload to") as caught:
        receipts.attach(RECORD, SUBJECT, TARGET)
    assert all(made.split(" ")[1].startswith(BASE) for made in requests_made())
    assert "token" not in str(caught.value) and "password" not in str(caught.value)


@responses.activate
def test_an_upload_told_to_go_over_plain_http_stays_with_tls(receipts: Receipts) -> None:
    location = "http://registry.example.org/v2/org/app/blobs/uploads/1?s=t"
    responses.add(responses.POST, f"{BASE}/blobs/uploads/", status=202, headers={"Location": location})
    take_pushes()
    receipts.attach(RECORD, SUBJECT, TARGET)
    assert all(made.split(" ")[1].startswith("https://") for made in requests_made())


@responses.activate
@pytest.mark.parametrize("headers", [{}, {"Location": ""}, {"Location": "https://["}])
def test_an_upload_without_a_place_is_an_error(receipts: Receipts, headers: dict[str, str]) -> None:
    responses.add(responses.HEAD, re.compile(f"{BASE}/blobs/.*"), status=404)
    responses.add(responses.POST, f"{BASE}/blobs/uploads/", status=202, body=b"<html>", headers=headers)
    with pytest.raises(RegistryError, match="did not say where to upload"):
        receipts.attach(RECORD, SUBJECT, TARGET)


@responses.activate
def test_redirects_are_not_followed(receipts: Receipts) -> None:
    responses.add(responses.HEAD, re.compile(f"{BASE}/blobs/.*"), status=404)
    responses.add(
        responses.POST, f"{BASE}/blobs/uploads/", status=307, headers={"Location": "https://elsewhere.example/"}
    )
    with pytest.raises(RegistryError, match="HTTP 307"):
        receipts.attach(RECORD, SUBJECT, TARGET)
    assert all("elsewhere" not in made for made in requests_made())


@responses.activate
def test_credentials_do_not_travel_over_plain_http(tmp_path: Path) -> None:
    receipts = Receipts(with_credentials(tmp_path / "config.json", "registry.example.org"))
    base = BASE.replace("https", "http")
    challenge = {"WWW-Authenticate": 'Basic realm="x"'}
    responses.add(responses.HEAD, re.compile(f"{base}/blobs/.*"), status=401, headers=challenge)
    with pytest.raises(RegistryError, match="not sent over plain http"):
        receipts.attach(published("http://registry.example.org/org/app:1.0"), SUBJECT, TARGET)
    receipts.close()
    assert [call.request.headers.get("Authorization") for call in responses.calls] == [None]


@responses.activate
def test_a_netrc_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine registry.example.org login somebody password else\n")
    monkeypatch.setenv("NETRC", str(netrc))
    receipts = Receipts(Access())
    take_pushes()
    receipts.attach(RECORD, SUBJECT, TARGET)
    receipts.close()
    assert {call.request.headers.get("Authorization") for call in responses.calls} == {None}


@responses.activate
def test_what_a_registry_quotes_of_our_secrets_reaches_no_message(receipts: Receipts) -> None:
    challenge = {"WWW-Authenticate": 'Basic realm="x"'}
    said = {"errors": [{"code": "DENIED", "message": "robot with s3cret may not"}]}
    responses.add(responses.HEAD, re.compile(f"{BASE}/blobs/.*"), status=401, headers=challenge)
    responses.add(responses.HEAD, re.compile(f"{BASE}/blobs/.*"), status=404)
    responses.add(responses.POST, f"{BASE}/blobs/uploads/", status=403, json=said)
    with pytest.raises(RegistryError) as caught:
        receipts.attach(RECORD, SUBJECT, TARGET)
    assert "s3cret" not in str(caught.value) and "may not" in str(caught.value)


@responses.activate
@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"manifests": [' + b'{"a":1},' * 600_000 + b'{"a":1}]}', "longer than the limit"),
        (b"[" * 100_000, "no list of referrers"),
        (b'{"manifests": 7}', "no list of referrers"),
        (b"[]", "no list of referrers"),
        (b"\xff", "no list of referrers"),
    ],
)
def test_a_list_that_makes_no_sense_is_neither_read_whole_nor_replaced(
    receipts: Receipts, body: bytes, said: str
) -> None:
    take_pushes(subject=False)
    tag = referrers_tag(DIGEST)
    responses.add(responses.GET, f"{BASE}/manifests/{tag}", body=body, content_type=OCI_INDEX)
    with pytest.raises(RegistryError, match=said):
        receipts.attach(RECORD, SUBJECT, TARGET)
    assert not [made for made in requests_made() if made.startswith("PUT") and tag in made]


@responses.activate
def test_a_long_wait_is_not_waited_for(receipts: Receipts) -> None:
    responses.add(responses.HEAD, re.compile(f"{BASE}/blobs/.*"), status=429, headers={"Retry-After": "250"})
    start = time.monotonic()
    with pytest.raises(RegistryError, match="given up for this time"):
        receipts.attach(RECORD, SUBJECT, TARGET)
    assert time.monotonic() - start < 5


def test_a_server_that_never_answers_is_given_up() -> None:
    receipts = Receipts(Access(timeout=0.2, attempts=2, backoff=0.01))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        with pytest.raises(RegistryError, match="no answer in time"):
            receipts.attach(published(f"127.0.0.1:{silent.getsockname()[1]}/org/app:1"), SUBJECT, TARGET)
        assert time.monotonic() - start < 5
    receipts.close()


def test_a_registry_that_is_slow_at_every_step_is_given_up(registry: FakeRegistry) -> None:
    receipts = Receipts(Access(timeout=5, attempts=1), budget=0.3)
    registry.fault(status=202, times=99, method="POST", headers={"Location": "/v2/org/app/blobs/uploads/1"}, body=b"x")
    registry.slow = (1, 0.35)
    with pytest.raises(RegistryError, match=r"given up for this time|did not come in time"):
        receipts.attach(published(f"{registry.host}/org/app:1"), SUBJECT, TARGET)
    receipts.close()


def test_an_answer_that_trickles_is_given_up(registry: FakeRegistry) -> None:
    receipts = Receipts(Access(timeout=5, attempts=1), budget=0.3)
    registry.fault(status=404, times=99, method="HEAD")
    registry.fault(status=200, times=99, method="POST", body=b"x" * 400)
    registry.slow = (1, 0.05)
    start = time.monotonic()
    with pytest.raises(RegistryError, match="did not come in time"):
        receipts.attach(published(f"{registry.host}/org/app:1"), SUBJECT, TARGET)
    assert time.monotonic() - start < 3
    receipts.close()


def test_an_answer_that_breaks_off_is_an_error_of_the_registry() -> None:
    receipts = Receipts(Access(timeout=5, attempts=1))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def answer() -> None:
            with server.accept()[0] as connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 202 Accepted\r\nContent-Length: 100\r\n\r\nhalf")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(RegistryError, match="broke"):
            receipts.attach(published(f"127.0.0.1:{port}/org/app:1"), SUBJECT, TARGET)
        thread.join()
    receipts.close()


def test_a_host_that_is_not_there_is_an_error_of_the_registry() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    receipts = Receipts(Access(timeout=1, attempts=1))
    with pytest.raises(RegistryError, match="the connection could not be made"):
        receipts.attach(published(f"127.0.0.1:{port}/org/app:1"), SUBJECT, TARGET)
    receipts.close()


def test_an_address_of_metadata_services_is_never_called() -> None:
    receipts = Receipts(Access(timeout=1, attempts=1))
    with pytest.raises(RegistryError, match="never called"):
        receipts.attach(published("169.254.169.254/org/app:1"), SUBJECT, TARGET)
    receipts.close()

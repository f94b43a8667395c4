"""What is attached, where it is found again, and that attaching again is no change."""

from __future__ import annotations

import base64
import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import responses
from hypothesis import given
from hypothesis import strategies as st

from tests.docker_registry import DockerRegistry
from tests.fake_registry import FakeRegistry
from tests.images import file, image, layer
from tests.test_cli import User
from unpacker.digest import Digest
from unpacker.errors import Denied, RegistryError, SettingsError
from unpacker.oci import LINUX_AMD64, OCI_INDEX, OCI_MANIFEST, Descriptor
from unpacker.receipts import (
    ARTIFACT_TYPE,
    EMPTY_TYPE,
    Receipt,
    Receipts,
    artefact,
    authorities,
    referrers_tag,
    serialise,
    with_entry,
)
from unpacker.record import Published
from unpacker.reference import Reference, TagPattern
from unpacker.registry.client import Access
from unpacker.tags import select

TARGET = "/cvmfs/unpacked.example.org"
DIGEST = Digest("sha256", "ab" * 32)
SUBJECT = Descriptor(media_type=OCI_MANIFEST, digest=DIGEST, size=1234)


def published(reference: str, digest: str = str(DIGEST), **changed: Any) -> Published:
    values: dict[str, Any] = {
        "reference": Reference.parse(reference),
        "digest": digest,
        "manifest_digest": digest,
        "image_id": "sha256:" + "cd" * 32,
        "platform": LINUX_AMD64,
        "root": ".flat/cd/" + "cd" * 32,
        "rules": "r",
        "wishlist": "w",
        "published": 1_600_000_000,
        "tool": "unpacker 0.1.0",
    }
    return Published(**(values | changed))


@pytest.fixture
def receipts() -> Iterator[Receipts]:
    made = Receipts(Access(attempts=3, backoff=0.01, timeout=5))
    yield made
    made.close()


def read(registry: DockerRegistry, repository: str, what: str, kind: str = "manifests") -> Any:
    request = urllib.request.Request(f"{registry.url}/v2/{repository}/{kind}/{what}")
    request.add_header("Accept", f"{OCI_MANIFEST}, {OCI_INDEX}")
    with urllib.request.urlopen(request) as answer:
        return json.loads(answer.read())


# What a receipt is.


def test_a_receipt_says_where_the_image_was_unpacked() -> None:
    receipt = Receipt.of(published("registry.example.org/org/app:1.0"), TARGET + "/")
    assert receipt.to_json() == {
        "schema": 1,
        "reference": "registry.example.org/org/app:1.0",
        "path": "/cvmfs/unpacked.example.org/registry.example.org/org/app:1.0",
        "digest": str(DIGEST),
        "image_id": "sha256:" + "cd" * 32,
        "platform": "linux/amd64",
        "root": ".flat/cd/" + "cd" * 32,
        "published": 1_600_000_000,
        "tool": "unpacker 0.1.0",
    }


def test_the_artefact_follows_the_image_specification() -> None:
    made = artefact(Receipt.of(published("registry.example.org/org/app:1.0"), TARGET), SUBJECT)
    (config, empty), (descriptor, data) = made.blobs
    assert made.manifest["artifactType"] == ARTIFACT_TYPE
    assert made.manifest["subject"] == {"mediaType": OCI_MANIFEST, "digest": str(DIGEST), "size": 1234}
    assert made.manifest["config"] == config and made.manifest["layers"] == [descriptor]
    # The empty descriptor, as the specification spells it out.
    assert empty == b"{}" and config == {
        "mediaType": EMPTY_TYPE,
        "digest": "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
        "size": 2,
    }
    assert descriptor["digest"] == str(Digest.of(data)) and descriptor["size"] == len(data)
    assert made.manifest["annotations"]["org.opencontainers.image.created"] == "2020-09-13T12:26:40Z"
    assert made.manifest["annotations"]["vnd.unpacker.receipt.path"].startswith(TARGET)


def test_the_same_publish_gives_the_same_artefact() -> None:
    one, two = (artefact(Receipt.of(published("registry.example.org/org/app:1.0"), TARGET), SUBJECT) for _ in range(2))
    assert one.entry["digest"] == two.entry["digest"]
    later = published("registry.example.org/org/app:1.0", published=1_600_000_001)
    assert artefact(Receipt.of(later, TARGET), SUBJECT).entry["digest"] != one.entry["digest"]


def test_a_subject_without_a_media_type_gets_the_usual_one() -> None:
    untyped = Descriptor(media_type="", digest=DIGEST, size=1)
    made = artefact(Receipt.of(published("registry.example.org/org/app:1.0"), TARGET), untyped)
    assert made.manifest["subject"]["mediaType"] == OCI_MANIFEST


# The list of referrers.


def test_the_tag_of_the_list_is_the_digest_with_a_dash() -> None:
    assert referrers_tag(DIGEST) == "sha256-" + "ab" * 32
    assert referrers_tag(Digest("sha512", "cd" * 64)) == "sha512-" + "cd" * 32, "cut to 64 characters"


def entry(number: int, path: str = "/p") -> dict[str, Any]:
    return {
        "mediaType": OCI_MANIFEST,
        "digest": str(Digest.of(b"%d" % number)),
        "size": number,
        "artifactType": ARTIFACT_TYPE,
        "annotations": {"vnd.unpacker.receipt.path": path},
    }


ENTRIES = st.builds(entry, st.integers(0, 9), st.sampled_from(["/p", "/q"]))
OTHERS = st.fixed_dictionaries(
    {"digest": st.text(max_size=5), "artifactType": st.just("signature"), "x": st.integers()}
)


@given(st.lists(OTHERS | ENTRIES, max_size=6), ENTRIES, st.dictionaries(st.sampled_from(["a", "b"]), st.integers()))
def test_a_list_keeps_what_others_wrote_and_names_ours_once(
    present: list[dict[str, Any]], ours: dict[str, Any], keys: dict[str, int]
) -> None:
    before = {"schemaVersion": 2, "manifests": present} | keys
    after = with_entry(before, ours) or before
    digests = [e["digest"] for e in after["manifests"]]
    assert ours["digest"] in digests
    if ours["digest"] not in [e["digest"] for e in present]:
        assert digests.count(ours["digest"]) == 1
    kept = [e for e in present if e["artifactType"] == "signature"]
    assert [e for e in after["manifests"] if e["artifactType"] == "signature"] == kept
    assert {k: after[k] for k in keys} == keys
    assert with_entry(after, ours) is None, "a second time is no change"


def test_a_newer_receipt_for_the_same_path_takes_the_place_of_the_older() -> None:
    before = {"manifests": [entry(1, "/p"), entry(2, "/q")]}
    after = with_entry(before, entry(3, "/p"))
    assert after is not None and after["manifests"] == [entry(2, "/q"), entry(3, "/p")]


# With a real registry, which keeps no list of referrers itself.


def test_a_receipt_is_found_by_the_images_digest(docker_registry: DockerRegistry, receipts: Receipts) -> None:
    digest = docker_registry.push("receipts/found", "1.0", image(layer(file("a", b"found"))))
    reference = Reference.parse(f"{docker_registry.host}/receipts/found:1.0")
    subject = Access().open().head(reference)
    attached = receipts.attach(published(str(reference), digest), subject, TARGET)

    listed = read(docker_registry, "receipts/found", digest.replace(":", "-"))
    assert listed["mediaType"] == OCI_INDEX
    assert [(e["digest"], e["artifactType"]) for e in listed["manifests"]] == [(attached, ARTIFACT_TYPE)]
    assert listed["manifests"][0]["annotations"]["vnd.unpacker.receipt.path"] == f"{TARGET}/{reference}"
    manifest = read(docker_registry, "receipts/found", attached)
    assert manifest["subject"] == {"mediaType": OCI_MANIFEST, "digest": digest, "size": subject.size}
    receipt = read(docker_registry, "receipts/found", manifest["layers"][0]["digest"], "blobs")
    assert receipt["path"] == f"{TARGET}/{reference}" and receipt["digest"] == digest


def test_attaching_twice_changes_nothing(docker_registry: DockerRegistry, receipts: Receipts) -> None:
    digest = docker_registry.push("receipts/twice", "1.0", image(layer(file("a", b"twice"))))
    reference = Reference.parse(f"{docker_registry.host}/receipts/twice:1.0")
    subject = Access().open().head(reference)
    record = published(str(reference), digest)
    first = receipts.attach(record, subject, TARGET)
    listed = read(docker_registry, "receipts/twice", referrers_tag(subject.digest))
    assert receipts.attach(record, subject, TARGET) == first
    assert read(docker_registry, "receipts/twice", referrers_tag(subject.digest)) == listed


def test_what_others_attached_stays(docker_registry: DockerRegistry, receipts: Receipts) -> None:
    built = image(layer(file("a", b"others")))
    digest = docker_registry.push("receipts/others", "1.0", built)
    signature = {"mediaType": OCI_MANIFEST, "digest": digest, "size": len(built.manifest), "artifactType": "signature"}
    index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [signature], "annotations": {"by": "others"}}
    docker_registry.push_manifest("receipts/others", digest.replace(":", "-"), serialise(index), OCI_INDEX)
    reference = Reference.parse(f"{docker_registry.host}/receipts/others:1.0")
    attached = receipts.attach(published(str(reference), digest), Access().open().head(reference), TARGET)
    listed = read(docker_registry, "receipts/others", digest.replace(":", "-"))
    assert listed["manifests"][0] == signature and listed["annotations"] == {"by": "others"}
    assert [e["digest"] for e in listed["manifests"]] == [digest, attached]


def test_a_tag_that_is_no_list_is_left_as_it_is(docker_registry: DockerRegistry, receipts: Receipts) -> None:
    built = image(layer(file("a", b"no list")))
    digest = docker_registry.push("receipts/nolist", "1.0", built)
    docker_registry.push_manifest("receipts/nolist", digest.replace(":", "-"), built.manifest, built.media_type)
    reference = Reference.parse(f"{docker_registry.host}/receipts/nolist:1.0")
    with pytest.raises(RegistryError, match="no list of referrers; it was left as it is"):
        receipts.attach(published(str(reference), digest), Access().open().head(reference), TARGET)
    assert "layers" in read(docker_registry, "receipts/nolist", digest.replace(":", "-"))


def test_receipts_may_go_to_a_repository_of_the_operators_choice(docker_registry: DockerRegistry) -> None:
    receipts = Receipts(Access(), f"{docker_registry.host}/unpacker/receipts")
    attached = receipts.attach(published("registry.example.org/org/app:1.0"), SUBJECT, TARGET)
    again = receipts.attach(published("registry.example.org/org/app:latest"), SUBJECT, TARGET)
    receipts.close()
    listed = read(docker_registry, "unpacker/receipts", referrers_tag(DIGEST))
    assert [e["digest"] for e in listed["manifests"]] == [attached, again], "two names of one image have a receipt each"
    assert read(docker_registry, "unpacker/receipts", attached)["subject"]["digest"] == str(DIGEST)
    images = [e["annotations"]["vnd.unpacker.receipt.image"] for e in listed["manifests"]]
    assert images == ["registry.example.org/org/app:1.0", "registry.example.org/org/app:latest"]


def test_what_is_no_repository_is_a_fault_of_the_settings() -> None:
    with pytest.raises(SettingsError, match=r"receipts\.repository: no registry host"):
        Receipts(Access(), "receipts")


def test_an_image_that_moved_meanwhile_gets_no_receipt(receipts: Receipts) -> None:
    moved = Descriptor(media_type=OCI_MANIFEST, digest=Digest("sha256", "ef" * 32), size=1)
    with pytest.raises(RegistryError, match="not published"):
        receipts.attach(published("registry.example.org/org/app:1.0"), moved, TARGET)


def test_a_wildcard_does_not_wish_for_what_is_attached() -> None:
    attached = [referrers_tag(DIGEST), referrers_tag(Digest("sha512", "cd" * 64)), f"{referrers_tag(DIGEST)}.sig"]
    assert select(["1.0", *attached], tags=(TagPattern("*"),)) == ("1.0",)
    assert select(attached, tags=(TagPattern(attached[0]),)) == (attached[0],), "by its full name it is asked for"


# Of what stands published already.


def test_what_was_published_without_receipts_gets_them_later(
    docker_registry: DockerRegistry, registry: FakeRegistry, tmp_path: Path
) -> None:
    user = User(tmp_path, registry)
    digests = [docker_registry.push("receipts/later", tag, image(layer(file("a", tag.encode())))) for tag in "12"]
    gone = docker_registry.push("receipts/gone", "3", image(layer(file("a", b"gone"))))
    wishes = [f"http://{docker_registry.host}/receipts/{name}" for name in ("later:1", "later:2", "gone:3")]
    user.wishlist(*wishes)
    assert user("reconcile").returncode == 0

    refused = user("receipts")
    assert refused.returncode == SettingsError.exit_code and "switched off" in refused.stderr

    (user.path / "unpacker.toml").write_text("[receipts]\nenabled = true\n")
    delete = urllib.request.Request(f"{docker_registry.url}/v2/receipts/gone/manifests/{gone}", method="DELETE")
    urllib.request.urlopen(delete).close()
    done = user("receipts", "--config", "unpacker.toml", "--json")
    assert done.returncode == 0, done.stderr
    name = f"{docker_registry.host}/receipts/gone:3"
    assert json.loads(done.stdout) == {"attached": 2, "gone": [name], "failed": []}, "nothing is to be done about it"

    def lists() -> list[Any]:
        return [read(docker_registry, "receipts/later", digest.replace(":", "-")) for digest in digests]

    paths = [e["annotations"]["vnd.unpacker.receipt.path"] for each in lists() for e in each["manifests"]]
    assert paths == [f"{user.target}/{docker_registry.host}/receipts/later:{tag}" for tag in "12"]
    before = lists()
    again = user("receipts", f"{docker_registry.host}/receipts/later:1", "--config", "unpacker.toml")
    assert (again.returncode, again.stdout) == (0, "1 receipts attached, 0 not\n")
    assert lists() == before

    (user.target / ".metadata" / name / "record.json").write_text("damaged")
    assert json.loads(user("receipts", "-c", "unpacker.toml", "--json").stdout)["failed"] == []
    failed = user("receipts", name, f"http://{name}", "-c", "unpacker.toml", "--json")
    assert failed.returncode == 1
    [said] = json.loads(failed.stdout)["failed"]
    assert said["name"] == name and "damaged" in said["error"], "who asks for it is told"


def test_a_registry_that_does_not_answer_is_waited_for_once(registry: FakeRegistry) -> None:
    receipts = Receipts(Access(attempts=1, timeout=0.5), f"http://{registry.host}/unpacker/receipts")
    registry.delay = 5
    with pytest.raises(RegistryError, match="no answer in time"):
        receipts.attach(published("registry.example.org/org/app:1.0"), SUBJECT, TARGET)
    asked = registry.count()
    with pytest.raises(RegistryError, match="out of reach a moment ago"):
        receipts.attach(published("registry.example.org/org/app:2.0"), SUBJECT, TARGET)
    assert registry.count() == asked
    receipts.close()


# With a registry made of answers.

BASE = "https://registry.example.org/v2/org/app"


def take_pushes(base: str = BASE, *, subject: bool = True, **extra: Any) -> None:
    """A registry that has nothing and takes everything."""
    responses.add(responses.HEAD, re.compile(f"{base}/blobs/.*"), status=404)
    responses.add(
        responses.POST, f"{base}/blobs/uploads/", status=202, headers={"Location": f"{base}/blobs/uploads/1?s=t"}
    )
    responses.add(responses.PUT, f"{base}/blobs/uploads/1", status=201)
    headers = {"OCI-Subject": str(DIGEST)} if subject else {}
    responses.add(responses.PUT, re.compile(f"{base}/manifests/.*"), status=201, headers=headers)


def requests_made() -> list[str]:
    return [f"{call.request.method} {call.request.url}" for call in responses.calls]


@responses.activate
def test_a_registry_that_lists_referrers_itself_is_left_to_do_so(receipts: Receipts) -> None:
    take_pushes()
    attached = receipts.attach(published("registry.example.org/org/app:1.0"), SUBJECT, TARGET)
    assert requests_made()[-1] == f"PUT {BASE}/manifests/{attached}"
    assert not [made for made in requests_made() if "sha256-" in made]


@responses.activate
def test_all_spellings_of_docker_hub_are_one_host(receipts: Receipts) -> None:
    take_pushes("https://registry-1.docker.io/v2/library/alpine")
    receipts.attach(published("registry.hub.docker.com/alpine:3"), SUBJECT, TARGET)
    assert {made.split("/")[2] for made in requests_made()} == {"registry-1.docker.io"}


@responses.activate
@pytest.mark.parametrize("name", ["dotted.org/app", "plain"])
def test_a_repository_is_never_taken_for_a_registry(receipts: Receipts, name: str) -> None:
    take_pushes(f"http://localhost/v2/{name}")
    receipts.attach(published(f"http://localhost/{name}:1"), SUBJECT, TARGET)
    assert all(made.split(" ")[1].startswith(f"http://localhost/v2/{name}/") for made in requests_made())


def with_credentials(path: Path, host: str) -> Access:
    pair = base64.b64encode(b"robot:s3cret").decode()
    path.write_text(json.dumps({"auths": {host: {"auth": pair}}}))
    return Access(docker_config=str(path), attempts=2, backoff=0.01, timeout=5)


@responses.activate
def test_credentials_are_given_where_they_are_asked_for(tmp_path: Path) -> None:
    receipts = Receipts(with_credentials(tmp_path / "config.json", "registry.example.org"))
    challenge = {"WWW-Authenticate": 'Basic realm="x"'}
    responses.add(responses.HEAD, re.compile(f"{BASE}/blobs/.*"), status=401, headers=challenge)
    take_pushes()
    receipts.attach(published("registry.example.org/org/app:1.0"), SUBJECT, TARGET)
    receipts.close()
    sent = [call.request.headers.get("Authorization") for call in responses.calls]
    basic = "Basic " + base64.b64encode(b"robot:s3cret").decode()
    assert sent[0] is None and set(sent[1:]) == {basic}


@responses.activate
def test_a_token_is_fetched_for_pushing(tmp_path: Path, registry: FakeRegistry) -> None:
    """The token server is a real one, since tokens are fetched by our own client."""
    registry.users = {"robot": "s3cret"}
    base = "http://127.0.0.1:1/v2/org/app"
    receipts = Receipts(with_credentials(tmp_path / "config.json", "127.0.0.1:1"))
    scope = "repository:org/app:pull,push"
    challenge = {"WWW-Authenticate": f'Bearer realm="{registry.url}/token",service="s",scope="{scope}"'}
    responses.add(responses.POST, f"{base}/blobs/uploads/", status=401, headers=challenge)
    take_pushes(base)
    receipts.attach(published("127.0.0.1:1/org/app:1.0"), SUBJECT, TARGET)
    receipts.close()
    assert [(r.path, r.query["scope"], r.authorization) for r in registry.requests] == [("/token", scope, "Basic")]
    sent = [call.request.headers.get("Authorization") or "" for call in responses.calls]
    assert sent[-1].startswith("Bearer ") and not any(s.startswith("Basic") for s in sent)


@responses.activate
def test_a_refusal_says_why(receipts: Receipts) -> None:
    errors = {"errors": [{"code": "DENIED", "message": "requested access to the resource is denied"}]}
    responses.add(responses.HEAD, re.compile(f"{BASE}/blobs/.*"), status=404)
    responses.add(responses.POST, f"{BASE}/blobs/uploads/", status=403, json=errors)
    with pytest.raises(Denied) as caught:
        receipts.attach(published("registry.example.org/org/app:1.0"), SUBJECT, TARGET)
    assert str(caught.value).startswith(
        "attach a receipt for registry.example.org/org/app:1.0 in registry.example.org/org/app: POST: HTTP 403 "
        "(DENIED: requested access to the resource is denied); no credentials are known for registry.example.org"
    )


@responses.activate
def test_a_busy_registry_is_asked_again(receipts: Receipts) -> None:
    responses.add(responses.POST, f"{BASE}/blobs/uploads/", status=429, headers={"Retry-After": "0"})
    responses.add(responses.POST, f"{BASE}/blobs/uploads/", status=503)
    take_pushes()
    receipts.attach(published("registry.example.org/org/app:1.0"), SUBJECT, TARGET)
    assert len([made for made in requests_made() if made.startswith("POST")]) == 2 + 2, "two failures, two blobs"


@responses.activate
def test_a_registry_that_fails_is_asked_three_times_at_most(receipts: Receipts) -> None:
    responses.add(responses.HEAD, re.compile(f"{BASE}/blobs/.*"), status=500)
    with pytest.raises(RegistryError, match="HTTP 500") as caught:
        receipts.attach(published("registry.example.org/org/app:1.0"), SUBJECT, TARGET)
    assert caught.value.temporary and len(responses.calls) == 3


@responses.activate
def test_a_list_that_somebody_replaces_meanwhile_is_merged_again(receipts: Receipts) -> None:
    """The other one read the list before our entry was in it, and writes after us."""
    take_pushes(subject=False)
    url = f"{BASE}/manifests/{referrers_tag(DIGEST)}"
    theirs = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entry(7, "/theirs")]}
    state: list[bytes | None] = [None]
    writes: list[dict[str, Any]] = []

    def get(_: Any) -> tuple[int, dict[str, str], bytes]:
        return (404, {}, b"") if state[0] is None else (200, {"Content-Type": OCI_INDEX}, state[0])

    def put(request: Any) -> tuple[int, dict[str, str], bytes]:
        writes.append(json.loads(request.body))
        state[0] = serialise(theirs) if len(writes) == 1 else request.body
        return 201, {}, b""

    responses.remove(responses.PUT, re.compile(f"{BASE}/manifests/.*"))
    responses.add(responses.PUT, re.compile(f"{BASE}/manifests/sha256:.*"), status=201)
    responses.add_callback(responses.GET, url, get)
    responses.add_callback(responses.PUT, url, put)
    attached = receipts.attach(published("registry.example.org/org/app:1.0"), SUBJECT, TARGET)
    assert [[e["digest"] for e in w["manifests"]] for w in writes] == [
        [attached],
        [entry(7)["digest"], attached],
    ]


def test_whom_to_trust_is_said_by_the_usual_variables() -> None:
    assert authorities({"SSL_CERT_FILE": "/a", "REQUESTS_CA_BUNDLE": "/b"}) == "/a"
    assert authorities({"REQUESTS_CA_BUNDLE": "/b"}) == "/b"
    assert authorities({}) is True or Path(str(authorities({}))).exists()

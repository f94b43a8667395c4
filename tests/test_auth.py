"""Being let in: challenges, tokens, Basic, where credentials come from, and where they go."""

from __future__ import annotations

import base64
import json
import os
import stat
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.fake_registry import FakeRegistry
from tests.images import file, image, layer
from unpacker.digest import Digest
from unpacker.errors import Denied, RegistryError, SettingsError
from unpacker.oci import Descriptor
from unpacker.reference import Reference, Repository
from unpacker.registry.auth import Challenge, parse_challenges
from unpacker.registry.client import Access, Client
from unpacker.registry.credentials import Credentials, Keychain, Mirror

APP = image(layer(file("etc/motd", b"hello\n")))
DIGEST = Digest.parse(APP.digest)


@pytest.fixture
def open_client(tmp_path: Path) -> Iterator[Any]:
    """Makes clients with these documents as docker's config.json, and ends them."""
    clients: list[Client] = []

    def make(config: dict[str, Any] | None = None, **access: Any) -> Client:
        path = None
        if config is not None:
            path = str(tmp_path / f"config-{len(clients)}.json")
            Path(path).write_text(json.dumps(config))
        clients.append(Client(Access(docker_config=path, backoff=0.001, timeout=5, **access)))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


def auths(registry: FakeRegistry, user: str = "ada", password: str = "s3cret:x") -> dict[str, Any]:
    return {"auths": {registry.host: {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}}}


def app(registry: FakeRegistry, name: str = "org/app", tag: str = "1.0") -> Reference:
    return Reference(repository=Repository.parse(f"{registry.url}/{name}"), tag=tag)


@pytest.fixture
def guarded(registry: FakeRegistry) -> FakeRegistry:
    """A registry that wants tokens, and a known user for org/private."""
    registry.auth = "bearer"
    registry.users = {"ada": "s3cret:x"}
    registry.private = {"org/private"}
    for name in ("org/app", "org/private", "org/other"):
        registry.add(name, "1.0", APP)
    return registry


# Challenges.


@pytest.mark.parametrize(
    ("headers", "challenges"),
    [
        (
            ['Bearer realm="https://auth.example/token",service="reg.example",scope="repository:a/b:pull,push"'],
            [("bearer", {"realm": "https://auth.example/token", "service": "reg.example",
                         "scope": "repository:a/b:pull,push"})],
        ),
        (
            ['Basic realm="a, \\"b\\"", Bearer realm="https://x/t", scope="s"'],
            [("basic", {"realm": 'a, "b"'}), ("bearer", {"realm": "https://x/t", "scope": "s"})],
        ),
        (["Basic", "bearer Realm=https://x/t , service=y"],
         [("basic", {}), ("bearer", {"realm": "https://x/t", "service": "y"})]),
        (["Negotiate oRQwEqADCg==, Basic realm=r"], [("negotiate", {}), ("basic", {"realm": "r"})]),
        (["Negotiate, NTLM ,Basic realm = r"], [("negotiate", {}), ("ntlm", {}), ("basic", {"realm": "r"})]),
        (['Bearer realm="unfinished'], [("bearer", {})]),
        (['Bearer realm="https://x/t", error="insufficient_scope", realm="https://evil/t"'],
         [("bearer", {"realm": "https://x/t", "error": "insufficient_scope"})]),
        (["", " , ,", '="x"'], []),
    ],
)  # fmt: skip
def test_challenges_are_parsed_as_the_grammar_has_them(
    headers: list[str], challenges: list[tuple[str, dict[str, str]]]
) -> None:
    assert parse_challenges(headers) == [Challenge(scheme, parameters) for scheme, parameters in challenges]


# Tokens.


@pytest.mark.parametrize("field", ["token", "access_token"])
@pytest.mark.parametrize("actions", ["pull", "pull,push"])
@pytest.mark.parametrize("auth", ["bearer", "both", "two-headers"])
def test_a_token_is_got_without_credentials(
    open_client: Any, guarded: FakeRegistry, field: str, actions: str, auth: str
) -> None:
    guarded.token_field, guarded.actions, guarded.auth = field, actions, auth
    assert str(open_client().head(app(guarded)).digest) == APP.digest
    assert [(r.method, r.path, r.authorization) for r in guarded.requests] == [
        ("HEAD", "/v2/org/app/manifests/1.0", None),
        ("GET", "/token", None),
        ("HEAD", "/v2/org/app/manifests/1.0", "Bearer"),
    ]
    assert guarded.requests[1].query == {"service": "fake, registry", "scope": f"repository:org/app:{actions}"}


def test_a_token_is_used_again_and_a_challenge_seen_once(open_client: Any, guarded: FakeRegistry) -> None:
    client = open_client()
    for _ in range(5):
        client.head(app(guarded))
    client.head(app(guarded, "org/other"))
    # One 401 in all, a token for each repository, one HEAD for each reference.
    assert guarded.count("GET", "^/token$") == 2
    assert guarded.count("HEAD") == 1 + 6
    assert sum(1 for r in guarded.requests if r.method == "HEAD" and not r.authorized) == 1


def test_many_threads_get_one_token(open_client: Any, guarded: FakeRegistry) -> None:
    client = open_client()
    client.head(app(guarded, "org/other"))
    guarded.clear()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(client.head, [app(guarded)] * 50))
    assert guarded.count("GET", "^/token$") == 1
    assert guarded.count("HEAD") == 50


def test_an_expired_token_is_not_used(open_client: Any, guarded: FakeRegistry) -> None:
    guarded.token_expires = 3
    client = open_client()
    client.head(app(guarded))
    client.head(app(guarded))
    assert guarded.count("GET", "^/token$") == 1
    time.sleep(3)
    client.head(app(guarded))
    assert guarded.count("GET", "^/token$") == 2


def test_a_token_refused_early_is_replaced(open_client: Any, guarded: FakeRegistry) -> None:
    client = open_client()
    client.head(app(guarded))
    guarded.clear()
    guarded.reject_tokens = 1
    client.head(app(guarded))
    assert [r.path == "/token" for r in guarded.requests] == [False, True, False]


def test_a_token_server_that_stumbles_is_asked_again(open_client: Any, guarded: FakeRegistry) -> None:
    guarded.fault(status=503, times=2, path="^/token$")
    open_client().head(app(guarded))
    assert guarded.count("GET", "^/token$") == 3


def test_blobs_and_manifests_need_the_same_token(open_client: Any, guarded: FakeRegistry) -> None:
    client = open_client()
    place = app(guarded).repository
    descriptor = client.head(app(guarded))
    client.manifest(place, descriptor.digest)
    client.tags(place)
    assert guarded.count("GET", "^/token$") == 1


# Credentials.


@pytest.mark.parametrize("auth", ["bearer", "basic", "both", "two-headers"])
def test_a_private_repository_opens_to_its_user(open_client: Any, guarded: FakeRegistry, auth: str) -> None:
    guarded.auth = auth
    client = open_client(auths(guarded))
    reference = app(guarded, "org/private")
    assert client.has_credentials(reference.repository)
    assert client.head(reference).digest == DIGEST
    assert guarded.requests[1].authorization == "Basic"


def test_with_basic_only_the_first_request_is_refused(open_client: Any, guarded: FakeRegistry) -> None:
    guarded.auth = "basic"
    client = open_client(auths(guarded))
    for _ in range(3):
        client.head(app(guarded, "org/private"))
    assert [r.authorization for r in guarded.requests] == [None, "Basic", "Basic", "Basic"]


@pytest.mark.parametrize("auth", ["bearer", "basic", "both", "no-header"])
def test_without_credentials_it_stays_closed(open_client: Any, guarded: FakeRegistry, auth: str) -> None:
    guarded.auth = auth
    with pytest.raises(Denied, match=r"HTTP 401.*; no credentials are known for 127\.0\.0\.1") as caught:
        open_client().head(app(guarded, "org/private"))
    assert not caught.value.temporary
    assert len(guarded.requests) <= 3


def test_wrong_credentials_are_said_to_be_wrong(open_client: Any, guarded: FakeRegistry) -> None:
    with pytest.raises(Denied, match="incorrect username or password") as caught:
        open_client(auths(guarded, password="hunter2")).head(app(guarded, "org/private"))
    assert "hunter2" not in str(caught.value)


def test_an_identity_token_is_exchanged_by_post(open_client: Any, guarded: FakeRegistry) -> None:
    guarded.identity_tokens = {"refresh-me"}
    config = {"auths": {guarded.host: {"auth": base64.b64encode(b"x:").decode(), "identitytoken": "refresh-me"}}}
    assert open_client(config).head(app(guarded, "org/private")).digest == DIGEST
    post = guarded.requests[1]
    assert (post.method, post.path, post.query) == ("POST", "/token", {})
    assert "grant_type=refresh_token" in post.body and "refresh_token=refresh-me" in post.body


def test_a_token_server_elsewhere_gets_the_credentials(open_client: Any, guarded: FakeRegistry) -> None:
    with FakeRegistry() as issuer:
        issuer.users = guarded.users
        guarded.realm = f"{issuer.url}/token"
        open_client(auths(guarded)).head(app(guarded, "org/private"))
        assert [r.authorization for r in issuer.requests] == ["Basic"]
        assert "Basic" not in [r.authorization for r in guarded.requests]


def test_a_blob_elsewhere_gets_no_credentials(open_client: Any, guarded: FakeRegistry) -> None:
    with FakeRegistry() as storage:
        storage.add("org/private", "1.0", APP)
        guarded.redirect_blobs = storage.url
        client = open_client(auths(guarded))
        place = app(guarded, "org/private").repository
        descriptor = Descriptor(media_type="", digest=Digest.of(APP.config), size=len(APP.config))
        with client.blob(place, descriptor) as stream:
            assert stream.read(1 << 20) == APP.config
        assert [r.authorized for r in storage.requests] == [False]


# What may become public.


def test_nothing_is_asked_where_no_credentials_are_known(open_client: Any, guarded: FakeRegistry) -> None:
    assert open_client().is_public(app(guarded).repository, DIGEST)
    assert guarded.requests == []


def test_credentials_alone_do_not_make_an_image_private(open_client: Any, guarded: FakeRegistry) -> None:
    client = open_client(auths(guarded))
    client.head(app(guarded))
    guarded.clear()
    assert client.is_public(app(guarded).repository, DIGEST)
    assert "Basic" not in [r.authorization for r in guarded.requests]
    assert guarded.count("HEAD", f"/manifests/{APP.digest}$") == 2  # one of them a 401


@pytest.mark.parametrize("auth", ["bearer", "basic", "no-header"])
@pytest.mark.parametrize("refuses", [True, False])
def test_what_only_a_user_can_read_is_not_public(
    open_client: Any, guarded: FakeRegistry, auth: str, refuses: bool
) -> None:
    guarded.auth, guarded.token_refuses_anonymous = auth, refuses
    client = open_client(auths(guarded))
    assert not client.is_public(app(guarded, "org/private").repository, DIGEST)


def test_a_registry_that_hides_what_is_private_says_not_found(open_client: Any, guarded: FakeRegistry) -> None:
    client = open_client(auths(guarded))
    guarded.fault(status=404, times=9, path="/manifests/")
    assert not client.is_public(app(guarded, "org/private").repository, DIGEST)


def test_whether_it_is_public_may_be_unknown(open_client: Any, guarded: FakeRegistry) -> None:
    client = open_client(auths(guarded))
    guarded.fault(status=500, times=9, path="/manifests/")
    with pytest.raises(RegistryError, match="without credentials: HTTP 500"):
        client.is_public(app(guarded, "org/private").repository, DIGEST)


def test_an_anonymous_request_brings_no_cookie_of_a_user(open_client: Any, guarded: FakeRegistry) -> None:
    client = open_client(auths(guarded))
    cookie = {"Set-Cookie": "session=ada; Path=/"}
    guarded.fixed["/v2/org/app/tags/list"] = (b'{"tags": []}', cookie)
    client.tags(app(guarded).repository)
    client.is_public(app(guarded).repository, DIGEST)
    assert not any("cookie" in r.headers for r in guarded.requests)


# Where credentials come from.


def keychain(tmp_path: Path, config: Any, **environment: str) -> Keychain:
    path = tmp_path / "config.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return Keychain(str(path), environment)


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


ADA = Credentials(user="ada", password="s3cret")


@pytest.mark.parametrize(
    "key",
    ["reg.example", "https://reg.example", "https://reg.example/v2/", "http://REG.example/v1/", "reg.example/org"],
)
def test_docker_configs_spell_hosts_in_many_ways(tmp_path: Path, key: str) -> None:
    found = keychain(tmp_path, {"auths": {key: {"auth": encoded("ada:s3cret")}}})
    assert found.find("reg.example", "org/app") == ADA
    assert found.find("reg.example.evil.example", "org/app") is None
    assert found.find("evil.example", "reg.example/org") is None
    assert found.find("reg.example:5000", "org/app") is None


@pytest.mark.parametrize("key", ["https://index.docker.io/v1/", "docker.io", "registry-1.docker.io"])
def test_docker_hub_has_one_set_of_credentials(tmp_path: Path, key: str) -> None:
    found = keychain(tmp_path, {"auths": {key: {"username": "ada", "password": "s3cret"}}})
    assert found.find("registry-1.docker.io", "library/alpine") == ADA


def test_the_longest_path_wins(tmp_path: Path) -> None:
    entries = {"reg.example": "all:1", "reg.example/org": "org:2", "reg.example/org/app": "app:3"}
    found = keychain(tmp_path, {"auths": {k: {"auth": encoded(v)} for k, v in entries.items()}})
    users = {
        name: getattr(found.find("reg.example", name), "user", None) for name in ("x", "org/x", "org/app", "organ")
    }
    assert users == {"x": "all", "org/x": "org", "org/app": "app", "organ": "all"}


def test_podmans_file_is_read_too(tmp_path: Path) -> None:
    folder = tmp_path / "containers"
    folder.mkdir()
    (folder / "auth.json").write_text(json.dumps({"auths": {"reg.example": {"auth": encoded("ada:s3cret")}}}))
    found = Keychain(None, {"HOME": str(tmp_path / "none"), "XDG_RUNTIME_DIR": str(tmp_path)})
    assert found.find("reg.example", "org/app") == ADA
    assert Keychain(None, {"HOME": str(tmp_path / "none")}).find("reg.example", "org/app") is None


@pytest.mark.parametrize(
    "config",
    ["", "[]", '{"auths": []}', '{"auths": {"a": 1}}', '{"auths": {"a.b": {"auth": "%%"}}}', '{"credsStore": "../x"}'],
)
def test_a_file_that_makes_no_sense_is_not_taken_for_an_empty_one(tmp_path: Path, config: str) -> None:
    with pytest.raises(SettingsError, match=r"config\.json"):
        keychain(tmp_path, config)


def test_a_file_that_was_named_must_exist(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no such file"):
        Keychain(str(tmp_path / "none.json"), {})


@pytest.fixture
def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """docker-credential-test, which knows reg.example and counts in its log how often it is asked."""
    program = tmp_path / "bin" / "docker-credential-test"
    program.parent.mkdir()
    program.write_text(
        f"""#!/bin/sh
read -r host || true
echo "$1 $host" >> {tmp_path}/log
case "$host" in
  reg.example) echo '{{"ServerURL": "reg.example", "Username": "ada", "Secret": "s3cret"}}' ;;
  token.example) echo '{{"ServerURL": "token.example", "Username": "<token>", "Secret": "idtok"}}' ;;
  broken.example) echo 's3cret'; exit 3 ;;
  *) echo 'credentials not found in native keychain'; exit 1 ;;
esac
"""
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return tmp_path / "log"


def test_a_credential_helper_is_asked_once(tmp_path: Path, helper: Path) -> None:
    found = keychain(tmp_path, {"credHelpers": {"reg.example": "test", "token.example": "test"}})
    assert found.find("reg.example", "org/app") == ADA == found.find("reg.example", "org/other")
    assert found.find("token.example", "a") == Credentials(user="", identity_token="idtok")
    assert found.find("other.example", "a") is None
    assert helper.read_text() == "get reg.example\nget token.example\n"


def test_a_store_is_asked_before_the_file(tmp_path: Path, helper: Path) -> None:
    config = {"credsStore": "test", "auths": {"reg.example": {}, "plain.example": {"auth": encoded("eve:x")}}}
    found = keychain(tmp_path, config)
    assert found.find("reg.example", "a") == ADA
    assert found.find("plain.example", "a") == Credentials(user="eve", password="x")
    assert found.find("registry-1.docker.io", "library/alpine") is None
    assert "get https://index.docker.io/v1/\n" in helper.read_text()


def test_a_helper_that_fails_is_not_taken_for_one_that_knows_nothing(tmp_path: Path, helper: Path) -> None:
    found = keychain(tmp_path, {"credHelpers": {"broken.example": "test", "none.example": "not-installed"}})
    with pytest.raises(RegistryError, match=r"docker-credential-test failed for broken.example \(exit 3\)") as caught:
        found.find("broken.example", "a")
    assert "s3cret" not in str(caught.value)
    with pytest.raises(RegistryError, match="cannot run the credential helper docker-credential-not-installed"):
        found.find("none.example", "a")


# DUCC's variables.


def ducc(**values: str) -> Keychain:
    environment = {"HOME": "/nonexistent", "DUCC_AUTH_REGISTRIES": "A"}
    return Keychain(None, environment | {f"DUCC_A_{k}": v for k, v in values.items()})


def test_duccs_variables_give_credentials() -> None:
    found = ducc(IDENT="https://gitlab-registry.example.org/atlas", USER="ada", PASS="s3cret")
    assert found.find("gitlab-registry.example.org", "atlas/app") == ADA
    assert found.find("gitlab-registry.example.org", "cms/app") is None
    assert ducc(IDENT="docker.io", USER="ada", PASS="s3cret").find("registry-1.docker.io", "library/a") == ADA


def test_an_ident_elsewhere_in_the_url_gets_nothing() -> None:
    found = ducc(IDENT="reg.example.org", USER="ada", PASS="s3cret")
    assert found.find("vm.reg.example.org", "app") is None, "whoever writes a wishlist may have a host in the domain"
    assert found.find("evil.example", "reg.example.org/app") is None
    assert found.find("reg.example.org.evil.example", "app") is None
    assert found.find("evil-reg.example.org", "app") is None


@pytest.mark.parametrize(
    "values", [{}, {"IDENT": "a.b"}, {"IDENT": "a.b", "USER": "u"}, {"IDENT": "gitlab", "USER": "u", "PASS": "p"}]
)
def test_half_a_label_is_an_error(values: dict[str, str]) -> None:
    with pytest.raises(SettingsError, match="DUCC_A_IDENT"):
        ducc(**values)


def test_a_proxy_label_names_a_pull_through_cache() -> None:
    found = ducc(IDENT="docker.io", USER="ada", PASS="s3cret", PROXY="cache.example/hub")
    assert found.mirror("registry-1.docker.io", "library/a") == Mirror(scheme="https", host="cache.example", path="hub")
    assert found.find("registry-1.docker.io", "library/a") is None
    assert found.mirror("ghcr.io", "a") is None


def test_what_comes_through_a_cache_is_public_only_if_the_registry_says_so(
    open_client: Any, guarded: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FakeRegistry() as cache:
        cache.add("hub/org/private", "1.0", APP)
        cache.add("hub/org/app", "1.0", APP)
        monkeypatch.setenv("DUCC_AUTH_REGISTRIES", "HUB")
        monkeypatch.setenv("DUCC_HUB_IDENT", guarded.host)
        monkeypatch.setenv("DUCC_HUB_PROXY", f"{cache.url}/hub")
        client = open_client()
        assert client.head(app(guarded, "org/private")).digest == DIGEST
        assert [r.path for r in cache.requests] == ["/v2/hub/org/private/manifests/1.0"]
        assert guarded.requests == []
        assert not client.is_public(app(guarded, "org/private").repository, DIGEST)
        assert client.is_public(app(guarded, "org/app").repository, DIGEST)


def test_settings_are_read_when_the_client_is_opened(tmp_path: Path) -> None:
    with pytest.raises(SettingsError), closing(Access(docker_config=str(tmp_path / "none")).open()):
        pytest.fail("opened")

"""Fixtures for all tests: registries of ours and Debian's, and an environment without this machine's settings."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import docker_registry as debian
from tests.fake_registry import FakeRegistry
from unpacker.publish import posix

_SETTINGS = (
    "DUCC_", "UNPACKER_", "DOCKER_", "REGISTRY_AUTH_FILE", "XDG_RUNTIME_DIR", "XDG_STATE_HOME",
    "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE",
)  # fmt: skip

pytest.register_assert_rewrite("tests.publisher_contract")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No credential, proxy or setting of whoever runs the tests reaches them."""
    for name in list(os.environ):
        if name.upper().startswith(_SETTINGS):
            monkeypatch.delenv(name)
    home = tmp_path_factory.getbasetemp() / "home"
    home.mkdir(exist_ok=True)
    monkeypatch.setenv("HOME", str(home))


@pytest.fixture
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that do not pull the plug: syncing a busy machine's disk takes seconds each time."""
    monkeypatch.setattr(posix, "syncfs", lambda fd: None)
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    """A registry of ours that serves literal images and misbehaves on request."""
    with FakeRegistry() as fake:
        yield fake


@pytest.fixture(scope="session")
def _docker_registry_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[debian.DockerRegistry]:
    if debian.PROGRAM is None:
        pytest.skip("docker-registry is not installed (apt install docker-registry): nothing tested with it")
    with debian.DockerRegistry(tmp_path_factory.mktemp("docker-registry")) as running:
        yield running


@pytest.fixture
def docker_registry(_docker_registry_process: debian.DockerRegistry) -> debian.DockerRegistry:
    """Debian's docker-registry, one for the whole run: tests use repository names of their own."""
    return _docker_registry_process


@pytest.fixture
def fresh_docker_registry(tmp_path: Path) -> Iterator[debian.DockerRegistry]:
    """An empty docker-registry for one test."""
    if debian.PROGRAM is None:
        pytest.skip("docker-registry is not installed (apt install docker-registry): nothing tested with it")
    with debian.DockerRegistry(tmp_path / "docker-registry") as running:
        yield running


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--torture", action="store_true", help="every point to be killed at, long sequences")

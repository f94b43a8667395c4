"""The Dockerfile makes an image that is `unpacker` for any user: built with buildah on a base of debootstrap's.

Takes minutes, most of them for making the base, and a mirror of Debian; so it runs where it is asked for:

    UNPACKER_TEST_DOCKERFILE=1 make test TESTS=tests/test_dockerfile.py

The base is kept in the user's cache directory for the next time; remove it there to have a new one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docker_registry import DockerRegistry
from unpacker import __version__

TOP = Path(__file__).parent.parent
# The settings of whoever runs the tests, kept here before a fixture takes proxies and certificates away.
ENVIRONMENT = dict(os.environ)
MIRROR = ENVIRONMENT.get("DEBIAN_MIRROR", "http://deb.debian.org/debian")
SUITE = "bookworm"
CACHE = Path(ENVIRONMENT.get("XDG_CACHE_HOME") or Path.home() / ".cache", "unpacker-tests")
USER = "12345:12345"

MISSING = [program for program in ("buildah", "debootstrap", "docker-registry") if shutil.which(program) is None]
if not ENVIRONMENT.get("UNPACKER_TEST_DOCKERFILE"):
    WHY = "takes minutes: set UNPACKER_TEST_DOCKERFILE=1 to build the Dockerfile"
elif MISSING:
    WHY = f"not installed: {', '.join(MISSING)} (apt install them): the Dockerfile was not built"
elif os.geteuid() != 0:
    WHY = "debootstrap needs root: the Dockerfile was not built"
elif sys.version_info[:2] != (3, 11):
    WHY = f"wheels for Python {sys.version_info[0]}.{sys.version_info[1]} do not fit the base's Python 3.11"
else:
    WHY = ""
pytestmark = [pytest.mark.skipif(bool(WHY), reason=WHY), pytest.mark.slow, pytest.mark.timeout(600)]


class Buildah:
    """buildah with a store of its own: needs neither overlayfs nor a container runtime nor a daemon."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def __call__(self, *arguments: str) -> str:
        store = ("--root", str(self._directory / "store"), "--runroot", str(self._directory / "run"))
        return run("buildah", "--storage-driver", "vfs", *store, *arguments)


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout.strip()


@pytest.fixture(scope="module")
def buildah(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Buildah]:
    directory = tmp_path_factory.mktemp("buildah")
    yield Buildah(directory)
    shutil.rmtree(directory)  # some hundred megabytes


def debootstrap(root: Path, archive: Path) -> None:
    """Makes the archive of a Debian with Python, by way of `root`."""
    include = "--include=python3,python3-venv,ca-certificates"
    # dpkg syncs every file of what is thrown away a minute later, unless it is told not to.
    command = ["env", "DPKG_FORCE=unsafe-io", "debootstrap", "--variant=minbase", include, SUITE, str(root), MIRROR]
    run(*command)
    for unneeded in ("var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/locale", "usr/share/man"):
        shutil.rmtree(root / unneeded)  # half of it all, and it is copied several times
    archive.parent.mkdir(parents=True, exist_ok=True)
    partial = archive.with_suffix(f".{os.getpid()}")
    run("tar", "--create", "--one-file-system", "--directory", str(root), "--file", str(partial), ".")
    partial.replace(archive)
    shutil.rmtree(root)


@pytest.fixture(scope="module")
def base(buildah: Buildah, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Debian with Python in a registry on this machine; gives its name there."""
    directory = tmp_path_factory.mktemp("base")
    archive = CACHE / f"{SUITE}-python3.tar"
    if not archive.exists():
        debootstrap(directory / "root", archive)
    with DockerRegistry(directory / "registry") as registry:
        container = buildah("from", "scratch")
        buildah("add", "-q", container, str(archive), "/")
        buildah("config", "--env", "PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", container)
        name = f"{registry.host}/base:{SUITE}"
        buildah("commit", "-q", "--rm", "--tls-verify=false", container, f"docker://{name}")
        yield name
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def built(buildah: Buildah, base: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The image, from this checkout and from wheels that pip gets on this machine with this machine's settings."""
    wheels = tmp_path_factory.mktemp("wheels")
    project = tomllib.loads((TOP / "pyproject.toml").read_text())
    requirements = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    run(sys.executable, "-m", "pip", "wheel", "-q", "-w", str(wheels), *requirements)
    buildah(
        "build", "-q", "--isolation", "chroot", "--layers=false", "--tls-verify=false",
        "--build-arg", f"BASE={base}", "--build-arg", "PIP_FIND_LINKS=/wheels", "--build-arg", "PIP_NO_INDEX=1",
        "--volume", f"{wheels}:/wheels:ro", "-t", "unpacker", str(TOP),
    )  # fmt: skip
    return "unpacker"


@pytest.fixture(scope="module")
def container(buildah: Buildah, built: str) -> str:
    """One of that image for all tests: each has a copy of all files, which takes longer than what is tested with it."""
    return buildah("from", built)


def test_the_image_is_unpacker(buildah: Buildah, built: str, container: str) -> None:
    configuration = json.loads(buildah("inspect", "--type", "image", built))["OCIv1"]["config"]
    assert configuration["Entrypoint"] == ["unpacker"]
    assert configuration["User"].partition(":")[0] not in ("", "0", "root")
    command = [*configuration["Entrypoint"], "--version"]
    assert __version__ in buildah("run", "--isolation", "chroot", container, "--", *command)


def test_any_user_may_run_it(buildah: Buildah, container: str) -> None:
    script = "touch /var/lib/unpacker/state && unpacker --help && id -u"
    said = buildah("run", "--isolation", "chroot", "--user", USER, container, "--", "sh", "-ec", script)
    assert "reconcile" in said and said.endswith(USER.partition(":")[0])


def test_the_image_brings_no_tools_to_build_with(buildah: Buildah, container: str) -> None:
    brought = buildah("run", "--isolation", "chroot", container, "--", "ls", "/opt/unpacker/bin")
    assert "unpacker" in brought.split() and "pip" not in brought.split()

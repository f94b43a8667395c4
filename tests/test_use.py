"""The lines that run a published image: found by every name users have for it, written as each consumer reads it."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from tests.cvmfs_repositories import NAME as REPOSITORY
from tests.cvmfs_repositories import NOW
from tests.publisher_contract import front, platform_release, publish, publish_platforms, release, stored
from unpacker import journal
from unpacker.cli import app
from unpacker.consumers import CONSUMERS, Usable, lines
from unpacker.cvmfs.repository import Repository
from unpacker.errors import PublishError, SettingsError
from unpacker.lookup import near, read
from unpacker.pending import pending
from unpacker.publish import posix
from unpacker.publish.directory import DirectoryPublisher
from unpacker.publish.stratum0 import Stratum0Publisher
from unpacker.readers import DirectoryReader, Found, RepositoryReader, find
from unpacker.record import Published
from unpacker.settings import Settings
from unpacker.status import Failure

HUB = "registry.hub.docker.com"
ALPINE = f"{HUB}/library/alpine:3.10"
LATEST = f"{HUB}/library/alpine:latest"
ROOT = "docker.io/rootproject/root:6.30"
ATHENA = "gitlab-registry.cern.ch/atlas/athena/analysisbase:24.2.40"
TOOL = "ghcr.io/org/tool:1.0"
PORT = "registry.example.org:5000/team/gpu-tool:2"
PLATFORMS = "quay.io/org/many:1"


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory target with images of several registries, one of which wants a GPU and one is for two platforms."""
    path = tmp_path_factory.mktemp("use") / "unpacked images"
    publisher = DirectoryPublisher(str(path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(posix, "syncfs", lambda fd: None)
        patch.setattr(os, "fsync", lambda fd: None)
        with publisher.lock(), publisher.transaction("publish") as transaction:
            for seed, name in enumerate((ALPINE, LATEST, ROOT, ATHENA, TOOL, PORT)):
                what = release(name, stored(publisher, {"motd": name.encode()}), seed=str(seed))
                transaction.publish(replace(what, record=replace(what.record, gpu=name == PORT)))
            for architecture in ("amd64", "arm64"):
                tree = stored(publisher, {"motd": architecture.encode()})
                transaction.publish(platform_release(PLATFORMS, tree, f"linux/{architecture}", seed=architecture))
            transaction.point(front(publisher, PLATFORMS))
    foreign = path / "ghcr.io/ducc/made:1"
    foreign.parent.mkdir()
    foreign.symlink_to("../../.flat/aa/another")
    yield path


def run(target: Path, *arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, ["use", *arguments, "--target", str(target), "--state", str(target / "none")])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.output
    return done.output


def found(target: Path, text: str) -> str:
    reader = DirectoryReader(str(target), "/cvmfs/unpacked.example.org")
    what = find(read(text, reader.mounts), reader)
    return what.name if isinstance(what, Found) else f"missing, near: {', '.join(what.near)}"


# -- by every name ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("docker://alpine:3.10", ALPINE),
        ("alpine:3.10", ALPINE),
        ("library/alpine:3.10", ALPINE),
        ("docker.io/library/alpine:3.10", ALPINE),
        ("docker.io/alpine:3.10", ALPINE),
        (f"https://{ALPINE}", ALPINE),
        (ALPINE, ALPINE),
        ("alpine", LATEST),
        ("docker://alpine", LATEST),
        ("rootproject/root:6.30", ROOT),
        (f"https://{HUB}/rootproject/root:6.30", ROOT),
        (TOOL, TOOL),
        (f"docker://{TOOL}", TOOL),
        (PORT, PORT),
        ("6.30", ROOT),
        ("24.2.40", ATHENA),
        (f"/cvmfs/unpacked.example.org/{ATHENA}", ATHENA),
        (f"/cvmfs/unpacked.example.org/{ATHENA}/", ATHENA),
        (f"/cvmfs/unpacked.cern.ch/{ATHENA}", ATHENA),
        (PLATFORMS, PLATFORMS),
        (f".multiarch/arm64:v8/{PLATFORMS}", f".multiarch/arm64:v8/{PLATFORMS}"),
        (f".multiarch/arm64/{PLATFORMS}", f".multiarch/arm64:v8/{PLATFORMS}"),
        (f"/cvmfs/unpacked.example.org/.multiarch/aarch64/{PLATFORMS}", f".multiarch/arm64:v8/{PLATFORMS}"),
        ("ghcr.io/ducc/made:1", "ghcr.io/ducc/made:1"),
    ],
)
def test_an_image_is_found_by_every_name_that_users_have_for_it(target: Path, text: str, name: str) -> None:
    assert found(target, text) == name


def test_an_image_is_found_by_its_path_in_the_target_and_by_its_root(target: Path) -> None:
    assert found(target, f"{target}/{ALPINE}") == ALPINE
    assert found(target, os.path.realpath(target / ALPINE)) == ALPINE


@pytest.mark.parametrize("key", ["digest", "manifest_digest", "image_id"])
def test_an_image_is_found_by_each_of_its_digests(target: Path, key: str) -> None:
    record = DirectoryPublisher(str(target)).published()[ATHENA]
    assert isinstance(record, Published)
    digest = getattr(record, key)
    for text in (digest, f"{ATHENA.rpartition(':')[0]}@{digest}", f"{ATHENA}@{digest}"):
        assert found(target, text) == ATHENA


def test_the_short_image_id_that_status_shows_is_enough(target: Path) -> None:
    record = DirectoryPublisher(str(target)).published()[TOOL]
    assert isinstance(record, Published)
    assert found(target, record.image_id.partition(":")[2][:12]) == TOOL


def test_a_tag_pinned_to_another_digest_than_published_is_not_published(target: Path) -> None:
    assert found(target, f"{TOOL}@sha256:{'0' * 64}") == f"missing, near: {TOOL}"
    assert found(target, f"ghcr.io/org/tool@sha256:{'0' * 64}").startswith("missing")


def test_the_same_digest_of_another_repository_does_not_count(target: Path) -> None:
    record = DirectoryPublisher(str(target)).published()[TOOL]
    assert isinstance(record, Published)
    assert found(target, f"ghcr.io/other/tool@{record.image_id}").startswith("missing")


@pytest.mark.parametrize(
    ("text", "near_to"),
    [
        ("alpine:3.11", ALPINE),
        ("org/tool:1.0", TOOL),
        ("tool:1.0", TOOL),
        ("ghcr.io/org/tol:1.0", TOOL),
        ("analysisbase", ATHENA),
        ("analysisbase:24.2.41", ATHENA),
    ],
)
def test_what_is_not_published_is_told_with_what_is_near(target: Path, text: str, near_to: str) -> None:
    answer = found(target, text)
    assert answer.startswith("missing")
    assert near_to in answer


def test_the_tag_most_alike_is_told_first() -> None:
    names = [f"{HUB}/library/alpine:{tag}" for tag in ("2.7", "3.9", "3.19", "edge")]
    assert near(read("alpine:3.18", ["/t"]), names)[0] == f"{HUB}/library/alpine:3.19"


def test_nothing_near_is_nothing_and_not_everything(target: Path) -> None:
    assert found(target, "quay.io/completely/different:9") == "missing, near: "


@pytest.mark.parametrize(
    "text",
    [
        *("", "a b", "-x", "/etc/passwd", "/cvmfs", "/cvmfs/x/.multiarch/amd64", "/cvmfs/x/.multiarch/arm64:v8"),
        *("ftp://h.org/a:1", "A/b:1", "a:b:c", "a@sha256:1", "x" * 2000, "a\nb"),
    ],
)
def test_what_cannot_be_an_image_is_a_wrong_argument(target: Path, text: str) -> None:
    reader = DirectoryReader(str(target))
    with pytest.raises(ValueError, match=r"\w"):
        read(text, reader.mounts)


def linked(path: Path, *names: str) -> Path:
    """A target in which another tool published these names."""
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).symlink_to("../" * name.count("/") + ".flat/aa/root")
    (path / ".flat").mkdir()
    return path


def test_what_an_image_is_called_is_not_taken_for_the_tag_of_another(tmp_path: Path) -> None:
    place = linked(tmp_path, f"{HUB}/library/python:alpine", f"{HUB}/library/ruby:3.1-alpine")
    assert found(place, "alpine") == f"missing, near: {HUB}/library/python:alpine"
    assert found(place, "3.1-alpine") == f"{HUB}/library/ruby:3.1-alpine"


def test_a_digest_that_another_tool_published_is_found_by_its_name(tmp_path: Path) -> None:
    digest = f"sha256:{'c' * 64}"
    place = linked(tmp_path, f"ghcr.io/org/tool:{digest}", "ghcr.io/org/tool:1")
    assert found(place, f"ghcr.io/org/tool@{digest}") == f"ghcr.io/org/tool:{digest}"
    assert found(place, f"ghcr.io/org/tool:1@{digest}").startswith("missing")


def test_a_directory_on_which_nothing_is_mounted_is_not_one_without_the_image(tmp_path: Path) -> None:
    with pytest.raises(PublishError, match="mounted"):
        found(tmp_path, "alpine")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A native repository that nobody has mounted here."""
    path = tmp_path_factory.mktemp("use") / "repository"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(posix, "syncfs", lambda fd: None)
        patch.setattr(os, "fsync", lambda fd: None)
        Repository.create(str(path), REPOSITORY, now=NOW)
        publisher = Stratum0Publisher(
            str(path), clock=lambda: NOW + 1000, spool_root="/nowhere", configuration="/nowhere"
        )
        publish(publisher, ALPINE, {".singularity.d/labels.json": b'{"a": "b"}'}, seed="0")
        publish_platforms(publisher, PLATFORMS, amd64=b"amd64", arm64=b"arm64")
    return path


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("docker://alpine:3.10", ALPINE),
        ("3.10", ALPINE),
        (f"/cvmfs/{REPOSITORY}/{ALPINE}", ALPINE),
        (PLATFORMS, PLATFORMS),
        (f"/cvmfs/{REPOSITORY}/.multiarch/arm64/{PLATFORMS}", f".multiarch/arm64:v8/{PLATFORMS}"),
    ],
)
def test_a_repository_on_this_host_is_read_without_a_client(repository: Path, text: str, name: str) -> None:
    state = str(repository.parent / "state")
    arguments = ["use", text, "--target", f"stratum0:{repository}", "--state", state, "--json"]
    done = CliRunner().invoke(app, arguments)
    value = json.loads(done.stdout)
    assert (value["name"], value["path"]) == (name, f"/cvmfs/{REPOSITORY}/{name}")
    assert value["published"] is not None
    assert value["platforms"] == (["amd64", "arm64:v8"] if name == PLATFORMS else [])
    assert ("module" in value["lines"]) is not name.startswith(".multiarch")


def test_small_files_of_a_repository_are_read_without_a_client(repository: Path) -> None:
    reader = RepositoryReader(Stratum0Publisher(str(repository)))
    record = reader.standing(ALPINE)
    assert isinstance(record, Published)
    assert reader.file(f"{record.root}/.singularity.d/labels.json") == b'{"a": "b"}'
    assert reader.file("nothing") is None


# -- what is pending --------------------------------------------------------------------------------------------


def test_what_a_wishlist_asks_for_is_pending(target: Path, tmp_path: Path) -> None:
    wishlist = tmp_path / "wishlist.yaml"
    wishlist.write_text(f"version: 2\nimages:\n- ghcr.io/org/tool:2.*\n- {HUB}/library/alpine:9\n")
    for text, line in (("docker://ghcr.io/org/tool:2.1", 3), ("alpine:9", 4)):
        said = run(target, text, "--wishlist", str(wishlist), code=1)
        assert f"it is asked for in {wishlist}, line {line}" in said
    value = json.loads(run(target, "alpine:9", "--wishlist", str(wishlist), "--json", code=1))
    assert (value["name"], value["state"]) == (f"{HUB}/library/alpine:9", "pending")
    assert f"nor is it asked for in {wishlist}" in run(target, "alpine:8", "--wishlist", str(wishlist), code=1)


def test_one_platform_is_pending_if_it_is_asked_for(target: Path, tmp_path: Path) -> None:
    wishlist = tmp_path / "wishlist.yaml"
    wishlist.write_text("version: 2\nimages:\n- {image: 'ghcr.io/org/tool:3', platforms: [linux/arm64]}\n")
    given = ("--wishlist", str(wishlist))
    assert "line 3, and no run" in run(target, ".multiarch/aarch64/ghcr.io/org/tool:3", *given, code=1)
    assert "nor is it asked for" in run(target, ".multiarch/amd64/ghcr.io/org/tool:3", *given, code=1)


def test_what_fails_is_told_with_its_error_from_what_the_target_says(target: Path) -> None:
    note = {"schema": 1, "names": {}, "wishlists": {"w": {"failing": {"ghcr.io/org/bad:1": {"error": "too large"}}}}}
    path = target / ".metadata/status.json"
    path.write_text(json.dumps(note))
    try:
        assert "it is asked for and fails: too large" in run(target, "ghcr.io/org/bad:1", code=1)
        value = json.loads(run(target, "ghcr.io/org/bad:1", "--json", code=1))
        assert (value["state"], value["error"]) == ("failing", "too large")
    finally:
        path.unlink()


def test_what_fails_is_told_beside_ten_thousand_names_and_cannot_move_the_cursor(target: Path) -> None:
    names = {f"ghcr.io/org/many:{n}": {"image_id": "sha256:" + "0" * 64, "published": None} for n in range(10_000)}
    failing = {"ghcr.io/org/bad:1": {"error": "odd \x1b[2J type"}}
    path = target / ".metadata/status.json"
    path.write_text(json.dumps({"schema": 1, "names": names, "wishlists": {"w": {"failing": failing}}}))
    try:
        assert r"fails: odd \x1b[2J type" in run(target, "ghcr.io/org/bad:1", code=1)
    finally:
        path.unlink()


def test_the_journal_of_a_repository_in_the_home_directory_is_found(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    failures = {ALPINE: Failure(since=1_000, last=2_000, error="no room")}
    place = journal.directory(str(tmp_path), os.path.realpath(tmp_path / "repository"))
    journal.store(place, journal.Journal(failures=failures, finished=2_000), "ours")
    settings = Settings(target="stratum0:~/repository", state=str(tmp_path))
    said = pending(read(ALPINE, ["/cvmfs"]), DirectoryReader(str(target)), settings, None)
    assert (said.state, said.error) == ("failing", "no room")


def test_what_fails_is_told_from_the_journal_of_this_host_with_since_when(target: Path, tmp_path: Path) -> None:
    failures = {f".multiarch/amd64/{HUB}/library/odd:1": Failure(since=1_000, last=2_000, error="no image for it")}
    place = journal.directory(str(tmp_path), os.path.realpath(target))
    journal.store(place, journal.Journal(failures=failures, finished=2_000), "ours")
    said = CliRunner().invoke(app, ["use", "odd:1", "--target", str(target), "--state", str(tmp_path), "--json"])
    value = json.loads(said.output)
    assert (value["state"], value["since"], value["error"]) == ("failing", "1970-01-01T00:16:40Z", "no image for it")


@pytest.mark.parametrize("note", ["", "{", "[]", '{"wishlists": 7}', '{"wishlists": {"w": {"failing": {"a": 1}}}}'])
def test_a_status_that_cannot_be_read_says_nothing(target: Path, note: str) -> None:
    path = target / ".metadata/status.json"
    path.write_text(note)
    try:
        assert "--wishlist" in run(target, "ghcr.io/org/bad:1", code=1)
    finally:
        path.unlink()


# -- the lines --------------------------------------------------------------------------------------------------

PATH = f"/cvmfs/unpacked.cern.ch/{HUB}/library/alpine:3.10.2"
IMAGE = Usable(path=PATH, module="alpine/3.10.2")
GPU = Usable(path=PATH, module="alpine/3.10.2", gpu=True)

GOLDEN = {
    "apptainer": (
        f"apptainer run {PATH}",
        f"apptainer exec {PATH} cat /etc/os-release",
        f"apptainer shell {PATH}",
    ),
    "prun": (f'prun --containerImage {PATH} --exec "cat /etc/os-release" --outDS "user.$RUCIO_ACCOUNT.test"',),
    "ganga": (
        f"j.virtualization = Singularity('{PATH}')",
        "j.virtualization.mounts = {'/cvmfs': '/cvmfs'}",
    ),
    "htcondor": (
        "# in the submit file of a job",
        "universe = container",
        f"container_image = {PATH}",
        "# or in the configuration of an execution point, for all of its jobs",
        "SINGULARITY_JOB = true",
        f'SINGULARITY_IMAGE_EXPR = "{PATH}"',
        "SINGULARITY_TARGET_DIR = /srv",
        "MOUNT_UNDER_SCRATCH = /tmp, /var/tmp",
    ),
    "glideinwms": (
        "<!-- in the configuration of the frontend or a group, for all jobs -->",
        '<attr name="SINGULARITY_IMAGES_DICT" glidein_publish="True" job_publish="True" parameter="True" type="string" '
        f'value="default:{PATH}"/>',
        "# or in the submit file of a job",
        f'+SingularityImage = "{PATH}"',
    ),
    "parsl": (
        "from parsl.executors import HighThroughputExecutor",
        "from parsl.launchers import WrappedLauncher",
        "from parsl.providers import LocalProvider",
        f"launcher = WrappedLauncher(prepend='apptainer exec {PATH}')",
        "executor = HighThroughputExecutor(label='image', provider=LocalProvider(launcher=launcher))",
    ),
    "reana": (f'environment: "{PATH}"', "unpacked_img: true", "compute_backend: htcondorcern  # or slurmcern"),
    "podman": (f'podman run --rm -it --rootfs "$(readlink -f {PATH})":O sh',),
    "module": (
        "module load alpine/3.10.2",
        "singularity_wrapper run",
        "singularity_wrapper exec cat /etc/os-release",
        "singularity_wrapper shell sh",
    ),
}


@pytest.mark.parametrize("consumer", CONSUMERS)
def test_the_lines_are_those_that_the_consumer_documents(consumer: str) -> None:
    assert lines(consumer, IMAGE) == GOLDEN[consumer]


@pytest.mark.parametrize(
    ("consumer", "line"),
    [
        ("apptainer", f"apptainer exec --nv {PATH} cat /etc/os-release"),
        ("ganga", "j.virtualization.options = ['--nv']"),
        ("htcondor", "request_gpus = 1"),
        ("parsl", f"launcher = WrappedLauncher(prepend='apptainer exec --nv {PATH}')"),
        ("podman", f'podman run --rm -it --device nvidia.com/gpu=all --rootfs "$(readlink -f {PATH})":O sh'),
    ],
)
def test_an_image_that_wants_a_gpu_is_given_one(consumer: str, line: str) -> None:
    assert line in lines(consumer, GPU)


ODD = [
    "/srv/un packed/a:1",
    "/srv/$(touch /tmp/pwned)/a:1",
    "/srv/`id`/a:1",
    "/srv/it's/a:1",
    '/srv/"quoted"/a:1',
    "/srv/;reboot;/a:1",
    "/srv/back\\slash/a:1",
    "/srv/caf\u00e9/a:1",
    "/srv/-rf/*/a:1",
    "/srv/<&>/a:1",
    "/srv/#no/a:1",
    "/srv/%s{}/a:1",
]


@pytest.mark.parametrize("path", ODD)
def test_shell_lines_parse_and_hand_over_the_path_as_it_is(path: str, tmp_path: Path) -> None:
    stand_in = tmp_path / "bin"
    stand_in.mkdir()
    for name in ("apptainer", "prun", "podman", "readlink"):
        argv = shlex.quote(f"{tmp_path}/argv")
        script = 'printf "%s\\n" "$2"' if name == "readlink" else f'printf "%s\\0" "$@" > {argv}'
        (stand_in / name).write_text(f"#!/bin/sh\n{script}\n")
        (stand_in / name).chmod(0o755)
    for consumer in ("apptainer", "prun", "podman"):
        for line in lines(consumer, Usable(path=path, module="a/1")):
            environment = {"PATH": f"{stand_in}:/usr/bin:/bin", "RUCIO_ACCOUNT": "me"}
            done = subprocess.run(["sh", "-euc", line], env=environment, cwd=tmp_path, capture_output=True, timeout=10)
            assert done.returncode == 0, done.stderr
            given = (tmp_path / "argv").read_bytes().decode().split("\0")
            assert path in given or f"{path}:O" in given
    assert not os.path.exists("/tmp/pwned")


@pytest.mark.parametrize("path", ODD)
def test_python_lines_are_python_with_the_path_as_it_is(path: str) -> None:
    image = Usable(path=path, module="a/1")
    for consumer in ("ganga", "parsl"):
        tree = ast.parse("\n".join(lines(consumer, image)))
        texts = [
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
        assert any(text == path or (" " in text and shlex.split(text)[-1] == path) for text in texts)


@pytest.mark.parametrize("path", ODD)
def test_what_is_yaml_xml_or_a_classad_has_the_path_as_it_is(path: str) -> None:
    image = Usable(path=path, module="a/1")
    assert yaml.safe_load("\n".join(lines("reana", image)))["environment"] == path
    attribute = next(line for line in lines("glideinwms", image) if line.startswith("<attr"))
    assert xml.etree.ElementTree.fromstring(attribute).get("value") == f"default:{path}"
    config = next(line for line in lines("htcondor", image) if line.startswith("SINGULARITY_IMAGE_EXPR"))
    text = re.fullmatch(r'SINGULARITY_IMAGE_EXPR = "((?:[^"\\]|\\.)*)"', config)
    assert text is not None
    assert re.sub(r"\\(.)", r"\1", text[1]).replace("$(DOLLAR)", "$") == path


def test_a_path_that_a_syntax_cannot_express_is_refused() -> None:
    with pytest.raises(ValueError, match="comma"):
        lines("glideinwms", Usable(path="/a,b/c:1"))
    for consumer in CONSUMERS:
        with pytest.raises(ValueError, match="control characters"):
            lines(consumer, Usable(path="/a\nrm -rf/c:1"))


# -- the verb ---------------------------------------------------------------------------------------------------


def test_for_one_consumer_nothing_but_its_lines_is_printed(target: Path) -> None:
    path = shlex.quote(f"{target}/{ALPINE}")
    assert run(target, "alpine:3.10", "--for", "apptainer").splitlines() == [
        f"apptainer run {path}",
        f"apptainer exec {path} cat /etc/os-release",
        f"apptainer shell {path}",
    ]


def test_of_what_is_not_published_nothing_is_printed_that_a_script_could_run(target: Path) -> None:
    done = CliRunner().invoke(app, ["use", "alpine:3.11", "--for", "apptainer", "--target", str(target)])
    assert (done.exit_code, done.stdout) == (1, "")
    assert ALPINE in done.stderr


def test_one_platform_of_several_has_no_module(target: Path) -> None:
    name = f".multiarch/amd64/{PLATFORMS}"
    assert "singularity_wrapper" not in CliRunner().invoke(app, ["use", name, "--target", str(target)]).stdout
    with pytest.raises(SettingsError, match="one platform"):
        run(target, name, "--for", "module")


def test_without_a_consumer_all_are_shown(target: Path) -> None:
    said = run(target, "alpine:3.10")
    assert said.startswith(f"{target}/{ALPINE}\n")
    assert [line[:-1] for line in said.splitlines() if line.endswith(":") and line[0] != " "] == list(CONSUMERS)


def test_an_image_that_wants_a_gpu_is_known_by_its_record(target: Path) -> None:
    assert "--nv" in run(target, PORT, "--for", "apptainer")
    assert "--nv" not in run(target, TOOL, "--for", "apptainer")


def test_the_json_has_name_path_platforms_record_and_lines(target: Path) -> None:
    value: dict[str, Any] = json.loads(run(target, PLATFORMS, "--json"))
    assert (value["name"], value["path"], value["gpu"]) == (PLATFORMS, f"{target}/{PLATFORMS}", False)
    assert value["platforms"] == ["amd64", "arm64:v8"]
    assert value["published"]["place"] == "front"
    assert set(value["lines"]) == set(CONSUMERS)
    assert json.loads(run(target, "ghcr.io/ducc/made:1", "--json"))["published"] is None


def test_every_key_of_the_json_is_explained(target: Path, tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent / "docs" / "json.md").read_text()
    found = set(json.loads(run(target, TOOL, "--json"))) | set(json.loads(run(target, "nothing:1", "--json", code=1)))
    arguments = ["modules", "--output", str(tmp_path / "modules"), "--target", str(target), "--json"]
    found |= set(json.loads(CliRunner().invoke(app, arguments).output))
    assert len(found) > 12
    assert [key for key in sorted(found) if f"`{key}`" not in page] == []


def test_what_is_wrong_with_the_arguments_exits_2(target: Path) -> None:
    for arguments in (["a b"], ["alpine", "--for", "docker"]):
        done = subprocess.run(
            [sys.executable, "-m", "unpacker", "use", *arguments, "--target", str(target)],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr


def test_a_setting_says_where_users_see_the_target(target: Path, tmp_path: Path) -> None:
    config = tmp_path / "unpacker.toml"
    config.write_text('published_at = "/cvmfs/unpacked.example.org"\n[modules]\napptainer = "singularity"\n')
    said = run(target, "alpine:3.10", "--for", "apptainer", "--config", str(config))
    assert said.startswith(f"singularity run /cvmfs/unpacked.example.org/{ALPINE}\n")


def test_nothing_is_written_and_no_state_is_needed(target: Path) -> None:
    before = {str(p): p.lstat().st_mtime_ns for p in target.rglob("*")}
    run(target, "alpine:3.10")
    run(target, "nothing:1", code=1)
    assert {str(p): p.lstat().st_mtime_ns for p in target.rglob("*")} == before

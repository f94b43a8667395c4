"""Published roots run by Apptainer itself, compared with what it makes of the same images on its own.

Its own sandbox is built from an OCI layout, which it treats as it treats docker://. Where `Apptainer` is not at hand
(see apptainer_tools.py) all of this is skipped; the view through a CernVM-FS client, where there is no client.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.apptainer_tools import BUSYBOX, HOME, WORK, Apptainer, needs_apptainer, unpacker
from tests.cvmfs_repositories import NAME, mounted, served
from tests.cvmfs_tools import needs_client
from tests.images import directory, file, image, layer, symlink, write_layout

pytestmark = needs_apptainer

PLAIN = {
    "PATH": "/opt/bin:/bin",
    "LD_LIBRARY_PATH": "/opt/lib",
    "A": "1",
    "B": "a b  c",
    "C": "'=x=}* ~",
    "D": "",
    "E": "é \U0001f40d",
}
# What releases before 1.5 spoil when they write an image's variables, and with it the variables that come after.
HARD = {
    "Q": "a\"b'c",
    "S": "$HOME ${A} $(id) `id`",
    "N": "x\ny\n",
    "T": "\ttab\x1b[31m",
    "K": "back\\slash \\n \\$A \\",
    "J": '{"a": ["b", {"c": "}"}]}',
}
TOOLS = ("sh", "ls", "env", "cat", "printf", "pwd", "id", "echo")


def images() -> dict[str, Any]:
    program = Path(str(BUSYBOX)).read_bytes() if BUSYBOX else b""
    users = [file("etc/passwd", b"root:x:0:0::/root:/bin/sh\n"), file("etc/group", b"root:x:0:\n")]
    busybox = [file("bin/busybox", program, mode=0o755), *(symlink(f"bin/{tool}", "busybox") for tool in TOOLS)]
    base = layer(directory("bin"), *busybox, directory("etc"), *users)
    bare = layer(directory("bin"), file("bin/echo", program, mode=0o755))
    modern = layer(
        symlink("etc/resolv.conf", "../run/systemd/resolve/stub-resolv.conf"),
        symlink("home", "var/home"),
        symlink("tmp", "/var/tmp"),
    )
    definition = layer(
        file(".singularity.d/env/90-environment.sh", b"#!/bin/sh\nexport OWN=definition\n", mode=0o755),
        file(".singularity.d/runscript", b"#!/bin/sh\necho own runscript $*\n", mode=0o755),
        file(".singularity.d/labels.json", b'{"own": "label"}'),
    )
    plain, hard = ([f"{name}={value}" for name, value in each.items()] for each in (PLAIN, HARD))
    command: dict[str, Any] = {"Entrypoint": ["printf", "%s|"], "Cmd": ["c m d", "$A", "", "'\"\\`id`"]}
    return {
        "app": image(base, Env=[*plain, "A=2", "no name=1"], WorkingDir="/work/dir", Labels={"a": "b c"}, **command),
        "hard": image(base, Env=hard),
        "cmd": image(base, Cmd=["sh", "-c", 'echo "$A" "$@"', "name"], Env=["A=of the image"]),
        "bare": image(bare, Entrypoint=["/bin/echo"], Cmd=["a  b", "$x"]),
        "modern": image(base, modern),
        "definition": image(base, definition, Env=["A=config"], Cmd=["echo", "config"]),
    }


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with an OCI layout of each image."""
    directory = tmp_path_factory.mktemp("apptainer")
    for name, built in images().items():
        write_layout(directory / name, {name: built})
    return directory


@pytest.fixture(scope="module")
def own(work: Path) -> Callable[[str], str]:
    """Where Apptainer's own sandbox of an image is."""
    made: dict[str, str] = {}

    def sandbox(name: str) -> str:
        if name not in made:
            made[name] = Apptainer(work).sandbox(name)
        return made[name]

    return sandbox


@dataclass(frozen=True, kw_only=True)
class Site:
    """A target with all images: `where` Apptainer finds it, and what has to be mounted for that."""

    work: Path
    target: str
    where: str
    mounts: dict[str, str] = field(default_factory=dict)

    @property
    def apptainer(self) -> Apptainer:
        return Apptainer(self.work, self.mounts)

    def root(self, name: str) -> str:
        return f"{self.where}/{public(name)}"


def public(name: str) -> str:
    return f"registry.example.org/org/{name}:1.0"


@pytest.fixture(scope="module", params=["directory", pytest.param("cvmfs", marks=needs_client)])
def site(request: pytest.FixtureRequest, work: Path) -> Iterator[Site]:
    repository = work / NAME
    target = f"{work}/target"
    if request.param == "cvmfs":
        target = f"stratum0:{repository}"
        unpacker("init", target, "--name", NAME, target="", work=work)
    for name in images():
        unpacker("publish", f"oci:{work}/{name}:{name}", "--as", public(name), target=target, work=work)
    if request.param == "directory":
        yield Site(work=work, target=target, where=f"{WORK}/target")
        return
    key = Path(f"{repository}.keys", f"{NAME}.pub")
    with served(repository) as url, mounted(url, key, work / "client") as mount:
        yield Site(work=work, target=target, where="/srv", mounts={"/srv": mount})


def environment(printed: bytes) -> dict[str, str]:
    """Variables as `env -0` shows them, but for those in which Apptainer says where the image is."""
    pairs = dict(each.partition("=")[::2] for each in printed.decode().split("\0") if each)
    return {name: value for name, value in pairs.items() if not name.endswith(("_CONTAINER", "_NAME"))}


def test_exec_gives_the_environment_that_apptainer_gives_and_the_config_says(
    site: Site, own: Callable[[str], str]
) -> None:
    ours = environment(site.apptainer.printed("exec", site.root("app"), "env", "-0"))
    theirs = environment(site.apptainer.printed("exec", own("app"), "env", "-0"))
    assert ours == theirs
    assert ours["PATH"].startswith("/opt/bin:/bin:/usr/local/sbin:")
    assert ours["LD_LIBRARY_PATH"] == "/opt/lib:/.singularity.d/libs"
    assert {name: ours.get(name) for name in ("A", "B", "C", "E")} == {
        name: PLAIN[name] for name in ("A", "B", "C", "E")
    }


def test_no_value_is_evaluated_or_altered_on_its_way(site: Site) -> None:
    found = environment(site.apptainer.printed("exec", site.root("hard"), "env", "-0"))
    assert {name: found[name] for name in HARD} == HARD


def test_what_the_user_sets_wins_over_the_image(site: Site, own: Callable[[str], str]) -> None:
    given: dict[str, Any] = {
        "APPTAINERENV_A": "mine",
        "APPTAINERENV_PREPEND_PATH": "/first",
        "APPTAINERENV_LD_LIBRARY_PATH": "/l",
    }
    ours, theirs = (
        environment(site.apptainer.printed("exec", root, "env", "-0", **given))
        for root in (site.root("app"), own("app"))
    )
    names = ("A", "PATH", "LD_LIBRARY_PATH")
    assert {name: ours[name] for name in names} == {name: theirs[name] for name in names}
    assert ours["A"] == "mine" and ours["PATH"].startswith("/first:/opt/bin:")


@pytest.mark.parametrize("options", [[], ["--no-eval"]])
@pytest.mark.parametrize(
    "arguments", [[], ["x  y", "$A", "a'b", "*"], ["sh", "-c", "echo $0 $1", "p  q", "-x"], ['q"q']]
)
@pytest.mark.parametrize("name", ["app", "cmd", "bare"])
def test_run_does_what_apptainer_does(
    site: Site, own: Callable[[str], str], name: str, arguments: list[str], options: list[str]
) -> None:
    ours, theirs = (site.apptainer("run", *options, root, *arguments) for root in (site.root(name), own(name)))
    assert (ours.returncode, ours.stdout) == (theirs.returncode, theirs.stdout)
    if name == "app" and not arguments:
        assert ours.stdout == b"c m d|$A||'\"\\`id`|"
    if name == "bare" and not arguments:
        assert ours.stdout == b"a  b $x\n"


def test_a_shell_starts_as_apptainer_starts_it(site: Site, own: Callable[[str], str]) -> None:
    ours, theirs = (
        site.apptainer.printed("shell", root, given=b'echo "$0 $A $SHELL"; pwd\n')
        for root in (site.root("app"), own("app"))
    )
    assert ours == theirs and b" 1 /bin/sh\n" in ours


def test_a_job_starts_where_apptainer_starts_it_and_can_in_the_images_own_directory(
    site: Site, own: Callable[[str], str]
) -> None:
    ours, theirs = (site.apptainer.printed("exec", root, "pwd") for root in (site.root("app"), own("app")))
    assert ours == theirs == f"{HOME}\n".encode()
    assert site.apptainer.printed("exec", "--pwd", "/work/dir", site.root("app"), "pwd") == b"/work/dir\n"


def test_inspect_shows_what_it_shows_of_apptainers_own(site: Site, own: Callable[[str], str]) -> None:
    ours, theirs = (
        json.loads(site.apptainer.printed("inspect", "--json", "--all", root))["data"]["attributes"]
        for root in (site.root("cmd"), own("cmd"))
    )
    # There is no definition, because a root has many names and was made from none of them.
    assert ours.keys() == theirs.keys() - {"deffile"}
    script = "/.singularity.d/env/10-docker2singularity.sh"
    assert ours["environment"].keys() == theirs["environment"].keys()
    assert ours["environment"][script] == theirs["environment"][script]
    of_the_build = {"build-date", "usage.apptainer.version", "deffile.from", "deffile.bootstrap"}
    assert {name: value for name, value in theirs["labels"].items() if not name.endswith(tuple(of_the_build))} == {
        name: value for name, value in ours["labels"].items() if not name.endswith(tuple(of_the_build))
    }
    labels = json.loads(site.apptainer.printed("inspect", "--json", "--labels", site.root("app")))
    assert labels["data"]["attributes"]["labels"]["a"] == "b c"
    assert b"OCI_CMD=" in site.apptainer.printed("inspect", "--runscript", site.root("cmd"))


def test_an_image_built_from_a_definition_keeps_its_environment_runscript_and_labels(site: Site) -> None:
    root = site.root("definition")
    found = environment(site.apptainer.printed("exec", root, "env", "-0"))
    assert (found["OWN"], found["A"]) == ("definition", "config")
    assert site.apptainer.printed("run", root, "x") == b"own runscript x\n"
    assert json.loads(site.apptainer.printed("inspect", "--json", root))["data"]["attributes"]["labels"] == {
        "own": "label"
    }


@pytest.mark.parametrize("name", ["app", "modern"])
def test_a_root_needs_neither_overlay_nor_underlay(site: Site, name: str) -> None:
    apptainer = Apptainer(site.work, site.mounts, layers=False)
    (site.work / "data").mkdir(exist_ok=True)
    (site.work / "data" / "here").write_text("data")
    binds = [f"--bind={WORK}/data:{where}" for where in ("/srv", "/cvmfs", "/mnt")]
    show = "cat /srv/here /cvmfs/here /mnt/here /etc/hosts; ls -d /proc/self /sys/kernel /dev/null /var/tmp; cd; pwd"
    done = apptainer("exec", *binds, site.root(name), "sh", "-c", show)
    said = done.stderr.decode()
    assert done.returncode == 0 and "Skipping" not in said and "skipping" not in said, said
    assert done.stdout.decode().splitlines() == [
        "datadatadata127.0.0.1 localhost",
        *("/dev/null", "/proc/self", "/sys/kernel", "/var/tmp"),
        HOME,
    ]
    assert (
        apptainer.printed("exec", site.root(name), "cat", "/etc/resolv.conf") == Path("/etc/resolv.conf").read_bytes()
    )


def test_the_published_roots_are_the_same_after_all_that(site: Site) -> None:
    unpacker("verify", target=site.target, work=site.work)

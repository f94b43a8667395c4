"""Published roots run by bubblewrap and podman, read-only as jobs have them."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.apptainer_tools import BUSYBOX, BWRAP, unpacker
from tests.images import directory, file, image, layer, symlink, write_layout

PODMAN = shutil.which("podman")
NAME = "registry.example.org/org/app:1.0"
PLACES = ("/cvmfs", "/home", "/mnt", "/root", "/run", "/srv", "/tmp", "/var/tmp")

pytestmark = pytest.mark.skipif(
    BUSYBOX is None or os.geteuid() != 0, reason="a static busybox or root's rights are not here: no root has been run"
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of an image of one program and one application, with nothing to mount on."""
    path = tmp_path_factory.mktemp("roots")
    tools = [symlink(f"bin/{tool}", "busybox") for tool in ("sh", "ls", "cat", "touch", "echo")]
    scripts = {
        "runscript": "#!/bin/sh\necho app $PATH $LD_LIBRARY_PATH $B\n",
        "env/90-environment.sh": "export B=of_app\n",
    }
    app = [file(f"scif/apps/foo/scif/{name}", text.encode(), mode=0o755) for name, text in scripts.items()]
    program = file("bin/busybox", Path(str(BUSYBOX)).read_bytes(), mode=0o755)
    layers = layer(directory("bin"), program, *tools, *app, file("scif/apps/foo/lib/x"))
    built = image(layers, WorkingDir="/work", Env=["PATH=/bin", "A=1"], Cmd=["echo", "cmd", "$A"])
    write_layout(path / "layout", {"app": built})
    unpacker("publish", f"oci:{path}/layout:app", "--as", NAME, target=f"{path}/target", work=path)
    return (path / "target" / NAME).resolve()


def ran(command: list[str], **environment: str) -> list[str]:
    variables = {**os.environ, **environment}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.skipif(BWRAP is None, reason="bwrap is not installed: no root has been run by it")
def test_bubblewrap_finds_a_place_for_every_mount_that_jobs_have(root: Path) -> None:
    mounts = [word for place in PLACES for word in ("--tmpfs", place)]
    files = [word for name in ("hosts", "resolv.conf") for word in ("--ro-bind", "/etc/passwd", f"/etc/{name}")]
    enter = [str(BWRAP), "--ro-bind", str(root), "/", "--dev", "/dev", "--proc", "/proc", *mounts, *files]
    assert ran([*enter, "--chdir", "/work", "/bin/ls", "-d", *PLACES]) == list(PLACES)


PODMAN_RUNS = """
set -e
ulimit -n 1024
# crun wants cgroups of one version, and tells a file system that is read-only only if it is so itself.
umount -R /sys/fs/cgroup 2>/dev/null || true
mount -t cgroup2 none /sys/fs/cgroup || mount -t tmpfs none /sys/fs/cgroup
mount -t tmpfs none /mnt
cp -a "$1/." /mnt
mount -o remount,ro /mnt
shift
exec podman --cgroup-manager=cgroupfs run --rm --cgroups=disabled --network=none \
    --ulimit=nofile=1024:1024 --ulimit=nproc=1024:1024 --read-only "$@"
"""


def podman_can_run() -> bool:
    return PODMAN is not None and subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0


@pytest.mark.skipif(not podman_can_run(), reason="podman is not installed or may not mount: no root has been run by it")
@pytest.mark.parametrize("rootfs", ["/mnt", "/mnt:O"])
def test_podman_runs_a_read_only_root_with_an_overlay_of_its_own_and_without(root: Path, rootfs: str) -> None:
    show = ["sh", "-c", "ls -d /srv /cvmfs /work; touch /tmp/a /run/b; touch /srv/c 2>/dev/null || echo read-only"]
    script = ["unshare", "-m", "sh", "-c", PODMAN_RUNS, "sh", str(root), "--rootfs", rootfs]
    assert ran([*script, *show]) == ["/cvmfs", "/srv", "/work", "read-only"]


OF_APP = "app /scif/apps/foo:/scif/apps/singularity:/bin /scif/apps/foo/lib:/.singularity.d/libs of_app"


@pytest.mark.parametrize(
    ("app", "command", "printed"),
    [
        ("", ["/.run"], "cmd $A"),
        ("", ["/.run", "echo", "$A"], "1"),
        ("", ["/.exec", "sh", "-c", "echo $A $LD_LIBRARY_PATH"], "1 /.singularity.d/libs"),
        ("", ["/.shell", "-c", "echo $A $SHELL"], "1 /bin/sh"),
        ("", ["/singularity", "echo", "a  b"], "a  b"),
        ("foo", ["/.run"], OF_APP),
    ],
)
def test_releases_that_run_the_images_own_actions_find_them(
    root: Path, app: str, command: list[str], printed: str
) -> None:
    """As Singularity did before 3.6, through the root's links and the image's shell."""
    variables = {"PATH": os.environ["PATH"] + ":/bin", "LD_LIBRARY_PATH": "", "SINGULARITY_APPNAME": app}
    assert ran(["chroot", str(root), *command], **variables) == [printed]

"""Apptainer itself, run by an unprivileged user: the one on this machine, or one in a Debian tree of its own.

Debian has it in sid only. A tree for UNPACKER_TEST_APPTAINER, which bubblewrap enters, is made by root with

    debootstrap --variant=minbase --include=apptainer,busybox-static sid DIRECTORY && touch DIRECTORY/etc/hosts
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

TREE = os.environ.get("UNPACKER_TEST_APPTAINER") or "/"
BWRAP = shutil.which("bwrap")
HOME = "/home/job"
"""The user's home directory: what Apptainer mounts into every container, and where a job starts."""
WORK = "/mnt"
"""Where Apptainer finds the directory that a test works in."""

_USER = 1234
_CONFIGURATION = "etc/apptainer/apptainer.conf"


def _static_busybox() -> str | None:
    candidates = [os.path.join(TREE, "usr/bin/busybox"), os.path.join(TREE, "bin/busybox"), "/bin/busybox"]
    found = next((path for path in candidates if os.path.exists(path)), None)
    return found if found and b"/ld-linux" not in Path(found).read_bytes() else None


BUSYBOX = _static_busybox()
needs_apptainer = pytest.mark.skipif(
    os.geteuid() != 0
    or BWRAP is None
    or BUSYBOX is None
    or not os.path.exists(os.path.join(TREE, "usr/bin/apptainer")),
    reason="Apptainer, a static busybox, bwrap or root's rights are not here (see tests/apptainer_tools.py): "
    "no published root has been run by Apptainer",
)


def unpacker(*arguments: str, target: str, work: Path) -> None:
    """Runs a verb on a target, its state in `work`; it must end well."""
    command = [sys.executable, "-m", "unpacker", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "UNPACKER_STATE": f"{work}/state"}
    done = subprocess.run(
        command,
        env={**environment, "UNPACKER_TARGET": target},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr


class Apptainer:
    """Apptainer over what is in `directory` (its WORK) and `mounts`, by where it finds them.

    Without `layers` it may put neither an overlay nor an underlay below its mounts, as on many clusters.
    """

    def __init__(self, directory: Path, mounts: Mapping[str, str] | None = None, *, layers: bool = True) -> None:
        own = directory / ".apptainer"
        own.mkdir(exist_ok=True)
        for name in ("home", "out"):
            (own / name).mkdir(exist_ok=True)
            os.chown(own / name, _USER, _USER)
        directory.chmod(0o755)
        (own / "passwd").write_text(f"root:x:0:0::/root:/bin/sh\njob:x:{_USER}:{_USER}::{HOME}:/bin/sh\n")
        (own / "group").write_text(f"root:x:0:\njob:x:{_USER}:\n")
        (own / "hosts").write_text("127.0.0.1 localhost\n")
        configuration = Path(TREE, _CONFIGURATION).read_text()
        if not layers:
            configuration = re.sub(r"^enable (overlay|underlay) = .*", r"enable \1 = no", configuration, flags=re.M)
        (own / "conf").write_text(configuration)
        # Its own places, and then what a machine has: Apptainer insists on some of it.
        self._enter = [str(BWRAP), "--ro-bind", TREE, "/", "--dev-bind", "/dev", "/dev", "--proc", "/proc"]
        self._enter += ["--ro-bind", "/sys", "/sys", "--tmpfs", "/home"]
        for place in ("/tmp", "/var/tmp"):
            self._enter += ["--tmpfs", place, "--chmod", "1777", place]
        for where, what in {WORK: directory, HOME: own / "home", **(mounts or {})}.items():
            self._enter += ["--bind", str(what), where]
        for where, what in {"passwd": "passwd", "group": "group", "hosts": "hosts"}.items():
            self._enter += ["--ro-bind", str(own / what), f"/etc/{where}"]
        self._enter += ["--ro-bind", str(own / "conf"), f"/{_CONFIGURATION}", "--chdir", HOME]
        self._enter += ["setpriv", f"--reuid={_USER}", f"--regid={_USER}", "--clear-groups", "env", "-i"]

    def __call__(self, *arguments: str, given: bytes = b"", **environment: str) -> subprocess.CompletedProcess[bytes]:
        """What one command of it does, with nothing in the environment but this and what every user has."""
        return self.beside("apptainer", *arguments, given=given, **environment)

    def beside(self, *program: str, given: bytes = b"", **environment: str) -> subprocess.CompletedProcess[bytes]:
        """What a program does that is called where Apptainer is."""
        variables = {"HOME": HOME, "USER": "job", "PATH": "/usr/bin:/bin:/usr/sbin:/sbin", **environment}
        command = [*self._enter, *(f"{name}={value}" for name, value in variables.items()), *program]
        return subprocess.run(command, input=given, capture_output=True, timeout=120, check=False)

    def printed(self, *arguments: str, given: bytes = b"", **environment: str) -> bytes:
        """What a command prints that must end well."""
        done = self(*arguments, given=given, **environment)
        assert done.returncode == 0, done.stderr.decode(errors="replace")
        return done.stdout

    def sandbox(self, layout: str) -> str:
        """The directory that Apptainer itself builds of the one image in an OCI layout of WORK."""
        sandbox = f"{WORK}/.apptainer/out/{layout}"
        self.printed("build", "--sandbox", sandbox, f"oci:{WORK}/{layout}")
        return sandbox

"""Repositories that `cvmfs_server` made and manages on this host, for tests: mkfs, any verb, rmfs at the end.

    @pytest.fixture(scope="module")
    def repository() -> Iterator[Managed]:
        with managed("gc", "-z", "-g") as made:
            yield made

    with repository.transaction() as tree: ...      # a directory to write to; published at the end
    repository("tag", "-a", "first", repository.name)

Skips, and says so, without root, the tools or apache. Names are unique; apache is started if it was not running, and
then stopped again.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

SERVER = shutil.which("cvmfs_server")
WEB_SERVER = "apache2"
_TIMEOUT = 120


@dataclass(frozen=True)
class Managed:
    """One repository, and where the official tools keep what belongs to it."""

    name: str

    @property
    def storage(self) -> Path:
        """What is served: a stratum 0 of ours, too."""
        return Path("/srv/cvmfs", self.name)

    @property
    def mount(self) -> Path:
        """Where users of the host see it; writable inside a transaction."""
        return Path("/cvmfs", self.name)

    @property
    def spool(self) -> Path:
        return Path("/var/spool/cvmfs", self.name)

    @property
    def checksum(self) -> Path:
        """The file with the hash of the reference log."""
        return self.spool / "reflog.chksum"

    @property
    def keys(self) -> Path:
        """The directory with the keys of all repositories of this host."""
        return Path("/etc/cvmfs/keys")

    @property
    def url(self) -> str:
        return f"http://localhost/cvmfs/{self.name}"

    def __call__(self, *arguments: str) -> str:
        """What a verb of `cvmfs_server` says; it must succeed. The name of the repository is among the arguments."""
        done = run(arguments)
        assert done.returncode == 0, f"cvmfs_server {' '.join(arguments)}: {done.stdout}"
        return done.stdout

    def refused(self, *arguments: str) -> str:
        """What a verb of `cvmfs_server` says that must fail."""
        done = run(arguments)
        assert done.returncode != 0, f"cvmfs_server {' '.join(arguments)} did not fail: {done.stdout}"
        return done.stdout

    @contextmanager
    def transaction(self, *options: str) -> Iterator[Path]:
        """A transaction of the official tools, published with these options; aborted if an exception leaves it."""
        self("transaction", self.name)
        try:
            yield self.mount
        except BaseException:
            self("abort", "-f", self.name)
            raise
        self("publish", *options, self.name)


@contextmanager
def managed(stem: str, *options: str, owner: str = "root") -> Iterator[Managed]:
    """A new repository, its name beginning with `stem`, made with these options of `cvmfs_server mkfs`.

    It has one revision more than an empty one, with the file `new_repository`.
    """
    why_not = _why_not()
    if why_not is not None:
        pytest.skip(f"{why_not}: no repository of cvmfs_server was met")
    made = Managed(f"{stem}-{os.getpid()}-{secrets.token_hex(3)}.example.org")
    with web_server():
        try:
            with _alone():
                made("mkfs", "-o", owner, *options, made.name)
            yield made
        finally:
            # A failed mkfs leaves pieces, and a failed test may leave a transaction.
            run(["abort", "-f", made.name])
            with _alone():
                done = run(["rmfs", "-f", made.name])
            assert done.returncode == 0 or "does not exist" in done.stdout, done.stdout


@contextmanager
def web_server() -> Iterator[None]:
    """Apache running; if it was not running before, the last of the processes that use it here stops it."""
    with open(f"{tempfile.gettempdir()}/unpacker-tests-{WEB_SERVER}", "a+b") as users:
        with _alone():
            if _service("status") != 0:
                assert _service("start") == 0, f"{WEB_SERVER} does not start: see its error log"
                users.truncate(0)
                users.write(b"started for tests")
                users.flush()
            fcntl.flock(users, fcntl.LOCK_SH)
        try:
            yield
        finally:
            with _alone():
                try:
                    fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    users.seek(0)
                    if users.read():
                        _service("stop")
                        users.truncate(0)
                except BlockingIOError:
                    pass


@contextmanager
def _alone() -> Iterator[None]:
    """Against other tests: `cvmfs_server` edits files of the whole host (fstab, apache) as if it were alone."""
    with open(f"{tempfile.gettempdir()}/unpacker-tests-cvmfs_server", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """`cvmfs_server` with these arguments, all that it says as its standard output."""
    assert SERVER is not None
    environment = {name: value for name, value in os.environ.items() if not name.upper().endswith("_PROXY")}
    # It becomes the repository's owner by `su`, which without this takes a system user's shell: `nologin`. CI has none.
    environment.setdefault("SHELL", "/bin/sh")
    return subprocess.run(
        [SERVER, *arguments],
        cwd="/",
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=_TIMEOUT,
        check=False,
    )


def _why_not() -> str | None:
    if SERVER is None:
        return "cvmfs_server is not installed"
    if os.geteuid() != 0:
        return "only root can run cvmfs_server mkfs"
    if shutil.which(WEB_SERVER) is None or shutil.which("service") is None:
        return "apache2 is not installed, or no service can be started"
    if os.path.exists("/bin/systemctl") and not os.path.isdir("/run/systemd/system"):
        return "cvmfs_server would ask systemd for apache2, which does not run here"
    if not os.path.exists("/dev/fuse"):
        return "there is no /dev/fuse"
    return None


def _service(verb: str) -> int:
    done = subprocess.run(
        ["service", WEB_SERVER, verb], stdin=subprocess.DEVNULL, capture_output=True, timeout=_TIMEOUT, check=False
    )
    return done.returncode

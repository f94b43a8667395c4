"""Small repositories for tests, made by the code under test, and the official tools where they are installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from unpacker.cvmfs import objects
from unpacker.cvmfs.catalog import Catalog
from unpacker.cvmfs.manifest import Manifest
from unpacker.cvmfs.repository import Repository
from unpacker.cvmfs.transaction import Transaction, transaction

NAME = "try.example.org"
NOW = 1_790_000_000
SWISSKNIFE = shutil.which("cvmfs_swissknife")
CVMFS2 = shutil.which("cvmfs2")
needs_swissknife = pytest.mark.skipif(
    SWISSKNIFE is None, reason="cvmfs_swissknife is not installed: the official checker has not judged"
)


def open_again(repository: Repository, *, spool_root: str = "/nowhere", keys: str | None = None) -> Repository:
    """The repository as another process would open it; the official tools of this machine are not looked for."""
    directory = repository.directory
    return Repository.open(
        directory, keys or f"{directory}.keys", spool_root=spool_root, configuration=f"{spool_root}/configuration"
    )


def next_root(repository: Repository, within: Transaction, now: int) -> tuple[Any, int]:
    """The published tree again, stored as the next revision: its hash and its size."""
    with Catalog.load(repository.objects.read(within.base.root, objects.CATALOG), "the root") as catalog:
        catalog.succeed(within.base.root, revision=within.next_revision, last_modified=now)
        data = catalog.serialise()
    return repository.store(data, objects.CATALOG), len(data)


def publish(repository: Repository, now: int, **arguments: Any) -> Manifest:
    """One more revision of the same tree."""
    with transaction(repository, now=now) as within:
        root, size = next_root(repository, within, now)
        return within.publish(root, size, now=now, **arguments)


def swissknife_check(*arguments: str) -> str:
    """What the official checker says; it must find no problem."""
    assert SWISSKNIFE is not None
    done = subprocess.run([SWISSKNIFE, "check", *arguments], capture_output=True, text=True, timeout=60)
    said = done.stdout + done.stderr
    assert done.returncode == 0 and "no problems found" in said, said
    return said


@contextmanager
def served(directory: Path) -> Iterator[str]:
    """The URL of a plain static web server."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=os.fspath(directory)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def mounted(url: str, public_key: Path, directory: Path, *, name: str = NAME, **options: str) -> Iterator[str]:
    """Where a real client shows the repository served at `url`; its cache and its log are in `directory`. `options` are
    settings of the client, without their prefix."""
    assert CVMFS2 is not None
    cache, mount = directory / "cache", directory / "mount"
    cache.mkdir(parents=True)
    mount.mkdir()
    settings = {
        "CVMFS_SERVER_URL": url,
        "CVMFS_HTTP_PROXY": "DIRECT",
        "CVMFS_PUBLIC_KEY": public_key,
        "CVMFS_CACHE_BASE": cache,
        "CVMFS_RELOAD_SOCKETS": cache,
        "CVMFS_SHARED_CACHE": "no",
        "CVMFS_QUOTA_LIMIT": "500",
        "CVMFS_CLAIM_OWNERSHIP": "no",
        "CVMFS_USER": "root" if os.geteuid() == 0 else os.environ["USER"],
        "CVMFS_USYSLOG": directory / "log",
        **{f"CVMFS_{option}": value for option, value in options.items()},
    }
    # A client that was built and not installed has its libraries beside it.
    library = Path(os.path.realpath(CVMFS2)).parent.parent / "lib"
    if (library / "libcvmfs_fuse3_stub.so").exists():
        settings["CVMFS_LIBRARY_PATH"] = library
    (directory / "config").write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
    flags = f"config={directory}/config,disable_watchdog,simple_options_parsing"
    flags += ",allow_other" if os.geteuid() == 0 else ""  # jobs are not root
    done = subprocess.run([CVMFS2, "-o", flags, name, str(mount)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    try:
        yield str(mount)
    finally:
        subprocess.run(["fusermount3", "-u", str(mount)], check=True, timeout=60)


def remount(directory: Path, revision: int, *, name: str = NAME) -> None:
    """Makes the client in `directory` take this revision, which is published, and waits until it has.

    Not by `remount sync`: with other readers at work, that has two threads of the client verify the manifest at the
    same time, on one certificate object, and crashes it (2.12).
    """
    socket = directory / "cache" / name / f"cvmfs_io.{name}"
    done = subprocess.run(["cvmfs_talk", "-p", str(socket), "remount"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    deadline = time.monotonic() + 30
    while int(os.getxattr(directory / "mount", "user.revision")) != revision:
        assert time.monotonic() < deadline, f"the client does not come to revision {revision}: {done.stdout}"
        # What opens a directory is what has it change over.
        os.listdir(directory / "mount")
        time.sleep(0.01)

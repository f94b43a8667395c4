"""Debian's docker-registry as a child process on a free loopback port: the real thing to pull from and push to."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import threading
import time
import urllib.request
from pathlib import Path
from typing import Self

from tests.images import BuiltImage, index
from unpacker.digest import Digest

PROGRAM = shutil.which("docker-registry")

_CONFIGURATION = """\
version: 0.1
log: {{level: info}}
storage:
  filesystem: {{rootdirectory: {root}}}
  delete: {{enabled: true}}
http: {{addr: "127.0.0.1:0"}}
"""


class DockerRegistry:
    """A running docker-registry; a context manager. `host` is 127.0.0.1:PORT, `url` has http:// before it."""

    def __init__(self, directory: Path, *, program: str | None = PROGRAM) -> None:
        assert program is not None, "docker-registry is not installed"
        directory.mkdir(parents=True, exist_ok=True)
        configuration = directory / "config.yml"
        configuration.write_text(_CONFIGURATION.format(root=directory / "root"))
        self._log = directory / "log"
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("REGISTRY_", "OTEL_"))}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [program, "serve", str(configuration)], stdout=log, stderr=subprocess.STDOUT, env=environment
            )
        # It binds a port of the kernel's choice and says in its log which.
        self.host = self._wait_for_address()
        self.url = f"http://{self.host}"

    def _wait_for_address(self) -> str:
        until = time.monotonic() + 20
        while time.monotonic() < until:
            found = re.search(rb"listening on (127\.0\.0\.1:[0-9]+)", self._log.read_bytes())
            if found:
                return found[1].decode()
            if self._process.poll() is not None:
                break
            time.sleep(0.02)
        self.stop()
        raise RuntimeError(f"docker-registry did not start: {self._log.read_text()[-2000:]}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            timer = threading.Timer(5, self._process.kill)
            timer.start()
            self._process.wait()
            timer.cancel()

    def push(self, repository: str, tag: str | None, built: BuiltImage) -> str:
        """Uploads an image; gives its digest."""
        for digest, data in built.blobs.items():
            self.push_blob(repository, digest, data)
        return self.push_manifest(repository, tag, built.manifest, built.media_type)

    def push_index(self, repository: str, tag: str | None, *built: BuiltImage) -> str:
        for one in built:
            self.push(repository, None, one)
        return self.push_manifest(repository, tag, *index(*built))

    def push_blob(self, repository: str, digest: str, data: bytes) -> None:
        start = urllib.request.Request(f"{self.url}/v2/{repository}/blobs/uploads/", method="POST", data=b"")
        with urllib.request.urlopen(start) as answer:
            location = answer.headers["Location"]
        joint = "&" if "?" in location else "?"
        upload = urllib.request.Request(f"{location}{joint}digest={digest}", method="PUT", data=data)
        upload.add_header("Content-Type", "application/octet-stream")
        with urllib.request.urlopen(upload):
            pass

    def push_manifest(self, repository: str, tag: str | None, raw: bytes, media_type: str) -> str:
        digest = str(Digest.of(raw))
        request = urllib.request.Request(
            f"{self.url}/v2/{repository}/manifests/{tag or digest}", method="PUT", data=raw
        )
        request.add_header("Content-Type", media_type)
        with urllib.request.urlopen(request):
            pass
        return digest

"""`make demo`: a registry, an image, a wishlist, and a program run in what `unpacker` publishes of them.

Everything lies under `.demo/` afterwards, to be looked at; the next run starts afresh (downloaded packages stay).
Needs neither root nor anything installed but Python; with apt it uses Debian's docker-registry, busybox and bubblewrap.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import demo.image
from demo import debian
from tests.docker_registry import DockerRegistry
from tests.fake_registry import FakeRegistry
from tests.images import BuiltImage

HERE = os.path.abspath(".demo")
PACKAGES = os.path.join(HERE, "packages")
REPOSITORY = "demo/hello"
UNPACKER = os.path.join(os.path.dirname(sys.executable), "unpacker")
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "ppc64le": "ppc64le", "s390x": "s390x", "riscv64": "riscv64"}


class Failed(Exception):
    """The demonstration did not show what it promises."""


class Push(Protocol):
    """Puts an image into the registry under a tag and gives its digest."""

    def __call__(self, repository: str, tag: str | None, built: BuiltImage, /) -> str: ...


def main() -> int:
    signal.signal(signal.SIGTERM, _on_terminate)
    _clean_environment()
    try:
        start_afresh()
        with registry() as (host, push):
            tell(host, push)
    except (Failed, demo.image.NoBase) as error:
        print(f"\nThe demonstration failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def start_afresh() -> None:
    os.makedirs(PACKAGES, exist_ok=True)
    for name in os.listdir(HERE):
        path = os.path.join(HERE, name)
        if path == PACKAGES:
            continue
        if os.path.isdir(path) and not os.path.islink(path):
            _remove_tree(path)
        else:
            os.unlink(path)


@contextlib.contextmanager
def registry() -> Iterator[tuple[str, Push]]:
    """A registry on a free port of loopback, for the time of the `with`: its host:port, and how to push to it."""
    heading("A registry on this machine")
    server = debian.program("docker-registry", "docker-registry", PACKAGES)
    if server is not None:
        with DockerRegistry(Path(HERE, "registry"), program=server) as real:
            say(f"{server} listens on {real.host}")
            yield real.host, real.push
    else:
        with FakeRegistry() as ours:
            say("Debian's docker-registry is not to be had here (apt install docker-registry),")
            say(f"so the registry of our own tests listens on {ours.host}")
            yield ours.host, ours.add


def tell(host: str, push: Push) -> None:
    heading("An image of several layers, under several tags")
    base, origin = demo.image.base(PACKAGES)
    say(f"Its base layer ({len(base):,} bytes) is made of {origin}.")
    releases = demo.image.releases(base, ARCHITECTURES.get(platform.machine(), platform.machine()))
    for tag in ("1.0", "1.1", "2.0"):
        say(f"pushed {host}/{REPOSITORY}:{tag}  {push(REPOSITORY, tag, releases[tag])[:19]}…")

    heading("A wishlist with a wildcard")
    wishlist = f"version: 2\nimages:\n  - http://{host}/{REPOSITORY}:1.*\n"
    with open(os.path.join(HERE, "wishlist.yaml"), "w", encoding="ascii") as file:
        file.write(wishlist)
    for line in wishlist.splitlines():
        say(line)

    heading("unpacker publishes what it asks for")
    unpacker("reconcile", "wishlist.yaml", "--target", "target", "--state", "state", "--jobs", "2")
    expect_published(host, {"1.0", "1.1"})

    heading("What stands published")
    unpacker("status", "wishlist.yaml", "--target", "target", "--state", "state")

    heading("Again: nothing changed, so nothing is done")
    before = links(host)
    unpacker("reconcile", "wishlist.yaml", "--target", "target", "--state", "state", "--jobs", "2")
    if links(host) != before:
        raise Failed("a second run changed what was published, although no tag had moved")

    heading("A new tag in the registry: only its own layer is fetched")
    say(f"pushed {host}/{REPOSITORY}:1.2  {push(REPOSITORY, '1.2', releases['1.2'])[:19]}…")
    unpacker("reconcile", "wishlist.yaml", "--target", "target", "--state", "state", "--jobs", "2")
    expect_published(host, {"1.0", "1.1", "1.2"})

    heading("The layers, applied in order")
    show_layers(host)

    heading("A program in the published root")
    run_inside(os.path.join(HERE, "target", f"{host}/{REPOSITORY}:1.1"))
    say()
    say("All of it stays in .demo to be looked at: wishlist.yaml, target (what was published), state (caches).")


def unpacker(*arguments: str) -> None:
    """Shows and runs one command line, as typed in `.demo`."""
    say(f"$ unpacker {shlex.join(arguments)}")
    status = subprocess.run([UNPACKER, *arguments], cwd=HERE, stdin=subprocess.DEVNULL).returncode
    if status != 0:
        raise Failed(f"`unpacker {arguments[0]}` ended with {status} instead of 0")


def links(host: str) -> dict[str, str]:
    """The public names of the demonstration's repository, by tag, and the roots they name."""
    path = os.path.join(HERE, "target", host, os.path.dirname(REPOSITORY))
    prefix = f"{os.path.basename(REPOSITORY)}:"
    return {
        name.removeprefix(prefix): os.readlink(os.path.join(path, name))
        for name in sorted(os.listdir(path))
        if name.startswith(prefix)
    }


def expect_published(host: str, tags: set[str]) -> None:
    published = links(host)
    if set(published) != tags:
        raise Failed(f"published are the tags {sorted(published)}, not {sorted(tags)}")
    say()
    for tag, root in published.items():
        say(f".demo/target/{host}/{REPOSITORY}:{tag} -> {root}")


def show_layers(host: str) -> None:
    """1.1 hides a file of 1.0 and empties a directory; what does not differ is stored once."""
    shares = {}
    for tag in ("1.0", "1.1"):
        share = os.path.join(HERE, "target", f"{host}/{REPOSITORY}:{tag}", "usr/share/hello")
        names = sorted(
            os.path.relpath(os.path.join(at, name), share) for at, _, files in os.walk(share) for name in files
        )
        shares[tag] = set(names)
        say(f"{tag}: usr/share/hello holds {', '.join(names)}")
    gone = {"old-notes", "examples/one", "examples/two"}
    if not gone <= shares["1.0"] or shares["1.1"] & gone or "examples/only" not in shares["1.1"]:
        raise Failed("the whiteouts of 1.1 were not applied as the OCI image specification has it")
    roots = [os.path.join(HERE, "target", f"{host}/{REPOSITORY}:{tag}", "bin") for tag in ("1.0", "1.1")]
    program = next(name for name in sorted(os.listdir(roots[0])) if not os.path.islink(os.path.join(roots[0], name)))
    same = len({os.stat(os.path.join(root, program)).st_ino for root in roots}) == 1
    say(f"bin/{program} of both roots is {'one file on disk' if same else 'stored twice (no hard links here)'}")


def run_inside(root: str) -> None:
    root = os.path.realpath(root)
    bwrap = debian.program("bwrap", "bubblewrap", PACKAGES)
    if bwrap is not None:
        options = "--proc /proc --dev /dev --tmpfs /tmp --unshare-all --die-with-parent --chdir / /usr/bin/hello"
        say(f"$ bwrap --ro-bind {os.path.relpath(root)} / {options}")
        answer = subprocess.run([bwrap, "--ro-bind", root, "/", *shlex.split(options)], capture_output=True, text=True)
        if answer.returncode == 0:
            for line in answer.stdout.splitlines():
                say(line)
            if "Hello from an unpacked image." not in answer.stdout:
                raise Failed("the program ran, but did not say what it should")
            return
        reason = (answer.stderr.strip().splitlines() or [f"it ended with {answer.returncode}"])[-1]
        say(f"bwrap could not enter the root: {reason}")
        say("(In a container it may need user namespaces: docker run --security-opt seccomp=unconfined …)")
    else:
        say("To run a program inside, install bubblewrap (apt install bubblewrap).")
    say("Meanwhile, this is the root:")
    say(f"$ ls {os.path.relpath(root)}")
    say("  ".join(sorted(os.listdir(root))))


def heading(text: str) -> None:
    bold, plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
    print(f"\n{bold}== {text}{plain}\n", flush=True)


def say(text: str = "") -> None:
    print(f"   {text}".rstrip(), flush=True)


def _clean_environment() -> None:
    """Forgets settings of unpacker's, so that the demonstration is the same for everybody."""
    for name in [name for name in os.environ if name.startswith(("UNPACKER_", "DUCC_"))]:
        del os.environ[name]
    # A proxy would not know the registry on this machine's loopback.
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"


def _remove_tree(path: str) -> None:
    """Published directories may be read-only, which only root may empty without making them writable first."""
    for at, _, _ in os.walk(path):
        os.chmod(at, 0o700)
    shutil.rmtree(path)


def _on_terminate(*_: object) -> None:
    # Through the `with` blocks, which end the registry.
    raise SystemExit(143)


if __name__ == "__main__":
    sys.exit(main())

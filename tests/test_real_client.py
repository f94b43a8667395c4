"""What the real client shows of our repositories, over http: the same as was published, at every moment."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.cvmfs_repositories import NAME as REPOSITORY
from tests.cvmfs_repositories import mounted, remount, served
from tests.cvmfs_tools import BWRAP, judged, needs_client, scrubbed
from tests.fake_registry import FakeRegistry
from tests.images import BuiltImage, directory, file, image, layer
from tests.memory_store import MemoryStore
from tests.mount_reader import SUMS, sums
from tests.publisher_contract import publish
from tests.strange_images import MARKER, large_image, self_contained_images, strange_images
from tests.test_reconcile import Site, done
from tests.tree_facts import Facts, differences, in_memory, on_disk
from unpacker.apply import apply
from unpacker.cvmfs import gc
from unpacker.cvmfs.repository import Repository
from unpacker.furnish import furnish
from unpacker.image import Layer
from unpacker.layer import read
from unpacker.limits import Limits
from unpacker.oci import ImageConfig, Manifest, parse_manifest
from unpacker.publish import posix
from unpacker.publish.stratum0 import Stratum0Publisher
from unpacker.rootfs import Policy, prepare
from unpacker.tree import EMPTY, Tree

pytestmark = needs_client
PUBLISHES = 20
READERS = 2
LARGE = 34_000


@pytest.fixture(scope="module", autouse=True)
def no_sync() -> Iterator[None]:
    """No test here pulls the plug, and syncing a busy machine's disk takes seconds each time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(posix, "syncfs", lambda fd: None)
        patch.setattr(os, "fsync", lambda fd: None)
        yield


@dataclass(frozen=True)
class Shown:
    """Images published to both targets, and where a client shows the repository of one of them."""

    images: dict[str, BuiltImage]
    mount: Path
    names: str
    directory: Path

    def root(self, tag: str) -> str:
        """Where the public name leads on the mount."""
        return os.path.realpath(self.mount / self.names / f"image:{tag}")

    def reference(self, tag: str) -> str:
        """The same in the directory target."""
        return os.path.realpath(self.directory / self.names / f"image:{tag}")

    def layer(self, digest: str) -> str:
        return f"{self.mount}/.layers/{digest[:2]}/{digest}/layerfs"


@contextmanager
def shown(path: Path, images: dict[str, BuiltImage]) -> Iterator[Shown]:
    repository = path / "repository"
    Repository.create(str(repository), REPOSITORY, now=int(time.time()))
    try:
        with FakeRegistry() as fake:
            for tag, built in images.items():
                fake.add("strange/image", tag, built)
            site = Site(path, fake)
            for options in ({"publisher": Stratum0Publisher(str(repository))}, {"state": str(path / "other-state")}):
                result = site.run("HOST/strange/image:*", **options)
                assert set(done(result).values()) == {"published"}, done(result)
                assert len(done(result)) == len(images)
        with served(path) as url:
            key = path / "repository.keys" / f"{REPOSITORY}.pub"
            with mounted(f"{url}/repository", key, path / "client") as mount:
                yield Shown(images, Path(mount), f"{fake.host}/strange", site.target)
    finally:
        # Deeper than what pytest clears away can go.
        subprocess.run(["rm", "-rf", "--one-file-system", str(path / "target")], check=True)


@pytest.fixture(scope="module")
def strange(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shown]:
    with shown(tmp_path_factory.mktemp("strange"), strange_images() | self_contained_images()) as here:
        yield here


def merged(built: BuiltImage) -> tuple[Tree, ImageConfig, MemoryStore]:
    """The layers of an image, put together in memory."""
    store = MemoryStore()
    manifest, config = parse_manifest(built.manifest), ImageConfig.parse(built.config)
    assert isinstance(manifest, Manifest)
    tree = EMPTY
    for descriptor, diff_id in zip(manifest.layers, config.diff_ids, strict=True):
        named = Layer(descriptor=descriptor, diff_id=str(diff_id))
        blob = io.BytesIO(built.blobs[str(descriptor.digest)])
        tree = apply(tree, read(blob, named, store, Policy(), Limits()))
    return tree, config, store


def prepared(built: BuiltImage, *, bare: bool = False) -> dict[str, Facts]:
    """The tree to publish; if `bare`, without what a root gets besides its image."""
    tree, config, store = merged(built)
    if bare:
        tree, _ = prepare(tree, (), Policy())
    else:
        [(tree, _)] = furnish([(tree, config)], store, Policy())
    return in_memory(tree, lambda f: hashlib.sha256(store.contents[f.token] if f.size else b"").hexdigest())


def seen(root: str) -> dict[str, Facts]:
    return on_disk(root, leave_out=frozenset({MARKER}))


@pytest.mark.parametrize("tag", sorted(strange_images()))
def test_a_strange_image_is_shown_as_it_was_prepared_and_as_the_directory_target_has_it(
    strange: Shown, tag: str
) -> None:
    """Names, types, modes, owners, times to the nanosecond, links, attributes, contents."""
    wanted = prepared(strange.images[tag])
    assert differences(on_disk(strange.reference(tag)), wanted) == []
    assert differences(seen(strange.root(tag)), wanted) == []


@pytest.mark.timeout(600)
def test_a_large_image_is_shown_as_it_was_prepared(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """34,000 names with `--torture`, else a twentieth of that."""
    entries = LARGE if pytestconfig.getoption("--torture") else LARGE // 20
    with shown(tmp_path, {"large": large_image(entries)}) as here:
        wanted = prepared(here.images["large"])
        assert len(wanted) > 0.9 * entries
        assert differences(seen(here.root("large")), wanted) == []
        assert differences(on_disk(here.reference("large")), wanted) == []


@pytest.mark.parametrize("tag", sorted(self_contained_images()))
def test_overlayfs_over_the_layers_of_an_image_shows_what_it_brings_to_its_root(
    strange: Shown, tag: str, tmp_path: Path
) -> None:
    """What containerd's snapshotter does with the layers view instead of pulling."""
    manifest = parse_manifest(strange.images[tag].manifest)
    assert isinstance(manifest, Manifest)
    lower = [strange.layer(descriptor.digest.hex) for descriptor in reversed(manifest.layers)]
    (tmp_path / "nothing").mkdir()
    with stacked([*lower, str(tmp_path / "nothing")], tmp_path / "overlay") as overlay:
        found = seen(overlay)
    assert differences(found, prepared(strange.images[tag], bare=True)) == []
    root = seen(strange.root(tag))
    assert differences(found, {path: facts for path, facts in root.items() if path in found}) == []


@contextmanager
def stacked(lower: list[str], at: Path) -> Iterator[str]:
    at.mkdir()
    options = f"ro,lowerdir={':'.join(lower)}"
    finished = subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, str(at)], capture_output=True)
    if finished.returncode and "overlay" not in Path("/proc/filesystems").read_text():
        pytest.skip("this kernel has no overlayfs: the layers view was not stacked")
    assert finished.returncode == 0, finished.stderr
    try:
        yield str(at)
    finally:
        subprocess.run(["umount", str(at)], check=True)


@pytest.mark.skipif(BWRAP is None, reason="bwrap is not installed: no program ran in a mounted root")
def test_a_program_runs_in_a_mounted_root(tmp_path: Path) -> None:
    """This machine's shell with its libraries as an image: the root is all that it has."""
    needed = ["/bin/sh", *libraries(os.path.realpath("/bin/sh"))]
    members = [directory("proc"), directory("dev"), file("etc/greeting", b"hello")]
    members += [file(path.lstrip("/"), Path(path).read_bytes(), mode=0o755) for path in needed]
    with shown(tmp_path, {"sh": image(layer(*members))}) as here:
        program = "read greeting </etc/greeting; echo $greeting from $0; : >/etc/greeting"
        command = [str(BWRAP), "--unshare-all", "--ro-bind", here.root("sh"), "/", "--dev", "/dev", "--proc", "/proc"]
        ran = subprocess.run([*command, "/bin/sh", "-c", program], capture_output=True, text=True, timeout=60)
    assert ran.stdout == "hello from /bin/sh\n"
    assert "Read-only" in ran.stderr


def libraries(program: str) -> list[str]:
    said = subprocess.run(["ldd", program], capture_output=True, text=True, check=False).stdout
    return [word for word in said.split() if word.startswith("/")]


@pytest.mark.timeout(600)
def test_a_client_mounted_through_twenty_publishes_never_sees_half_of_one(tmp_path: Path) -> None:
    """Updates, removals, and collections of garbage, while others read: a root once reached stays as it was."""
    repository = tmp_path / "repository"
    Repository.create(str(repository), REPOSITORY, now=int(time.time()))
    publisher = Stratum0Publisher(str(repository))
    names = [f"registry.example.org/team/tool:{tag}" for tag in "abc"]
    for name in names:
        publish(publisher, name, saying(name, 0), seed=name)
    with ExitStack() as stack:
        url = stack.enter_context(served(tmp_path))
        key = tmp_path / "repository.keys" / f"{REPOSITORY}.pub"
        mount = stack.enter_context(mounted(f"{url}/repository", key, tmp_path / "client"))
        place = f"{mount}/registry.example.org/team"
        readers = [stack.enter_context(reading(place)) for _ in range(READERS)]
        for number in range(1, PUBLISHES + 1):
            name = names[number % len(names)]
            if number % 5 == 0:
                with publisher.transaction("remove") as transaction:
                    transaction.remove([name], now=int(time.time()))
            else:
                publish(publisher, name, saying(name, number), seed=f"{name} {number}")
            if number % 7 == 0:
                opened = Repository.open(str(repository), f"{repository}.keys")
                gc.collect(opened, keep=0, grace=3600, now=time.time(), dry_run=False)
            remount(tmp_path / "client", Repository.open(str(repository)).manifest().revision)
            time.sleep(0.05)
        found = [finish() for finish in readers]
    for one in found:
        assert one["faults"] == []
        assert one["rounds"] >= 5 and one["roots"] >= 8, one
    assert judged(str(repository)).is_sound
    assert scrubbed(str(repository)).is_sound


def saying(name: str, number: int) -> dict[str, bytes]:
    contents = {f"d{d}/f{f}": f"{name} {number * f} {d}".encode() * 50 for d in range(4) for f in range(6)}
    return {**contents, SUMS: sums(contents)}


@contextmanager
def reading(place: str) -> Iterator[Callable[[], dict[str, Any]]]:
    """A reader at work; what is yielded ends it and gives what it saw."""
    command = [sys.executable, "-m", "tests.mount_reader", place, "6"]
    root = Path(__file__).parent.parent
    with subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def finish() -> dict[str, Any]:
            said, _ = process.communicate("end\n", timeout=120)
            assert process.returncode == 0
            result: dict[str, Any] = json.loads(said)
            return result

        try:
            yield finish
        finally:
            if process.poll() is None:
                process.kill()


def test_two_processes_that_publish_at_the_same_time_lose_no_update(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    Repository.create(str(repository), REPOSITORY, now=int(time.time()))
    program = (
        "import sys\n"
        "from tests.publisher_contract import publish\n"
        "from unpacker.publish.stratum0 import Stratum0Publisher\n"
        "for number in range(6):\n"
        "    publisher = Stratum0Publisher(sys.argv[1])\n"
        "    name = f'registry.example.org/{sys.argv[2]}/tool:{number}'\n"
        "    with publisher.lock(60):\n"
        "        publish(publisher, name, {'f': name.encode()}, seed=name)\n"
    )
    command = [sys.executable, "-c", program, str(repository)]
    root = Path(__file__).parent.parent
    running = [subprocess.Popen([*command, who], cwd=root, stderr=subprocess.PIPE) for who in ("one", "two")]
    said = [process.communicate(timeout=120)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    names = {f"registry.example.org/{who}/tool:{number}" for who in ("one", "two") for number in range(6)}
    assert set(Stratum0Publisher(str(repository)).published()) == names
    assert Repository.open(str(repository)).manifest().revision == 1 + len(names)
    assert judged(str(repository)).is_sound

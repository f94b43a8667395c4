"""Repositories of the real `cvmfs_server`: both ways into them, its checker after each step, a client's view.

Without the tools, all of it is skipped, and says so; the discipline is tested over a stand-in in
test_managed_discipline.py.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import images
from tests.cvmfs_managed import Managed, managed
from tests.cvmfs_repositories import CVMFS2
from tests.publisher_contract import MTIME, NAME, OTHER, PublisherContract, publish, release, stored
from tests.test_managed_discipline import seen
from unpacker.collection import collect
from unpacker.contracts import Publisher
from unpacker.cvmfs.server import Server
from unpacker.errors import Busy, PublishError
from unpacker.limits import Limits
from unpacker.publish.managed import ManagedPublisher, choose
from unpacker.publish.server import ServerPublisher
from unpacker.publish.stratum0 import Stratum0Publisher
from unpacker.tree import Directory, Special, Tree
from unpacker.verify import verify

TOP = Path(__file__).parent.parent
_numbers = itertools.count()


@pytest.fixture(scope="module")
def repository() -> Iterator[Managed]:
    """One for all tests of this file; each has a directory in it, or names of its own."""
    with managed("h-managed", "-z", "-g") as made:
        configuration = Path("/etc/cvmfs/repositories.d", made.name, "server.conf")
        with configuration.open("a") as file:
            file.write("CVMFS_INCLUDE_XATTRS=true\nCVMFS_ENABLE_MTIME_NS=true\nCVMFS_AUTO_TAG=false\n")
        yield made


def plain(repository: Managed, state: Path, subdirectory: str = "") -> ServerPublisher:
    return ServerPublisher(Server.find(repository.name), subdirectory, state=str(state))


def fast(repository: Managed, state: Path) -> ManagedPublisher:
    index = str(state / "known-contents")
    return ManagedPublisher(Server.find(repository.name), index=index, layers_view=True, limits=Limits())


def is_sound(repository: Managed) -> bool:
    """What the official checker says."""
    return "no problems found" in repository("check", repository.name)


def has_open_transaction(repository: Managed) -> bool:
    return (repository.spool / "in_transaction.lock").exists()


class TestServerPublisher(PublisherContract):
    """The contract of all publishers, each test in a new directory of the repository."""

    @pytest.fixture
    def subdirectory(self) -> str:
        return f"contract-{os.getpid()}-{next(_numbers)}"

    @pytest.fixture
    def publisher(self, repository: Managed, tmp_path: Path, subdirectory: str) -> ServerPublisher:
        return plain(repository, tmp_path, subdirectory)

    @pytest.fixture
    def again(self, repository: Managed, tmp_path: Path, subdirectory: str) -> Callable[[], Publisher]:
        return lambda: plain(repository, tmp_path, subdirectory)

    @pytest.fixture
    def visible(self, repository: Managed, subdirectory: str) -> Callable[[str], dict[str, str] | None]:
        return lambda public_path: seen(repository.spool / "rdonly" / subdirectory, public_path)


WAYS = {"plain": plain, "fast": fast}


@pytest.fixture(params=sorted(WAYS))
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def names(way: str) -> tuple[str, str]:
    """Public names for one test of one way."""
    number = next(_numbers)
    return f"h.example.org/{way}{number}:1", f"h.example.org/{way}{number}:2"


def opened(way: str, repository: Managed, state: Path) -> Publisher:
    found: Publisher = plain(repository, state) if way == "plain" else fast(repository, state)
    return found


class TestBothWays:
    def test_publish_update_and_remove_leave_a_sound_repository_that_the_official_tools_go_on_from(
        self, repository: Managed, tmp_path: Path, way: str
    ) -> None:
        publisher = opened(way, repository, tmp_path)
        one, two = names(way)
        first = publish(publisher, one, {"motd": b"hello", "big": b"0123456789" * 900_000}, seed=one)
        assert seen(repository.mount, one) is not None, "the mounts of this host follow"
        assert is_sound(repository)
        publish(publisher, two, {"motd": b"hello"}, seed=one)
        second = publish(publisher, one, {"motd": b"again"}, seed=two)
        assert second.replaces == first
        assert seen(repository.mount, one) == {"": "d 0755", "motd": "f 0644 again"}
        with repository.transaction() as tree:
            assert seen(tree, one) == {"": "d 0755", "motd": "f 0644 again"}
            (tree / f"by-hand-{way}").write_text("kept")
        with publisher.transaction("remove") as transaction:
            transaction.remove([one], now=5)
        assert (repository.mount / f"by-hand-{way}").read_text() == "kept"
        assert seen(repository.mount, one) is None
        assert set(opened(way, repository, tmp_path).published()) & {one, two} == {two}
        assert is_sound(repository)

    def test_a_transaction_of_somebody_else_is_busy_and_stays_theirs(
        self, repository: Managed, tmp_path: Path, way: str
    ) -> None:
        publisher = opened(way, repository, tmp_path)
        name, _ = names(way)
        repository("transaction", repository.name)
        try:
            (repository.mount / "unfinished").write_text("somebody's work")
            with pytest.raises(Busy, match=r"in_transaction\.lock"):
                publish(publisher, name, {"motd": b"hello"}, seed=name)
            assert (repository.mount / "unfinished").read_text() == "somebody's work"
        finally:
            repository("abort", "-f", repository.name)
        publish(publisher, name, {"motd": b"hello"}, seed=name)
        assert is_sound(repository)

    def test_a_kill_while_writing_is_recovered_from(self, repository: Managed, tmp_path: Path, way: str) -> None:
        name, _ = names(way)
        kill(repository, tmp_path, way, name, "writing")
        assert has_open_transaction(repository)
        publisher = opened(way, repository, tmp_path)
        record = publish(publisher, name, {"motd": b"again"}, seed=name)
        assert opened(way, repository, tmp_path).published()[name] == record
        assert seen(repository.mount, name) == {"": "d 0755", "motd": "f 0644 again"}
        assert not has_open_transaction(repository)
        assert is_sound(repository)


KILLED = """
import os, signal, sys
from pathlib import Path
from tests import test_managed as t
from unpacker.cvmfs import command
_, name, state, way, public_path, where = sys.argv
publisher = t.opened(way, t.Managed(name), Path(state))
tree = t.stored(publisher, {"motd": b"hello"})
with publisher.transaction("x") as transaction:
    transaction.publish(t.release(public_path, tree, seed=public_path))
    if where == "writing":
        os.kill(os.getpid(), signal.SIGKILL)
    ended = command._ended
    def die(process):
        os.killpg(process.pid, signal.SIGKILL) if where == "all" else None
        os.kill(os.getpid(), signal.SIGKILL)
    command._ended = die
"""


def kill(repository: Managed, state: Path, way: str, public_path: str, where: str) -> None:
    line = [sys.executable, "-c", KILLED, repository.name, str(state), way, public_path, where]
    done = subprocess.run(line, cwd=TOP, capture_output=True, timeout=100)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


class TestKilledWhilePublishing:
    def test_alone_what_it_had_started_is_waited_for(self, repository: Managed, tmp_path: Path) -> None:
        name, _ = names("plain")
        kill(repository, tmp_path, "plain", name, "publishing")
        publisher = plain(repository, tmp_path)
        with publisher.lock(60):
            assert seen(repository.mount, name) == {"": "d 0755", "motd": "f 0644 hello"}
            assert name in publisher.published()
        assert is_sound(repository)

    def test_with_all_that_it_had_started_its_transaction_is_rolled_back(
        self, repository: Managed, tmp_path: Path
    ) -> None:
        name, _ = names("plain")
        kill(repository, tmp_path, "plain", name, "all")
        publisher = plain(repository, tmp_path)
        with publisher.lock(60):
            assert not has_open_transaction(repository)
            record = publish(publisher, name, {"motd": b"hello"}, seed=name)
        assert publisher.published()[name] == record
        assert is_sound(repository)

    def test_a_failed_publish_leaves_the_repository_clean(self, repository: Managed, tmp_path: Path) -> None:
        publisher = plain(repository, tmp_path)
        name, _ = names("plain")
        tree = stored(publisher, {"large": bytes(2 << 20)})
        settings = Path("/etc/cvmfs/repositories.d", repository.name, "server.conf")
        kept = settings.read_bytes()
        with publisher.lock():
            settings.write_bytes(kept + b"CVMFS_ENFORCE_LIMITS=true\nCVMFS_FILE_MBYTE_LIMIT=1\n")
            try:
                with pytest.raises(PublishError, match=r"publish .* failed"), publisher.transaction("x") as transaction:
                    transaction.publish(release(name, tree, seed=name))
            finally:
                settings.write_bytes(kept)
            assert not has_open_transaction(repository)
            assert name not in publisher.published()
            with publisher.transaction("x") as transaction:
                transaction.publish(release(name, tree, seed=name))
        assert name in publisher.published()
        assert is_sound(repository)


def rich(publisher: Publisher) -> Tree:
    """A prepared tree with all that an image can have."""
    contents = {
        "etc/motd": b"hello",
        "etc/empty": b"",
        "bin": "usr/bin",
        "abs": "/usr/bin",
        "caf\udce9": b"x",
        "srv": None,
    }
    tree = stored(publisher, contents | {f"many/{i}": b"%d" % i for i in range(50)}, uid=1000, gid=2000)
    special = stored(publisher, {"bin/tool": b"#!/bin/sh\n"}, mode=0o755, xattrs=(("user.a", b"1"),))
    children: dict[str, object] = {**tree.root.children, "usr": special.root}
    children["sticky"] = Directory(0o1777, 0, 0, -86_400 * 10**9 + 5, (("user.b", b"2"),), {})
    from unpacker.changeset import Kind

    children["fifo"] = Special(0o644, 5, 6, MTIME, (), Kind.FIFO, (0, 0))
    return Tree(tree.root._replace(children=children))  # type: ignore[arg-type]


def facts(root: Path) -> dict[str, tuple[object, ...]]:
    """All that a client can know of a tree, but for the markers and link counts."""
    found: dict[str, tuple[object, ...]] = {}
    for path in [root, *root.rglob("*")]:
        if path.name == ".cvmfscatalog":
            continue
        own = path.lstat()
        what: object = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        xattrs = (
            {}
            if path.is_symlink() or stat.S_ISFIFO(own.st_mode)
            else {name: os.getxattr(path, name) for name in os.listxattr(path) if name in ("user.a", "user.b")}
        )
        found[os.path.relpath(path, root)] = (oct(own.st_mode), own.st_uid, own.st_gid, own.st_mtime_ns, what, xattrs)
    return found


class TestFidelity:
    @pytest.mark.skipif(CVMFS2 is None, reason="cvmfs2 is not installed: no client has looked")
    def test_what_a_client_sees_is_what_a_directory_target_has(
        self, repository: Managed, tmp_path: Path, way: str
    ) -> None:
        from tests.cvmfs_repositories import mounted
        from unpacker.publish.directory import DirectoryPublisher

        name, _ = names(way)
        reference = DirectoryPublisher(str(tmp_path / "reference"))
        with reference.lock():
            tree = rich(reference)
            with reference.transaction("x") as transaction:
                expected = transaction.publish(release(name, tree, seed=name))
        publisher = opened(way, repository, tmp_path / "state")
        with publisher.lock():
            tree = rich(publisher)
            with publisher.transaction("x") as transaction:
                record = transaction.publish(release(name, tree, seed=name))
        assert (record.entries, record.size) == (expected.entries, expected.size)
        key = repository.keys / f"{repository.name}.pub"
        (tmp_path / "client").mkdir()
        with mounted(repository.url, key, tmp_path / "client", name=repository.name) as mount:
            assert facts(Path(mount, record.root)) == facts(tmp_path / "reference" / expected.root)
        assert is_sound(repository)

    def test_verify_compares_the_mount_with_what_was_published(self, repository: Managed, tmp_path: Path) -> None:
        publisher = plain(repository, tmp_path)
        name, _ = names("plain")
        with publisher.lock():
            tree = rich(publisher)
            with publisher.transaction("x") as transaction:
                record = transaction.publish(release(name, tree, seed=name))
        path = publisher.layout.path
        assert list(verify(path, [record], quick=False, unlisted=publisher.marker)) == []
        with repository.transaction() as union:
            (union / record.root / "etc" / "motd").write_text("HELLO")
        (problem, *_) = [p.what for p in verify(path, [record], quick=False, unlisted=publisher.marker)]
        assert "mtime" in problem or "contents" in problem


class TestWays:
    def test_each_way_reads_what_the_other_published(self, repository: Managed, tmp_path: Path) -> None:
        name, other = names("both")
        one = publish(fast(repository, tmp_path), name, {"motd": b"one"}, seed=name)
        assert plain(repository, tmp_path).published()[name] == one
        two = publish(plain(repository, tmp_path), other, {"motd": b"two"}, seed=other)
        found = fast(repository, tmp_path).published()
        assert (found[name], found[other]) == (one, two)
        three = publish(fast(repository, tmp_path), other, {"motd": b"three"}, seed=name + "3")
        assert plain(repository, tmp_path).published()[other] == three
        assert is_sound(repository)

    def test_the_fast_way_is_taken_where_the_storage_is_here(self, repository: Managed) -> None:
        server = Server.find(repository.name)
        assert str(choose(server, "", "auto", layers_view=True)).startswith("fast way: its storage is on this host")
        assert choose(server, "", "plain", layers_view=True).name == "plain"
        assert "only sub of it" in choose(server, "sub", "auto", layers_view=True).because

    def test_a_lost_mount_is_mended_by_the_next_run(self, repository: Managed, tmp_path: Path) -> None:
        name, _ = names("plain")
        publish(Stratum0Publisher(str(repository.storage), str(repository.keys)), name, {"motd": b"x"}, seed=name)
        assert Server.find(repository.name).is_behind()
        publisher = plain(repository, tmp_path)
        with publisher.lock():
            assert name in publisher.published()
        assert not Server.find(repository.name).is_behind()

    def test_garbage_goes_in_a_transaction_and_its_objects_with_the_official_tools(
        self, repository: Managed, tmp_path: Path
    ) -> None:
        publisher = plain(repository, tmp_path)
        name, _ = names("plain")
        record = publish(publisher, name, {"motd": b"to go"}, seed=name)
        with publisher.transaction("remove") as transaction:
            transaction.remove([name], now=1000)
        found = collect(publisher, str(tmp_path), grace=60, keep=86_400, now=time.time(), dry_run=True)
        assert record.root in found.roots
        assert (repository.mount / record.root).exists()
        found = collect(publisher, str(tmp_path), grace=60, keep=86_400, now=time.time(), dry_run=False)
        assert record.root in found.roots
        assert not (repository.mount / record.root).exists()
        assert json.loads(publisher.noted("unreferenced.json") or b"") == {}
        assert is_sound(repository)


def test_the_command_line_publishes_verifies_and_collects(repository: Managed, tmp_path: Path) -> None:
    layout = images.write_layout(tmp_path / "layout", {"1": images.image(images.layer(images.file("motd", b"hello")))})
    target = ["--target", f"/cvmfs/{repository.name}"]
    state = ["--state", str(tmp_path / "state")]
    name = f"h.example.org/cli{next(_numbers)}:1"

    def unpacker(*arguments: str, way: str = "auto") -> str:
        environment = {**os.environ, "UNPACKER_WAY": way}
        line = [sys.executable, "-m", "unpacker", *arguments]
        done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    for way in ("plain", "fast"):
        unpacker("publish", f"oci:{layout}:1", "--as", name, *target, *state, way=way)
        assert seen(repository.mount, name) is not None
        assert name in unpacker("status", *target, *state, way=way)
        unpacker("verify", name, *target, way=way)
        unpacker("gc", *target, *state, way=way)
        unpacker("remove", name, *target, way=way)
    (tmp_path / "wishlist.yaml").write_text("version: 2\nimages: []\n")
    shown = unpacker("plan", "wishlist.yaml", *target, *state)
    assert "fast way: its storage is on this host" in shown
    assert "plain way: the settings ask for it" in unpacker("plan", "wishlist.yaml", *target, *state, way="plain")
    assert OTHER != NAME

"""Our publishes and those of `cvmfs_server` in turn, in one repository that it manages: nothing of either is lost.

The target is `stratum0:` on the storage of the repository, under the locks of the official tools. The repository must
be sound to their checker, over http with its signatures and from the directory, after every step.
"""

from __future__ import annotations

import os
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from pwd import getpwnam
from typing import Any

import pytest

from tests.cvmfs_managed import Managed, managed, run
from tests.cvmfs_tools import judged, scrubbed
from tests.fake_registry import FakeRegistry
from tests.images import directory, file, image, layer, whiteout
from tests.publisher_contract import NAME, OTHER, publish
from tests.test_cli import User
from tests.test_reconcile import Site, done
from unpacker.cvmfs.gc import collect
from unpacker.cvmfs.hash import ContentHash
from unpacker.cvmfs.reader import Reader
from unpacker.cvmfs.repository import Repository
from unpacker.errors import Busy
from unpacker.publish import unreferenced
from unpacker.publish.stratum0 import Stratum0Publisher
from unpacker.reconcile import Result
from unpacker.record import Published

BASE = layer(directory("etc"), file("etc/motd", b"hello"), file("etc/gone", b"x" * 3000))
OWNER = "daemon"
"""A user that every system has, and who is not root."""


pytestmark = pytest.mark.usefixtures("no_sync")


def app(version: int) -> Any:
    return image(BASE, layer(whiteout("etc/gone"), file("version", b"%d" % version)))


class Both(Site):
    """A repository of `cvmfs_server`, and our runs on its storage."""

    def __init__(self, path: Path, fake: FakeRegistry, server: Managed) -> None:
        super().__init__(path, fake)
        self.server = server

    def publisher(self) -> Stratum0Publisher:
        """The target as each process opens it, with nothing but what it finds on this host."""
        return Stratum0Publisher(str(self.server.storage), str(self.server.keys), index=f"{self.path}/index")

    def ours(self, *images: str, **options: Any) -> Result:
        """One run of ours, after which the repository is sound."""
        result = self.run(*images, publisher=self.publisher(), **options)
        self.check()
        return result

    def standing(self) -> set[str]:
        found = self.publisher().published()
        assert all(isinstance(record, Published) for record in found.values()), found
        return {path.removeprefix(f"{self.fake.host}/org/") for path in found}

    def tree(self) -> set[str]:
        """Every path of the published revision."""
        repository = Repository.open(str(self.server.storage))
        with Reader(repository.objects, repository.manifest().root) as reader:
            return {found.path for found in reader.walk()}

    def tags(self) -> set[str]:
        return {tag.name for tag in self.history().tags()}

    def history(self) -> Any:
        repository = Repository.open(str(self.server.storage))
        return repository.history(repository.manifest())

    def withdraw(self) -> None:
        """Takes all our names away."""
        with self.publisher().transaction("withdraw") as transaction:
            if names := list(self.publisher().published()):
                transaction.remove(names, now=int(time.time()))

    def check(self) -> None:
        """Sound for the official checker, from the directory and as clients get it, by the checksum that the tools keep
        of the reference log."""
        checksum = ["-R", str(self.server.checksum), "-t", str(self.path)]
        key = f"{self.server.keys}/{self.server.name}.pub"
        for arguments in ((str(self.server.storage),), (self.server.url, "-k", key, "-N", self.server.name)):
            verdict = judged(arguments[0], *checksum, *arguments[1:])
            assert verdict.is_sound, verdict.said


@pytest.fixture(scope="module")
def server() -> Iterator[Managed]:
    with managed("beside", "-z", "-g") as made:
        yield made


@pytest.fixture
def both(server: Managed, tmp_path: Path, registry: FakeRegistry) -> Iterator[Both]:
    one = Both(tmp_path, registry, server)
    yield one
    # A test finds what those before it left, but no names of ours, whose registries are gone.
    run(["abort", "-f", server.name])
    one.withdraw()


def test_each_sees_and_keeps_what_the_other_published(both: Both) -> None:
    """Also their own mount, which the next command of theirs brings to our revision."""
    wanted: set[str] = set()
    for number in (1, 2):
        both.fake.add("org/app", str(number), app(number))
        both.fake.add("org/app", "latest", app(number))
        both.ours("HOST/org/app:*")
        wanted |= {f"app:{number}", "app:latest"}
        assert both.standing() == wanted
        with both.server.transaction() as tree:
            assert (tree / both.fake.host / "org/app:latest/version").read_bytes() == b"%d" % number
            assert not (tree / both.fake.host / "org/app:latest/etc/gone").exists()
            (tree / "software").mkdir(exist_ok=True)
            (tree / "software" / f"by-hand-{number}").write_text("theirs")
        both.check()
        assert both.standing() == wanted
        theirs = {f"/software/by-hand-{n}" for n in range(1, number + 1)} | {"/new_repository"}
        assert theirs <= both.tree()
    result = both.ours("HOST/org/app:1", allow_removals=True)
    assert list(done(result).values()).count("removed") == 2
    assert (both.standing(), theirs <= both.tree()) == ({"app:1"}, True)
    both.server("check", both.server.name)
    assert {*os.listdir(both.server.mount / both.fake.host / "org")} == {"app:1", ".cvmfscatalog"}
    assert scrubbed(str(both.server.storage)).is_sound


def test_their_tags_outlive_our_revisions_and_a_rollback_is_made_good_by_our_next_run(both: Both) -> None:
    both.fake.add("org/app", "1", app(1))
    both.ours("HOST/org/app:*")
    both.server("tag", "-a", "before", both.server.name)
    both.check()
    both.fake.add("org/app", "2", app(2))
    both.ours("HOST/org/app:*")
    both.server("tag", "-a", "after", "-m", "what we published", both.server.name)
    both.fake.add("org/app", "3", app(3))
    both.ours("HOST/org/app:*")
    assert {"before", "after", "trunk", "trunk-previous"} <= both.tags()
    both.server("rollback", "-f", "-t", "before", both.server.name)
    both.check()
    assert both.standing() == {"app:1"}
    both.ours("HOST/org/app:*")
    assert both.standing() == {"app:1", "app:2", "app:3"}
    both.server("rollback", "-f", both.server.name)
    both.check()
    both.ours("HOST/org/app:*")
    assert both.standing() == {"app:1", "app:2", "app:3"}
    both.server("tag", "-f", "-r", "before", both.server.name)
    both.check()
    assert "before" not in both.tags()


@pytest.mark.parametrize("whose", ["theirs", "ours"])
def test_what_a_garbage_collection_took_is_read_again(both: Both, whose: str) -> None:
    """Theirs rewrites the reference log, and tells its new checksum nobody but the file that we read, too."""
    both.fake.add("org/app", "1", image(BASE, layer(file("once", b"only here"))))
    both.ours("HOST/org/app:*")
    contents = both.server.storage / ContentHash.of(zlib.compress(b"only here"), "sha1").object_path()
    assert contents.exists()
    both.withdraw()
    unreferenced.collect(both.publisher(), grace=0, keep=0, now=time.time() + 1, dry_run=False)
    both.check()
    for number in range(2):
        # Until no tag names a revision with that root.
        with both.server.transaction() as tree:
            (tree / f"{whose}-{number}").touch()
    if whose == "theirs":
        both.server("gc", "-r", "0", "-f", both.server.name)
    else:
        repository = Repository.open(str(both.server.storage), str(both.server.keys))
        collect(repository, keep=0, grace=0, now=time.time() + 1, dry_run=False)
    both.check()
    assert not contents.exists()
    both.ours("HOST/org/app:*")
    assert (both.standing(), contents.exists()) == ({"app:1"}, True)
    with both.server.transaction() as tree:
        assert (tree / both.fake.host / "org/app:1/once").read_bytes() == b"only here"
    both.check()
    assert scrubbed(str(both.server.storage)).is_sound


def test_their_open_transaction_keeps_us_out_with_a_message_and_is_left_alone(both: Both) -> None:
    both.fake.add("org/app", "1", app(1))
    user = User(both.path, both.fake)
    user.wishlist("HOST/org/app:*")
    target = {"UNPACKER_TARGET": f"stratum0:{both.server.storage}", "UNPACKER_KEYS": str(both.server.keys)}
    with both.server.transaction() as tree:
        (tree / "theirs").write_text("not published yet")
        refused = user("reconcile", **target)
        assert refused.returncode == 5
        assert "a transaction of cvmfs_server is open, by root, for " in refused.stderr
        assert "publish or abort it with cvmfs_server, or wait for its end" in refused.stderr
        assert "Traceback" not in refused.stderr
        assert both.standing() == set()
    both.check()
    assert "/theirs" in both.tree()
    assert user("reconcile", **target).returncode == 0
    both.check()
    assert "/theirs" in both.tree()
    assert both.standing() == {"app:1"}


def test_who_waits_for_their_transaction_publishes_after_it_and_on_top_of_it(both: Both) -> None:
    both.fake.add("org/app", "1", app(1))

    def publish_later() -> None:
        time.sleep(0.3)
        (both.server.mount / "waited-for").write_text("theirs")
        both.server("publish", both.server.name)

    both.server("transaction", both.server.name)
    later = threading.Thread(target=publish_later)
    later.start()
    try:
        both.ours("HOST/org/app:*", lock_wait=60)
    finally:
        later.join()
    assert both.standing() == {"app:1"}
    assert "/waited-for" in both.tree()


def test_while_we_publish_they_refuse_to_change_anything(both: Both) -> None:
    name = both.server.name
    with both.publisher().transaction("ours") as transaction:
        for arguments in (
            ["transaction", name],
            ["publish", name],
            ["abort", "-f", name],
            ["tag", "-a", "sneaked-in", name],
            ["rollback", "-f", name],
            ["gc", "-r", "0", "-f", name],
        ):
            both.server.refused(*arguments)
        transaction.note("status.json", b"{}")
    both.check()
    assert "/.metadata/status.json" in both.tree()
    assert "sneaked-in" not in both.tags()
    with both.server.transaction() as tree:
        assert (tree / ".metadata/status.json").read_bytes() == b"{}"
    both.check()


def test_publishing_and_tagging_at_the_same_time_loses_neither(both: Both) -> None:
    """Their tags are written in a revision of the same number, so whoever writes last must have seen the other."""
    wanted = [f"race-{number}" for number in range(4)]
    failed: list[str] = []

    def tag_all() -> None:
        failed.extend(tag for tag in wanted if not eventually("tag", "-a", tag, both.server.name))

    tagging = threading.Thread(target=tag_all)
    tagging.start()
    published: list[str] = []
    while len(published) < 6:
        path = f"registry.example.org/race/tool:{len(published)}"
        try:
            publish(both.publisher(), path, {"motd": b"%d" % len(published)}, seed=path)
            published.append(path)
        except Busy:
            pass
        # They do not wait, so that there must be times when they can begin.
        time.sleep(0.3)
    tagging.join()
    both.check()
    assert failed == []
    assert set(wanted) <= both.tags()
    assert set(both.publisher().published()) == set(published)


def eventually(*arguments: str) -> bool:
    """Whether a verb of `cvmfs_server` comes through that others may keep out at times."""
    deadline = time.monotonic() + 120
    while run(arguments).returncode != 0:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_root_and_the_owner_of_a_repository_take_turns_with_the_tools() -> None:
    """Nothing that root leaves locks the owner out, of the repository, its locks or its checksum."""
    with managed("owned", "-z", "-g", owner=OWNER) as server:

        def publisher() -> Stratum0Publisher:
            return Stratum0Publisher(str(server.storage), str(server.keys))

        for number in range(2):
            publish(publisher(), NAME, {"motd": b"root %d" % number}, seed=f"root {number}")
            as_owner = get_context("fork").Process(target=publish_as_owner, args=(publisher, number))
            as_owner.start()
            as_owner.join()
            assert as_owner.exitcode == 0
            with server.transaction() as tree:
                assert (tree / NAME / "motd").read_bytes() == b"root %d" % number
                assert (tree / OTHER / "motd").read_bytes() == b"owner %d" % number
            server("gc", "-r", "0", "-f", server.name)
            verdict = judged(str(server.storage), "-R", str(server.checksum))
            assert verdict.is_sound, verdict.said


def publish_as_owner(publisher: Callable[[], Stratum0Publisher], number: int) -> None:
    owner = getpwnam(OWNER)
    os.setgroups([])
    os.setgid(owner.pw_gid)
    os.setuid(owner.pw_uid)
    publish(publisher(), OTHER, {"motd": b"owner %d" % number}, seed=f"owner {number}")

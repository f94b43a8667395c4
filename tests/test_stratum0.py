"""Native repositories as an operator has them: by the command line, judged by our checker and by the official tools."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.cvmfs_repositories import SWISSKNIFE, served, swissknife_check
from tests.fake_registry import FakeRegistry
from tests.images import device, directory, fifo, file, hardlink, image, layer, opaque, symlink, whiteout
from tests.test_cli import User
from tests.test_publish_stratum0 import edit_by_hand
from unpacker.assembly import publisher, seen_at
from unpacker.cvmfs.deflation import dense
from unpacker.cvmfs.hash import ContentHash
from unpacker.cvmfs.reader import Reader
from unpacker.cvmfs.repository import Repository
from unpacker.publish.stratum0 import Stratum0Publisher
from unpacker.record import Published
from unpacker.settings import Settings

REPOSITORY = "try.example.org"
MANAGED = f"gc{os.getpid()}.example.org"
CVMFS2 = shutil.which("cvmfs2")
BASE = layer(
    directory("etc"),
    file("etc/motd", b"hello", uid=7, gid=8, mtime=1_500_000_000.25),
    file("etc/shadow", b"secret", mode=0o600, uid=0, gid=42),
    file("etc/caf\udce9", b"x" * 5000, xattrs={"user.color": b"red"}),
    file("etc/empty"),
    directory("usr/lib", mode=0o700, uid=1, gid=2),
    *(file(f"usr/lib/lib{i}.so", bytes([i]) * (100 + i), mode=0o4755) for i in range(12)),
    hardlink("usr/lib/again.so", "usr/lib/lib1.so"),
    symlink("lib", "usr/lib"),
    fifo("run/pipe"),
    device("dev/null", 1, 3),
)
FIRST = image(BASE, layer(file("version", b"1")))
SECOND = image(BASE, layer(whiteout("etc/motd"), opaque("usr/lib"), *(file(f"opt/{i}", b"n%d" % i) for i in range(8))))
THIRD = image(BASE, layer(file("lib/through", b"the symlink below")))


class Operator(User):
    """Somebody with a native repository as target."""

    @property
    def repository(self) -> Path:
        return self.path / "repo"

    def environment(self, **extra: str) -> dict[str, str]:
        return super().environment(**{"UNPACKER_TARGET": f"stratum0:{self.repository}", **extra})

    def init(self) -> None:
        done = self("init", f"stratum0:{self.repository}", "--name", REPOSITORY)
        assert done.returncode == 0, done.stderr

    def done(self, *arguments: str) -> str:
        done = self(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def check(self) -> None:
        """Sound for our checker, bytes of all objects included, and for the official one where it is."""
        said = self("verify")
        assert said.returncode == 0, said.stdout + said.stderr
        if SWISSKNIFE is not None:
            swissknife_check("-c", "-r", str(self.repository))


@pytest.fixture
def operator(tmp_path: Path, registry: FakeRegistry) -> Operator:
    registry.add("org/app", "1", FIRST)
    one = Operator(tmp_path, registry)
    one.init()
    return one


def test_the_life_of_a_repository(operator: Operator, registry: FakeRegistry) -> None:
    """init, publish, update, remove, gc, resign: sound after each."""
    operator.check()
    operator.wishlist("HOST/org/app:*")
    operator.done("reconcile")
    operator.check()
    names = json.loads(operator.done("status", "--json"))["names"]
    assert [name["state"] for name in names] == ["published"]
    registry.add("org/app", "1", SECOND)
    registry.add("org/app", "2", THIRD)
    operator.done("reconcile")
    operator.check()
    operator.wishlist("HOST/org/app:2")
    operator.done("reconcile")
    operator.check()
    collected = json.loads(operator.done("gc", "--grace", "0", "--keep-revisions", "0", "--json"))
    assert len(collected["roots"]) == 2 and len(collected["layers"]) == 2
    operator.check()
    operator.done("gc", "--grace", "0", "--keep-revisions", "0")
    operator.check()
    operator.done("resign", f"stratum0:{operator.repository}", "--days", "20")
    operator.check()
    assert "1 kept" in operator.done("reconcile")


def test_a_run_that_changes_nothing_makes_no_revision(operator: Operator) -> None:
    operator.wishlist("HOST/org/app:*")
    operator.done("reconcile")
    before = (operator.repository / ".cvmfspublished").read_bytes()
    operator.done("reconcile")
    assert (operator.repository / ".cvmfspublished").read_bytes() == before


def test_a_run_is_one_revision_and_status_json_comes_with_it(operator: Operator, registry: FakeRegistry) -> None:
    """Publishing, updating with a removal, removing, and a run of which one image fails."""
    registry.add("org/gone", "1", SECOND)
    operator.wishlist("HOST/org/app:*", "HOST/org/gone:1")
    assert revisions(operator, "reconcile") == (1, 0)
    assert set(status(operator)["names"]) == {f"{registry.host}/org/app:1", f"{registry.host}/org/gone:1"}
    operator.wishlist("HOST/org/app:*")
    registry.add("org/app", "1", THIRD)
    done, code = revisions(operator, "reconcile")
    assert (done, code) == (2, 0), "what is no longer wished goes after all others are there"
    assert set(status(operator)["names"]) == {f"{registry.host}/org/app:1"}
    registry.add("org/app", "2", SECOND)
    operator.wishlist("HOST/org/app:*", "HOST/org/missing:1")
    assert revisions(operator, "reconcile") == (1, 1)
    (wishlist,) = status(operator)["wishlists"].values()
    assert set(wishlist["failing"]) == {f"{registry.host}/org/missing:1"}
    assert len(status(operator)["names"]) == 2
    assert revisions(operator, "reconcile") == (0, 1), "nothing new to say"
    operator.wishlist("HOST/org/app:*")
    assert revisions(operator, "reconcile") == (1, 0), "nothing fails any more"
    (wishlist,) = status(operator)["wishlists"].values()
    assert wishlist["failing"] == {}
    operator.check()


def test_a_status_json_that_is_lost_fails_no_image_and_is_written_anew(
    operator: Operator, registry: FakeRegistry
) -> None:
    operator.wishlist("HOST/org/app:*")
    operator.done("reconcile")
    repository = Repository.open(str(operator.repository))
    with Reader(repository.objects, repository.manifest().root) as reader:
        found = reader.lookup("/.metadata/status.json")
    assert found is not None and found.row.content_hash is not None
    os.unlink(repository.objects.path(found.row.content_hash))
    registry.add("org/app", "2", SECOND)
    assert revisions(operator, "reconcile") == (1, 0)
    assert len(status(operator)["names"]) == 2
    operator.check()


def revisions(operator: Operator, *arguments: str) -> tuple[int, int]:
    """How many revisions a run makes, and how it ends."""
    before = Repository.open(str(operator.repository)).manifest().revision
    done = operator(*arguments)
    return Repository.open(str(operator.repository)).manifest().revision - before, done.returncode


def status(operator: Operator) -> Any:
    data = Stratum0Publisher(str(operator.repository)).noted("status.json")
    assert data is not None
    return json.loads(data)


def test_an_image_of_known_layers_reads_none(operator: Operator, registry: FakeRegistry) -> None:
    operator.wishlist("HOST/org/app:*")
    operator.done("reconcile")
    registry.add("org/app", "again", image(BASE, layer(file("version", b"1")), Env=["A=1"]))
    outcomes = json.loads(operator.done("reconcile", "--json"))["outcomes"]
    assert [o["read"] for o in outcomes if o["name"].endswith(":again")] == [0]


def test_collected_objects_are_ingested_again(operator: Operator, registry: FakeRegistry) -> None:
    """Somebody else's garbage collection took what the cache of read layers believes in."""
    operator.wishlist("HOST/org/app:*")
    operator.done("reconcile")
    operator.wishlist()
    operator.done("reconcile", "--allow-removals")
    operator.done("gc", "--grace", "0", "--keep-revisions", "0")
    operator.done("gc", "--grace", "0", "--keep-revisions", "0")
    operator.wishlist("HOST/org/app:*")
    registry.add("org/app", "1", SECOND)
    operator.done("reconcile")
    operator.check()


def test_lost_and_damaged_objects_are_told_by_name_and_a_rebuild_mends_them(operator: Operator) -> None:
    operator.wishlist("HOST/org/app:*")
    operator.done("reconcile")
    name = ContentHash.of(dense(b"secret"), "sha1")
    (operator.repository / name.object_path()).write_bytes(b"damaged")
    found = json.loads(operator("verify", "--json").stdout)["problems"]
    assert any(problem["name"].endswith("org/app:1") for problem in found)
    operator.done("reconcile", "--rebuild")
    operator.check()


def test_a_named_snapshot_stays_readable_until_its_name_is_taken_away(
    operator: Operator, registry: FakeRegistry
) -> None:
    where = f"stratum0:{operator.repository}"
    version = ContentHash.of(dense(b"1"), "sha1")
    operator.wishlist("HOST/org/app:*")
    operator.done("reconcile")
    operator.done("snapshot", where, "2026-paper", "-m", "what the paper used")
    (listed,) = json.loads(operator.done("snapshot", where, "--json"))["snapshots"]
    assert (listed["name"], listed["description"]) == ("2026-paper", "what the paper used")
    operator.check()
    registry.add("org/app", "1", THIRD)
    operator.done("reconcile")
    registry.remove("org/app")
    registry.add("org/app", "3", THIRD)
    operator.done("reconcile")
    operator.done("remove", f"{registry.host}/org/app:1")
    operator.done("gc", "--grace", "0", "--keep-revisions", "0")
    operator.done("gc", "--grace", "0", "--keep-revisions", "0")
    operator.check()
    repository = Repository.open(str(operator.repository))
    tag = repository.history(repository.manifest()).tag("2026-paper")
    assert tag is not None and tag.revision == listed["revision"]
    with Reader(repository.objects, tag.root) as reader:
        assert reader.lookup(f"/{registry.host}/org/app:1") is not None
    assert repository.objects.has(version)
    taken = operator("snapshot", where, "2026-paper")
    assert (taken.returncode, "is the name of revision" in taken.stderr) == (5, True)
    assert operator("snapshot", where, "trunk").returncode == 2
    assert operator("snapshot", where, "--remove", "never").returncode == 2
    assert operator("snapshot", where, "--message", "of nothing").returncode == 2
    operator.done("snapshot", where, "2026-paper", "--remove")
    assert "0 named snapshots" in operator.done("snapshot", where)
    registry.add("org/app", "4", SECOND)
    operator.done("reconcile")  # the last revision but one has the root of the first image still
    operator.done("gc", "--grace", "0", "--keep-revisions", "0")
    assert not repository.objects.has(version)
    operator.check()


@pytest.mark.parametrize("between", [False, True], ids=["at once", "after another publish"])
def test_a_root_that_somebody_took_away_is_published_again(
    operator: Operator, registry: FakeRegistry, between: bool
) -> None:
    """As with `cvmfs_server transaction`, `rm -r` and `cvmfs_server publish`."""
    registry.add("org/other", "1", SECOND)
    registry.add("org/later", "1", THIRD)
    operator.wishlist("HOST/org/app:*", "HOST/org/other:1")
    operator.done("reconcile")
    publisher = Stratum0Publisher(str(operator.repository))
    lost = publisher.published()[f"{registry.host}/org/app:1"]
    assert isinstance(lost, Published)
    edit_by_hand(publisher, {f"/{lost.root}": None})
    if between:
        operator.done("publish", f"{registry.host}/org/later:1")
    operator.wishlist("HOST/org/app:*", "HOST/org/other:1")
    planned = json.loads(operator.done("plan", "--json"))
    assert [(a["action"], a["name"]) for a in planned["actions"] if a["action"] != "keep"] == [
        ("update", f"{registry.host}/org/app:1")
    ]
    operator.done("reconcile")
    operator.check()
    assert publisher.published()[f"{registry.host}/org/app:1"].root == lost.root


@pytest.fixture
def managed(operator: Operator) -> Iterator[Path]:
    """The spool directory of a repository whose name the official tools know on this host."""
    spool = Path("/var/spool/cvmfs") / MANAGED
    if SWISSKNIFE is None or not os.access("/var/spool", os.W_OK):
        pytest.skip("cvmfs_swissknife is not installed, or no spool can be made: no official garbage collection ran")
    spool.mkdir(parents=True)
    try:
        shutil.rmtree(operator.repository)
        shutil.rmtree(f"{operator.repository}.keys")
        operator.done("init", f"stratum0:{operator.repository}", "--name", MANAGED)
        yield spool
    finally:
        shutil.rmtree(spool)


def test_the_official_garbage_collection_and_our_publishing_alternate(
    operator: Operator, registry: FakeRegistry, managed: Path
) -> None:
    operator.wishlist("HOST/org/app:*")
    for built in (FIRST, SECOND, THIRD):
        registry.add("org/app", "1", built)
        operator.done("reconcile")
        collect_officially(operator.repository, managed)
    operator.wishlist()
    operator.done("reconcile", "--allow-removals")
    operator.done("gc", "--grace", "0", "--keep-revisions", "1000")
    # Two more revisions, until no tag names one that has the roots.
    registry.add("org/other", "1", image(layer(file("other", b"other"))))
    operator.wishlist("HOST/org/other:1")
    operator.done("reconcile")
    gone = operator.repository / ContentHash.of(dense(b"hello"), "sha1").object_path()
    assert gone.exists()
    collect_officially(operator.repository, managed)
    assert not gone.exists()
    registry.add("org/app", "1", FIRST)
    operator.wishlist("HOST/org/app:*")
    operator.done("reconcile")
    assert gone.exists()
    swissknife_check("-c", "-r", str(operator.repository), "-R", str(managed / "reflog.chksum"))
    assert operator("verify").returncode == 0


def collect_officially(repository: Path, spool: Path) -> None:
    """What `cvmfs_server gc` runs: all but the last revision and what tags name."""
    assert SWISSKNIFE is not None
    arguments = ["gc", "-r", f"file://{repository}", "-u", f"local,{repository}/data/txn,{repository}", "-n", MANAGED]
    arguments += ["-R", str(spool / "reflog.chksum"), "-k", f"{repository}.keys/{MANAGED}.pub", "-h", "0"]
    done = subprocess.run(
        [SWISSKNIFE, *arguments, "-t", str(repository.parent)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


class TestKeysAndArguments:
    def test_a_publisher_needs_only_key_and_certificate(self, operator: Operator) -> None:
        keys = operator.path / "repo.keys"
        os.unlink(keys / f"{REPOSITORY}.masterkey")
        os.unlink(keys / f"{REPOSITORY}.pub")
        operator.wishlist("HOST/org/app:1")
        operator.done("reconcile")

    def test_keys_may_lie_elsewhere(self, operator: Operator) -> None:
        (operator.path / "repo.keys").rename(operator.path / "secret")
        operator.wishlist("HOST/org/app:1")
        done = operator("reconcile")
        assert (done.returncode, "Traceback" in done.stderr) == (5, False)
        assert operator("reconcile", UNPACKER_KEYS=str(operator.path / "secret")).returncode == 0
        renewed = operator("resign", f"stratum0:{operator.repository}", UNPACKER_KEYS=str(operator.path / "secret"))
        assert renewed.returncode == 0, renewed.stderr

    def test_init_makes_keys_where_all_other_verbs_look_for_them(self, operator: Operator) -> None:
        where, keys = f"stratum0:{operator.path / 'other'}", str(operator.path / "kept")
        operator.wishlist("HOST/org/app:1")
        for line in (("init", where, "--name", "other.example.org"), ("reconcile", "--target", where)):
            done = operator(*line, UNPACKER_KEYS=keys)
            assert done.returncode == 0, done.stderr
        assert not (operator.path / "other.keys").exists()

    def test_users_see_it_at_its_name_below_cvmfs_unless_the_operator_says_otherwise(self, operator: Operator) -> None:
        """What receipts name."""
        settings = Settings(target=f"stratum0:{operator.repository}")
        assert seen_at(settings, publisher(settings)) == f"/cvmfs/{REPOSITORY}"
        elsewhere = settings.model_copy(update={"published_at": "/mnt/images"})
        assert seen_at(elsewhere, publisher(elsewhere)) == "/mnt/images"
        directory = Settings(target=str(operator.target))
        assert seen_at(directory, publisher(directory)) == str(operator.target)

    def test_a_whitelist_near_its_end_is_told_by_status_and_reconcile(self, operator: Operator) -> None:
        operator.wishlist("HOST/org/app:1")
        operator.done("resign", f"stratum0:{operator.repository}", "--days", "3")
        for verb in ("status", "reconcile"):
            done = operator(verb)
            assert done.returncode == 0
            assert "expires in 2 days" in done.stderr or "expires in 3 days" in done.stderr

    def test_no_repository_is_said_with_what_to_do(self, operator: Operator) -> None:
        done = operator("status", UNPACKER_TARGET="stratum0:nowhere")
        assert done.returncode == 5
        assert "unpacker init" in done.stderr

    def test_init_and_resign_are_for_native_repositories(self, operator: Operator) -> None:
        for verb in (["init", "/tmp/x", "--name", "a.b"], ["resign", "stratum0:"]):
            done = operator(*verb)
            assert done.returncode == 2
            assert "stratum0:DIRECTORY" in done.stderr


@contextmanager
def mounted(operator: Operator, url: str) -> Iterator[Path]:
    """The repository at a URL as a stock client has it."""
    if CVMFS2 is None or os.geteuid() != 0 or not os.path.exists("/dev/fuse"):
        pytest.skip("cvmfs2 cannot mount here (not installed, no /dev/fuse, or not root): no client has seen the tree")
    cache, point = operator.path / "cache", operator.path / "mount"
    cache.mkdir()
    point.mkdir()
    settings = operator.path / "client.conf"
    settings.write_text(
        f"CVMFS_SERVER_URL={url}\nCVMFS_HTTP_PROXY=DIRECT\nCVMFS_SHARED_CACHE=no\n"
        f"CVMFS_PUBLIC_KEY={operator.repository}.keys/{REPOSITORY}.pub\nCVMFS_CACHE_BASE={cache}\n"
        f"CVMFS_RELOAD_SOCKETS={cache}\nCVMFS_QUOTA_LIMIT=500\nCVMFS_CLAIM_OWNERSHIP=no\nCVMFS_USER=root\n"
        f"CVMFS_USYSLOG={operator.path}/client.log\n"
    )
    options = f"config={settings},disable_watchdog,simple_options_parsing"
    done = subprocess.run([CVMFS2, "-o", options, REPOSITORY, str(point)], capture_output=True, text=True, timeout=60)
    if done.returncode:
        pytest.fail(f"cvmfs2: {done.stdout}{done.stderr}")
    try:
        yield point
    finally:
        subprocess.run(["umount", str(point)], check=True, timeout=60)
        time.sleep(0.2)


def tree(root: Path) -> dict[str, tuple[object, ...]]:
    found: dict[str, tuple[object, ...]] = {}
    for parent, directories, files in os.walk(os.fsencode(root)):
        for name in [b"", *directories, *files] if parent == os.fsencode(root) else [*directories, *files]:
            path = os.path.join(parent, name) if name else parent
            own = os.lstat(path)
            content: object = None
            attributes: object = None
            if stat.S_ISLNK(own.st_mode):
                content = os.readlink(path)
            else:
                attributes = {
                    key: os.getxattr(path, key)
                    for key in os.listxattr(path)
                    if key.startswith("user.") and key == "user.color"
                }
                if stat.S_ISREG(own.st_mode):
                    content = Path(os.fsdecode(path)).read_bytes()
            if name != b".cvmfscatalog":
                relative = os.path.relpath(path, os.fsencode(root))
                found[os.fsdecode(relative)] = (
                    oct(own.st_mode),
                    own.st_uid,
                    own.st_gid,
                    own.st_mtime,
                    content,
                    attributes,
                )
    return found


def test_a_client_sees_the_same_tree_as_the_directory_target_has(operator: Operator, registry: FakeRegistry) -> None:
    """Types, modes, owners, times, contents, links, xattrs: the other publisher is the reference."""
    registry.add("org/app", "2", SECOND)
    registry.add("org/app", "3", THIRD)
    operator.wishlist("HOST/org/app:*")
    operator.done("reconcile")
    directory_target = operator.path / "directory"
    operator.done("reconcile", "--target", str(directory_target))
    with served(operator.repository) as url, mounted(operator, url) as point:
        for tag in ("1", "2", "3"):
            name = f"{registry.host}/org/app:{tag}"
            assert tree(Path(os.path.realpath(point / name))) == tree(Path(os.path.realpath(directory_target / name)))
        for path in (point / ".layers").glob("*/*/layerfs/etc/motd"):
            assert stat.S_ISREG(path.lstat().st_mode) or (
                stat.S_ISCHR(path.lstat().st_mode) and path.lstat().st_rdev == 0
            )
        assert any(stat.S_ISCHR(p.lstat().st_mode) for p in (point / ".layers").glob("*/*/layerfs/etc/motd"))


def test_a_tilde_behind_the_colon_is_the_home_directory(tmp_path: Path, registry: FakeRegistry) -> None:
    one = Operator(tmp_path, registry)
    said = one("init", "stratum0:~/repo", "--name", REPOSITORY, HOME=str(tmp_path))
    assert said.returncode == 0, said.stderr
    assert (tmp_path / "repo" / ".cvmfspublished").exists()

"""Runs in which something goes wrong that is nobody's image: what fails, fails alone, and is told."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from tests.fake_registry import FakeRegistry
from tests.images import BuiltImage, directory, file, image, layer, symlink
from tests.test_cli import User
from tests.test_reconcile import APP, Site, done, failures
from unpacker import flatten, journal, proposal, storing
from unpacker.changeset import Entry
from unpacker.digest import Stream
from unpacker.errors import NoRoom, PublishError, RegistryError
from unpacker.layer import LayerJob, read_layer
from unpacker.limits import Limits
from unpacker.proposal import propose
from unpacker.publish import posix
from unpacker.publish.directory import DirectoryPublisher
from unpacker.publish.pool import PoolBatch
from unpacker.publish.transaction import DirectoryTransaction
from unpacker.reconcile import exit_code
from unpacker.record import Published
from unpacker.reference import Repository
from unpacker.registry.client import Access
from unpacker.rootfs import EARLIEST
from unpacker.survey import survey
from unpacker.verify import verify
from unpacker.wishlist import parse


@pytest.fixture
def site(tmp_path: Path, registry: FakeRegistry) -> Site:
    return Site(tmp_path, registry)


@pytest.fixture
def user(tmp_path: Path, registry: FakeRegistry) -> User:
    return User(tmp_path, registry)


def single(text: str) -> BuiltImage:
    return image(layer(file("text", text.encode())))


# -- registries -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["999.1.1.1", "127.999.0.1:1", "[::::1]:8", "1.2.3", "a" * 64 + ".com", "a." * 130 + "b"]
)
def test_what_can_be_no_host_is_a_fault_of_the_wishlist(host: str) -> None:
    with pytest.raises(ValueError, match="no such host"):
        Repository.parse(f"https://{host}/x/y")


@pytest.mark.parametrize("tag", ["1", "1.*"])
def test_a_host_that_cannot_be_called_fails_alone(site: Site, tag: str) -> None:
    site.fake.add("org/app", "1", APP)
    result = site.run("HOST/org/app:1", f"https://xn--zz.com/x/y:{tag}")
    assert done(result) == {"org/app:1": "published"}
    assert ["no host that can be called" in str(u.error) for u in result.survey.plan.unresolved] == [True]


def test_a_redirect_to_what_is_no_host_is_a_registry_error(site: Site) -> None:
    site.fake.add("org/app", "1", APP)
    site.fake.add("org/other", "1", APP)
    site.fake.redirect["/v2/org/other/manifests/1"] = "https://xn--zz.com/"
    result = site.run("HOST/org/app:1", "HOST/org/other:1")
    assert done(result) == {"org/app:1": "published"}
    assert [type(u.error) for u in result.survey.plan.unresolved] == [RegistryError]


@pytest.mark.parametrize("order", [("a/broken", "b/whole"), ("a/whole", "b/broken")])
@pytest.mark.parametrize("how", ["refused", "corrupt"])
def test_a_layer_that_one_repository_does_not_give_is_asked_of_the_other(
    site: Site, order: tuple[str, str], how: str
) -> None:
    shared = layer(file("shared", b"x"))
    broken = next(name for name in order if "broken" in name)
    for name in order:
        built = image(shared, layer(file("own", name.encode())))
        site.fake.add(name, "1", built)
    digest = next(iter(built.blobs))
    path = f"^/v2/{broken}/blobs/{digest}"
    if how == "refused":
        site.fake.fault(status=404, times=100, path=path)
    else:
        site.fake.fault(status=200, times=100, path=path, body=b"?" * len(built.blobs[digest]))
    result = site.run(*(f"HOST/{name}:1" for name in order))
    whole = next(f"{name}:1" for name in order if "whole" in name)
    assert done(result)[whole] == "published"
    assert all(broken in str(outcome.error) for outcome in failures(result).values())


# -- processes --------------------------------------------------------------------------------------------------


def test_a_worker_that_is_killed_harms_neither_the_running_nor_the_later_images(site: Site) -> None:
    tags = [f"1.{i}" for i in range(12)]
    for tag in tags:
        site.fake.add("org/app", tag, single(tag))
    site.fake.slow = (64, 0.02)

    def kill() -> None:
        while not any("/blobs/" in r.path and r.method == "GET" for r in site.fake.requests):
            time.sleep(0.005)
        for process in multiprocessing.active_children():
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    result = site.run("HOST/org/app:1.*", jobs=2)
    killer.join()
    assert done(result) == {f"org/app:{tag}": "published" for tag in tags}


@pytest.mark.parametrize("jobs", ["1", "2"])
@pytest.mark.parametrize("where", ["/manifests/", "/blobs/"])
def test_a_stopped_run_waits_for_no_registry(user: User, where: str, jobs: str) -> None:
    user.fake.add("org/app", "1.0", APP)
    user.wishlist("HOST/org/app:1.0")
    if where == "/manifests/":
        user.fake.delay = 8
    else:
        silent = socket.create_server(("127.0.0.1", 0))
        user.fake.redirect_blobs = f"http://127.0.0.1:{silent.getsockname()[1]}"
    run = subprocess.Popen(
        user.command("reconcile", "--jobs", jobs),
        cwd=user.path,
        env=user.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 20
    while not any(where in r.path for r in user.fake.requests):
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    began = time.monotonic()
    run.terminate()
    _, errors = run.communicate(timeout=30)
    assert run.returncode == 143, errors
    assert time.monotonic() - began < 4
    assert b"Traceback" not in errors


STOPPED_IN_FORK = """
import os, signal
from unpacker.pools import Pools
class Stopped(BaseException): pass
def stop(number, frame): raise Stopped
signal.signal(signal.SIGTERM, stop)
os.register_at_fork(before=lambda: os.kill(os.getpid(), signal.SIGTERM))
try:
    Pools(2)
except Stopped:
    print("stopped")
"""


def test_a_signal_that_comes_in_a_fork_is_not_lost() -> None:
    run = subprocess.run(
        [sys.executable, "-c", STOPPED_IN_FORK], capture_output=True, text=True, timeout=30, check=False
    )
    assert (run.stdout, run.stderr) == ("stopped\n", "")


def test_what_is_published_is_for_all_to_read_whatever_the_mask_of_the_publisher(user: User) -> None:
    user.fake.add("org/app", "1.0", image(layer(file("etc/motd", b"hello"))))
    user.wishlist("HOST/org/app:1.0")
    run = subprocess.run(
        user.command("reconcile"),
        cwd=user.path,
        env=user.environment(),
        capture_output=True,
        timeout=60,
        check=False,
        umask=0o077,
    )
    assert run.returncode == 0, run.stderr
    path = user.target / user.fake.host / "org/app:1.0/etc/motd"
    while path != user.target.parent:
        assert path.stat().st_mode & 0o004, path
        path = path.parent


# -- a disk that is full ----------------------------------------------------------------------------------------


def stored(target: Path) -> int:
    """Bytes of contents, while others come and go."""
    sizes: dict[int, int] = {}
    for place in ("pool", "txn"):
        for parent, _, names in os.walk(target / ".unpacker" / place):
            for name in names:
                with suppress(FileNotFoundError):
                    own = os.lstat(f"{parent}/{name}")
                    sizes[own.st_ino] = own.st_size
    return sum(sizes.values())


@pytest.fixture
def small_disk(site: Site, monkeypatch: pytest.MonkeyPatch) -> Site:
    """A site whose disk takes 40,000 bytes of contents."""
    put = PoolBatch.put

    def bounded(batch: PoolBatch, stream: Stream, size: int, hint: Entry) -> str:
        if stored(site.target) + size > 40_000:
            raise posix.failure(OSError(errno.ENOSPC, "No space left on device"), "storing contents")
        return put(batch, stream, size, hint)

    monkeypatch.setattr(PoolBatch, "put", bounded)
    monkeypatch.setattr(storing, "BATCH_BYTES", 4_000)  # so that most of a layer is stored for good before it fails
    monkeypatch.setattr(posix, "syncfs", lambda fd: None)
    return site


def filling(name: str, size: int) -> BuiltImage:
    return image(layer(*(file(f"{name}/{i}", f"{name}{i}".encode().ljust(1000, b".")) for i in range(size // 1000))))


def test_an_image_too_large_for_the_disk_stops_no_other_and_leaves_the_disk_as_it_was(small_disk: Site) -> None:
    site = small_disk
    site.fake.add("org/app", "a", filling("a", 100_000))
    for tag in "bcd":
        site.fake.add("org/app", tag, filling(tag, 5_000))
    for _ in range(2):
        result = site.run("HOST/org/app:*")
        (failed,) = failures(result).values()
        assert failed.action.public_path.endswith("org/app:a") and isinstance(failed.error, NoRoom)
        assert site.names() == {"org/app:b", "org/app:c", "org/app:d"}
        pooled = [p for p in (site.target / ".unpacker/pool").rglob("*") if p.is_file()]
        assert pooled and all(p.stat().st_nlink > 1 for p in pooled), "nothing is left of what was not published"
        assert not list(
            verify(str(site.target), DirectoryPublisher(str(site.target)).published().values(), quick=False)
        )
    note = json.loads((site.target / ".metadata/status.json").read_text())
    assert {name.partition(":")[2][-1] for name in note["names"]} == set("bcd")
    assert [name[-1] for name in note["wishlists"]["ours"]["failing"]] == ["a"]


def read_late(job: LayerJob) -> bytes:
    """Reads a layer; one with a small tar only when the others have failed."""
    if job.layer.descriptor.size < 1000:
        time.sleep(0.7)
    return read_layer(job)


def test_what_is_still_read_for_an_image_that_is_too_large_is_no_more_kept_than_what_was(
    small_disk: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = random.Random(1)
    full = layer(*(file(f"full/{i}", noise.randbytes(1000)) for i in range(60)))
    late = layer(*(file(f"late/{i}", f"{i}".encode()) for i in range(10)))
    small_disk.fake.add("org/app", "a", image(full, late))
    monkeypatch.setattr(flatten, "read_layer", read_late)
    assert done(small_disk.run("HOST/org/app:a")) == {"org/app:a": "failed"}
    assert [p for p in (small_disk.target / ".unpacker/pool").rglob("*") if p.is_file()] == []


def test_a_full_disk_is_searched_for_what_can_go_once_and_not_for_each_image(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise NoRoom("no room")

    searches: list[int] = []
    for tag in "abc":
        site.fake.add("org/app", tag, single(tag))
    monkeypatch.setattr(posix, "check_room", refuse)
    monkeypatch.setattr(DirectoryPublisher, "reclaim", lambda publisher: searches.append(1))
    assert set(done(site.run("HOST/org/app:*")).values()) == {"failed"}
    assert len(searches) == 1


def test_a_single_image_too_large_for_the_disk_is_tried_once(small_disk: Site) -> None:
    small_disk.fake.add("org/app", "a", filling("a", 100_000))
    assert done(small_disk.run("HOST/org/app:a")) == {"org/app:a": "failed"}
    assert small_disk.fake.count("GET", "/blobs/") == 2, "its layer and its config"


# -- what a file system cannot hold -----------------------------------------------------------------------------


def test_times_beyond_those_of_any_file_system_are_moved_counted_and_verified(site: Site) -> None:
    old = (file("f", b"x", mtime=-5e9), symlink("l", "f", mtime=-6e9), directory("d", mtime=-7e9))
    site.fake.add("org/app", "1", image(layer(*old, file("far", b"x", mtime=9e9), file("1969", b"x", mtime=-1.5))))
    assert failures(site.run("HOST/org/app:1")) == {}
    (record,) = DirectoryPublisher(str(site.target)).published().values()
    assert isinstance(record, Published)
    assert record.altered["times"] == 3
    assert list(verify(str(site.target), [record], quick=False)) == []
    kept = dict.fromkeys("fld", EARLIEST) | {"far": 9 * 10**18, "1969": -1_500_000_000}
    assert {name: (site.root("org/app:1") / name).lstat().st_mtime_ns for name in kept} == kept


# -- a run that broke off between records and links -------------------------------------------------------------


@pytest.fixture
def half(site: Site, monkeypatch: pytest.MonkeyPatch) -> Site:
    """A site whose first run was stopped after it had placed the record of its image, before the link."""
    site.fake.add("org/app", "1", APP)
    site.fake.add("org/other", "1", single("other"))

    def stop(transaction: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(DirectoryTransaction, "_switch_links", stop)
        site.run("HOST/org/app:1")
    assert site.names() == set()
    assert (site.target / ".metadata" / site.fake.host / "org/app:1/record.json").exists()
    return site


def test_a_record_without_link_that_is_still_wished_gets_its_link_and_no_layer_is_read_again(half: Site) -> None:
    assert done(half.run("HOST/org/app:1")) == {"org/app:1": "published"}
    assert half.names() == {"org/app:1"}
    assert [r for r in half.requested() if "/blobs/" in r] == [f"GET org/app/blobs/{APP.image_id}"], "but the config"


def test_a_record_without_link_that_is_no_longer_wished_goes_with_the_next_run(half: Site) -> None:
    assert done(half.run("HOST/org/other:1")) == {"org/other:1": "published"}
    assert half.names() == {"org/other:1"}
    assert os.listdir(half.target / ".metadata" / half.fake.host / "org") == ["other:1"]
    assert os.listdir(half.target / ".unpacker/txn") == []


# -- what somebody else put into the target ---------------------------------------------------------------------


def test_a_directory_where_a_public_link_belongs_stops_only_that_image_and_says_what_to_do(user: User) -> None:
    user.fake.add("org/app", "1.0", APP)
    user.fake.add("org/app", "2.0", single("two"))
    user.wishlist("HOST/org/app:*")
    own = user.target / user.fake.host / "org/app:1.0"
    own.mkdir(parents=True)
    (own / "notes").write_text("mine")
    said = f"{own} is no symlink, so it is none of ours and stays as it is: move it away"
    plan = user("plan")
    assert plan.returncode == 1
    assert said in plan.stdout and "1 to publish" in plan.stdout and "1 not resolved" in plan.stdout
    run = user("reconcile", "--json")
    assert run.returncode == 1, run.stderr
    value = json.loads(run.stdout)
    assert [o["result"] for o in value["outcomes"]] == ["published"]
    assert [(u["kind"], said in u["error"]) for u in value["unresolved"]] == [("PublishError", True)]
    assert (own.parent / "app:2.0").is_symlink() and (own / "notes").read_text() == "mine"
    status = user("status", "wishlist.yaml")
    assert status.returncode == 1
    assert "1 published, 1 unreadable" in status.stdout and said in status.stdout
    own.rename(user.path / "mine")
    assert user("reconcile").returncode == 0
    assert "2 published" in user("status").stdout


def test_a_file_on_the_way_to_a_name_stops_only_what_is_below_it(site: Site) -> None:
    site.fake.add("org/app", "1", APP)
    site.fake.add("other/app", "1", single("other"))
    site.target.joinpath(site.fake.host).mkdir(parents=True)
    site.target.joinpath(site.fake.host, "org").write_text("mine")
    result = site.run("HOST/org/app:1", "HOST/other/app:1")
    assert done(result) == {"org/app:1": "failed", "other/app:1": "published"}
    assert f"{site.fake.host}/org stands where a directory belongs" in str(failures(result)["org/app:1"].error)


# -- what is remembered -----------------------------------------------------------------------------------------


def test_no_run_forgets_what_fails_for_another_wishlist(site: Site) -> None:
    site.fake.add("org/app", "1", APP)
    site.run("HOST/none/theirs:1", owner="theirs", clock=lambda: 1000.0)
    site.run("HOST/none/ours:1", owner="ours", clock=lambda: 2000.0)
    site.run("HOST/org/app:1", owner=None, removals=False, clock=lambda: 2500.0)
    site.run("HOST/none/theirs:1", owner="theirs", clock=lambda: 3000.0)
    known = journal.load(str(site.path / "state")).failures
    assert {k.partition("/")[2]: (f.since, f.times) for k, f in known.items()} == {
        "none/theirs:1": (1000, 2),
        "none/ours:1": (2000, 1),
    }


def test_a_wishlist_that_no_longer_runs_is_forgotten_after_a_month(site: Site) -> None:
    site.run("HOST/none/theirs:1", owner="theirs", clock=lambda: 1000.0)
    site.run("HOST/none/ours:1", owner="ours", clock=lambda: 1000.0 + 31 * 86_400)
    known = journal.load(str(site.path / "state")).failures
    assert [k.partition("/")[2] for k in known] == ["none/ours:1"]


def test_two_wishes_for_one_repository_are_remembered_together(site: Site) -> None:
    for tag in ("1.0", "2.0"):
        site.fake.add("org/app", tag, single(tag))
    wishes = "".join(f"- {{image: HOST/org/app, tags: ['{n}.*']}}\n" for n in (1, 2))
    site.run(text=f"version: 2\nimages:\n{wishes}")
    (known,) = journal.load(str(site.path / "state")).expansions.values()
    assert set(known) == {"1.0", "2.0"}


def test_a_journal_that_cannot_be_written_keeps_no_run_from_telling_what_it_did(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PublishError("the disk is full")

    site.fake.add("org/app", "1", APP)
    monkeypatch.setattr(journal, "store", refuse)
    result = site.run("HOST/org/app:1")
    assert done(result) == {"org/app:1": "published"}
    assert [str(trouble) for trouble in result.troubles] == ["the disk is full"]
    assert exit_code(result, sound=True) == PublishError.exit_code


def test_a_target_that_fails_before_the_removals_fails_these_and_all_is_told(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    for tag in "12":
        site.fake.add("org/app", tag, single(tag))
    site.run("HOST/org/app:*")
    published = DirectoryPublisher.published
    asked: list[int] = []

    def failing(publisher: DirectoryPublisher) -> object:
        asked.append(1)
        if len(asked) > 1:
            raise PublishError("the disk failed")
        return published(publisher)

    monkeypatch.setattr(DirectoryPublisher, "published", failing)
    result = site.run("HOST/org/app:1")
    assert done(result) == {"org/app:1": "kept", "org/app:2": "failed"}
    assert exit_code(result, sound=True) == PublishError.exit_code


def test_a_receipt_that_fails_as_nobody_foresaw_fails_nothing_else(site: Site) -> None:
    def attach(*_: object) -> None:
        raise ValueError("what no registry ever said")

    for tag in "12":
        site.fake.add("org/app", tag, single(tag))
    assert set(done(site.run("HOST/org/app:*", attach=attach)).values()) == {"published"}


def test_a_damaged_journal_that_cannot_be_set_aside_is_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "journal.json").write_text("[" * 100_000)

    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "replace", refuse)
    assert journal.load(str(tmp_path)) == journal.Journal()


def test_all_spellings_of_a_target_share_their_state(user: User) -> None:
    user.fake.add("org/app", "1.0", APP)
    user.wishlist("HOST/org/app:1.0")
    (user.path / "link").symlink_to("target")
    for spelling in ("target", f"{user.target}/", f"{user.path}/./target", "link"):
        assert user("reconcile", "--target", spelling).returncode == 0
    assert len(list((user.path / "state").iterdir())) == 1


# -- choices ----------------------------------------------------------------------------------------------------


def test_only_may_name_a_repository_of_a_registry_with_a_port(site: Site) -> None:
    site.fake.add("org/app", "1", APP)
    site.fake.add("org/other", "1", APP)
    result = site.run("HOST/org/app:1", "HOST/org/other:1", only=f"{site.fake.host}/org/app")
    assert done(result) == {"org/app:1": "published"}


def test_only_may_name_an_image_by_digest(site: Site) -> None:
    digest = site.fake.add("org/app", "1", APP)
    result = site.run(f"HOST/org/app@{digest}", only=f"{site.fake.host}/org/app:{digest}")
    assert done(result) == {f"org/app:{digest}": "published"}


def test_a_damaged_root_is_made_anew_though_another_tag_moved_to_its_image(site: Site) -> None:
    site.fake.add("org/app", "1", single("old"))
    site.fake.add("org/app", "2", APP)
    site.run("HOST/org/app:*")
    damaged = site.root("org/app:2").resolve()
    site.fake.add("org/app", "1", APP)
    path = f"{site.fake.host}/org/app:2"
    result = site.run("HOST/org/app:*", rebuild=True, damaged=frozenset({path}))
    assert done(result) == {"org/app:1": "updated", "org/app:2": "updated"}
    assert site.root("org/app:2").resolve() != damaged
    assert site.root("org/app:1").resolve() == site.root("org/app:2").resolve()


@pytest.mark.parametrize("new", ["0", "2"])
def test_what_is_published_beside_a_damaged_root_gets_none_of_its_damage(site: Site, new: str) -> None:
    shared = layer(file("shared", b"whole"))
    site.fake.add("org/app", "1", image(shared, layer(file("own", b"1"))))
    site.run("HOST/org/app:1")
    content = site.root("org/app:1") / "shared"
    before = content.stat()
    content.write_bytes(b"wrong")
    os.utime(content, ns=(before.st_atime_ns, before.st_mtime_ns))
    site.fake.add("org/app", new, image(shared, layer(file("own", b"2"))))
    path = f"{site.fake.host}/org/app:1"
    result = site.run("HOST/org/app:*", rebuild=True, damaged=frozenset({path}))
    assert done(result) == {"org/app:1": "updated", f"org/app:{new}": "published"}
    assert [(site.root(f"org/app:{tag}") / "shared").read_bytes() for tag in ("1", new)] == [b"whole"] * 2


def test_two_spellings_of_one_platform_are_one_wish(site: Site) -> None:
    site.fake.add("org/app", "1.0", image(layer(file("a", b"arm")), architecture="arm64", variant="v8"))
    wishes = "- {image: 'HOST/org/app:1.*', platform: linux/arm64}\n"
    wishes += "- {image: 'HOST/org/app:*.0', platform: linux/arm64/v8}\n"
    plan = survey(site.request(text=f"version: 2\nimages:\n{wishes}")).plan
    assert not plan.unresolved
    assert [a.public_path.partition("/")[2] for a in plan.changes] == ["org/app:1.0"]


# -- merge requests ---------------------------------------------------------------------------------------------


def propose_from(site: Site, old: str, new: str, limits: Limits | None = None) -> dict[str, str]:
    def wishes(text: str) -> tuple[object, ...]:
        written = f"version: 2\nimages:\n- {text}\n".replace("HOST", f"http://{site.fake.host}")
        return parse(written.encode(), "w").wishes

    registry = Access(backoff=0.01, attempts=1, timeout=5).open()
    with ThreadPoolExecutor(2) as executor:
        found = propose(wishes(new), wishes(old), registry, executor, limits or Limits())  # type: ignore[arg-type]
    return {p.name.partition("/")[2]: p.error or p.change for p in found.proposals}


def test_what_a_list_that_failed_may_still_hold_is_not_shown_as_dropped(site: Site) -> None:
    site.fake.add("org/app", "1.0", APP)
    site.fake.fault(status=500, times=100, path="tags/list")
    found = propose_from(site, "HOST/org/app:1.0", "HOST/org/app:1.*")
    assert set(found) == {"org/app"}


def test_a_name_that_cannot_be_looked_up_is_not_shown_as_dropped(site: Site) -> None:
    digest = site.fake.add("org/app", "1.0", APP)
    site.fake.fault(status=500, times=100, path="manifests/")
    one, several = f"image: HOST/org/app@{digest}", "image: HOST/org/app:1.0, platforms: [linux/amd64, linux/arm64]"
    assert set(propose_from(site, f"{{{one}}}", f"{{{one}, gpu: true}}")) == {f"org/app@{digest}"}
    assert set(propose_from(site, f"{{{several}}}", f"{{{several}, gpu: true}}")) == {"org/app:1.0"}


def test_what_nobody_foresaw_of_one_image_leaves_the_others_of_a_merge_request(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise KeyError("config")

    site.fake.add("org/app", "1.0", APP)
    monkeypatch.setattr(proposal, "manifest_of", refuse)
    assert "unforeseen KeyError" in propose_from(site, "HOST/org/none:1", "HOST/org/app:1.0")["org/app:1.0"]


def test_an_image_beyond_the_operators_limits_is_shown_as_refused(site: Site) -> None:
    site.fake.add("org/app", "1.0", APP)
    found = propose_from(site, "HOST/org/none:1", "HOST/org/app:1.0", Limits(image_compressed=1))
    assert "more than" in found["org/app:1.0"]


def test_a_fault_of_the_wishlist_cannot_become_markup_of_the_report(user: User) -> None:
    user.wishlist(name="old.yaml")
    user.wishlist("'<img src=x>@all'")
    user("plan", "--against", "old.yaml", "--report", "report.md")
    text = (user.path / "report.md").read_text()
    assert "wishlist.yaml:3:3" in text
    assert "<" not in text
    assert "@all" not in text


# -- streams ----------------------------------------------------------------------------------------------------


def test_a_name_that_is_no_utf8_can_be_printed(user: User) -> None:
    name = os.fsdecode(b"w\xff.yaml")
    user.wishlist(name=name)
    run = user("validate", name, PYTHONIOENCODING="utf-8")
    assert run.returncode == 0, run.stderr
    assert "w\\udcff.yaml: 0 wishes" in run.stdout


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_ends_no_run(user: User, closed: str) -> None:
    user.fake.add("org/app", "1.0", APP)
    user.wishlist("HOST/org/app:1.0", "alpine:3")
    run = subprocess.run(
        ["sh", "-c", f"exec {sys.executable} -m unpacker reconcile {closed}"],
        cwd=user.path,
        env=user.environment(),
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 1, run.stderr
    assert b"no registry host" not in run.stdout
    assert (user.target / user.fake.host / "org/app:1.0").is_symlink()

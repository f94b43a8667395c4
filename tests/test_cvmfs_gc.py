"""Garbage collection: what no kept revision reaches goes, what anybody may still read stays, killed anywhere or not."""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cvmfs_breaking import (
    at,
    chunked,
    database,
    directory,
    file,
    log_of,
    one_of_everything,
    path_key,
    publish_tree,
    rebuild,
    sign,
    sql,
)
from tests.cvmfs_repositories import NAME, NOW, SWISSKNIFE, open_again, served
from tests.cvmfs_tools import collected, judged, needs_collector, scrubbed
from tests.kill_switch import die_at
from unpacker.cvmfs import deflation, objects, reflog
from unpacker.cvmfs.check import check
from unpacker.cvmfs.check_tree import check_tree
from unpacker.cvmfs.gc import Collected, collect, judge
from unpacker.cvmfs.hash import ContentHash
from unpacker.cvmfs.reflog import Kind, Ref
from unpacker.cvmfs.repository import Repository
from unpacker.cvmfs.spool import Spool
from unpacker.errors import Busy, PublishError
from unpacker.tree import Node

HOUR = 3600
DAY = 24 * HOUR
SOON = 10 * 365 * DAY
"""A grace period that nothing here outlives."""


pytestmark = pytest.mark.usefixtures("no_sync")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    repository = one_of_everything(str(tmp_path_factory.mktemp("made") / "repository"))
    gc(repository, keep=SOON, grace=0, now=time.time() + DAY)  # What making it left behind.
    return repository


@pytest.fixture
def repository(made: Repository, tmp_path: Path) -> Repository:
    """Revision 2, tagged `named`, and an untagged revision 3 in which `/d/whole` is another file; now is past both."""
    copied = copy(made, tmp_path / "repository")
    publish_tree(copied, {"/d/whole": file(copied, b"third")}, NOW + 300)
    return copied


def copy(repository: Repository, to: Path) -> Repository:
    shutil.copytree(repository.directory, to)
    shutil.copytree(f"{repository.directory}.keys", f"{to}.keys", dirs_exist_ok=True)
    return Repository(str(to), NAME, compression="dense", algorithm="sha1", key=repository.key, spool=None)


def update(repository: Repository, number: int) -> None:
    """One more revision, with a file that no other one has."""
    publish_tree(repository, {"/d/whole": file(repository, b"update %d" % number)}, NOW + 1000 + number)


def gc(
    repository: Repository, *, keep: float = 0, grace: float = SOON, now: float = NOW + DAY, dry_run: bool = False
) -> Collected:
    return collect(repository, keep=keep, grace=grace, now=now, dry_run=dry_run)


def problems(repository: Repository) -> list[str]:
    found = check(repository.directory, now=NOW + DAY, hashes=True, spool_root="/nowhere", configuration="/nowhere")
    return [str(problem) for problem in found]


def assert_sound(repository: Repository) -> None:
    """Published and tagged revisions are whole, by our checker and by the official one."""
    assert problems(repository) == []
    for tag in repository.history(repository.manifest()).tags():
        assert list(check_tree(repository.objects, tag.root, tag.root_size, revision=tag.revision)) == []
    if SWISSKNIFE is not None:
        for verdict in (judged(repository.directory), scrubbed(repository.directory)):
            assert verdict.is_sound, verdict.said


def stored(repository: Repository) -> set[str]:
    return {f"{path.parent.name}/{path.name}" for path in Path(repository.directory, "data").glob("??/*")}


def size(repository: Repository) -> int:
    return sum(path.stat().st_size for path in Path(repository.directory).rglob("*") if path.is_file())


def everything(repository: Repository) -> dict[Path, tuple[int, int]]:
    found = Path(repository.directory).rglob("*")
    return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in found}


# What goes -----------------------------------------------------------------------------------------------------------


def test_after_a_hundred_updates_the_size_is_that_of_a_fresh_repository(tmp_path: Path) -> None:
    rng = random.Random(1)
    contents = {f"f{number}": rng.randbytes(4096) for number in range(200)}
    updated = open_again(Repository.create(str(tmp_path / "updated"), NAME, days=3650, now=NOW))
    publish_tree(updated, {"/nested": directory(**files(updated, contents))}, NOW)
    for number in range(100):
        name = f"f{number % 7}"
        contents[name] = rng.randbytes(4096)
        publish_tree(updated, {f"/nested/{name}": file(updated, contents[name])}, NOW + number)
    fresh = open_again(Repository.create(str(tmp_path / "fresh"), NAME, days=3650, now=NOW))
    publish_tree(fresh, {"/nested": directory(**files(fresh, contents))}, NOW)
    before = size(updated)
    assert before > 1.5 * size(fresh)
    done = gc(updated)
    assert done.revisions == 100
    assert size(fresh) < size(updated) < 1.05 * size(fresh)
    assert done.freed >= before - size(updated) > 0
    assert_sound(updated)


def files(repository: Repository, contents: dict[str, bytes]) -> dict[str, Node]:
    return {name: file(repository, data) for name, data in contents.items()}


def test_only_what_a_condemned_revision_alone_reaches_is_deleted(repository: Repository) -> None:
    update(repository, 1)
    update(repository, 2)
    third = deflation.dense(b"third")
    assert repository.objects.has(ContentHash.of(third))
    before = stored(repository)
    done = gc(repository)
    gone = before - stored(repository)
    # Revisions 1 and 3: 2 is tagged, 4 is trunk-previous, 5 is trunk.
    assert (done.revisions, done.objects) == (2, len(gone))
    assert not repository.objects.has(ContentHash.of(third))
    assert repository.objects.has(ContentHash.of(deflation.dense(b"whole"))), "the tagged revision has it"
    assert repository.objects.has(ContentHash.of(deflation.dense(b"update 1"))), "trunk-previous has it"
    # Two root catalogs, a file, and the histories of revisions 1 to 4.
    assert sorted(name[-1] if name[-1].isupper() else "" for name in gone) == ["", "C", "C", "H", "H", "H", "H"]
    assert_sound(repository)


def test_a_revision_whose_tag_is_gone_is_condemned_like_any_other(repository: Repository) -> None:
    update(repository, 1)
    publish_tree(repository, {"/d/whole": file(repository, b"last")}, NOW + 2000, untag=["named"])
    assert gc(repository).revisions == 3
    assert not repository.objects.has(ContentHash.of(deflation.dense(b"whole")))
    assert_sound(repository)


def test_all_chunks_and_nested_catalogs_of_a_removed_tree_go(repository: Repository) -> None:
    publish_tree(repository, {"/big": directory(f=chunked(repository, b"one", b"two"))}, NOW + 400)
    publish_tree(repository, {"/big": None, "/nested": None}, NOW + 500, untag=["named"])
    update(repository, 1)
    update(repository, 2)
    gc(repository, grace=0, now=time.time() + DAY)
    kinds = [name[-1] for name in stored(repository) if name[-1].isupper()]
    # The chunks that are left are those of /d/chunked; one root catalog each of trunk and trunk-previous.
    assert sorted(kinds) == ["C", "C", "H", "M", "P", "P", "X"]
    assert_sound(repository)


def test_a_second_collection_finds_nothing(repository: Repository) -> None:
    update(repository, 1)
    update(repository, 2)
    gc(repository)
    before = everything(repository).keys()
    assert gc(repository) == Collected(revisions=0, objects=0, freed=0)
    assert everything(repository).keys() == before


def test_what_is_collected_can_be_published_again(repository: Repository) -> None:
    update(repository, 1)
    update(repository, 2)
    gc(repository)
    publish_tree(repository, {"/d/whole": file(repository, b"third")}, NOW + 3000)
    assert_sound(repository)


# What stays ----------------------------------------------------------------------------------------------------------


def refs(*times: int, kind: Kind = Kind.CATALOG) -> list[Ref]:
    return [Ref(ContentHash(bytes([number] * 20)), kind, when) for number, when in enumerate(times)]


def test_the_age_of_a_revision_runs_from_when_the_next_one_came() -> None:
    """Somebody who mounted a revision of last year reads it until there is another one, and a while longer."""
    log = refs(0, 1000, 1010, 2000)
    assert judge(log, {log[3].hash}, before=1010) == ([log[3], log[2]], [log[1], log[0]])
    assert judge(log, {log[3].hash}, before=1009) == ([log[3], log[2], log[1]], [log[0]])
    assert judge(log, {log[3].hash}, before=999)[1] == []


def test_what_was_listed_and_never_published_is_condemned_by_its_own_age() -> None:
    log = refs(0, 1000)
    assert judge(log, {log[0].hash}, before=1000) == ([log[0]], [log[1]])
    assert judge(log, {log[0].hash}, before=999)[1] == []


def test_each_kind_of_object_has_ages_of_its_own() -> None:
    (history,) = refs(500, kind=Kind.HISTORY)
    log = [*refs(0, 1000), history]
    kept, condemned = judge(log, {log[1].hash, history.hash}, before=600)
    assert condemned == [] and len(kept) == 3


def test_revisions_superseded_lately_are_kept(repository: Repository) -> None:
    update(repository, 1)
    update(repository, 2)
    # Revision 3 was followed at NOW + 1001, revision 1 at NOW + 100.
    assert gc(repository, keep=HOUR, now=NOW + 1000 + HOUR).revisions == 1
    assert repository.objects.has(ContentHash.of(deflation.dense(b"third")))
    assert gc(repository, keep=HOUR, now=NOW + 1001 + HOUR).revisions == 1
    assert not repository.objects.has(ContentHash.of(deflation.dense(b"third")))


def test_objects_of_an_ingest_that_has_not_published_are_protected(repository: Repository) -> None:
    young = repository.objects.put(deflation.dense(b"just ingested"))
    catalog = repository.objects.put(deflation.dense(b"just composed"), objects.CATALOG)
    gc(repository, grace=HOUR, now=time.time())
    assert repository.objects.has(young) and repository.objects.has(catalog, objects.CATALOG)
    done = gc(repository, grace=HOUR, now=time.time() + 2 * HOUR)
    assert not repository.objects.has(young) and not repository.objects.has(catalog, objects.CATALOG)
    assert done.objects == 2
    assert_sound(repository)


def test_what_came_by_a_rename_is_as_young_as_the_rename(repository: Repository) -> None:
    """Files may keep old times in a copy, and the first of a batch waits long for its name."""
    young = repository.objects.put(deflation.dense(b"just ingested"))
    os.utime(repository.objects.path(young), (1, 1))
    gc(repository, grace=HOUR, now=time.time())
    assert repository.objects.has(young)


def test_a_file_with_the_bytes_of_a_catalog_hides_nothing_below_that_catalog(repository: Repository) -> None:
    db = database(repository.objects.read(repository.manifest().root, objects.CATALOG))
    (text,) = db.execute("SELECT sha1 FROM nested_catalogs").fetchone()
    name = ContentHash.parse(text)
    same = file(repository, repository.objects.read(name, objects.CATALOG))
    assert same.token == f"z:{text}"
    publish_tree(repository, {"/d/whole": same}, NOW + 400, untag=["named"])
    update(repository, 1)
    gc(repository, grace=0, now=time.time() + DAY)
    assert_sound(repository)


def test_a_snapshot_that_the_official_tools_bound_is_kept(repository: Repository) -> None:
    bound = repository.manifest()
    first, second = path_key("/snapshot")
    row = (
        f"INSERT INTO catalog SELECT {first}, {second}, {path_key('')[0]}, {path_key('')[1]}, 2, NULL, 4096, mode,"
        f" mtime, mtimens, {0x4001}, 'snapshot', '', uid, gid, NULL FROM catalog WHERE {at('')}"
    )
    reference = f"INSERT INTO bind_mountpoints VALUES ('/snapshot', '{bound.root}', {bound.root_size})"
    update(repository, 1)
    links = f"UPDATE catalog SET hardlinks = hardlinks + 1 WHERE {at('')}"
    rebuild(repository, {"": sql(row, reference, links)})
    update(repository, 2)
    update(repository, 3)
    gc(repository, grace=0, now=time.time() + DAY)
    assert list(check_tree(repository.objects, bound.root, bound.root_size)) == []
    assert_sound(repository)


# What it leaves in order ---------------------------------------------------------------------------------------------


def test_the_reference_log_lists_what_is_left_and_all_checksums_fit(repository: Repository, tmp_path: Path) -> None:
    update(repository, 1)
    update(repository, 2)
    spool = tmp_path / "spool"
    spool.mkdir()
    (spool / "reflog.chksum").write_text(log_of(repository).checksum("sha1").hex)
    repository.spool = Spool(str(spool))
    gc(repository)
    found = repository.manifest()
    roots = {tag.root for tag in repository.history(found).tags()}
    assert {ref.hash for ref in log_of(repository).refs()} == {
        *roots,
        found.history,
        found.certificate,
        found.meta_info,
    }
    assert found.reflog == repository.spool.checksum() == log_of(repository).checksum("sha1")
    assert (found.revision, found.published) == (5, NOW + 1002), "clients see no other revision"
    assert os.listdir(spool) == ["reflog.chksum"]


def test_a_dry_run_tells_the_same_and_writes_nothing(repository: Repository) -> None:
    update(repository, 1)
    update(repository, 2)
    before = everything(repository)
    told = gc(repository, dry_run=True)
    assert everything(repository) == before
    assert told == gc(repository) and told.objects > 0 and told.freed > 0


def test_a_dry_run_needs_no_keys(repository: Repository) -> None:
    assert gc(Repository.open(repository.directory), dry_run=True).revisions == 1


# What it refuses -----------------------------------------------------------------------------------------------------


def assert_nothing_done(repository: Repository, match: str) -> None:
    before, log = stored(repository), log_of(repository).data
    with pytest.raises(PublishError, match=match):
        gc(repository, grace=0, now=time.time() + DAY)
    assert (stored(repository), log_of(repository).data) == (before, log)


def test_a_kept_catalog_that_is_missing_stops_it_before_anything_is_deleted(repository: Repository) -> None:
    update(repository, 1)
    db = database(repository.objects.read(repository.manifest().root, objects.CATALOG))
    (text,) = db.execute("SELECT sha1 FROM nested_catalogs").fetchone()
    os.unlink(repository.objects.path(ContentHash.parse(text), objects.CATALOG))
    assert_nothing_done(repository, "what is in use cannot be told, so nothing is deleted: .* lacks object")


def test_a_damaged_catalog_of_a_tag_stops_it_too(repository: Repository) -> None:
    update(repository, 1)
    named = repository.history(repository.manifest()).tag("named")
    assert named is not None
    Path(repository.objects.path(named.root, objects.CATALOG)).write_bytes(b"x")
    assert_nothing_done(repository, "what is in use cannot be told, so nothing is deleted: .* is damaged")


def test_a_malformed_content_hash_in_use_stops_it(repository: Repository) -> None:
    rebuild(repository, {"": sql(f"UPDATE catalog SET hash = X'ab' WHERE {at('/d/whole')}")})
    assert_nothing_done(repository, "a malformed content hash")


def test_a_catalog_of_a_newer_schema_stops_it(repository: Repository) -> None:
    """It may refer to objects in a way that this version does not know."""
    rebuild(repository, {"/nested": sql("UPDATE properties SET value = '8' WHERE key = 'schema_revision'")})
    assert_nothing_done(repository, "schema revision 8.* upgrade unpacker")


def test_a_store_that_cannot_be_listed_stops_it(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    update(repository, 1)
    scandir = os.scandir

    def failing(path: str) -> object:
        if path == f"{repository.directory}/data/e8":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)
    assert_nothing_done(repository, "listing .*/data/e8")


def test_a_condemned_catalog_that_cannot_be_read_stops_nothing(repository: Repository) -> None:
    lost = repository.manifest().root
    update(repository, 1)
    update(repository, 2)
    Path(repository.objects.path(lost, objects.CATALOG)).write_bytes(b"x")
    assert gc(repository).revisions == 2
    assert not repository.objects.has(lost, objects.CATALOG)
    third = ContentHash.of(deflation.dense(b"third"))
    assert repository.objects.has(third), "nobody can tell whose it is, so it waits for the grace period"
    gc(repository, grace=HOUR, now=time.time() + DAY)
    assert not repository.objects.has(third)
    assert_sound(repository)


def test_a_repository_that_forbids_it_is_left_alone(repository: Repository) -> None:
    update(repository, 1)
    sign(repository, collectable=False)
    assert_nothing_done(repository, "forbids garbage collection")


def test_nobody_collects_while_somebody_publishes(repository: Repository) -> None:
    with open_again(repository).lock(), pytest.raises(Busy):
        gc(repository)


# Killed anywhere -----------------------------------------------------------------------------------------------------


def killed_at_every_point(repository: Repository, tmp_path: Path) -> Iterator[Repository]:
    """Copies in which a collection died at one point after the other; the last is one in which it did not."""
    point, status = 0, -1
    while status:
        point += 1
        copied = copy(repository, tmp_path / f"killed.{point}")
        child = os.fork()
        if child == 0:
            die_at(point)
            gc(copied)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        assert status == 0 or os.WIFSIGNALED(status)
        yield copied
        shutil.rmtree(copied.directory)


def test_killed_anywhere_it_leaves_garbage_but_never_a_dangling_reference(
    repository: Repository, tmp_path: Path
) -> None:
    third = repository.manifest().root
    update(repository, 1)
    update(repository, 2)
    done = copy(repository, tmp_path / "done")
    gc(done)
    states = set()
    for killed in killed_at_every_point(repository, tmp_path):
        found = problems(killed)
        # Between the reference log and the manifest, which the next transaction mends.
        assert all(problem.startswith(f"{reflog.FILE}: its hash is not") for problem in found), found
        listed = [ref.hash for ref in log_of(killed).refs() if ref.kind is Kind.CATALOG]
        # Replicas take a catalog that is there for proof that all below it is, whether it is listed or not.
        there = [third] if killed.objects.has(third, objects.CATALOG) else []
        for root in (*listed, *there):
            assert list(check_tree(killed.objects, root, 0)) == []
        states.add((len(listed), len(stored(killed))))
        gc(killed, grace=HOUR, now=time.time() + DAY)
        assert stored(killed) == stored(done)
        assert problems(killed) == []
    assert len(states) > 8


# Beside the official tools -------------------------------------------------------------------------------------------


@needs_collector
def test_theirs_and_ours_collect_after_each_other(repository: Repository, tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    spool.mkdir()
    repository.spool = Spool(str(spool))
    repository.spool.write_checksum(log_of(repository).checksum("sha1"))

    def theirs() -> str:
        with served(tmp_path) as url:
            verdict = collected(
                repository.directory,
                f"{url}/repository",
                NAME,
                f"{repository.directory}.keys",
                str(spool / "reflog.chksum"),
                str(tmp_path),
                younger=NOW + 10 * DAY,
            )
        assert verdict.is_sound, verdict.said
        checked = judged(repository.directory, "-R", str(spool / "reflog.chksum"))
        assert checked.is_sound, checked.said
        return verdict.said

    update(repository, 1)
    update(repository, 2)
    ours = stored(repository)
    gc(repository)
    left = stored(repository)
    assert left < ours
    assert "weep: " not in theirs(), "ours condemned the same revisions and histories"
    assert stored(repository) == left
    update(repository, 3)
    update(repository, 4)
    assert theirs().count("Sweeping Revision") == 2
    left = stored(repository)
    update(repository, 5)
    gc(repository)
    assert left - stored(repository), "what they kept is condemned by the next publish"
    assert_sound(repository)

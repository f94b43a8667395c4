"""Repositories that somebody made to mislead the checker and the collector: each ends in words, never in a crash."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
from pathlib import Path

import pytest

from tests.cvmfs_breaking import at, database, insert, one_of_everything, path_key, rebuild, sign, sql
from tests.cvmfs_repositories import NAME, NOW
from unpacker.cvmfs import deflation, objects
from unpacker.cvmfs.check import check
from unpacker.cvmfs.gc import collect
from unpacker.cvmfs.repository import Repository
from unpacker.errors import PublishError
from unpacker.publish import posix


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    return one_of_everything(str(tmp_path_factory.mktemp("made") / "repository"))


@pytest.fixture
def repository(made: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repository:
    monkeypatch.setattr(posix, "syncfs", lambda fd: None)
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    shutil.copytree(made.directory, tmp_path / "repository")
    directory = str(tmp_path / "repository")
    return Repository(directory, NAME, compression="dense", algorithm="sha1", key=made.key, spool=None)


def problems(repository: Repository) -> list[str]:
    found = check(repository.directory, now=NOW + 1000, spool_root="/nowhere", configuration="/nowhere")
    return [str(problem) for problem in found]


def test_damage_anywhere_in_a_catalog_is_told_in_words(repository: Repository) -> None:
    """Bytes of a catalog changed at random, hashed and signed again: only SQLite's own slack may go unnoticed."""
    whole = repository.objects.read(repository.manifest().root, objects.CATALOG)
    rng = random.Random(3)
    noticed = 0
    for _ in range(100):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 3, 30))):
            data[rng.randrange(len(data))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        root = repository.objects.put(deflation.dense(bytes(data)), objects.CATALOG)
        sign(repository, root=root)
        noticed += bool(problems(repository))
        try:
            collect(repository, keep=0, grace=0, now=NOW + 86400, dry_run=True)
        except PublishError:
            pass
    assert noticed > 20


@pytest.mark.parametrize("mode", [-1, 1 << 40, 0])
def test_modes_that_no_file_has_are_a_problem(repository: Repository, mode: int) -> None:
    rebuild(repository, {"": sql(f"UPDATE catalog SET mode = {mode} WHERE {at('/d/whole')} OR {at('/d/fifo')}")})
    assert [problem.partition(": ")[0] for problem in problems(repository)] == ["/d/fifo", "/d/whole"]


def test_a_value_of_another_type_is_a_problem(repository: Repository) -> None:
    rebuild(repository, {"": sql(f"UPDATE catalog SET size = 'x' WHERE {at('/d/whole')}")}, recount=False)
    (found,) = problems(repository)
    assert "a malformed row" in found


def test_a_trigger_is_never_run(repository: Repository) -> None:
    trigger = "CREATE TRIGGER t AFTER UPDATE ON statistics BEGIN DELETE FROM catalog; END"
    rebuild(repository, {"/nested/deep": lambda db: db.execute(trigger)})
    (found,) = problems(repository)
    assert found.startswith("/nested/deep: ") and "triggers" in found
    with pytest.raises(PublishError, match="nothing is deleted"):
        collect(repository, keep=0, grace=0, now=NOW + 86400, dry_run=True)


def test_catalogs_that_multiply_are_not_followed(repository: Repository) -> None:
    """A catalog that is mounted at many places would be read once for each, and those below it again."""

    def multiply(db: sqlite3.Connection) -> None:
        (text, size) = db.execute("SELECT sha1, size FROM nested_catalogs").fetchone()
        for number in range(50):
            row = insert(f"/d/inner/m{number}", hash="NULL", size=4096, mode=0o40755, flags=3, hardlinks=2)
            db.execute(row)
            db.execute("INSERT INTO nested_catalogs VALUES (?, ?, ?)", (f"/d/inner/m{number}", text, size))
        db.execute(f"UPDATE catalog SET hardlinks = 53 WHERE {at('/d/inner')}")

    rebuild(repository, {"": multiply})
    found = problems(repository)
    assert len(found) == 50
    assert all("its catalog is one for '/nested'" in problem for problem in found)


def test_a_row_that_is_its_own_parent_ends(repository: Repository) -> None:
    first, second = path_key("/d/inner")
    rebuild(repository, {"": sql(f"UPDATE catalog SET parent_1 = {first}, parent_2 = {second} WHERE {at('/d/inner')}")})
    assert any("dangling rows" in problem for problem in problems(repository))
    rebuild(repository, {"": sql("UPDATE catalog SET parent_1 = md5path_1, parent_2 = md5path_2 WHERE name = ''")})
    assert any("is none for a file" in problem for problem in problems(repository))


@pytest.mark.parametrize("name", ["..", ".", "a/b", "whole/../../x"])
def test_names_that_lead_elsewhere_are_a_problem(repository: Repository, name: str) -> None:
    rebuild(repository, {"": sql(f"UPDATE catalog SET name = '{name}' WHERE {at('/d/inner')}")})
    assert any(f"/d: the name {name!a} in it is none for a file" == problem for problem in problems(repository))


def test_a_reference_log_of_anything_is_a_problem(repository: Repository) -> None:
    Path(repository.directory, ".cvmfsreflog").write_bytes(b"\0" * 5000)
    assert any(problem.startswith(".cvmfsreflog: ") for problem in problems(repository))


def test_links_out_of_the_store_are_never_deleted_nor_followed(repository: Repository, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (outside / "data").mkdir(parents=True)
    victim = outside / "data" / ("a" * 38)
    victim.write_bytes(b"x")
    data = Path(repository.directory, "data")
    (data / "aa").symlink_to(outside / "data")
    (data / "e8" / ("b" * 38)).symlink_to(victim)
    collect(repository, keep=0, grace=0, now=NOW * 2, dry_run=False)
    assert victim.exists() and (data / "e8" / ("b" * 38)).is_symlink()


def test_a_catalog_with_rows_that_name_no_row_is_one_problem(repository: Repository) -> None:
    db = database(repository.objects.read(repository.manifest().root, objects.CATALOG))
    db.execute("DELETE FROM catalog")
    root = repository.store(db.serialize(), objects.CATALOG)
    sign(repository, root=root)
    assert problems(repository) == ["/: its catalog lacks the row of its own root"]

"""One repository for each thing that can be wrong with one: ours finds it, and the official checker where it looks."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.cvmfs_breaking import (
    at,
    database,
    insert,
    log_of,
    one_of_everything,
    rebuild,
    sign,
    sql,
    write_log,
)
from tests.cvmfs_repositories import NAME, NOW, needs_swissknife, served
from tests.cvmfs_tools import judged, scrubbed
from unpacker.cvmfs import deflation, keys, manifest, objects, reflog, whitelist
from unpacker.cvmfs.check import check
from unpacker.cvmfs.check_tree import Problem
from unpacker.cvmfs.hash import ContentHash
from unpacker.cvmfs.keys import Certificate, MasterKey, PublicKey
from unpacker.cvmfs.reflog import Reflog
from unpacker.cvmfs.repository import Repository
from unpacker.cvmfs.scrub import scrub
from unpacker.errors import PublishError
from unpacker.publish import posix

LATER = NOW + 1000
DAY = 86400


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    directory = str(tmp_path_factory.mktemp("made") / "repository")
    return one_of_everything(directory)


@pytest.fixture
def repository(made: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repository:
    """A sound repository that a test may break, with its keys beside it."""
    monkeypatch.setattr(posix, "syncfs", lambda fd: None)
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    return copied(made, str(tmp_path / "repository"))


def copied(repository: Repository, to: str) -> Repository:
    shutil.copytree(repository.directory, to)
    shutil.copytree(f"{repository.directory}.keys", f"{to}.keys")
    # Loading the keys again and again would take most of the time.
    return Repository(to, NAME, compression="dense", algorithm="sha1", key=repository.key, spool=None)


def problems(repository: Repository, *, now: float = LATER, hashes: bool = False, verify: bool = True) -> list[Problem]:
    public = PublicKey.open(f"{repository.directory}.keys", NAME) if verify else None
    return list(
        check(
            repository.directory,
            now=now,
            hashes=hashes,
            public_key=public,
            spool_root="/nowhere",
            configuration="/nowhere",
        )
    )


class Case(NamedTuple):
    """How to break a repository, where and with what words ours has to find it, and whether the official checker does.

    The official checker reads a directory without looking at signatures, so that all about trust is ours alone.
    """

    broken: Callable[[Repository], object]
    where: str
    words: str
    official: bool = True
    others: int = 0
    """Further problems that follow from this one."""


def rows(path: str, *statements: str, recount: bool = True) -> Callable[[Repository], object]:
    """Changes rows in the catalog mounted at a path."""
    return lambda repository: rebuild(repository, {path: sql(*statements)}, recount=recount)


def changed(path: str, assignment: str, catalog: str = "") -> Callable[[Repository], object]:
    """Changes the row of one path."""
    return rows(catalog, f"UPDATE catalog SET {assignment} WHERE {at(path)}")


def remove(repository: Repository, name: ContentHash | None, suffix: str) -> None:
    assert name is not None
    os.unlink(repository.objects.path(name, suffix))


def remove_row_object(path: str, suffix: str = "") -> Callable[[Repository], object]:
    """Removes the object of a file in the root catalog, or its first chunk."""

    def run(repository: Repository) -> None:
        db = database(repository.objects.read(repository.manifest().root, objects.CATALOG))
        table = "chunks" if suffix else "catalog"
        (digest,) = db.execute(f"SELECT hash FROM {table} WHERE {at(path)}").fetchone()
        remove(repository, ContentHash(digest), suffix)

    return run


def remove_nested(repository: Repository) -> None:
    db = database(repository.objects.read(repository.manifest().root, objects.CATALOG))
    (text,) = db.execute("SELECT sha1 FROM nested_catalogs").fetchone()
    remove(repository, ContentHash.parse(text), objects.CATALOG)


def unlist(field: str) -> Callable[[Repository], object]:
    """Takes what the manifest names out of the reference log."""
    return lambda r: write_log(r, log_of(r).without([getattr(r.manifest(), field)]))


def history(*statements: str) -> Callable[[Repository], object]:
    """Changes rows of the history."""

    def run(repository: Repository) -> None:
        named = repository.manifest().history
        assert named is not None
        db = database(repository.objects.read(named, objects.HISTORY))
        sql(*statements)(db)
        sign(repository, history=repository.store(db.serialize(), objects.HISTORY))

    return run


def write(name: str, data: bytes) -> Callable[[Repository], object]:
    return lambda repository: repository.write(name, data)


def cut_manifest(repository: Repository) -> None:
    path = Path(repository.directory, manifest.FILE)
    path.write_bytes(path.read_bytes()[:100])


def forge_manifest(repository: Repository) -> None:
    keys.create(f"{repository.directory}.others", NAME, now=NOW)
    forger = keys.RepositoryKey.open(f"{repository.directory}.others", NAME)
    repository.write(manifest.FILE, repository.manifest().sealed(forger))


def forge_whitelist(repository: Repository) -> None:
    keys.create(f"{repository.directory}.others", NAME, now=NOW)
    forger = MasterKey.open(f"{repository.directory}.others", NAME)
    repository.write(whitelist.FILE, repository.whitelist().sealed(forger, "sha1"))


def admit_another(repository: Repository) -> None:
    keys.create(f"{repository.directory}.others", NAME, now=NOW)
    other = Certificate.open(f"{repository.directory}.others", NAME)
    issue(repository, NAME, other)


def rename_whitelist(repository: Repository) -> None:
    issue(repository, "other.example.org", Certificate.open(f"{repository.directory}.keys", NAME))


def issue(repository: Repository, name: str, certificate: Certificate) -> None:
    letter = whitelist.issue(name, certificate, algorithm="sha1", days=3650, now=NOW)
    repository.write(whitelist.FILE, letter.sealed(MasterKey.open(f"{repository.directory}.keys", NAME), "sha1"))


def wrong_size_of_nested(repository: Repository) -> None:
    rebuild(repository, {"": sql("UPDATE nested_catalogs SET size = size + 1024 WHERE path = '/nested'")})


NESTED_MARKER = f"DELETE FROM catalog WHERE {at('/nested/.cvmfscatalog')}"
NOT_EMPTY = f"X'{'ab' * 20}'"

TRUST = (".cvmfspublished", ".cvmfswhitelist")
CASES = {
    # 1: manifest, certificate, whitelist, meta info
    "manifest cut short": Case(cut_manifest, ".cvmfspublished", "has no signature"),
    "manifest signed by another key": Case(
        forge_manifest, ".cvmfspublished", "not signed by the repository's key", False
    ),
    "certificate missing": Case(
        lambda r: remove(r, r.manifest().certificate, "X"), ".cvmfspublished", "lacks object", False
    ),
    "certificate not admitted": Case(admit_another, ".cvmfswhitelist", "does not admit the certificate", False),
    "whitelist missing": Case(
        lambda r: os.unlink(f"{r.directory}/.cvmfswhitelist"), ".cvmfswhitelist", "there is none", False
    ),
    "whitelist of another master key": Case(forge_whitelist, ".cvmfswhitelist", "not signed by the master key", False),
    "whitelist of another name": Case(rename_whitelist, ".cvmfswhitelist", "it is of 'other.example.org'", False),
    "meta info missing": Case(lambda r: remove(r, r.manifest().meta_info, "M"), "meta info", "lacks object"),
    "meta info not compressed": Case(
        lambda r: sign(r, meta_info=r.objects.put(b"{}", "M")), "meta info", "is no zlib stream"
    ),
    # Unpacked by the official checker, not parsed.
    "meta info not JSON": Case(lambda r: sign(r, meta_info=r.store(b"{", "M")), "meta info", "is not JSON", False),
    # 2: reference log
    "reference log changed": Case(
        lambda r: r.write(reflog.FILE, log_of(r).with_refs(log_of(r).refs()).data + b"\0"),
        ".cvmfsreflog",
        "its hash is not",
    ),
    "reference log without a checksum": Case(
        lambda r: sign(r, reflog=None), ".cvmfsreflog", "nothing says which hash it has to have"
    ),
    # Allowed by the official checker: repositories of old versions have none.
    "reference log missing": Case(
        lambda r: os.unlink(f"{r.directory}/.cvmfsreflog"), ".cvmfsreflog", "there is none", False
    ),
    "reference log of another repository": Case(
        lambda r: write_log(r, Reflog("other.example.org", Reflog.create("other.example.org").data)),
        ".cvmfsreflog",
        "is of the repository 'other.example.org'",
    ),
    "root catalog not listed": Case(unlist("root"), ".cvmfsreflog", "does not list the catalog"),
    "certificate not listed": Case(unlist("certificate"), ".cvmfsreflog", "does not list the certificate"),
    "history not listed": Case(unlist("history"), ".cvmfsreflog", "does not list the history"),
    "meta info not listed": Case(unlist("meta_info"), ".cvmfsreflog", "does not list the meta info"),
    # 3: history
    "history missing": Case(lambda r: remove(r, r.manifest().history, "H"), "history", "lacks object"),
    "history no database": Case(
        lambda r: sign(r, history=r.store(b"x" * 2048, "H")), "history", "is damaged or something else"
    ),
    "branch without a tag": Case(
        history("INSERT INTO branches VALUES ('b', '', 1)"), "history", "no tag is on the branch 'b'"
    ),
    # The official checker takes parents as they are.
    "branch without a parent": Case(
        history("INSERT INTO branches VALUES ('b', 'gone', 1)", "UPDATE tags SET branch = 'b' WHERE name = 'named'"),
        "history",
        "the branch 'b' has no valid parent",
        False,
    ),
    "tag on no branch": Case(
        history("UPDATE tags SET branch = 'gone' WHERE name = 'named'"), "history", "on the branch 'gone'"
    ),
    "tag older than its branch": Case(
        history("INSERT INTO branches VALUES ('b', '', 9)", "UPDATE tags SET branch = 'b' WHERE name = 'named'"),
        "history",
        "the tag 'named' is older than its branch 'b'",
    ),
    # The official checker looks at the tree of a tag only when asked for that tag.
    "tag on a lost revision": Case(
        history(f"UPDATE tags SET hash = '{'ab' * 20}' WHERE name = 'named'"), "history", "root catalog abab", False
    ),
    # 4: alternative paths
    "alternative paths missing": Case(
        lambda r: sign(r, alternative_paths=True), ".cvmfsalt-", "the alternative path", others=1
    ),
    # 5: catalogs
    "root catalog missing": Case(lambda r: remove(r, r.manifest().root, "C"), "/", "lacks object", others=2),
    "root catalog of another size": Case(lambda r: sign(r, root_size=r.manifest().root_size + 1), "/", "bytes, where"),
    # The official checker compares no revisions; clients do, and stay where they are.
    "root catalog of another revision": Case(lambda r: sign(r, revision=7), "/", "the manifest of 7", False),
    "nested catalog missing": Case(remove_nested, "/nested", "lacks object"),
    "nested catalog of another size": Case(wrong_size_of_nested, "/nested", "bytes, where"),
    "nested catalog of another path": Case(
        rows("/nested", "UPDATE properties SET value = '/other' WHERE key = 'root_prefix'"),
        "/nested",
        "its catalog is one for '/other'",
    ),
    "no row of its own root": Case(
        rows("/nested", f"DELETE FROM catalog WHERE {at('/nested')}"), "/nested", "lacks the row of its own root"
    ),
    "root no directory": Case(
        rows("/nested", f"UPDATE catalog SET flags = 4, mode = 33188, hash = {NOT_EMPTY} WHERE {at('/nested')}"),
        "/nested",
        "the root of its catalog is no directory",
    ),
    "nested root without its flag": Case(changed("/nested", "flags = 1", "/nested"), "/nested", "has the flags 0x1"),
    "root with the flag of a nested one": Case(changed("", "flags = 33"), "/", "has the flags 0x21"),
    "mount point unlike the root": Case(
        changed("/nested", "mode = mode & ~2 & ~1"), "/nested", "and the mount point above it differ in mode"
    ),
    "mount point of another owner": Case(
        # Clients show the owner of one of the two rows; the official checker compares other columns only.
        changed("/nested", "uid = 7"),
        "/nested",
        "and the mount point above it differ in uid",
        False,
    ),
    # 6: names, markers
    "empty name": Case(changed("/d/whole", "name = ''"), "/d", "the name '' in it is none for a file"),
    "name that does not fit its key": Case(
        # The official checker lists names and never looks one up.
        changed("/d/whole", "name = 'other'"),
        "/d",
        "does not fit its path key",
        False,
    ),
    "nested catalog without a marker": Case(rows("/nested", NESTED_MARKER), "/nested", "without the marker"),
    "abandoned marker": Case(rows("", insert("/d/.cvmfscatalog")), "/d", "an abandoned marker"),
    "marker in the root of the repository": Case(
        # Only their publisher refuses it.
        rows("", insert("/.cvmfscatalog")),
        "/",
        "an abandoned marker",
        False,
    ),
    # 6: files
    "regular file without a hash": Case(changed("/d/whole", "hash = NULL"), "/d/whole", "without a content hash"),
    "object missing": Case(remove_row_object("/d/whole"), "/d/whole", "is missing"),
    "chunk missing": Case(remove_row_object("/d/chunked", "P"), "/d/chunked", "P is missing"),
    "hash of another length": Case(
        # Read as 20 bytes anyway, and by chance an object that is missing.
        changed("/d/whole", "hash = X'ab'"),
        "/d/whole",
        "a content hash has 20 bytes, not 1",
    ),
    "hash algorithm unknown": Case(changed("/d/whole", "flags = 4 | (5 << 8)"), "/d/whole", "no known hash algorithm"),
    # The official checker reads no object's contents.
    "compression unknown": Case(
        changed("/d/whole", "flags = 4 | (5 << 11)"), "/d/whole", "in a compression that nobody knows", False
    ),
    "link count 0": Case(changed("/d/whole", "hardlinks = 0"), "/d/whole", "its link count is 0"),
    "links without a group": Case(
        changed("/d/whole", "hardlinks = 2"),
        "/d/whole",
        "in no group of hard links",
    ),
    "hard links more than there are": Case(
        rows("", f"UPDATE catalog SET hardlinks = {1 << 32 | 3} WHERE name IN ('one', 'two')"),
        "/d",
        "another link count than the 2",
    ),
    "hard links of different sizes": Case(changed("/d/one", "size = 7"), "/d", "differ in size"),
    "hard links of different objects": Case(
        lambda r: changed("/d/one", f"hash = X'{r.objects.put(deflation.dense(b'LINKED')).hex}'")(r),
        "/d",
        "differ in hash",
    ),
    "hard links across directories": Case(
        # Counted per directory by both; that the two groups are one inode to a client is seen by ours only.
        rows(
            "",
            insert("/d/inner/one", hardlinks=1 << 32 | 1),
        ),
        "/d",
        "a group that another directory has",
        False,
    ),
    "mode of another type": Case(
        changed("/d/whole", "mode = 16877"),
        "/d/whole",
        "a regular file with the mode 0o40755",
    ),
    # The official checker looks at the flags of directories only.
    "file in a directory's flags": Case(
        changed("/d/whole", "flags = 4 | 2"), "/d/whole", "a file with flags of a directory", False
    ),
    "attributes malformed": Case(
        # Not looked at by them.
        changed("/d/whole", "xattr = X'0102'"),
        "/d/whole",
        "extended attributes",
        False,
    ),
    # 6: directories
    "directory with a wrong link count": Case(changed("/d/inner", "hardlinks = 2"), "/d/inner", "its link count is 2"),
    "root with a wrong link count": Case(changed("", "hardlinks = 9"), "/", "its link count is 9"),
    "directory in a group": Case(
        changed("/d/inner", f"hardlinks = {5 << 32 | 3}"), "/d/inner", "in a group of hard links"
    ),
    "directory with a hash": Case(changed("/d/inner", f"hash = {NOT_EMPTY}"), "/d/inner", "with a content hash"),
    "directory with direct input and output": Case(
        changed("/d/inner", "flags = 1 | 65536"), "/d/inner", "flags of a file"
    ),
    # The official checker looks at the targets of special files only.
    "directory with a target": Case(
        changed("/d/inner", "symlink = 'x'"), "/d/inner", "with the target of a symlink", False
    ),
    # The official checker looks at this flag in the roots of catalogs only.
    "flags that exclude each other": Case(
        changed("/d/inner", "flags = 1 | 32"), "/d/inner", "the flag of a catalog's root", False
    ),
    "names below a mount point": Case(rows("", insert("/nested/stray")), "/nested", "this one has names in it, too"),
    # 6: symlinks and special files
    "symlink with a hash": Case(changed("/d/link", f"hash = {NOT_EMPTY}"), "/d/link", "with a content hash"),
    # The official checker takes any size of a symlink, and any target.
    "symlink of another size": Case(changed("/d/link", "size = 7"), "/d/link", "not the length of its target", False),
    "symlink without a target": Case(
        changed("/d/link", "symlink = '', size = 0"), "/d/link", "without a target", False
    ),
    "symlink with direct input and output": Case(
        changed("/d/link", "flags = 12 | 65536"), "/d/link", "direct input and output"
    ),
    "fifo with a size": Case(changed("/d/fifo", "size = 1"), "/d/fifo", "a fifo or socket of size 1"),
    "device with a hash": Case(changed("/d/device", f"hash = {NOT_EMPTY}"), "/d/device", "with a content hash"),
    "device with a target": Case(changed("/d/device", "symlink = 'x'"), "/d/device", "target of a symlink"),
    # 6: chunks
    "chunks with a gap": Case(
        rows("", f"UPDATE chunks SET offset = 4 WHERE offset = 3 AND {at('/d/chunked')}"),
        "/d/chunked",
        "do not follow each other",
    ),
    "chunks that do not start at 0": Case(
        rows("", f"DELETE FROM chunks WHERE offset = 0 AND {at('/d/chunked')}"),
        "/d/chunked",
        "do not follow each other",
    ),
    "chunks shorter than the file": Case(changed("/d/chunked", "size = 9"), "/d/chunked", "5 bytes in sum, the file 9"),
    "chunked file without chunks": Case(
        rows("", f"DELETE FROM chunks WHERE {at('/d/chunked')}"), "/d/chunked", "without chunks"
    ),
    # 7: rows, references, counters
    "dangling row": Case(rows("", f"UPDATE catalog SET parent_1 = 1 WHERE {at('/d/whole')}"), "/", "dangling rows"),
    "directory lost": Case(rows("", f"DELETE FROM catalog WHERE {at('/d/inner/deeper')}"), "/d/inner", "link count"),
    "dangling chunks": Case(
        rows("", f"INSERT INTO chunks VALUES (1, 1, 0, 1, {NOT_EMPTY})"),
        "/",
        "dangling chunks",
    ),
    "nested catalog without a mount point": Case(
        changed("/nested", "flags = 1"), "/nested", "it is no mount point", others=1
    ),
    "nested catalog named for nothing": Case(
        rows("", f"INSERT INTO nested_catalogs VALUES ('/d/inner', '{'ab' * 20}', 1024)", recount=True),
        "/d/inner",
        "it is no mount point",
    ),
    "mount point without a catalog": Case(rows("", "DELETE FROM nested_catalogs"), "/nested", "that is not named"),
    **{
        f"counter {kind}_{name}": Case(
            rows("", f"UPDATE statistics SET value = value + 1 WHERE counter = '{kind}_{name}'", recount=False),
            "/",
            f"the counter {kind}_{name} is",
        )
        for kind in ("self", "subtree")
        for name in ("regular", "symlink", "special", "dir", "nested", "chunked", "chunks", "file_size", "xattr")
    },
    "counter missing": Case(
        rows("/nested", "DELETE FROM statistics WHERE counter = 'self_xattr'"), "/nested", "self_xattr is missing"
    ),
    "counter of a nested catalog": Case(
        rows("/nested/deep", "UPDATE statistics SET value = 9 WHERE counter = 'self_dir'", recount=False),
        "/nested/deep",
        "the counter self_dir is 9",
    ),
}


def test_a_sound_repository_has_no_problem(repository: Repository) -> None:
    assert problems(repository, hashes=True) == []


@pytest.mark.parametrize("name", CASES)
def test_what_is_broken_is_found_and_nothing_else(repository: Repository, name: str) -> None:
    case = CASES[name]
    case.broken(repository)
    found = [str(problem) for problem in problems(repository)]
    assert len(found) == 1 + case.others, found
    assert any(problem.startswith(case.where) and case.words in problem for problem in found), found


@needs_swissknife
def test_the_official_tools_find_no_problem_in_a_sound_one_either(repository: Repository) -> None:
    assert judged(repository.directory).is_sound
    assert scrubbed(repository.directory).is_sound


@needs_swissknife
@pytest.mark.parametrize("name", CASES)
def test_the_official_checker_agrees_where_it_looks(repository: Repository, name: str) -> None:
    case = CASES[name]
    case.broken(repository)
    verdict = judged(repository.directory)
    assert verdict.is_sound is not case.official, verdict.said


@needs_swissknife
def test_the_official_checker_agrees_on_what_is_signed(repository: Repository, tmp_path: Path) -> None:
    """From a URL it looks at signatures, as clients do."""
    public = f"{repository.directory}.keys/{NAME}.pub"
    with served(tmp_path) as url:
        assert judged(f"{url}/repository", "-k", public, "-N", NAME).is_sound
        for number, name in enumerate(name for name, case in CASES.items() if case.where in TRUST):
            CASES[name].broken(copied(repository, f"{tmp_path}/{number}"))
            assert not judged(f"{url}/{number}", "-k", public, "-N", NAME).is_sound, name


def test_an_expired_whitelist_is_found(repository: Repository) -> None:
    expires = repository.whitelist().expires
    assert problems(repository, now=expires - 1) == []
    (found,) = problems(repository, now=expires + 3 * DAY)
    assert str(found) == ".cvmfswhitelist: it expired 3 days ago: run unpacker resign"


def test_what_expires_before_it_was_issued_is_found(repository: Repository) -> None:
    backwards = replace(repository.whitelist(), issued=NOW + 4000 * DAY)
    repository.write(whitelist.FILE, backwards.sealed(MasterKey.open(f"{repository.directory}.keys", NAME), "sha1"))
    assert [str(problem) for problem in problems(repository)] == [".cvmfswhitelist: it expires before it was issued"]


def test_without_the_public_key_nobody_can_tell_who_signed_the_whitelist(repository: Repository) -> None:
    forge_whitelist(repository)
    assert problems(repository, verify=False) == []
    assert len(problems(repository)) == 1


def test_a_problem_in_one_catalog_hides_none_in_another(repository: Repository) -> None:
    rebuild(
        repository,
        {
            "": sql(f"UPDATE catalog SET hardlinks = 7 WHERE {at('/d')}"),
            "/nested": sql(f"UPDATE catalog SET hash = NULL WHERE {at('/nested/f')}"),
            "/nested/deep": sql(f"UPDATE catalog SET symlink = '' WHERE {at('/nested/deep/l')}"),
        },
    )
    assert [problem.where for problem in problems(repository)] == ["/d", "/nested/f", "/nested/deep/l"]


def test_a_catalog_that_cannot_be_read_is_one_problem_however_much_is_below_it(repository: Repository) -> None:
    rebuild(repository, {"": sql(f"UPDATE catalog SET hardlinks = 7 WHERE {at('/d')}")})
    remove_nested(repository)
    assert [problem.where for problem in problems(repository)] == ["/d", "/nested"]


def test_the_official_tools_word_on_the_reference_log_goes_before_the_manifest(
    repository: Repository, tmp_path: Path
) -> None:
    def found() -> list[str]:
        where = check(
            repository.directory, now=LATER, spool_root=str(tmp_path / "spool"), configuration=str(tmp_path / "none")
        )
        return [problem.where for problem in where]

    spool = tmp_path / "spool" / NAME
    spool.mkdir(parents=True)
    right = log_of(repository).checksum("sha1")
    (spool / "reflog.chksum").write_text(f"{right}\n")
    sign(repository, reflog=ContentHash(bytes(20)))
    assert found() == []
    (spool / "reflog.chksum").write_text("ab" * 20)
    sign(repository, reflog=right)
    assert found() == [".cvmfsreflog"]


def test_a_directory_without_a_repository_is_an_error_and_no_problem_of_one(tmp_path: Path) -> None:
    with pytest.raises(PublishError, match="there is no repository in"):
        list(check(str(tmp_path), now=LATER))


@pytest.mark.parametrize("algorithm", ["sha1", "shake128"])
def test_a_new_repository_is_sound(tmp_path: Path, algorithm: str) -> None:
    repository = Repository.create(str(tmp_path / "repository"), NAME, hash=algorithm, now=NOW)
    assert problems(repository, hashes=True) == []


# Scrubbing -----------------------------------------------------------------------------------------------------------

MISPLACED: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "file among the directories": (lambda d: (d / "stray").write_bytes(b""), "data/stray", "only directories"),
    "symlink among the directories": (lambda d: (d / "link").symlink_to("txn"), "data/link", "only directories"),
    "directory of another name": (lambda d: (d / "abc").mkdir(), "data/abc", "not two hex digits"),
    "directory among the objects": (lambda d: (d / "e8" / "x").mkdir(), "data/e8/x", "a directory among the objects"),
    "symlink among the objects": (
        lambda d: (d / "e8" / "x").symlink_to("../txn"),
        "data/e8/x",
        "a symlink among the objects",
    ),
    "name that is too short": (lambda d: (d / "e8" / "abc").write_bytes(b""), "data/e8/abc", "not the name of an"),
    "unknown suffix": (lambda d: (d / "e8" / ("a" * 38 + "Q")).write_bytes(b""), "data/e8/aaa", "not the name of an"),
    "temporary suffix": (lambda d: (d / "e8" / ("a" * 38 + "T")).write_bytes(b""), "data/e8/aaa", "not the name of an"),
    "object with other bytes": (
        lambda d: (d / "e8" / "ec3d88b62ebf526e4e5a4ff6162a3aa48a6b78").write_bytes(b"x"),
        "data/e8/ec3d88b6",
        "its bytes are not what its name says",
    ),
    "object cut short": (
        lambda d: os.truncate(next(d.glob("??/*C")), 10),
        "data/",
        "its bytes are not what its name says",
    ),
}


@pytest.mark.parametrize("name", MISPLACED)
def test_what_is_no_sound_object_is_found_by_reading_all(repository: Repository, name: str) -> None:
    change, where, words = MISPLACED[name]
    change(Path(repository.directory, "data"))
    found = list(scrub(repository.directory))
    assert len(found) == 1 and found[0].where.startswith(where) and words in found[0].what, found


@needs_swissknife
@pytest.mark.parametrize("name", MISPLACED)
def test_the_official_scrub_finds_it_too(repository: Repository, name: str) -> None:
    MISPLACED[name][0](Path(repository.directory, "data"))
    verdict = scrubbed(repository.directory)
    assert not verdict.is_sound, verdict.said


def test_what_writers_have_under_way_is_no_problem(repository: Repository) -> None:
    Path(repository.directory, "data", "txn", "unpacker-1").write_bytes(b"x")
    assert list(scrub(repository.directory)) == []

"""Repositories made, opened, published in, resigned; beside the official tools, and killed anywhere."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import pytest

from tests.cvmfs_repositories import (
    CVMFS2,
    NAME,
    NOW,
    SWISSKNIFE,
    mounted,
    needs_swissknife,
    next_root,
    open_again,
    publish,
    remount,
    served,
    swissknife_check,
)
from unpacker.cvmfs import keys, objects, whitelist
from unpacker.cvmfs.catalog import Catalog
from unpacker.cvmfs.check import check
from unpacker.cvmfs.hash import ContentHash
from unpacker.cvmfs.keys import Certificate, MasterKey, PublicKey
from unpacker.cvmfs.manifest import Manifest
from unpacker.cvmfs.reflog import Kind, Ref, Reflog
from unpacker.cvmfs.repository import SETTINGS, Repository
from unpacker.cvmfs.spool import Spool
from unpacker.cvmfs.transaction import transaction
from unpacker.errors import Busy, PublishError, SettingsError
from unpacker.publish import posix

DAY = 86400


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("made") / "repository"
    Repository.create(str(directory), NAME, now=NOW)
    return directory


@pytest.fixture
def repository(made: Path, tmp_path: Path) -> Repository:
    """A fresh repository that a test may change, with its keys beside it."""
    shutil.copytree(made, tmp_path / "repository")
    shutil.copytree(f"{made}.keys", tmp_path / "repository.keys")
    return open_again(
        Repository(str(tmp_path / "repository"), NAME, compression="dense", algorithm="sha1", key=None, spool=None)
    )


@pytest.fixture
def managed(repository: Repository, tmp_path: Path) -> Repository:
    """The same, as if the official tools managed it here and had collected garbage since."""
    (tmp_path / "spool" / NAME).mkdir(parents=True)
    (tmp_path / "spool" / NAME / "reflog.chksum").write_text(log_of(repository).checksum("sha1").hex)
    return open_again(repository, spool_root=str(tmp_path / "spool"))


def log_of(repository: Repository) -> Reflog:
    return Reflog(NAME, (Path(repository.directory) / ".cvmfsreflog").read_bytes())


def write_log(repository: Repository, data: bytes) -> None:
    (Path(repository.directory) / ".cvmfsreflog").write_bytes(data)


def spool_of(repository: Repository) -> Path:
    assert repository.spool is not None
    return Path(repository.spool.path)


# Made and opened -----------------------------------------------------------------------------------------------------


def test_a_new_repository_is_all_that_clients_replicas_and_tools_look_for(made: Path) -> None:
    names = sorted(os.listdir(made))
    assert names == [
        ".cvmfs_master_replica",
        ".cvmfspublished",
        ".cvmfsreflog",
        ".cvmfswhitelist",
        ".unpacker.json",
        ".unpacker.lock",
        "data",
    ]
    assert sorted(os.listdir(made / "data")) == sorted([*(f"{i:02x}" for i in range(256)), "txn"])
    assert os.listdir(made / "data" / "txn") == []
    assert all(os.stat(made / name).st_mode & 0o444 == 0o444 for name in names)
    assert json.loads((made / SETTINGS).read_bytes()) == {"version": 1, "compression": "dense", "hash": "sha1"}


def test_every_link_of_the_chain_of_trust_holds_in_a_new_repository(made: Path) -> None:
    repository = Repository.open(str(made))
    manifest = repository.manifest()
    public = PublicKey.open(f"{made}.keys", NAME)
    certificate = Certificate.parse(repository.objects.read(manifest.certificate, objects.CERTIFICATE), "it")
    assert repository.whitelist(public).admits(certificate)
    assert (manifest.name, manifest.revision, manifest.published) == (NAME, 1, NOW)
    data = repository.objects.read(manifest.root, objects.CATALOG)
    with Catalog.load(data, "root") as catalog:
        assert (catalog.revision, catalog.previous, catalog.count(), len(data)) == (1, None, 1, manifest.root_size)
    assert [(tag.name, tag.root) for tag in repository.history(manifest).tags()] == [("trunk", manifest.root)]
    listed = {ref.hash: ref.kind for ref in log_of(repository).refs()}
    assert listed == {
        manifest.root: Kind.CATALOG,
        manifest.certificate: Kind.CERTIFICATE,
        manifest.history: Kind.HISTORY,
    }
    assert log_of(repository).checksum("sha1") == manifest.reflog


def test_what_replicas_compress_again_is_named_by_what_zlib_makes_of_it(tmp_path: Path) -> None:
    """A stratum 1 stores certificate and meta info so, whatever we wrote; see also tests/test_real_sequences.py."""
    repository = Repository.create(str(tmp_path / "r"), NAME, compression="dense", info=b'{"url": "u"}', now=NOW)
    manifest = publish(open_again(repository), NOW + 1)
    pem = Certificate.open(f"{tmp_path}/r.keys", NAME).pem
    assert manifest.certificate == ContentHash.of(zlib.compress(pem), "sha1")
    assert manifest.meta_info == ContentHash.of(zlib.compress(b'{"url": "u"}'), "sha1")


@pytest.mark.parametrize("algorithm", ["rmd160", "shake128"])
def test_a_repository_of_another_hash_uses_it_throughout(tmp_path: Path, algorithm: str) -> None:
    try:
        ContentHash.of(b"", algorithm)
    except ValueError:
        pytest.skip(f"this OpenSSL has no {algorithm}")
    made = Repository.create(str(tmp_path / "r"), NAME, hash=algorithm, compression="fast", now=NOW)
    manifest = publish(open_again(made), NOW + 1)
    named = (manifest.root, manifest.certificate, manifest.history, manifest.reflog)
    assert {name.algorithm for name in named if name} == {algorithm}
    opened = open_again(made)
    assert (opened.algorithm, opened.compression, opened.objects.algorithm) == (algorithm, "fast", algorithm)
    assert (tmp_path / "r" / ".cvmfswhitelist").read_bytes().count(f"-{algorithm}".upper().encode()) == 1


def test_the_meta_info_for_clients_is_published_and_stays(tmp_path: Path) -> None:
    directory = str(tmp_path / "repository")
    info = json.dumps({"administrator": "An Operator", "custom": {}}).encode()
    repository = Repository.create(directory, NAME, info=info, now=NOW)
    publish(repository, NOW + 1)
    found = repository.manifest()
    assert found.meta_info is not None
    assert repository.objects.read(found.meta_info, objects.META_INFO) == info
    assert log_of(repository).lists(found.meta_info)
    assert list(check(directory, now=NOW, spool_root="/nowhere", configuration="/nowhere")) == []
    if SWISSKNIFE is not None:
        swissknife_check("-c", "-r", directory)


@pytest.mark.parametrize("info", [b"", b"text", b"[]", b'"x"', b"[" * 100_000, b'{"x": "%s"}' % (b"x" * (1 << 20))])
def test_a_meta_info_that_is_none_is_refused_before_anything_is_made(tmp_path: Path, info: bytes) -> None:
    with pytest.raises(SettingsError, match="meta info"):
        Repository.create(str(tmp_path / "repository"), NAME, info=info, now=NOW)
    assert os.listdir(tmp_path) == []


def test_where_a_repository_or_anything_else_stands_none_is_made(repository: Repository, tmp_path: Path) -> None:
    before = (Path(repository.directory) / ".cvmfspublished").read_bytes()
    with pytest.raises(PublishError, match=r"a repository in .* already"):
        Repository.create(repository.directory, NAME, now=NOW)
    assert (Path(repository.directory) / ".cvmfspublished").read_bytes() == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(PublishError, match=r"not empty \('thesis.tex'\)"):
        Repository.create(str(tmp_path / "other"), NAME, now=NOW)
    assert os.listdir(tmp_path / "other") == ["thesis.tex"]


def test_making_goes_on_where_it_was_killed(repository: Repository) -> None:
    directory = Path(repository.directory)
    (directory / ".cvmfspublished").unlink()
    (directory / "data" / "txn" / ".unpacker-1-2").touch()
    shutil.rmtree(directory / "data" / "7f")
    key = Path(f"{directory}.keys/{NAME}.key").read_bytes()
    assert Repository.create(str(directory), NAME, now=NOW).manifest().revision == 1
    assert Path(f"{directory}.keys/{NAME}.key").read_bytes() == key
    assert os.listdir(directory / "data" / "txn") == []


@pytest.mark.parametrize("where", [".", "keys", "data/keys"])
def test_keys_are_never_made_where_they_would_be_served(tmp_path: Path, where: str) -> None:
    with pytest.raises(SettingsError, match="would be served"):
        Repository.create(str(tmp_path / "r"), NAME, str(tmp_path / "r" / where), now=NOW)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("wrong", [{"compression": "zip"}, {"hash": "md5"}])
def test_an_unknown_compression_or_hash_is_refused_before_anything_is_made(
    tmp_path: Path, wrong: dict[str, str]
) -> None:
    with pytest.raises(SettingsError, match="one of dense, fast, stock; hash one of sha1, rmd160, shake128"):
        Repository.create(str(tmp_path / "r"), NAME, now=NOW, **wrong)  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == []


def test_a_repository_opens_with_key_and_certificate_only(repository: Repository) -> None:
    for suffix in ("masterkey", "pub"):
        Path(f"{repository.directory}.keys/{NAME}.{suffix}").unlink()
    assert publish(open_again(repository), NOW + 1).revision == 2


def test_a_repository_of_the_official_tools_opens_and_is_written_as_they_would(repository: Repository) -> None:
    (Path(repository.directory) / SETTINGS).unlink()
    opened = open_again(repository)
    assert (opened.compression, opened.algorithm) == ("stock", "sha1")


@pytest.mark.parametrize("damage", [b"", b"[]", b'{"version": 1}', b"[" * 5000])
def test_damaged_settings_are_not_taken_for_none(repository: Repository, damage: bytes) -> None:
    (Path(repository.directory) / SETTINGS).write_bytes(damage)
    with pytest.raises(PublishError, match="is damaged"):
        open_again(repository)


def test_without_keys_a_repository_can_be_read_and_not_published_in(repository: Repository) -> None:
    opened = Repository.open(repository.directory)
    assert opened.manifest().revision == 1 and opened.days_left(NOW) == 30
    with pytest.raises(PublishError, match="only to be read"), transaction(opened, now=NOW):
        pass


def test_a_key_that_clients_would_refuse_is_found_when_opening(repository: Repository, tmp_path: Path) -> None:
    keys.create(str(tmp_path / "others"), NAME, now=NOW)
    with pytest.raises(PublishError, match="not signed by the master key"):
        open_again(repository, keys=str(tmp_path / "others"))
    (tmp_path / "others" / f"{NAME}.pub").unlink()
    with pytest.raises(PublishError, match=r"does not admit .*\.crt.*unpacker resign"):
        open_again(repository, keys=str(tmp_path / "others"))
    with pytest.raises(PublishError, match=r"there is no .*\.key"):
        open_again(repository, keys=str(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        (".cvmfspublished", None, "no repository there: make one with unpacker init"),
        (".cvmfspublished", lambda data: data[:100], "cut short"),
        (".cvmfspublished", lambda data: data.replace(b"\nS1\n", b"\nS2\n"), "damaged"),
        (".cvmfspublished", lambda data: data[:-1] + bytes([data[-1] ^ 1]), "not signed by the repository's key"),
        (".cvmfswhitelist", None, "run unpacker resign"),
        (".cvmfswhitelist", lambda data: data[:-1] + bytes([data[-1] ^ 1]), "not signed by the master key"),
    ],
)
def test_a_manifest_or_whitelist_that_clients_would_refuse_is_found_when_opening(
    repository: Repository, name: str, spoil: Any, message: str
) -> None:
    path = Path(repository.directory) / name
    data = path.read_bytes()
    path.unlink()
    if spoil is not None:
        path.write_bytes(spoil(data))
    with pytest.raises(PublishError, match=message):
        open_again(repository)


# Published -----------------------------------------------------------------------------------------------------------


def test_a_publish_is_the_next_revision_with_trunk_moved_and_all_listed(repository: Repository) -> None:
    first = repository.manifest()
    second = publish(repository, NOW + 5)
    third = publish(repository, NOW + 9, tags={"release-1": "the first"})
    assert repository.manifest() == third
    assert (second.revision, third.revision, third.published) == (2, 3, NOW + 9)
    tags = {tag.name: (tag.revision, tag.root) for tag in repository.history(third).tags()}
    assert tags == {"trunk": (3, third.root), "trunk-previous": (2, second.root), "release-1": (3, third.root)}
    assert repository.history(third).previous == second.history
    listed = {ref.hash for ref in log_of(repository).refs()}
    assert listed == {m.root for m in (first, second, third)} | {m.history for m in (first, second, third)} | {
        first.certificate
    }
    assert log_of(repository).checksum("sha1") == third.reflog
    fourth = publish(repository, NOW + 10, untag=["release-1"])
    assert [tag.name for tag in repository.history(fourth).tags()] == ["trunk", "trunk-previous"]


def test_time_never_goes_backwards_for_clients(repository: Repository) -> None:
    assert publish(repository, NOW - 100).published == NOW


def test_what_the_manifest_says_of_the_repository_stays(repository: Repository) -> None:
    meta = repository.store(b"{}", objects.META_INFO)
    assert repository.key is not None
    settled: dict[str, Any] = {"ttl": 61, "collectable": False, "others": ("Vnew",), "meta_info": meta}
    first = repository.manifest()
    changed = Manifest(**{name: getattr(first, name) for name in first.__dataclass_fields__} | settled)
    repository.write(".cvmfspublished", changed.sealed(repository.key))
    found = publish(repository, NOW + 1)
    assert {name: getattr(found, name) for name in settled} == settled
    assert log_of(repository).lists(meta)


def test_several_publishes_fit_in_one_transaction(repository: Repository) -> None:
    with transaction(repository, now=NOW) as within:
        for number in (2, 3):
            root, size = next_root(repository, within, NOW + number)
            assert within.publish(root, size, now=NOW + number).revision == number
    assert repository.manifest().revision == 3


@pytest.mark.parametrize("wrong", ["revision", "previous", "size"])
def test_a_root_that_does_not_follow_is_refused_and_nothing_changes(repository: Repository, wrong: str) -> None:
    before = {path.name: path.read_bytes() for path in Path(repository.directory).glob(".cvmfs*")}
    with transaction(repository, now=NOW) as within:
        with Catalog.load(repository.objects.read(within.base.root, objects.CATALOG), "root") as catalog:
            previous = ContentHash.of(b"x") if wrong == "previous" else within.base.root
            catalog.succeed(previous, revision=3 if wrong == "revision" else 2, last_modified=NOW)
            data = catalog.serialise()
        root = repository.store(data, objects.CATALOG)
        with pytest.raises(PublishError, match="does not follow revision 1"):
            within.publish(root, len(data) + (wrong == "size"), now=NOW)
        with pytest.raises(PublishError, match="lacks object"):
            within.publish(ContentHash.of(b"never stored"), 1, now=NOW)
    assert before == {path.name: path.read_bytes() for path in Path(repository.directory).glob(".cvmfs*")}


def test_a_transaction_that_is_left_by_an_exception_changes_nothing_and_lets_it_through(managed: Repository) -> None:
    before = (Path(managed.directory) / ".cvmfspublished").read_bytes()
    with pytest.raises(FileNotFoundError, match="theirs"), transaction(managed, now=NOW):
        raise FileNotFoundError("theirs")
    assert (Path(managed.directory) / ".cvmfspublished").read_bytes() == before
    assert os.listdir(spool_of(managed)) == ["reflog.chksum"]


def test_a_publish_past_all_locks_is_noticed_and_not_undone(repository: Repository, tmp_path: Path) -> None:
    with transaction(repository, now=NOW) as within:
        root, size = next_root(repository, within, NOW + 1)
        shutil.copytree(repository.directory, tmp_path / "elsewhere", ignore=shutil.ignore_patterns(".unpacker.lock"))
        shutil.copytree(f"{repository.directory}.keys", tmp_path / "elsewhere.keys")
        elsewhere = open_again(Repository.open(str(tmp_path / "elsewhere")))
        publish(elsewhere, NOW + 2)
        theirs = (tmp_path / "elsewhere" / ".cvmfspublished").read_bytes()
        (Path(repository.directory) / ".cvmfspublished").write_bytes(theirs)
        with pytest.raises(PublishError, match="somebody published"):
            within.publish(root, size, now=NOW + 1)
    assert (Path(repository.directory) / ".cvmfspublished").read_bytes() == theirs


def test_processes_that_publish_at_once_lose_no_update(repository: Repository) -> None:
    program = (
        "import sys\n"
        "from tests.cvmfs_repositories import *\n"
        "from unpacker.cvmfs.repository import Repository\n"
        "r = Repository.open(sys.argv[1], sys.argv[1] + '.keys', spool_root='/nowhere', configuration='/nowhere')\n"
        "for i in range(5):\n"
        "    with transaction(r, now=NOW, wait=60) as t:\n"
        "        root, size = next_root(r, t, NOW + int(sys.argv[2]) + i)\n"
        "        t.publish(root, size, now=NOW, tags={f'p{sys.argv[2]}-{i}': ''})\n"
    )
    root = Path(__file__).parent.parent
    started = [
        subprocess.Popen([sys.executable, "-c", program, repository.directory, str(n)], cwd=root)
        for n in (100, 200, 300)
    ]
    assert [process.wait(120) for process in started] == [0, 0, 0]
    manifest = repository.manifest()
    assert manifest.revision == 16
    revisions = [t.revision for t in repository.history(manifest).tags() if t.name.startswith("p")]
    assert sorted(revisions) == list(range(2, 17))


def test_a_repository_with_alternative_paths_is_refused(repository: Repository) -> None:
    assert repository.key is not None
    path = Path(repository.directory) / ".cvmfspublished"
    changed = repository.manifest()
    text = {name: getattr(changed, name) for name in changed.__dataclass_fields__} | {"alternative_paths": True}
    path.write_bytes(Manifest(**text).sealed(repository.key))
    with pytest.raises(PublishError, match="alternative paths"), transaction(repository, now=NOW):
        pass


def test_a_new_certificate_that_the_whitelist_admits_is_stored_with_the_next_publish(repository: Repository) -> None:
    directory = Path(f"{repository.directory}.keys")
    for suffix in ("key", "crt"):
        (directory / f"{NAME}.{suffix}").unlink()
    keys.create(str(directory), NAME, now=NOW)
    old = repository.manifest().certificate
    repository.resign(str(directory), now=NOW)
    manifest = publish(open_again(repository), NOW + 1)
    assert manifest.certificate != old
    assert Repository.open(repository.directory).manifest() == manifest


# Resigned ------------------------------------------------------------------------------------------------------------


def test_resigning_counts_the_days_from_now(repository: Repository) -> None:
    assert repository.days_left(NOW + 40 * DAY) == -10
    assert (
        repository.resign(f"{repository.directory}.keys", days=60, now=NOW + 40 * DAY).days_left(NOW + 40 * DAY) == 60
    )
    assert open_again(repository).days_left(NOW + 41 * DAY) == 59


def test_resigning_needs_the_master_key_alone(repository: Repository, tmp_path: Path) -> None:
    (tmp_path / "vault").mkdir()
    shutil.copy(f"{repository.directory}.keys/{NAME}.masterkey", tmp_path / "vault")
    before = repository.whitelist().fingerprints
    assert repository.resign(str(tmp_path / "vault"), now=NOW + DAY).fingerprints == before
    Path(f"{repository.directory}.keys/{NAME}.masterkey").unlink()
    with pytest.raises(PublishError, match=r"there is no .*masterkey.*run this where it is kept"):
        repository.resign(f"{repository.directory}.keys", now=NOW)


def test_another_master_key_does_not_resign_what_it_did_not_sign(repository: Repository, tmp_path: Path) -> None:
    keys.create(str(tmp_path / "others"), NAME, now=NOW)
    before = (Path(repository.directory) / ".cvmfswhitelist").read_bytes()
    with pytest.raises(PublishError, match="not signed by the master key"):
        repository.resign(str(tmp_path / "others"), now=NOW)
    assert (Path(repository.directory) / ".cvmfswhitelist").read_bytes() == before


def test_a_whitelist_that_is_gone_is_made_anew_for_the_certificate_at_hand(repository: Repository) -> None:
    (Path(repository.directory) / ".cvmfswhitelist").unlink()
    repository.resign(f"{repository.directory}.keys", now=NOW)
    assert open_again(repository).days_left(NOW) == 30


@pytest.mark.parametrize("days", [0, -1, 100_000_000])
def test_a_whitelist_that_is_good_for_no_time_is_not_signed(repository: Repository, days: int) -> None:
    with pytest.raises(SettingsError, match="days"):
        repository.resign(f"{repository.directory}.keys", days=days, now=NOW)


# Beside the official tools -------------------------------------------------------------------------------------------


def test_the_locks_of_the_official_tools_are_held_while_publishing_and_gone_afterwards(managed: Repository) -> None:
    spool = spool_of(managed)
    with transaction(managed, now=NOW):
        assert sorted(os.listdir(spool)) == ["in_transaction.lock", "is_publishing.lock", "reflog.chksum"]
        assert json.loads((spool / "in_transaction.lock").read_bytes())["pid"] == os.getpid()
        with open(spool / "is_publishing.lock", "r+b") as theirs, pytest.raises(BlockingIOError):
            fcntl.flock(theirs, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert os.listdir(spool) == ["reflog.chksum"]


def test_an_open_transaction_of_theirs_is_respected_waited_for_and_never_ended(managed: Repository) -> None:
    flag = spool_of(managed) / "in_transaction.lock"
    flag.touch()
    start = time.monotonic()
    with pytest.raises(Busy, match=r"is open, by \w+, for \d+ s \("), transaction(managed, now=NOW, wait=0.3):
        pass
    assert time.monotonic() - start >= 0.3
    assert flag.exists() and managed.manifest().revision == 1
    remove = subprocess.Popen(["sh", "-c", f"sleep 0.5; rm '{flag}'"])
    assert publish_waiting(managed).revision == 2
    assert remove.wait() == 0


def publish_waiting(repository: Repository) -> Manifest:
    with transaction(repository, now=NOW, wait=30) as within:
        root, size = next_root(repository, within, NOW + 1)
        return within.publish(root, size, now=NOW + 1)


def test_their_publishing_step_is_respected_and_our_flag_taken_down(managed: Repository) -> None:
    with open(spool_of(managed) / "is_publishing.lock", "wb") as theirs:
        fcntl.flock(theirs, fcntl.LOCK_EX)
        with pytest.raises(Busy, match="publishing by cvmfs_server"), transaction(managed, now=NOW):
            pass
    assert not (spool_of(managed) / "in_transaction.lock").exists()


def test_a_flag_that_a_killed_process_of_ours_left_is_taken_over(managed: Repository) -> None:
    program = (
        "import os, signal, sys\n"
        "from unpacker.cvmfs.spool import Spool\n"
        "with Spool(sys.argv[1]).held():\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(spool_of(managed))])
    assert (spool_of(managed) / "in_transaction.lock").exists()
    assert publish(managed, NOW + 1).revision == 2
    assert sorted(os.listdir(spool_of(managed))) == ["reflog.chksum"]


def test_a_flag_of_another_host_is_not_ours_to_take(managed: Repository) -> None:
    flag = spool_of(managed) / "in_transaction.lock"
    flag.write_text(json.dumps({"holder": "unpacker", "host": "elsewhere", "pid": 1, "started": 1}))
    with pytest.raises(Busy), transaction(managed, now=NOW):
        pass
    assert flag.exists()


def test_nothing_is_published_once_somebody_took_our_flag_and_theirs_stays(managed: Repository) -> None:
    flag = spool_of(managed) / "in_transaction.lock"
    with transaction(managed, now=NOW) as within:
        root, size = next_root(managed, within, NOW + 1)
        flag.unlink()
        flag.touch()
        with pytest.raises(PublishError, match="was taken away"):
            within.publish(root, size, now=NOW + 1)
    assert flag.exists() and managed.manifest().revision == 1


def test_their_checksum_of_the_reference_log_follows_each_publish(managed: Repository) -> None:
    manifest = publish(managed, NOW + 1)
    said = (spool_of(managed) / "reflog.chksum").read_text().strip()
    assert said == log_of(managed).checksum("sha1").hex == str(manifest.reflog)


def test_after_their_garbage_collection_their_checksum_counts_and_not_the_manifest(managed: Repository) -> None:
    old = publish(managed, NOW + 1)
    publish(managed, NOW + 2)
    collected = log_of(managed).without([old.history or old.root])
    write_log(managed, collected.data)
    (spool_of(managed) / "reflog.chksum").write_text(collected.checksum("sha1").hex)
    publish(managed, NOW + 3)
    assert not log_of(managed).lists(old.history or old.root), "what was collected is not listed again"


@pytest.mark.parametrize("upstream", ["local,/x/data/txn,/x", "S3,/tmp,x@y", "gw,/srv,http://h", ""])
def test_a_repository_of_theirs_by_the_same_name_elsewhere_is_not_this_one(
    repository: Repository, tmp_path: Path, upstream: str
) -> None:
    configure(tmp_path, upstream)
    (tmp_path / "spool" / NAME).mkdir(parents=True)
    assert find(repository, tmp_path) is None


def test_their_configuration_says_where_the_spool_is(repository: Repository, tmp_path: Path) -> None:
    upstream = f"local,{repository.directory}/data/txn,{repository.directory}"
    configure(tmp_path, upstream)
    found = find(repository, tmp_path)
    assert found is not None and found.path == f"{tmp_path}/spool/{NAME}"
    configure(tmp_path, upstream, "CVMFS_SPOOL_DIR='/other/spool' # moved\n")
    found = find(repository, tmp_path)
    assert found is not None and found.path == "/other/spool"


def test_a_replica_is_refused(repository: Repository, tmp_path: Path) -> None:
    configure(tmp_path, f"local,{repository.directory}/data/txn,{repository.directory}")
    (tmp_path / "repositories.d" / NAME / "replica.conf").touch()
    with pytest.raises(PublishError, match="is a replica"):
        find(repository, tmp_path)


def configure(tmp_path: Path, upstream: str, more: str = "") -> None:
    directory = tmp_path / "repositories.d" / NAME
    directory.mkdir(parents=True, exist_ok=True)
    text = f"# made by cvmfs_server\nCVMFS_CREATOR_VERSION=143\nexport CVMFS_UPSTREAM_STORAGE={upstream}\n{more}"
    (directory / "server.conf").write_text(text)


def find(repository: Repository, tmp_path: Path) -> Spool | None:
    return Spool.find(
        repository.directory, NAME, spools=str(tmp_path / "spool"), configuration=str(tmp_path / "repositories.d")
    )


# Mended --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["repository", "managed"])
def test_a_reference_log_that_ran_ahead_is_accepted_and_the_checksums_set_right(
    request: pytest.FixtureRequest, target: str
) -> None:
    repository = request.getfixturevalue(target)
    unpublished = ContentHash.of(b"lost the race")
    write_log(repository, log_of(repository).with_refs([Ref(unpublished, Kind.CATALOG, NOW)]).data)
    before = repository.manifest()
    with transaction(repository, now=NOW + 1):
        pass
    after = repository.manifest()
    assert log_of(repository).lists(unpublished), "garbage collection must find it"
    assert after.reflog == log_of(repository).checksum("sha1")
    assert (after.revision, after.published, after.root) == (before.revision, before.published, before.root)
    if repository.spool is not None:
        assert repository.spool.checksum() == after.reflog


def test_a_transaction_that_finds_all_in_step_writes_nothing(repository: Repository) -> None:
    before = os.stat(f"{repository.directory}/.cvmfspublished").st_ino
    with transaction(repository, now=NOW):
        pass
    assert os.stat(f"{repository.directory}/.cvmfspublished").st_ino == before


@pytest.mark.parametrize("damage", ["gone", "rubbish", "cut", "of another time"])
def test_a_reference_log_that_cannot_be_believed_is_made_anew_from_all_that_can_be_reached(
    repository: Repository, damage: str
) -> None:
    first = repository.manifest()
    tagged = publish(repository, NOW + 1, tags={"kept": ""})
    publish(repository, NOW + 2)
    whole = log_of(repository)
    path = Path(repository.directory) / ".cvmfsreflog"
    if damage == "gone":
        path.unlink()
    else:
        other = Reflog.create(NAME).with_refs([Ref(first.root, Kind.CATALOG, NOW)]).data
        path.write_bytes({"rubbish": b"?", "cut": whole.data[:9000], "of another time": other}[damage])
    assert first.history is not None
    repository.objects.discard(first.history, objects.HISTORY)
    last = publish(repository, NOW + 3)
    expected = {ref.hash for ref in whole.refs()} - {first.history} | {last.root, last.history}
    assert {ref.hash for ref in log_of(repository).refs()} == expected
    assert tagged.root in expected
    assert min(ref.timestamp for ref in log_of(repository).refs()) == NOW + 3
    assert log_of(repository).checksum("sha1") == last.reflog


def test_garbage_collection_replaces_the_log_but_never_by_one_without_what_is_published(repository: Repository) -> None:
    old = repository.manifest()
    publish(repository, NOW + 1)
    with transaction(repository, now=NOW + 2) as within:
        with pytest.raises(PublishError, match="which is published, was not written"):
            within.replace_reflog(within.reflog.without([within.base.root]))
        manifest = within.replace_reflog(within.reflog.without([old.root]))
    assert repository.manifest() == manifest and manifest.revision == 2
    assert not log_of(repository).lists(old.root)
    assert log_of(repository).checksum("sha1") == manifest.reflog


def test_bytes_are_durable_before_anything_names_them_and_the_manifest_is_last(
    managed: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def noted(module: Any, name: str) -> None:
        call = getattr(module, name)

        def wrapped(*arguments: Any, **keywords: Any) -> None:
            call(*arguments, **keywords)
            about = os.path.basename(os.fsdecode(arguments[1])) if name == "rename" else name
            done.append("object" if re.fullmatch(r"[0-9a-f]{38}[A-Z]?", about) else about)

        monkeypatch.setattr(module, name, wrapped)

    with transaction(managed, now=NOW) as within:
        root, size = next_root(managed, within, NOW + 1)
        noted(os, "rename")
        noted(os, "fsync")
        noted(posix, "syncfs")
        within.publish(root, size, now=NOW + 1)
        monkeypatch.undo()
    assert done == [
        *("syncfs", "object", "syncfs"),
        *("fsync", ".cvmfsreflog", "fsync"),
        *("fsync", "reflog.chksum", "fsync"),
        *("fsync", ".cvmfspublished", "fsync"),
    ]


@pytest.mark.parametrize("target", ["repository", "managed"])
def test_killed_at_any_point_a_publish_happened_or_not_and_the_next_one_mends_the_rest(
    request: pytest.FixtureRequest, tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = 1 if request.config.getoption("--torture") else 2
    if target == "repository" and step > 1:
        pytest.skip("the points of a managed repository include these; --torture kills here, too")
    repository = request.getfixturevalue(target)
    monkeypatch.setattr(posix, "syncfs", lambda fd: None)
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    (tmp_path / "spool").mkdir(exist_ok=True)
    for name in os.listdir(f"{repository.directory}/data"):
        if name != "txn" and not os.listdir(f"{repository.directory}/data/{name}"):
            os.rmdir(f"{repository.directory}/data/{name}")  # Many copies follow.
    command = [sys.executable, "-m", "tests.kill_switch", repository.directory, f"{repository.directory}.keys"]
    done = subprocess.run(
        [*command, str(tmp_path / "spool"), str(step)], cwd=Path(__file__).parent.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    points = int(done.stdout)
    assert points > (40 if repository.spool else 25)
    seen = set()
    for point in range(1, points + 1, step):
        opened = open_again(
            Repository.open(f"{repository.directory}.{point}"),
            keys=f"{repository.directory}.keys",
            spool_root=f"{tmp_path}/spool.{point}",
        )
        found = opened.manifest()
        seen.add(found.revision)
        assert log_of(opened).lists(found.root), "garbage collection must find whatever was published"
        opened.objects.read(found.root, objects.CATALOG)
        opened.history(found).tags()
        manifest = publish(opened, NOW + 2000)
        assert manifest.revision == found.revision + 1
        log = log_of(opened)
        assert log.is_sound() and log.checksum("sha1") == manifest.reflog
        for name, suffix in ((found.root, "C"), (found.history, "H"), (manifest.root, "C")):
            assert name is not None and log.lists(name) and opened.objects.is_sound(name, suffix)
        assert os.listdir(f"{opened.directory}/data/txn") == []
        if opened.spool is not None:
            assert os.listdir(opened.spool.path) == ["reflog.chksum"]
            assert opened.spool.checksum() == manifest.reflog
    assert seen == {1, 2}


# Judged by the official tools ----------------------------------------------------------------------------------------


@needs_swissknife
@pytest.mark.parametrize("algorithm", ["sha1", "shake128"])
def test_the_official_checker_finds_no_problem_after_any_step(tmp_path: Path, algorithm: str) -> None:
    directory = tmp_path / "served" / NAME
    now = int(time.time())
    made = Repository.create(str(directory), NAME, str(tmp_path / "keys"), hash=algorithm, now=now)
    swissknife_check("-c", "-r", str(directory))
    repository = open_again(made, keys=str(tmp_path / "keys"))
    publish(repository, now, tags={"named": "a tag"})
    swissknife_check("-c", "-r", str(directory))
    repository.resign(str(tmp_path / "keys"), now=now)
    publish(repository, now + 1, untag=["named"])
    swissknife_check("-c", "-r", str(directory))
    with served(tmp_path / "served") as url:
        swissknife_check("-r", f"{url}/{NAME}", "-k", str(tmp_path / "keys" / f"{NAME}.pub"), "-N", NAME)


@needs_swissknife
def test_the_official_tools_read_our_tags_once_the_whitelist_is_signed_again(
    repository: Repository, tmp_path: Path
) -> None:
    publish(repository, NOW + 1, tags={"named": "a tag"})
    assert SWISSKNIFE is not None
    command = [SWISSKNIFE, "tag_list", "-t", str(tmp_path), "-f", NAME, "-x"]
    command += ["-p", f"{repository.directory}.keys/{NAME}.pub"]
    with served(Path(repository.directory)) as url:
        repository.resign(f"{repository.directory}.keys", days=1, now=NOW - 2 * DAY)
        refused = subprocess.run([*command, "-w", url], capture_output=True, text=True, timeout=60)
        assert refused.returncode != 0 and "bad whitelist" in refused.stderr
        repository.resign(f"{repository.directory}.keys", now=int(time.time()))
        done = subprocess.run([*command, "-w", url], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert {line.split()[0] for line in done.stdout.splitlines() if line} == {"trunk", "trunk-previous", "named"}


@needs_swissknife
def test_a_repository_that_the_official_tools_made_and_signed_takes_our_revisions(tmp_path: Path) -> None:
    keys_directory, directory, spool = tmp_path / "keys", tmp_path / "served", tmp_path / "spool" / NAME
    for path in (*(directory / "data" / f"{i:02x}" for i in range(256)), directory / "data" / "txn", spool):
        path.mkdir(parents=True)
    now = int(time.time())
    keys.create(str(keys_directory), NAME, now=now)
    certificate, master = Certificate.open(str(keys_directory), NAME), MasterKey.open(str(keys_directory), NAME)
    admitting = whitelist.issue(NAME, certificate, algorithm="sha1", days=30, now=now)
    (directory / ".cvmfswhitelist").write_bytes(admitting.sealed(master, "sha1"))
    common = [
        "-t",
        tmp_path,
        "-r",
        f"local,{directory}/data/txn,{directory}",
        "-n",
        NAME,
        "-R",
        spool / "reflog.chksum",
    ]
    made = tmp_path / "manifest"
    signing = ["-c", keys_directory / f"{NAME}.crt", "-k", keys_directory / f"{NAME}.key", "-m", made]
    with served(directory) as url:
        for command in (["create", *common, "-o", made], ["sign", *common, *signing, "-u", url]):
            done = subprocess.run([str(SWISSKNIFE), *command], capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, done.stderr
    opened = Repository.open(
        str(directory), str(keys_directory), spool_root=str(tmp_path / "spool"), configuration="/nowhere"
    )
    assert (opened.compression, opened.manifest().revision, opened.manifest().history) == ("stock", 0, None)
    for number in (1, 2):
        assert publish(opened, now).revision == number
        swissknife_check("-c", "-r", str(directory), "-R", str(spool / "reflog.chksum"))


@pytest.mark.skipif(CVMFS2 is None or not os.access("/dev/fuse", os.R_OK | os.W_OK), reason="no cvmfs2, or no FUSE")
def test_a_client_mounts_an_empty_repository_and_follows_to_the_next_revision(tmp_path: Path) -> None:
    made = Repository.create(str(tmp_path / NAME), NAME, str(tmp_path / "keys"), now=int(time.time()))
    repository = open_again(made, keys=str(tmp_path / "keys"))
    with mounted(f"file://{tmp_path}/{NAME}", tmp_path / "keys" / f"{NAME}.pub", tmp_path / "client") as mount:
        assert os.listdir(mount) == []
        assert os.getxattr(mount, "user.revision") == b"1"
        published = publish(repository, int(time.time()) + 1)
        remount(tmp_path / "client", 2)
        assert os.getxattr(mount, "user.revision") == b"2"
        assert os.getxattr(mount, "user.root_hash").decode() == published.root.hex

"""Transactions of `cvmfs_server`, over the stand-in for it: only ours are touched, and kills are recovered from.

What the stand-in cannot show is in test_managed.py, with the real tools.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from threading import Timer
from typing import Any

import pytest

from tests import images
from tests.cvmfs_breaking import sign
from tests.cvmfs_server_stand_in import StandIn
from tests.fake_registry import FakeRegistry
from tests.publisher_contract import MTIME, NAME, OTHER, PublisherContract, publish, release, stored
from tests.test_publish_directory import described
from tests.test_reconcile import Site
from unpacker.contracts import Publisher
from unpacker.cvmfs import command, ducc, session
from unpacker.cvmfs.command import Running
from unpacker.cvmfs.repository import Repository
from unpacker.cvmfs.server import Server, place
from unpacker.cvmfs.session import TOKEN, Session, plain
from unpacker.errors import Busy, PublishError, SettingsError
from unpacker.multiarch import VARIANT
from unpacker.publish import posix, unreferenced
from unpacker.publish.directory import DirectoryPublisher
from unpacker.publish.server import ServerPublisher
from unpacker.publish.stratum0 import Stratum0Publisher
from unpacker.reconcile import reconcile
from unpacker.record import Published
from unpacker.verify import verify

TOP = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test here pulls the plug, or waits for long; and none meets the DUCC of this machine."""
    monkeypatch.setattr(posix, "syncfs", lambda fd: None)
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.setattr(session, "_POLL", 0.02)
    monkeypatch.setattr(ducc, "_POLL", 0.02)
    monkeypatch.setattr(session, "beside_ducc", lambda wait: ducc.beside_ducc(wait, str(tmp_path / "DUCC.lock")))


@pytest.fixture
def stand_in(tmp_path: Path) -> StandIn:
    return StandIn.make(tmp_path / "host", CVMFS_ENABLE_MTIME_NS="true", CVMFS_INCLUDE_XATTRS="true")


def server(stand_in: StandIn, **options: Any) -> Server:
    return Server.find(
        stand_in.name,
        configuration=str(stand_in.configuration),
        command=str(stand_in.command),
        is_mounted=os.path.isdir,
        **options,
    )


def opened(stand_in: StandIn, subdirectory: str = "") -> ServerPublisher:
    return ServerPublisher(server(stand_in), subdirectory, state=str(stand_in.place / "state"))


@pytest.fixture
def publisher(stand_in: StandIn) -> ServerPublisher:
    return opened(stand_in)


@pytest.fixture
def again(stand_in: StandIn) -> Callable[[], Publisher]:
    return lambda: opened(stand_in)


@pytest.fixture
def visible(stand_in: StandIn) -> Callable[[str], dict[str, str] | None]:
    return lambda public_path: seen(stand_in.readonly, public_path)


def seen(root: Path, public_path: str) -> dict[str, str] | None:
    """What a client finds at the end of a public link, without what CernVM-FS itself puts there."""
    link = root / public_path
    if not os.path.lexists(link):
        return None
    target = os.readlink(link).replace(VARIANT, "amd64")  # as a client fills it in
    link = link.parent / target
    found = described(link.resolve(strict=True))
    return {path: what for path, what in found.items() if path.rpartition("/")[2] != ".cvmfscatalog"}


class TestServerPublisher(PublisherContract):
    """The contract of all publishers."""


def test_a_root_that_is_missing_only_where_somebody_is_writing_is_not_lost(
    publisher: ServerPublisher, stand_in: StandIn
) -> None:
    record = publish(publisher, NAME, {"motd": b"hello"})
    shutil.rmtree(stand_in.union / record.root)
    assert publisher.lost(publisher.published()) == frozenset()
    shutil.rmtree(stand_in.readonly / record.root)
    assert publisher.lost(publisher.published()) == {NAME}


def verbs(stand_in: StandIn) -> list[str]:
    return [line[0] for line in stand_in.said()]


def is_clean(stand_in: StandIn) -> bool:
    """Nothing open, nothing of ours in the spool area, and the union mount as it is published."""
    left = {path.name for path in stand_in.spool.iterdir()} - {"rdonly", "tmp", ".unpacker.lock"}
    return not left and described(stand_in.union) == described(stand_in.readonly)


class TestOpening:
    def test_a_transaction_of_somebody_else_is_busy_named_and_left_alone(
        self, stand_in: StandIn, publisher: ServerPublisher
    ) -> None:
        stand_in.open_foreign()
        os.utime(stand_in.flag, (time.time() - 7300, time.time() - 7300))
        with pytest.raises(Busy, match=r"is open, by \w+, for 2 h .*in_transaction.lock"), publisher.transaction("x"):
            pass
        assert verbs(stand_in) == []
        assert (stand_in.union / "somebody's").read_text() == "unfinished work"
        assert stand_in.flag.read_bytes() == b""

    def test_it_is_waited_for_as_long_as_asked(self, stand_in: StandIn, publisher: ServerPublisher) -> None:
        stand_in.open_foreign()
        began = time.monotonic()
        with pytest.raises(Busy), publisher.lock(0.2), publisher.transaction("x"):
            pass
        assert 0.2 <= time.monotonic() - began < 2
        ending = subprocess.Popen(["sh", "-c", f"sleep 0.3; rm {stand_in.flag}"])
        with publisher.lock(20):
            record = publish(publisher, NAME, {"motd": b"hello"})
        assert ending.wait() == 0
        assert publisher.published() == {NAME: record}

    def test_one_that_is_opened_in_the_same_moment_is_busy_too(
        self, stand_in: StandIn, publisher: ServerPublisher
    ) -> None:
        stand_in.fail("transaction", "code:17")
        with pytest.raises(Busy), publisher.transaction("x"):
            pass
        assert verbs(stand_in) == ["transaction"]
        assert is_clean(stand_in)

    def test_a_failure_to_open_says_what_cvmfs_server_said_and_touches_nothing(
        self, stand_in: StandIn, publisher: ServerPublisher
    ) -> None:
        stand_in.fail("transaction", "code:22")
        with pytest.raises(PublishError, match=r"transaction .* failed: injected failure"), publisher.transaction("x"):
            pass
        assert verbs(stand_in) == ["transaction"]
        assert is_clean(stand_in)

    def test_one_that_failed_half_open_is_taken_back(self, stand_in: StandIn, publisher: ServerPublisher) -> None:
        stand_in.fail("transaction", "late:1")
        with pytest.raises(PublishError, match="failed"), publisher.transaction("x"):
            pass
        assert verbs(stand_in) == ["transaction", "abort"]
        assert is_clean(stand_in)

    def test_ours_is_marked_so_that_others_see_whose_it_is(self, stand_in: StandIn, publisher: ServerPublisher) -> None:
        with publisher.transaction("x"):
            value = json.loads(stand_in.flag.read_bytes())
            assert value["pid"] == os.getpid()
            assert value["token"] == json.loads((stand_in.spool / TOKEN).read_bytes())["token"]
        assert is_clean(stand_in)

    def test_a_checked_out_snapshot_is_not_published_to(self, stand_in: StandIn, publisher: ServerPublisher) -> None:
        (stand_in.spool / "checkout").write_text("tag hash branch")
        with pytest.raises(PublishError, match="checked out"), publisher.transaction("x"):
            pass
        assert verbs(stand_in) == []

    def test_an_unmounted_repository_is_no_empty_one(self, stand_in: StandIn) -> None:
        found = Server.find(
            stand_in.name,
            configuration=str(stand_in.configuration),
            command=str(stand_in.command),
            is_mounted=lambda path: False,
        )
        publisher = ServerPublisher(found, state=str(stand_in.place / "state"))
        with pytest.raises(PublishError, match=r"not mounted.*cvmfs_server mount"):
            publisher.published()
        with pytest.raises(PublishError, match="not mounted"), publisher.lock():
            pass


class TestEnding:
    def test_the_message_names_the_images(self, stand_in: StandIn, publisher: ServerPublisher) -> None:
        publish(publisher, NAME, {"motd": b"hello"})
        (line,) = [line for line in stand_in.said() if line[0] == "publish"]
        assert line == ["publish", "-m", f"publish {NAME}", stand_in.name]

    @pytest.mark.parametrize("text", ["$(touch x)", "`id`", 'a"b', "a;b", "a\nb", "é"])
    def test_a_message_cannot_be_a_command(self, text: str) -> None:
        assert plain(f"publish {text}").isascii()
        assert not set(plain(text)) & set("$`\";\n'()\\|&<>*?")
        assert len(plain("x" * 10_000)) == 500

    def test_a_failed_publish_is_aborted_and_nothing_is_lost(
        self, stand_in: StandIn, publisher: ServerPublisher
    ) -> None:
        tree = stored(publisher, {"motd": b"hello"})
        stand_in.fail("publish", "fails")
        with pytest.raises(PublishError, match="Synchronization failed"), publisher.transaction("x") as transaction:
            transaction.publish(release(NAME, tree))
        assert verbs(stand_in) == ["transaction", "publish", "abort"]
        assert is_clean(stand_in)
        assert publisher.published() == {}
        with publisher.transaction("x") as transaction:
            record = transaction.publish(release(NAME, tree))
        assert publisher.published() == {NAME: record}

    def test_a_publish_that_fails_after_it_has_published_damages_no_root(
        self, stand_in: StandIn, publisher: ServerPublisher
    ) -> None:
        tree = stored(publisher, {"motd": b"hello"})
        with publisher.lock():
            stand_in.fail("publish", "late:1")
            with pytest.raises(PublishError, match=r"publish .* failed"), publisher.transaction("x") as transaction:
                first = transaction.publish(release(NAME, tree))
            with publisher.transaction("x") as transaction:
                again = transaction.publish(release(NAME, tree))
        assert again.root == first.root

    def test_no_root_is_looked_for_while_the_repository_may_be_unmounted(
        self, stand_in: StandIn, publisher: ServerPublisher
    ) -> None:
        with ThreadPoolExecutor(1) as asking:
            with publisher.transaction("x"):
                asked = asking.submit(publisher.root, f"sha256:{'0' * 64}", "rules")
                assert not wait([asked], timeout=0.3).done
            assert asked.result(30) is None

    def test_if_even_the_abort_fails_the_first_reason_is_told_and_the_next_run_aborts(
        self, stand_in: StandIn, publisher: ServerPublisher
    ) -> None:
        stand_in.fail("abort", "code:1")
        with pytest.raises(RuntimeError, match="first"), publisher.transaction("x"):
            (stand_in.union / "half").write_text("ours")
            raise RuntimeError("first")
        assert stand_in.flag.exists()
        with opened(stand_in).lock():
            pass
        assert verbs(stand_in) == ["transaction", "abort", "abort"]
        assert is_clean(stand_in)

    def test_ours_that_somebody_aborted_is_not_published_and_theirs_not_touched(
        self, stand_in: StandIn, publisher: ServerPublisher
    ) -> None:
        tree = stored(publisher, {"motd": b"hello"})
        with pytest.raises(PublishError, match="taken away"), publisher.transaction("x") as transaction:
            transaction.publish(release(NAME, tree))
            stand_in.flag.unlink()
            stand_in.open_foreign()
        assert verbs(stand_in) == ["transaction"]
        assert stand_in.flag.exists() and (stand_in.union / "somebody's").exists()

    def test_nothing_to_change_is_no_revision(self, stand_in: StandIn, publisher: ServerPublisher) -> None:
        with publisher.transaction("nothing"):
            pass
        assert verbs(stand_in) == ["transaction", "abort"]
        assert stand_in.revision() == 1


KILLED = """
import os, signal, sys
from pathlib import Path
from tests import test_managed_discipline as t
from unpacker.cvmfs import command
publisher = t.opened(t.StandIn(Path(sys.argv[1])))
tree = t.stored(publisher, {"motd": b"hello"})
if sys.argv[2] == "before":
    command.Running.of = lambda pid: os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "opening":
    command._ended = lambda process: os.kill(os.getpid(), signal.SIGKILL)
with publisher.transaction("x") as transaction:
    transaction.publish(t.release(t.NAME, tree))
    if sys.argv[2] == "writing":
        os.kill(os.getpid(), signal.SIGKILL)
    if sys.argv[2] == "publishing":
        command._ended = lambda process: os.kill(os.getpid(), signal.SIGKILL)
"""


def killed(stand_in: StandIn, where: str) -> None:
    """A run that died by SIGKILL, alone: what it had started lives on."""
    line = [sys.executable, "-c", KILLED, str(stand_in.place), where]
    done = subprocess.run(line, cwd=TOP, capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


def left_at_work(stand_in: StandIn) -> int:
    """The process that a killed run had started."""
    return int(json.loads((stand_in.spool / TOKEN).read_bytes())["process"][0])


class TestKilled:
    def test_before_the_command_begins_nothing_ever_begins(self, stand_in: StandIn) -> None:
        killed(stand_in, "before")
        publisher = opened(stand_in)
        with publisher.lock(10):
            pass
        assert verbs(stand_in) == []
        assert is_clean(stand_in)

    @pytest.mark.parametrize("where", ["opening", "writing", "publishing"])
    def test_anywhere_the_next_run_converges(self, stand_in: StandIn, where: str) -> None:
        killed(stand_in, where)
        publisher = opened(stand_in)
        with publisher.lock(20):
            assert is_clean(stand_in)
            assert set(publisher.published()) == ({NAME} if where == "publishing" else set())
            record = publish(publisher, NAME, {"motd": b"hello"})
            assert publisher.published()[NAME] == record
        assert verbs(stand_in).count("abort") == (0 if where == "publishing" else 1)

    def test_a_publish_that_outlives_its_run_is_waited_for_and_never_aborted(self, stand_in: StandIn) -> None:
        stand_in.fail("publish", "hang")
        killed(stand_in, "publishing")
        with pytest.raises(Busy, match="still at work"), opened(stand_in).lock():
            pass
        Timer(0.5, stand_in.go_on).start()
        with opened(stand_in).lock(20):
            assert set(opened(stand_in).published()) == {NAME}
        assert "abort" not in verbs(stand_in)

    def test_a_publish_that_died_with_its_run_is_rolled_back(self, stand_in: StandIn) -> None:
        stand_in.fail("publish", "die")
        killed(stand_in, "publishing")
        with opened(stand_in).lock(20):
            assert opened(stand_in).published() == {}
        assert verbs(stand_in)[-1] == "abort"
        assert not stand_in.flag.exists()

    def test_what_may_be_somebody_elses_is_left_to_a_person(self, stand_in: StandIn) -> None:
        """Killed with all it had started, between the opening and the marking: nothing proves whose it is."""
        stand_in.fail("transaction", "die")
        killed(stand_in, "opening")
        deadline = time.monotonic() + 30
        while Running.of(left_at_work(stand_in)).is_alive and time.monotonic() < deadline:
            time.sleep(0.02)
        assert stand_in.flag.exists()
        with pytest.raises(Busy, match="may be that: if it is nobody's, cvmfs_server abort"), opened(stand_in).lock():
            pass
        stand_in.flag.unlink()
        with opened(stand_in).lock():
            pass
        assert "abort" not in verbs(stand_in)

    def test_a_transaction_opened_after_a_killed_run_is_somebody_elses(self, stand_in: StandIn) -> None:
        killed(stand_in, "writing")
        stand_in.flag.unlink()
        stand_in.open_foreign()
        stand_in.flag.write_bytes(b'{"pid": 1, "host": "elsewhere"}')
        publisher = opened(stand_in)
        with publisher.lock():
            assert publisher.published() == {}
            with pytest.raises(Busy, match="by process 1 of elsewhere"), publisher.transaction("x"):
                pass
        assert "abort" not in verbs(stand_in)
        assert (stand_in.union / "somebody's").exists()

    def test_a_damaged_token_is_not_guessed_at(self, stand_in: StandIn) -> None:
        (stand_in.spool / TOKEN).write_text("{")
        with pytest.raises(PublishError, match="is damaged"), opened(stand_in).lock():
            pass

    def test_a_number_that_another_process_has_now_is_not_waited_for(self, stand_in: StandIn) -> None:
        value = {"token": "t", "host": "h", "pid": 1, "started": 1, "process": [os.getpid(), "another boot:1"]}
        (stand_in.spool / TOKEN).write_text(json.dumps(value))
        with opened(stand_in).lock():
            pass
        assert not (stand_in.spool / TOKEN).exists()


def test_a_command_becomes_the_owner_of_a_repository_by_a_shell_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """systemd gives what it starts as root no SHELL, and then `su` takes the owner's, which often is `nologin`."""
    monkeypatch.delenv("SHELL", raising=False)
    assert command.run(["printenv", "SHELL"], lambda process: None) == command.Done(0, "/bin/sh")
    monkeypatch.setenv("SHELL", "/bin/bash")
    assert command.run(["printenv", "SHELL"], lambda process: None) == command.Done(0, "/bin/bash")


def interruptible(script: str, stand_in: StandIn) -> subprocess.Popen[bytes]:
    """A run that SIGINT stops, also where these tests were started in the background, which ignores it."""

    def heed() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    line = [sys.executable, "-c", script, str(stand_in.place), ""]
    return subprocess.Popen(line, cwd=TOP, preexec_fn=heed)


class TestTermination:
    def test_a_signal_to_stop_ends_no_command_in_the_middle(self, stand_in: StandIn) -> None:
        script = KILLED.replace("os.kill(os.getpid(), signal.SIGKILL)", "None")
        stand_in.fail("publish", "hang")
        run = interruptible(script, stand_in)
        deadline = time.monotonic() + 30
        while "publish" not in verbs(stand_in) and time.monotonic() < deadline:
            time.sleep(0.02)
        run.send_signal(signal.SIGINT)
        stand_in.go_on()
        run.wait(30)
        assert set(opened(stand_in).published()) == {NAME}
        assert is_clean(stand_in)

    def test_a_signal_to_stop_while_one_is_being_opened_leaves_none_open(self, stand_in: StandIn) -> None:
        script = KILLED.replace("os.kill(os.getpid(), signal.SIGKILL)", "None")
        stand_in.fail("transaction", "hang")
        run = interruptible(script, stand_in)
        deadline = time.monotonic() + 30
        while not stand_in.flag.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        run.send_signal(signal.SIGINT)
        stand_in.go_on()
        run.wait(30)
        assert verbs(stand_in) == ["transaction", "abort"]
        assert is_clean(stand_in)


class TestGateway:
    """As far as a stand-in can tell: no gateway has been met."""

    @pytest.fixture
    def behind(self, tmp_path: Path) -> StandIn:
        return StandIn.make(tmp_path / "host", upstream="gw,/srv/cvmfs/x,http://gateway.example.org:4929/api/v1")

    def test_one_lease_on_the_directory_covers_all(self, behind: StandIn) -> None:
        publisher = opened(behind, "unpacked")
        record = publish(publisher, NAME, {"motd": b"hello"})
        assert behind.said()[0] == ["transaction", f"{behind.name}/unpacked"]
        assert behind.said()[1][-1] == behind.name
        outside = {path.name for path in behind.readonly.iterdir()} - {"unpacked"}
        assert outside == set()
        assert (behind.readonly / "unpacked" / record.root / "motd").read_bytes() == b"hello"
        assert (behind.readonly / "unpacked" / ".cvmfscatalog").exists()

    def test_a_busy_lease_is_waited_for(self, behind: StandIn) -> None:
        lease = behind.place / "leases" / "unpacked"
        lease.touch()
        publisher = opened(behind, "unpacked")
        with (
            pytest.raises(Busy, match=r"lease .* to another publisher"),
            publisher.lock(0.1),
            publisher.transaction("x"),
        ):
            pass
        ending = subprocess.Popen(["sh", "-c", f"sleep 0.3; rm {lease}"])
        with publisher.lock(20):
            publish(publisher, NAME, {"motd": b"hello"})
        assert ending.wait() == 0
        assert set(publisher.published()) == {NAME}


class TestBesideDucc:
    def test_its_lock_keeps_us_out_for_as_long_as_asked(
        self, stand_in: StandIn, publisher: ServerPublisher, tmp_path: Path
    ) -> None:
        path = tmp_path / "DUCC.lock"
        path.touch()
        holder = subprocess.Popen(
            [
                sys.executable,
                "-c",
                f"import fcntl,time; f=open({str(path)!r},'w'); fcntl.lockf(f, fcntl.LOCK_EX); "
                "print('held', flush=True); time.sleep(60)",
            ],
            stdout=subprocess.PIPE,
        )
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        try:
            with pytest.raises(Busy, match="DUCC is at work"), publisher.transaction("x"):
                pass
            assert verbs(stand_in) == []
        finally:
            holder.kill()
            holder.wait()
            holder.stdout.close()
        publish(publisher, NAME, {"motd": b"hello"})

    def test_it_is_kept_out_while_ours_is_open(self, publisher: ServerPublisher, tmp_path: Path) -> None:
        path = tmp_path / "DUCC.lock"
        path.touch()
        probe = f"import fcntl; f=open({str(path)!r},'w'); fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)"
        with publisher.transaction("x"):
            assert subprocess.run([sys.executable, "-c", probe], capture_output=True).returncode != 0
        assert subprocess.run([sys.executable, "-c", probe], capture_output=True).returncode == 0

    def test_without_ducc_nothing_is_made(self, publisher: ServerPublisher, tmp_path: Path) -> None:
        publish(publisher, NAME, {"motd": b"hello"})
        assert not (tmp_path / "DUCC.lock").exists()


class TestConfiguration:
    @pytest.mark.parametrize(
        "target",
        ["/cvmfs/", "/cvmfs/nodot", "/cvmfs/a.b/../c", "/cvmfs/a.b/.flat", "/cvmfs//x", "/srv/a.b", "/cvmfs/a.b//c"],
    )
    def test_what_names_no_repository_is_refused(self, target: str) -> None:
        with pytest.raises(SettingsError):
            place(target)

    def test_a_target_is_a_name_and_perhaps_a_directory(self) -> None:
        assert place("/cvmfs/unpacked.example.org") == ("unpacked.example.org", "")
        assert place("/cvmfs/unpacked.example.org/a/b/") == ("unpacked.example.org", "a/b")

    def test_a_repository_that_is_not_here_says_what_to_do(self, tmp_path: Path) -> None:
        with pytest.raises(PublishError, match=r"no repository x.example.org is managed by cvmfs_server on this host"):
            Server.find("x.example.org", configuration=str(tmp_path))

    def test_a_replica_is_refused(self, stand_in: StandIn) -> None:
        (stand_in.configuration / stand_in.name / "replica.conf").touch()
        with pytest.raises(PublishError, match="replica"):
            server(stand_in)


class TestWhatTheRepositoryKeeps:
    def test_times_and_attributes_are_recorded_as_clients_see_them(self, tmp_path: Path) -> None:
        stand_in = StandIn.make(tmp_path / "host")
        publisher = opened(stand_in)
        with publisher.lock():
            tree = stored(publisher, {"motd": b"hello"}, xattrs=(("user.a", b"1"),))
            with publisher.transaction("x") as transaction:
                record = transaction.publish(release(NAME, tree))
        assert record.altered == {"modes": 2, "xattrs": 1}
        file = stand_in.readonly / record.root / "motd"
        assert file.stat().st_mtime_ns == MTIME // 10**9 * 10**9
        assert os.listxattr(file) == []

    def test_names_that_the_official_tools_obey_are_left_out(self, publisher: ServerPublisher) -> None:
        contents = {".cvmfscatalog": b"x", "a/.cvmfsgraft-motd": b"size=5", "a/motd": b"", "a/.cvmfscatalog/deep": b"y"}
        record = publish(publisher, NAME, contents)
        assert record.altered == {"markers": 3, "modes": 2}
        assert record.entries == 2
        root = Path(publisher.layout.path, record.root)
        assert {path.name for path in root.rglob("*")} == {"a", "motd", ".cvmfscatalog"}
        assert (root / ".cvmfscatalog").read_bytes() == b""

    def test_directories_on_the_way_to_names_come_and_go_with_their_markers(
        self, stand_in: StandIn, publisher: ServerPublisher
    ) -> None:
        publish(publisher, NAME, {"motd": b"hello"})
        marked = {str(path.parent.relative_to(stand_in.readonly)) for path in stand_in.readonly.rglob(".cvmfscatalog")}
        assert {".flat", ".metadata", "registry.example.org", "registry.example.org/team"} <= marked
        assert "." not in marked and f".metadata/{NAME}" not in marked
        with publisher.transaction("x") as transaction:
            transaction.remove([NAME], now=5)
        assert not (stand_in.readonly / "registry.example.org").exists()
        assert not (stand_in.readonly / ".metadata" / "registry.example.org").exists()

    def test_nothing_of_the_transaction_itself_is_published(
        self, stand_in: StandIn, publisher: ServerPublisher
    ) -> None:
        publish(publisher, NAME, {"motd": b"hello"})
        assert {path.name for path in (stand_in.readonly / ".unpacker").iterdir()} == {"roots"}

    def test_the_union_mount_gets_files_of_their_own(self, stand_in: StandIn, publisher: ServerPublisher) -> None:
        record = publish(publisher, NAME, {"a": b"same", "b": b"same"})
        links = {path.stat().st_nlink for path in (stand_in.readonly / record.root).iterdir()}
        assert links == {1}
        assert stat.S_IMODE((stand_in.readonly / record.root / "a").stat().st_mode) == 0o644


def test_two_locks_of_one_process_do_not_undo_each_other(tmp_path: Path) -> None:
    path = tmp_path / "DUCC.lock"
    path.touch()
    with ducc.beside_ducc(0, str(path)):
        pass
    with open(path, "w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_session_without_a_token_recovers_nothing(stand_in: StandIn) -> None:
    assert Session(server(stand_in)).recover() is False
    assert OTHER != NAME


class Counting(DirectoryPublisher):
    """Notes the messages of its transactions; `busy` is what opening one comes to."""

    def __init__(self, root: str, busy: bool = False) -> None:
        super().__init__(root)
        self.messages: list[str] = []
        self._busy = busy

    @contextmanager
    def transaction(self, message: str) -> Iterator[Any]:
        self.messages.append(message)
        if self._busy:
            raise Busy("somebody else's")
        with super().transaction(message) as transaction:
            yield transaction


class TestSharing:
    """How the images of a run share transactions."""

    @pytest.fixture
    def site(self, tmp_path: Path, registry: FakeRegistry) -> Site:
        for tag in "12345":
            registry.add("org/app", tag, images.image(images.layer(images.file("x", tag.encode() * 1000))))
        return Site(tmp_path, registry)

    @pytest.mark.parametrize("bound", ["transaction_entries", "transaction_bytes"])
    def test_they_are_published_when_they_are_enough(self, site: Site, tmp_path: Path, bound: str) -> None:
        wanted = ["HOST/org/app:*"]
        for limit, alone in ((1, True), (10**9, False)):
            publisher = Counting(str(tmp_path / f"t{limit}"))
            options: dict[str, Any] = {bound: limit}
            result = reconcile(site.request(*wanted, publisher=publisher, **options))
            assert len(result.outcomes) == 5 and not any(o.error for o in result.outcomes)
            published = [message for message in publisher.messages if message.startswith("publish ")]
            assert (len(published) == 5) is alone

    def test_a_busy_target_is_asked_once_and_not_for_each_image(self, site: Site, tmp_path: Path) -> None:
        publisher = Counting(str(tmp_path / "t"), busy=True)
        result = reconcile(site.request("HOST/org/app:*", publisher=publisher))
        assert len(result.outcomes) == 5
        assert all(isinstance(outcome.error, Busy) for outcome in result.outcomes)
        assert len([message for message in publisher.messages if message.startswith("publish ")]) < 5


class TestRuns:
    """Whole runs, from a registry to what clients see."""

    @pytest.fixture
    def site(self, tmp_path: Path, registry: FakeRegistry) -> Site:
        registry.add("org/app", "1", images.image(images.layer(images.file("motd", b"hello", mode=0o600))))
        registry.add("org/app", "2", images.image(images.layer(images.file("motd", b"again"))))
        return Site(tmp_path, registry)

    def test_workers_store_in_the_pool_and_all_that_is_ready_is_one_transaction(
        self, site: Site, stand_in: StandIn
    ) -> None:
        result = reconcile(site.request("HOST/org/app:*", publisher=opened(stand_in), jobs=2))
        assert [str(outcome.error) for outcome in result.outcomes if outcome.error] == []
        for tag, text in (("1", "hello"), ("2", "again")):
            found = seen(stand_in.readonly, f"{site.fake.host}/org/app:{tag}")
            assert found is not None and found["motd"] == f"f 0644 {text}"
        assert is_clean(stand_in)
        count = len(stand_in.said())
        reconcile(site.request("HOST/org/app:*", publisher=opened(stand_in), jobs=2))
        assert len(stand_in.said()) == count, "a run in which nothing changed opens no transaction"

    def test_what_was_changed_is_found_and_published_anew_beside_it(self, site: Site, stand_in: StandIn) -> None:
        reconcile(site.request("HOST/org/app:1", publisher=opened(stand_in)))
        name = f"{site.fake.host}/org/app:1"
        before = opened(stand_in).published()[name]
        assert isinstance(before, Published)
        for tree in (stand_in.readonly, stand_in.union):
            (tree / before.root / "motd").write_text("HELLO")
        publisher = opened(stand_in)
        problems = list(
            verify(publisher.layout.path, publisher.published().values(), quick=False, unlisted=publisher.marker)
        )
        assert {problem.public_path for problem in problems} == {name}
        options: dict[str, Any] = {"rebuild": True, "damaged": frozenset({name})}
        reconcile(site.request("HOST/org/app:1", publisher=publisher, **options))
        after = opened(stand_in).published()[name]
        assert isinstance(after, Published)
        assert after.root == f"{before.root}-2"
        assert (stand_in.readonly / after.root / "motd").read_text() == "hello"
        assert (stand_in.readonly / before.root / "motd").read_text() == "HELLO"


def test_where_garbage_collection_is_forbidden_roots_go_and_objects_stay(tmp_path: Path) -> None:
    """As `cvmfs_server mkfs` makes repositories unless told otherwise."""
    Repository.create(str(tmp_path / "repo"), "try.example.org", now=1_790_000_000)
    native = Stratum0Publisher(str(tmp_path / "repo"), spool_root="/nowhere", configuration="/nowhere")
    record = publish(native, NAME, {"motd": b"hello"})
    with native.transaction("remove") as transaction:
        transaction.remove([NAME], now=1000)
    sign(Repository.open(str(tmp_path / "repo"), f"{tmp_path}/repo.keys", configuration="/nowhere"), collectable=False)
    found = unreferenced.collect(native, grace=1, keep=1, now=time.time(), dry_run=False)
    assert (found.roots, found.contents) == ((record.root,), 0)

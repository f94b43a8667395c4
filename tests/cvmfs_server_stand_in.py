"""A stand-in for `cvmfs_server`, NOT the official tool: its states, exit codes and lock files, on plain directories.

For tests of discipline only: who opens, publishes and aborts what, and what is left after a failure or a kill. It knows
nothing of catalogs, signatures, union mounts or clients; those are tested with the real tools (test_managed.py).

What it has of the real one (2.12): `transaction` ends with 17 while one is open, with 16 while a gateway's lease is
taken, with 2 where the directory above the leased one is missing, and its test of the flag and its setting of it are
two steps; the flag is an empty file of mode 0600; `publish` ends with 1 outside of a transaction or while another
publish holds `is_publishing.lock` (an flock, the file unlinked before it is let go), and leaves the transaction open
if it fails; `abort` ends with 22 outside of one, with 1 while a publish is under way, and takes no answer for a yes.

    python cvmfs_server_stand_in.py PLACE transaction|publish|abort|mount|gc …
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import shutil
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

NAME = "h-stand-in.example.org"


@dataclass(frozen=True)
class StandIn:
    """One repository below `place`, and the configuration that says so."""

    place: Path
    name: str = NAME

    @property
    def spool(self) -> Path:
        return self.place / "spool" / self.name

    @property
    def readonly(self) -> Path:
        """What clients see."""
        return self.spool / "rdonly"

    @property
    def union(self) -> Path:
        return self.place / "cvmfs" / self.name

    @property
    def flag(self) -> Path:
        return self.spool / "in_transaction.lock"

    @property
    def command(self) -> Path:
        return self.place / "cvmfs_server"

    @property
    def configuration(self) -> Path:
        return self.place / "etc"

    @classmethod
    def make(cls, place: Path, upstream: str = "S3,/tmp,bucket@config", **settings: str) -> StandIn:
        """A repository with nothing in it. `settings` are further lines of server.conf."""
        made = cls(place)
        for path in (made.readonly, made.spool / "tmp", made.union, made.configuration / made.name, place / "leases"):
            path.mkdir(parents=True)
        lines = {
            "CVMFS_SPOOL_DIR": str(made.spool),
            "CVMFS_UNION_DIR": str(made.union),
            "CVMFS_UPSTREAM_STORAGE": upstream,
            **settings,
        }
        text = "".join(f"{key}={shlex.quote(value)}\n" for key, value in lines.items())
        (made.configuration / made.name / "server.conf").write_text(text)
        made.command.write_text(
            f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -S {shlex.quote(__file__)} {shlex.quote(str(place))} "$@"\n'
        )
        made.command.chmod(0o755)
        return made

    def fail(self, verb: str, how: str) -> None:
        """The next time of a verb goes wrong: `code:N` at once, `late:N` when all is done but the end, `die` killed in
        the middle, `hang` before the middle until `go_on`."""
        (self.place / f"fail-{verb}").write_text(how)

    def go_on(self) -> None:
        """Ends what hangs."""
        (self.place / "go").touch()

    def said(self) -> list[list[str]]:
        """Every command line so far."""
        try:
            return [json.loads(line) for line in (self.place / "log").read_text().splitlines()]
        except FileNotFoundError:
            return []

    def open_foreign(self) -> None:
        """Somebody else opens a transaction and begins to write."""
        self.flag.touch(0o600)
        (self.union / "somebody's").write_text("unfinished work")

    def revision(self) -> int:
        with suppress(FileNotFoundError):
            return int((self.place / "revision").read_text())
        return 1


def main() -> None:
    place, verb, *arguments = sys.argv[1:]
    with open(f"{place}/log", "a", encoding="utf-8") as log:
        log.write(json.dumps([verb, *arguments]) + "\n")
    name, _, below = arguments[-1].partition("/")
    it = StandIn(Path(place), name)
    if not it.spool.is_dir():
        sys.exit(f"The repository {name} does not exist")
    how = _failure(it, verb)
    if how.startswith("code:"):
        print("injected failure")
        sys.exit(int(how[5:]))
    {"transaction": _transaction, "publish": _publish, "abort": _abort, "mount": _mount, "gc": _gc}[verb](
        it, below, arguments, how
    )
    sys.exit(int(how[5:]) if how.startswith("late:") else 0)


def _failure(it: StandIn, verb: str) -> str:
    path = it.place / f"fail-{verb}"
    if not path.exists():
        return ""
    how = path.read_text()
    path.unlink()
    return how


def _midway(it: StandIn, how: str) -> None:
    if how == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    deadline = time.monotonic() + 60
    while how == "hang" and not (it.place / "go").exists() and time.monotonic() < deadline:
        time.sleep(0.02)


def _transaction(it: StandIn, below: str, arguments: list[str], how: str) -> None:
    if it.flag.exists():
        print("CernVM-FS transaction error: another transaction is already open")
        sys.exit(17)
    os.close(os.open(it.flag, os.O_CREAT | os.O_RDWR, 0o600))
    if "gw," in (it.configuration / it.name / "server.conf").read_text():
        if below and not (it.readonly / below).parent.is_dir():
            it.flag.unlink()
            sys.exit(2)
        if any((it.place / "leases").iterdir()):
            it.flag.unlink()
            print("CernVM-FS transaction error: lease path busy")
            sys.exit(16)
        (it.spool / "session_token").write_text(below)
    _midway(it, how)


def _publish(it: StandIn, below: str, arguments: list[str], how: str) -> None:
    if not it.flag.exists():
        print(f"Repository {it.name} is not in a transaction")
        sys.exit(1)
    lock = _publishing(it)
    if how == "fails":
        print("Synchronization failed")
        _let_go(it, lock)
        sys.exit(1)
    fresh = it.spool / "rdonly.new"
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(it.union, fresh, symlinks=True)
    _midway(it, how)
    it.readonly.rename(it.spool / "rdonly.old")
    fresh.rename(it.readonly)
    shutil.rmtree(it.spool / "rdonly.old")
    (it.place / "revision").write_text(str(it.revision() + 1))
    it.flag.unlink()
    (it.spool / "session_token").unlink(missing_ok=True)
    _let_go(it, lock)


def _abort(it: StandIn, below: str, arguments: list[str], how: str) -> None:
    if "-f" not in arguments and sys.stdin.readline()[:1] not in ("", "y", "Y"):
        sys.exit(4)
    lock = _publishing(it)
    if not it.flag.exists():
        _let_go(it, lock)
        sys.exit(22)
    _midway(it, how)
    shutil.rmtree(it.union)
    shutil.copytree(it.readonly, it.union, symlinks=True)
    (it.spool / "session_token").unlink(missing_ok=True)
    it.flag.unlink()
    _let_go(it, lock)


def _mount(it: StandIn, below: str, arguments: list[str], how: str) -> None: ...


def _gc(it: StandIn, below: str, arguments: list[str], how: str) -> None:
    if it.flag.exists():
        sys.exit("Cannot run garbage collection while in a transaction")


def _publishing(it: StandIn) -> int:
    fd = os.open(it.spool / "is_publishing.lock", os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"Another publish process is active for {it.name}")
    return fd


def _let_go(it: StandIn, lock: int) -> None:
    (it.spool / "is_publishing.lock").unlink(missing_ok=True)
    os.close(lock)


if __name__ == "__main__":
    main()

"""Transactions of `cvmfs_server`: opened by us, published or aborted by us, and nobody else's ever touched.

Their flag file says that a transaction is open, and nothing of whose it is. So ours is told by a token, which is in
`.unpacker.transaction` in the spool area *before* the command begins, and in the flag *as soon as* it has succeeded:

    token written → transaction opened → flag marked with the token → … → published or aborted → token removed

A run that was killed anywhere leaves its token. The next one waits for what that run had started, then aborts the
transaction if its flag has this very token; in all other cases it is somebody else's.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from unpacker import logs
from unpacker.cvmfs import command, files
from unpacker.cvmfs.command import NOT_MARKED, Done, Running
from unpacker.cvmfs.ducc import beside_ducc
from unpacker.cvmfs.server import Server
from unpacker.cvmfs.spool import json_object, opener
from unpacker.errors import Busy, PublishError
from unpacker.publish import posix

log = logs.Log()

TOKEN = ".unpacker.transaction"
_POLL = 0.5
_LIMIT = 1 << 16
_MESSAGE = 500
_UNSAFE = re.compile(r"[^A-Za-z0-9 ._:/@+,=-]")
_RETRIED = (errno.EEXIST, errno.EBUSY)
"""How `cvmfs_server transaction` ends where somebody else's is open, or has the lease."""

_SLACK = 0.1
"""Seconds that a file system's clock may be behind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Token:
    """What proves that a transaction is ours, and the process that a killed run may have left at work."""

    token: str
    host: str
    pid: int
    started: int
    process: Running | None = None


class Session:
    """The one way to a transaction of the official tools. The caller holds our own lock of the target."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._path = f"{server.spool}/{TOKEN}"

    # What a killed run left ------------------------------------------------------------------------------------------

    def recover(self, wait: float = 0) -> bool:
        """Aborts the transaction that a killed run of ours left open; gives whether there was one.

        Busy if what that run had started goes on after at most `wait` seconds, or if it cannot be told whether the
        open transaction is ours.
        """
        token = self._token()
        if token is None:
            return False
        deadline = time.monotonic() + wait
        while token.process is not None and token.process.is_alive:
            if time.monotonic() >= deadline:
                raise Busy(
                    f"cvmfs_server is still at work on {self._server.name} for a run that was killed (process "
                    f"{token.process.pid}): wait for its end, or use --lock-wait"
                )
            time.sleep(_POLL)
            token = self._token() or token
        held = self._holder()
        if held == token.token:
            log.info("aborting the transaction of a killed run", repository=self._server.name, started=token.started)
            self._abort(token)
            return True
        if self._is_unmarked() and self._opened_at() >= token.started - _SLACK:
            raise Busy(
                f"{self._foreign()}; a run of unpacker (process {token.pid}) was killed while it opened one, so it may "
                f"be that: if it is nobody's, cvmfs_server abort {self._server.name}"
            )
        self._forget()
        return False

    # Opening ---------------------------------------------------------------------------------------------------------

    @contextmanager
    def transaction(self, message: str, subdirectory: str = "", wait: float = 0) -> Iterator[Opened]:
        """A transaction that is ours; Busy names the holder of another one after at most `wait` seconds of waiting.

        What was not published when the scope is left is aborted, and an exception goes through.
        """
        deadline = time.monotonic() + wait
        with beside_ducc(wait):
            opened = Opened(self, self._open(subdirectory, deadline), message)
            try:
                yield opened
            except BaseException:
                try:
                    opened.abort()
                except PublishError as error:
                    # The reason to leave is the one to tell; the token lets the next run abort it.
                    log.warning("a transaction stays open until the next run", why=str(error))
                raise
            opened.abort()

    def _open(self, subdirectory: str, deadline: float) -> _Token:
        server = self._server
        where = f"{server.name}/{subdirectory}" if subdirectory and server.is_gateway else server.name
        while True:
            server.check_trunk()
            reason = self._foreign() if self._holder() is not None else ""
            if not reason:
                token = self._new()
                try:
                    done = self._run(token, "transaction", where, mark=json.dumps(_mark(token)))
                except BaseException:
                    self._take_back(token)
                    raise
                if done.code == 0:
                    return token
                self._give_up(token, done)
                if done.code not in _RETRIED:
                    raise PublishError(f"cvmfs_server transaction {where} failed: {_said(done)}")
                busy = done.code == errno.EBUSY
                reason = f"the gateway has given the lease of {where} to another publisher" if busy else ""
            left = deadline - time.monotonic()
            if left <= 0:
                raise Busy(f"{reason or self._foreign()}; wait for its end, or use --lock-wait")
            time.sleep(min(_POLL, left))

    def _give_up(self, token: _Token, done: Done) -> None:
        """Leaves nothing of an attempt that failed: some failures leave the transaction open."""
        # Made while our command ran, which did not fail for another one's: it is ours.
        ours = self._is_unmarked() and self._opened_at() >= token.started - _SLACK
        if done.code == NOT_MARKED or (done.code not in _RETRIED and ours):
            self._abort(token)
        else:
            self._forget()

    def _take_back(self, token: _Token) -> None:
        """Leaves nothing open for who was told to stop while it was opened. What cannot be told to be ours keeps its
        token, for the next run to look at."""
        try:
            if self._holder() == token.token:
                self._abort(token)
        except PublishError as error:
            log.warning("a transaction stays open until the next run", why=str(error))

    # Ending ----------------------------------------------------------------------------------------------------------

    def publish(self, token: _Token, message: str) -> None:
        """Publishes what is in the union mount; PublishError if that fails, and then it is still open."""
        self._check_ours(token)
        done = self._run(token, "publish", "-m", plain(message), self._server.name)
        if done.code != 0:
            raise PublishError(f"cvmfs_server publish {self._server.name} failed: {_said(done)}")
        self._forget()

    def abort(self, token: _Token) -> None:
        """Takes back what was not published, if the transaction is still ours."""
        held = self._holder()
        if held is None or held != token.token:
            self._forget()
        else:
            self._abort(token)

    def _abort(self, token: _Token) -> None:
        if self._holder() is not None:
            # -f answers its questions; whose transaction it is has been asked before.
            done = self._run(token, "abort", "-f", self._server.name)
            if self._holder() is not None:
                raise PublishError(f"cvmfs_server abort -f {self._server.name} failed: {_said(done)}")
        self._forget()

    def _check_ours(self, token: _Token) -> None:
        if self._holder() != token.token:
            raise PublishError(
                f"the transaction on {self._server.name} was taken away (cvmfs_server abort?), so nothing is "
                "published: run again"
            )

    def mount(self) -> bool:
        """Brings the mounts of this host to the published revision; gives whether that went well. Nothing depends on
        it: the next transaction does the same."""
        if self._holder() is not None:
            return False
        done = command.run([self._server.command, "mount", self._server.name], lambda process: None)
        if done.code != 0:
            log.warning("mounts of this host still show an older revision", repository=self._server.name, why=done.said)
        return done.code == 0

    def collect(self, before: int) -> None:
        """Lets the official tools delete what only revisions older than this Unix time need."""
        token = self._new()
        try:
            done = self._run(token, "gc", "-f", "-t", f"@{before}", self._server.name)
        finally:
            self._forget()
        if done.code != 0:
            raise PublishError(f"cvmfs_server gc {self._server.name} failed: {_said(done)}")

    @staticmethod
    def _new() -> _Token:
        now = int(time.time())
        return _Token(token=secrets.token_hex(16), host=socket.gethostname(), pid=os.getpid(), started=now)

    def _run(self, token: _Token, verb: str, *arguments: str, mark: str | None = None) -> Done:
        marking = None if mark is None else (self._server.flag, mark)
        line = [self._server.command, verb, *arguments]
        return command.run(line, lambda process: self._write(replace(token, process=process)), mark=marking)

    # Token and flag --------------------------------------------------------------------------------------------------

    def _write(self, token: _Token) -> None:
        try:
            files.replace(self._path, json.dumps(asdict(token)).encode("ascii"), mode=0o600)
        except OSError as error:
            raise posix.failure(error, f"writing {self._path}") from error

    def _token(self) -> _Token | None:
        try:
            value = json_object(files.read(self._path, _LIMIT))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise posix.failure(error, f"reading {self._path}") from error
        try:
            process = value["process"]
            return _Token(
                token=str(value["token"]),
                host=str(value["host"]),
                pid=int(value["pid"]),
                started=int(value["started"]),
                process=None if process is None else Running(int(process[0]), str(process[1])),
            )
        except (KeyError, TypeError, ValueError, IndexError):
            raise PublishError(
                f"{self._path} is damaged: it tells whether an open transaction is ours; remove it, and if one is open "
                f"that is nobody's, cvmfs_server abort {self._server.name}"
            ) from None

    def _forget(self) -> None:
        try:
            os.unlink(self._path)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise posix.failure(error, f"removing {self._path}") from error

    def _holder(self) -> str | None:
        """The token in the flag, "" if another's is open, None if no transaction is."""
        try:
            token = json_object(files.read(self._server.flag, _LIMIT)).get("token")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise posix.failure(error, f"reading {self._server.flag}") from error
        return token if isinstance(token, str) else ""

    def _is_unmarked(self) -> bool:
        """Whether a transaction is open that nobody has marked, as the official tools leave it."""
        try:
            return os.lstat(self._server.flag).st_size == 0
        except FileNotFoundError:
            return False
        except OSError as error:
            raise posix.failure(error, f"looking at {self._server.flag}") from error

    def _opened_at(self) -> float:
        try:
            return os.lstat(self._server.flag).st_ctime
        except FileNotFoundError:
            return 0
        except OSError as error:
            raise posix.failure(error, f"looking at {self._server.flag}") from error

    def _foreign(self) -> str:
        """Whose transaction is open, and since when, as far as its flag tells."""
        opened = opener(self._server.flag)
        if opened is None:
            return f"somebody else opened a transaction on {self._server.name}"
        return f"a transaction on {self._server.name} is open, {opened} ({self._server.flag})"


class Opened:
    """A transaction of ours, until it is published or aborted."""

    def __init__(self, session: Session, token: _Token, message: str) -> None:
        self._session = session
        self._token = token
        self._message = message
        self._is_open = True

    def publish(self) -> None:
        """Makes what is in the union mount the next revision. PublishError leaves it open, to be aborted."""
        self._session.publish(self._token, self._message)
        self._is_open = False

    def abort(self) -> None:
        """Takes it back, unless that was done or it was published."""
        if self._is_open:
            self._session.abort(self._token)
            self._is_open = False


def plain(message: str) -> str:
    """A message as the official tools can take it: they hand it to a shell."""
    text = _UNSAFE.sub("_", message)
    return text if len(text) <= _MESSAGE else text[: _MESSAGE - 4] + " ..."


def _mark(token: _Token) -> dict[str, Any]:
    return {"holder": "unpacker transaction", "token": token.token, "host": token.host, "pid": token.pid}


def _said(done: Done) -> str:
    lines = [line.strip() for line in done.said.splitlines() if line.strip()]
    return " | ".join(lines[-4:]) or f"exit code {done.code}"

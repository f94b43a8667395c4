"""What the official tools keep of a repository that they manage on this host: locks, and the reference log's checksum.

    in_transaction.lock   there while a transaction is open, whoever wrote it
    is_publishing.lock    flock of the step that publishes, unlinked before it is let go
    reflog.chksum         the hash that the reference log must have; what they believe, even against the manifest

Their publish does not look whether somebody else published meanwhile: what is not kept out by the first file is lost.
"""

from __future__ import annotations

import json
import os
import pwd
import secrets
import shlex
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from unpacker.cvmfs import files
from unpacker.cvmfs.hash import ContentHash
from unpacker.errors import Busy, PublishError
from unpacker.lock import duration, exclusive
from unpacker.publish import posix

SPOOLS = "/var/spool/cvmfs"
CONFIGURATION = "/etc/cvmfs/repositories.d"

_POLL = 0.1
_LIMIT = 1 << 16
_MARK = "unpacker"


class Spool:
    """The spool directory of one repository. Everything that fails is a PublishError, or Busy."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._flag = f"{path}/in_transaction.lock"
        # Open as long as the flag is up, so that the number of its inode is given to no other file.
        self._held: int | None = None

    @classmethod
    def find(
        cls, directory: str, name: str, *, spools: str = SPOOLS, configuration: str = CONFIGURATION
    ) -> Spool | None:
        """The spool of the repository in `directory`, if the official tools manage it here.

        Another repository of the same name does not count. A replica is a PublishError: the next snapshot would undo
        what is published there.
        """
        settings = shell_settings(f"{configuration}/{name}/server.conf")
        if settings is None:
            return cls(f"{spools}/{name}") if os.path.isdir(f"{spools}/{name}") else None
        kind, _, rest = settings.get("CVMFS_UPSTREAM_STORAGE", "").partition(",")
        upstream = rest.partition(",")[2]
        if kind != "local" or os.path.realpath(upstream) != os.path.realpath(directory):
            return None
        if os.path.exists(f"{configuration}/{name}/replica.conf"):
            raise PublishError(f"{directory} is a replica of {name}, where nothing can be published: use its stratum 0")
        return cls(settings.get("CVMFS_SPOOL_DIR") or f"{spools}/{name}")

    @contextmanager
    def held(self, wait: float = 0) -> Iterator[None]:
        """Keeps the official tools out; Busy after at most `wait` seconds of waiting.

        The caller holds our own lock of the repository, so that a flag of ours that is there already is one that a
        killed process left.
        """
        deadline = time.monotonic() + wait
        publishing = f"{self.path}/is_publishing.lock"
        with ExitStack() as stack:
            try:
                files.sweep(self.path)
                self._raise_flag(deadline)
                stack.callback(self._lower_flag)
                left = max(0.0, deadline - time.monotonic())
                stack.enter_context(exclusive(publishing, f"publishing by cvmfs_server in {self.path}", left))
                # Unlinked before it is let go, as they do.
                stack.callback(_remove, publishing)
            except OSError as error:
                raise posix.failure(error, f"locking {self.path} against cvmfs_server") from error
            yield

    def clear_left_over(self) -> None:
        """Takes the flag away that a killed process of ours left. The caller holds our own lock of the repository."""
        try:
            if self._is_left_over():
                os.unlink(self._flag)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise posix.failure(error, f"removing {self._flag}") from error

    def check_held(self) -> None:
        """PublishError if somebody took our flag away, which allows others in."""
        try:
            if self._held is not None and os.path.samestat(os.lstat(self._flag), os.fstat(self._held)):
                return
        except FileNotFoundError:
            pass
        except OSError as error:
            raise posix.failure(error, f"looking at {self._flag}") from error
        raise PublishError(f"{self._flag} was taken away (cvmfs_server abort?), so nothing is published: run again")

    def checksum(self) -> ContentHash | None:
        """What the official tools expect the reference log to be, if they say."""
        try:
            return ContentHash.parse(files.read(f"{self.path}/reflog.chksum", _LIMIT).decode("ascii").strip())
        except (FileNotFoundError, ValueError):
            return None
        except OSError as error:
            raise posix.failure(error, f"reading {self.path}/reflog.chksum") from error

    def write_checksum(self, checksum: ContentHash) -> None:
        """Tells them what the reference log is now. OSError as it comes."""
        files.replace(f"{self.path}/reflog.chksum", f"{checksum}\n".encode("ascii"))

    def _raise_flag(self, deadline: float) -> None:
        temporary = f"{self.path}/{files.TEMPORARY}{os.getpid()}-{secrets.token_hex(6)}"
        value = {"holder": _MARK, "host": socket.gethostname(), "pid": os.getpid(), "started": int(time.time())}
        self._held = os.open(temporary, posix.CREATE_FLAGS, 0o644)
        try:
            posix.write_all(self._held, json.dumps(value).encode("ascii") + b"\n")
            _give_away(temporary, self.path)
            while True:
                try:
                    # A link is made whole or not at all, and never in place of another: no flag without its holder.
                    os.link(temporary, self._flag)
                    return
                except FileExistsError:
                    if self._is_left_over():
                        os.unlink(self._flag)
                    elif time.monotonic() >= deadline:
                        opened = opener(self._flag) or "by somebody else"
                        raise Busy(
                            f"a transaction of cvmfs_server is open, {opened} ({self._flag}); publish or abort it with "
                            "cvmfs_server, or wait for its end"
                        ) from None
                    else:
                        time.sleep(_POLL)
        except BaseException:
            os.close(self._held)
            self._held = None
            raise
        finally:
            os.unlink(temporary)

    def _is_left_over(self) -> bool:
        try:
            value = json_object(files.read(self._flag, _LIMIT))
        except FileNotFoundError:
            return False
        return (value.get("holder"), value.get("host")) == (_MARK, socket.gethostname())

    def _lower_flag(self) -> None:
        held, self._held = self._held, None
        if held is None:
            return
        try:
            # Never one that somebody else put in its place.
            if os.path.samestat(os.lstat(self._flag), os.fstat(held)):
                os.unlink(self._flag)
        except FileNotFoundError:
            pass
        finally:
            os.close(held)


def opener(flag: str) -> str | None:
    """Who opened the transaction of which this is the flag, and how long ago; None if it is open no more."""
    try:
        own = os.lstat(flag)
        value = json_object(files.read(flag, _LIMIT))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise posix.failure(error, f"looking at {flag}") from error
    who = f"by process {value['pid']} of {value.get('host')}" if "pid" in value else f"by {_user(own.st_uid)}"
    return f"{who}, for {duration(max(0, int(time.time() - own.st_mtime)))}"


def json_object(data: bytes) -> dict[str, Any]:
    """What a small file of JSON says; nothing where it says nothing that makes sense."""
    try:
        value = json.loads(data) if data else {}
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def _give_away(path: str, directory: str) -> None:
    """Makes root's file one of who owns the directory: the official tools may run as that user."""
    if os.geteuid() == 0:
        owner = os.stat(directory)
        os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)


def shell_settings(path: str) -> dict[str, str] | None:
    """The plain assignments of a shell file; None if it is not there."""
    try:
        text = files.read(path, _LIMIT).decode("utf-8", "surrogateescape")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise posix.failure(error, f"reading {path}") from error
    found = {}
    for line in text.splitlines():
        key, equals, value = line.strip().removeprefix("export ").partition("=")
        if equals and key.isidentifier():
            try:
                found[key] = "".join(shlex.split(value, comments=True)[:1])
            except ValueError:
                continue  # A value over several lines: none that is needed here is.
    return found

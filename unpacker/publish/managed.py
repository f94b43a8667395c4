"""Which way a repository of `cvmfs_server` is written to, and why; and the fast one of the two.

    fast    the native writer, into the storage on this host, under the locks of the official tools
    plain   transactions of `cvmfs_server`, through the union mount (`publish.server`)

Both publish the same names and roots. The fast way needs the storage; the plain way works wherever the repository does.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from unpacker.cvmfs.ducc import beside_ducc
from unpacker.cvmfs.server import Server
from unpacker.cvmfs.session import Session
from unpacker.errors import SettingsError
from unpacker.limits import Limits
from unpacker.publish.server import expiring
from unpacker.publish.stratum0 import Stratum0Publisher
from unpacker.publish.stratum0_transaction import Stratum0Transaction

AUTO, FAST, PLAIN = "auto", "fast", "plain"
WAYS = (AUTO, FAST, PLAIN)


@dataclass(frozen=True, slots=True)
class Way:
    """How a repository is written to. `because` is for people; `notes` are what this way leaves out."""

    name: str
    because: str
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name} way: {'; '.join((self.because, *self.notes))}"


def choose(server: Server, subdirectory: str, wished: str, *, layers_view: bool) -> Way:
    """The way that was wished for, or the fast one where it can be. SettingsError if what was wished cannot be."""
    obstacle = _obstacle(server, subdirectory)
    if wished == FAST and obstacle is not None:
        raise SettingsError(f"way: the fast way into {server.name} is not possible: {obstacle}")
    if wished != PLAIN and obstacle is None:
        return Way(FAST, f"its storage is on this host ({server.storage}){_asked(wished)}")
    because = obstacle or "the settings ask for it"
    return Way(PLAIN, because, tuple(_left_out(server, layers_view)))


def _obstacle(server: Server, subdirectory: str) -> str | None:
    if server.is_gateway:
        return "a gateway has its storage"
    if server.storage is None:
        return f"its storage is {server.upstream}, not a directory of this host"
    if subdirectory:
        return f"only {subdirectory} of it is ours"
    if server.restricts_access:
        return "it restricts access"
    if not os.access(server.storage, os.W_OK | os.X_OK):
        return f"its storage cannot be written to by this user ({server.storage})"
    return None


def _left_out(server: Server, layers_view: bool) -> Iterator[str]:
    if layers_view:
        yield "no layers view, because overlayfs makes no whiteouts for us"
    if not server.keeps_xattrs:
        yield "no extended attributes, because CVMFS_INCLUDE_XATTRS is not true"
    if not server.keeps_nanoseconds:
        yield "whole seconds in times, because CVMFS_ENABLE_MTIME_NS is not true"


def _asked(wished: str) -> str:
    return ", and the settings ask for it" if wished == FAST else ""


class ManagedPublisher(Stratum0Publisher):
    """The fast way: the native writer on the storage of a managed repository.

    `cvmfs_server` and DUCC are kept out while it publishes; afterwards the mounts of this host follow.
    """

    def __init__(self, server: Server, *, index: str, layers_view: bool, limits: Limits) -> None:
        assert server.storage is not None
        super().__init__(server.storage, server.keys, index=index, layers_view=layers_view, limits=limits)
        self.server = server
        self._session = Session(server)
        self._is_held = False

    def concerns(self) -> tuple[str, ...]:
        """What an operator should know before it is too late."""
        return expiring(self.server, self._clock())

    @contextmanager
    def lock(self, wait: float = 0) -> Iterator[None]:
        """As that of every native repository; what a killed run of the plain way left is rolled back first."""
        deadline = time.monotonic() + wait
        with super().lock(wait):
            if self._is_held:
                yield
                return
            self._is_held = True
            try:
                self._session.recover(max(0.0, deadline - time.monotonic()))
                self.server.check_trunk()
                try:
                    yield
                finally:
                    if self.server.is_behind():
                        # Else it is the next transaction of cvmfs_server that finds out, and repairs them.
                        self._session.mount()
            finally:
                self._is_held = False

    @contextmanager
    def transaction(self, message: str) -> Iterator[Stratum0Transaction]:
        """As that of every native repository."""
        with self.lock(self._wait), beside_ducc(self._wait), super().transaction(message) as transaction:
            yield transaction

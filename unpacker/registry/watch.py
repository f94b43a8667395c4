"""What is looked at while a connection is made and used: where it really leads, and that answers come in time.

httpx knows a timeout for each wait for bytes. That bounds nothing against a server that sends one byte before each
timeout: so the header of an answer, and each piece of a body, have a deadline as well.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpcore

from unpacker.registry.address import why_refused

READ_BYTES = 1 << 18
"""What a read takes at most. httpcore asks for a quarter of that, and what is done for each piece of a blob on its way
through it costs more than the piece itself."""


class ForbiddenPeer(Exception):
    """The connection that was just made leads to an address that is never called."""


class Watch:
    """The `trace` extension of every request of a transport (httpcore: it tells of each step). For many threads."""

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._thread = threading.local()

    def __call__(self, event: str, info: dict[str, Any]) -> None:
        if event.endswith(".connect_tcp.complete"):
            _check_peer(info["return_value"])
            self._limit(info["return_value"])
        elif event.endswith(".start_tls.complete"):
            self._limit(info["return_value"])
        elif event.endswith(".receive_response_headers.started"):
            self._thread.until = time.monotonic() + self._patience
        elif event.endswith((".receive_response_headers.complete", ".receive_response_headers.failed")):
            self._thread.until = None

    @contextmanager
    def in_time(self) -> Iterator[None]:
        """What this thread reads inside comes within our patience, or httpx raises a ReadTimeout."""
        self._thread.until = time.monotonic() + self._patience
        try:
            yield
        finally:
            self._thread.until = None

    def _limit(self, stream: Any) -> None:
        """Makes the reads of a new connection heed the deadline of whichever thread reads."""
        read = stream.read

        def read_in_time(max_bytes: int, timeout: float | None = None) -> bytes:
            until = getattr(self._thread, "until", None)
            if until is not None:
                left = until - time.monotonic()
                if left <= 0:
                    raise httpcore.ReadTimeout("the answer did not come in time")
                timeout = left if timeout is None else min(timeout, left)
            data: bytes = read(max(max_bytes, READ_BYTES), timeout)
            return data

        # On the object, because httpx lets nobody choose the class: `network_backend` is httpcore's alone.
        stream.read = read_in_time


def _check_peer(stream: Any) -> None:
    peer = stream.get_extra_info("server_addr")
    reason = why_refused(str(peer[0])) if peer else None
    if reason is not None:
        stream.close()
        raise ForbiddenPeer(reason)

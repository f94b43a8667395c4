"""The one retry policy: what is tried again, how often, and how long to wait before.

Tried again is what waiting may help (`RegistryError.temporary`): 408, 425, 429, 5xx, broken connections. The pause
doubles, with full jitter on its upper half, unless the registry says with `Retry-After` how long it wants to be left
alone; if that is longer than `RETRY_AFTER_CAP` the request fails at once, as temporary: the next run comes soon enough,
and asking earlier would only use up the same budget.
"""

from __future__ import annotations

import datetime
import email.utils
import random
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import tenacity

from unpacker.errors import RegistryError

RETRY_AFTER_CAP = 300.0
BACKOFF_CAP = 60.0
UNREACHABLE_FOR = 60.0
ILL_AFTER = 3
TEMPORARY_STATUS = frozenset({408, 425, 429})

_T = TypeVar("_T")


class Later(RegistryError):
    """A failure that waiting may help. `retry_after` is what the registry asked for in seconds, None if nothing."""

    def __init__(self, message: str, *, status: int | None = None, retry_after: float | None = None) -> None:
        super().__init__(message, status=status, temporary=True)
        self.retry_after = retry_after


class Unreachable(Later):
    """No connection came about at all."""


def is_temporary(status: int) -> bool:
    """Whether waiting may help with this HTTP status."""
    # 501 and 505 say that the server will never do it.
    return status in TEMPORARY_STATUS or (status >= 500 and status not in (501, 505))


def parse_retry_after(text: str | None, now: float) -> float | None:
    """Seconds to wait by a Retry-After header: a number or an HTTP date (RFC 9110, 10.2.3); None if it says neither."""
    if text is None:
        return None
    text = text.strip()
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]*)?", text):
        return float(text)
    try:
        date = email.utils.parsedate_to_datetime(text)
        # One of the three forms names no zone, and means Greenwich as the others do.
        zoned = date if date.tzinfo is not None else date.replace(tzinfo=datetime.UTC)
        return max(0.0, zoned.timestamp() - now)
    except (ValueError, OverflowError, OSError):
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How often, and with what first pause in seconds. `closing`, once set, ends all waiting."""

    attempts: int
    backoff: float
    closing: threading.Event

    def run(self, act: Callable[[], _T]) -> _T:
        """Calls `act` until it succeeds, fails for good, or has failed `attempts` times; raises its last error."""
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(self._again),
            stop=tenacity.stop_after_attempt(self.attempts),
            wait=self._pause,
            sleep=self.sleep,
            reraise=True,
        )
        return retrying(act)

    def _again(self, error: BaseException) -> bool:
        if not isinstance(error, Later) or self.closing.is_set():
            return False
        return (error.retry_after or 0) <= RETRY_AFTER_CAP

    def _pause(self, state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome is not None else None
        if isinstance(error, Later) and error.retry_after is not None:
            # Slightly more than asked for, and not all threads at once.
            return error.retry_after + random.uniform(0, 0.25 * self.backoff)
        return self.pause(state.attempt_number)

    def pause(self, failures: int) -> float:
        """Seconds to wait after so many failures."""
        pause = min(BACKOFF_CAP, self.backoff * 2.0 ** (failures - 1))
        return random.uniform(pause / 2, pause)

    def sleep(self, seconds: float) -> None:
        """Waits, but not beyond the end of the client."""
        self.closing.wait(seconds)


class Gate:
    """What all threads know of one host: how many may ask it at a time, and whether asking makes sense now.

    A host that was out of reach is not tried for `UNREACHABLE_FOR` seconds, and one that failed `ILL_AFTER` times in
    a row, each time after all attempts, gets one attempt at a time until it answers again: otherwise a thousand wishes
    for a dead registry would each be waited for.
    """

    def __init__(self, width: int, closing: threading.Event) -> None:
        self.slots = threading.BoundedSemaphore(width)
        self._closing = closing
        self._not_before = 0.0
        self._unreachable_until = 0.0
        self._failures = 0

    def wait(self, what: str) -> None:
        """Returns when the host may be asked again; raises at once if it was out of reach a moment ago."""
        if time.monotonic() < self._unreachable_until:
            raise RegistryError(f"{what}: not asked, because the host was out of reach a moment ago", temporary=True)
        while (pause := self._not_before - time.monotonic()) > 0 and not self._closing.is_set():
            self._closing.wait(pause)

    def hold(self, seconds: float) -> None:
        """Nobody asks this host for so many seconds: one 429 is enough for all threads."""
        self._not_before = max(self._not_before, time.monotonic() + min(seconds, RETRY_AFTER_CAP))

    def attempts(self, usual: int) -> int:
        """How often to try."""
        return usual if self._failures < ILL_AFTER else 1

    def answered(self) -> None:
        """The host is well: it gave an answer, if only that there is no such thing."""
        self._failures = 0

    def failed(self, error: RegistryError) -> None:
        """All attempts at something failed, the last one so."""
        self._failures += 1
        if isinstance(error, Unreachable):
            self._unreachable_until = time.monotonic() + UNREACHABLE_FOR

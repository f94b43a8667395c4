"""How the program ends: the exit codes that no error brings along, signals, and leaving without waiting."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import NoReturn

from unpacker.errors import PublishError, RegistryError, UnsafePlan

SOME_FAILED = 1
UNREACHABLE = RegistryError.exit_code
TARGET = PublishError.exit_code
REFUSED = UnsafePlan.exit_code
CHANGES = 10


class Stopped(BaseException):
    """SIGINT or SIGTERM: unwinds everything, so that our transaction is aborted and the journal written."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    @property
    def exit_code(self) -> int:
        return 128 + self.number


def unwind_on_signals() -> None:
    """From here on SIGINT and SIGTERM raise Stopped. The second one waits for that to have been heeded, the third one
    ends the process at once: the next run cleans up after it, as after any kill."""
    _next_signal(_stop)


def leave(code: int) -> NoReturn:
    """Ends the process without waiting for threads, which may wait for a registry that never answers."""
    with suppress(OSError, ValueError):
        sys.stderr.flush()
        sys.stdout.flush()
    os._exit(code)


def _stop(number: int, frame: FrameType | None) -> None:
    _next_signal(_be_patient)
    raise Stopped(number)


def _be_patient(number: int, frame: FrameType | None) -> None:
    # A second signal while we unwind must not break off the unwinding: most are sent by who thinks it took too long.
    _next_signal(_give_up)
    with suppress(OSError):
        os.write(2, b"unpacker: stopping, one moment; once more, and it ends at once, uncleaned until the next run\n")


def _give_up(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)


def _next_signal(handler: Callable[[int, FrameType | None], None]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)

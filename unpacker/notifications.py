"""What a run does, as events in a file: one JSON object per line, in the form of DUCC's notification file.

For what listens to DUCC already. All values are strings, as there:

    start_ducc, end_ducc    a run begins, ends
    end_flat_conversion     what came of one name: `status` is `ok`, or `error` with an `error`
    publish_flat_image      a name leads to a root: `public_path` and `private_path`, below the target

Names that are kept are no events. Nothing depends on this file: that it cannot be written is a warning.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from unpacker import logs
from unpacker.errors import SettingsError
from unpacker.execute import Progress
from unpacker.plan import Done, Outcome

log = logs.Log()

_LEADING = frozenset({Done.PUBLISHED, Done.UPDATED, Done.ADOPTED, Done.REPAIRED})
_TOLD = _LEADING | {Done.FAILED}


@contextmanager
def notified(path: str | None, progress: Progress, clock: Callable[[], float] = time.time) -> Iterator[Progress]:
    """The same progress, told to the file at `path`, too, if there is one; SettingsError if it cannot be opened."""
    if path is None:
        yield progress
        return
    try:
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o660)
    except OSError as error:
        raise SettingsError(f"cannot write to the notification_file {path}: {error.strerror}") from None
    told = _Told(path, fd, progress, clock)
    try:
        told.tell("start_ducc")
        try:
            yield told
        finally:
            told.tell("end_ducc")
    finally:
        os.close(fd)


class _Told:
    """Progress that writes events; whole lines, so that several runs may share a file."""

    def __init__(self, path: str, fd: int, progress: Progress, clock: Callable[[], float]) -> None:
        self._path = path
        self._fd = fd
        self._progress = progress
        self._clock = clock
        self._works = True

    def planned(self, actions: int) -> None:
        self._progress.planned(actions)

    def working(self, what: str) -> None:
        self._progress.working(what)

    def finished(self, outcome: Outcome) -> None:
        self._progress.finished(outcome)
        if outcome.done not in _TOLD:
            return
        path, published = outcome.action.public_path, outcome.published
        facts = {"id": str(uuid.uuid4()), "image": path, "image_request": path}
        ended = {"status": "ok"} if outcome.error is None else {"status": "error", "error": str(outcome.error)}
        elapsed = {"time_elapsed_s": f"{outcome.seconds:f}", "size_bytes": str(outcome.size)}
        self.tell("end_flat_conversion", **facts, **ended, **elapsed)
        if outcome.done in _LEADING:
            root = {} if published is None else {"private_path": published.root}
            self.tell("publish_flat_image", **facts, status="ok", public_path=path, **root)

    def tell(self, action: str, **facts: str) -> None:
        """One event, with its time and our process."""
        event = {"action": action, **facts, "time": _moment(self._clock()), "pid": str(os.getpid())}
        try:
            os.write(self._fd, json.dumps(event).encode("ascii") + b"\n")
        except OSError as error:
            if self._works:
                log.warning("events are not written any more", file=self._path, why=error.strerror)
            self._works = False


def _moment(now: float) -> str:
    """DUCC's form: ` 2 Jan 2006 - 15:04:05.000`, in local time."""
    local = time.localtime(now)
    months = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
    return (
        f"{local.tm_mday:2d} {months[local.tm_mon - 1]} {local.tm_year} - "
        f"{local.tm_hour:02d}:{local.tm_min:02d}:{local.tm_sec:02d}.{int(now % 1 * 1000):03d}"
    )

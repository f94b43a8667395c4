"""Runs `cvmfs_server`, so that it ends in order whatever becomes of this program.

It starts only when it is told to, and that is after its caller has written down its process: killed before, nothing
ever starts; killed after, the next run knows whom to wait for. Signals to stop are for this program, not for it: a
publish that is broken off in the middle is what they must not make.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Sequence
from tempfile import TemporaryFile
from typing import NamedTuple

from unpacker.errors import PublishError

NOT_MARKED = 124
"""The exit code of a transaction that was opened, and could not be marked as ours."""

_SAID = 2000
_WAIT = "read -r go || exit 125; trap '' HUP INT TERM; "
_RUN = _WAIT + 'exec "$@" </dev/null'
# dd does not make the file where somebody took it away meanwhile.
_RUN_AND_MARK = _WAIT + (
    'flag=$1 mark=$2; shift 2; "$@" </dev/null || exit $?; '
    f'printf "%s\\n" "$mark" | dd of="$flag" conv=nocreat,notrunc status=none || exit {NOT_MARKED}'
)


class Done(NamedTuple):
    """How a command ended, and the end of what it said."""

    code: int
    said: str


class Running(NamedTuple):
    """A process, told from others that have its number later."""

    pid: int
    started: str

    @classmethod
    def of(cls, pid: int) -> Running:
        return cls(pid, _started(pid) or "")

    @property
    def is_alive(self) -> bool:
        return self.started != "" and _started(self.pid) == self.started


def run(arguments: Sequence[str], ready: Callable[[Running], None], *, mark: tuple[str, str] | None = None) -> Done:
    """Runs a command to its end. `ready` hears of its process before it begins; if that raises, it never does.

    `mark` is a file and a text: if the command succeeds, it is written into the file, if that is there, even if this
    program is killed meanwhile.
    """
    script = ("/bin/sh", "-c", _RUN if mark is None else _RUN_AND_MARK, "unpacker", *(mark or ()))
    with TemporaryFile() as output:
        # A file, not a pipe: what it mounts may keep the descriptor for ever.
        try:
            process = subprocess.Popen(
                [*script, *arguments],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd="/",
                # It becomes the repository's owner by `su`, which without this takes a system user's shell: `nologin`.
                # What systemd starts as root has none.
                env={"SHELL": "/bin/sh", **os.environ, "LC_ALL": "C"},
                start_new_session=True,
            )
        except OSError as error:
            raise PublishError(f"cannot run {arguments[0]}: {error.strerror}") from error
        assert process.stdin is not None
        try:
            with process.stdin as go:
                ready(Running.of(process.pid))
                go.write(b"go\n")
        finally:
            code = _ended(process)
        size = output.seek(0, os.SEEK_END)
        output.seek(max(0, size - _SAID))
        return Done(code, output.read().decode("utf-8", "replace").strip())


def _ended(process: subprocess.Popen[bytes]) -> int:
    try:
        return process.wait()
    except BaseException:
        # Told to stop: not before this is over.
        process.wait()
        raise


def _started(pid: int) -> str | None:
    """When a process began, in ticks since the boot of that id; None if it is none, or has ended."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot = file.read().strip()
    except OSError:
        return None
    return None if fields[0] == b"Z" else f"{boot}:{fields[19].decode('ascii')}"

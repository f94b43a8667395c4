"""The lock of a target: one holder, named; released with its process; never left to a forked worker."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from unpacker.errors import Busy
from unpacker.lock import exclusive

HOLD = (
    "import sys, time\nfrom unpacker.lock import exclusive\n"
    "with exclusive(sys.argv[1], 'x'):\n    print('held', flush=True)\n    time.sleep(60)\n"
)


def held_elsewhere(path: Path, program: str = HOLD) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    return process


def test_the_holder_is_named_with_host_pid_and_age(tmp_path: Path) -> None:
    with exclusive(str(tmp_path / "lock"), "the target"):
        value = json.loads((tmp_path / "lock").read_bytes())
        assert value["pid"] == os.getpid()
        (tmp_path / "lock").write_text(json.dumps(value | {"started": int(time.time()) - 600}))
        with pytest.raises(Busy) as raised, exclusive(str(tmp_path / "lock"), "the target"):
            pass
    message = str(raised.value)
    assert message.startswith("the target is held by")
    assert f"on {os.uname().nodename}, pid {os.getpid()}, for 10 min" in message


def test_arguments_of_the_holder_are_not_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/unpacker", "reconcile", "https://user:secret@example.org/"])
    with exclusive(str(tmp_path / "lock"), "x"):
        assert json.loads((tmp_path / "lock").read_bytes())["command"] == "unpacker reconcile"


def test_a_released_lock_is_empty_stays_and_can_be_taken_again(tmp_path: Path) -> None:
    for _ in range(2):
        with exclusive(str(tmp_path / "lock"), "x"):
            pass
        assert (tmp_path / "lock").read_bytes() == b""


def test_an_exception_releases_it_and_goes_through(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"), exclusive(str(tmp_path / "lock"), "x"):
        raise RuntimeError("stop")
    with exclusive(str(tmp_path / "lock"), "x"):
        pass


def test_a_killed_holder_holds_nothing(tmp_path: Path) -> None:
    process = held_elsewhere(tmp_path / "lock")
    try:
        with pytest.raises(Busy, match=f"pid {process.pid}"), exclusive(str(tmp_path / "lock"), "x"):
            pass
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert b"pid" in (tmp_path / "lock").read_bytes()
    with exclusive(str(tmp_path / "lock"), "x"):
        pass


def test_a_forked_worker_does_not_hold_it_on(tmp_path: Path) -> None:
    program = HOLD.replace("    print", "    import os\n    if not os.fork():\n        time.sleep(60)\n    print")
    process = held_elsewhere(tmp_path / "lock", program)
    workers = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True).stdout.split()
    process.send_signal(signal.SIGKILL)
    process.wait()
    try:
        assert len(workers) == 1
        with exclusive(str(tmp_path / "lock"), "x", wait=1):
            pass
    finally:
        for worker in workers:
            os.kill(int(worker), signal.SIGKILL)
        process.communicate()


def test_waiting_is_bounded(tmp_path: Path) -> None:
    with exclusive(str(tmp_path / "lock"), "x"):
        began = time.monotonic()
        with pytest.raises(Busy), exclusive(str(tmp_path / "lock"), "x", wait=0.3):
            pass
        assert 0.3 <= time.monotonic() - began < 5


def test_who_waits_gets_it_when_it_is_free(tmp_path: Path) -> None:
    process = held_elsewhere(tmp_path / "lock", HOLD.replace("60", "0.5"))
    with exclusive(str(tmp_path / "lock"), "x", wait=30):
        pass
    process.communicate()


def test_a_lock_file_replaced_under_its_holder_is_locked_anew(tmp_path: Path) -> None:
    path = str(tmp_path / "lock")
    with exclusive(path, "x"):
        os.unlink(path)
        with exclusive(path, "x"), pytest.raises(Busy), exclusive(path, "x"):
            pass


@pytest.mark.parametrize("content", ["", "{", "[]", '{"started": "x"}'])
def test_an_unsigned_lock_is_held_by_another_process(tmp_path: Path, content: str) -> None:
    with exclusive(str(tmp_path / "lock"), "x"):
        (tmp_path / "lock").write_text(content)
        with pytest.raises(Busy, match="another process"), exclusive(str(tmp_path / "lock"), "x"):
            pass


def test_other_programs_do_not_inherit_it(tmp_path: Path) -> None:
    with exclusive(str(tmp_path / "lock"), "x"):
        process = subprocess.Popen(["sleep", "60"], close_fds=False)
    try:
        with exclusive(str(tmp_path / "lock"), "x"):
            pass
    finally:
        process.kill()
        process.wait()


def test_a_symlink_in_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError), exclusive(str(tmp_path / "lock"), "x"):
        pass
    assert not (tmp_path / "victim").exists()

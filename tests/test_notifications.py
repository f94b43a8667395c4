"""Events in the form of DUCC's notification file, for what listens to that."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from tests.fake_registry import FakeRegistry
from tests.test_cli import APP, User
from unpacker.errors import SettingsError
from unpacker.execute import Silent
from unpacker.notifications import notified


def events(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_tells_what_it_published_and_what_failed(tmp_path: Path, registry: FakeRegistry) -> None:
    registry.add("org/app", "1.0", APP)
    registry.add("org/app", "2.0", APP)
    user = User(tmp_path, registry)
    user.wishlist("HOST/org/app:1.0", "HOST/org/app:2.0")
    told = tmp_path / "told"
    done = user("reconcile", UNPACKER_NOTIFICATION_FILE=str(told))
    assert done.returncode == 0, done.stderr
    first, *middle, last = events(told)
    assert (first["action"], last["action"]) == ("start_ducc", "end_ducc")
    assert sorted(event["action"] for event in middle) == 2 * ["end_flat_conversion"] + 2 * ["publish_flat_image"]
    for event in middle:
        assert event["status"] == "ok"
    published = [event for event in middle if event["action"] == "publish_flat_image"]
    assert {event["public_path"].rpartition(":")[2] for event in published} == {"1.0", "2.0"}
    assert all(event["private_path"].startswith(".flat/") for event in published)
    assert all(isinstance(value, str) for event in (first, *middle, last) for value in event.values())
    user("reconcile", UNPACKER_NOTIFICATION_FILE=str(told))
    assert [event["action"] for event in events(told)[-2:]] == ["start_ducc", "end_ducc"], "what is kept is no event"


def test_times_are_in_the_form_that_ducc_gives(tmp_path: Path) -> None:
    now = time.mktime((2026, 1, 2, 3, 4, 5, 0, 0, -1)) + 0.25
    with notified(str(tmp_path / "told"), Silent(), lambda: now):
        pass
    (event, _) = events(tmp_path / "told")
    assert event["time"] == " 2 Jan 2026 - 03:04:05.250"
    assert re.fullmatch("[0-9]+", event["pid"])


def test_a_file_that_cannot_be_written_is_told_before_anything_is_done(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="notification_file"), notified(str(tmp_path), Silent()):
        pass


def test_a_disk_that_is_full_ends_no_run() -> None:
    with notified("/dev/full", Silent()) as progress:
        progress.planned(1)


def test_without_a_file_progress_is_as_it_was() -> None:
    silent = Silent()
    with notified(None, silent) as progress:
        assert progress is silent

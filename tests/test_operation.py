"""What an operator meets on a bad day: each message says what is wrong and what to do, once, without a traceback."""

from __future__ import annotations

import io
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fake_registry import FakeRegistry
from tests.images import file, image, layer
from tests.test_cli import APP, User
from unpacker import assembly, report
from unpacker.progress import shown
from unpacker.recipe import is_ignored
from unpacker.settings import load
from unpacker.wishlist import parse


@pytest.fixture
def user(tmp_path: Path, registry: FakeRegistry) -> User:
    registry.add("org/app", "1.0", APP)
    user = User(tmp_path, registry)
    user.wishlist("HOST/org/app:1.0")
    return user


@pytest.mark.parametrize("arguments", [["verify"], ["gc"], ["gc", "--dry-run"], ["remove", "a.org/b:1"]])
def test_a_target_that_is_not_there_is_not_taken_for_one_in_good_order(user: User, arguments: list[str]) -> None:
    done = user(*arguments)
    assert (done.returncode, done.stdout) == (5, "")
    assert "there is no target" in done.stderr
    assert not user.target.exists()


def test_a_file_in_the_place_of_the_target_is_said_as_it_is(user: User) -> None:
    user.target.write_text("")
    done = user("reconcile")
    assert done.returncode == 5
    assert "is no directory" in done.stderr


@pytest.mark.parametrize("name", ["no/such/report.md", "."])
def test_a_report_that_cannot_be_written_is_said_before_the_work(user: User, name: str) -> None:
    done = user("reconcile", "--report", name)
    assert done.returncode == 2
    assert "cannot write the report" in done.stderr
    assert not user.target.exists()


def test_a_state_directory_that_cannot_be_made_is_said_before_the_work(user: User) -> None:
    (user.path / "file").write_text("")
    done = user("reconcile", "--state", "file/state")
    assert done.returncode == 5
    assert "--state" in done.stderr
    assert not user.target.exists()


def test_a_pattern_that_fits_no_wish_is_said(user: User) -> None:
    assert "no wish matches --only other*" in user("reconcile", "--only", "other*").stderr
    assert user("reconcile", "--only", "*app*").stderr.count("no wish") == 0


def test_a_misspelt_variable_is_refused_and_the_right_one_named(user: User) -> None:
    done = user("status", UNPACKER_TARGETT="/srv")
    assert done.returncode == 2
    assert "UNPACKER_TARGETT: no such setting (is UNPACKER_TARGET meant?)" in done.stderr
    assert user("status", UNPACKER_RELEASE_NOTES="x").returncode == 0


def test_a_refused_target_leaves_no_traceback_of_the_workers(user: User) -> None:
    user.target.write_text("")
    assert "Traceback" not in user("reconcile", "--jobs", "2").stderr


def test_who_is_not_root_is_told_what_that_means_once(user: User) -> None:
    if os.geteuid() == 0:
        pytest.skip("root gives files their owners; the unprivileged run tests this")
    assert user("plan").stderr == ""
    assert "not root" in user("reconcile").stderr
    assert user("plan").stderr == user("reconcile").stderr == ""


def test_that_files_lose_their_owners_is_said_by_the_first_run_and_by_no_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    settings = load({"target": str(tmp_path / "target"), "state": str(tmp_path / "state")}, {}, None)
    for _ in range(2):
        assembly.request(parse(b"version: 2\nimages: []\n", "w"), "w", settings, assembly.Choice())
    assert capsys.readouterr().err == "", "a plan changes nothing, and every one would say it again"
    (said,) = assembly.prepare_state(settings)
    assert said.startswith("not root")
    assert assembly.prepare_state(settings) == ()


def test_cron_with_next_to_no_environment_is_enough(user: User) -> None:
    done = subprocess.run(
        [*user.command("reconcile", "--quiet", "-t", str(user.target), "--state", str(user.path / "state"))],
        cwd=user.path,
        env={"PATH": "/usr/bin:/bin", "HOME": str(user.path), "PYTHONPATH": str(Path(__file__).parent.parent)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "")
    assert (user.target / user.fake.host / "org" / "app:1.0" / "etc" / "motd").exists()


# Tables.


def test_a_table_that_does_not_fit_has_two_lines_for_each_row() -> None:
    rows = [("failed", "a.org/b:1", "", "", "no such tag"), ("published", "a.org/" + "c" * 20, "1 s", "2 kB", "new")]
    header = ("RESULT", "NAME", "TIME", "READ", "REASON")
    assert report.table(header, rows, width=40) == (
        f"failed     a.org/b:1\n    no such tag\npublished  a.org/{'c' * 20}\n    1 s  2 kB  new\n"
    )
    assert report.table(header, rows, width=80) == report.table(header, rows)
    assert report.table(header, [], width=10) == ""


def test_on_a_terminal_of_80_columns_no_line_but_a_name_is_longer(user: User) -> None:
    long = "a-group/of-people/with-an-image/whose-name-is-long"
    user.fake.add(long, "2024.12.31", image(layer(file("x", b"x"))))
    user.wishlist(f"HOST/{long}:2024*", "HOST/org/app:1.0")
    stty = shutil.which("stty")
    assert stty
    ours, theirs = pty.openpty()
    subprocess.run([stty, "cols", "80"], stdin=theirs, check=True)
    # A pty holds a few kB, which is more than this prints on stdout.
    done = subprocess.run(
        user.command("reconcile"),
        cwd=user.path,
        env={k: v for k, v in user.environment().items() if k not in ("COLUMNS", "LINES")},
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=subprocess.DEVNULL,
        timeout=60,
        check=False,
    )
    os.close(theirs)
    text = os.read(ours, 65536).decode()
    os.close(ours)
    assert done.returncode == 0
    assert f"{long}:2024.12.31" in text
    assert [line for line in text.splitlines() if len(line) > 80 and long not in line] == []


# DUCC's recipes.


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("https://a.org/b/*", "a.org/b/c:1", True),
        ("a.org/*", "a.org/b/c:1", False),
        ("a.org/[a-c]:?", "a.org/b:1", True),
        ("a.org/[^b]:?", "a.org/b:1", False),
        ("a.org/[", "a.org/[", False),
        (r"a.org/b:\*", "a.org/b:1", False),
        ("a.org/b:*", "a.org/b:*", True),
    ],
)
def test_ignored_errors_are_matched_as_go_matches_paths(pattern: str, name: str, expected: bool) -> None:
    assert is_ignored(name, [pattern]) is expected


def test_failures_that_a_recipe_ignores_are_told_and_exit_0(user: User) -> None:
    host = user.fake.host
    recipe = user.path / "recipe.yaml"
    recipe.write_text(f"version: 1\ninput: ['http://{host}/org/app:1.0', 'http://{host}/org/none:1']\n")
    assert user("reconcile", "recipe.yaml").returncode == 1
    recipe.write_text(recipe.read_text() + f"ignoreErrors: ['http://{host}/org/none:*']\n")
    done = user("reconcile", "recipe.yaml")
    assert done.returncode == 0
    assert "1 kept, 1 failed" in done.stdout


def test_progress_on_a_terminal_keeps_its_bar_beside_a_long_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    with shown(quiet=False) as progress:
        progress.planned(7)
        progress.working("registry.example.org/" + "a-long-name/" * 9 + "image:1.0")
    drawn = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", part) for part in re.split(r"[\r\n]+", screen.getvalue())]
    last = [line for line in drawn if line.strip()][-1]
    assert "0/7" in last and "registry.example.org/a-long" in last and len(last) <= 80


def test_progress_is_silent_where_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    with shown(quiet=False) as progress:
        progress.planned(7)
        progress.working("a.org/b:1")
    assert capsys.readouterr().err == ""

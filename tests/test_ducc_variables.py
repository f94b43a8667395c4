"""Variables that an operator of DUCC has set already."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fake_registry import FakeRegistry
from tests.test_cli import APP, User
from unpacker import assembly
from unpacker.errors import SettingsError
from unpacker.settings import load
from unpacker.wishlist import parse

RECIPE = b"version: 1\ninput:\n- https://r.example.org/a/b:1\nignoreErrors:\n- 'https://r.example.org/a/*'\n"


def test_the_limit_of_downloads_is_jobs_where_nothing_else_says_so(tmp_path: Path) -> None:
    config = tmp_path / "unpacker.toml"
    config.write_text("")
    theirs = {"DUCC_MAX_CONCURRENT_DOWNLOADS": "3"}
    assert load({}, theirs, str(config)).jobs == 3
    assert load({}, theirs | {"UNPACKER_JOBS": "5"}, str(config)).jobs == 5
    config.write_text("jobs = 7")
    assert load({}, theirs, str(config)).jobs == 7
    config.write_text("")
    with pytest.raises(SettingsError, match="DUCC_MAX_CONCURRENT_DOWNLOADS: jobs"):
        load({}, {"DUCC_MAX_CONCURRENT_DOWNLOADS": "many"}, str(config))


def test_the_file_of_ignored_errors_counts_like_those_of_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "ignored"
    path.write_text("# comment\n\n https://other.example.org/*/*\n")
    found = parse(RECIPE, "recipe.yaml")
    assert assembly.ignored(found, {}) == found.ignore_errors == ("https://r.example.org/a/*",)
    patterns = assembly.ignored(found, {"DUCC_IGNORE_ERRORS_FILE": str(path)})
    assert patterns == ("https://r.example.org/a/*", "https://other.example.org/*/*")
    with pytest.raises(SettingsError, match="DUCC_IGNORE_ERRORS_FILE: cannot read"):
        assembly.ignored(found, {"DUCC_IGNORE_ERRORS_FILE": str(tmp_path / "none")})


def test_a_failure_that_it_names_does_not_change_the_exit_code(tmp_path: Path, registry: FakeRegistry) -> None:
    registry.add("org/app", "1.0", APP)
    user = User(tmp_path, registry)
    user.wishlist("HOST/org/app:1.0", "HOST/org/none:1")
    assert user("reconcile").returncode == 1
    path = tmp_path / "ignored"
    path.write_text(f"http://{registry.host}/org/none:*\n")
    done = user("reconcile", DUCC_IGNORE_ERRORS_FILE=str(path))
    assert done.returncode == 0, done.stderr

"""The operator's settings: three sources, one winner, every fault named; and who a wishlist is."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from unpacker.errors import SettingsError
from unpacker.limits import Limits
from unpacker.settings import load, wishlist_identity


def test_flags_win_over_variables_and_variables_over_the_file(tmp_path: Path) -> None:
    config = tmp_path / "unpacker.toml"
    config.write_text('target = "file"\nstate = "file"\njobs = 3\n')
    found = load({"target": "flag"}, {"UNPACKER_TARGET": "variable", "UNPACKER_STATE": "variable"}, str(config))
    assert (found.target, found.state, found.jobs) == ("flag", "variable", 3)


def test_lists_in_variables_are_separated_by_commas() -> None:
    found = load({}, {"UNPACKER_INSECURE_REGISTRIES": "a:5000, b:5000", "HOME": "/nowhere"})
    assert found.insecure_registries == {"a:5000", "b:5000"}


def test_every_wrong_key_is_named_with_its_source(tmp_path: Path) -> None:
    config = tmp_path / "unpacker.toml"
    config.write_text("nonsense = 1\n[limits]\npath = 0\n[receipts]\nfoo = 1\n")
    with pytest.raises(SettingsError) as caught:
        load({}, {"UNPACKER_JOBS": "many"}, str(config))
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    assert any(line.startswith("UNPACKER_JOBS: jobs") for line in lines)
    assert sum(line.startswith(str(config)) for line in lines) == 3


@pytest.mark.parametrize("text", ["target = ", 'target = "\xff"'.encode("latin-1"), "[limits]\ntags_per_wish = -1\n"])
def test_a_file_that_is_no_toml_or_has_a_bad_limit_is_refused(tmp_path: Path, text: str | bytes) -> None:
    config = tmp_path / "unpacker.toml"
    config.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SettingsError, match=r"unpacker\.toml"):
        load({}, {}, str(config))


def test_limits_keep_their_defaults_where_the_file_is_silent(tmp_path: Path) -> None:
    config = tmp_path / "unpacker.toml"
    config.write_text("[limits]\ntags_per_wish = 7\n")
    assert load({}, {}, str(config)).limits == Limits(tags_per_wish=7)


def test_a_repository_that_may_become_public_is_checked_when_read() -> None:
    with pytest.raises(SettingsError, match="may_become_public"):
        load({"may_become_public": frozenset({"not a repository"})}, {"HOME": "/nowhere"})


def test_the_user_directory_comes_before_the_system_one(tmp_path: Path) -> None:
    (tmp_path / "unpacker").mkdir()
    (tmp_path / "unpacker" / "unpacker.toml").write_text('target = "user"\n')
    assert load({}, {"XDG_CONFIG_HOME": str(tmp_path)}).target == "user"


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"grace_day": 3}, "grace_day: no such setting (is grace_days meant?)"),
        ({"insecure_registries": "http://a:5000/"}, "is no host"),
        ({"published_at": "cvmfs/x"}, "no absolute path"),
    ],
)
def test_settings_that_could_never_work_are_told_with_what_would(values: dict[str, object], problem: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load(values, {})
    assert problem in str(caught.value)


def git(path: Path, *arguments: str) -> None:
    subprocess.run(["git", "-C", str(path), *arguments], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("remote", "identity"),
    [
        ("https://git.example.org/site/wishes.git", "https://git.example.org/site/wishes//lists/w.yaml"),
        ("https://bot:s3cret@git.example.org/site/wishes", "https://git.example.org/site/wishes//lists/w.yaml"),
        ("git@git.example.org:site/wishes.git", "git@git.example.org:site/wishes//lists/w.yaml"),
    ],
)
def test_a_wishlist_in_git_is_its_remote_and_its_path_there_without_secrets(
    tmp_path: Path, remote: str, identity: str
) -> None:
    git(tmp_path, "init")
    git(tmp_path, "remote", "add", "origin", remote)
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "w.yaml").touch()
    assert wishlist_identity(str(tmp_path / "lists" / "w.yaml")) == identity


def test_a_wishlist_outside_of_git_is_its_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert wishlist_identity("w.yaml") == str(tmp_path.resolve() / "w.yaml")


def test_without_git_a_checkout_has_no_identity_rather_than_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its path may be the same as every other's, as in a container: they would remove each other's names."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    lists = tmp_path / "lists" / "deep"
    lists.mkdir(parents=True)
    assert wishlist_identity(str(lists / "w.yaml")) == str(lists.resolve() / "w.yaml")
    (tmp_path / "lists" / ".git").mkdir()
    with pytest.raises(SettingsError, match="install git, say --wishlist-id, or set wishlist_id"):
        wishlist_identity(str(lists / "w.yaml"))

"""The files that users take from ci/ parse, and every command line we show anywhere is one that the program has."""

from __future__ import annotations

import configparser
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
import yaml
from typer.main import get_command

from tests.fake_registry import FakeRegistry
from tests.images import file, image, layer

TOP = Path(__file__).parent.parent
SHELL_ENDS = {"|", "||", "&", "&&", ";", ">", ">>", "<", "(", ")", "2>", "]"}
_WORD = re.compile(r"(?:(?<![\w./:@-])|(?<=bin/))unpacker[ \t]+(?=[a-z-])")
_CONTINUED = re.compile(r"[ \t]*\\\n[ \t]*")


# Finding command lines.


def shown_commands(path: Path) -> Iterator[list[str]]:
    """The arguments of every `unpacker …` that a file shows to be typed or run."""
    text = path.read_text()
    for line in _code(text) if path.suffix == ".md" else _uncommented(text):
        for match in _WORD.finditer(line):
            if arguments := _arguments(line[match.end() :]):
                yield arguments


def _uncommented(text: str) -> list[str]:
    return [re.sub(r"(^|\s)#.*", "", line) for line in _CONTINUED.sub(" ", text).splitlines()]


def _code(text: str) -> list[str]:
    """The code of a Markdown file: blocks that are fenced (as shell, or as nothing) or indented, and code spans."""
    lines: list[str] = []
    fence: str | None = None
    for line in _CONTINUED.sub(" ", text).splitlines():
        if mark := re.match(r"\s*```\s*(\w*)", line):
            fence = mark[1] or "sh" if fence is None else None
        elif fence is not None:
            if fence in ("sh", "bash", "shell", "console", "text"):
                lines.append(line)
        elif line.startswith("    "):
            lines.append(line)
        else:
            lines.extend(re.findall(r"`([^`]+)`", line))
    return [re.sub(r"\s#.*", "", line) for line in lines]


def _arguments(rest: str) -> list[str]:
    # A synopsis sets its explanation apart by several blanks.
    rest = re.split(r"[ \t]{3,}", rest.replace("\t", "    "))[0] if not rest.lstrip().startswith("-") else rest
    lexer = shlex.shlex(rest.replace("'", " ").replace("[", " ").replace("]", " "), posix=True, punctuation_chars=True)
    lexer.commenters = ""
    arguments: list[str] = []
    try:
        for token in lexer:
            if token in SHELL_ENDS or set(token) <= set("|&;<>()"):
                break
            arguments.append(token)
    except ValueError:  # a quote that closes on another line
        pass
    return arguments


def wrong(arguments: list[str], command: Any) -> str | None:
    """Why the program would not take these arguments; None if it would."""
    known = _flags(command)
    name = "unpacker"
    for token in arguments:
        if token.startswith("-") and token.strip("-"):
            flag = token.partition("=")[0]
            if flag not in known:
                return f"{name} has no {flag}"
        elif verbs := getattr(command, "commands", None):
            if token not in verbs:
                return f"unpacker has no verb {token}"
            command = verbs[token]
            known, name = known | _flags(command), f"unpacker {token}"
    return None


def _flags(command: Any) -> set[str]:
    flags = {"--help"}
    for parameter in command.params:
        if parameter.param_type_name == "option":
            flags.update(parameter.opts, parameter.secondary_opts)
    return flags


def documents() -> list[Path]:
    """All files that show command lines to users."""
    found = [*(TOP / "ci").iterdir(), *(TOP / "docs").rglob("*.md"), *TOP.glob("*.md"), TOP / "Dockerfile"]
    return sorted(p for p in found if p.is_file())


# The check itself can fail.


@pytest.fixture
def small() -> Any:
    app = typer.Typer()

    @app.callback()
    def top(version: Annotated[bool, typer.Option("--version")] = False) -> None: ...

    @app.command()
    def plan(wishlist: str, against: str = "", dry_run: Annotated[bool, typer.Option("-n")] = False) -> None: ...

    @app.command()
    def gc() -> None: ...

    return get_command(app)


def test_a_known_verb_with_known_flags_is_accepted(small: Any) -> None:
    assert wrong(["plan", "wishlist.yaml", "--against", "old.yaml", "-n"], small) is None
    assert wrong(["--version"], small) is None
    assert wrong(["plan", "--against=old.yaml"], small) is None


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["destroy"], "unpacker has no verb destroy"),
        (["plan", "--agianst", "x"], "unpacker plan has no --agianst"),
        (["gc", "--against", "x"], "unpacker gc has no --against"),
        (["--verbose", "plan"], "unpacker has no --verbose"),
    ],
)
def test_an_unknown_verb_or_flag_is_named(small: Any, arguments: list[str], reason: str) -> None:
    assert wrong(arguments, small) == reason


def test_command_lines_are_found_in_markdown(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "Then `unpacker gc --now` frees it. The unpacker is a tool.\n\n"
        "```sh\n$ unpacker plan wishlist.yaml \\\n    --against old.yaml | less   # look\n```\n\n"
        "```python\nfrom unpacker import plan\n```\n\n"
        "    unpacker status [WISHLIST] --target T      every wish and tag\n"
    )
    assert list(shown_commands(page)) == [
        ["gc", "--now"],
        ["plan", "wishlist.yaml", "--against", "old.yaml"],
        ["status", "WISHLIST", "--target", "T"],
    ]


def test_command_lines_are_found_in_other_files(tmp_path: Path) -> None:
    unit = tmp_path / "unit"
    unit.write_text(
        "# unpacker is explained here\n"
        "StateDirectory=unpacker\n"
        "ExecStart=/usr/local/bin/unpacker reconcile a.yaml \\\n    --jobs 4\n"
        "script:\n  - git pull && unpacker validate wishlist.yaml > log\n"
    )
    assert list(shown_commands(unit)) == [
        ["reconcile", "a.yaml", "--jobs", "4"],
        ["validate", "wishlist.yaml"],
    ]


# What we ship.


@pytest.mark.parametrize("path", documents(), ids=lambda p: str(p.relative_to(TOP)))
def test_every_command_line_shown_is_one_the_program_has(path: Path) -> None:
    from unpacker.cli import app

    command = get_command(app)
    faults = [f"unpacker {' '.join(a)}: {reason}" for a in shown_commands(path) if (reason := wrong(a, command))]
    assert faults == []


def test_the_ci_files_do_show_command_lines() -> None:
    verbs = {
        name: {a[0] for a in shown_commands(TOP / "ci" / name)} for name in ("gitlab-ci.yml", "github-workflow.yml")
    }
    assert verbs == {name: {"validate", "plan", "reconcile"} for name in verbs}
    assert {a[0] for a in shown_commands(TOP / "ci" / "unpacker.service")} == {"reconcile"}
    assert {a[0] for a in shown_commands(TOP / "ci" / "crontab")} == {"reconcile", "gc", "verify"}


def load(name: str) -> dict[Any, Any]:
    document = yaml.safe_load((TOP / "ci" / name).read_text())
    assert isinstance(document, dict)
    return document


def test_merge_requests_at_gitlab_reach_no_publisher() -> None:
    pipeline = load("gitlab-ci.yml")
    template = pipeline[".wishlist"]
    assert [rule["if"] for rule in template["rules"]] == ['$CI_PIPELINE_SOURCE == "merge_request_event"']
    for job in ("validate", "plan"):
        assert pipeline[job]["extends"] == ".wishlist"
        assert "tags" not in {**template, **pipeline[job]}
    assert pipeline["reconcile"]["tags"] == ["unpacker-publisher"]
    for rule in pipeline["reconcile"]["rules"]:
        assert rule["if"].startswith("$CI_COMMIT_BRANCH == $CI_DEFAULT_BRANCH && ")


def test_pull_requests_at_github_get_no_secret_and_no_publisher() -> None:
    workflow = load("github-workflow.yml")
    triggers = workflow[True]  # `on` is a truth value in YAML 1.1
    assert "pull_request" in triggers and "pull_request_target" not in triggers
    assert workflow["permissions"] == {"contents": "read"}
    assert "secrets." not in (TOP / "ci" / "github-workflow.yml").read_text()
    check, reconcile = workflow["jobs"]["check"], workflow["jobs"]["reconcile"]
    assert check["if"] == "github.event_name == 'pull_request'" and check["runs-on"] == "ubuntu-latest"
    assert reconcile["if"].startswith("github.event_name != 'pull_request' && ")
    assert reconcile["runs-on"] == ["self-hosted", "unpacker-publisher"]
    for job in (check, reconcile):
        for step in job["steps"]:
            # An expression inside a script would run what somebody typed into a title or a branch name.
            assert "${{" not in step.get("run", "")


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_plan_at_gitlab_shows_what_the_merge_request_changes_and_nothing_else(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    registry.add("org/app", "1.0", image(layer(file("app", b"x"))))
    wishlist = tmp_path / "wishlist.yaml"

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "init.defaultBranch=main"]
        command = ["git", *identity, *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    def commit(*names: str) -> str:
        wishlist.write_text("version: 2\nimages: [" + ", ".join(f"'http://{registry.host}/{n}'" for n in names) + "]\n")
        git("add", "--all")
        git("commit", "--quiet", "--message", "a wishlist")
        return git("rev-parse", "HEAD")

    def planned(base: str) -> str:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "CI_MERGE_REQUEST_DIFF_BASE_SHA": base}
        script = "set -e\n" + "\n".join(load("gitlab-ci.yml")["plan"]["script"])
        done = subprocess.run(["sh", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return (tmp_path / "plan.md").read_text()

    git("init", "--quiet")
    git("commit", "--quiet", "--allow-empty", "--message", "nothing yet")
    first = git("rev-parse", "HEAD")
    base = commit("org/gone:1")
    git("switch", "--quiet", "--create", "merge-request")
    commit("org/gone:1", "org/app:1.0")
    git("switch", "--quiet", "main")
    commit("org/gone:1", "org/meanwhile:1")
    git("switch", "--quiet", "merge-request")
    plan = planned(base)
    assert "org/app:1.0" in plan and "org/gone" not in plan and "org/meanwhile" not in plan
    commit("org/app:1.0")
    assert "org/app:1.0" in planned(first)


@pytest.mark.parametrize("name", ["gitlab-ci.yml", "github-workflow.yml"])
def test_the_scripts_in_pipelines_are_shell(name: str) -> None:
    found = 0
    for job in (load(name).get("jobs") or load(name)).values():
        if not isinstance(job, dict):
            continue
        steps = [step.get("run", "") for step in job.get("steps", [])]
        for script in (*steps, *job.get("before_script", []), *job.get("script", [])):
            done = subprocess.run(["sh", "-n"], input=script, capture_output=True, text=True)
            assert (done.returncode, done.stderr) == (0, ""), script
            found += 1
    assert found >= 7


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_has_nothing_to_say_against_the_units(tmp_path: Path) -> None:
    for name in ("unpacker.service", "unpacker.timer"):
        text = (TOP / "ci" / name).read_text()
        # It looks for the programs, too, which need not be on this machine.
        (tmp_path / name).write_text(re.sub(r"^(Exec\w+=)/\S+", r"\1/bin/true", text, flags=re.MULTILINE))
    paths = [str(tmp_path / "unpacker.service"), str(tmp_path / "unpacker.timer")]
    done = subprocess.run(["systemd-analyze", "verify", *paths], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_units_parse_and_belong_together() -> None:
    units = {}
    for name in ("unpacker.service", "unpacker.timer"):
        units[name] = configparser.RawConfigParser(strict=False, comment_prefixes=("#",))
        units[name].optionxform = str  # type: ignore[assignment, method-assign]
        units[name].read_string(re.sub(r"\\\n\s*", " ", (TOP / "ci" / name).read_text()))
    service = units["unpacker.service"]["Service"]
    assert service["Type"] == "oneshot"
    for hardened in ("NoNewPrivileges", "PrivateTmp", "ProtectHome", "LockPersonality"):
        assert service[hardened] == "yes"
    assert service["ProtectSystem"] == "strict"
    assert "OnUnitInactiveSec" in units["unpacker.timer"]["Timer"]


def test_cron_lines_name_their_user() -> None:
    lines = [line for line in (TOP / "ci" / "crontab").read_text().splitlines() if re.match(r"[0-9*]", line)]
    assert len(lines) == 3
    for line in lines:
        *times, user, _ = line.split(None, 6)
        assert len(times) == 5 and user == "publisher"
        assert "%" not in line, "cron reads % as the end of the line"


def test_settings_shown_in_the_documentation_are_settings() -> None:
    from unpacker.settings import Settings

    for page in [*(TOP / "docs").rglob("*.md"), *TOP.glob("*.md")]:
        for block in re.findall(r"```toml\n(.*?)```", page.read_text(), re.DOTALL):
            Settings.model_validate(tomllib.loads(block))

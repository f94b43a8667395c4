"""Whatever a user can write down is documented: verbs, flags, settings, limits, exit codes, keys of the JSON.

That the documents show nothing which does not exist is tested in test_ci_files.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from tests.fake_registry import FakeRegistry
from tests.test_cli import APP, User
from unpacker import errors
from unpacker.cli import app
from unpacker.errors import UnpackerError
from unpacker.limits import Limits
from unpacker.settings import Settings

TOP = Path(__file__).parent.parent
PAGES = sorted([*TOP.glob("*.md"), *(TOP / "docs").glob("*.md"), TOP / "ci" / "README.md"])
COMMAND: Any = get_command(app)


def flags() -> list[tuple[str, str]]:
    return [
        (verb, max(option.opts, key=len))
        for verb, command in COMMAND.commands.items()
        for option in command.params
        if option.param_type_name == "option"
    ]


def classes(of: type[UnpackerError]) -> Iterator[type[UnpackerError]]:
    yield of
    for below in of.__subclasses__():
        yield from classes(below)


def test_every_verb_is_in_the_table_of_the_readme() -> None:
    readme = (TOP / "README.md").read_text()
    table = {name for row in re.findall(r"^\| (`.*?) \|", readme, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert set(COMMAND.commands) - table == set()


def test_every_flag_has_its_line_under_its_verb_or_among_those_of_several_and_a_help_text() -> None:
    page = (TOP / "docs" / "commands.md").read_text()
    sections = {part.partition("\n")[0]: part for part in page.split("\n## ")}
    missing = [
        f"{verb} {flag}"
        for verb, flag in flags()
        if f"| `{flag}`" not in sections[verb] + sections["For several verbs"]
        or not next(o for o in COMMAND.commands[verb].params if flag in o.opts).help
    ]
    assert missing == []


def test_every_setting_and_every_limit_has_its_line() -> None:
    page = (TOP / "docs" / "settings.md").read_text()
    keys = {*Settings.model_fields, *(field.name for field in fields(Limits))} - {"limits", "receipts", "modules"}
    assert [key for key in sorted(keys) if f"| `{key}` |" not in page] == []


def test_every_exit_code_says_what_to_do() -> None:
    page = (TOP / "docs" / "operations.md").read_text()
    codes = {each.exit_code for each in classes(UnpackerError)} | {0, 10}
    assert [code for code in sorted(codes) if f"\n| {code} | " not in page] == []


def test_every_kind_of_error_is_named_where_the_json_is_explained() -> None:
    page = (TOP / "docs" / "json.md").read_text()
    public = [each.__name__ for each in classes(UnpackerError) if each.__module__ == errors.__name__]
    assert [name for name in public if f"`{name}`" not in page] == []


def test_every_key_of_the_json_is_explained(tmp_path: Path, registry: FakeRegistry) -> None:
    import json

    registry.add("org/app", "1.0", APP)
    user = User(tmp_path, registry)
    user.wishlist("HOST/org/app:1.0", "HOST/org/none:1")
    user.wishlist(name="empty.yaml")
    user.wishlist("alpine", name="faulty.yaml")
    found: set[str] = set()
    for arguments in (
        ["validate", "faulty.yaml"],
        ["plan"],
        ["plan", "--against", "empty.yaml"],
        ["reconcile"],
        ["status"],
        ["verify"],
        ["gc", "--dry-run"],
    ):
        found |= keys(json.loads(user(*arguments, "--json").stdout))
    page = (TOP / "docs" / "json.md").read_text()
    assert len(found) > 40
    assert [key for key in sorted(found) if f"`{key}`" not in page] == []


def keys(value: Any) -> set[str]:
    if isinstance(value, list):
        return {key for item in value for key in keys(item)}
    if isinstance(value, dict):
        return set(value) | {key for name, item in value.items() if name != "altered" for key in keys(item)}
    return set()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(TOP)))
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path) if path else page
        titles = re.findall(r"^#+ (.*)$", other.read_text(), re.MULTILINE) if other.is_file() else []
        anchors = [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles]
        if not other.exists() or (anchor and anchor not in anchors):
            broken.append(target)
    assert broken == []

"""Image configs made to break out of what is written from them: no field ever executes anything but itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from unpacker.additions import Addition
from unpacker.changeset import Kind
from unpacker.errors import ImageError
from unpacker.oci import ImageConfig
from unpacker.rootfs import Policy, additions, prepare
from unpacker.tree import EMPTY, Directory, File, walk

SHELLS = [
    [os.path.realpath(found), *options]
    for shell, *options in (["dash"], ["bash"], ["bash", "--posix"], ["busybox", "sh"], ["mksh"], ["ksh"])
    if (found := shutil.which(shell))
] or [["/bin/sh"]]
SHOW = b"exec /usr/bin/env -0\n"
ARGUMENTS = ["/usr/bin/printf", r"%s\0"]
QUICK = settings(max_examples=25, deadline=None)
NASTY = (
    "'",
    '"',
    "`touch pwned`",
    "$(touch pwned)",
    "${IFS}",
    "$HOME",
    "\\",
    "\n",
    "\n touch pwned \n",
    "\r\n",
    "}",
    "{",
    ";",
    "&",
    "|",
    "<",
    ">",
    "#",
    "!",
    "*",
    "~",
    "=",
    "-",
    "--",
    " ",
    "\t",
    "\x01",
    "\x1b[31m",
    "\x7f",
    "\0",
    "é",
    "\U0001f40d",
    "EOF\n",
    "\\\n",
    "x",
)
WORDS = st.lists(st.one_of(st.sampled_from(NASTY), st.text(max_size=3)), max_size=8).map("".join)


def config(**runtime: Any) -> ImageConfig:
    document = {"architecture": "amd64", "os": "linux", "rootfs": {"diff_ids": []}, "config": runtime}
    return ImageConfig.parse(json.dumps(document).encode())


def made(of: ImageConfig, name: str) -> bytes:
    found = [data for entry, data in additions(of, Policy()) if entry.path == f".singularity.d/{name}"]
    assert len(found) == 1
    return found[0]


def shown(variables: bytes) -> dict[str, str]:
    """What SHOW printed."""
    return dict(each.partition("=")[::2] for each in variables.decode("utf-8", "surrogateescape").split("\0"))


def run(shell: Sequence[str], script: bytes, directory: Path, *arguments: str, **environment: str) -> bytes:
    """What a script prints, executed where there is nothing but it; nothing else may come of it."""
    (directory / "script").write_bytes(script)
    ran = subprocess.run(
        [*shell, "script", *arguments], cwd=directory, env=environment, capture_output=True, timeout=20, check=False
    )
    assert ran.stderr == b""
    assert os.listdir(directory) == ["script"]
    return ran.stdout


@pytest.fixture(scope="module", params=SHELLS, ids=lambda words: " ".join([Path(words[0]).name, *words[1:]]))
def shell(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(scope="module")
def nowhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("nowhere")


@QUICK
@given(path=WORDS, values=st.lists(WORDS, max_size=8))
@example("".join(NASTY), [*NASTY, 'a"}b', "".join(NASTY)])
def test_variables_have_the_values_that_the_config_says(
    shell: Any, nowhere: Path, path: str, values: list[str]
) -> None:
    wanted = {"PATH": path} | {f"V{i}": value for i, value in enumerate(values)}
    script = made(config(Env=[f"{name}={value}" for name, value in wanted.items()]), "env/10-docker2singularity.sh")
    found = shown(run(shell, script + SHOW, nowhere, PATH="/never"))
    assert {name: found[name] for name in wanted} == {name: value.replace("\0", "") for name, value in wanted.items()}


def test_a_variable_that_is_set_stays_but_for_path_and_the_first_of_two_counts(shell: Any, nowhere: Path) -> None:
    variables = ["PATH=/image", "A=image", "B=image", "B=second", "C", "D=", "PATH=/second"]
    script = made(config(Env=variables), "env/10-docker2singularity.sh")
    found = shown(run(shell, script + SHOW, nowhere, PATH="/host", A="host", D="host"))
    assert [found[name] for name in ("PATH", "A", "B", "C", "D")] == ["/second", "host", "image", "", "host"]


@QUICK
@given(names=st.lists(WORDS, max_size=6))
@example(["A B", "A;touch pwned", "1A", "A-B", "A\n", "\nA", "", "É", "A$(touch pwned)", "A[0]", "\0A"])
def test_a_name_that_no_shell_has_is_left_out(shell: Any, nowhere: Path, names: list[str]) -> None:
    # `=` ends a name, so what comes after it is the value.
    variables = [f"{name.partition('=')[0]}!=value" for name in names] + ["KEPT=1"]
    script = made(config(Env=variables), "env/10-docker2singularity.sh")
    assert script.count(b"export ") == 1 and shown(run(shell, script + SHOW, nowhere))["KEPT"] == "1"


def printed(words: Sequence[str]) -> bytes:
    """What ARGUMENTS print."""
    return "".join(f"{word}\0" for word in words or [""]).encode()


_COMMANDS = st.lists(WORDS, max_size=4)


@pytest.mark.parametrize("evaluates", [True, False])
@QUICK
@given(entrypoint=_COMMANDS, cmd=_COMMANDS)
@example([], list(NASTY))
@example(list(NASTY), [])
@example(list(NASTY), list(NASTY))
def test_entrypoint_and_cmd_arrive_word_for_word(
    shell: Any, nowhere: Path, evaluates: bool, entrypoint: list[str], cmd: list[str]
) -> None:
    environment = {} if evaluates else {"SINGULARITY_NO_EVAL": "1"}
    script = made(config(Entrypoint=[*ARGUMENTS, *entrypoint], Cmd=cmd), "runscript")
    words = [word.replace("\0", "") for word in (*entrypoint, *cmd)]
    assert run(shell, script, nowhere, **environment) == printed(words)


@QUICK
@given(entrypoint=_COMMANDS, arguments=st.lists(WORDS.map(lambda word: word.replace("\0", "")), min_size=1, max_size=4))
@example([], list(filter("\0".__ne__, NASTY)))
def test_the_users_arguments_take_the_place_of_cmd_and_without_evaluation_arrive_word_for_word(
    shell: Any, nowhere: Path, entrypoint: list[str], arguments: list[str]
) -> None:
    script = made(config(Entrypoint=[*ARGUMENTS, *entrypoint], Cmd=["never"]), "runscript")
    words = [*(word.replace("\0", "") for word in entrypoint), *arguments]
    assert run(shell, script, nowhere, *arguments, SINGULARITY_NO_EVAL="1") == printed(words)


def test_a_cmd_alone_is_run_and_arguments_take_its_place(shell: Any, nowhere: Path) -> None:
    script = made(config(Cmd=[*ARGUMENTS, "a  b", "-x"]), "runscript")
    assert run(shell, script, nowhere) == b"a  b\0-x\0"
    assert run(shell, script, nowhere, "/bin/echo", "$A", SINGULARITY_NO_EVAL="1") == b"$A\n"
    assert run(shell, script, nowhere, "/bin/echo", "c  d") == b"c  d\n"


def test_a_command_that_looks_like_an_option_is_no_option_of_the_shell(shell: Any, nowhere: Path) -> None:
    (nowhere / "script").write_bytes(made(config(Entrypoint=["-v", "-x"]), "runscript"))
    ran = subprocess.run([*shell, "script"], cwd=nowhere, env={"PATH": "/never"}, capture_output=True, check=False)
    assert ran.returncode in (2, 127) and ran.stdout == b""  # `exec` of some shells takes it for an option of its own


def test_the_users_arguments_are_evaluated_as_apptainer_does_unless_told_not_to(shell: Any, nowhere: Path) -> None:
    script = made(config(Entrypoint=ARGUMENTS), "runscript")
    assert run(shell, script, nowhere, "$A", "a  b", A="1  2") == b"1  2\0a  b\0"
    assert run(shell, script, nowhere, "$A", A="1", SINGULARITY_NO_EVAL="1") == b"$A\0"


@settings(max_examples=100, deadline=None)
@given(labels=st.dictionaries(WORDS, WORDS, max_size=5))
def test_labels_are_what_the_config_says_in_ascii_on_lines_of_their_own(labels: dict[str, str]) -> None:
    data = made(config(Labels=labels), "labels.json")
    assert labels.items() <= json.loads(data).items()
    assert data.isascii() and not any(byte < 32 and byte not in b"\n\t" for byte in data)


def test_a_megabyte_of_environment_is_written_as_it_is_and_soon(shell: Any, nowhere: Path) -> None:
    value = "$(touch pwned)'\"`\n" * 6_000
    variables = [f"V{i}={value}" for i in range(70)]
    of = config(Env=[*variables, "KEPT=1"])
    script = made(of, "env/10-docker2singularity.sh")
    assert len(script) > 7 << 20
    unset = b"".join(b"unset V%d\n" % i for i in range(70))
    check = b'[ "${V69}" = "${V0}" ] && [ ${#V0} -ge 100000 ] || echo other\n'
    assert shown(run(shell, script + check + unset + SHOW, nowhere))["KEPT"] == "1"


@settings(max_examples=200, deadline=None)
@given(path=st.one_of(WORDS, st.lists(st.sampled_from(["..", ".", "", "a", "etc", "hosts", "tmp", "é", "x" * 300]))))
@example(["..", "..", "etc"])
@example("/etc/hosts/below/a/file")
@example("/.singularity.d/runscript")
@example("/" + "a/" * 3_000)
@example("\0")
def test_no_working_directory_breaks_the_tree(path: str | list[str]) -> None:
    text = path if isinstance(path, str) else "/" + "/".join(path)
    of = config(WorkingDir=text, Cmd=["true"])
    tree, _ = prepare(EMPTY, [entry for entry, _ in additions(of, Policy())], Policy())
    nodes = dict(walk(tree))
    assert isinstance(nodes[".singularity.d/runscript"], File)
    assert isinstance(nodes["etc/hosts"], File)
    assert isinstance(nodes["tmp"], Directory)
    for name in nodes:
        assert len(name.encode("utf-8", "surrogateescape")) < 4096 and "\0" not in name
        assert all(0 < len(part.encode("utf-8", "surrogateescape")) <= 255 for part in name.split("/") if name)


@pytest.mark.parametrize(
    "runtime",
    [
        {"Env": "A=1", "Entrypoint": 5, "Cmd": {"a": 1}, "WorkingDir": ["/x"], "User": 0, "Labels": ["a"]},
        {"Env": [None, 1, ["A=1"], {"A": 1}], "Cmd": [None, 1.5, True], "Labels": {"a": None, "b": {"c": []}}},
        {"Env": None, "Entrypoint": None, "Cmd": None, "WorkingDir": None, "User": None, "Labels": None},
    ],
)
def test_fields_of_other_types_cost_nothing_but_themselves(runtime: dict[str, Any]) -> None:
    paths = {entry.path for entry, _ in additions(config(**runtime), Policy())}
    assert {".singularity.d/runscript", ".singularity.d/env/10-docker2singularity.sh"} <= paths


def test_half_a_surrogate_pair_smuggled_past_json_costs_nothing_but_itself() -> None:
    raw = config(Env=["A=?"], Cmd=["?"], WorkingDir="/?", Labels={"?": "?"}).raw.replace(b"?", b"\xed\xa0\x80")
    try:
        of = ImageConfig.parse(raw)
    except ImageError:
        return
    found = [entry for entry, _ in additions(of, Policy())]
    tree, _ = prepare(EMPTY, found, Policy())
    assert isinstance(dict(walk(tree))[".singularity.d/labels.json"], File)


def test_the_same_config_gives_the_same_bytes_and_every_file_its_size() -> None:
    of = config(Env=["A=1"], Labels={"b": "1", "a": "2"})
    once: tuple[Addition, ...] = additions(of, Policy())
    assert once == additions(of, Policy())
    assert all(entry.size == len(data) for entry, data in once if entry.kind is Kind.FILE)

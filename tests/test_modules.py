"""Modulefiles and the wrapper: loaded by Lmod itself, run with a stand-in that records what apptainer is given."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tests.apptainer_tools import HOME, WORK, Apptainer, needs_apptainer, unpacker
from tests.fake_registry import FakeRegistry
from tests.publisher_contract import front, platform_release, release, stored
from tests.test_apptainer_runs import images
from tests.test_cli import User
from unpacker.errors import PublishError
from unpacker.modulefiles import Loadable, files, labels_of, lua, module_name, modulefile, wrapper
from unpacker.modules import LIST, Written, write, write_for
from unpacker.publish.directory import DirectoryPublisher
from unpacker.readers import DirectoryReader
from unpacker.settings import Modules

LMOD = next(iter(sorted(Path("/usr/share/lmod").glob("*/libexec/lmod"))), None)
LUA = next((found for name in ("lua", "lua5.4", "lua5.3", "lua5.2", "lua5.1") if (found := shutil.which(name))), None)
needs_lmod = pytest.mark.skipif(LMOD is None, reason="Lmod is not installed (apt install lmod): it has loaded nothing")
needs_lua = pytest.mark.skipif(LUA is None, reason="Lua is not installed: it has read none of our strings")
HUB = "registry.hub.docker.com"
ALPINE = f"{HUB}/library/alpine:3.10"
OLDER = f"{HUB}/library/alpine:3.9"
ATHENA = "gitlab-registry.cern.ch/atlas/athena:24.2"
MANY = "quay.io/org/many:1"
LABELS = (
    b'{"org.opencontainers.image.description": "What \\"it\\" is", "org.opencontainers.image.url": "https://x.org"}'
)


pytestmark = pytest.mark.usefixtures("no_sync")


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "target"
    publisher = DirectoryPublisher(str(path))
    with publisher.lock(), publisher.transaction("publish") as transaction:
        for seed, name in enumerate((ALPINE, OLDER, ATHENA)):
            tree = stored(publisher, {".singularity.d/labels.json": LABELS, "motd": name.encode()})
            what = release(name, tree, seed=str(seed))
            transaction.publish(replace(what, record=replace(what.record, gpu=name == ATHENA)))
        for architecture in ("amd64", "arm64"):
            tree = stored(publisher, {"motd": architecture.encode()})
            transaction.publish(platform_release(MANY, tree, f"linux/{architecture}", seed=architecture))
        transaction.point(front(publisher, MANY))
    return path


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "modules of this site"


def made(target: Path, output: Path, **site: object) -> Written:
    return write_for(str(output), DirectoryReader(str(target)), Modules.model_validate(site))


def tree(output: Path) -> set[str]:
    return {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file() and path.name[0] != "."}


ALL = {
    "bin/singularity_wrapper",
    "modulefiles/alpine/3.10.lua",
    "modulefiles/alpine/3.9.lua",
    "modulefiles/gitlab-registry.cern.ch/atlas/athena/24.2.lua",
    "modulefiles/quay.io/org/many/1.lua",
}


# -- which files ------------------------------------------------------------------------------------------------


def test_every_image_has_one_modulefile_and_several_platforms_have_one_together(target: Path, output: Path) -> None:
    assert set(made(target, output).written) == tree(output) == ALL


def test_a_second_run_writes_nothing(target: Path, output: Path) -> None:
    made(target, output)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.name != ".unpacker-modules.lock"}
    done = made(target, output)
    assert (done.written, done.removed, done.unchanged) == ((), (), 5)
    after = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.name != ".unpacker-modules.lock"}
    assert after == before


def test_an_image_that_is_gone_takes_its_modulefile_along_and_empty_directories(target: Path, output: Path) -> None:
    made(target, output)
    with DirectoryPublisher(str(target)).transaction("remove") as transaction:
        transaction.remove([ATHENA, OLDER], now=1)
    assert made(target, output).removed == (
        "modulefiles/alpine/3.9.lua",
        "modulefiles/gitlab-registry.cern.ch/atlas/athena/24.2.lua",
    )
    assert tree(output) == ALL - {
        "modulefiles/alpine/3.9.lua",
        "modulefiles/gitlab-registry.cern.ch/atlas/athena/24.2.lua",
    }
    assert not (output / "modulefiles/gitlab-registry.cern.ch").exists()


def test_what_others_wrote_there_is_never_overwritten_or_removed(target: Path, output: Path) -> None:
    for name in ("modulefiles/alpine/3.10.lua", "modulefiles/alpine/mine.lua", "bin/tool"):
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text("-- mine")
    done = made(target, output)
    assert done.foreign == ("modulefiles/alpine/3.10.lua",)
    with DirectoryPublisher(str(target)).transaction("remove") as transaction:
        transaction.remove([ALPINE, OLDER], now=1)
    made(target, output)
    for name in ("modulefiles/alpine/3.10.lua", "modulefiles/alpine/mine.lua", "bin/tool"):
        assert (output / name).read_text() == "-- mine"


def test_what_somebody_changed_since_is_not_removed(target: Path, output: Path) -> None:
    made(target, output)
    (output / "modulefiles/alpine/3.9.lua").write_text("-- changed")
    with DirectoryPublisher(str(target)).transaction("remove") as transaction:
        transaction.remove([OLDER], now=1)
    assert made(target, output).changed == ("modulefiles/alpine/3.9.lua",)
    assert (output / "modulefiles/alpine/3.9.lua").read_text() == "-- changed"


def test_a_name_whose_record_cannot_be_read_keeps_the_modulefile_that_it_has(target: Path, output: Path) -> None:
    made(target, output)
    text = (output / "modulefiles/gitlab-registry.cern.ch/atlas/athena/24.2.lua").read_text()
    (target / ".metadata" / ATHENA / "record.json").write_text("damaged")
    done = made(target, output)
    assert (done.written, done.removed) == ((), ())
    assert (output / "modulefiles/gitlab-registry.cern.ch/atlas/athena/24.2.lua").read_text() == text


def test_what_another_tool_published_has_a_modulefile_too(target: Path, output: Path) -> None:
    (target / "ghcr.io/ducc").mkdir(parents=True)
    (target / "ghcr.io/ducc/made:1").symlink_to("../../.flat/aa/x")
    assert "modulefiles/ghcr.io/ducc/made/1.lua" in made(target, output).written


def test_a_target_that_cannot_be_read_removes_nothing(
    target: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(target, output)
    monkeypatch.setattr(os, "scandir", _refuse)
    with pytest.raises(PublishError):
        made(target, output)
    monkeypatch.undo()
    assert tree(output) == ALL


def _refuse(path: str) -> None:
    raise PermissionError(13, "Permission denied", path)


def test_a_damaged_list_of_what_is_ours_is_an_error_that_says_what_to_do(target: Path, output: Path) -> None:
    made(target, output)
    for text in ("", "[]", '{"files": 7}', "{"):
        (output / LIST).write_text(text)
        if not text:
            continue
        with pytest.raises(PublishError, match="remove that file"):
            made(target, output)
    assert tree(output) == ALL


def test_a_list_that_names_files_elsewhere_removes_none(target: Path, output: Path, tmp_path: Path) -> None:
    made(target, output)
    outside = tmp_path / "outside"
    outside.write_text("x")
    listed = json.loads((output / LIST).read_text())
    digest = "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"
    listed["files"] |= {"../outside": digest, str(outside): digest}
    (output / LIST).write_text(json.dumps(listed))
    made(target, output)
    assert outside.read_text() == "x"


def test_a_symlink_on_the_way_makes_no_file_elsewhere_ours_to_remove(
    target: Path, output: Path, tmp_path: Path
) -> None:
    made(target, output)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "passwd").write_text("x")
    (output / "way").symlink_to(elsewhere)
    listed = json.loads((output / LIST).read_text())
    listed["files"]["way/passwd"] = hashlib.sha256(b"x").hexdigest()
    (output / LIST).write_text(json.dumps(listed))
    assert made(target, output).changed == ("way/passwd",)
    assert (elsewhere / "passwd").read_text() == "x"


def test_a_directory_on_which_nothing_is_mounted_removes_nothing(target: Path, output: Path) -> None:
    made(target, output)
    target.rename(target.with_name("was mounted"))
    target.mkdir()
    with pytest.raises(PublishError, match="mounted"):
        made(target, output)
    assert tree(output) == ALL


def test_an_image_whose_module_would_lie_below_that_of_another_stops_nobody(output: Path) -> None:
    images = [Loadable(name=name, path="/x", labels={}) for name in ("q.io/a:1", "q.io/a/1.lua:2", "q.io/b:1")]
    wanted = files(images, "", "/bin")
    assert len(wanted) == 4
    for _ in range(2):
        assert write(str(output), wanted).foreign == ()
        assert tree(output) == {f"modulefiles/q.io/{name}/1.lua" for name in "ab"} | {"bin/singularity_wrapper"}


def test_what_others_put_where_a_directory_belongs_keeps_out_only_what_would_be_in_it(
    target: Path, output: Path
) -> None:
    (output / "modulefiles").mkdir(parents=True)
    (output / "modulefiles/alpine").write_text("mine")
    done = made(target, output)
    assert done.foreign == ("modulefiles/alpine/3.10.lua", "modulefiles/alpine/3.9.lua")
    assert set(done.written) == ALL - set(done.foreign)
    assert (output / "modulefiles/alpine").read_text() == "mine"


def test_what_somebody_put_in_the_place_of_a_modulefile_stays(target: Path, output: Path) -> None:
    made(target, output)
    for name in ("3.9.lua", "3.10.lua"):
        (output / "modulefiles/alpine" / name).unlink()
    (output / "modulefiles/alpine/3.9.lua").symlink_to("mine")
    (output / "modulefiles/alpine/3.10.lua").mkdir()
    for _ in range(2):
        assert made(target, output).foreign == ("modulefiles/alpine/3.10.lua", "modulefiles/alpine/3.9.lua")
    assert (output / "modulefiles/alpine/3.9.lua").is_symlink()


@pytest.mark.parametrize("survivors", range(7))
def test_stopped_at_any_file_the_next_run_knows_what_is_ours(
    output: Path, survivors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that dies after some replacements leaves whole files, and nothing that the next one takes for others'."""
    first = {f"modulefiles/a/{n}.lua": f"-- {n}" for n in range(3)}
    second = {f"modulefiles/a/{n}.lua": f"-- new {n}" for n in range(2, 5)}
    write(str(output), first)
    calls = iter(range(100))
    replace_file = os.replace

    def dies(*arguments: str) -> None:
        if next(calls) == survivors:
            raise KeyboardInterrupt
        replace_file(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dies)
        try:
            write(str(output), second)
        except KeyboardInterrupt:
            assert survivors < 5
    assert {path.read_text() for path in output.rglob("*.lua")} <= {*first.values(), *second.values()}
    done = write(str(output), second)
    assert (done.foreign, done.changed) == ((), ())
    assert tree(output) == set(second)


def test_two_runs_at_once_take_turns_or_are_told(target: Path, output: Path) -> None:
    from unpacker import lock
    from unpacker.errors import Busy

    output.mkdir()
    with lock.exclusive(f"{output}/.unpacker-modules.lock", "it"), pytest.raises(Busy):
        made(target, output)


@pytest.mark.parametrize(
    ("public", "module"),
    [
        (ALPINE, "alpine/3.10"),
        ("docker.io/rootproject/root:6.30", "rootproject/root/6.30"),
        ("docker.io/alpine:1", "alpine/1"),
        ("ghcr.io/org/tool:1.0", "ghcr.io/org/tool/1.0"),
        ("localhost:5000/tool:1", "localhost-5000/tool/1"),
        (f"ghcr.io/org/tool:sha256:{'a' * 64}", f"ghcr.io/org/tool/sha256-{'a' * 64}"),
    ],
)
def test_a_module_is_called_as_users_call_the_image(public: str, module: str) -> None:
    assert module_name(public) == module


def test_two_spellings_of_docker_hub_are_one_module_the_first_by_its_name() -> None:
    images = [Loadable(name=f"{hub}/library/alpine:1", path=f"/{hub}", labels={}) for hub in (HUB, "docker.io")]
    for order in (images, images[::-1]):
        found = files(order, "", "/bin")
        assert len(found) == 2
        assert "/docker.io" in found["modulefiles/alpine/1.lua"]


def test_a_tag_that_is_spelled_like_a_digest_does_not_take_its_module() -> None:
    names = {name: f"q.io/a:sha256{sign}{'c' * 64}" for name, sign in (("tag", "-"), ("digest", ":"))}
    found = files([Loadable(name=name, path=f"/{path}", labels={}) for path, name in names.items()], "", "/bin")
    assert len(found) == 2
    assert "/digest" in found[f"modulefiles/q.io/a/sha256-{'c' * 64}.lua"]


# -- hostile ----------------------------------------------------------------------------------------------------

NASTY = (
    'quote " and \\ backslash',
    "]] .. os.execute('touch /tmp/pwned') .. [[",
    '"); os.execute("touch /tmp/pwned"); --',
    "line\nbreak\r\ttab",
    "nul \0 and \x1b[31m escape",
    "caf\u00e9 \u202e \U0001f600",
    "\udce9 not utf-8",
    "\\065\\10",
    "${x} $(x) `x` %s %d",
    "9" * 5000,
)


@needs_lua
@pytest.mark.parametrize("text", NASTY)
def test_a_string_of_lua_is_the_text_byte_for_byte(text: str) -> None:
    assert LUA is not None
    program = f"io.write({lua(text)})"
    assert program.isascii()
    assert program.isprintable()
    done = subprocess.run([LUA, "-e", program], capture_output=True, timeout=10)
    assert done.stdout == text.encode("utf-8", "surrogateescape"), done.stderr
    assert not os.path.exists("/tmp/pwned")


@pytest.mark.parametrize(
    "data", [None, b"", b"[]", b"{", b'{"a": 1, "b": ["x"], "c": null}', b"[" * 100_000, b"\xff", b'{"a": {"b": "c"}}']
)
def test_labels_that_are_none_are_no_labels(data: bytes | None) -> None:
    assert labels_of(data) == {}


def test_labels_reached_through_symlinks_out_of_the_root_are_not_read(tmp_path: Path, output: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "labels.json").write_bytes(LABELS)
    publisher = DirectoryPublisher(str(tmp_path / "target"))
    with publisher.lock(), publisher.transaction("publish") as transaction:
        transaction.publish(release(ALPINE, stored(publisher, {".singularity.d": str(secret)}), seed="1"))
        inner = {".singularity.d/labels.json": f"{secret}/labels.json"}
        transaction.publish(release(OLDER, stored(publisher, inner), seed="2"))
    made(tmp_path / "target", output)
    for version in ("3.10", "3.9"):
        assert "What" not in (output / f"modulefiles/alpine/{version}.lua").read_text()


@needs_lua
@pytest.mark.parametrize("text", NASTY)
def test_labels_cannot_become_lua(text: str, tmp_path: Path) -> None:
    assert LUA is not None
    labels = {"org.opencontainers.image.description": text, "org.opencontainers.image.url": text}
    content = modulefile(Loadable(name=ALPINE, path=f"/x/{text}", labels=labels), "/bin")
    stub = "local n = 0; function count() n = n + 1 end; help, whatis, family, setenv, prepend_path = "
    stub += "count, count, count, count, count\n"
    (tmp_path / "m.lua").write_text(stub + content + "print(n)\n", encoding="ascii")
    done = subprocess.run([LUA, str(tmp_path / "m.lua")], capture_output=True, text=True, timeout=10)
    assert done.stdout.strip() == "9", done.stderr
    assert not os.path.exists("/tmp/pwned")


def test_what_an_image_says_of_itself_cannot_move_the_cursor() -> None:
    labels = {"description": "a\x1b[2J\r\n\u202eb\x9b", "org.opencontainers.image.url": "\x1b\n"}
    text = modulefile(Loadable(name=ALPINE, path="/x", labels=labels), "/bin")
    assert 'whatis("Description: a [2J b")' in text
    assert "URL" not in text and "\\027" not in text


# -- Lmod -------------------------------------------------------------------------------------------------------


def loaded(output: Path, *modules: str, verb: str = "load") -> dict[str, str]:
    """The environment after Lmod itself did something with modules."""
    assert LMOD is not None
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(output.parent), "MODULEPATH": f"{output}/modulefiles"}
    command = f'eval "$({LMOD} bash {verb} {" ".join(modules)})" && env -0'
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()
    found = dict(item.split("=", 1) for item in done.stdout.decode().split("\0") if "=" in item)
    return found | {"stderr": done.stderr.decode()}


@needs_lmod
def test_lmod_loads_an_image_by_name_and_version(target: Path, output: Path) -> None:
    made(target, output)
    found = loaded(output, "alpine/3.9")
    assert found["SING_IMAGE"] == f"{target}/{OLDER}"
    assert found["SING_GPU"] == "0"
    assert found["PATH"].split(":")[0] == f"{output}/bin"
    assert shutil.which("singularity_wrapper", path=found["PATH"]) == f"{output}/bin/singularity_wrapper"


@needs_lmod
def test_without_a_version_lmod_takes_the_highest(target: Path, output: Path) -> None:
    made(target, output)
    assert loaded(output, "alpine")["SING_IMAGE"] == f"{target}/{ALPINE}"


@needs_lmod
def test_an_image_of_another_registry_is_loaded_with_that_in_front_and_its_gpu(target: Path, output: Path) -> None:
    made(target, output)
    found = loaded(output, "gitlab-registry.cern.ch/atlas/athena/24.2")
    assert (found["SING_IMAGE"], found["SING_GPU"]) == (f"{target}/{ATHENA}", "1")


@needs_lmod
def test_one_image_takes_the_place_of_another(target: Path, output: Path) -> None:
    made(target, output)
    found = loaded(output, "alpine/3.9", "quay.io/org/many")
    assert found["SING_IMAGE"] == f"{target}/{MANY}"
    assert found["PATH"].split(":").count(f"{output}/bin") == 1


@needs_lmod
def test_lmod_shows_what_the_image_says_of_itself(target: Path, output: Path) -> None:
    made(target, output)
    assert 'What "it" is' in loaded(output, "alpine/3.10", verb="whatis")["stderr"]
    shown = loaded(output, "alpine/3.10", verb="help")["stderr"]
    assert "https://x.org" in shown
    assert "singularity_wrapper exec" in shown


# -- the wrapper ------------------------------------------------------------------------------------------------


@pytest.fixture
def argv(tmp_path: Path) -> Path:
    """A stand-in for apptainer that writes its arguments there, each ended by NUL."""
    stand_in = tmp_path / "site bin"
    stand_in.mkdir()
    (stand_in / "apptainer").write_text(f'#!/bin/sh\nprintf "%s\\0" "$@" > "{tmp_path}/argv"\n')
    (stand_in / "apptainer").chmod(0o755)
    return tmp_path / "argv"


def given(argv: Path, script: str, *arguments: str, code: int = 0, **environment: str) -> list[str]:
    """What the stand-in is given when the wrapper is called so."""
    path = argv.parent / "wrapper"
    path.write_text(script)
    argv.unlink(missing_ok=True)
    done = subprocess.run(
        ["sh", str(path), *arguments],
        env={"PATH": f"{argv.parent}/site bin:/usr/bin:/bin", **environment},
        cwd=argv.parent,
        capture_output=True,
        timeout=10,
    )
    assert done.returncode == code, done.stderr
    return argv.read_bytes().decode().split("\0")[:-1] if argv.exists() else [done.stderr.decode()]


IMAGE = "/cvmfs/unpacked.example.org/ghcr.io/org/a b:1"
PLAIN = wrapper("apptainer", (), ("--nv",))


def test_exec_run_and_shell_become_what_apptainer_is_given(argv: Path) -> None:
    here = str(argv.parent)
    odd = ["a b", "", "*", "$HOME", "it's", "-x", "--", "a\nb"]
    for verb in ("exec", "run"):
        assert given(argv, PLAIN, verb, *odd, SING_IMAGE=IMAGE) == [verb, "--pwd", here, IMAGE, *odd]
    assert given(argv, PLAIN, "run", SING_IMAGE=IMAGE) == ["run", "--pwd", here, IMAGE]
    assert given(argv, PLAIN, "shell", SING_IMAGE=IMAGE) == ["shell", "--pwd", here, IMAGE]
    assert given(argv, PLAIN, "shell", "zsh", "-l", SING_IMAGE=IMAGE) == ["exec", "--pwd", here, IMAGE, "zsh", "-l"]


def test_the_paths_of_the_site_are_bound_in_order_if_they_are_there(argv: Path) -> None:
    odd = argv.parent / "it's $HOME"
    odd.mkdir()
    script = wrapper("apptainer", ("/usr", "/does/not/exist", str(odd), "/etc:/mnt:ro"), ("--nv",))
    assert given(argv, script, "exec", "x", SING_IMAGE=IMAGE)[3:] == [
        "--bind", "/usr", "--bind", str(odd), "--bind", "/etc:/mnt:ro", IMAGE, "x",
    ]  # fmt: skip


def test_an_image_that_wants_a_gpu_gets_the_options_of_the_site(argv: Path) -> None:
    script = wrapper("apptainer", (), ("--rocm", "--env", "A=b c"))
    assert given(argv, script, "exec", "x", SING_IMAGE=IMAGE, SING_GPU="1")[3:] == [
        "--rocm", "--env", "A=b c", IMAGE, "x",
    ]  # fmt: skip
    assert given(argv, script, "exec", "x", SING_IMAGE=IMAGE, SING_GPU="0")[3:] == [IMAGE, "x"]


def test_a_site_without_gpu_options_gives_none(argv: Path) -> None:
    assert given(argv, wrapper("apptainer", (), ()), "run", SING_IMAGE=IMAGE, SING_GPU="1")[3:] == [IMAGE]


def test_flags_of_the_user_are_words_and_never_patterns(argv: Path) -> None:
    found = given(argv, PLAIN, "exec", "x", SING_IMAGE=IMAGE, SING_FLAGS="--cleanenv --bind /* $(id)")
    assert found[3:] == ["--cleanenv", "--bind", "/*", "$(id)", IMAGE, "x"]


@pytest.mark.parametrize("arguments", [[], ["fly"], ["exec"], ["--help"]])
def test_wrong_use_is_told_and_runs_nothing(argv: Path, arguments: list[str]) -> None:
    assert "usage: singularity_wrapper" in given(argv, PLAIN, *arguments, code=2, SING_IMAGE=IMAGE)[0]


def test_without_a_module_it_says_what_to_do(argv: Path) -> None:
    assert "load the module" in given(argv, PLAIN, "run", code=2)[0]


def test_the_exit_code_is_that_of_the_command(argv: Path, tmp_path: Path) -> None:
    (tmp_path / "site bin" / "apptainer").write_text("#!/bin/sh\nexit 42\n")
    given(argv, PLAIN, "exec", "x", code=42, SING_IMAGE=IMAGE)


@needs_lmod
def test_from_the_module_to_the_command(target: Path, output: Path, argv: Path) -> None:
    made(target, output, binds=["/usr"], gpu_options=["--nv"])
    environment = loaded(output, "gitlab-registry.cern.ch/atlas/athena")
    environment["PATH"] = f"{environment['PATH']}:{argv.parent}/site bin"
    subprocess.run(["singularity_wrapper", "exec", "nvidia-smi"], env=environment, cwd="/tmp", check=True, timeout=10)
    expected = ["exec", "--pwd", "/tmp", "--nv", f"{target}/{ATHENA}", "nvidia-smi"]
    expected[3:3] = ["--bind", "/usr"]
    assert argv.read_bytes().decode().split("\0")[:-1] == expected


@needs_apptainer
def test_apptainer_itself_does_what_the_wrapper_asks_for(tmp_path: Path, registry: FakeRegistry) -> None:
    registry.add("org/app", "1", images()["app"])
    (tmp_path / "wishlist.yaml").write_text(f"version: 2\nimages: ['http://{registry.host}/org/app:1']\n")
    (tmp_path / "unpacker.toml").write_text(
        f'published_at = "{WORK}/target"\n[modules]\nbinds = ["{WORK}", "/nowhere"]\n'
    )
    site = ["--config", str(tmp_path / "unpacker.toml")]
    unpacker("reconcile", str(tmp_path / "wishlist.yaml"), *site, target=f"{tmp_path}/target", work=tmp_path)
    unpacker("modules", "--output", f"{tmp_path}/modules", *site, target=f"{tmp_path}/target", work=tmp_path)
    apptainer = Apptainer(tmp_path)

    def wrapped(*arguments: str, gpu: str = "0", flags: str = "") -> bytes:
        program = ("sh", f"{WORK}/modules/bin/singularity_wrapper", *arguments)
        image = f"{WORK}/target/{registry.host}/org/app:1"
        done = apptainer.beside(*program, SING_IMAGE=image, SING_GPU=gpu, SING_FLAGS=flags)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout

    assert wrapped("exec", "sh", "-c", 'pwd; echo "$A"; echo "$1"', "x", "a  b") == f"{HOME}\n1\na  b\n".encode()
    assert wrapped("run", "extra", "two words") == b"extra|two words|"
    assert wrapped("shell", "sh", "-c", "echo hello") == b"hello\n"
    assert wrapped("exec", "ls", f"{WORK}/modules/bin") == b"singularity_wrapper\n", "the paths of the site are bound"
    assert wrapped("exec", "echo", "yes", gpu="1", flags="--cleanenv") == b"yes\n"


# -- the verb ---------------------------------------------------------------------------------------------------


def test_the_verb_writes_tells_and_exits_5_where_files_of_others_are_in_the_way(
    tmp_path: Path, target: Path, output: Path
) -> None:
    user = User(tmp_path, None)  # type: ignore[arg-type]
    done = user("modules", "--output", str(output))
    assert (done.returncode, done.stderr) == (0, "")
    assert "5 written, 0 removed, 0 as they were" in done.stdout
    value = json.loads(user("modules", "--output", str(output), "--json").stdout)
    assert value == {"written": [], "removed": [], "unchanged": 5, "foreign": [], "changed": []}
    (output / LIST).write_text('{"files": {}}')
    (output / "modulefiles/alpine/3.9.lua").write_text("-- mine")
    done = user("modules", "--output", str(output))
    assert done.returncode == 5
    assert "modulefiles/alpine/3.9.lua is not ours" in done.stderr


def test_the_wrapper_is_a_program_that_a_site_can_check(tmp_path: Path) -> None:
    assert subprocess.run(["sh", "-n"], input=PLAIN.encode(), timeout=10).returncode == 0
    checker = shutil.which("shellcheck")
    if checker is None:
        pytest.skip("shellcheck is not installed: only sh has read the wrapper")
    (tmp_path / "w").write_text(wrapper("apptainer", ("/l", "/m"), ("--nv",)))
    done = subprocess.run([checker, str(tmp_path / "w")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout

"""The command line as a user has it: a process, its output, its exit code."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.fake_registry import FakeRegistry
from tests.images import directory, file, image, layer, write_layout

APP = image(layer(directory("etc"), file("etc/motd", b"hello")), Env=["A=1"])
OTHER = image(layer(file("other", b"x")))


class User:
    """Somebody in a directory with a wishlist, a target and a registry."""

    def __init__(self, path: Path, fake: FakeRegistry) -> None:
        self.path = path
        self.fake = fake
        self.target = path / "target"

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "unpacker", *arguments]

    def environment(self, **extra: str) -> dict[str, str]:
        here = {"UNPACKER_TARGET": str(self.target), "UNPACKER_STATE": str(self.path / "state")}
        return {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), **here, **extra}

    def __call__(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments),
            cwd=self.path,
            env=self.environment(**environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def wishlist(self, *images: str, name: str = "wishlist.yaml") -> Path:
        written = "version: 2\nimages:" + ("".join(f"\n- {i}" for i in images) or " []") + "\n"
        path = self.path / name
        path.write_text(written.replace("HOST", f"http://{self.fake.host}"))
        return path


@pytest.fixture
def user(tmp_path: Path, registry: FakeRegistry) -> User:
    registry.add("org/app", "1.0", APP)
    registry.add("org/app", "1.1", OTHER)
    return User(tmp_path, registry)


def test_validate_names_every_fault_by_line_and_column_and_exits_2(user: User) -> None:
    user.wishlist("HOST/org/app:1.0", "alpine:3", "HOST/org/app")
    done = user("validate")
    assert done.returncode == 2
    assert [line.split(":")[:3] for line in done.stderr.splitlines()] == [
        ["wishlist.yaml", "4", "3"],
        ["wishlist.yaml", "5", "3"],
    ]


def test_validate_of_a_sound_file_exits_0(user: User) -> None:
    user.wishlist("HOST/org/app:1.*")
    done = user("validate")
    assert (done.returncode, done.stdout) == (0, "wishlist.yaml: 1 wishes, 0 faults, 0 warnings\n")


def test_plan_shows_what_would_be_done_and_does_nothing(user: User) -> None:
    user.wishlist("HOST/org/app:1.*")
    done = user("plan")
    assert done.returncode == 0
    assert f"publish  {user.fake.host}/org/app:1.0  not published yet" in done.stdout
    assert not user.target.exists()
    assert not (user.path / "state").exists()


def test_a_target_that_is_not_there_is_named_by_status_and_refused_by_what_needs_one(user: User) -> None:
    user.wishlist("HOST/org/app:1.0")
    shown = user("status", "wishlist.yaml")
    assert shown.returncode == 0 and f"no target at {user.target} yet" in shown.stderr
    assert f"no target at {user.target}; " in user("verify").stderr
    user.target.write_text("a file")
    assert user("gc").stderr == f"unpacker: {user.target} is no directory, so it is no target\n"


def test_an_image_at_the_command_line_is_no_yaml(user: User) -> None:
    for name in ("r.example/x:1'", 'r.example/x:1"', "r.example/x:1', tags: ['2", "r.example/x:\udcff"):
        done = user("publish", name)
        assert done.returncode == 2 and "not a" in done.stderr and "YAML" not in done.stderr


def test_a_repository_that_is_not_there_is_said_once(user: User) -> None:
    user.wishlist("HOST/org/app:1.0")
    done = user("reconcile", "--target", f"stratum0:{user.path}/none")
    assert done.returncode == 5
    assert done.stderr.count("there is no repository there") == 1


def test_plan_exits_10_for_changes_when_asked_to(user: User) -> None:
    user.wishlist("HOST/org/app:1.*")
    assert user("plan", "--detailed-exitcode").returncode == 10
    assert user("reconcile").returncode == 0
    assert user("plan", "--detailed-exitcode").returncode == 0


def test_reconcile_status_verify_and_gc_tell_one_story(user: User) -> None:
    user.wishlist("HOST/org/app:1.*")
    done = user("reconcile")
    assert done.returncode == 0, done.stderr
    assert "2 published" in done.stdout
    assert (user.target / user.fake.host / "org/app:1.0/etc/motd").read_text() == "hello"
    status = json.loads(user("status", "wishlist.yaml", "--json").stdout)
    assert {row["name"].rpartition("/")[2]: row["state"] for row in status["names"]} == {
        "app:1.0": "published",
        "app:1.1": "published",
    }
    assert user("verify").returncode == 0
    user.wishlist("HOST/org/app:1.0")
    assert "1 removed" in user("reconcile").stdout
    assert "1 roots" in user("gc", "--grace", "0", "--dry-run").stdout
    collected = json.loads(user("gc", "--grace", "0", "--json").stdout)
    assert len(collected["roots"]) == 1
    assert len(list((user.target / ".flat").glob("*/*"))) == 1
    assert user("verify").returncode == 0


def test_a_faulty_entry_does_not_stop_the_others_and_the_exit_code_is_1(user: User) -> None:
    user.wishlist("HOST/org/app:1.0", "nonsense")
    done = user("reconcile")
    assert done.returncode == 1
    assert "wishlist.yaml:4:3" in done.stderr
    assert (user.target / user.fake.host / "org/app:1.0").is_symlink()


def test_a_file_that_is_no_wishlist_is_exit_2_for_every_verb(user: User) -> None:
    (user.path / "wishlist.yaml").write_text("images: [\n")
    for verb in (["validate"], ["plan"], ["reconcile"], ["status", "wishlist.yaml"]):
        done = user(*verb)
        assert done.returncode == 2, verb
        assert "Traceback" not in done.stderr
    assert user("validate", "missing.yaml").returncode == 2


def test_no_target_is_said_with_what_to_do(user: User) -> None:
    user.wishlist("HOST/org/app:1.0")
    done = user("reconcile", UNPACKER_TARGET="")
    assert done.returncode == 2
    assert "--target" in done.stderr


def test_a_wishlist_cannot_bring_its_own_settings(user: User) -> None:
    user.wishlist("HOST/org/app:1.0")
    (user.path / "unpacker.toml").write_text('target = "elsewhere"\n')
    assert user("reconcile").returncode == 0
    assert not (user.path / "elsewhere").exists()


def test_wrong_settings_are_all_named_at_once(user: User) -> None:
    user.wishlist("HOST/org/app:1.0")
    config = user.path / "operator.toml"
    config.write_text("jobs = 0\nfoo = 1\n[limits]\nmanifst = 1\n")
    done = user("reconcile", "--config", str(config))
    assert done.returncode == 2
    assert all(word in done.stderr for word in ("jobs", "foo", "manifst"))


def test_quiet_says_nothing_while_all_is_well_and_the_report_when_not(user: User) -> None:
    user.wishlist("HOST/org/app:1.0")
    done = user("reconcile", "--quiet", "--wishlist-id", "w")
    assert (done.returncode, done.stdout) == (0, "")
    user.wishlist("HOST/org/app:nothing")
    assert "failed" in user("reconcile", "--quiet").stdout


def test_a_report_to_what_is_no_file_is_written_there_and_replaces_nothing(user: User) -> None:
    user.wishlist("HOST/org/app:1.0")
    (user.path / "out").symlink_to("/dev/stdout")
    done = user("reconcile", "--quiet", "--report", "out")
    assert json.loads(done.stdout)["outcomes"][0]["result"] == "published"
    assert os.readlink(user.path / "out") == "/dev/stdout"


def test_the_report_is_json_or_markdown_by_its_name(user: User) -> None:
    user.wishlist("HOST/org/app:1.0")
    user("reconcile", "--report", "r.json")
    report = json.loads((user.path / "r.json").read_text())
    assert [o["result"] for o in report["outcomes"]] == ["published"]
    user.wishlist("HOST/org/app:1.*")
    user("reconcile", "--report", "r.md")
    assert "| published |" in (user.path / "r.md").read_text()


def test_plan_against_needs_no_target_and_shows_only_what_the_merge_request_changes(user: User) -> None:
    user.wishlist("HOST/org/app:1.0", name="old.yaml")
    user.wishlist("HOST/org/app:1.0", "HOST/org/app:1.1", "HOST/org/none:1")
    done = user("plan", "--against", "old.yaml", "--json", UNPACKER_TARGET="")
    assert done.returncode == 1
    found = {p["name"].rpartition("/")[2]: p for p in json.loads(done.stdout)["proposals"]}
    assert set(found) == {"app:1.1", "none:1"}
    assert found["app:1.1"]["change"] == "add"
    assert found["app:1.1"]["compressed"] == sum(len(b) for d, b in OTHER.blobs.items() if d != OTHER.image_id)
    assert found["app:1.1"]["platforms"] == ["linux/amd64"]
    assert "404" in found["none:1"]["error"]
    assert not any("app/manifests/1.0" in r.path for r in user.fake.requests)


def test_plan_against_a_list_that_does_not_parse_counts_everything_as_new(user: User) -> None:
    user.wishlist("HOST/org/app:1.0")
    (user.path / "old.yaml").write_text("version: 2\nimages: [\n")
    done = user("plan", "--against", "old.yaml", "--json")
    assert done.returncode == 0, done.stderr
    assert [p["change"] for p in json.loads(done.stdout)["proposals"]] == ["add"]
    assert "old.yaml cannot be read, so everything counts as new" in done.stderr


def test_plan_against_without_any_registry_is_exit_3_as_it_is_for_plan(user: User) -> None:
    (user.path / "old.yaml").write_text("version: 2\nimages: []\n")
    user.wishlist("http://127.0.0.1:1/org/app:1.0")
    for line in (("plan", "--against", "old.yaml"), ("plan",)):
        assert user(*line).returncode == 3


def test_status_is_of_the_wishlist_that_lies_here(user: User) -> None:
    user.wishlist("HOST/org/app:1.0")
    assert user("reconcile").returncode == 0
    user.wishlist("HOST/org/app:1.0", "HOST/org/later:1")
    names = json.loads(user("status", "--json").stdout)["names"]
    assert {name["state"] for name in names} == {"published", "pending"}


def test_taking_a_broken_wish_out_of_a_list_fails_no_merge_request(user: User) -> None:
    user.wishlist("HOST/org/app:1.0", "http://127.0.0.1:1/org/gone:*", "HOST/org/nothing:*", name="old.yaml")
    user.wishlist("HOST/org/app:1.0")
    done = user("plan", "--against", "old.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "would fail" not in done.stdout and "org/gone" in done.stdout


def test_what_means_nothing_beside_against_is_refused_and_not_ignored(user: User) -> None:
    user.wishlist("HOST/org/app:1.0", name="old.yaml")
    for flags in (("--only", "*x*"), ("--detailed-exitcode",), ("--rebuild",), ("--adopt",)):
        done = user("plan", "--against", "old.yaml", *flags)
        assert (done.returncode, flags[0] in done.stderr) == (2, True)


def test_a_report_that_cannot_be_written_hides_neither_result_nor_exit_code(user: User) -> None:
    (user.path / "small").mkdir()
    user.wishlist("HOST/org/app:1.0", "HOST/org/nothing:1")
    user.fake.add("org/app", "1.0", APP)
    for flags, ends in (((), 1), (("--only", "*app*"), 2)):
        done = user("reconcile", "--json", "--report", "/dev/full", *flags)
        assert done.returncode == ends, done.stderr
        assert json.loads(done.stdout)["outcomes"]
        assert "cannot write the report /dev/full: No space left on device" in done.stderr


def test_quiet_says_nothing_of_a_list_that_is_sound(user: User) -> None:
    user.wishlist("HOST/org/app:1.0", "HOST/org/app:1.0")
    assert "(warning)" in user("validate").stderr
    assert "(warning)" in user("reconcile").stderr  # the first run also says, once, if it cannot keep owners
    done = user("reconcile", "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_tilde_is_the_home_directory_in_settings_too(user: User) -> None:
    user.wishlist("HOST/org/app:1.0")
    (user.path / "u.toml").write_text('target = "~/tree"\nstate = "~/state"\n')
    for line in (("-c", "u.toml"), ("--target=~/tree", "--state=~/state")):
        done = user("reconcile", *line, HOME=str(user.path / "home"), UNPACKER_TARGET="", UNPACKER_STATE="")
        assert done.returncode == 0, done.stderr
        assert (user.path / "home" / "tree" / ".flat").is_dir() and (user.path / "home" / "state").is_dir()
    assert not (user.path / "~").exists()


def test_a_name_that_a_wishlist_has_stays_its_own_and_the_one_who_publishes_it_is_told(user: User) -> None:
    user.wishlist("HOST/org/app:1.0")
    assert user("reconcile").returncode == 0
    done = user("publish", f"http://{user.fake.host}/org/app:1.0")
    assert done.returncode == 0
    assert "belongs to the wishlist" in done.stderr and "goes when that drops it" in done.stderr


def test_plan_against_a_list_that_is_not_there_is_an_error(user: User) -> None:
    user.wishlist("HOST/org/app:1.0")
    assert user("plan", "--against", "old.yaml").returncode == 2


def test_plan_against_shows_what_a_merge_request_drops(user: User) -> None:
    user.wishlist("HOST/org/app:*", name="old.yaml")
    user.wishlist("HOST/org/app:1.0")
    done = user("plan", "--against", "old.yaml", "--json")
    found = {p["name"].rpartition("/")[2]: p["change"] for p in json.loads(done.stdout)["proposals"]}
    assert found == {"app:1.1": "drop"}
    assert done.returncode == 0


def test_an_image_layout_is_published_under_the_name_that_the_operator_gives(user: User) -> None:
    write_layout(user.path / "layout", {"v1": APP})
    done = user("publish", "oci:layout:v1", "--as", "registry.example.org/local/app:2")
    assert done.returncode == 0, done.stderr
    assert (user.target / "registry.example.org/local/app:2/etc/motd").read_text() == "hello"
    user.wishlist("HOST/org/app:1.0")
    assert user("reconcile").returncode == 0
    assert (user.target / "registry.example.org/local/app:2").is_symlink(), "no wishlist removes it"
    assert user("remove", "registry.example.org/local/app:2").returncode == 0
    assert not (user.target / "registry.example.org").exists()


def test_an_image_layout_is_found_by_whatever_its_writer_called_the_image(user: User) -> None:
    """`podman save` makes a whole name of the tag; `skopeo copy … oci:PATH` gives none."""
    write_layout(user.path / "whole", {"localhost/app:1": APP})
    done = user("publish", "oci:whole:localhost/app:1", "--as", "registry.example.org/local/app:2")
    assert done.returncode == 0, done.stderr
    write_layout(user.path / "with:colon", {"v1": APP})
    assert user("publish", "oci:with:colon:v1", "--as", "registry.example.org/local/app:3").returncode == 0
    index = json.loads((user.path / "whole/index.json").read_text())
    for entry in index["manifests"]:
        del entry["annotations"]
    (user.path / "whole/index.json").write_text(json.dumps(index))
    assert user("publish", "oci:whole", "--as", "registry.example.org/local/app:4").returncode == 0


def test_a_malformed_single_image_is_exit_4(user: User) -> None:
    bad = image(layer(file("../../escape", b"x")))
    write_layout(user.path / "layout", {"v1": bad})
    done = user("publish", "oci:layout:v1", "--as", "registry.example.org/local/bad:1")
    assert done.returncode == 4, done.stdout + done.stderr


def test_a_layout_that_is_not_there_is_exit_2(user: User) -> None:
    done = user("publish", "oci:layuot:v1", "--as", "registry.example.org/local/app:1")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "layuot is no OCI image layout: it has no index.json (expected oci:PATH:TAG)" in done.stderr


def test_a_single_image_that_failed_is_no_failing_wish(user: User) -> None:
    """Who asked for it was told; no run will come back to it, and `status` is of what runs come back to."""
    user.wishlist("HOST/org/app:1.0")
    assert user("reconcile").returncode == 0
    assert user("publish", f"{user.fake.host}/org/nothing:1").returncode != 0
    done = user("status", "--json")
    assert done.returncode == 0, done.stderr
    assert {name["state"] for name in json.loads(done.stdout)["names"]} == {"published"}


def test_removing_what_is_not_published_is_exit_2(user: User) -> None:
    user.wishlist("HOST/org/app:1.0")
    user("reconcile")
    done = user("remove", "registry.example.org/no:1")
    assert done.returncode == 2
    assert "not published" in done.stderr


def test_a_held_target_is_exit_5_and_names_its_holder(user: User) -> None:
    user.wishlist("HOST/org/app:1.*")
    user.fake.slow = (10, 0.3)
    first = subprocess.Popen(
        user.command("reconcile"), cwd=user.path, env=user.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    lock = user.target / ".unpacker/lock"
    while not (lock.exists() and lock.read_text()):
        assert first.poll() is None
        time.sleep(0.02)
    second = user("reconcile")
    first.terminate()
    first.communicate(timeout=30)
    assert second.returncode == 5
    assert str(first.pid) in second.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_stopped_run_ends_its_workers_and_the_next_converges(user: User, number: signal.Signals, jobs: str) -> None:
    user.wishlist("HOST/org/app:1.*")
    user.fake.slow = (10, 0.2)
    run = subprocess.Popen(
        user.command("reconcile", "--jobs", jobs),
        cwd=user.path,
        env=user.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    while not any("/blobs/" in r.path for r in user.fake.requests):
        assert run.poll() is None
        time.sleep(0.02)
    run.send_signal(number)
    _, errors = run.communicate(timeout=30)
    assert run.returncode == 128 + number, errors
    assert b"Traceback" not in errors
    assert (user.path / "state").exists(), "the journal is written"
    user.fake.slow = None
    assert user("reconcile").returncode == 0
    assert not list((user.target / ".unpacker/txn").iterdir())


STUBBORN = """
import time
from unpacker.cli import exits
exits.unwind_on_signals()
try:
    print("working", flush=True)
    time.sleep(60)
except exits.Stopped:
    print("unwinding", flush=True)
    time.sleep(60)
"""


def test_the_second_signal_breaks_nothing_off_and_the_third_ends_the_run_at_once() -> None:
    run = subprocess.Popen([sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stdout is not None and run.stderr is not None
    assert run.stdout.readline() == "working\n"
    run.terminate()
    assert run.stdout.readline() == "unwinding\n"
    run.terminate()
    assert "once more" in run.stderr.readline()
    assert run.poll() is None
    began = time.monotonic()
    run.send_signal(signal.SIGINT)
    assert run.communicate(timeout=20) == ("", "")
    assert run.returncode == 130
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("verb", [("plan",), ("plan", "--against", "old.yaml"), ("receipts", "-c", "unpacker.toml")])
def test_a_registry_that_does_not_answer_holds_up_nobody_who_wants_to_stop(user: User, verb: tuple[str, ...]) -> None:
    user.wishlist("HOST/org/app:1.0")
    assert user("reconcile").returncode == 0
    user.wishlist(name="old.yaml")
    (user.path / "unpacker.toml").write_text("[receipts]\nenabled = true\n")
    user.fake.clear()
    user.fake.delay = 60
    run = subprocess.Popen(
        user.command(*verb), cwd=user.path, env=user.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    while not user.fake.requests:
        assert run.poll() is None, run.communicate()
        time.sleep(0.02)
    began = time.monotonic()
    run.send_signal(signal.SIGTERM)
    _, errors = run.communicate(timeout=30)
    assert run.returncode == 143, errors
    assert b"Traceback" not in errors
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("target", ["stratum:x", "Stratum0:x", "https://unpacked.example.org"])
def test_a_misspelt_target_is_no_directory_to_be_made(user: User, target: str) -> None:
    user.wishlist("HOST/org/app:1.0")
    done = user("reconcile", "--target", target)
    assert done.returncode == 2
    assert "stratum0:DIRECTORY" in done.stderr
    (user.path / "a:b").mkdir()
    assert user("reconcile", "--target", "a:b").returncode == 0, "what is there is meant"
    assert user("reconcile", "--target", "./c:d").returncode == 0


@pytest.mark.parametrize("key, value", [("published", "253402300800"), ("published", "1e999"), ("size", "Infinity")])
def test_a_record_with_an_impossible_number_is_unreadable_and_stops_nothing_else(
    user: User, key: str, value: str
) -> None:
    user.wishlist("HOST/org/app:1.0")
    assert user("reconcile").returncode == 0
    path = user.target / ".metadata" / user.fake.host / "org/app:1.0/record.json"
    path.write_text(re.sub(rf'"{key}": \d+', f'"{key}": {value}', path.read_text()))
    assert "unreadable" in user("status").stdout
    user.wishlist("HOST/org/app:1.*")
    done = user("reconcile")
    assert (done.returncode, "Traceback" in done.stderr) == (0, False)
    assert "unreadable" not in user("status").stdout, "it was published anew"
    assert (user.target / user.fake.host / "org/app:1.1").is_symlink()


def test_verify_names_the_damage_and_exits_5_and_rebuild_mends_it(user: User) -> None:
    user.wishlist("HOST/org/app:1.0")
    user("reconcile")
    root = (user.target / user.fake.host / "org/app:1.0").resolve()
    motd = root / "etc/motd"
    kept = motd.stat()
    os.chmod(motd, 0o644)
    motd.write_bytes(b"jello")
    os.utime(motd, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    done = user("verify", "--json")
    assert done.returncode == 5
    assert [p["path"] for p in json.loads(done.stdout)["problems"]] == ["etc/motd"]
    assert user("verify", "--quick").returncode == 0
    again = user("reconcile", "--rebuild")
    assert "1 updated" in again.stdout, again.stdout + again.stderr
    assert user("verify").returncode == 0
    assert (user.target / user.fake.host / "org/app:1.0/etc/motd").read_text() == "hello"
    assert motd.read_bytes() == b"jello", "the old root is never edited"


def test_errors_have_no_traceback_and_no_secret(user: User) -> None:
    user.wishlist("HOST/org/app:1.0")
    shutil.rmtree(user.target, ignore_errors=True)
    user.target.write_text("a file where the target should be")
    done = user("reconcile")
    assert done.returncode == 5
    assert "Traceback" not in done.stderr


def test_version_and_help_are_there(user: User) -> None:
    assert user("--version").stdout.startswith("unpacker ")
    for verb in ("validate", "plan", "reconcile", "publish", "remove", "status", "verify", "gc"):
        done = user(verb, "--help")
        assert done.returncode == 0
        assert verb in done.stdout

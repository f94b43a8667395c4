"""What a root gets for Apptainer and other systems besides its image, and that the image wins everywhere."""

from __future__ import annotations

import io
import json
import os
import stat
import subprocess
import zoneinfo
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests import images
from tests.fake_registry import FakeRegistry
from tests.memory_store import MemoryStore
from tests.test_cli import User
from unpacker import mountpoints
from unpacker.apply import apply
from unpacker.changeset import Changeset, Entry, Kind
from unpacker.errors import SettingsError
from unpacker.furnish import furnish
from unpacker.oci import ImageConfig
from unpacker.publish.pool import ContentPool, pool_path
from unpacker.rootfs import ENTRY_VERSION, VERSION, Policy, additions, prepare
from unpacker.settings import load
from unpacker.tree import EMPTY, Directory, File, Node, Symlink, Tree, lookup, walk


def config(**runtime: Any) -> ImageConfig:
    document = {
        "architecture": "arm64",
        "os": "linux",
        "created": "2020-09-13T12:26:40Z",
        "rootfs": {"diff_ids": []},
        "config": runtime,
    }
    return ImageConfig.parse(json.dumps(document).encode())


def directory(path: str, mode: int = 0o755) -> Entry:
    return Entry(path, Kind.DIRECTORY, mode, 7, 8, 9)


def file(path: str, token: str = "of the image", mode: int = 0o644) -> Entry:
    return Entry(path, Kind.FILE, mode, 7, 8, 9, 5, token=token)


def link(path: str, target: str) -> Entry:
    return Entry(path, Kind.SYMLINK, 0o777, 7, 8, 9, target=target)


def image(*entries: Entry) -> Tree:
    return apply(EMPTY, Changeset(diff_id="", entries=entries))


def root(*entries: Entry, policy: Policy | None = None, **runtime: Any) -> dict[str, Node]:
    """The root of an image of these entries, by path."""
    policy = policy or Policy()
    store = MemoryStore()
    [(tree, _)] = furnish([(image(*entries), config(**runtime))], store, policy)
    added = {node.token for _, node in walk(tree) if isinstance(node, File)} - {"of the image"}
    assert not store.missing(added)
    return dict(walk(tree))


def is_directory(node: Node | None, mode: int = 0o755) -> bool:
    return type(node) is Directory and node.mode == mode


def test_an_image_of_nothing_gets_all_that_apptainer_and_its_mounts_ask_for() -> None:
    found = root()
    for path in ("proc", "sys", "dev", "run", "home", "root", "srv", "mnt", "cvmfs", "etc", "var"):
        assert is_directory(found[path]), path
    assert is_directory(found["tmp"], 0o1777) and is_directory(found["var/tmp"], 0o1777)
    assert is_directory(found[".singularity.d/libs"])
    scripts = [path for path, node in found.items() if type(node) is File and node.mode == 0o755]
    assert scripts == [
        *(f".singularity.d/actions/{name}" for name in ("exec", "run", "shell", "start", "test")),
        ".singularity.d/env/01-base.sh",
        ".singularity.d/env/10-docker2singularity.sh",
        ".singularity.d/env/90-environment.sh",
        ".singularity.d/env/95-apps.sh",
        ".singularity.d/env/99-base.sh",
        ".singularity.d/env/99-runtimevars.sh",
        ".singularity.d/runscript",
        ".singularity.d/startscript",
    ]
    data = [path for path, node in found.items() if type(node) is File and node.mode == 0o644]
    assert data == [
        ".singularity.d/labels.json",
        *(f"etc/{name}" for name in ("hostname", "hosts", "localtime", "resolv.conf")),
    ]
    links = {path: node.target for path, node in found.items() if type(node) is Symlink}
    assert links == {
        ".exec": ".singularity.d/actions/exec",
        ".run": ".singularity.d/actions/run",
        ".shell": ".singularity.d/actions/shell",
        ".test": ".singularity.d/actions/test",
        "environment": ".singularity.d/env/90-environment.sh",
        "etc/mtab": "/proc/mounts",
        "singularity": ".singularity.d/runscript",
    }
    assert all(target in found for path, target in links.items() if path != "etc/mtab")


def test_what_the_image_has_stays_as_it_is_whatever_it_is() -> None:
    entries = [
        directory("etc", 0o700),
        file("etc/hosts", mode=0o600),
        directory("etc/resolv.conf"),
        link("etc/localtime", "../usr/share/zoneinfo/Europe/Zurich"),
        file("tmp"),
        link("srv", "data"),
        directory("data"),
        Entry("run", Kind.FIFO, 0o644),
        file("singularity"),
        link(".run", "elsewhere"),
    ]
    before, after = dict(walk(prepare(image(*entries), (), Policy())[0])), root(*entries)
    assert {path: after[path] for path in before if path not in ("", "etc")} == {
        path: before[path] for path in before if path not in ("", "etc")
    }
    assert after["etc"][:5] == before["etc"][:5]
    assert "etc/resolv.conf" in after and "usr" not in after and "data/srv" not in after


def test_an_image_built_from_a_definition_keeps_its_own_and_gets_what_it_lacks() -> None:
    own = ["runscript", "labels.json", "env/90-environment.sh", "env/10-docker2singularity.sh", "actions/exec"]
    entries = [directory(".singularity.d"), *(file(f".singularity.d/{name}") for name in own)]
    found = root(*entries, Env=["A=1"], Cmd=["true"], Labels={"a": "b"})
    for name in own:
        node = found[f".singularity.d/{name}"]
        assert isinstance(node, File) and node.token == "of the image"
    assert ".singularity.d/env/99-base.sh" in found and ".singularity.d/startscript" in found


@pytest.mark.parametrize("entry", [file(".singularity.d"), link(".singularity.d", "../../outside"), link("etc", "etc")])
def test_what_is_in_the_way_stays_and_costs_only_what_would_be_below_it(entry: Entry) -> None:
    found = root(entry)
    assert found[entry.path] == prepare(image(entry), (), Policy())[0].root.children[entry.path]
    assert not [path for path in found if path.startswith(entry.path + "/")]
    assert is_directory(found["proc"])


def test_links_on_the_way_are_followed_inside_the_root_and_never_out_of_it() -> None:
    found = root(
        link("home", "var/home"),
        link("root", "/var/roothome"),
        link("var", "./usr/../data/var"),
        link("srv", "../srv2"),
        link("mnt", "x/../../mnt2"),
        link("proc", "sys/deep"),
    )
    assert is_directory(found["data/var/home"]) and is_directory(found["data/var/roothome"])
    assert is_directory(found["data/var/tmp"], 0o1777) and is_directory(found["sys/deep"])
    assert not {"srv2", "mnt2", "x", "usr"} & found.keys()
    for name in ("home", "root", "var", "srv", "mnt", "proc"):
        assert type(found[name]) is Symlink


def test_a_dangling_link_gets_what_can_be_mounted_on_but_no_contents() -> None:
    """As /etc/resolv.conf often is: with nothing mounted there, no name resolves."""
    found = root(
        link("etc/resolv.conf", "../run/systemd/resolve/stub-resolv.conf"),
        link("etc/localtime", "/usr/share/zoneinfo/Europe/Zurich"),
        link(".singularity.d/runscript", "own"),
        link("singularity", "own"),
    )
    node = found["run/systemd/resolve/stub-resolv.conf"]
    assert isinstance(node, File) and node.size == 0
    assert is_directory(found["run/systemd"])
    assert not {"usr", "own", ".singularity.d/own"} & found.keys()


def test_links_without_end_lead_nowhere_and_soon() -> None:
    long = "./" * 2040
    loops = [link("home", "home"), link("srv", "a"), link("a", "srv")]
    found = root(*loops, link("mnt", long + "b"), link("b", long + "c"), link("c", long + "x"))
    assert "x" not in found
    hop = [link(f"hop{i}", f"hop{i + 1}") for i in range(60)]
    assert "hop60" not in root(*hop, link("home", "hop0"))
    assert is_directory(root(*hop, link("home", "hop40"))["hop60"])
    assert "y" * 256 not in root(link("home", "y" * 256))


@pytest.mark.parametrize(
    ("given", "made"),
    [("/opt/app/run", "opt/app/run"), ("work", "work"), ("/a//b/./c/", "a/b/c"), ("/a/../b", "b"), ("/tmp/x", "tmp/x")],
)
def test_the_working_directory_is_made_where_the_image_lacks_it(given: str, made: str) -> None:
    assert is_directory(root(WorkingDir=given)[made])


def test_the_operators_mount_points_are_made_and_the_usual_ones_stay() -> None:
    found = root(policy=Policy(mount_points=mountpoints.parse(["/scratch/", "/etc/hosts/below", "/l/m"])))
    assert is_directory(found["scratch"]) and is_directory(found["l/m"])
    assert type(found["etc/hosts"]) is File


@pytest.mark.parametrize("path", ["scratch", "/", "/..", "/a/../b", "/a\nb", "", "/a\0"])
def test_a_mount_point_that_is_no_absolute_path_is_a_fault_of_the_settings(path: str, tmp_path: Path) -> None:
    config_file = tmp_path / "unpacker.toml"
    config_file.write_text(f"mount_points = [{json.dumps(path)}]\n")
    with pytest.raises(SettingsError, match=r"mount_points: .*not the absolute path of a directory"):
        load({}, {}, str(config_file))


def test_mount_points_come_from_the_file_or_a_variable() -> None:
    assert load({}, {"UNPACKER_MOUNT_POINTS": "/b, /a,/b", "HOME": "/nowhere"}).mount_points == ("a", "b")


def test_additions_belong_to_whom_all_belongs_and_are_not_counted_as_altered() -> None:
    for owner in (None, (1000, 1001)):
        policy = Policy(owner=owner)
        [(tree, counts)] = furnish([(EMPTY, config())], MemoryStore(), policy)
        # The root directory itself is the image's.
        assert {(node.uid, node.gid) for path, node in walk(tree) if path} == {owner or (0, 0)}
        assert counts == ({} if owner is None else {"owners": 1})


def test_additions_are_public_as_they_are() -> None:
    """Their tokens cover their metadata, so that the policy must have nothing left to change."""
    policy = Policy(owner=(5, 6), mount_points=("scratch",))
    wanted = [entry for entry, _ in additions(config(Env=["A=1"]), policy)]
    tree, _ = prepare(EMPTY, wanted, policy)
    for entry in wanted:
        node = lookup(tree, entry.path)
        assert node is not None and node[:4] == (entry.mode, entry.uid, entry.gid, entry.mtime_ns)


def test_other_mount_points_are_other_rules_but_no_layer_is_read_again_for_them() -> None:
    plain, other = Policy(), Policy(mount_points=("scratch",))
    assert plain.rules != other.rules and plain.entry_rules == other.entry_rules
    assert Policy(owner=(1, 2)).entry_rules != plain.entry_rules
    assert (VERSION, ENTRY_VERSION) >= (3, 2)


def test_images_that_are_published_together_share_a_batch() -> None:
    store = MemoryStore()
    furnish([(EMPTY, config(Env=["A=1"])), (EMPTY, config(Env=["A=2"]))], store, Policy())
    assert store.committed == 1
    assert furnish([], store, Policy()) == [] and store.committed == 1


def test_contents_that_somebody_damaged_are_stored_again_if_they_are_to_be_checked(tmp_path: Path) -> None:
    pool, policy = ContentPool(str(tmp_path)), Policy(owner=(os.geteuid(), os.getegid()))
    [(tree, _)] = furnish([(EMPTY, config())], pool, policy)
    node = lookup(tree, ".singularity.d/runscript")
    assert isinstance(node, File)
    stored = tmp_path / ".unpacker" / "pool" / pool_path(node.token)
    sound = stored.read_bytes()
    stored.write_bytes(b"#" * len(sound))
    os.utime(stored, ns=(node.mtime_ns, node.mtime_ns))
    assert furnish([(EMPTY, config())], pool, policy)[0][0] == tree and stored.read_bytes() != sound
    assert furnish([(EMPTY, config())], pool, policy, check=True)[0][0] == tree and stored.read_bytes() == sound


def test_labels_are_the_images_and_what_apptainer_adds() -> None:
    [data] = [
        data
        for entry, data in additions(
            config(Labels={"maintainer": "me", "org.label-schema.build-arch": "own"}), Policy()
        )
        if entry.path == ".singularity.d/labels.json"
    ]
    assert json.loads(data) == {
        "maintainer": "me",
        "org.label-schema.build-arch": "own",
        "org.label-schema.build-date": "2020-09-13T12:26:40Z",
        "org.label-schema.schema-version": "1.0",
        "org.label-schema.usage.singularity.deffile.bootstrap": "docker",
    }


def test_the_time_zone_of_an_image_that_has_none_is_utc(tmp_path: Path) -> None:
    [data] = [data for entry, data in additions(config(), Policy()) if entry.path == "etc/localtime"]
    zone = zoneinfo.ZoneInfo.from_file(io.BytesIO(data), "UTC")
    assert datetime.fromtimestamp(0, zone).strftime("%H %Z %z") == "00 UTC +0000"
    (tmp_path / "zone").write_bytes(data)
    shown = subprocess.run(
        ["date", "-d", "@0", "+%H %Z"], env={"TZ": f":{tmp_path}/zone"}, capture_output=True, check=True
    )
    assert shown.stdout == b"00 UTC\n"


def scripts(directory: Path, name: str) -> None:
    """Writes the additions of a config to disk, so that their scripts can run below `name`."""
    for entry, data in additions(config(Cmd=["echo", "ran"]), Policy()):
        path = directory / name / entry.path
        path.parent.mkdir(parents=True, exist_ok=True)
        if entry.kind is Kind.FILE:
            path.write_bytes(data)
            path.chmod(stat.S_IMODE(entry.mode))


@pytest.mark.parametrize("shell", ["dash", "bash"])
def test_library_path_and_prompt_are_completed_and_never_replaced(shell: str, tmp_path: Path) -> None:
    scripts(tmp_path, "root")
    script = tmp_path / "root/.singularity.d/env/99-base.sh"
    for given, wanted in (
        ("unset PS1", "/.singularity.d/libs|Apptainer> "),
        ("LD_LIBRARY_PATH=/a:/b PS1=mine", "/a:/b:/.singularity.d/libs|mine"),
    ):
        show = '/usr/bin/env | /bin/grep -c "^PS1=\\|^LD_L"; printf "%s|%s" "$LD_LIBRARY_PATH" "$PS1"'
        text = f"{given}; . {script}; {show}"
        ran = subprocess.run([shell, "-c", text], env={}, capture_output=True, check=True)
        assert ran.stdout.decode() == f"2\n{wanted}"


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, "/bin"),
        ({"SING_USER_DEFINED_PREPEND_PATH": "/a", "SING_USER_DEFINED_APPEND_PATH": "/b"}, "/a:/bin:/b"),
        ({"SING_USER_DEFINED_PATH": "/only"}, "/only"),
    ],
)
def test_what_the_user_sets_for_path_in_older_releases_is_obeyed(
    given: dict[str, str], wanted: str, tmp_path: Path
) -> None:
    scripts(tmp_path, "root")
    script = tmp_path / "root/.singularity.d/env/99-runtimevars.sh"
    text = f'. {script}; printf "%s" "$PATH"; export -p | /bin/grep -c USER_DEFINED'
    ran = subprocess.run(["/bin/sh", "-c", text], env=given | {"PATH": "/bin"}, capture_output=True, check=False)
    assert ran.stdout.decode() == f"{wanted}0\n"


def test_every_script_is_one_that_shells_can_read(tmp_path: Path) -> None:
    scripts(tmp_path, "root")
    found = [path for path in (tmp_path / "root").rglob("*") if path.is_file() and os.access(path, os.X_OK)]
    assert len(found) == 13
    for path in found:
        for shell in ("dash", "bash"):
            assert subprocess.run([shell, "-n", path], capture_output=True, check=True).stderr == b""


def test_other_mount_points_are_a_new_root_when_asked_for_and_only_then(tmp_path: Path, registry: FakeRegistry) -> None:
    registry.add("org/app", "1", images.image(images.layer(images.file("a", b"1")), Cmd=["true"]))
    user = User(tmp_path, registry)
    user.wishlist("HOST/org/app:1")
    assert user("reconcile").returncode == 0
    [public] = tmp_path.glob("target/*/org/app:1")
    old = public.resolve()
    before = {path: path.lstat() for path in [old, *old.rglob("*")]}
    assert (old / "srv").is_dir() and not (old / "scratch").exists()
    user("reconcile", UNPACKER_MOUNT_POINTS="/scratch")
    assert public.resolve() == old
    done = json.loads(user("reconcile", "--rebuild", "--json", UNPACKER_MOUNT_POINTS="/scratch").stdout)
    assert [(each["result"], each["read"]) for each in done["outcomes"]] == [("updated", 0)]
    assert public.resolve() != old and (public / "scratch").is_dir() and (public / "a").samefile(old / "a")
    after = {path: path.lstat() for path in [old, *old.rglob("*")]}
    # More names of a file are counted in its inode, and that is all that may change.
    facts = ("st_mode", "st_ino", "st_uid", "st_gid", "st_size", "st_mtime_ns")
    assert all([getattr(before[path], f) for f in facts] == [getattr(after[path], f) for f in facts] for path in before)
    assert before.keys() == after.keys()
    assert user("verify").returncode == 0

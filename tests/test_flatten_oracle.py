"""Our merged tree against two independent oracles: `umoci unpack`, and GNU tar applied layer by layer.

Random layers are drawn as operations, and those that an oracle cannot do, or does otherwise than the OCI image
specification has it, are left out (`Drawing.add` says which and why; the literal cases of test_tree.py cover them).
"""

from __future__ import annotations

import io
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from tests import images
from tests.memory_store import MemoryStore
from unpacker import oci
from unpacker.apply import apply
from unpacker.changeset import Changeset, Entry, Kind, Xattrs
from unpacker.digest import Digest
from unpacker.errors import ImageError
from unpacker.image import Layer
from unpacker.layer import read
from unpacker.limits import Limits
from unpacker.oci import Descriptor
from unpacker.rootfs import Policy, publishable
from unpacker.tree import EMPTY, Directory, File, Node, Special, Symlink, Tree, lookup, walk

IS_ROOT = os.geteuid() == 0
POLICY = Policy()
IMPLIED_MTIME = 0
"""Of directories that no entry asked for. Drawn times are never this, so that those can be told."""


class Operation(NamedTuple):
    """One drawn entry of a layer: `target` is a symlink's; `number` says which name a hard link is to, as random paths
    would seldom hit one."""

    kind: str
    path: str
    target: str
    number: int
    data: bytes
    mode: int
    mtime: float
    owner: tuple[int, int]
    xattrs: dict[str, bytes]


class DrawnLayer(NamedTuple):
    operations: list[Operation]
    whiteouts: list[int]
    """Which names of the lower tree are hidden, by number."""
    opaque: list[int]


@dataclass
class Drawing:
    """Turns drawn operations into members of a tar, leaving out what the oracle cannot do.

    `tree` follows along, to know what exists; it decides what is asked, never what the answer should be.
    """

    for_tar: bool = False
    complete: bool = False
    """Whether entries without their parents are left out."""
    tree: Tree = EMPTY
    members: list[images.Member] = field(default_factory=list)

    def layer(self, drawn: DrawnLayer) -> bytes:
        self.members = []
        if not self.for_tar:
            self.hide(drawn)
        for operation in drawn.operations:
            self.add(operation)
        return images.layer(*self.members)

    def hide(self, drawn: DrawnLayer) -> None:
        # Whiteouts come first, as all tools write them: umoci 0.4.7 obeys them in the order of the tar, and one that
        # follows an entry of the same name would take that away.
        lower = [(path, node) for path, node in walk(self.tree) if path]
        directories = [path for path, node in lower if isinstance(node, Directory)]
        opaque = {directories[n % len(directories)] for n in drawn.opaque if directories}
        whiteouts = {lower[n % len(lower)][0] for n in drawn.whiteouts if lower}
        # One hidden by another: umoci makes the missing parents of the whiteout it is to obey.
        hidden = whiteouts | opaque
        whiteouts = {w for w in whiteouts if not any(w.startswith(h + "/") for h in hidden)}
        opaque = {o for o in opaque if not any(o == h or o.startswith(h + "/") for h in hidden - {o} | whiteouts)}
        self.members += [images.opaque(o) for o in sorted(opaque)] + [images.whiteout(w) for w in sorted(whiteouts)]
        self.tree = apply(
            self.tree, Changeset(diff_id="", entries=(), whiteouts=tuple(whiteouts), opaque=tuple(opaque))
        )

    def add(self, op: Operation) -> None:
        meta: dict[str, Any] = {"mtime": op.mtime, "xattrs": op.xattrs}
        if IS_ROOT:
            meta |= {"uid": op.owner[0], "gid": op.owner[1]}
        old = lookup(self.tree, op.path)
        parent = lookup(self.tree, op.path.rpartition("/")[0] + "/.")
        if parent is None and self.complete:
            return
        if parent is None and self.is_blocked(op.path):
            return  # a parent that is a file below: both oracles stop with ENOTDIR
        if parent is None and self.for_tar and self.is_dangling(op.path):
            return  # tar makes missing parents, but not what a symlink points to
        if self.for_tar and isinstance(old, Directory) and op.kind != "directory":
            return  # tar replaces no directory that has contents
        mtime_ns = int(op.mtime * 10**9)
        match op.kind:
            case "file":
                entry = Entry(op.path, Kind.FILE, op.mode, mtime_ns=mtime_ns)
                member = images.file(op.path, op.data, mode=op.mode, **meta)
            case "directory":
                if self.for_tar:
                    del meta["xattrs"]  # tar keeps those of a directory that it meets again
                entry = Entry(op.path, Kind.DIRECTORY, op.mode | 0o700, mtime_ns=mtime_ns)
                member = images.directory(op.path, mode=op.mode | 0o700, **meta)
            case "fifo":
                del meta["xattrs"]  # Linux has user.* on files and directories only
                entry = Entry(op.path, Kind.FIFO, op.mode, mtime_ns=mtime_ns)
                member = images.fifo(op.path, mode=op.mode, **meta)
            case "symlink":
                target = op.target
                if self.for_tar:
                    target = target.lstrip("./") or "a"  # tar knows no root but the host's, and would write there
                del meta["xattrs"]
                entry = Entry(op.path, Kind.SYMLINK, 0o777, mtime_ns=mtime_ns, target=target)
                member = images.symlink(op.path, target, **meta)
            case _:
                targets = [(p, n) for p, n in walk(self.tree) if not isinstance(n, Directory) and n is not old]
                if not targets:
                    return  # both oracles make no link to nothing, and take the link away before linking it to itself
                target, linked = targets[op.number % len(targets)]
                # umoci gives the shared inode what the header of the link says; those of real layers say the same.
                member = images.hardlink(op.path, target, mtime=linked.mtime_ns / 10**9)
                member[0].mode, member[0].uid, member[0].gid = linked.mode, linked.uid, linked.gid
                member[0].pax_headers = {f"SCHILY.xattr.{k}": v.decode() for k, v in linked.xattrs}
                entry = Entry(op.path, Kind.HARDLINK, target=target)
        entry = entry._replace(
            uid=member[0].uid,
            gid=member[0].gid,
            xattrs=tuple((k, v) for k, v in sorted(op.xattrs.items()) if "xattrs" in meta),
        )
        try:
            after = apply(self.tree, Changeset(diff_id="", entries=(entry,)))
        except ImageError:
            return  # a loop of symlinks on the way
        if entry.kind is Kind.HARDLINK and lookup(after, entry.target) is None:
            return  # a link in place of the directory its target is in: both oracles clear the way first
        self.tree = after
        self.members.append(member)

    def is_dangling(self, path: str) -> bool:
        names = path.split("/")
        above = ("/".join(names[:n]) for n in range(1, len(names)))
        return any(isinstance(lookup(self.tree, p), Symlink) and lookup(self.tree, p + "/.") is None for p in above)

    def is_blocked(self, path: str) -> bool:
        """Whether a component of the path's parents leads to something that is there and is no directory."""
        try:
            below = apply(self.tree, Changeset(diff_id="", entries=(Entry(path, Kind.FILE),)))
        except ImageError:
            return True
        kept = dict(walk(below))
        return any(
            not isinstance(node, Directory) and isinstance(kept.get(p), Directory) for p, node in walk(self.tree)
        )


class Seen(NamedTuple):
    """What both sides are compared by. `content` is the bytes of a file or the target of a symlink."""

    kind: str
    mode: int
    owner: tuple[int, int]
    mtime_ns: int
    content: bytes | str
    xattrs: Xattrs


def ours(layers: list[bytes]) -> tuple[dict[str, Seen], set[str]]:
    """The tree as we merge it, and the directories in it that no entry asked for."""
    store = MemoryStore()
    tree = EMPTY
    for data in layers:
        blob = images.compress(data, "gzip")
        descriptor = Descriptor(media_type=oci.OCI_LAYER + "+gzip", digest=Digest.of(blob), size=len(blob))
        named = Layer(descriptor=descriptor, diff_id=str(Digest.of(data)))
        tree = apply(tree, read(io.BytesIO(blob), named, store, POLICY, Limits()))
    seen = {path: of_node(node, store) for path, node in walk(tree) if path}
    return seen, {path for path, s in seen.items() if s.kind == "d" and s.mtime_ns == IMPLIED_MTIME}


def of_node(node: Node, store: MemoryStore) -> Seen:
    content: bytes | str = b""
    match node:
        case File():
            kind, content = "f", store.contents[node.token] if node.size else b""
        case Symlink():
            kind, content = "l", node.target
        case Special():
            kind = str(node.kind)
        case Directory():
            kind = "d"
    owner = (node.uid, node.gid) if IS_ROOT else (0, 0)
    return Seen(kind, node.mode, owner, node.mtime_ns, content, node.xattrs)


def on_disk(root: Path) -> Iterator[tuple[str, Seen]]:
    """What an oracle wrote, seen through the policy that our reader applies to each entry."""
    pending = [""]
    while pending:
        directory = pending.pop()
        for name in os.listdir(root / directory):
            path = os.path.join(directory, name)
            full = root / path
            status = full.lstat()
            content: bytes | str = b""
            xattrs: Xattrs = ()
            if stat.S_ISDIR(status.st_mode):
                kind = Kind.DIRECTORY
                pending.append(path)
            elif stat.S_ISLNK(status.st_mode):
                kind, content = Kind.SYMLINK, os.readlink(full)
            elif stat.S_ISFIFO(status.st_mode):
                kind = Kind.FIFO
            else:
                assert stat.S_ISREG(status.st_mode)
                kind, content = Kind.FILE, full.read_bytes()
            if kind in (Kind.FILE, Kind.DIRECTORY):
                names = sorted(n for n in os.listxattr(full) if n != "user.rootlesscontainers")
                xattrs = tuple((n, os.getxattr(full, n)) for n in names)
            entry = publishable(Entry(path, kind, stat.S_IMODE(status.st_mode), xattrs=xattrs), POLICY)
            owner = (status.st_uid, status.st_gid) if IS_ROOT else (0, 0)
            yield path, Seen(str(kind), entry.mode, owner, status.st_mtime_ns, content, entry.xattrs)


def forgiving(tree: dict[str, Seen], implied: set[str], *, directory_times: bool = True) -> dict[str, Seen]:
    """Without what is nobody's to say: the metadata of directories that no entry asked for."""
    result = {}
    for path, seen in tree.items():
        if path in implied:
            seen = Seen("d", 0, (0, 0), 0, b"", ())
        elif seen.kind == "d" and not directory_times:
            seen = seen._replace(mtime_ns=0)
        result[path] = seen
    return result


_NAMES = st.sampled_from(["a", "b", "c", "é"])
_PATHS = st.lists(_NAMES, min_size=1, max_size=3).map("/".join)
_TARGETS = st.one_of(_PATHS, _PATHS.map("/".__add__), _PATHS.map("../".__add__), _PATHS.map("../../../".__add__))
_TIMES = st.sampled_from([1.0, 1_500_000_000.0, 1_600_000_000.5, 2_000_000_000.25])


def _operations(xattrs: bool) -> st.SearchStrategy[Operation]:
    return st.builds(
        Operation,
        kind=st.sampled_from(["file", "file", "directory", "directory", "symlink", "hardlink", "hardlink", "fifo"]),
        path=_PATHS,
        target=_TARGETS,
        number=st.integers(0, 20),
        data=st.sampled_from([b"", b"one", b"two", b"three"]),
        mode=st.sampled_from([0o644, 0o600, 0o755, 0o4755, 0o1777, 0o2750]),
        mtime=_TIMES,
        owner=st.tuples(st.integers(0, 3), st.integers(0, 3)),
        xattrs=st.dictionaries(st.sampled_from(["user.a", "user.b"]), st.sampled_from([b"1", b"2"]), max_size=2)
        if xattrs
        else st.just({}),
    )


def _has_xattrs() -> bool:
    with tempfile.NamedTemporaryFile() as probe:
        try:
            os.setxattr(probe.name, "user.probe", b"1")
        except OSError:
            return False
    return True


_LAYERS = st.lists(
    st.builds(
        DrawnLayer,
        operations=st.lists(_operations(_has_xattrs()), min_size=3, max_size=10),
        whiteouts=st.lists(st.integers(0, 20), max_size=2),
        opaque=st.lists(st.integers(0, 20), max_size=1),
    ),
    min_size=2,
    max_size=4,
)
_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]


def listed(layers: list[list[images.Member]]) -> str:
    return "\n".join(
        f"layer {n}: {info.name} {info.type!r} {info.mode:o} -> {info.linkname!r} {data!r}"
        for n, members in enumerate(layers)
        for info, data in members
    )


@pytest.mark.skipif(shutil.which("umoci") is None, reason="umoci, the oracle, is not installed")
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=_SLOW)
@given(drawn=_LAYERS, complete=st.booleans())
def test_the_merged_tree_is_what_umoci_unpacks(drawn: list[DrawnLayer], complete: bool) -> None:
    compare_with_umoci(drawn, complete=complete)


def compare_with_umoci(drawn: list[DrawnLayer], *, complete: bool) -> None:
    drawing = Drawing(complete=complete)
    layers, members = [], []
    for one in drawn:
        layers.append(drawing.layer(one))
        members.append(drawing.members)
    note(listed(members))
    with tempfile.TemporaryDirectory(prefix="oracle-") as scratch:
        layout = images.write_layout(Path(scratch) / "layout", {"t": images.image(*layers)})
        command = ["umoci", "unpack", *([] if IS_ROOT else ["--rootless"]), "--image", f"{layout}:t", f"{scratch}/b"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        theirs = dict(on_disk(Path(scratch) / "b" / "rootfs"))
    tree, implied = ours(layers)
    # umoci puts the times of a directory right after it placed an entry in it, but not after it made a missing parent.
    expected = forgiving(theirs, implied, directory_times=complete)
    assert forgiving(tree, implied, directory_times=complete) == expected


@pytest.mark.skipif(shutil.which("tar") is None, reason="GNU tar, the oracle, is not installed")
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=_SLOW)
@given(drawn=_LAYERS)
def test_the_merged_tree_of_layers_without_whiteouts_is_what_tar_extracts(drawn: list[DrawnLayer]) -> None:
    compare_with_tar(drawn)


def compare_with_tar(drawn: list[DrawnLayer]) -> None:
    drawing = Drawing(for_tar=True)
    layers, members = [], []
    for one in drawn:
        layers.append(drawing.layer(one))
        members.append(drawing.members)
    note(listed(members))
    with tempfile.TemporaryDirectory(prefix="oracle-") as scratch:
        root = Path(scratch) / "root"
        root.mkdir()
        for data in layers:
            command = ["tar", "-x", "-p", "--numeric-owner", "--xattrs", "--xattrs-include=user.*", "-C", str(root)]
            done = subprocess.run(command, input=data, capture_output=True, check=False)
            assert done.returncode == 0, done.stderr.decode()
        theirs = dict(on_disk(root))
    tree, implied = ours(layers)
    # tar sets the times of a directory it extracts, not of one that a later layer puts something into.
    assert forgiving(tree, implied, directory_times=False) == forgiving(theirs, implied, directory_times=False)

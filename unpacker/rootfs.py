"""From a merged tree to the tree that is published: the rules of what becomes public.

Pure. `publishable` is the rule for one entry, applied before its bytes are stored; `prepare` is the same rule for
every node of a merged tree, and the edits that need the whole of it. What a root gets besides its image, `additions`,
comes with bytes to be stored, so it is asked for before.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from unpacker import apptainer, mountpoints
from unpacker.additions import Addition, add
from unpacker.changeset import Change, Entry, Kind, Xattrs
from unpacker.oci import ImageConfig
from unpacker.tree import Directory, File, Node, Special, Symlink, Tree, rewrite

VERSION = 4
"""Raised whenever these rules, or the reading of layers, would give another tree for the same image."""
ENTRY_VERSION = 3
"""Raised, too, whenever `publishable` or the tar reader would give another entry: all layers are read again for it."""

EARLIEST = (-(2**31) + 1) * 10**9
LATEST = (2**34 - 2**31 - 2) * 10**9
"""The modification times that a published tree can have, in nanoseconds since 1970: from December 1901 to May 2446.

That is what ext4 holds, less the second at either end, of which the kernel cuts off the fraction; xfs, btrfs, tmpfs
and CernVM-FS hold more. What an image gives beyond would come back from each file system as another time."""

_PERMISSIONS = 0o7777
_SYMLINK_MODE = 0o777
_DROPPED_XATTRS = ("user.overlay.", "user.containers.")
"""What overlayfs (`userxattr`) and containers-storage read as instructions, not as data."""

# Members of an enumeration are looked up per file: plain names are several times cheaper, and so is this table than
# `|` on flags.
_HARDLINK, _DIRECTORY, _SYMLINK, _FILE = Kind.HARDLINK, Kind.DIRECTORY, Kind.SYMLINK, Kind.FILE
_FIFO = Kind.FIFO
_CHANGES = tuple(Change(bits) for bits in range(32))
_MODE, _SETID, _XATTR, _OWNER, _TIME = (int(c) for c in Change)
_WORDS = ((_MODE, "modes"), (_SETID, "setid"), (_XATTR, "xattrs"), (_OWNER, "owners"), (_TIME, "times"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The operator's choices about published trees. `owner` is None where the target keeps the image's owners,
    else the (uid, gid) everything gets, because only root may give files away. `mount_points` are directories that
    every root shall have, as `mountpoints.parse` gives them."""

    owner: tuple[int, int] | None = None
    mount_points: tuple[str, ...] = ()

    @property
    def rules(self) -> str:
        """A hash of everything that decides the published tree, kept in each record."""
        return _hash([VERSION, asdict(self)])

    @property
    def entry_rules(self) -> str:
        """A hash of everything that decides the entries of a layer: what it was read under stays right under it."""
        return _hash([ENTRY_VERSION, {"owner": self.owner}])


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode("ascii")).hexdigest()[:16]


def publishable(entry: Entry, policy: Policy) -> Entry:
    """One entry as it will be published: readable by all, without set-id bits, foreign xattrs, maybe its owner, at a
    time that file systems can hold.

    Idempotent; `change` says what this altered. A hard link passes as it is: it is its target, by another name.
    """
    kind = entry.kind
    if kind is _HARDLINK:
        return entry
    mode = entry.mode & _PERMISSIONS
    change = 0
    if kind is _SYMLINK:
        mode = _SYMLINK_MODE
    else:
        mode, change = (_DIRECTORY_MODES if kind is _DIRECTORY else _FILE_MODES)[mode]
    xattrs = entry.xattrs
    if xattrs:
        xattrs = _public_xattrs(xattrs, may_have_user=kind is _FILE or kind is _DIRECTORY)
        if len(xattrs) != len(entry.xattrs):
            change |= _XATTR
    uid, gid = owner = policy.owner or (entry.uid, entry.gid)
    if owner != (entry.uid, entry.gid):
        change |= _OWNER
    mtime_ns = entry.mtime_ns
    if not EARLIEST <= mtime_ns <= LATEST:
        mtime_ns = EARLIEST if mtime_ns < EARLIEST else LATEST
        change |= _TIME
    if not change and mode == entry.mode:
        return entry
    return Entry(
        entry.path,
        kind,
        mode,
        uid,
        gid,
        mtime_ns,
        entry.size,
        entry.target,
        entry.device,
        xattrs,
        entry.token,
        _CHANGES[int(entry.change) | change],
    )


def additions(config: ImageConfig, policy: Policy) -> tuple[Addition, ...]:
    """What the root of an image gets wherever the image has nothing, as it will be published; its files have bytes, but
    no token yet. The more important comes first."""
    wanted = (*apptainer.additions(config), *mountpoints.additions(config.working_dir, policy.mount_points))
    uid, gid = policy.owner or (0, 0)
    return tuple(Addition(publishable(entry._replace(uid=uid, gid=gid), policy), data) for entry, data in wanted)


def prepare(tree: Tree, added: Sequence[Entry], policy: Policy) -> tuple[Tree, Mapping[str, int]]:
    """The tree to publish, and the count of what was altered or dropped, by word. `added` are the entries of
    `additions`, their bytes stored.

    The words are those of the record: `modes`, `setid`, `xattrs`, `owners`, `times` count names of the published tree,
    `devices` the names that are not in it; a word that counts nothing is left out. Directories that need no change
    are shared with the tree given.
    """
    counts: Counter[str] = Counter()
    # What adds to the tree comes before the policy, so that the policy is the last word on everything.
    tree = _without_devices(tree, counts)
    tree = add(tree, added)
    tree = _public(tree, policy, counts)
    return tree, {word: count for word, count in sorted(counts.items()) if count}


def _without_devices(tree: Tree, counts: Counter[str]) -> Tree:
    # Char 0/0 is overlayfs's whiteout: in a published tree only our own writer makes those.
    def rule(node: Node) -> Node | None:
        if type(node) is Special and node.kind is not _FIFO:
            counts["devices"] += 1
            return None
        return node

    return rewrite(tree, rule)


def _public(tree: Tree, policy: Policy, counts: Counter[str]) -> Tree:
    """The rule of `publishable` on every node, because directories that no entry asked for have not met it yet."""
    altered = [0] * len(_CHANGES)
    everyones = policy.owner

    def rule(node: Node) -> Node:
        kind = type(node)
        is_directory = kind is Directory
        mode = node.mode & _PERMISSIONS
        change = 0
        if kind is Symlink:
            mode = _SYMLINK_MODE
        else:
            mode, change = (_DIRECTORY_MODES if is_directory else _FILE_MODES)[mode]
        xattrs = node.xattrs
        if xattrs:
            xattrs = _public_xattrs(xattrs, may_have_user=is_directory or kind is File)
            if len(xattrs) != len(node.xattrs):
                change |= _XATTR
        owner = (node.uid, node.gid)
        if everyones is not None and owner != everyones:
            owner = everyones
            change |= _OWNER
        mtime_ns = node.mtime_ns
        if not EARLIEST <= mtime_ns <= LATEST:
            mtime_ns = EARLIEST if mtime_ns < EARLIEST else LATEST
            change |= _TIME
        before = int(node.change)
        altered[before | change] += 1
        if not change and mode == node.mode:
            return node
        return node._replace(
            mode=mode,
            uid=owner[0],
            gid=owner[1],
            mtime_ns=mtime_ns,
            xattrs=xattrs,
            change=_CHANGES[before | change],
        )

    tree = rewrite(tree, rule)
    for bit, word in _WORDS:
        counts[word] += sum(number for change, number in enumerate(altered) if change & bit)
    return tree


def _public_xattrs(xattrs: Xattrs, *, may_have_user: bool) -> Xattrs:
    # xattr(7): only files and directories can have `user.*`; a layer that gives one to a symlink asks the impossible.
    if not may_have_user:
        return ()
    return tuple(x for x in xattrs if x[0].startswith("user.") and not x[0].startswith(_DROPPED_XATTRS))


def _public_modes(*, is_directory: bool) -> tuple[tuple[int, int], ...]:
    """For each mode: the mode it gets (`a+rX`, set-id bits dropped, sticky kept) and the changes that is."""
    table = []
    for mode in range(_PERMISSIONS + 1):
        searchable = is_directory or mode & 0o111
        public = (mode & ~0o6000) | 0o444 | (0o111 if searchable else 0)
        change = (_SETID if mode & 0o6000 else 0) | (_MODE if public != mode & ~0o6000 else 0)
        table.append((public, change))
    return tuple(table)


_FILE_MODES = _public_modes(is_directory=False)
_DIRECTORY_MODES = _public_modes(is_directory=True)

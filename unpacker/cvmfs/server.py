"""A repository that `cvmfs_server` manages on this host: where it keeps what, as its configuration says."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from unpacker.cvmfs import files
from unpacker.cvmfs import spool as spools
from unpacker.cvmfs.keys import check_name
from unpacker.cvmfs.signing import LIMIT
from unpacker.errors import PublishError, SettingsError
from unpacker.publish import posix

MOUNTS = "/cvmfs"
KEYS = "/etc/cvmfs/keys"
COMMAND = "cvmfs_server"

_TRUE = "true"


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """What server.conf says of one repository. `command` is the program that manages it.

    `upstream` is the kind of its storage: `local`, `gw` behind a gateway, or another one; `storage` is the directory of
    a local one. `is_mounted` tells whether something is mounted at a path.
    """

    name: str
    spool: str
    union: str
    upstream: str
    storage: str | None
    keeps_xattrs: bool
    keeps_nanoseconds: bool
    keeps_specials: bool
    restricts_access: bool
    is_collectable: bool
    command: str = COMMAND
    keys: str = KEYS
    is_mounted: Callable[[str], bool] = field(default=os.path.ismount, repr=False, compare=False)

    @classmethod
    def find(
        cls,
        name: str,
        *,
        configuration: str = spools.CONFIGURATION,
        spool_root: str = spools.SPOOLS,
        mounts: str = MOUNTS,
        **options: str | Callable[[str], bool],
    ) -> Server:
        """The repository of this name; PublishError if no repository of that name can be published to on this host."""
        check_name(name)
        directory = f"{configuration}/{name}"
        settings = spools.shell_settings(f"{directory}/server.conf")
        if settings is None:
            raise PublishError(
                f"no repository {name} is managed by cvmfs_server on this host (there is no {directory}/server.conf): "
                "run this on its stratum 0 or on a publisher behind its gateway, or name a directory or "
                "stratum0:DIRECTORY as target"
            )
        if settings.get("CVMFS_REPOSITORY_TYPE") == "stratum1" or os.path.exists(f"{directory}/replica.conf"):
            raise PublishError(f"this host has a replica of {name}, where nothing can be published: use its stratum 0")
        kind, _, rest = settings.get("CVMFS_UPSTREAM_STORAGE", "").partition(",")
        if not kind:
            raise PublishError(f"{directory}/server.conf does not say CVMFS_UPSTREAM_STORAGE: repair it")
        return cls(
            name=name,
            spool=settings.get("CVMFS_SPOOL_DIR") or f"{spool_root}/{name}",
            union=settings.get("CVMFS_UNION_DIR") or f"{mounts}/{name}",
            upstream=kind,
            storage=rest.partition(",")[2] or None if kind == "local" else None,
            keeps_xattrs=_is_set(settings, "CVMFS_INCLUDE_XATTRS"),
            keeps_nanoseconds=_is_set(settings, "CVMFS_ENABLE_MTIME_NS"),
            keeps_specials=not _is_set(settings, "CVMFS_IGNORE_SPECIAL_FILES"),
            restricts_access=_is_set(settings, "CVMFS_CATALOG_ALT_PATHS") or bool(settings.get("CVMFS_VOMS_AUTHZ")),
            is_collectable=_is_set(settings, "CVMFS_GARBAGE_COLLECTION"),
            **options,  # type: ignore[arg-type]
        )

    @property
    def is_gateway(self) -> bool:
        """Whether a gateway grants leases and commits, because this host has no access to the storage."""
        return self.upstream == "gw"

    @property
    def readonly(self) -> str:
        """Where the published revision is mounted, untouched by open transactions."""
        return f"{self.spool}/rdonly"

    @property
    def flag(self) -> str:
        """The file that is there while a transaction is open."""
        return f"{self.spool}/in_transaction.lock"

    def published(self, subdirectory: str) -> str:
        """The directory of the target as it is published. PublishError where nothing is mounted: an empty mount point
        is no empty repository."""
        try:
            mounted = self.is_mounted(self.readonly)
            os.stat(self.readonly)
        except OSError as error:
            raise posix.failure(error, f"looking at the mount of {self.name}; try cvmfs_server mount") from error
        if not mounted:
            raise PublishError(
                f"{self.name} is not mounted at {self.readonly}: run cvmfs_server mount {self.name}, then run again"
            )
        return f"{self.readonly}/{subdirectory}" if subdirectory else self.readonly

    def is_behind(self) -> bool:
        """Whether this host still shows an older revision than its own storage has; False where that cannot be told."""
        if self.storage is None:
            return False
        try:
            shown = os.getxattr(self.readonly, "user.root_hash").decode("ascii", "replace")
            lines = files.read(f"{self.storage}/.cvmfspublished", LIMIT).splitlines()
        except OSError:
            return False
        return any(line[:1] == b"C" and line[1:].decode("ascii", "replace") != shown for line in lines[:1])

    def check_trunk(self) -> None:
        """PublishError while somebody has an older revision checked out: what is published then goes to a branch."""
        if os.path.exists(f"{self.spool}/checkout"):
            raise PublishError(
                f"a named snapshot of {self.name} is checked out ({self.spool}/checkout): publish it or go back with "
                "cvmfs_server checkout, then run again"
            )


def place(target: str, mounts: str = MOUNTS) -> tuple[str, str]:
    """The repository's name and the directory in it, "" for its root, of a target `/cvmfs/<name>[/<directory>]`."""
    rest = target.removeprefix(f"{mounts}/").rstrip("/")
    name, _, subdirectory = rest.partition("/")
    if rest == target or any(part in ("", ".", "..") or part[0] == "." for part in rest.split("/")):
        raise SettingsError(f"not a repository below {mounts}: {target!r}; write {mounts}/NAME or {mounts}/NAME/DIR")
    return check_name(name), subdirectory


def _is_set(settings: Mapping[str, str], key: str) -> bool:
    return settings.get(key, "").strip() == _TRUE

"""The operator's settings: flags, then `UNPACKER_*` variables, then unpacker.toml. The wishlist can set none of them.

unpacker.toml is taken from `--config`, else `$UNPACKER_CONFIG`, else the user's and the system's configuration
directories. Never from the working directory, which may be a checkout of the wishlist that anyone may have changed.
"""

from __future__ import annotations

import difflib
import os
import subprocess
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit, urlunsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from unpacker import mountpoints
from unpacker.errors import SettingsError
from unpacker.limits import Limits
from unpacker.reference import Repository

ENVIRONMENT_PREFIX = "UNPACKER_"
_PATHS = ("target", "published_at", "state", "docker_config", "keys", "notification_file")
_TABLES = ("limits", "receipts", "modules")
_DUCCS = {"jobs": "DUCC_MAX_CONCURRENT_DOWNLOADS"}
"""Variables of DUCC that mean the same as a setting, for where that is not set."""
_STRICT = ConfigDict(extra="forbid", frozen=True)


def _split(value: object) -> object:
    """Lists may be written with commas, for the environment's sake."""
    return [part for part in value.replace(",", " ").split() if part] if isinstance(value, str) else value


Names = Annotated[frozenset[str], BeforeValidator(_split)]
Directories = Annotated[tuple[str, ...], AfterValidator(mountpoints.parse), BeforeValidator(_split)]


class Receipts(BaseModel):
    """`[receipts]`: attach to each published image a note of where it was unpacked."""

    model_config = _STRICT

    enabled: bool = True
    repository: str | None = None


class Modules(BaseModel):
    """`[modules]`: how users of this site run images, for `use` and `modules`."""

    model_config = _STRICT

    apptainer: str = Field(default="apptainer", pattern=r"^[A-Za-z0-9_./+-]+$")
    binds: tuple[str, ...] = ()
    gpu_options: tuple[str, ...] = ("--nv",)


class Settings(BaseModel):
    """All settings, checked. Times in the unit that the name says."""

    model_config = _STRICT

    target: str | None = None
    published_at: str | None = None
    state: str | None = None
    jobs: int = Field(default_factory=lambda: len(os.sched_getaffinity(0)), gt=0)
    wishlist_id: str | None = None
    insecure_registries: Names = frozenset()
    may_become_public: Names = frozenset()
    docker_config: str | None = None
    timeout: float = Field(default=60, gt=0)
    attempts: int = Field(default=5, gt=0)
    connections_per_host: int = Field(default=8, gt=0)
    keep_vanished_days: float | None = Field(default=None, ge=0)
    grace_days: float = Field(default=7, ge=0)
    keep_revisions_days: float = Field(default=3, ge=0)
    keys: str | None = None
    layers_view: bool = True
    way: Literal["auto", "fast", "plain"] = "auto"
    transaction_bytes: int = Field(default=20_000_000_000, gt=0)
    transaction_entries: int = Field(default=200_000, gt=0)
    notification_file: str | None = None
    mount_points: Directories = ()
    lock_wait: float = Field(default=0, ge=0)
    limits: Limits = Limits()
    receipts: Receipts | None = None
    modules: Modules = Modules()

    @property
    def state_directory(self) -> str:
        """Where journals and caches live: losing it loses history and time, nothing else."""
        if self.state:
            return self.state
        if os.geteuid() == 0:
            return "/var/lib/unpacker"
        home = os.environ.get("XDG_STATE_HOME")
        if not home:
            try:
                home = str(Path.home() / ".local" / "state")
            except RuntimeError:
                raise SettingsError("this user has no home directory: say --state DIRECTORY") from None
        return f"{home}/unpacker"


def load(flags: Mapping[str, Any], environment: Mapping[str, str], config: str | None = None) -> Settings:
    """Merges the three sources. SettingsError names the source and the key, all wrong keys at once."""
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for key, name in _DUCCS.items():
        if environment.get(name):
            values[key], origin[key] = environment[name], name
    path = _find(config, environment)
    if path is not None:
        for key, value in _read(path).items():
            values[key], origin[key] = value, path
    for key in Settings.model_fields:
        name = ENVIRONMENT_PREFIX + key.upper()
        if environment.get(name) and key not in _TABLES:
            values[key], origin[key] = environment[name], name
    _refuse_misspelt(environment)
    for key, value in flags.items():
        if value is not None:
            values[key], origin[key] = value, "--" + key.replace("_", "-")
    for key in _PATHS:
        # Shells expand it in few of the places where it is written, and none in a file.
        if isinstance(values.get(key), str) and values[key].startswith("~"):
            values[key] = os.path.expanduser(values[key])
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        raise SettingsError(_explain(error, origin)) from None
    for name in settings.may_become_public:
        try:
            Repository.parse(name)
        except ValueError as error:
            raise SettingsError(f"may_become_public: {error}") from None
    for name in settings.insecure_registries:
        if "/" in name:
            raise SettingsError(f"insecure_registries: {name!r} is no host (expected registry.example.org:5000)")
    mount = settings.published_at
    if mount is not None and not (os.path.isabs(mount) and mount.isprintable()):
        raise SettingsError(f"published_at: {mount!r} is no absolute path of printable text")
    return settings


def _refuse_misspelt(environment: Mapping[str, str]) -> None:
    """SettingsError for a variable that sets nothing and looks as if it should. Others may have names of their own."""
    known = {ENVIRONMENT_PREFIX + key.upper(): key for key in (*Settings.model_fields, "config")}
    for name in sorted(environment):
        if known.get(name) in _TABLES:
            raise SettingsError(f"{name}: [{known[name]}] can be set in unpacker.toml only")
        if name.startswith(ENVIRONMENT_PREFIX) and name not in known:
            spellings = [each.removeprefix(ENVIRONMENT_PREFIX) for each in known]
            close = difflib.get_close_matches(name.removeprefix(ENVIRONMENT_PREFIX), spellings, n=1, cutoff=0.85)
            if close:
                raise SettingsError(f"{name}: no such setting (is {ENVIRONMENT_PREFIX}{close[0]} meant?)")


def _find(config: str | None, environment: Mapping[str, str]) -> str | None:
    explicit = config or environment.get(ENVIRONMENT_PREFIX + "CONFIG")
    if explicit:
        return explicit
    home = environment.get("XDG_CONFIG_HOME") or os.path.join(environment.get("HOME", "/"), ".config")
    candidates = (os.path.join(home, "unpacker", "unpacker.toml"), "/etc/unpacker/unpacker.toml")
    return next((c for c in candidates if os.path.exists(c)), None)


def _read(path: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise SettingsError(f"cannot read the settings {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: {error}") from None


def _explain(error: ValidationError, origin: Mapping[str, str]) -> str:
    lines = []
    for fault in error.errors(include_url=False, include_input=False):
        key = ".".join(str(part) for part in fault["loc"])
        source = origin.get(str(fault["loc"][0]) if fault["loc"] else "", "") or "settings"
        unknown = fault["type"] in ("extra_forbidden", "unexpected_keyword_argument")
        message = "no such setting" if unknown else fault["msg"]
        close = difflib.get_close_matches(key, Settings.model_fields, n=1, cutoff=0.8) if unknown else ()
        if close:
            message += f" (is {close[0]} meant?)"
        lines.append(f"{source}: {key}: {message}")
    return "\n".join(lines)


def wishlist_identity(path: str) -> str:
    """Who a wishlist is, on every machine that has a checkout of it: its git remote and its path there.

    Without a git remote it is its absolute path. A user name or token in the remote's URL is left out, because the
    identity stands in every published record. SettingsError where git refuses to look (somebody else's checkout) or is
    not installed: a wishlist that changed its identity unnoticed would never again remove what it published, and two
    that had the same would remove each other's.
    """
    absolute = os.path.realpath(path)
    directory = os.path.dirname(absolute)
    top = _git(directory, "rev-parse", "--show-toplevel")
    remote = _git(directory, "config", "--get", "remote.origin.url")
    if not top or not remote:
        return absolute
    return f"{_without_secrets(remote)}//{os.path.relpath(absolute, os.path.realpath(top))}"


def _without_secrets(url: str) -> str:
    if "://" in url:
        parts = urlsplit(url)
        host = parts.netloc.rpartition("@")[2]
        url = urlunsplit((parts.scheme, host, parts.path, "", ""))
    return url.removesuffix("/").removesuffix(".git")


def _is_checkout(directory: str) -> bool:
    """Whether a directory, or one above it, has what a working tree of git has."""
    while not os.path.lexists(os.path.join(directory, ".git")):
        above = os.path.dirname(directory)
        if above == directory:
            return False
        directory = above
    return True


def _git(directory: str, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", directory, *arguments],
            capture_output=True,
            timeout=10,
            check=False,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "LC_ALL": "C"},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        if isinstance(error, FileNotFoundError) and not _is_checkout(directory):
            return ""  # without git, and nothing to ask it
        raise SettingsError(
            f"cannot ask git what repository {directory} is of ({error}), so it is not known who this wishlist is: "
            "install git, say --wishlist-id, or set wishlist_id in the settings"
        ) from None
    if b"dubious ownership" in done.stderr:
        raise SettingsError(
            f"git refuses to look at {directory}, which another user owns, so it is not known who this wishlist is: "
            "say --wishlist-id, or set wishlist_id in the settings"
        )
    return os.fsdecode(done.stdout).strip() if done.returncode == 0 else ""

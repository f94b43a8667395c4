"""What users give to verbs: the options that several verbs share, and what becomes of them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from unpacker.errors import SettingsError, WishlistError
from unpacker.multiarch import is_platform_of
from unpacker.record import Published, Unreadable
from unpacker.wishlist import Wishlist, parse

if TYPE_CHECKING:
    from unpacker.settings import Settings

WishlistPath = Annotated[str, typer.Argument(metavar="WISHLIST", help="wishlist.yaml, a DUCC recipe or an OSG list")]
Target = Annotated[
    str | None, typer.Option("--target", "-t", help="A directory, /cvmfs/NAME[/DIR], or stratum0:DIRECTORY.")
]
Images = Annotated[list[str] | None, typer.Argument(metavar="[IMAGE...]", help="Names; all if none is given.")]
State = Annotated[str | None, typer.Option("--state", help="Directory of journals and caches.")]
Config = Annotated[str | None, typer.Option("--config", "-c", help="The operator's unpacker.toml.")]
Jobs = Annotated[int | None, typer.Option("--jobs", "-j", min=1, help="How many layers to read at once.")]
Json = Annotated[bool, typer.Option("--json", help="For programs: JSON on stdout.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log each step.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing while all is well.")]
LogFormat = Annotated[str, typer.Option("--log-format", help="text or json.", metavar="text|json")]
WishlistId = Annotated[str | None, typer.Option("--wishlist-id", help="Who this wishlist is in the records.")]
Only = Annotated[str | None, typer.Option("--only", metavar="PATTERN", help="Only names that match; removes nothing.")]
Rebuild = Annotated[bool, typer.Option("--rebuild", help="Publish damaged roots and those of older rules anew.")]
Adopt = Annotated[bool, typer.Option("--adopt", help="Take over what DUCC or cvmfs-singularity-sync published.")]
AllowRemovals = Annotated[bool, typer.Option("--allow-removals", help="Remove however many are not wished any more.")]
ReportFile = Annotated[str | None, typer.Option("--report", metavar="FILE", help="Write a report: .json or .md")]
Keys = Annotated[str | None, typer.Option("--keys", metavar="DIR", help="The repository's keys. [DIRECTORY.keys]")]
Repository = Annotated[str, typer.Argument(metavar="stratum0:DIRECTORY", help="Where the repository is, or shall be.")]
Wait = Annotated[float | None, typer.Option("--lock-wait", metavar="SECONDS", help="Wait for a busy target.")]

_WISHLIST_LIMIT = 8 << 20


def load_settings(config: str | None, **flags: object) -> Settings:
    """The settings of this call: `flags` that are None were not given."""
    from unpacker.settings import load

    return load(flags, os.environ, config)


def configure_logs(*, verbose: bool, quiet: bool, log_format: str) -> None:
    """Logs as the flags have it; SettingsError for a format that there is not."""
    from unpacker import logs

    if log_format not in ("text", "json"):
        raise SettingsError(f"--log-format is text or json, not {log_format!r}")
    logs.configure(level=logs.level_of(verbose=verbose, quiet=quiet), as_json=log_format == "json")


def read_wishlist(path: str) -> Wishlist:
    """The wishlist of that file, faults and all; WishlistError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return parse(file.read(_WISHLIST_LIMIT + 1), path)
    except OSError as error:
        raise WishlistError(f"cannot read the wishlist {path}: {error.strerror}") from None


def published_names(given: list[str] | None, standing: Mapping[str, Published | Unreadable]) -> list[str]:
    """The public paths that a user means, who may write an image's URL; all, if none is given."""
    if not given:
        return list(standing)
    names = list(dict.fromkeys(g.removeprefix("https://").removeprefix("http://").replace("@", ":") for g in given))
    unknown = [name for name in names if name not in standing]
    if unknown:
        raise WishlistError(f"not published: {', '.join(unknown)} (see `unpacker status`)")
    # Who names what leads to several platforms means all of these.
    return [*names, *(p for p in standing if p not in names and any(is_platform_of(p, name) for name in names))]

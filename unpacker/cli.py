"""The command line: each verb parses its arguments, calls one function, prints the value it gave, and exits by it."""

from __future__ import annotations

import atexit
import gc as cycles
import io
import os
import shutil
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import asdict
from types import FrameType
from typing import Annotated, NoReturn

import typer

from unpacker import __version__, assembly, journal, logs, report
from unpacker.errors import SettingsError, UnpackerError, WishlistError
from unpacker.plan import Resolution
from unpacker.record import Published, Unreadable
from unpacker.settings import Settings, load
from unpacker.wishlist import Wishlist, parse

app = typer.Typer(
    name="unpacker",
    help="Keeps a tree of unpacked container images equal to a wishlist in git.",
    epilog="Exit codes: 0 all as wished; 1 some wishes failed; 2 wishlist or arguments wrong; 3 no registry reached; "
    "4 image malformed; 5 target failed or busy; 6 refused, a person must look; 10 changes (plan --detailed-exitcode).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

EXIT_SOME_FAILED = 1
EXIT_UNREACHABLE = 3
EXIT_TARGET = 5
EXIT_REFUSED = 6
EXIT_CHANGES = 10
_WISHLIST_LIMIT = 8 << 20

WishlistPath = Annotated[str, typer.Argument(metavar="WISHLIST", help="wishlist.yaml, a DUCC recipe or an OSG list")]
Target = Annotated[str | None, typer.Option("--target", "-t", help="A directory, or stratum0:DIRECTORY.")]
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
AllowRemovals = Annotated[bool, typer.Option("--allow-removals", help="Remove however many are not wished any more.")]
ReportFile = Annotated[str | None, typer.Option("--report", metavar="FILE", help="Write a report: .json or .md")]
Keys = Annotated[str | None, typer.Option("--keys", metavar="DIR", help="The repository's keys. [DIRECTORY.keys]")]
Repository = Annotated[str, typer.Argument(metavar="stratum0:DIRECTORY", help="Where the repository is, or shall be.")]
Wait = Annotated[float | None, typer.Option("--lock-wait", metavar="SECONDS", help="Wait for a busy target.")]


class Stopped(BaseException):
    """SIGINT or SIGTERM: unwinds everything, so that our transaction is aborted and the journal written."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def main() -> NoReturn:
    """The entry point: runs one verb and turns every error into a message and an exit code."""
    # Trees and changesets are millions of small objects without cycles: looking for cycles in them at the usual pace
    # costs half as much time as making them.
    cycles.set_threshold(500_000, 20, 20)
    atexit.register(cycles.freeze)  # nor are they looked for once more on the way out
    # Started with one of them closed (`2>&-`), what is for it goes nowhere, and not to the other.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        # Names are bytes, and not every terminal can show every letter: neither must end a run.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        app()
    except UnpackerError as error:
        _complain(str(error))
        if "--json" in sys.argv:
            # A program that asked for JSON gets JSON, also where the verb came to nothing.
            value = {"error": str(error), "kind": type(error).__name__, "exit_code": error.exit_code}
            print(report.as_json(value), end="")
        sys.exit(error.exit_code)
    except Stopped as stopped:
        _complain(f"stopped by {signal.Signals(stopped.number).name}")
        _leave(128 + stopped.number)
    except BrokenPipeError:
        # Who reads has read enough (`unpacker status | head`).
        _leave(EXIT_SOME_FAILED)
    except OSError as error:
        _complain(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
        _leave(EXIT_TARGET)
    sys.exit(0)


def _leave(code: int) -> NoReturn:
    """Ends the process without waiting for threads, which may wait for a registry that never answers."""
    with suppress(OSError, ValueError):
        sys.stderr.flush()
        sys.stdout.flush()
    os._exit(code)


def _stop(number: int, frame: FrameType | None) -> None:
    # A second signal while we unwind must not break off the unwinding.
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    raise Stopped(number)


def _complain(message: str) -> None:
    print(f"unpacker: {message}", file=sys.stderr)


def _version(asked: bool) -> None:
    if asked:
        print(f"unpacker {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None: ...


# -- verbs ------------------------------------------------------------------------------------------------------


@app.command()
def validate(wishlist: WishlistPath = "wishlist.yaml", json: Json = False) -> None:
    """Find every fault of a wishlist: file:line:column; exit 2 if there is any."""
    found = _read_wishlist(wishlist)
    if json:
        faults = [asdict(f) for f in (*found.faults, *found.warnings)]
        print(report.as_json({"wishes": len(found.wishes), "sound": found.sound, "faults": faults}), end="")
    else:
        _print_faults(found)
        print(f"{wishlist}: {len(found.wishes)} wishes, {len(found.faults)} faults, {len(found.warnings)} warnings")
    raise typer.Exit(0 if found.sound else WishlistError.exit_code)


@app.command()
def plan(
    wishlist: WishlistPath = "wishlist.yaml",
    target: Target = None,
    against: Annotated[
        str | None, typer.Option("--against", metavar="OLD", help="Compare with an older wishlist; needs no target.")
    ] = None,
    state: State = None,
    config: Config = None,
    wishlist_id: WishlistId = None,
    only: Only = None,
    rebuild: Rebuild = False,
    allow_removals: AllowRemovals = False,
    all_names: Annotated[bool, typer.Option("--all", help="Show what stays as it is, too.")] = False,
    detailed_exitcode: Annotated[bool, typer.Option("--detailed-exitcode", help="Exit 10 for changes.")] = False,
    json: Json = False,
    report_file: ReportFile = None,
    verbose: Verbose = False,
    log_format: LogFormat = "text",
) -> None:
    """Show what reconcile would do and why; changes nothing."""
    settings = _settings(config, target=target, state=state, wishlist_id=wishlist_id)
    _log(verbose=verbose, quiet=False, log_format=log_format)
    _check_report(report_file)
    if against is not None:
        _plan_against(wishlist, against, settings, json=json, report_file=report_file)
    from unpacker.reconcile import survey
    from unpacker.resolve import unreachable

    found = _read_wishlist(wishlist)
    _print_faults(found)
    choice = assembly.Choice(only=only, rebuild=rebuild, allow_removals=allow_removals)
    request = assembly.request(found, wishlist, settings, choice)
    surveyed = survey(request)
    value = report.plan_json(surveyed.plan)
    rows = report.plan_rows(surveyed.plan, all_actions=all_names)
    summary = report.plan_summary(surveyed.plan)
    _warn_of_nothing(only, surveyed.resolution)
    if json:
        print(report.as_json(value), end="")
    else:
        _warn(surveyed.plan.warnings)
        print(_table(report.PLAN_HEADER, rows) + summary, end="")
    _write_report(report_file, value, report.PLAN_HEADER, rows, summary)
    if unreachable(surveyed.resolution):
        code = EXIT_UNREACHABLE
    elif surveyed.plan.held:
        code = EXIT_REFUSED
    elif surveyed.plan.unresolved or not found.sound:
        code = EXIT_SOME_FAILED
    else:
        code = EXIT_CHANGES if detailed_exitcode and surveyed.plan.changes else 0
    raise typer.Exit(code)


def _plan_against(wishlist: str, against: str, settings: Settings, *, json: bool, report_file: str | None) -> NoReturn:
    from unpacker.proposal import propose

    new, old = _read_wishlist(wishlist), _read_wishlist(against)
    _print_faults(new)
    registry = assembly.registry(settings)
    with ThreadPoolExecutor(settings.connections_per_host) as executor:
        proposals = propose(new.wishes, old.wishes, registry, executor, settings.limits, settings.may_become_public)
    rows, summary = report.proposal_rows(proposals), report.proposal_summary(proposals)
    faults = [str(fault) for fault in new.faults]
    value = {"faults": faults, "proposals": [asdict(p) for p in proposals]}
    if json:
        print(report.as_json(value), end="")
    else:
        print(_table(report.PROPOSAL_HEADER, rows) + summary, end="")
    _write_report(report_file, value, report.PROPOSAL_HEADER, rows, summary + report.markdown_list(faults))
    if not new.sound:
        raise typer.Exit(WishlistError.exit_code)
    raise typer.Exit(EXIT_SOME_FAILED if any(p.error for p in proposals) else 0)


@app.command()
def reconcile(
    wishlist: WishlistPath = "wishlist.yaml",
    target: Target = None,
    state: State = None,
    config: Config = None,
    wishlist_id: WishlistId = None,
    jobs: Jobs = None,
    only: Only = None,
    rebuild: Rebuild = False,
    allow_removals: AllowRemovals = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show the plan.")] = False,
    lock_wait: Wait = None,
    json: Json = False,
    report_file: ReportFile = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
    log_format: LogFormat = "text",
) -> None:
    """Make what stands published equal to what is wished."""
    if dry_run:
        plan(
            wishlist=wishlist,
            target=target,
            state=state,
            config=config,
            wishlist_id=wishlist_id,
            only=only,
            rebuild=rebuild,
            allow_removals=allow_removals,
            json=json,
            report_file=report_file,
            verbose=verbose,
            log_format=log_format,
        )
    settings = _settings(config, target=target, state=state, wishlist_id=wishlist_id, jobs=jobs, lock_wait=lock_wait)
    _log(verbose=verbose, quiet=quiet, log_format=log_format)
    found = _read_wishlist(wishlist)
    _print_faults(found)
    choice = assembly.Choice(only=only, rebuild=rebuild, allow_removals=allow_removals)
    _carry_out(found, wishlist, settings, choice, json=json, quiet=quiet, report_file=report_file)


@app.command()
def publish(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="registry/repository:tag, or oci:PATH:TAG")],
    target: Target = None,
    name: Annotated[
        str | None, typer.Option("--as", metavar="NAME", help="The public name: registry/repository:tag.")
    ] = None,
    platform: Annotated[str, typer.Option("--platform", help="os/architecture[/variant]")] = "linux/amd64",
    state: State = None,
    config: Config = None,
    jobs: Jobs = None,
    lock_wait: Wait = None,
    json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    log_format: LogFormat = "text",
) -> None:
    """Publish one image outside of any wishlist; it stays until it is removed by name."""
    settings = _settings(config, target=target, state=state, jobs=jobs, lock_wait=lock_wait)
    _log(verbose=verbose, quiet=quiet, log_format=log_format)
    layout, text = assembly.source(image, name)
    found = parse(f"version: 2\nimages:\n- image: '{text}'\n  platform: '{platform}'\n".encode(), "the command line")
    if not found.sound:
        raise WishlistError("; ".join(fault.message for fault in found.faults))
    choice = assembly.Choice(layout=layout, anonymous=True)
    _carry_out(found, "", settings, choice, json=json, quiet=quiet, report_file=None)


@app.command()
def remove(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Published names: registry/repository:tag")],
    target: Target = None,
    config: Config = None,
    lock_wait: Wait = None,
) -> None:
    """Take published names away, whoever published them; their roots stay until gc."""
    settings = _settings(config, target=target, lock_wait=lock_wait)
    publisher = assembly.existing(settings)
    with publisher.lock(settings.lock_wait):
        paths = _published_names(names, publisher.published())
        with publisher.transaction(f"remove {', '.join(paths)}") as transaction:
            transaction.remove(paths, now=int(time.time()))
    for path in paths:
        print(f"removed {path}")


@app.command()
def status(
    wishlist: Annotated[str | None, typer.Argument(metavar="[WISHLIST]", help="Show what it asks for, too.")] = None,
    target: Target = None,
    state: State = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Show every wish and tag: published, pending, failing, vanished; asks no registry."""
    from unpacker.status import State as Standing
    from unpacker.status import status as standing

    settings = _settings(config, target=target, state=state)
    publisher = assembly.publisher(settings)
    wishes = None
    if wishlist is not None:
        found = _read_wishlist(wishlist)
        _print_faults(found)
        wishes = found.wishes
    _warn(publisher.concerns())
    history = journal.load(assembly.state(settings))
    rows = standing(wishes, publisher.published(), history.failures, history.vanished, history.expansions)
    now = int(time.time())
    if json:
        value = {"finished": report.moment(history.finished), "names": report.status_json(rows)}
        print(report.as_json(value), end="")
    else:
        print(_table(report.STATUS_HEADER, report.status_rows(rows, now)), end="")
        last = f"last run {report.age(now - history.finished)} ago" if history.finished else "no run yet"
        counts = ", ".join(
            f"{sum(r.state is s for r in rows)} {s.value}" for s in Standing if any(r.state is s for r in rows)
        )
        print(f"{counts or 'nothing published'}; {last}")
    bad = any(row.state in (Standing.FAILING, Standing.UNREADABLE) for row in rows)
    raise typer.Exit(EXIT_SOME_FAILED if bad else 0)


@app.command()
def verify(
    images: Annotated[
        list[str] | None, typer.Argument(metavar="[IMAGE...]", help="Names; all if none is given.")
    ] = None,
    target: Target = None,
    config: Config = None,
    quick: Annotated[bool, typer.Option("--quick", help="Names and metadata only, not contents.")] = False,
    json: Json = False,
) -> None:
    """Compare published trees with their records; exit 5 if anything differs."""
    settings = _settings(config, target=target)
    publisher = assembly.existing(settings)
    standing = publisher.published()
    wanted = _published_names(images, standing)
    problems = [
        {"name": p.public_path, "path": p.path, "problem": p.what}
        for p in assembly.problems(publisher, standing, wanted, quick=quick)
    ]
    if json:
        print(report.as_json({"checked": len(wanted), "problems": problems}), end="")
    else:
        rows = [(p["name"], p["path"], p["problem"]) for p in problems]
        print(_table(("NAME", "PATH", "PROBLEM"), rows), end="")
        print(f"{len(wanted)} names checked, {len(problems)} problems")
    raise typer.Exit(EXIT_TARGET if problems else 0)


@app.command()
def gc(
    target: Target = None,
    grace: Annotated[
        float | None, typer.Option("--grace", min=0, metavar="DAYS", help="How long unreferenced roots stay.")
    ] = None,
    keep_revisions: Annotated[
        float | None,
        typer.Option("--keep-revisions", min=0, metavar="DAYS", help="How long a repository's old revisions stay."),
    ] = None,
    state: State = None,
    config: Config = None,
    lock_wait: Wait = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would go.")] = False,
    json: Json = False,
) -> None:
    """Delete roots and contents that no name refers to, after a grace period."""
    from unpacker.cache import prune
    from unpacker.gc import Collected

    settings = _settings(
        config, target=target, state=state, grace_days=grace, keep_revisions_days=keep_revisions, lock_wait=lock_wait
    )
    publisher = assembly.existing(settings)
    with nullcontext() if dry_run else publisher.lock(settings.lock_wait):
        found = assembly.collect(publisher, settings, dry_run=dry_run)
    if not dry_run:
        prune(assembly.state(settings), unused_for=90 * 86_400)
    if json:
        print(report.as_json({"dry_run": dry_run, **asdict(found)}), end="")
        return
    for root in found.roots:
        print(f"{'would delete' if dry_run else 'deleted'} {root}")
    print(
        f"{len(found.roots)} roots and {found.contents} contents {'to delete' if dry_run else 'deleted'}, "
        f"{report.size(found.freed)}; {found.waiting} roots wait for their grace period"
        + (f"; {found.revisions} old revisions" if not isinstance(found, Collected) else "")
    )


@app.command()
def init(
    repository: Repository,
    name: Annotated[str, typer.Option("--name", help="The repository's name, such as unpacked.example.org.")],
    keys: Keys = None,
    compression: Annotated[
        str, typer.Option("--compression", metavar="dense|fast|stock", help="Of objects.")
    ] = "dense",
    hash_: Annotated[str, typer.Option("--hash", metavar="sha1|rmd160|shake128", help="Of objects.")] = "sha1",
    days: Annotated[int, typer.Option("--days", min=1, help="How long the whitelist is good for.")] = 30,
) -> None:
    """Make an empty CernVM-FS repository, with keys if there are none."""
    from unpacker.cvmfs.repository import Repository as Native

    directory = assembly.stratum0(repository)
    made = Native.create(directory, name, keys, compression=compression, hash=hash_, days=days, now=int(time.time()))
    where = keys or f"{directory}.keys"
    print(
        f"made {made.name} in {directory}; its keys are in {where}: back them up, and give {made.name}.pub to clients"
    )
    print(f"its whitelist expires in {days} days: run `unpacker resign {repository}` before that")


@app.command()
def resign(
    repository: Repository,
    keys: Keys = None,
    days: Annotated[int, typer.Option("--days", min=1, help="How long from now on it is good for.")] = 30,
) -> None:
    """Renew the whitelist of a CernVM-FS repository, without which no client mounts it; needs the master key."""
    from unpacker.cvmfs.repository import Repository as Native

    directory = assembly.stratum0(repository)
    native = Native.open(directory)
    renewed = native.resign(keys or f"{directory}.keys", days=days, now=int(time.time()))
    print(f"the whitelist of {native.name} is good until {report.moment(renewed.expires)}")


# -- what verbs share -------------------------------------------------------------------------------------------


def _carry_out(
    found: Wishlist,
    path: str,
    settings: Settings,
    choice: assembly.Choice,
    *,
    json: bool,
    quiet: bool,
    report_file: str | None,
) -> NoReturn:
    from unpacker.progress import shown
    from unpacker.reconcile import exit_code
    from unpacker.reconcile import reconcile as run

    began = time.monotonic()
    request = assembly.request(found, path, settings, choice)
    _warn(request.publisher.concerns())
    _check_report(report_file)
    assembly.prepare_state(settings)
    with shown(quiet=quiet or json) as progress:
        result = run(request, progress)
    unresolved = result.survey.plan.unresolved
    value = report.outcomes_json(result.outcomes, unresolved)
    value["faults"] = [str(fault) for fault in found.faults]
    value["refusal"] = result.survey.plan.refusal or None
    value["troubles"] = [str(trouble) for trouble in result.troubles]
    rows = report.outcome_rows(result.outcomes, unresolved)
    summary = report.outcome_summary(result.outcomes, unresolved, time.monotonic() - began)
    if result.survey.plan.refusal:
        summary += f"removals held: {result.survey.plan.refusal}; --allow-removals lets them happen\n"
    _warn_of_nothing(choice.only, result.survey.resolution)
    errors = [e for e in (*(o.error for o in result.outcomes), *(u.error for u in unresolved)) if e is not None]
    # Of a single image its own error says more than "some wishes failed".
    code = exit_code(result, sound=found.sound, ignored=found.ignore_errors)
    if choice.anonymous and errors:
        code = errors[0].exit_code
    if json:
        print(report.as_json(value), end="")
    elif code or not quiet:
        _warn(result.survey.plan.warnings)
        print(_table(report.OUTCOME_HEADER, rows) + summary, end="")
    for trouble in result.troubles:
        _complain(str(trouble))
    _write_report(report_file, value, report.OUTCOME_HEADER, rows, summary)
    raise typer.Exit(code)


def _settings(config: str | None, **flags: object) -> Settings:
    return load(flags, os.environ, config)


def _log(*, verbose: bool, quiet: bool, log_format: str) -> None:
    if log_format not in ("text", "json"):
        raise SettingsError(f"--log-format is text or json, not {log_format!r}")
    logs.configure(level=logs.level_of(verbose=verbose, quiet=quiet), as_json=log_format == "json")


def _read_wishlist(path: str) -> Wishlist:
    try:
        with open(path, "rb") as file:
            return parse(file.read(_WISHLIST_LIMIT + 1), path)
    except OSError as error:
        raise WishlistError(f"cannot read the wishlist {path}: {error.strerror}") from None


def _print_faults(found: Wishlist) -> None:
    for fault in found.faults:
        print(fault, file=sys.stderr)
    for warning in found.warnings:
        print(f"{warning} (warning)", file=sys.stderr)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as wide as it gets, for files and pipes; on a terminal one that fits."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    return report.table(header, rows, width=width)


def _warn_of_nothing(only: str | None, resolution: Resolution) -> None:
    if only is not None and not (resolution.pinned or resolution.unresolved or resolution.missing):
        _complain(f"no wish matches --only {only}")


def _warn(warnings: tuple[str, ...]) -> None:
    for warning in warnings:
        _complain(warning)


def _published_names(given: list[str] | None, standing: Mapping[str, Published | Unreadable]) -> list[str]:
    """The public paths that a user means, who may write an image's URL; all, if none is given."""
    if not given:
        return list(standing)
    names = [g.removeprefix("https://").removeprefix("http://").replace("@", ":") for g in given]
    unknown = [name for name in names if name not in standing]
    if unknown:
        raise WishlistError(f"not published: {', '.join(unknown)} (see `unpacker status`)")
    return names


def _check_report(path: str | None) -> None:
    """SettingsError if the report could not be written: said before an hour's work, not after it."""
    directory = os.path.dirname(path or "") or "."
    if path is not None and (os.path.isdir(path) or not os.access(directory, os.W_OK | os.X_OK)):
        problem = "it is a directory" if os.path.isdir(path) else f"{directory} is no directory that can be written to"
        raise SettingsError(f"cannot write the report {path}: {problem}")


def _write_report(
    path: str | None, value: object, header: Sequence[str], rows: Sequence[Sequence[str]], summary: str
) -> None:
    if path is None:
        return
    text = report.markdown(header, rows) + "\n" + summary if path.endswith(".md") else report.as_json(value)
    temporary = f"{path}.{os.getpid()}"
    try:
        with open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError as error:
        raise SettingsError(f"cannot write the report {path}: {error.strerror}") from None

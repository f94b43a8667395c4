"""The verbs that read a wishlist: validate, plan, reconcile, status.

What is heavy to import is imported by the verb that needs it: `validate`, which runs at every commit of some people,
is done before the modules of a run would be loaded.
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from unpacker import report
from unpacker.cli import exits, options, output
from unpacker.errors import SettingsError, WishlistError

if TYPE_CHECKING:
    from unpacker.settings import Settings


def validate(wishlist: options.WishlistPath = "wishlist.yaml", json: options.Json = False) -> None:
    """Find every fault of a wishlist: file:line:column; exit 2 if there is any."""
    found = options.read_wishlist(wishlist)
    if json:
        faults = [asdict(f) for f in (*found.faults, *found.warnings)]
        output.print_json({"wishes": len(found.wishes), "sound": found.sound, "faults": faults})
    else:
        output.print_faults(found)
        print(f"{wishlist}: {len(found.wishes)} wishes, {len(found.faults)} faults, {len(found.warnings)} warnings")
    raise typer.Exit(0 if found.sound else WishlistError.exit_code)


def plan(
    wishlist: options.WishlistPath = "wishlist.yaml",
    target: options.Target = None,
    against: Annotated[
        str | None, typer.Option("--against", metavar="OLD", help="Compare with an older wishlist; needs no target.")
    ] = None,
    state: options.State = None,
    config: options.Config = None,
    wishlist_id: options.WishlistId = None,
    only: options.Only = None,
    rebuild: options.Rebuild = False,
    adopt: options.Adopt = False,
    allow_removals: options.AllowRemovals = False,
    all_names: Annotated[bool, typer.Option("--all", help="Show what stays as it is, too.")] = False,
    detailed_exitcode: Annotated[bool, typer.Option("--detailed-exitcode", help="Exit 10 for changes.")] = False,
    json: options.Json = False,
    report_file: options.ReportFile = None,
    verbose: options.Verbose = False,
    log_format: options.LogFormat = "text",
) -> None:
    """Show what reconcile would do and why; changes nothing."""
    settings = options.load_settings(config, target=target, state=state, wishlist_id=wishlist_id)
    options.configure_logs(verbose=verbose, quiet=False, log_format=log_format)
    output.check_report(report_file)
    if against is not None:
        given = {"--only": only, "--rebuild": rebuild, "--adopt": adopt, "--detailed-exitcode": detailed_exitcode}
        for flag in (flag for flag, value in given.items() if value):
            raise SettingsError(f"{flag} is of a target, and --against asks none: leave one of the two out")
        _plan_against(wishlist, against, settings, json=json, report_file=report_file)
    from unpacker import assembly
    from unpacker.resolve import unreachable
    from unpacker.survey import survey

    found = options.read_wishlist(wishlist)
    output.print_faults(found)
    choice = assembly.Choice(only=only, rebuild=rebuild, adopt=adopt, allow_removals=allow_removals)
    request = assembly.request(found, wishlist, settings, choice)
    surveyed = survey(request)
    way = assembly.way(settings)
    value = report.plan_json(surveyed.plan) | {"way": way}
    rows = report.plan_rows(surveyed.plan, all_actions=all_names)
    summary = report.plan_summary(surveyed.plan) + (f"{way}\n" if way else "")
    output.warn_of_nothing(only, surveyed.resolution)
    if json:
        output.print_json(value)
    else:
        output.warn(surveyed.plan.warnings)
        output.print_table(report.PLAN_HEADER, rows, summary)
    output.write_report(report_file, value, report.PLAN_HEADER, rows, summary)
    if unreachable(surveyed.resolution):
        code = exits.UNREACHABLE
    elif surveyed.plan.held:
        code = exits.REFUSED
    elif surveyed.plan.unresolved or not found.sound:
        code = exits.SOME_FAILED
    else:
        code = exits.CHANGES if detailed_exitcode and surveyed.plan.changes else 0
    raise typer.Exit(code)


def _plan_against(wishlist: str, against: str, settings: Settings, *, json: bool, report_file: str | None) -> NoReturn:
    from unpacker import assembly, pools
    from unpacker.proposal import propose

    new = options.read_wishlist(wishlist)
    output.print_faults(new)
    try:
        before = options.read_wishlist(against).wishes
    except WishlistError as error:
        if not os.path.isfile(against):
            raise
        # The change may be the one that mends it.
        output.warn((f"{against} cannot be read, so everything counts as new: {error}",))
        before = ()
    registry = assembly.registry(settings)
    with pools.asking(settings.connections_per_host) as executor:
        proposals, is_out_of_reach = propose(
            new.wishes, before, registry, executor, settings.limits, settings.may_become_public
        )
    rows, summary = report.proposal_rows(proposals), report.proposal_summary(proposals)
    faults = [str(fault) for fault in new.faults]
    value = {"faults": faults, "proposals": [asdict(p) for p in proposals]}
    if json:
        output.print_json(value)
    else:
        output.print_table(report.PROPOSAL_HEADER, rows, summary)
    output.write_report(report_file, value, report.PROPOSAL_HEADER, rows, summary + report.markdown_list(faults))
    if not new.sound:
        raise typer.Exit(WishlistError.exit_code)
    if is_out_of_reach:
        raise typer.Exit(exits.UNREACHABLE)
    raise typer.Exit(exits.SOME_FAILED if any(p.would_fail for p in proposals) else 0)


def reconcile(
    wishlist: options.WishlistPath = "wishlist.yaml",
    target: options.Target = None,
    state: options.State = None,
    config: options.Config = None,
    wishlist_id: options.WishlistId = None,
    jobs: options.Jobs = None,
    only: options.Only = None,
    rebuild: options.Rebuild = False,
    adopt: options.Adopt = False,
    allow_removals: options.AllowRemovals = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show the plan.")] = False,
    lock_wait: options.Wait = None,
    json: options.Json = False,
    report_file: options.ReportFile = None,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
    log_format: options.LogFormat = "text",
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
            adopt=adopt,
            allow_removals=allow_removals,
            json=json,
            report_file=report_file,
            verbose=verbose,
            log_format=log_format,
        )
    from unpacker import assembly
    from unpacker.cli.run import carry_out

    settings = options.load_settings(
        config, target=target, state=state, wishlist_id=wishlist_id, jobs=jobs, lock_wait=lock_wait
    )
    options.configure_logs(verbose=verbose, quiet=quiet, log_format=log_format)
    found = options.read_wishlist(wishlist)
    output.print_faults(found, quiet=quiet)
    choice = assembly.Choice(only=only, rebuild=rebuild, adopt=adopt, allow_removals=allow_removals)
    carry_out(found, wishlist, settings, choice, json=json, quiet=quiet, report_file=report_file)


def status(
    wishlist: Annotated[
        str | None, typer.Argument(metavar="[WISHLIST]", help="Show what it asks for, too. [wishlist.yaml, if there]")
    ] = None,
    target: options.Target = None,
    state: options.State = None,
    config: options.Config = None,
    json: options.Json = False,
) -> None:
    """Show every wish and tag: published, pending, failing, vanished; asks no registry."""
    from unpacker import assembly, journal
    from unpacker.status import State as Standing
    from unpacker.status import status as standing

    settings = options.load_settings(config, target=target, state=state)
    publisher = assembly.publisher(settings)
    wishes = None
    if wishlist is None and os.path.isfile("wishlist.yaml"):
        wishlist = "wishlist.yaml"
    if wishlist is not None:
        found = options.read_wishlist(wishlist)
        output.print_faults(found)
        wishes = found.wishes
    if not os.path.lexists(publisher.path):
        output.complain(f"there is no target at {publisher.path} yet")
    output.warn(publisher.concerns())
    history = journal.load(assembly.state(settings))
    rows = standing(wishes, publisher.published(), history.failures, history.vanished, history.expansions)
    now = int(time.time())
    if json:
        output.print_json({"finished": report.moment(history.finished), "names": report.status_json(rows)})
    else:
        last = f"last run {report.age(now - history.finished)} ago" if history.finished else "no run noted here"
        counts = ", ".join(
            f"{sum(r.state is s for r in rows)} {s.value}" for s in Standing if any(r.state is s for r in rows)
        )
        output.print_table(
            report.STATUS_HEADER, report.status_rows(rows, now), f"{counts or 'nothing published'}; {last}\n"
        )
    bad = any(row.state in (Standing.FAILING, Standing.UNREADABLE) for row in rows)
    raise typer.Exit(exits.SOME_FAILED if bad else 0)

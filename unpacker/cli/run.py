"""One run, as `reconcile` and `publish` do it: carried out with progress, reported, and ended by its exit code."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from typing import NoReturn

import typer

from unpacker import assembly, report
from unpacker.cli import output
from unpacker.errors import SettingsError
from unpacker.notifications import notified
from unpacker.plan import Outcome
from unpacker.progress import shown
from unpacker.reconcile import exit_code, reconcile
from unpacker.record import Published
from unpacker.settings import Settings
from unpacker.wishlist import Wishlist


def carry_out(
    found: Wishlist,
    path: str,
    settings: Settings,
    choice: assembly.Choice,
    *,
    json: bool,
    quiet: bool,
    report_file: str | None,
) -> NoReturn:
    """Makes the target as the wishlist has it (`path` is where that lies), and says what came of it."""
    began = time.monotonic()
    ignored = assembly.ignored(found, os.environ)
    request = assembly.request(found, path, settings, choice)
    output.warn(request.publisher.concerns())
    output.check_report(report_file)
    output.warn(assembly.prepare_state(settings))
    with shown(quiet=quiet or json) as progress, notified(settings.notification_file, progress) as told:
        result = reconcile(request, told)
    unresolved = result.survey.plan.unresolved
    value = report.outcomes_json(result.outcomes, unresolved)
    value["faults"] = [str(fault) for fault in found.faults]
    value["refusal"] = result.survey.plan.refusal or None
    value["troubles"] = [str(trouble) for trouble in result.troubles]
    rows = report.outcome_rows(result.outcomes, unresolved)
    summary = report.outcome_summary(result.outcomes, unresolved, time.monotonic() - began)
    if result.survey.plan.refusal:
        summary += f"removals held: {result.survey.plan.refusal}; --allow-removals lets them happen\n"
    output.warn_of_nothing(choice.only, result.survey.resolution)
    errors = [e for e in (*(o.error for o in result.outcomes), *(u.error for u in unresolved)) if e is not None]
    # Of a single image its own error says more than "some wishes failed".
    code = exit_code(result, sound=found.sound, ignored=ignored)
    if choice.anonymous and errors:
        code = errors[0].exit_code
    if json:
        output.print_json(value)
    elif code or not quiet:
        output.warn(result.survey.plan.warnings)
        output.print_table(report.OUTCOME_HEADER, rows, summary)
    output.warn(str(trouble) for trouble in result.troubles)
    if choice.anonymous:
        output.warn(_owned(result.outcomes))
    try:
        output.write_report(report_file, value, report.OUTCOME_HEADER, rows, summary)
    except SettingsError as error:
        # It must not hide how the run itself ended.
        output.complain(str(error))
        code = code or error.exit_code
    raise typer.Exit(code)


def _owned(outcomes: Iterable[Outcome]) -> Iterator[str]:
    """What to know of names that a person published, and that a wishlist has."""
    for outcome in outcomes:
        standing = outcome.published or outcome.action.before
        if isinstance(standing, Published) and standing.wishlist is not None:
            yield f"{standing.public_path} belongs to the wishlist {standing.wishlist}, and goes when that drops it"

"""The command line: each verb parses its arguments, calls one function, prints the value it gave, and exits by it."""

from __future__ import annotations

import atexit
import gc as cycles
import io
import os
import signal
import sys
from typing import Annotated, NoReturn

import typer

from unpacker import __version__
from unpacker.cli import consumers, exits, targets, wishlists
from unpacker.cli.output import complain, has_printed_json, print_json
from unpacker.errors import UnpackerError

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

# In the order in which the help shows them.
VERBS = (
    wishlists.validate,
    wishlists.plan,
    wishlists.reconcile,
    targets.publish,
    targets.remove,
    wishlists.status,
    consumers.use,
    consumers.modules,
    targets.verify,
    targets.receipts,
    targets.gc,
    targets.init,
    targets.resign,
    targets.snapshot,
)
for verb in VERBS:
    app.command()(verb)


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
    exits.unwind_on_signals()
    try:
        app()
    except UnpackerError as error:
        complain(str(error))
        if "--json" in sys.argv and not has_printed_json():
            # A program that asked for JSON gets JSON, also where the verb came to nothing.
            print_json({"error": str(error), "kind": type(error).__name__, "exit_code": error.exit_code})
        sys.exit(error.exit_code)
    except exits.Stopped as stopped:
        complain(f"stopped by {signal.Signals(stopped.number).name}")
        exits.leave(stopped.exit_code)
    except BrokenPipeError:
        # Who reads has read enough (`unpacker status | head`).
        exits.leave(exits.SOME_FAILED)
    except OSError as error:
        complain(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
        exits.leave(exits.TARGET)
    sys.exit(0)


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

"""What verbs print and write: JSON and tables on stdout, faults and warnings on stderr, the report file."""

from __future__ import annotations

import os
import shutil
import stat
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress

from unpacker import report
from unpacker.errors import SettingsError
from unpacker.plan import Resolution
from unpacker.wishlist import Wishlist

_printed = {"json": False}


def print_json(value: object) -> None:
    _printed["json"] = True
    print(report.as_json(value), end="")


def has_printed_json() -> bool:
    """Whether a document is out: two of them are none."""
    return _printed["json"]


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], below: str = "") -> None:
    """A table as wide as it gets, for files and pipes; on a terminal one that fits. `below` are the lines after it."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    print(report.table(header, rows, width=width) + below, end="")


def print_faults(found: Wishlist, *, quiet: bool = False) -> None:
    for fault in found.faults:
        print(fault, file=sys.stderr)
    for warning in () if quiet else found.warnings:
        print(f"{warning} (warning)", file=sys.stderr)


def complain(message: str) -> None:
    """A line for the person who started this, where it does not mix with the output."""
    # What names and registries say in it must not move the cursor of who reads it.
    print("\n".join(map(report.one_line, f"unpacker: {message}".split("\n"))), file=sys.stderr)


def warn(warnings: Iterable[str]) -> None:
    for warning in warnings:
        complain(warning)


def warn_of_nothing(only: str | None, resolution: Resolution) -> None:
    """Says so where `--only` chose no wish at all, which is more likely a slip than meant."""
    if only is not None and not (resolution.pinned or resolution.unresolved or resolution.missing):
        complain(f"no wish matches --only {only}")


def check_report(path: str | None) -> None:
    """SettingsError if the report could not be written: said before an hour's work, not after it."""
    directory = os.path.dirname(path or "") or "."
    if path is not None and _is_no_file(path):
        return
    if path is not None and (os.path.isdir(path) or not os.access(directory, os.W_OK | os.X_OK)):
        problem = "it is a directory" if os.path.isdir(path) else f"{directory} is no directory that can be written to"
        raise SettingsError(f"cannot write the report {path}: {problem}")


def write_report(
    path: str | None, value: object, header: Sequence[str], rows: Sequence[Sequence[str]], summary: str
) -> None:
    """The report file, if one was asked for: a page for people if its name ends in `.md`, else JSON."""
    if path is None:
        return
    text = report.markdown(header, rows) + "\n" + summary if path.endswith(".md") else report.as_json(value)
    written = path if _is_no_file(path) else f"{path}.{os.getpid()}"
    try:
        with open(written, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
        if written != path:
            os.replace(written, path)
    except OSError as error:
        if written != path:
            with suppress(OSError):
                os.unlink(written)
        raise SettingsError(f"cannot write the report {path}: {error.strerror}") from None


def _is_no_file(path: str) -> bool:
    """Whether something stands there that is written to and not replaced, such as /dev/stdout."""
    try:
        own = os.lstat(path).st_mode
    except OSError:
        return False
    return not stat.S_ISREG(own) and not stat.S_ISDIR(own)

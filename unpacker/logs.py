"""Where logs go and how they look: structlog to stderr, key=value for people, JSON for machines."""

from __future__ import annotations

import logging
import os
import sys

import structlog


def configure(*, level: int, as_json: bool) -> None:
    """Sets the program's logging up, once, before the first event."""
    shared: list[structlog.typing.Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    colours = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    renderer: list[structlog.typing.Processor] = (
        [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
        if as_json
        else [
            structlog.dev.ConsoleRenderer(
                colors=colours, exception_formatter=structlog.dev.plain_traceback, pad_event_to=0
            )
        ]
    )
    structlog.configure(
        processors=[*shared, *renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        # Looked up at each event: progress on a terminal redirects stderr while it draws.
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
        cache_logger_on_first_use=False,
    )


def level_of(*, verbose: bool, quiet: bool) -> int:
    """Warnings by default: a run from cron says nothing while all is well."""
    if verbose:
        return logging.INFO
    return logging.ERROR if quiet else logging.WARNING

"""Where logs go and how they look: structlog to stderr, key=value for people, JSON for machines.

structlog takes a tenth of a second to import, so that happens with the first event that is to be seen.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

_chosen = {"level": logging.WARNING, "as_json": False, "configured": False}


def configure(*, level: int, as_json: bool) -> None:
    """Sets the program's logging up, once, before the first event."""
    _chosen.update(level=level, as_json=as_json, configured=False)


def level_of(*, verbose: bool, quiet: bool) -> int:
    """Warnings by default: a run from cron says nothing while all is well."""
    if verbose:
        return logging.INFO
    return logging.ERROR if quiet else logging.WARNING


class Log:
    """Events by name with facts as keywords; what is below the chosen level costs nothing."""

    def info(self, event: str, **facts: Any) -> None:
        if _chosen["level"] <= logging.INFO:
            _logger().info(event, **facts)

    def warning(self, event: str, **facts: Any) -> None:
        if _chosen["level"] <= logging.WARNING:
            _logger().warning(event, **facts)

    def error(self, event: str, **facts: Any) -> None:
        _logger().error(event, **facts)


def _logger() -> Any:
    import structlog

    if not _chosen["configured"]:
        _chosen["configured"] = True
        structlog.configure(
            processors=[
                structlog.processors.add_log_level,
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                *_renderers(as_json=bool(_chosen["as_json"])),
            ],
            # Looked up at each event: progress on a terminal redirects stderr while it draws.
            logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
            cache_logger_on_first_use=False,
        )
    return structlog.get_logger()


def _renderers(*, as_json: bool) -> list[Any]:
    import structlog

    if as_json:
        return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    colours = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    return [
        structlog.dev.ConsoleRenderer(colors=colours, exception_formatter=structlog.dev.plain_traceback, pad_event_to=0)
    ]

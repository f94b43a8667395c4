"""How far a run is, drawn on a terminal with rich; silent where stderr is no terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from unpacker.execute import Progress, Silent
from unpacker.plan import Outcome


@contextmanager
def shown(*, quiet: bool) -> Iterator[Progress]:
    """Progress for one run."""
    if quiet or not sys.stderr.isatty():
        yield Silent()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar
    from rich.table import Column

    columns = (
        SpinnerColumn(),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        # The name takes what is left of the line: a long one is cut, and pushes nothing out.
        TextColumn("{task.description}", markup=False, table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True, expand=True) as bar:
        yield _Drawn(bar, bar.add_task("asking the registries", total=None))


class _Drawn:
    def __init__(self, bar: object, task: object) -> None:
        from rich.progress import Progress as Bar
        from rich.progress import TaskID

        assert isinstance(bar, Bar)
        self._bar = bar
        self._task = TaskID(int(str(task)))

    def planned(self, actions: int) -> None:
        self._bar.update(self._task, total=actions, description="")

    def working(self, what: str) -> None:
        self._bar.update(self._task, description=what)

    def finished(self, outcome: Outcome) -> None:
        if outcome.action.changes:
            self._bar.advance(self._task)

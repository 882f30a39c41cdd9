"""A bar on a terminal's standard error; nothing in a pipe. Owned by the command that shows it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from kvserve.cli.cache.place import Progress as Report


class _Known(ProgressColumn):
    """A column that is empty until it is known how much there is to do."""

    def __init__(self, column: ProgressColumn) -> None:
        super().__init__()
        self._column = column

    def render(self, task: Task) -> RenderableType:
        return "" if task.total is None else self._column(task)


@contextmanager
def bar(console: Console, doing: str | None) -> Iterator[Report]:
    """Give what is to be told how far it is. The bar is gone afterwards: results take its place."""
    if doing is None or not console.is_terminal:
        yield lambda done, total: None
        return
    shown = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        *map(_Known, (TaskProgressColumn(), DownloadColumn(), TransferSpeedColumn())),
        _Known(TimeRemainingColumn()),
        console=console,
        transient=True,
        expand=True,
    )
    with shown:
        task = shown.add_task(doing, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)

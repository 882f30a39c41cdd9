"""`kvserve cache ls` as text: a table that fits the terminal, or holds everything in a pipe.

Stateless.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

from kvserve.cli.cache import words
from kvserve.cli.cache.place import Item, Listing

_GAP = 2
_LEAST_TITLE = 12
_TITLE = "TITLE"


@dataclass(frozen=True, slots=True)
class Column:
    """A column with the text of each row. `rank` 0 is never left out, higher ranks go first."""

    name: str
    rows: Sequence[str]
    rank: int = 0
    right: bool = False

    @property
    def width(self) -> int:
        return max(map(cell_len, (self.name, *self.rows)))


def show_listing(console: Console, listing: Listing, now: datetime) -> None:
    """Print one line for each conversation, last used first, and the totals."""
    items = sorted(listing.items, key=lambda item: (item.used_at, item.id), reverse=True)
    if items:
        columns = _columns(items, now)
        print_table(console, fitting(columns, console.width) if console.is_terminal else columns)
    totals = [
        words.count(len(items), "conversation"),
        words.count(sum(item.tokens for item in items), "token"),
    ]
    if listing.nbytes is not None:
        totals.append(f"{words.size(listing.nbytes)} on disk in all")
    console.print(", ".join(totals), style="dim" if items else None)


def print_table(console: Console, columns: Sequence[Column]) -> None:
    """Print columns under their names, two spaces apart; nothing is cut."""
    widths = [column.width for column in columns]
    rows = [[column.name for column in columns]]
    rows += map(list, zip(*(column.rows for column in columns), strict=True))
    for number, row in enumerate(rows):
        padded = [
            _padded(cell, width, column.right)
            for cell, width, column in zip(row, widths, columns, strict=True)
        ]
        line = (" " * _GAP).join(padded).rstrip()
        console.print(Text(line, style="bold" if number == 0 else ""), soft_wrap=True)


def fitting(columns: Sequence[Column], width: int) -> list[Column]:
    """Return those that say something and fit side by side; the title gets what is left."""
    left = [column for column in columns if any(column.rows)]
    while (spare := width - sum(_least(column) + _GAP for column in left) + _GAP) < 0:
        dearest = max(left, key=lambda column: column.rank)
        if dearest.rank == 0:
            break
        left.remove(dearest)
    return [
        replace(column, rows=[_shortened(cell, _LEAST_TITLE + spare) for cell in column.rows])
        if column.name == _TITLE
        else column
        for column in left
    ]


def _least(column: Column) -> int:
    return min(column.width, _LEAST_TITLE) if column.name == _TITLE else column.width


def _shortened(text: str, width: int) -> str:
    return (
        text
        if cell_len(text) <= width
        else set_cell_size(text, width - 1) + "\N{HORIZONTAL ELLIPSIS}"
    )


def _padded(text: str, width: int, right: bool) -> str:
    space = " " * (width - cell_len(text))
    return space + text if right else text + space


def _columns(items: Sequence[Item], now: datetime) -> list[Column]:
    def rows(text: Callable[[Item], str]) -> list[str]:
        return [text(item) for item in items]

    several_tenants = len({item.tenant for item in items}) > 1
    tenants = [
        Column(
            "TENANT",
            rows(lambda item: words.tenant(item.tenant or "")),
            0 if several_tenants else 9,
        )
    ]
    known_tenants = all(item.tenant is not None for item in items)
    return [
        Column("ID", rows(lambda item: item.id)),
        *(tenants if known_tenants else []),
        Column("TOKENS", rows(lambda item: f"{item.tokens:,}"), right=True),
        Column("MSGS", rows(lambda item: f"{item.messages:,}"), 3, right=True),
        Column("SIZE", rows(lambda item: words.size(item.bytes)), right=True),
        Column("SHARED", rows(lambda item: words.size(item.shared_bytes)), 4, right=True),
        Column("TIER", rows(lambda item: item.tier)),
        Column("BRANCHES", rows(lambda item: str(item.branches)), 5, right=True),
        Column("USED AGO", rows(lambda item: words.span(now - item.used_at)), 2),
        Column("KEPT", rows(lambda item: kept(item, now)), 1),
        Column("MODEL", rows(lambda item: words.printable(item.model)), 7),
        Column(_TITLE, rows(lambda item: words.printable(item.title or "")), 6),
    ]


def kept(item: Item, now: datetime) -> str:
    """Say what keeps the conversation, and for how long: its pin, its life."""
    said = ["saved"] if item.saved else []
    if item.pinned:
        until = item.pinned_until
        said.append("pinned" if until is None else f"pinned for {words.span(until - now)}")
    if item.expires_at not in (None, item.pinned_until):
        assert item.expires_at is not None
        said.append(f"ends in {words.span(item.expires_at - now)}")
    return ", ".join(said)

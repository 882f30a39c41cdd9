"""`kvserve cache show` as text: facts, the tree of branches, the messages. Stateless."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.text import Text

from kvserve.cli.cache import words
from kvserve.cli.cache.branches import Branch, grow
from kvserve.cli.cache.graph import DRAWN, MOST_SIDES, TYPED, graph, graph_columns
from kvserve.cli.cache.listing import Column, kept, print_table
from kvserve.cli.cache.place import Detail, Item

_MOMENT = "%Y-%m-%d %H:%M:%S UTC"


def show_detail(console: Console, detail: Detail, now: datetime, *, all_branches: bool) -> None:
    """Print all that is known of a conversation; its place in the tree is marked."""
    for name, text in _facts(detail.item, now):
        console.print(Text.assemble((f"{name:<10}", "dim"), text), soft_wrap=True)
    console.print()
    glyphs = DRAWN if console.encoding.lower().startswith("utf") else TYPED
    limit = None if all_branches else MOST_SIDES
    rows = list(graph(grow(detail.lines, detail.item.id), glyphs, limit))
    if rows:
        print_table(console, graph_columns(rows, detail.item.id))
        console.print()
    if detail.messages:
        print_table(console, _message_columns(detail))


def detail_json(detail: Detail) -> dict[str, Any]:
    """Return the same as values for JSON."""
    return {
        **asdict(detail.item),
        "cuts": [asdict(message) for message in detail.messages],
        "tree": list(_flat(grow(detail.lines, detail.item.id))),
    }


def _flat(branches: Sequence[Branch]) -> Iterator[dict[str, Any]]:
    """Yield the branches, parents first; `parent` counts in this order, None for the first.

    Flat, because trees may be deeper than what reads JSON likes to go.
    """
    waiting: deque[tuple[int | None, Branch]] = deque((None, branch) for branch in branches)
    number = 0
    while waiting:
        parent, branch = waiting.popleft()
        yield {
            "parent": parent,
            "start": branch.start,
            "end": branch.end,
            "bytes": branch.nbytes,
            "tier": branch.tier,
            "tips": branch.tips,
        }
        waiting += ((number, child) for child in branch.below)
        number += 1


def _facts(item: Item, now: datetime) -> Iterator[tuple[str, str]]:
    yield "id", item.id
    if item.tenant is not None:
        yield "tenant", item.tenant or "- (no key)"
    if item.title:
        yield "title", words.printable(item.title)
    yield "model", words.printable(item.model)
    yield "tokens", f"{item.tokens:,} in {words.count(item.messages, 'message')}"
    shared = f", {words.size(item.shared_bytes)} of it shared" if item.shared_bytes else ""
    yield "size", f"{words.size(item.bytes)}{shared}"
    yield "tier", item.tier
    if held := kept(item, now):
        yield "kept", held
    yield "made", f"{item.created_at.strftime(_MOMENT)}"
    yield "used", f"{item.used_at.strftime(_MOMENT)}, {words.span(now - item.used_at)} ago"


def _message_columns(detail: Detail) -> list[Column]:
    messages = detail.messages
    return [
        Column("MESSAGE", [str(message.message) for message in messages], right=True),
        Column("ROLE", [words.printable(message.role) for message in messages]),
        Column("RANGE", [f"{message.start}-{message.end}" for message in messages]),
        Column("TOKENS", [f"{message.end - message.start:,}" for message in messages], right=True),
        Column("SIZE", [words.size(message.bytes) for message in messages], right=True),
        Column("TIER", [message.tier for message in messages]),
    ]

"""The tree of branches, drawn line by line as `git log --graph` draws commits. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvserve.cli.cache import words
from kvserve.cli.cache.branches import Branch
from kvserve.cli.cache.listing import Column

MOST_SIDES = 10
"""Branches shown at one fork unless all are asked for: a document may have thousands of users."""

_MOST_TIPS = 5


@dataclass(frozen=True, slots=True)
class Glyphs:
    """What the tree is drawn with; all but `node` are two wide."""

    node: str
    fork: str
    line: str
    more: str


DRAWN = Glyphs("●", "├─", "│ ", "┊ ")
TYPED = Glyphs("*", "|-", "| ", ": ")


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the tree: a branch, or how many conversations were left out in its place."""

    drawn: str
    branch: Branch | None
    num_left_out: int = 0


def graph(branches: Sequence[Branch], glyphs: Glyphs, limit: int | None) -> Iterator[Row]:
    """Yield the lines from the start down.

    A branch goes on in the same column with its first continuation; the others stand in between,
    one column further in, at most `limit` of them at one fork.
    """
    for branch in branches:
        yield from _stem(branch, "", glyphs.node, glyphs, limit)


def _stem(
    branch: Branch, indent: str, drawn: str, glyphs: Glyphs, limit: int | None
) -> Iterator[Row]:
    at: Branch | None = branch
    while at is not None:
        yield Row(drawn, at)
        drawn = indent + glyphs.node
        sides = at.below[1:]
        for side in sides[:limit]:
            first = indent + glyphs.fork + glyphs.node
            yield from _stem(side, indent + glyphs.line, first, glyphs, limit)
        if limit is not None and len(sides) > limit:
            left_out = sum(side.num_tips for side in sides[limit:])
            yield Row(indent + glyphs.line + glyphs.more, None, left_out)
        at = at.below[0] if at.below else None


def graph_columns(rows: Sequence[Row], shown: str) -> list[Column]:
    """Return the table of the lines; the conversation `shown` is marked where it ends."""
    cells = [_cells(row, shown) for row in rows]
    branch, tokens, size, tier, ends = zip(*cells, strict=True)
    return [
        Column("BRANCH", branch),
        Column("TOKENS", tokens, right=True),
        Column("SIZE", size, right=True),
        Column("TIER", tier),
        Column("ENDS HERE", ends),
    ]


def _cells(row: Row, shown: str) -> tuple[str, str, str, str, str]:
    at = row.branch
    if at is None:
        return row.drawn, "", "", "", f"and {row.num_left_out:,} more (--all)"
    tips = sorted(at.tips, key=lambda tip: tip != shown)
    return (
        f"{row.drawn} {at.start}-{at.end}",
        f"{at.end - at.start:,}",
        "" if at.nbytes is None else words.size(at.nbytes),
        at.tier,
        words.listed([f"{tip} <" if tip == shown else tip for tip in tips], _MOST_TIPS),
    )

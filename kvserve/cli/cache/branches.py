"""The tree of the conversations that share a beginning. Pure.

Conversations come as paths of steps; where they part, and where one ends, steps are cut. What lies
between two such places is one branch, however many steps it is made of.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from kvserve.cli.cache.place import Line, Step

MIXED = "part"
"""The tier of a branch whose tokens are not all in the same place."""


@dataclass(eq=False, slots=True)
class Branch:
    """The tokens `[start, end)` between two forks, with what is held of them.

    `tips` are the conversations that end at `end`, `num_tips` counts those here and below,
    `used_at` is when one of them was last used. `below` go on from `end`.
    """

    start: int
    end: int
    nbytes: int | None
    tier: str
    tips: list[str] = field(default_factory=list)
    num_tips: int = 0
    used_at: datetime | None = None
    below: list[Branch] = field(default_factory=list)


def grow(lines: Iterable[Line], trunk: str) -> list[Branch]:
    """Return the branches at the start, of which there is one if all lines share some tokens.

    Of the branches at one place the one that leads to conversation `trunk` comes first, then the
    one with most conversations, so that following the first ones nests at most logarithmically
    deep.
    """
    lines = [line for line in lines if line.steps]
    ends = _ends(lines)
    below: dict[Branch | None, dict[Hashable, Branch]] = defaultdict(dict)
    favoured: set[int] = set()
    for line in lines:
        at: Branch | None = None
        for step in line.steps:
            for start, end in _pieces(step, ends[step.label]):
                name = (step.label, start)
                at = below[at].setdefault(
                    name, Branch(start, end, _share(step, start, end), step.tier)
                )
                at.num_tips += 1
                at.used_at = max(at.used_at or line.used_at, line.used_at)
                if line.id == trunk:
                    favoured.add(id(at))
        assert at is not None
        at.tips.append(line.id)
    for branch, children in below.items():
        if branch is not None:
            branch.below = _ordered(children.values(), favoured)
    first = _ordered(below[None].values(), favoured)
    for root in first:
        _join(root)
    return first


def _share(step: Step, start: int, end: int) -> int | None:
    if step.nbytes is None:
        return None
    length = step.end - step.start
    # So that the shares of all pieces add up to the whole.
    at = step.nbytes * (start - step.start) // length
    return step.nbytes * (end - step.start) // length - at


def _ends(lines: Iterable[Line]) -> dict[Hashable, list[int]]:
    """Return for each label where some line leaves it, ascending."""
    found: defaultdict[Hashable, set[int]] = defaultdict(set)
    for line in lines:
        for step in line.steps:
            found[step.label].add(step.end)
    return {label: sorted(ends) for label, ends in found.items()}


def _pieces(step: Step, ends: Sequence[int]) -> Iterable[tuple[int, int]]:
    start = step.start
    for end in ends[bisect_right(ends, start) : bisect_right(ends, step.end)]:
        yield start, end
        start = end


def _ordered(branches: Iterable[Branch], favoured: set[int]) -> list[Branch]:
    def order(branch: Branch) -> tuple[bool, int, float]:
        assert branch.used_at is not None
        return id(branch) not in favoured, -branch.num_tips, -branch.used_at.timestamp()

    return sorted(branches, key=order)


def _join(root: Branch) -> None:
    """Make one of each chain in which nothing forks or ends."""
    waiting = [root]
    while waiting:
        branch = waiting.pop()
        while len(branch.below) == 1 and not branch.tips:
            [only] = branch.below
            if branch.nbytes is None or only.nbytes is None:
                if branch.nbytes is not only.nbytes:
                    break
            else:
                branch.nbytes += only.nbytes
            branch.end = only.end
            branch.tier = branch.tier if branch.tier == only.tier else MIXED
            branch.tips, branch.below = only.tips, only.below
        waiting += branch.below

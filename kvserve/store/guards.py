"""What may be written, and what has to leave for it: decisions over plain figures. Pure.

Four guards, in the order in which a write meets them:

- the **per-save limit**: bytes that all segments on the conversation's path would hold on disk;
- the **day's write budget**: file bytes written in one UTC day, for the sake of the SSD. It holds
  for saves by order too, because a promise about wear that any client can break is none. A save
  of what lies on disk already writes nothing and therefore passes;
- the **store's budget** and the **disk's share**: where they are exceeded, runs are evicted first.

What is saved or pinned is never evicted. Whether enough can leave is decided by figures before
anything does, so that a refused write has changed nothing.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from kvserve.core.errors import OutOfSpace, TooLarge

MAX_TURNS = 8
"""Beyond so many turns a conversation is not held to be more likely to go on."""

SPARE = 64
"""Eviction, once it is needed, makes room for this share of the store more, so that not every
write has to look for victims."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the owner of the data folder allows. None is no limit of that kind.

    `save_nbytes` is for one conversation, `disk_share` the part of the volume that may be in use
    after a write, `store_nbytes` bounds all snapshot files together, and `daily_nbytes` what is
    written to them in one UTC day.
    """

    save_nbytes: int = 200 * 2**30
    disk_share: float = 0.90
    store_nbytes: int | None = None
    daily_nbytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """The figures that a write of `new_nbytes` meets; all in bytes.

    `path_nbytes` is what the whole conversation would hold after it, `held_nbytes` what all
    snapshot files hold now, `disk_used` and `disk_free` describe the volume.
    """

    new_nbytes: int
    path_nbytes: int
    held_nbytes: int
    written_today: int
    disk_used: int
    disk_free: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """A run as eviction sees it: the tokens `[start, end)` behind `parent_id`'s.

    `nbytes` is the size of its file, 0 where only its row is left. `age_s` is the time since it was
    last used as a tip, `num_turns` that of the longest conversation that ends here, 0 for none;
    both pass to the run above when this one goes. `protected`: a saved or pinned conversation ends
    here; what lies above it is safe too.
    """

    run_id: int
    parent_id: int | None
    start: int
    end: int
    nbytes: int
    age_s: float
    num_turns: int = 0
    protected: bool = False


def size(nbytes: int) -> str:
    """Return a number of bytes for people: exact while it is short, else in GB or MB too."""
    if nbytes < 10**6:
        return f"{nbytes} bytes"
    number, unit = (nbytes / 1e9, "GB") if nbytes >= 10**9 else (nbytes / 1e6, "MB")
    return f"{nbytes} bytes ({number:.1f} {unit})"


def check_save(limits: Limits, situation: Situation) -> None:
    """Raise TooLarge if the conversation would be over the per-save limit."""
    if situation.path_nbytes > limits.save_nbytes:
        raise TooLarge(
            f"The conversation would take {size(situation.path_nbytes)} on disk; "
            f"{size(limits.save_nbytes)} are allowed for one.",
            code="conversation_too_large",
        )


def check_day(limits: Limits, situation: Situation) -> None:
    """Raise OutOfSpace if the day's write budget does not cover the write."""
    if limits.daily_nbytes is None or situation.new_nbytes == 0:
        return
    if situation.written_today + situation.new_nbytes > limits.daily_nbytes:
        raise OutOfSpace(
            f"Writing {size(situation.new_nbytes)} would exceed the day's write budget of "
            f"{size(limits.daily_nbytes)}, of which {size(situation.written_today)} are used; "
            "it begins anew at 00:00 UTC.",
            code="write_budget",
        )


def shortfall(limits: Limits, situation: Situation) -> int:
    """Return how many bytes must leave the store before the write may begin."""
    new = situation.new_nbytes
    if new == 0:
        return 0
    excess = [0, _disk_excess(limits, situation), new - situation.disk_free]
    if limits.store_nbytes is not None:
        excess.append(situation.held_nbytes + new - limits.store_nbytes)
    return max(excess)


def refusal(limits: Limits, situation: Situation, evictable: int) -> OutOfSpace:
    """Return the error for a write for which eviction cannot make room, with the figures."""
    need = f"Writing {size(situation.new_nbytes)} "
    freed = f"eviction could free {size(evictable)}; what is saved or pinned stays."
    budget = limits.store_nbytes
    if budget is not None and situation.held_nbytes + situation.new_nbytes - budget > evictable:
        held = size(situation.held_nbytes)
        return OutOfSpace(
            f"{need}would exceed the store's budget of {size(budget)}, of which {held} are "
            f"used; {freed}",
            code="store_budget",
        )
    total = situation.disk_used + situation.disk_free
    return OutOfSpace(
        f"{need}would fill the disk beyond {limits.disk_share:.0%}: {size(situation.disk_used)} "
        f"of {size(total)} are used, {size(situation.disk_free)} free; {freed}",
        code="disk_full",
    )


def staleness(holding: Holding) -> float:
    """Return how readily a run should leave: its age over its worth.

    `age_s * nbytes / (tokens * (1 + min(num_turns, 8)))`. Twice as old, twice the bytes for the
    same tokens: each counts alike. Someone who came back for nine turns is waited for nine times as
    long as for a branch that nobody is on any more, and so outlives a burst of questions. That
    tokens behind a long context take longer to compute again does not count: on the trace
    (`scripts/replay_trace.py`) that cost hits on all but the smallest disk.
    """
    worth = (holding.end - holding.start) * (1 + min(holding.num_turns, MAX_TURNS))
    return max(holding.age_s, 1.0) * holding.nbytes / worth


def victims(
    holdings: Sequence[Holding], needed: int, *, spare: int = 0, keep: Iterable[int] = ()
) -> list[int] | None:
    """Return the runs to evict, leaves before parents, the stalest leaf first.

    They free `needed` bytes, and up to `spare` more where that can be had. None if what is neither
    protected nor in `keep` (the path being written) holds less than `needed`.
    """
    by_id = {holding.run_id: holding for holding in holdings}
    staying = _staying(by_id, keep)
    below = Counter(holding.parent_id for holding in holdings)
    leaves: list[tuple[float, int]] = []

    def pass_on(run_id: int) -> int | None:
        """Let the run above know how one that is out of its way was used; return the former."""
        gone = by_id[run_id]
        below[gone.parent_id] -= 1
        if gone.parent_id in by_id:
            above = by_id[gone.parent_id]
            age_s, num_turns = min(above.age_s, gone.age_s), max(above.num_turns, gone.num_turns)
            by_id[above.run_id] = replace(above, age_s=age_s, num_turns=num_turns)
        return gone.parent_id

    def offer(run_id: int | None) -> None:
        """Queue a run without any below it; one without a file only lets its parent through."""
        while run_id is not None and run_id in by_id and below[run_id] == 0:
            holding = by_id[run_id]
            if run_id in staying:
                return
            if holding.nbytes:
                heapq.heappush(leaves, (-staleness(holding), run_id))
                return
            run_id = pass_on(run_id)

    for run_id in [run_id for run_id in by_id if below[run_id] == 0]:
        offer(run_id)
    chosen: list[int] = []
    freed = 0
    while leaves and freed < needed + spare:
        _, run_id = heapq.heappop(leaves)
        chosen.append(run_id)
        freed += by_id[run_id].nbytes
        offer(pass_on(run_id))
    return chosen if freed >= needed else None


def evictable_nbytes(holdings: Sequence[Holding], keep: Iterable[int] = ()) -> int:
    """Return how many bytes eviction could free at most."""
    every = sum(holding.nbytes for holding in holdings)
    chosen = victims(holdings, 0, spare=every, keep=keep) or []
    leaving = set(chosen)
    return sum(holding.nbytes for holding in holdings if holding.run_id in leaving)


def _staying(by_id: Mapping[int, Holding], keep: Iterable[int]) -> set[int]:
    """Return the runs that may not leave: protected ones, those to keep, and all above them."""
    staying: set[int] = set()
    for run_id in [*keep, *(run_id for run_id, holding in by_id.items() if holding.protected)]:
        here: int | None = run_id
        while here is not None and here in by_id and here not in staying:
            staying.add(here)
            here = by_id[here].parent_id
    return staying


def _disk_excess(limits: Limits, situation: Situation) -> int:
    """Return by how much the write would fill the volume beyond its share."""
    total = situation.disk_used + situation.disk_free
    return situation.disk_used + situation.new_nbytes - int(total * limits.disk_share)

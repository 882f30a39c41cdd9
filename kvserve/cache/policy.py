"""What to evict and which end states to keep: decisions only, over plain values.

**Eviction** goes leaf-first, so that what many paths share is the last to leave. Among the leaves
the lowest rank goes first, and of equal rank the least recently used. A leaf's rank is the time of
its last use plus a **grace** that grows with the turns in which its conversation came back, and
that time is not a clock's: it runs with the demand of others (`Ageing`). Prompts that nobody asks
again make no demand, so a burst of them displaces its own kind and no waiting conversation. A
conversation that came back ten times outlasts those of few turns, its sub-agents' among them. What
was evicted and is wanted again makes demand eightfold, so the favourites of the past leave soon
once others are in use. Leaves that are leased or pinned by a running request are not candidates.

**End states** (of recurrent layers) are large and not per token, so not every message end keeps
one; `states_to_keep` says which.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)

Order = tuple[int, int]
"""Rank and tick of the last use; the lowest is evicted first."""

GRACE_TURNS = 10
"""After so many turns beyond the first, a path is kept as long as any."""

GRACE_BUDGETS = 4
"""For so many times the whole budget in demand by others. With the square of the turns: on a public
trace of 12,031 requests a first turn is followed by another in 25 of 100 cases, a second in 39, a
fifth in 60, a ninth in 89, and those of many turns are few, so that waiting for them is cheap."""

REGRET = 8
"""A byte that was evicted and is wanted again is demand like so many that were held when wanted."""

SAMPLED_TOKENS = 128
"""What is evicted is remembered by one place in so many tokens."""

_SAMPLE_TOKENS = 32
"""How many tokens from there on are compared, by their hash."""

_TOKEN_NBYTES = 4

RECENT_STATES = 6
"""The last message ends that keep their end state, three exchanges: regenerate, edit and a step
back are common."""

STATE_SPACING_TOKENS = 4096
"""Inside one long message a state is kept this often, so that an edit late in it is cheap."""

_DISCARDED = 32
"""So many discarded entries may wait in the heap, beyond one for each candidate."""


class Ageing:
    """The time by which segments age, and how long each is kept.

    It runs with the demand for bytes: those that a second request uses while they are held, and,
    more, those that were evicted and are wanted again. The latter are known by keys that are
    remembered for a budget's worth of evicted bytes. A cache in which others find no use does not
    age: what is in it does no harm.

    Whole numbers, and never back, so that ranks compare exactly. `budget_nbytes` is that of the
    cache; any other unit of size will do.
    """

    def __init__(self, budget_nbytes: int) -> None:
        self._budget_nbytes = budget_nbytes
        self._now = 0
        self._evicted: OrderedDict[int, int] = OrderedDict()
        self._evicted_nbytes = 0

    def reused(self, nbytes: int) -> None:
        """Note that a second request uses so much, which only one had used before."""
        self._now += nbytes

    def evicted(self, key: int, nbytes: int) -> None:
        """Remember what was evicted under `key`."""
        self._evicted_nbytes += nbytes - self._evicted.pop(key, 0)
        self._evicted[key] = nbytes
        while self._evicted_nbytes > self._budget_nbytes:
            _, oldest_nbytes = self._evicted.popitem(last=False)
            self._evicted_nbytes -= oldest_nbytes

    def added(self, key: int) -> bool:
        """Note that `key` is held anew; return whether it had been evicted lately."""
        nbytes = self._evicted.pop(key, None)
        if nbytes is None:
            return False
        self._evicted_nbytes -= nbytes
        self._now += REGRET * nbytes
        return True

    def rank(self, num_turns: int) -> int:
        """Return the rank of what a conversation in its `num_turns`-th turn uses now.

        What belongs to no conversation is in its first.
        """
        came_back = min(max(num_turns - 1, 0), GRACE_TURNS)
        grace = GRACE_BUDGETS * self._budget_nbytes * came_back**2 // GRACE_TURNS**2
        return self._now + grace


def sample_keys(start: int, data: bytes) -> list[int]:
    """Return the keys by which the segment at position `start` is remembered, possibly none.

    `data` are its tokens, four bytes each. Keys are of places in the prompt and not of segments,
    because the same tokens come back cut differently: a reply is held up to its last token, its
    message ends a newline later. Nothing but the ageing depends on them, so the tokens before the
    place need not be known, and a rare mistake does no harm.
    """
    end = start + len(data) // _TOKEN_NBYTES
    keys = []
    for place in range(-(-start // SAMPLED_TOKENS) * SAMPLED_TOKENS, end, SAMPLED_TOKENS):
        if place + _SAMPLE_TOKENS <= end:
            at = (place - start) * _TOKEN_NBYTES
            keys.append(hash((place, data[at : at + _SAMPLE_TOKENS * _TOKEN_NBYTES])))
    return keys


class EvictionQueue(Generic[T]):
    """Candidates, the lowest order first; entries that have become stale are skipped.

    Lazy: using a candidate costs nothing here; its old entry is found out of date when it surfaces,
    and is put back with its new order or dropped. So a candidate's order must never fall while it
    waits. One that is gone for good must be discarded: without pressure nothing ever surfaces, and
    the heap would keep it for ever.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[Order, int, T]] = []
        self._queued: set[T] = set()
        self._serial = 0

    def __len__(self) -> int:
        """Return the number of entries, discarded ones that still wait included."""
        return len(self._heap)

    def push(self, candidate: T, order: Order) -> None:
        """Offer a candidate; one that waits already keeps its place until it surfaces."""
        if candidate in self._queued:
            return
        self._queued.add(candidate)
        self._serial += 1
        heapq.heappush(self._heap, (order, self._serial, candidate))

    def discard(self, candidate: T) -> None:
        """Forget a candidate that will not come back."""
        if candidate not in self._queued:
            return
        self._queued.remove(candidate)
        if len(self._heap) > 2 * len(self._queued) + _DISCARDED:
            self._heap = [entry for entry in self._heap if entry[2] in self._queued]
            heapq.heapify(self._heap)

    def pop(self, order_of: Callable[[T], Order | None]) -> T | None:
        """Return the candidate to evict, or None when there is none.

        `order_of` gives a candidate's current order, or None if it is no candidate any more.
        """
        while self._heap:
            order, _, candidate = heapq.heappop(self._heap)
            if candidate not in self._queued:
                continue
            self._queued.remove(candidate)
            current = order_of(candidate)
            if current is None:
                continue
            if current == order:
                return candidate
            self.push(candidate, current)
        return None


def states_to_keep(message_ends: Sequence[int], length: int) -> set[int]:
    """Return the positions among `message_ends` that should hold an end state.

    The first end (the system prompt, shared by most), the last few, and between them ever sparser
    ones, about three for each doubling of the distance: going back by `n` messages costs the
    prefill of at most `n` besides. `length` is the current number of tokens; ends behind it do
    not count.

    The i-th end is kept while fewer than `RECENT_STATES` times the largest power of two in `i`
    follow it, as on a ruler. So what is wanted now was wanted at every turn before, and thinning
    turn by turn keeps what thinning at once would. (To keep the nearest end of each octave of
    distance did not: each newcomer displaced the one before it, and none grew old enough for the
    next octave.)
    """
    ends = [end for end in message_ends if end <= length]
    keep = set(ends[:1])
    for number, end in enumerate(ends, start=1):
        largest_power = number & -number
        if len(ends) - number < RECENT_STATES * largest_power:
            keep.add(end)
    return keep

"""What to evict and which end states to keep: decisions only, over plain values.

**Eviction** goes leaf-first, so that what many paths share is the last to leave, and least recently
used first among the leaves. Leaves that are leased or pinned by a running request are not
candidates. **End states** (of recurrent layers) are large and not per token, so not every message
end keeps one; `states_to_keep` says which.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)

RECENT_STATES = 6
"""The last message ends that keep their end state, three exchanges: regenerate, edit and a step
back are common."""

STATE_SPACING_TOKENS = 4096
"""Inside one long message a state is kept this often, so that an edit late in it is cheap."""

_DISCARDED = 32
"""So many discarded entries may wait in the heap, beyond one for each candidate."""


class EvictionQueue(Generic[T]):
    """Candidates ordered by last use, oldest first; entries that have become stale are skipped.

    Lazy: using a candidate costs nothing here; its old entry is found out of date when it surfaces,
    and is put back with its new tick or dropped. A candidate that is gone for good must be
    discarded: without pressure nothing ever surfaces, and the heap would keep it for ever.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, T]] = []
        self._queued: set[T] = set()
        self._serial = 0

    def __len__(self) -> int:
        """Return the number of entries, discarded ones that still wait included."""
        return len(self._heap)

    def push(self, candidate: T, used: int) -> None:
        """Offer a candidate; one that waits already keeps its place until it surfaces."""
        if candidate in self._queued:
            return
        self._queued.add(candidate)
        self._serial += 1
        heapq.heappush(self._heap, (used, self._serial, candidate))

    def discard(self, candidate: T) -> None:
        """Forget a candidate that will not come back."""
        if candidate not in self._queued:
            return
        self._queued.remove(candidate)
        if len(self._heap) > 2 * len(self._queued) + _DISCARDED:
            self._heap = [entry for entry in self._heap if entry[2] in self._queued]
            heapq.heapify(self._heap)

    def pop(self, used_at: Callable[[T], int | None]) -> T | None:
        """Return the least recently used candidate, or None when there is none.

        `used_at` gives a candidate's current tick, or None if it is no candidate any more.
        """
        while self._heap:
            used, _, candidate = heapq.heappop(self._heap)
            if candidate not in self._queued:
                continue
            self._queued.remove(candidate)
            current = used_at(candidate)
            if current is None:
                continue
            if current == used:
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

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

RECENT_STATES = 4
"""The last message ends that keep their end state: regenerate, edit and a step back are common."""

STATE_SPACING_TOKENS = 4096
"""Inside one long message a state is kept this often, so that an edit late in it is cheap."""


class EvictionQueue(Generic[T]):
    """Candidates ordered by last use, oldest first; entries that have become stale are skipped.

    Lazy: using or removing a candidate costs nothing here; its old entry is found out of date
    when it surfaces, and is put back with its new tick or dropped.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, T]] = []
        self._queued: set[T] = set()
        self._serial = 0

    def push(self, candidate: T, used: int) -> None:
        """Offer a candidate; one that waits already keeps its place until it surfaces."""
        if candidate in self._queued:
            return
        self._queued.add(candidate)
        self._serial += 1
        heapq.heappush(self._heap, (used, self._serial, candidate))

    def pop(self, used_at: Callable[[T], int | None]) -> T | None:
        """Return the least recently used candidate, or None when there is none.

        `used_at` gives a candidate's current tick, or None if it is no candidate any more.
        """
        while self._heap:
            used, _, candidate = heapq.heappop(self._heap)
            self._queued.discard(candidate)
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
    ones: about one for each doubling of the distance from `length`, the current number of tokens.
    """
    ends = [end for end in message_ends if end <= length]
    if not ends:
        return set()
    keep = {ends[0], *ends[-RECENT_STATES:]}
    octaves: set[int] = set()
    for end in reversed(ends[:-RECENT_STATES]):
        octave = (length - end).bit_length()
        if octave not in octaves:
            octaves.add(octave)
            keep.add(end)
    return keep

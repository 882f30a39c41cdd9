"""What the disk can give and what it lacks: decisions over descriptions of stored segments.

A path on disk is looked at as a branch of the segment tree whose payloads are descriptions only,
so that the tree's own rules decide. Pure: no bytes, no file, no clock. What cannot be read ends
the path, for nothing behind it can be trusted to be complete.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np

from kvserve.cache.tree import Node, lacks_window, restorable_position
from kvserve.store.segments import SegmentSpec, StoredPath, StoredSegment


@dataclass(frozen=True, slots=True)
class Described:
    """A payload without its arrays; splits as they do."""

    nbytes: int
    restorable: bool
    whole: bool
    windows: Mapping[int, int]

    def split(self, at: int, length: int) -> tuple[Self, Self]:
        below = length - at
        upper = {window: held - min(below, held) for window, held in self.windows.items()}
        lower = {window: min(below, held) for window, held in self.windows.items()}
        kind = type(self)
        return (
            kind(self.nbytes, self.whole, self.whole, upper),
            kind(self.nbytes, self.restorable, self.whole, lower),
        )


Place = Node[Described]
"""The end of a branch of descriptions."""


def restorable(path: StoredPath, limit: int, held: int = 0) -> int:
    """Return the deepest position, at most `limit`, whose state the disk can give; 0 if none.

    `held` is a position that the RAM can restore, from where the disk may go on; then the answer
    is at least `min(held, limit)`, and anything above it needs the disk.
    """
    if limit <= held:
        return limit
    place = _start(held, path)
    end = path.num_tokens
    for segment in path.segments:
        if not segment.readable and segment.end > held:
            end = min(end, segment.start)
            break
    if end > place.end:
        place = beyond(place, path, end)
    return restorable_position(place, place.end, limit)


def needed(
    path: StoredPath, position: int, held: int = 0, reach: int = 0
) -> tuple[StoredSegment, ...]:
    """Return the segments to read for the state at `position`, in order.

    `held` leading tokens are at hand already, and with them all that the windows need there;
    otherwise `reach` says how many tokens before `position` must come from the disk all the same.
    The one that holds the end state at `position` is always among them.
    """
    first = min(held, position - max(reach, 1))
    ends = [*(segment.start for segment in path.segments[1:]), position]
    return tuple(
        segment
        for segment, following in zip(path.segments, ends, strict=False)
        if min(segment.end, following) > first and segment.start < position and segment.readable
    )


def lacks(path: StoredPath, start: int, end: int) -> bool:
    """Whether a segment `[start, end)` stored behind the path would look back at missing tokens."""
    return lacks_window(beyond(root(), path, start), start, end)


# -- branches ----------------------------------------------------------------------------------


def root() -> Place:
    """Return the empty branch."""
    return Node(None, 0, np.zeros(0, np.uint32), None)


def beyond(place: Place, path: StoredPath, until: int, windows: Iterable[int] = ()) -> Place:
    """Return `place` continued by what the path holds between it and the position `until`.

    Segments that cannot be read, and positions that the path does not reach, count as empty.
    `windows` are sizes of windows that the model has even if no segment on the path tells.
    """
    sizes = set(windows).union(*(segment.windows for segment in path.segments))
    nothing = Described(0, False, False, dict.fromkeys(sizes, 0))
    starts = [*(segment.start for segment in path.segments[1:]), until]
    for segment, following in zip(path.segments, starts, strict=False):
        stop = min(segment.end, following, until)
        if stop <= place.end:
            continue
        held = _up_to(stop, segment) if segment.readable else nothing
        place = _behind(place, held, stop)
    return place if place.end >= until else _behind(place, nothing, until)


def followed_by(place: Place, spec: SegmentSpec) -> Place:
    """Return the branch with one more segment, which begins where `place` ends."""
    assert spec.start == place.end
    return _behind(
        place, Described(spec.nbytes, spec.restorable, spec.whole, spec.windows), spec.end
    )


def _start(held: int, path: StoredPath) -> Place:
    """Return a branch whose end, `held`, can be restored, though nothing inside it can."""
    if not held:
        return root()
    sizes = set[int]().union(*(segment.windows for segment in path.segments))
    windows = {size: min(size, held) for size in sizes}
    return _behind(root(), Described(0, True, False, windows), held)


def _up_to(stop: int, segment: StoredSegment) -> Described:
    """Describe a segment up to `stop`."""
    part = Described(segment.nbytes, segment.restorable, segment.whole, segment.windows)
    if stop < segment.end:
        part, _ = part.split(stop - segment.start, segment.end - segment.start)
    return part


def _behind(place: Place, payload: Described, end: int) -> Place:
    # The rules ask for lengths only: which tokens they are does not matter here.
    return Node(place, place.end, np.zeros(end - place.end, np.uint32), payload)

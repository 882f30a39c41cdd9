"""What the disk can give, beside trying every position on what its segments really hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvserve.cache.stored import lacks, needed, restorable
from kvserve.store.segments import StoredPath, StoredSegment
from tests.property.fake_state import Fake, Kind, Tokens, Working, rebuilt
from tests.property.test_segment_cache import KINDS

Held = tuple[int, int, Fake]
ELSEWHERE = 9
"""A token of other branches only."""


@dataclass(frozen=True)
class Disk:
    """A path through runs, each of which hangs inside the one before."""

    kind: Kind
    tokens: Tokens
    path: StoredPath
    payloads: tuple[Fake, ...]

    def cut(self, chosen: Sequence[StoredSegment]) -> list[Held]:
        """Return what is on the path of some segments."""
        ends = [*(segment.start for segment in self.path.segments[1:]), self.path.num_tokens]
        found = []
        for segment, end, payload in zip(self.path.segments, ends, self.payloads, strict=True):
            if segment not in chosen:
                continue
            length = segment.end - segment.start
            if end < segment.end:
                payload, _ = payload.split(end - segment.start, length)
            found.append((segment.start, min(end, segment.end), payload))
        return found

    def gives(self, held: Sequence[Held], position: int) -> bool:
        reaching = [part for part in held if part[0] < position]
        return bool(reaching) and rebuilt(self.kind, b"", self.tokens, reaching, position)

    def deepest(self, held: Sequence[Held], limit: int) -> int:
        return next((p for p in range(limit, 0, -1) if self.gives(held, p)), 0)

    def ram(self, length: int) -> list[Held]:
        """Return the state after `length` tokens as the RAM would hold it, in one segment."""
        work = Working(self.kind, b"", self.tokens, length)
        return [(0, length, work.capture(0, length, True, True))] if length else []


@st.composite
def disks(draw: st.DrawFn, kind: Kind, readable: bool = False) -> Disk:
    tokens = tuple(draw(st.lists(st.integers(0, 1), min_size=1, max_size=30)))
    starts = [0, *sorted(draw(st.sets(st.integers(1, len(tokens)), max_size=3)))]
    starts = [start for start in starts if start < len(tokens)]
    segments: list[StoredSegment] = []
    payloads: list[Fake] = []
    for run, (start, leaves_at) in enumerate(pairwise([*starts, len(tokens)])):
        beyond = draw(st.integers(0, 6))
        own = tokens[:leaves_at] + (ELSEWHERE,) * beyond
        ends = sorted(
            {*draw(st.sets(st.integers(start + 1, len(own)), max_size=4)), len(own)} - {start}
        )
        there = draw(st.booleans()) or readable
        for index, (begin, end) in enumerate(pairwise([start, *ends])):
            since = draw(st.sampled_from([0, 0, max(0, begin - 2), end]))
            payload = Working(kind, b"", own, end, since).capture(
                begin, end, draw(st.booleans()), draw(st.booleans())
            )
            segments.append(
                StoredSegment(
                    *(run, index, begin, end, payload.nbytes),
                    *(payload.restorable, payload.whole, payload.windows, there),
                )
            )
            payloads.append(payload)
            if end >= leaves_at:
                break  # the prompt leaves the run here, or has ended
    path = StoredPath(b"", np.array(tokens, np.uint32), len(tokens), tuple(segments))
    return Disk(kind, tokens, path, tuple(payloads))


def usable(path: StoredPath, held: int = 0) -> StoredPath:
    """Return the path up to the first segment that is needed and cannot be read."""
    for index, segment in enumerate(path.segments):
        if not segment.readable and segment.end > held:
            return replace(path, segments=path.segments[:index])
    return path


@pytest.mark.parametrize("name", KINDS)
@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_the_deepest_position_that_can_be_restored_is_found(name: str, data: st.DataObject) -> None:
    disk = data.draw(disks(KINDS[name]))
    limit = data.draw(st.integers(0, len(disk.tokens)))
    there = disk.cut(usable(disk.path).segments)
    stop = min(limit, there[-1][1]) if there else 0
    position = restorable(disk.path, limit)
    assert position == disk.deepest(there, stop)
    chosen = needed(disk.path, position)
    if position:
        assert disk.gives(disk.cut(chosen), position)
        assert all(segment.readable and segment.start < position for segment in chosen)


@pytest.mark.parametrize("name", KINDS)
@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_the_disk_goes_on_from_where_ram_ends(name: str, data: st.DataObject) -> None:
    disk = data.draw(disks(KINDS[name]))
    held = data.draw(st.integers(1, len(disk.tokens)))
    limit = data.draw(st.integers(0, len(disk.tokens)))
    position = restorable(disk.path, limit, held)
    if limit <= held:
        assert position == limit
        return
    ram = disk.ram(held)
    readable = usable(disk.path, held).segments
    there = [*ram, *(part for part in disk.cut(readable) if part[1] > held)]
    assert position == max(held, disk.deepest(there, min(limit, there[-1][1])))
    if position > held:
        chosen = needed(disk.path, position, held)
        assert all(segment.readable for segment in chosen)
        assert disk.gives([*ram, *disk.cut(chosen)], position)


@pytest.mark.parametrize("name", KINDS)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_with_tokens_alone_in_ram_the_windows_come_from_disk(
    name: str, data: st.DataObject
) -> None:
    kind = KINDS[name]
    disk = data.draw(disks(kind, readable=True))
    position = restorable(disk.path, data.draw(st.integers(0, len(disk.tokens))))
    matched = data.draw(st.integers(0, len(disk.tokens)))
    if not position:
        return
    ram = [
        (start, end, replace(payload, held=((),) * len(kind.windows), state=None))
        for start, end, payload in disk.ram(matched)
    ]
    chosen = needed(disk.path, position, matched, kind.reach)
    assert disk.gives([*ram, *disk.cut(chosen)], position)


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.windows])
@given(data=st.data(), length=st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_missing_tokens_of_a_window_are_told(name: str, data: st.DataObject, length: int) -> None:
    disk = data.draw(disks(KINDS[name]))
    start = data.draw(st.integers(1, len(disk.tokens)))
    end = start + length
    there = disk.cut([segment for segment in disk.path.segments if segment.readable])
    there = [
        (first, min(stop, start), payload.split(start - first, stop - first)[0])
        if stop > start
        else (first, stop, payload)
        for first, stop, payload in there
        if first < start
    ]
    missing = False
    for index, window in enumerate(disk.kind.windows):
        found = {
            position
            for _, stop, payload in there
            for position in range(stop - len(payload.held[index]), stop)
        }
        missing |= not found.issuperset(range(max(0, end - window), start))
    assert lacks(disk.path, start, end) == missing

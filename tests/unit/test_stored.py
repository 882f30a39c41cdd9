"""Decisions over descriptions agree with what the described segments do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kvserve.cache.codec import SegmentPayload, capture
from kvserve.cache.stored import Described, beyond, followed_by, lacks, needed, restorable, root
from kvserve.cache.tree import lacks_window
from kvserve.store.segments import SegmentSpec, StoredPath, StoredSegment
from tests.unit.test_codec import MAKES, feed

EMPTY = StoredPath(b"", np.zeros(0, np.uint32), 0, ())


def segment(
    start: int,
    end: int,
    *,
    run: int = 0,
    restorable: bool = True,
    whole: bool = False,
    windows: dict[int, int] | None = None,
    readable: bool = True,
) -> StoredSegment:
    return StoredSegment(run, 0, start, end, 10, restorable, whole, windows or {}, readable)


def path(num_tokens: int, *segments: StoredSegment) -> StoredPath:
    return StoredPath(b"", np.zeros(num_tokens, np.uint32), num_tokens, segments)


def described(payload: SegmentPayload) -> tuple[bool, bool, dict[int, int]]:
    return payload.restorable, payload.whole, payload.windows


@pytest.mark.parametrize("name", sorted(MAKES))
@pytest.mark.parametrize("contained", [False, True])
def test_descriptions_split_as_payloads_do(name: str, contained: bool) -> None:
    cache = MAKES[name]()
    feed(cache, 0, 6)
    feed(cache, 6, 18)
    payload = capture(cache, 18, 6, 18, with_state=True, contained=contained)
    whole = Described(payload.nbytes, payload.restorable, payload.whole, payload.windows)
    for at in range(1, 12):
        for real, found in zip(payload.split(at, 12), whole.split(at, 12), strict=True):
            assert (found.restorable, found.whole, dict(found.windows)) == described(real)


def test_an_empty_disk_gives_nothing_and_lacks_nothing_at_the_start() -> None:
    assert restorable(EMPTY, 10) == 0
    assert restorable(EMPTY, 10, 7) == 7
    assert restorable(EMPTY, 5, 7) == 5
    assert needed(EMPTY, 10) == ()
    assert not lacks(EMPTY, 0, 10)


def test_plain_segments_can_be_left_anywhere_states_only_at_their_ends() -> None:
    plain = path(25, segment(0, 10, whole=True), segment(10, 30, whole=True))
    assert [restorable(plain, limit) for limit in (30, 25, 14, 10, 3)] == [25, 25, 14, 10, 3]
    states = path(25, segment(0, 10), segment(10, 20), segment(20, 30))
    assert [restorable(states, limit) for limit in (30, 20, 19, 9)] == [20, 20, 10, 0]


def test_of_a_run_that_is_left_early_the_state_does_not_count() -> None:
    branched = path(20, segment(0, 15), segment(10, 20, run=1, restorable=False))
    assert restorable(branched, 20) == 0
    assert restorable(path(20, segment(0, 15), segment(10, 20, run=1)), 20) == 20


def test_what_cannot_be_read_ends_the_path_unless_ram_has_it() -> None:
    gone = segment(10, 20, run=1, readable=False)
    stored = path(30, segment(0, 10), gone, segment(20, 30, run=2))
    assert restorable(stored, 30) == 10
    assert restorable(stored, 30, 15) == 15
    assert restorable(stored, 30, 20) == 30
    assert [s.run_id for s in needed(stored, 30, 20)] == [2]
    assert [s.run_id for s in needed(stored, 30, 20, 15)] == [2]


def test_the_segment_of_the_end_state_is_needed_even_if_ram_has_all_tokens() -> None:
    stored = path(30, segment(0, 10), segment(10, 20), segment(20, 30))
    assert [s.start for s in needed(stored, 20, 25)] == [10]
    assert [s.start for s in needed(stored, 30, 10, 15)] == [10, 20]
    assert [s.start for s in needed(stored, 30)] == [0, 10, 20]


def test_segments_that_end_beyond_the_next_ones_start_are_read_for_their_own_tokens_only() -> None:
    stored = path(30, segment(0, 25), segment(10, 30, run=1))
    assert [s.run_id for s in needed(stored, 30, 10)] == [1]
    assert [s.run_id for s in needed(stored, 30, 9)] == [0, 1]


def test_a_hole_in_a_window_is_told_to_whom_it_concerns() -> None:
    # [0, 100) was cut out of a longer segment, whose window of 8 lay at its end.
    stored = path(60, segment(0, 100, whole=True, windows={8: 8}))
    assert restorable(stored, 60) == 0
    assert lacks(stored, 60, 61) and lacks(stored, 60, 67)
    assert not lacks(stored, 60, 68)
    whole = path(100, *stored.segments)
    assert restorable(whole, 100) == 100 and restorable(whole, 99) == 0
    assert not lacks(whole, 100, 101)


def test_places_that_nothing_is_known_of_lack_every_window() -> None:
    gone = path(20, segment(0, 20, windows={8: 8}, readable=False))
    assert lacks(gone, 20, 22) and not lacks(gone, 20, 28)
    assert lacks_window(beyond(root(), EMPTY, 5, (8,)), 5, 7)
    assert not lacks_window(beyond(root(), EMPTY, 5, (8,)), 5, 13)
    filled = followed_by(root(), SegmentSpec(0, 20, (), [], windows={8: 8}))
    assert not lacks_window(beyond(filled, gone, 20, (8,)), 20, 22)
    later = path(30, *gone.segments, segment(20, 30, run=1, whole=True, windows={8: 8}))
    assert not lacks_window(beyond(filled, later, 30), 30, 31)
    part = followed_by(root(), SegmentSpec(0, 24, (), [], windows={8: 8}))
    assert beyond(part, later, 30).start == 24
    assert not lacks_window(beyond(part, replace(later, num_tokens=28), 28), 28, 36)

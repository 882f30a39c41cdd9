"""Cuts, states and chunks, as positions."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from kvserve.cache.plan import Plan, Traits, chunk_end, plan, segment_ends, state_ends
from kvserve.cache.policy import STATE_SPACING_TOKENS
from kvserve.core.types import Cut

STATEFUL = Traits(stateful=True)


def cuts(*positions: int) -> list[Cut]:
    return [Cut(position, index) for index, position in enumerate(positions)]


def test_every_message_end_is_a_cut_and_long_messages_have_cuts_inside() -> None:
    assert segment_ends([10, 35], 42, 10) == [10, 20, 30, 35, 42]
    assert segment_ends([], 25, 10) == [10, 20, 25]
    assert segment_ends([25], 25, 10) == [10, 20, 25]
    assert segment_ends([5, 5, 30], 12, 10) == [5, 12]
    assert segment_ends([], 0, 10) == []


def test_a_plan_ends_at_the_last_message_not_at_the_prompt() -> None:
    made = plan(45, cuts(10, 35), 0, Traits(), 10)
    assert made.cuts == (10, 20, 30, 35)
    assert made.states == frozenset()
    assert plan(35, cuts(10, 35), 0, Traits(), 10).cuts == (10, 20, 30, 35)
    assert plan(60, cuts(10, 35), 20, Traits(), 10).cuts == (30, 35, 45, 55)


def test_states_are_taken_at_message_ends_that_are_not_held() -> None:
    made = plan(45, cuts(10, 35), 10, STATEFUL, 10)
    assert made.states == {35}
    assert plan(45, cuts(10, 35), 0, STATEFUL, 10).states == {10, 35}


def test_a_long_message_takes_states_inside() -> None:
    spacing = STATE_SPACING_TOKENS
    made = plan(3 * spacing + 5, cuts(100, 3 * spacing), 0, STATEFUL, 512)
    inside = sorted(made.states - {100, 3 * spacing})
    assert len(inside) == 2
    assert all(b - a >= spacing for a, b in pairwise([100, *inside]))
    assert set(inside) <= set(made.cuts)


def test_chunks_pause_for_states_alone() -> None:
    made = Plan(reuse=0, length=50, cuts=(10, 20, 35), states=frozenset({20, 35}))
    assert chunk_end(0, made, 16) == 16
    assert chunk_end(0, made, 40) == 20
    assert chunk_end(20, made, 40) == 35
    assert chunk_end(35, made, 40) == 50


@given(
    ends=st.lists(st.integers(1, 300), max_size=8).map(sorted),
    length=st.integers(2, 320),
    data=st.data(),
    segment=st.integers(1, 40),
    size=st.integers(1, 64),
    stateful=st.booleans(),
)
def test_any_plan_covers_its_prompt_in_order(
    ends: list[int], length: int, data: st.DataObject, segment: int, size: int, stateful: bool
) -> None:
    ends = [end for end in ends if end <= length]
    reuse = data.draw(st.integers(0, length - 1))
    made = plan(length, cuts(*ends), reuse, Traits(stateful=stateful), segment)
    assert list(made.cuts) == sorted(set(made.cuts))
    assert all(reuse < cut <= length for cut in made.cuts)
    assert {end for end in ends if end > reuse} <= set(made.cuts)
    assert made.states <= set(made.cuts)
    assert all(b - a <= segment for a, b in pairwise([0, *segment_ends(ends, length, segment)]))
    position, stops = reuse, []
    while position < length:
        end = chunk_end(position, made, size)
        assert position < end <= min(position + size, length)
        stops.append(end)
        position = end
    assert made.states <= set(stops)


def test_states_inside_a_long_document_outlive_the_turns_behind_it() -> None:
    ends = [100, 10_000]
    planned = state_ends(ends, 10_003, 512)
    after_turns = state_ends([*ends, 10_040, 10_080, 10_200], 10_200, 512)
    inside = {end for end in planned if 100 < end < 10_000}
    assert len(inside) == 2
    assert inside <= after_turns

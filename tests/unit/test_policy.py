"""What is evicted first, and which end states a long conversation keeps."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import pytest

from kvserve.cache.policy import RECENT_STATES, EvictionQueue, states_to_keep


def test_the_least_recently_used_leaves_first() -> None:
    queue: EvictionQueue[str] = EvictionQueue()
    used = {"a": 3, "b": 1, "c": 2}
    for name, tick in used.items():
        queue.push(name, tick)
    assert [queue.pop(used.get) for _ in range(4)] == ["b", "c", "a", None]


def test_a_use_after_the_offer_counts() -> None:
    queue: EvictionQueue[str] = EvictionQueue()
    used = {"a": 1, "b": 2}
    queue.push("a", 1)
    queue.push("b", 2)
    used["a"] = 3
    assert [queue.pop(used.get) for _ in range(3)] == ["b", "a", None]


def test_what_is_no_candidate_any_more_is_skipped_and_may_come_back() -> None:
    queue: EvictionQueue[str] = EvictionQueue()
    used: dict[str, int | None] = {"a": None, "b": 2}
    queue.push("a", 1)
    queue.push("b", 2)
    assert queue.pop(used.get) == "b"
    used["a"] = 4
    queue.push("a", 4)
    assert queue.pop(used.get) == "a"


def test_equal_ticks_leave_in_order_of_arrival() -> None:
    queue: EvictionQueue[str] = EvictionQueue()
    for name in "cab":
        queue.push(name, 1)
    assert [queue.pop(lambda _: 1) for _ in range(3)] == list("cab")


def test_the_queue_forgets_what_is_discarded_without_any_pressure() -> None:
    queue: EvictionQueue[int] = EvictionQueue()
    queue.push(-1, 0)
    for candidate in range(10_000):
        queue.push(candidate, candidate)
        queue.push(candidate, candidate)
        queue.discard(candidate)
        queue.discard(candidate)
        assert len(queue) < 100
    assert queue.pop(lambda candidate: 0) == -1
    assert queue.pop(lambda candidate: 0) is None


def test_short_conversations_keep_every_state() -> None:
    assert states_to_keep([], 10) == set()
    assert states_to_keep([5], 4) == set()
    ends = list(range(10, 10 * RECENT_STATES + 1, 10))
    assert states_to_keep(ends, ends[-1] + 7) == set(ends)


@pytest.mark.parametrize("mean", [5, 60, 2000])
def test_states_thinned_turn_by_turn_stay_few_and_spread(mean: int) -> None:
    lengths = np.random.default_rng(1).integers(1, 2 * mean, 1000).tolist()
    ends = list(accumulate(lengths))
    held: set[int] = set()
    for turn in range(1, len(ends) + 1):
        held = (held | {ends[turn - 1]}) & states_to_keep(ends[:turn], ends[turn - 1])
        assert len(held) <= 8 + RECENT_STATES * turn.bit_length() / 2
        assert ends[0] in held
        assert set(ends[max(0, turn - RECENT_STATES) : turn]) <= held
        # Whatever message one goes back to, a state lies at most as far again before it.
        indices = sorted(ends.index(end) for end in held) if turn % 97 == 0 else []
        for index in range(turn) if indices else []:
            nearest = max(i for i in indices if i <= index)
            assert index - nearest <= turn - index
    assert held == states_to_keep(ends, ends[-1])

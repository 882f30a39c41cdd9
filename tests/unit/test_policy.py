"""What is evicted first, and which end states a long conversation keeps."""

from __future__ import annotations

from itertools import accumulate, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvserve.cache.policy import (
    GRACE_BUDGETS,
    GRACE_TURNS,
    RECENT_STATES,
    REGRET,
    Ageing,
    EvictionQueue,
    Order,
    sample_keys,
    states_to_keep,
)


def test_the_least_recently_used_of_equal_rank_leaves_first() -> None:
    queue: EvictionQueue[str] = EvictionQueue()
    used = {"a": (0, 3), "b": (0, 1), "c": (0, 2)}
    for name, order in used.items():
        queue.push(name, order)
    assert [queue.pop(used.get) for _ in range(4)] == ["b", "c", "a", None]


def test_the_lower_rank_leaves_first_however_recently_it_was_used() -> None:
    queue: EvictionQueue[str] = EvictionQueue()
    used = {"a": (5, 1), "b": (4, 9), "c": (5, 0)}
    for name, order in used.items():
        queue.push(name, order)
    assert [queue.pop(used.get) for _ in range(3)] == ["b", "c", "a"]


def test_a_use_after_the_offer_counts() -> None:
    queue: EvictionQueue[str] = EvictionQueue()
    used = {"a": (0, 1), "b": (0, 2)}
    queue.push("a", (0, 1))
    queue.push("b", (0, 2))
    used["a"] = (0, 3)
    assert [queue.pop(used.get) for _ in range(3)] == ["b", "a", None]


def test_what_is_no_candidate_any_more_is_skipped_and_may_come_back() -> None:
    queue: EvictionQueue[str] = EvictionQueue()
    used: dict[str, Order | None] = {"a": None, "b": (0, 2)}
    queue.push("a", (0, 1))
    queue.push("b", (0, 2))
    assert queue.pop(used.get) == "b"
    used["a"] = (0, 4)
    queue.push("a", (0, 4))
    assert queue.pop(used.get) == "a"


def test_equal_orders_leave_in_order_of_arrival() -> None:
    queue: EvictionQueue[str] = EvictionQueue()
    for name in "cab":
        queue.push(name, (1, 1))
    assert [queue.pop(lambda _: (1, 1)) for _ in range(3)] == list("cab")


def test_the_queue_forgets_what_is_discarded_without_any_pressure() -> None:
    queue: EvictionQueue[int] = EvictionQueue()
    queue.push(-1, (0, 0))
    for candidate in range(10_000):
        queue.push(candidate, (0, candidate))
        queue.push(candidate, (0, candidate))
        queue.discard(candidate)
        queue.discard(candidate)
        assert len(queue) < 100
    assert queue.pop(lambda candidate: (0, 0)) == -1
    assert queue.pop(lambda candidate: (0, 0)) is None


def test_each_turn_is_waited_for_longer_up_to_a_limit() -> None:
    ageing = Ageing(1000)
    ranks = [ageing.rank(turn) for turn in range(GRACE_TURNS + 5)]
    assert ranks[0] == ranks[1] == 0
    assert all(a < b for a, b in pairwise(ranks[1 : GRACE_TURNS + 2]))
    assert set(ranks[GRACE_TURNS + 1 :]) == {GRACE_BUDGETS * 1000}


def test_prompts_that_nobody_asks_again_age_nothing() -> None:
    ageing = Ageing(100)
    for key in range(10_000):
        assert not ageing.added(key)
        ageing.evicted(key, 10)
    assert ageing.rank(1) == 0


def test_what_was_evicted_and_is_wanted_again_ages_more_than_what_was_held() -> None:
    ageing = Ageing(100)
    ageing.reused(10)
    assert ageing.rank(1) == 10
    ageing.evicted(1, 10)
    assert ageing.added(1)
    assert ageing.rank(1) == 10 + REGRET * 10
    assert not ageing.added(1)  # it is held now
    assert ageing.rank(1) == 10 + REGRET * 10


def test_a_budget_of_what_was_evicted_is_remembered_and_no_more() -> None:
    ageing = Ageing(100)
    for key in [*range(20), 15]:
        ageing.evicted(key, 10)
    assert [key for key in range(20) if ageing.added(key)] == list(range(10, 20))
    for key in range(1000):
        ageing.evicted(key, 0 if key % 2 else 1)
    assert len(ageing._evicted) <= 2 * 100 + 1


@given(st.integers(0, 400), st.lists(st.integers(1, 300), min_size=1, max_size=8))
def test_a_place_has_one_key_however_the_prompt_is_cut(start: int, lengths: list[int]) -> None:
    tokens = np.random.default_rng(1).integers(0, 1000, sum(lengths), dtype=np.uint32)
    whole = sample_keys(start, tokens.tobytes())
    pieces = [
        sample_keys(start + end - length, tokens[end - length : end].tobytes())
        for end, length in zip(accumulate(lengths), lengths, strict=True)
    ]
    found = [key for piece in pieces for key in piece]
    assert [key for key in whole if key in found] == found  # cuts hide places, and move none
    assert len(whole) - len(found) <= len(lengths) - 1
    assert len(whole) in (len(tokens) // 128 - 1, len(tokens) // 128, len(tokens) // 128 + 1)


def test_other_tokens_and_other_places_have_other_keys() -> None:
    tokens = np.arange(1280, dtype=np.uint32)
    keys = [
        *sample_keys(0, tokens.tobytes()),
        *sample_keys(0, (tokens + 1).tobytes()),
        *sample_keys(128, tokens.tobytes()),
    ]
    assert len(set(keys)) == len(keys) == 30


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

"""Warm equals cold, and reuse is what it should be, for every family of models.

Each family goes through the turns of a conversation, a rollback, a fork, a regenerate, a second
user of its first message and a cancelled prefill; every next-token distribution is compared with
that of an uncut run on an empty cache.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from kvserve.engine.batch import relative_difference
from tests.families import zoo
from tests.families.driver import Driver, Outcome, Tokens, loaded

pytestmark = pytest.mark.families

TOLERANCE = 1e-4
FAMILIES = [f for f in zoo.families() if f.name not in zoo.CHUNKING_DIFFERS]


def tokens(seed: int, length: int) -> Tokens:
    return [int(token) for token in np.random.default_rng(seed).integers(1, 127, length)]


def assert_equals_cold(driver: Driver, outcome: Outcome) -> None:
    expected = driver.cold(outcome.path)[-len(outcome.logits) :]
    assert relative_difference(outcome.logits, expected) <= TOLERANCE


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_path_to_a_state_gives_the_cold_logits(family: zoo.Family) -> None:
    driver = Driver(loaded(zoo.build(family), family.name))
    exact = not driver.model.traits.fleeting
    system, suffix = tokens(1, 37), tokens(2, 3)
    history = [system, tokens(3, 9)]

    first = driver.ask(history, suffix, tokens(4, 21))
    assert first.reused == 0
    assert_equals_cold(driver, first)

    # The next turn: the reply is closed by a newline-like token that was never fed.
    answer = first.path[sum(map(len, history)) :]
    history = [*history, [*answer, 99], tokens(5, 25)]
    second = driver.ask(history, suffix, tokens(6, 18))
    assert second.reused == len(first.path)
    assert_equals_cold(driver, second)

    third_history = [*history, [*second.path[sum(map(len, history)) :], 99], tokens(7, 6)]
    third = driver.ask(third_history, suffix, tokens(8, 5))
    assert third.reused == len(second.path)
    assert_equals_cold(driver, third)

    # Regenerate: the last question again.
    again = driver.ask(third_history, suffix, tokens(9, 5))
    prompt_length = sum(map(len, third_history)) + len(suffix)
    if exact:
        assert again.reused == prompt_length - 1
    assert sum(map(len, third_history)) <= again.reused < prompt_length
    assert_equals_cold(driver, again)

    # Rollback to the second message, then an edit of it: both take up at a message end.
    rolled = driver.ask(history[:2], suffix, tokens(10, 7))
    assert rolled.reused >= sum(map(len, history[:2]))
    assert_equals_cold(driver, rolled)
    edited = driver.ask([system, tokens(11, 12)], suffix, tokens(12, 7))
    assert edited.reused >= len(system)
    assert_equals_cold(driver, edited)

    # A fork from the middle, and a second user of the system message.
    fork = driver.ask([*history[:3], tokens(13, 14)], suffix, tokens(14, 6))
    assert fork.reused >= sum(map(len, history[:3])) - 1
    assert_equals_cold(driver, fork)
    other = driver.ask([system, tokens(15, 30)], suffix, tokens(16, 6))
    assert other.reused >= len(system)
    assert_equals_cold(driver, other)

    # A cancelled prefill is taken up where it was left.
    long = [tokens(17, 90), tokens(18, 31)]
    left = driver.ask(long, suffix, [], chunk=20, stop_after=70)
    assert 0 < len(left.path) < 121
    resumed = driver.ask(long, suffix, tokens(19, 4))
    assert resumed.reused == len(left.path)
    assert_equals_cold(driver, resumed)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_batch_step_gives_what_each_row_alone_gives(family: zoo.Family) -> None:
    model = loaded(zoo.build(family), family.name)
    model.batcher.probe(model.fresh_cache, model.vocab_size, 1e-4)
    prompts = [tokens(20 + i, length) for i, length in enumerate((7, 40, 23))]
    rows = []
    for prompt in prompts:
        rows.append(model.fresh_cache())
        mx.eval(model.forward(mx.array(prompt)[None], cache=rows[-1]))
    fed = [list(prompt) for prompt in prompts]
    logits = mx.zeros((0, model.vocab_size))
    kept, kept_fed = rows[1], fed[1]
    for step in range(14):
        if step == 5:  # a row leaves, later it comes back: its own state must be up to date
            rows, fed = [rows[0], rows[2]], [fed[0], fed[2]]
        if step == 9:
            rows.append(kept)
            fed.append(kept_fed)
        following = [(31 * step + 7 * i) % 127 for i in range(len(rows))]
        logits = model.batcher.step(mx.array(following, dtype=mx.uint32), rows)
        mx.eval(logits)
        for row, token in zip(fed, following, strict=True):
            row.append(token)
    for i, path in enumerate(fed):
        expected = model.forward(mx.array(path)[None], cache=model.fresh_cache())[0, -1]
        assert relative_difference(logits[i], expected) <= TOLERANCE

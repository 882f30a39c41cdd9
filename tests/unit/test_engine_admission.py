"""Memory: requests wait for it, are refused for good, or give it back, and replies stay the same.

`CheckedEngine` recounts all bytes after every step, so the hard budget is watched in each test.
"""

from __future__ import annotations

import asyncio
import threading

import pytest

from kvserve.core.errors import ContextTooLong, InvalidRequest, QueueFull, TooLarge
from kvserve.core.types import SamplingParams
from tests.fakes import (
    TOKEN_NBYTES,
    FakeNetwork,
    Reply,
    Tokens,
    ask,
    collect,
    collect_all,
    expected_reply,
    random_tokens,
    running_engine,
)

pytestmark = pytest.mark.anyio

GROWTH = 256
"""Working caches grow by so many tokens at a time."""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_requests_wait_for_memory_and_then_all_finish() -> None:
    prompts = [random_tokens(150 + 10 * i, i) for i in range(8)]
    async with running_engine(budget_nbytes=3 * GROWTH * TOKEN_NBYTES) as engine:
        replies = await collect_all([engine.submit(ask(prompt, 20)) for prompt in prompts])
        assert 1 < engine.most_running <= 3
        assert engine.most_waiting >= 5
        assert engine.stats()["cache"]["working_bytes"] == 0
    for prompt, reply in zip(prompts, replies, strict=True):
        assert isinstance(reply, Reply)
        assert reply.tokens == expected_reply(prompt, 20)


async def test_what_can_never_fit_is_refused_while_others_run() -> None:
    small, big = random_tokens(100, 1), random_tokens(1000, 2)
    async with running_engine(budget_nbytes=3 * GROWTH * TOKEN_NBYTES) as engine:
        replies = await collect_all([engine.submit(ask(p, 20)) for p in (small, big, small)])
    assert [type(reply) for reply in replies] == [Reply, TooLarge, Reply]
    error = replies[1]
    assert isinstance(error, TooLarge)
    assert str(3 * GROWTH * TOKEN_NBYTES) in error.message


async def test_one_more_than_the_queue_holds_is_refused_with_a_time_to_come_back() -> None:
    let_go, entered = threading.Event(), threading.Event()

    def before(fed: list[Tokens], held: list[Tokens]) -> None:
        entered.set()
        let_go.wait(10)

    network = FakeNetwork()
    prompts = [random_tokens(30, i) for i in range(4)]
    async with running_engine(network, max_queue=3) as engine:
        network.before = before
        generations = [engine.submit(ask(prompts[0]))]
        await asyncio.to_thread(entered.wait, 10)
        generations += [engine.submit(ask(prompt)) for prompt in prompts[1:]]
        with pytest.raises(QueueFull) as refused:
            engine.submit(ask(prompts[0]))
        assert refused.value.retry_after_s >= 1
        let_go.set()
        replies = await collect_all(generations)
        assert [type(reply) for reply in replies] == [Reply] * 4
        await collect(engine.submit(ask(prompts[0])))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_replies_are_the_same_when_memory_makes_requests_yield(temperature: float) -> None:
    sampling = SamplingParams(temperature=temperature, seed=3)
    prompts = [random_tokens(150 + 20 * i, i) for i in range(3)]
    replies: list[list[Tokens]] = []
    for budget_tokens in (100_000, 5 * GROWTH):
        async with running_engine(budget_nbytes=budget_tokens * TOKEN_NBYTES) as engine:
            generations = [engine.submit(ask(p, 500, sampling=sampling)) for p in prompts]
            done = await asyncio.gather(*map(collect, generations))
            replies.append([reply.tokens for reply in done])
            assert (engine.stats()["preempted"] > 0) == (budget_tokens < 100_000)
    assert replies[0] == replies[1]
    if not temperature:
        assert replies[1] == [expected_reply(prompt, 500) for prompt in prompts]


async def test_stored_state_that_a_waiting_request_holds_never_fails_a_running_one() -> None:
    stored = random_tokens(1000, 1)
    prompt = random_tokens(200, 2)
    async with running_engine(budget_nbytes=2100 * TOKEN_NBYTES) as engine:
        await collect(engine.submit(ask(stored, 1, cuts=[1000])))
        running = engine.submit(ask(prompt, 1000))
        waiting = engine.submit(ask([*stored, 9], 4))
        replies = await collect_all([running, waiting])
    first, second = replies
    assert isinstance(first, Reply)
    assert first.tokens == expected_reply(prompt, 1000)
    assert isinstance(second, Reply)
    assert second.tokens == expected_reply([*stored, 9], 4)


async def test_eviction_under_a_small_budget_changes_no_reply() -> None:
    chats = [random_tokens(200, i) for i in range(4)]
    async with running_engine(budget_nbytes=4 * GROWTH * TOKEN_NBYTES) as engine:
        for turn in range(4):
            for i, chat in enumerate(chats):
                reply = await collect(engine.submit(ask(chat, 10)))
                assert reply.tokens == expected_reply(chat, 10)
                chats[i] = [*chat, *reply.tokens, *random_tokens(15, 10 * turn + i)]
        assert engine.stats()["cache"]["evicted_segments"] > 0


async def test_what_is_refused_at_once_leaves_nothing_behind() -> None:
    async with running_engine(context_length=100) as engine:
        with pytest.raises(ContextTooLong, match="100"):
            engine.submit(ask(random_tokens(100, 1)))
        for request in (
            ask([]),
            ask([5, 10**6]),
            ask([5], sampling=SamplingParams(logit_bias={10**6: 1.0})),
        ):
            with pytest.raises(InvalidRequest):
                engine.submit(request)
        assert engine.stats()["waiting"] == 0
        reply = await collect(engine.submit(ask(random_tokens(99, 1), 1)))
        assert len(reply.tokens) == 1

"""Giving a request up: at once, whatever it is doing, and what it had done is kept."""

from __future__ import annotations

import asyncio
import threading

import pytest

from kvserve.core.types import Started, TextPiece
from tests.fakes import (
    CheckedEngine,
    FakeNetwork,
    Reply,
    Tokens,
    ask,
    collect,
    expected_reply,
    random_tokens,
    running_engine,
)

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Pause:
    """Holds the engine thread up before the first pass that begins at `position` or later."""

    def __init__(self, network: FakeNetwork, position: int) -> None:
        self._position = position
        self._reached = threading.Event()
        self._released = threading.Event()
        network.before = self._before

    def _before(self, fed: list[Tokens], held: list[Tokens]) -> None:
        if len(held[0]) >= self._position and not self._reached.is_set():
            self._reached.set()
            assert self._released.wait(30)

    async def reached(self) -> None:
        assert await asyncio.to_thread(self._reached.wait, 30)

    def release(self) -> None:
        self._released.set()


def check_idle(engine: CheckedEngine, *, cancelled: int) -> None:
    stats = engine.stats()
    assert (stats["waiting"], stats["running"], stats["cancelled"]) == (0, 0, cancelled)
    assert stats["cache"]["working_bytes"] == 0


async def leave(engine: CheckedEngine, network: FakeNetwork, prompt: Tokens, position: int) -> int:
    """Submit, leave once `position` tokens are fed; return how many were by the end."""
    pause = Pause(network, position)
    before = engine.stats()["prefilled_tokens"]
    generation = engine.submit(ask(prompt, 50, cuts=[20, len(prompt) - 5]))
    await pause.reached()
    closing = asyncio.create_task(generation.aclose())
    await asyncio.sleep(0)
    pause.release()
    await closing
    done: int = engine.stats()["prefilled_tokens"] - before
    return done


@pytest.mark.parametrize("position", [1, 70, 4000])
async def test_a_cancelled_prefill_goes_on_from_where_it_was(position: int) -> None:
    prompt = random_tokens(7500, 1)
    network = FakeNetwork()
    async with running_engine(network) as engine:
        done = await leave(engine, network, prompt, position)
        check_idle(engine, cancelled=1)
        assert position <= done < len(prompt)
        reply = await collect(engine.submit(ask(prompt, 8, cuts=[20, len(prompt) - 5])))
        assert reply.num_cached >= 0.9 * done
        assert reply.tokens == expected_reply(prompt, 8)


async def test_an_edit_after_a_cancelled_prefill_is_answered_right() -> None:
    prompt = random_tokens(3000, 1)
    network = FakeNetwork()
    async with running_engine(network) as engine:
        await leave(engine, network, prompt, 1500)
        edited = [*prompt[:700], *random_tokens(300, 2)]
        reply = await collect(engine.submit(ask(edited, 8)))
        assert reply.num_cached == 700
        assert reply.tokens == expected_reply(edited, 8)


async def test_a_request_cancelled_in_line_leaves_nothing_behind() -> None:
    network = FakeNetwork()
    prompts = [random_tokens(100, i) for i in range(3)]
    async with running_engine(network, max_batch=1) as engine:
        await collect(engine.submit(ask(prompts[1], 4)))  # so that it has a lease while it waits
        pause = Pause(network, 0)
        first, second, third = (engine.submit(ask(prompt, 20)) for prompt in prompts)
        await pause.reached()
        closing = asyncio.create_task(second.aclose())
        await asyncio.sleep(0)
        pause.release()
        await closing
        for generation, prompt in ((first, prompts[0]), (third, prompts[2])):
            assert (await collect(generation)).tokens == expected_reply(prompt, 20)
        check_idle(engine, cancelled=1)
        assert await engine.call(lambda: [n.leases for n in engine.cache._names.values()]) == []


async def test_a_reply_cancelled_half_way_is_gone_on_from() -> None:
    prompt = random_tokens(200, 1)
    async with running_engine() as engine:
        mate = asyncio.create_task(collect(engine.submit(ask(random_tokens(90, 2), 300))))
        generation = engine.submit(ask(prompt, 4000))
        pieces = 0
        async for event in generation:
            pieces += isinstance(event, TextPiece)
            if pieces == 30:
                break
        await generation.aclose()
        assert engine.stats()["cancelled"] == 1
        said = expected_reply(prompt, 30)
        following = [*prompt, *said, *random_tokens(10, 3)]
        reply = await collect(engine.submit(ask(following, 8)))
        assert reply.num_cached >= len(prompt) + 25
        assert reply.tokens == expected_reply(following, 8)
        assert (await mate).tokens == expected_reply(random_tokens(90, 2), 300)
        check_idle(engine, cancelled=1)


async def test_when_closing_returns_the_engine_has_let_go() -> None:
    # Who closes then asks the cache what was kept: the last chunk must be in it already.
    prompt = random_tokens(3000, 1)
    network = FakeNetwork()
    async with running_engine(network) as engine:
        done = await leave(engine, network, prompt, 1000)
        assert engine.stats()["running"] == 0
        assert engine.cache.usage(b"", ask(prompt).prompt.token_ids).num_tokens == done


async def test_closing_twice_or_after_the_end_is_harmless() -> None:
    async with running_engine() as engine:
        generation = engine.submit(ask(random_tokens(30, 1), 4000))
        assert isinstance(await anext(aiter(generation)), Started)
        await asyncio.gather(generation.aclose(), generation.aclose())
        await generation.aclose()
        assert [event async for event in generation] == []
        finished = engine.submit(ask(random_tokens(30, 2), 4))
        assert isinstance(await collect(finished), Reply)
        await finished.aclose()
        check_idle(engine, cancelled=1)


async def test_a_reader_that_still_waits_when_another_closes_is_let_go() -> None:
    network = FakeNetwork()
    async with running_engine(network, max_batch=1) as engine:
        pause = Pause(network, 0)
        running = engine.submit(ask(random_tokens(30, 1)))
        waiting = engine.submit(ask(random_tokens(30, 2)))
        reader = asyncio.create_task(collect(waiting))
        await pause.reached()
        closing = asyncio.create_task(waiting.aclose())
        await asyncio.sleep(0)
        pause.release()
        await closing
        assert (await asyncio.wait_for(reader, 10)).finished is None
        await collect(running)

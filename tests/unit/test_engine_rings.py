"""Errors stop at three rings: the request, the batch, the loop; everyone who waits is answered."""

from __future__ import annotations

import asyncio
from typing import Any

import mlx.core as mx
import pytest

from kvserve.core.errors import NotReady, RequestFailed
from kvserve.core.types import SamplingParams
from kvserve.engine import loop as loop_module
from kvserve.engine.engine import Engine, EngineSettings
from kvserve.engine.sampling import Sampler
from kvserve.engine.text import TextStream
from tests.fakes import (
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

POISON = 7
"""A special-free token that `random_tokens` never gives."""
GOOD = [random_tokens(40 + 25 * i, i) for i in range(4)]
BAD = [*random_tokens(60, 9), POISON, *random_tokens(20, 10)]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Death(BaseException):
    """What no ring but the outermost may hold up."""


def check_good(replies: list[Any], num_tokens: int = 12) -> None:
    for prompt, reply in zip(GOOD, replies, strict=True):
        assert isinstance(reply, Reply)
        assert reply.tokens == expected_reply(prompt, num_tokens)


async def bad_among_good(engine: Engine, **how: Any) -> BaseException:
    """Check the replies to all good requests, and return what became of the bad one."""
    generations = [engine.submit(ask(prompt, 12)) for prompt in GOOD[:2]]
    generations.append(engine.submit(ask(BAD, 12, **how)))
    generations += [engine.submit(ask(prompt, 12)) for prompt in GOOD[2:]]
    replies = await collect_all(generations)
    error = replies.pop(2)
    check_good(replies)
    assert isinstance(error, BaseException)
    stats = engine.stats()
    assert (stats["failed"], stats["finished"]) == (1, 4)
    assert stats["cache"]["working_bytes"] == 0
    return error


async def test_a_prefill_that_raises_fails_its_own_request_alone() -> None:
    def before(fed: list[Tokens], held: list[Tokens]) -> None:
        if any(POISON in row for row in fed):
            raise ValueError("planted")

    network = FakeNetwork()
    network.before = before
    async with running_engine(network) as engine:
        error = await bad_among_good(engine)
        assert isinstance(error, RequestFailed)
        assert "planted" not in error.message
        assert engine.ready
        check_good(await collect_all([engine.submit(ask(prompt, 12)) for prompt in GOOD]))


@pytest.mark.parametrize("step", [0, 3])
async def test_a_sampler_that_raises_fails_its_own_request_alone(
    step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(Sampler):
        def sample(self, logits: mx.array) -> mx.array:
            if self._params.seed == 666 and self._step == step:
                raise ValueError("planted")
            return super().sample(logits)

    monkeypatch.setattr(loop_module, "Sampler", Broken)
    async with running_engine() as engine:
        sampling = SamplingParams(temperature=1.0, seed=666)
        assert isinstance(await bad_among_good(engine, sampling=sampling), RequestFailed)


async def test_text_that_cannot_be_decoded_fails_its_own_request_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def feed(self: TextStream, token_id: int) -> str:
        if self._stops._stops == ("broken",):
            raise ValueError("planted")
        return original(self, token_id)

    original = TextStream.feed
    monkeypatch.setattr(TextStream, "feed", feed)
    async with running_engine() as engine:
        assert isinstance(await bad_among_good(engine, stop=("broken",)), RequestFailed)


async def test_a_joint_step_that_raises_fails_the_culprit_alone() -> None:
    def before(fed: list[Tokens], held: list[Tokens]) -> None:
        if any(POISON in row and len(row) >= len(BAD) for row in held):
            raise ValueError("planted")

    network = FakeNetwork()
    network.before = before
    async with running_engine(network) as engine:
        assert isinstance(await bad_among_good(engine), RequestFailed)
        assert engine.stats()["recovered_batches"] >= 1


async def test_a_joint_step_that_raises_once_fails_nobody() -> None:
    planted = iter([ValueError("planted")])

    def before(fed: list[Tokens], held: list[Tokens]) -> None:
        if len(fed) == len(GOOD) and (error := next(planted, None)):
            raise error

    network = FakeNetwork()
    network.before = before
    async with running_engine(network) as engine:
        check_good(await collect_all([engine.submit(ask(prompt, 12)) for prompt in GOOD]))
        assert engine.stats()["recovered_batches"] == 1
        assert engine.stats()["failed"] == 0


async def test_sampled_replies_survive_a_failed_joint_step_unchanged() -> None:
    sampling = SamplingParams(temperature=1.0, seed=5, frequency_penalty=0.5)
    async with running_engine() as engine:
        alone = [
            (await collect(engine.submit(ask(prompt, 12, sampling=sampling)))).tokens
            for prompt in GOOD
        ]
    planted = iter([ValueError("planted")])

    def before(fed: list[Tokens], held: list[Tokens]) -> None:
        late = len(fed) == len(GOOD) and len(held[0]) > len(GOOD[0]) + 4
        if late and (error := next(planted, None)):
            raise error

    network = FakeNetwork()
    network.before = before
    async with running_engine(network) as engine:
        generations = [engine.submit(ask(prompt, 12, sampling=sampling)) for prompt in GOOD]
        together = [reply.tokens for reply in await asyncio.gather(*map(collect, generations))]
        assert engine.stats()["recovered_batches"] == 1
    assert together == alone


async def test_a_dead_loop_answers_everyone_and_is_not_ready() -> None:
    def before(fed: list[Tokens], held: list[Tokens]) -> None:
        if any(POISON in row for row in fed):
            raise Death

    died = asyncio.Event()
    network = FakeNetwork()
    network.before = before
    async with running_engine(network, on_death=died.set, max_batch=3) as engine:
        prompts = [*GOOD[:2], BAD, *GOOD[2:]]
        replies = await collect_all([engine.submit(ask(prompt, 400)) for prompt in prompts])
        assert [type(reply) for reply in replies] == [NotReady] * 5
        await asyncio.wait_for(died.wait(), 10)
        assert not engine.ready
        assert engine.failure is not None
        with pytest.raises(NotReady):
            engine.submit(ask(GOOD[0]))


async def test_a_request_that_arrives_while_the_loop_dies_is_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # It passes the check for readiness, and lands in the inbox after that was emptied.
    def before(fed: list[Tokens], held: list[Tokens]) -> None:
        if any(POISON in row for row in fed):
            raise Death

    network = FakeNetwork()
    network.before = before
    async with running_engine(network) as engine:
        event_loop = asyncio.get_running_loop()
        late: list[Any] = []

        def dismiss(self: loop_module.EngineLoop, why: str) -> None:
            original(self, why)

            async def submit() -> None:
                try:
                    late.append(engine.submit(ask(GOOD[0])))
                except NotReady as error:
                    late.append(error)

            asyncio.run_coroutine_threadsafe(submit(), event_loop).result(10)

        original = loop_module.EngineLoop._dismiss_all
        monkeypatch.setattr(loop_module.EngineLoop, "_dismiss_all", dismiss)
        with pytest.raises(NotReady):
            await collect(engine.submit(ask(BAD)))
        if not isinstance(late[0], NotReady):
            with pytest.raises(NotReady):
                await asyncio.wait_for(collect(late[0]), 10)


async def test_a_model_that_cannot_be_loaded_is_told_to_whoever_starts() -> None:
    def load() -> Any:
        raise ValueError("planted")

    engine = Engine(load, EngineSettings())
    with pytest.raises(ValueError, match="planted"):
        await engine.start()
    assert not engine.ready
    await engine.stop()


async def test_stopping_answers_whoever_still_waits() -> None:
    async with running_engine(max_batch=1) as engine:
        generations = [engine.submit(ask(prompt, 4000)) for prompt in GOOD]
        stopped = asyncio.create_task(engine.stop())
        replies = await asyncio.wait_for(collect_all(generations), 10)
        await stopped
    assert [type(reply) for reply in replies] == [NotReady] * 4


async def test_a_call_that_raises_tells_its_caller_and_spares_the_loop() -> None:
    async with running_engine() as engine:
        with pytest.raises(ZeroDivisionError):
            await asyncio.wait_for(engine.call(lambda: 1 // 0), 10)
        assert engine.ready


async def test_a_call_to_a_loop_that_dies_is_refused() -> None:
    # A write that waits for its state would else hold the store's lock until the end.
    def die() -> None:
        raise Death

    async with running_engine() as engine:
        calls = [asyncio.ensure_future(engine.call(function)) for function in (die, list, list)]
        ends = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 10)
        assert [type(end) for end in ends] == [NotReady] * 3
        with pytest.raises(NotReady):
            await engine.call(list)

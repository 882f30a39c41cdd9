"""Hits that are computed again: right ones pass, a wrong one is found and its path is no more.

Nothing here waits for time to pass: comparisons run while the engine has nothing else to do, and
calls on its thread take turns with them.
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from kvserve import embedded
from kvserve.cache.codec import capture, restore
from kvserve.core.types import SamplingParams, TextPiece
from kvserve.engine.engine import Engine, EngineSettings
from kvserve.engine.model import load
from kvserve.engine.verify import (
    MAX_STARTS,
    MAX_WAITING,
    Verifier,
    behind_the_likeliest,
    relative_to_range,
)
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
from tests.unit.test_engine_histories import Histories

pytestmark = pytest.mark.anyio

RESTORE, CAPTURE = "kvserve.engine.working.restore", "kvserve.engine.working.capture"
HISTORY = random_tokens(300, 1)
NEXT = [*HISTORY, *random_tokens(200, 2)]
OTHER = random_tokens(300, 3)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def verifier_of(engine: Engine) -> Verifier:
    assert engine._loop is not None
    return engine._loop.verifier


async def settle(engine: Engine) -> tuple[int, int, int]:
    """Let all comparisons be made; return how many were, found a mismatch, and were skipped."""
    verifier = verifier_of(engine)
    while await engine.call(lambda: bool(verifier._waiting or verifier._case)):
        pass
    stats = engine.stats()
    return stats["verified"], stats["verify_mismatches"], stats["verify_skipped"]


async def turn(engine: Engine, prompt: Tokens, max_tokens: int = 8, **how: Any) -> Reply:
    return await collect(engine.submit(ask(prompt, max_tokens, cuts=[120, len(prompt)], **how)))


# -- right ones --------------------------------------------------------------------------------


@pytest.mark.parametrize("budget_tokens", [1 << 20, 2500])
@pytest.mark.parametrize("seed", [4, 5])
async def test_histories_edits_and_forks_show_no_mismatch(seed: int, budget_tokens: int) -> None:
    histories = Histories(seed)
    budget_nbytes = budget_tokens * TOKEN_NBYTES
    async with running_engine(verify_share=1.0, budget_nbytes=budget_nbytes) as engine:
        for _ in range(20):
            await asyncio.gather(*(histories.take_part(engine) for _ in range(3)))
            verified, mismatches, skipped = await settle(engine)
        assert mismatches == 0
        assert skipped == 0
        assert verified > 20
        stats = engine.stats()
        assert stats["cache"]["working_bytes"] == 0
        assert stats["failed"] == 0


async def test_a_comparison_counts_as_no_work_for_anyone_and_stores_nothing() -> None:
    async with running_engine(verify_share=1.0) as engine:
        await turn(engine, HISTORY)
        await turn(engine, NEXT)
        before = engine.stats()
        assert await settle(engine) == (1, 0, 0)
        after = engine.stats()
        for name in ("prefilled_tokens", "requests", "finished", "cached_tokens"):
            assert after[name] == before[name]
        for name in ("tokens", "segments", "stored_bytes", "lookups", "published_tokens"):
            assert after["cache"][name] == before["cache"][name]
        assert after["cache"]["working_bytes"] == 0


async def test_what_was_not_a_hit_is_not_compared() -> None:
    async with running_engine(verify_share=1.0) as engine:
        await turn(engine, HISTORY)
        await turn(engine, OTHER)
        await turn(engine, NEXT, use_cache=False)
        assert await settle(engine) == (0, 0, 0)


@pytest.mark.parametrize(("share", "least", "most"), [(0.0, 0, 0), (0.25, 5, 25), (1.0, 60, 60)])
async def test_a_share_of_the_hits_is_compared(share: float, least: int, most: int) -> None:
    async with running_engine(verify_share=share) as engine:
        verifier_of(engine)._random = random.Random(7)
        await turn(engine, HISTORY)
        for _ in range(60):
            await turn(engine, HISTORY, 1)
            verified, mismatches, skipped = await settle(engine)
        assert least <= verified <= most
        assert (mismatches, skipped) == (0, 0)


@pytest.mark.parametrize(
    "sampling",
    [SamplingParams(temperature=1.5, seed=1), SamplingParams(logit_bias={9: 100.0})],
)
async def test_a_reply_that_is_not_the_likeliest_is_judged_by_its_prompt(
    sampling: SamplingParams,
) -> None:
    async with running_engine(verify_share=1.0) as engine:
        await turn(engine, HISTORY)
        reply = await turn(engine, NEXT, 20, sampling=sampling)
        assert reply.tokens != expected_reply(NEXT, 20)
        assert await settle(engine) == (1, 0, 0)


async def test_the_embedded_model_passes_and_is_caught() -> None:
    """In real arithmetic warm and cold logits differ a little; a wrong state differs by more."""
    model = load(embedded.path(), name="embedded")
    wrong = 0.0

    def shifted(fresh: list[Any], segments: Any, num_tokens: int, capacity: int) -> None:
        restore(fresh, segments, num_tokens, capacity)
        for leaf in fresh:
            leaf.keys[..., num_tokens // 2 :, :] += wrong

    engine = Engine(lambda: model, EngineSettings(verify_share=1.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RESTORE, shifted)
        await engine.start()
        try:
            for length in (50, 200, 201, 700, 1500):
                await turn(engine, HISTORY[:40] + random_tokens(length, 9), 30)
                assert (await settle(engine))[1:] == (0, 0)
            verified, _, _ = await settle(engine)
            assert verified == 4
            wrong = 0.5
            await turn(engine, HISTORY[:40] + random_tokens(300, 10), 30)
            assert await settle(engine) == (verified + 1, 1, 0)
        finally:
            await engine.stop()


# -- wrong ones --------------------------------------------------------------------------------


def one_token_flipped(leaf: Any, num_tokens: int) -> None:
    leaf.keys[..., num_tokens // 2, :] += 1


def one_token_short(leaf: Any, num_tokens: int) -> None:
    leaf.keys, leaf.values = leaf.keys[..., 1:, :], leaf.values[..., 1:, :]
    leaf.offset -= 1


def shifted_positions(leaf: Any, num_tokens: int) -> None:
    leaf.values = leaf.values + 1


@pytest.mark.parametrize("fault", [one_token_flipped, one_token_short, shifted_positions])
async def test_a_wrong_state_is_found_told_and_gone(
    fault: Callable[[Any, int], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(fresh: list[Any], segments: Any, num_tokens: int, capacity: int) -> None:
        restore(fresh, segments, num_tokens, capacity)
        fault(fresh[0], num_tokens)

    monkeypatch.setattr(RESTORE, broken)
    told: list[tuple[bytes, Tokens, str]] = []
    async with running_engine(verify_share=1.0) as engine:
        engine.on_mismatch = lambda namespace, token_ids: told.append(
            (namespace, token_ids.tolist(), threading.current_thread().name)
        )
        await turn(engine, HISTORY)
        wrong = await turn(engine, NEXT)
        assert wrong.tokens != expected_reply(NEXT, 8)
        assert await settle(engine) == (1, 1, 0)
        assert engine.stats()["cache"]["tokens"] == 0
        assert told == [(b"", [*NEXT, *wrong.tokens], threading.current_thread().name)]

        errors = [record for record in caplog.records if record.levelno == logging.ERROR]
        assert len(errors) == 1
        text = errors[0].getMessage()
        assert f"request test with {wrong.num_cached} tokens from the cache" in text
        assert f"chose token {len(NEXT)} by logits" in text

        again = await turn(engine, NEXT)
        assert (again.num_cached, again.tokens) == (0, expected_reply(NEXT, 8))


async def test_a_wrong_segment_is_replaced_by_a_right_one(monkeypatch: pytest.MonkeyPatch) -> None:
    planted = True

    def early(cache: list[Any], position: int, start: int, end: int, **how: Any) -> Any:
        shift = planted and start > 0
        return capture(cache, position, start - shift, end - shift, **how)

    monkeypatch.setattr(CAPTURE, early)
    async with running_engine(verify_share=1.0) as engine:
        await turn(engine, HISTORY)
        planted = False
        await turn(engine, NEXT)
        assert await settle(engine) == (1, 1, 0)
        cold, warm = await turn(engine, NEXT), await turn(engine, NEXT)
        assert cold.num_cached == 0 < warm.num_cached
        assert cold.tokens == warm.tokens == expected_reply(NEXT, 8)
        assert await settle(engine) == (2, 1, 0)


async def test_a_mismatch_leaves_other_paths_and_namespaces_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    planted = False

    def broken(fresh: list[Any], segments: Any, num_tokens: int, capacity: int) -> None:
        restore(fresh, segments, num_tokens, capacity)
        if planted:
            one_token_flipped(fresh[0], num_tokens)

    monkeypatch.setattr(RESTORE, broken)
    async with running_engine(verify_share=1.0) as engine:
        await turn(engine, HISTORY)
        await turn(engine, HISTORY, namespace=b"b")
        await turn(engine, OTHER)
        planted = True
        await turn(engine, NEXT)
        assert await settle(engine) == (1, 1, 0)
        planted = False
        for prompt, namespace in ((OTHER, b""), (HISTORY, b"b")):
            reply = await turn(engine, prompt, namespace=namespace)
            assert (reply.num_cached, reply.tokens) == (len(prompt) - 1, expected_reply(prompt, 8))
        assert await settle(engine) == (3, 1, 0)


async def test_a_wrong_token_in_a_greedy_reply_is_found_where_it_is() -> None:
    async with running_engine(verify_share=1.0) as engine:
        batcher = engine.model.batcher
        right, steps = batcher.step, 0

        def step(tokens: mx.array, rows: Any) -> mx.array:
            nonlocal steps
            steps += 1
            return -right(tokens, rows) if steps == 150 else right(tokens, rows)

        await turn(engine, HISTORY)
        steps = 0
        batcher.step = step  # type: ignore[method-assign]
        await turn(engine, NEXT, 200)
        told: list[int] = []
        verifier = verifier_of(engine)
        quarantine = verifier._quarantine

        def noted(case: Any, position: int, difference: float) -> None:
            told.append(position)
            quarantine(case, position, difference)

        verifier._quarantine = noted  # type: ignore[method-assign]
        assert await settle(engine) == (1, 1, 0)
        assert told == [len(NEXT) + 150]


async def test_hits_that_shared_the_wrong_path_do_not_condemn_its_successor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(fresh: list[Any], segments: Any, num_tokens: int, capacity: int) -> None:
        restore(fresh, segments, num_tokens, capacity)
        one_token_flipped(fresh[0], num_tokens)

    monkeypatch.setattr(RESTORE, broken)
    async with running_engine(verify_share=1.0) as engine:
        told: list[bytes] = []
        engine.on_mismatch = lambda namespace, token_ids: told.append(namespace)
        await turn(engine, HISTORY)
        await collect_all([engine.submit(ask([*NEXT, i], 4)) for i in range(3)])
        assert await settle(engine) == (1, 1, 2)
        assert told == [b""]


# -- real requests first -----------------------------------------------------------------------


class Steps:
    """Records whose passes ran: the first tokens of each, and how many tokens were fed.

    After `hold` the engine thread stops in the next cold run of that prompt, before the pass that
    begins at `position` or later.
    """

    def __init__(self, network: FakeNetwork) -> None:
        self.passes: list[tuple[Tokens, int]] = []
        self._held_at: tuple[Tokens, int] | None = None
        self._cold = False
        self._reached = threading.Event()
        self._released = threading.Event()
        network.before = self._before

    def _before(self, fed: list[Tokens], held: list[Tokens]) -> None:
        for tokens, before in zip(fed, held, strict=True):
            path = [*before, *tokens][:8]
            self.passes.append((path, len(tokens)))
            if self._held_at is None or path != self._held_at[0]:
                continue
            self._cold |= not before
            if self._cold and len(before) >= self._held_at[1]:
                self._held_at = None
                self._reached.set()
                assert self._released.wait(30)

    def hold(self, prompt: Tokens, position: int) -> None:
        self._held_at = (prompt[:8], position)

    async def reached(self) -> None:
        assert await asyncio.to_thread(self._reached.wait, 30)

    def release(self) -> None:
        self._released.set()


def small_chunks(engine: Engine) -> None:
    engine._sizer.size = lambda context=0, *, streams=True: 64  # type: ignore[method-assign]


LONG = random_tokens(4000, 20)
SHORT = random_tokens(100, 21)


async def test_a_request_waits_for_one_chunk_of_a_comparison_at_most() -> None:
    network = FakeNetwork()
    async with running_engine(network, verify_share=1.0) as engine:
        small_chunks(engine)
        await turn(engine, LONG)
        steps = Steps(network)
        steps.hold(LONG, 500)
        await turn(engine, LONG)
        await steps.reached()
        begun = len(steps.passes)
        question = engine.submit(ask(SHORT, 5))
        steps.release()
        reply = await collect(question)
        assert reply.tokens == expected_reply(SHORT, 5)
        passes = steps.passes[begun:]
        assert passes[0][0] == SHORT[:8]
        mine = [index for index, (path, _) in enumerate(passes) if path == SHORT[:8]]
        assert mine == list(range(len(mine)))
        assert await settle(engine) == (1, 0, 0)


async def test_comparisons_wait_while_anyone_is_answered() -> None:
    network = FakeNetwork()
    async with running_engine(network, verify_share=1.0) as engine:
        await turn(engine, HISTORY)
        stream = engine.submit(ask(SHORT, 10_000))
        while not isinstance(await anext(aiter(stream)), TextPiece):
            pass
        for number in range(MAX_WAITING + 3):
            await turn(engine, [*HISTORY, number], 2)
        assert engine.stats()["verified"] == 0
        await stream.aclose()
        assert await settle(engine) == (MAX_WAITING, 0, 3)


async def test_a_comparison_gives_its_memory_to_a_request_and_begins_again() -> None:
    network = FakeNetwork()
    # Room for what is stored with the comparison, or for the request, but not for all three.
    budget_nbytes = 6500 * TOKEN_NBYTES
    async with running_engine(network, verify_share=1.0, budget_nbytes=budget_nbytes) as engine:
        small_chunks(engine)
        steps, prompt, other = Steps(network), LONG[:2000], random_tokens(3000, 22)
        await turn(engine, prompt)
        steps.hold(prompt, 1000)
        await turn(engine, prompt)
        await steps.reached()
        begun = len(steps.passes)
        request = engine.submit(ask(other, 5, use_cache=False))
        steps.release()
        assert (await collect(request)).tokens == expected_reply(other, 5)
        assert engine.stats()["cache"]["evicted_segments"] == 0
        assert await settle(engine) == (1, 0, 0)
        anew = [num_fed for path, num_fed in steps.passes[begun:] if path == prompt[:8]]
        assert sum(anew) >= len(prompt)
        assert engine.stats()["cache"]["working_bytes"] == 0


async def test_a_comparison_that_is_displaced_again_and_again_is_given_up() -> None:
    async with running_engine(verify_share=1.0) as engine:
        small_chunks(engine)
        await turn(engine, LONG)
        await turn(engine, LONG)
        verifier = verifier_of(engine)
        displaced = 0

        def displace() -> bool:
            nonlocal displaced
            displaced += verifier._run is not None
            verifier.give_back()
            return verifier._case is not None or bool(verifier._waiting)

        while await engine.call(displace):
            pass
        assert await settle(engine) == (0, 0, 1)
        assert displaced == MAX_STARTS


async def test_a_comparison_for_which_there_is_no_memory_is_skipped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with running_engine(verify_share=1.0) as engine:
        working = verifier_of(engine)._working
        reserve = working.reserve
        monkeypatch.setattr(working, "reserve", lambda run: run.request.use_cache and reserve(run))
        await turn(engine, HISTORY)
        await turn(engine, NEXT)
        assert await settle(engine) == (0, 0, 1)


async def test_a_model_that_fails_in_a_comparison_hurts_nobody() -> None:
    network = FakeNetwork()
    async with running_engine(network, verify_share=1.0) as engine:
        await turn(engine, HISTORY)
        await turn(engine, NEXT)

        def before(fed: list[Tokens], held: list[Tokens]) -> None:
            raise RuntimeError("planted")

        network.before = before
        assert await settle(engine) == (0, 0, 1)
        network.before = None
        assert (await turn(engine, NEXT)).tokens == expected_reply(NEXT, 8)
        assert await settle(engine) == (1, 0, 1)
        assert engine.stats()["cache"]["working_bytes"] == 0


async def test_a_request_that_was_in_line_when_its_path_was_dropped_is_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(fresh: list[Any], segments: Any, num_tokens: int, capacity: int) -> None:
        restore(fresh, segments, num_tokens, capacity)
        one_token_flipped(fresh[0], num_tokens)

    monkeypatch.setattr(RESTORE, broken)
    network = FakeNetwork()
    async with running_engine(network, verify_share=1.0) as engine:
        await turn(engine, HISTORY)
        steps = Steps(network)
        steps.hold(NEXT, len(NEXT) - 1)  # the last pass of the comparison finds it
        await turn(engine, NEXT, 1)
        await steps.reached()
        waiting = engine.submit(ask(NEXT, 8))  # looked up, and leased, before it is known
        steps.release()
        reply = await collect(waiting)
        assert (reply.num_cached, reply.tokens) == (0, expected_reply(NEXT, 8))
        assert engine.stats()["verify_mismatches"] == 1


# -- figures -----------------------------------------------------------------------------------


def test_a_difference_is_relative_to_the_range_of_the_true_values() -> None:
    def difference(got: list[float], expected: list[float]) -> float:
        return relative_to_range(np.array(got, np.float32), np.array(expected, np.float32))

    inf, nan = float("inf"), float("nan")
    assert difference([1, 2, 3], [1, 2, 3]) == 0
    assert difference([101, 102, 104], [101, 102, 103]) == 0.5
    assert difference([0, 4], [0, 8]) == 0.5
    assert difference([1, 2, -inf], [1, 2, -inf]) == 0
    assert difference([nan, 2, 1], [nan, 2, 1]) == 0
    assert difference([1, -inf], [1, 2]) == inf
    assert difference([5, 5], [4, 4]) == inf
    assert not difference([nan, 2], [1, 2]) <= 1e9


def test_what_was_chosen_is_measured_against_the_likeliest() -> None:
    inf, nan = float("inf"), float("nan")
    rows = mx.array([[0, 1, 4], [0, 1, 4], [-inf, 2, 3], [2, 2, 2], [nan, 1, 2]])
    behind = behind_the_likeliest(rows, np.array([2, 0, 1, 0, 1], np.uint32))
    assert behind.tolist() == [0, 1, 1, 0, 0]

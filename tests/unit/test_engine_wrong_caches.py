"""Every planted cache fault changes a reply; without a fault no reply differs from the truth.

The first half proves that the fake model sees: were it blind, the other engine tests would prove
nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

from kvserve.cache.codec import capture, restore
from tests.fakes import Reply, ask, collect, expected_reply, random_tokens, running_engine

pytestmark = pytest.mark.anyio

RESTORE, CAPTURE = "kvserve.engine.working.restore", "kvserve.engine.working.capture"
HISTORY = random_tokens(300, 1)
OTHER = random_tokens(300, 2)
CUTS = (120, 300)
NEXT = random_tokens(30, 3)
HELD = len(HISTORY) + 3
"""The last token of a reply is not fed, so its state is not there."""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def two_turns() -> tuple[Reply, list[int]]:
    """Return the second turn of a chat, and its prompt; another chat of its lengths went first."""
    async with running_engine() as engine:
        for tokens in (OTHER, HISTORY):
            await collect(engine.submit(ask(tokens, 4, cuts=CUTS)))
        prompt = [*HISTORY, *expected_reply(HISTORY, 4), *NEXT]
        return await collect(engine.submit(ask(prompt, 8, cuts=CUTS))), prompt


async def test_without_a_fault_the_warm_reply_is_the_true_one() -> None:
    reply, prompt = await two_turns()
    assert reply.num_cached == HELD
    assert reply.tokens == expected_reply(prompt, 8)


Fault = Callable[[Any, int], None]


def short_prefix(leaf: Any, num_tokens: int) -> None:
    leaf.keys, leaf.values = leaf.keys[..., 1:, :], leaf.values[..., 1:, :]
    leaf.offset -= 1


def short_by_its_end(leaf: Any, num_tokens: int) -> None:
    leaf.offset -= 1


def stale_tail(leaf: Any, num_tokens: int) -> None:
    leaf.keys[..., num_tokens : num_tokens + 3, :] = 77.0
    leaf.offset += 3


def shifted_positions(leaf: Any, num_tokens: int) -> None:
    leaf.values = leaf.values + 1


def flipped_token(leaf: Any, num_tokens: int) -> None:
    leaf.keys[..., num_tokens // 2, :] += 1


def two_tokens_swapped(leaf: Any, num_tokens: int) -> None:
    first, second = mx.array(leaf.keys[..., 5, :]), mx.array(leaf.keys[..., 6, :])
    leaf.keys[..., 5, :], leaf.keys[..., 6, :] = second, first


@pytest.mark.parametrize(
    "fault",
    [
        short_prefix,
        short_by_its_end,
        stale_tail,
        shifted_positions,
        flipped_token,
        two_tokens_swapped,
    ],
)
async def test_a_fault_in_what_is_restored_is_seen(
    fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(fresh: list[Any], segments: Any, num_tokens: int, capacity: int) -> None:
        restore(fresh, segments, num_tokens, capacity)
        fault(fresh[0], num_tokens)

    monkeypatch.setattr(RESTORE, broken)
    reply, prompt = await two_turns()
    assert reply.num_cached == HELD
    assert reply.tokens != expected_reply(prompt, 8)


async def test_the_state_of_another_chat_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: dict[tuple[int, int], Any] = {}

    def mixed_up(cache: list[Any], position: int, start: int, end: int, **how: Any) -> Any:
        return taken.setdefault((start, end), capture(cache, position, start, end, **how))

    monkeypatch.setattr(CAPTURE, mixed_up)
    reply, prompt = await two_turns()
    assert reply.num_cached == HELD
    assert reply.tokens != expected_reply(prompt, 8)


async def test_a_segment_stored_one_token_too_early_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def early(cache: list[Any], position: int, start: int, end: int, **how: Any) -> Any:
        if start == 0:
            return capture(cache, position, start, end, **how)
        return capture(cache, position, start - 1, end - 1, **how)

    monkeypatch.setattr(CAPTURE, early)
    reply, prompt = await two_turns()
    assert reply.tokens != expected_reply(prompt, 8)


async def test_a_state_that_cannot_be_restored_is_a_miss_and_not_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def failing(fresh: list[Any], segments: Any, num_tokens: int, capacity: int) -> None:
        if num_tokens > 200:
            raise LookupError("planted")
        restore(fresh, segments, num_tokens, capacity)

    monkeypatch.setattr(RESTORE, failing)
    reply, prompt = await two_turns()
    assert reply.num_cached == 200
    assert reply.tokens == expected_reply(prompt, 8)


async def test_with_caching_off_nothing_is_reused_and_nothing_kept() -> None:
    async with running_engine(caching=False) as engine:
        for _ in range(2):
            reply = await collect(engine.submit(ask(HISTORY, 4, cuts=CUTS)))
            assert (reply.num_cached, reply.num_prefill) == (0, len(HISTORY))
            assert reply.tokens == expected_reply(HISTORY, 4)
        assert engine.stats()["cache"]["tokens"] == 0
        assert not engine.info.caching


async def test_a_request_without_cache_neither_reads_nor_writes() -> None:
    async with running_engine() as engine:
        await collect(engine.submit(ask(HISTORY, 4, cuts=CUTS)))
        held = engine.stats()["cache"]["tokens"]
        reply = await collect(engine.submit(ask([*HISTORY, *NEXT], 4, cuts=CUTS, use_cache=False)))
        assert reply.num_cached == 0
        assert engine.stats()["cache"]["tokens"] == held

"""A long prompt that arrives while others are answered: what happens between their tokens.

Counted in steps of the engine, not in seconds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import pytest

from kvserve.core.types import TextPiece
from tests.fakes import (
    CheckedEngine,
    FakeNetwork,
    Tokens,
    ask,
    collect,
    contents,
    expected_reply,
    random_tokens,
    running_engine,
)

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Record:
    """What the engine thread did, in order: the sizes of chunks, and whose turn to decode it was.

    A stream is known by the first tokens of its prompt.
    """

    def __init__(self, network: FakeNetwork, engine: CheckedEngine) -> None:
        self.steps: list[int | list[Tokens]] = []
        self._stepping = False
        self._step = engine.model.batcher.step
        network.before = self._before
        engine.model.batcher.step = self._recorded  # type: ignore[method-assign]

    def _before(self, fed: list[Tokens], held: list[Tokens]) -> None:
        if not self._stepping:
            self.steps.append(len(fed[0]))

    def _recorded(self, tokens: mx.array, rows: Sequence[list[Any]]) -> mx.array:
        self.steps.append([contents(row[0])[:8] for row in rows])
        self._stepping = True
        try:
            return self._step(tokens, rows)
        finally:
            self._stepping = False

    def gaps(self, prompt: Tokens) -> list[list[int]]:
        """Return the chunks between each two tokens of one stream, where there are any."""
        gaps: list[list[int]] = []
        for step in self.steps:
            if isinstance(step, int):
                if gaps:
                    gaps[-1].append(step)
            elif prompt[:8] in step:
                gaps.append([])
        return [gap for gap in gaps[:-1] if gap]


async def test_no_gap_in_any_of_seven_streams_holds_more_than_one_chunk() -> None:
    network = FakeNetwork()
    long_prompt = random_tokens(8000, 100)
    prompts = [random_tokens(50 + 40 * i, i) for i in range(7)]
    async with running_engine(network, prefill_slice_s=0.02) as engine:
        record = await engine.call(lambda: Record(network, engine))
        streams = [engine.submit(ask(prompt, 3000)) for prompt in prompts]
        for stream in streams:
            while not isinstance(await anext(aiter(stream)), TextPiece):
                pass
        late = engine.submit(ask(long_prompt, 5))
        reply = await collect(late)
        for stream in streams:
            await stream.aclose()
    assert reply.tokens == expected_reply(long_prompt, 5)
    for prompt in prompts:
        gaps = record.gaps(prompt)
        assert max(map(len, gaps)) == 1
        assert sum(map(sum, gaps)) >= len(long_prompt)


async def test_a_short_question_does_not_wait_for_a_long_document() -> None:
    network = FakeNetwork()
    async with running_engine(network, prefill_slice_s=0.02) as engine:
        document = engine.submit(ask(random_tokens(8000, 1), 4))
        question = engine.submit(ask(random_tokens(40, 2), 4))
        first = asyncio.create_task(collect(document))
        await collect(question)
        assert engine.stats()["finished"] == 1
        await first


async def test_a_long_document_is_not_starved_by_short_questions() -> None:
    network = FakeNetwork()
    async with running_engine(network, prefill_slice_s=0.001) as engine:
        document = asyncio.create_task(collect(engine.submit(ask(random_tokens(2000, 1), 4))))
        num_questions = 0
        while not document.done():
            num_questions += 1
            await collect(engine.submit(ask(random_tokens(20, 1000 + num_questions), 1)))
        reply = await document
    assert reply.tokens == expected_reply(random_tokens(2000, 1), 4)

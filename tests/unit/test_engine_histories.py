"""For any histories and any path to them, warm replies are the true ones, token for token.

Chats grow, fork, are edited, repeated and cancelled, several at once, in a memory that holds only
some of them; the truth is computed from the tokens alone.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass

import pytest

from tests.fakes import (
    TOKEN_NBYTES,
    CheckedEngine,
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


@dataclass
class Chat:
    """One history: its messages one by one, and whose namespace it is in."""

    messages: list[Tokens]
    namespace: bytes

    @property
    def tokens(self) -> Tokens:
        return [token for message in self.messages for token in message]

    @property
    def cuts(self) -> list[int]:
        ends, end = [], 0
        for message in self.messages:
            end += len(message)
            ends.append(end)
        return ends


class Histories:
    """Chooses what to do next; the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self._chooser = random.Random(seed)
        self._made = 1000 * seed
        self.chats = [Chat([self._message(), self._message()], b"a")]

    def _message(self) -> Tokens:
        self._made += 1
        # Few different beginnings, so that paths part inside segments as well.
        start = random_tokens(20, self._chooser.randrange(3))
        return [*start[: self._chooser.randrange(20)], *random_tokens(
            self._chooser.randrange(1, 150), self._made)]  # fmt: skip

    def next(self) -> Chat:
        choose = self._chooser
        chat = choose.choice(self.chats)
        messages = list(chat.messages)
        match choose.choice(["grow", "grow", "edit", "back", "repeat", "other"]):
            case "grow":
                messages.append(self._message())
            case "edit":
                messages[choose.randrange(len(messages))] = self._message()
            case "back":
                messages = messages[: choose.randrange(1, len(messages) + 1)]
            case "other":
                return Chat([*messages[:1], self._message()], choose.choice([b"a", b"b"]))
        return Chat(messages[:8], chat.namespace)

    async def take_part(self, engine: CheckedEngine) -> None:
        chat, num_tokens = self.next(), self._chooser.randrange(1, 12)
        generation = engine.submit(
            ask(chat.tokens, num_tokens, cuts=chat.cuts, namespace=chat.namespace)
        )
        if self._chooser.random() < 0.2:
            for _ in range(self._chooser.randrange(4)):
                await anext(aiter(generation), None)
            await generation.aclose()
            return
        reply = await collect(generation)
        assert isinstance(reply, Reply)
        assert reply.tokens == expected_reply(chat.tokens, num_tokens)
        self.chats = [*self.chats[-6:], Chat([*chat.messages, reply.tokens], chat.namespace)]


@pytest.mark.parametrize("budget_tokens", [1 << 20, 2500, 1800])
@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_every_reply_is_the_true_one(seed: int, budget_tokens: int) -> None:
    histories = Histories(seed)
    async with running_engine(budget_nbytes=budget_tokens * TOKEN_NBYTES) as engine:
        for _ in range(20):
            await asyncio.gather(*(histories.take_part(engine) for _ in range(3)))
        stats = engine.stats()
        assert stats["cached_tokens"] > 0
        assert stats["failed"] == 0
        assert stats["cache"]["working_bytes"] == 0
        assert (stats["cache"]["evicted_segments"] > 0) == (budget_tokens < 1 << 20)

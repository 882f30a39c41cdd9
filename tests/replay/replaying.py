"""Sends recorded conversations through the chat part and a real engine, and keeps the count.

The ideal is known from the token lists alone: every token of a prompt that an earlier prompt of the
replay had in the same position, except the last, which is always fed. Not a test module.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvserve.app import make_parts
from kvserve.chat.template import Formatter
from kvserve.chat.turn import TurnRequest, TurnService
from kvserve.config import Settings
from kvserve.core.types import TextPiece, TokenIds
from kvserve.engine.engine import Engine, EngineSettings
from kvserve.engine.model import load

Messages = list[dict[str, Any]]


@dataclass
class Score:
    """What a replay came to, in prompt tokens.

    `num_reused` counts up to each request's ideal. `num_beyond` is what was reused of earlier
    replies, which no earlier prompt held. `worst` is the request that missed most.
    """

    num_requests: int = 0
    num_prompt: int = 0
    num_reused: int = 0
    num_beyond: int = 0
    ideal: int = 0
    worst: tuple[int, str] = (0, "")

    def add(self, name: str, num_prompt: int, num_reused: int, ideal: int) -> None:
        assert num_reused < num_prompt
        self.num_requests += 1
        self.num_prompt += num_prompt
        self.num_reused += min(num_reused, ideal)
        self.num_beyond += max(0, num_reused - ideal)
        self.ideal += ideal
        self.worst = max(self.worst, (ideal - num_reused, name))

    def __str__(self) -> str:
        share = 100 * self.num_reused / max(1, self.ideal)
        return (
            f"{self.num_requests} requests, {self.num_prompt} prompt tokens, reused "
            f"{self.num_reused} of {self.ideal} ({share:.2f}%) and {self.num_beyond} of replies, "
            f"worst missed {self.worst}"
        )


@dataclass
class Replay:
    """One server's worth of parts, without HTTP, and all prompts that it has seen."""

    service: TurnService
    formatter: Formatter
    engine: Engine
    score: Score = field(default_factory=Score)
    _seen: list[TokenIds] = field(default_factory=list)

    async def ask(
        self,
        messages: Messages,
        name: str,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        max_tokens: int = 1,
    ) -> str | None:
        """Send one request and count it; return the reply, None if it does not fit the context."""
        prompt = self.formatter.render(messages, tools=tools).token_ids
        if len(prompt) >= self.engine.info.context_length:
            return None
        turn = await self.service.start(
            TurnRequest(
                request_id=name,
                tenant="",
                messages=tuple(messages),
                max_tokens=max_tokens,
                conversation_id=name,
                tools=None if tools is None else tuple(dict(tool) for tool in tools),
            )
        )
        async with aclosing(turn):
            text = "".join([e.text async for e in turn if isinstance(e, TextPiece)])
        assert turn.num_cached + turn.num_prefill == len(prompt)
        ideal = max((_shared(prompt, earlier) for earlier in self._seen), default=0)
        self._seen.append(prompt)
        self.score.add(name, len(prompt), turn.num_cached, min(ideal, len(prompt) - 1))
        return text

    async def run(self, session: Mapping[str, Any], *, live_tokens: int = 16) -> None:
        """Replay one session: each reply is asked for, then the recorded one goes on.

        Where no reply was recorded the model's own goes on, of at most `live_tokens`.
        """
        history: Messages = []
        messages: Messages = session["messages"]
        for i, message in enumerate(messages):
            following = messages[i + 1]["role"] if i + 1 < len(messages) else None
            history = [*history, message]
            if message["role"] == "assistant" or following in ("tool", "system"):
                continue
            recorded = following == "assistant"
            reply = await self.ask(
                history,
                str(session["id"]),
                tools=session.get("tools") or None,
                max_tokens=1 if recorded else live_tokens,
            )
            if reply is None:
                return
            if not recorded:
                history = [*history, {"role": "assistant", "content": reply}]


def _shared(a: TokenIds, b: TokenIds) -> int:
    length = min(len(a), len(b))
    differs = a[:length] != b[:length]
    return int(differs.argmax()) if differs.any() else length


@asynccontextmanager
async def replay_on(folder: Path, *, chat_template: str | None = None) -> AsyncIterator[Replay]:
    """The parts over the model in `folder`, stopped at the end."""
    engine = Engine(lambda: load(folder, name="replayed"), EngineSettings(budget_nbytes=4 << 30))
    await engine.start()
    try:
        formatter = Formatter(engine.model.tokenizer, chat_template=chat_template)
        parts = make_parts(Settings(), engine, None, formatter)
        yield Replay(parts.turns, formatter, engine)
        await engine.call(engine.cache.check)
    finally:
        await engine.stop()


async def score_of(
    folder: Path, sessions: Iterable[Mapping[str, Any]], *, chat_template: str | None = None
) -> Score:
    """Replay all sessions on the model in `folder`; print and return the score."""
    async with replay_on(folder, chat_template=chat_template) as replay:
        for session in sessions:
            await replay.run(session)
    print(f"\n{folder.name}: {replay.score}")
    return replay.score


def without_none(sessions: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the sessions as the API's wire shapes would pass them on: without null fields."""
    for session in sessions:
        messages = [{k: v for k, v in m.items() if v is not None} for m in session["messages"]]
        yield {**session, "messages": messages}

"""The chat part over a fake engine, with nothing on disk or a real store. Not a test module."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from kvserve.chat.archive import Archive, PersistMode
from kvserve.chat.conversations import ConversationBook
from kvserve.chat.directory import ConversationInfo, Directory
from kvserve.chat.keeper import Keeper
from kvserve.chat.operations import ConversationService
from kvserve.chat.template import Formatter
from kvserve.chat.turn import AutoConversation, Turn, TurnRequest, TurnService
from kvserve.core.types import TextPiece
from kvserve.store.disk import Disk
from kvserve.store.guards import Limits
from kvserve.store.store import Store
from kvserve.store.writer import Writer
from tests.unit.chat_fixtures import FakeCache, FakeEngine, Info, byte_tokenizer, chat

SYSTEM = "You are a patient helper."


class House:
    """A turn service and what orders need, with a clock that moves a second at each look."""

    def __init__(
        self,
        auto: AutoConversation = "content",
        *,
        info: Info | None = None,
        template: str | None = None,
        max_conversations: int = 100,
        mode: PersistMode = PersistMode.OFF,
        store: Store | None = None,
        begins_at: datetime = datetime(2026, 1, 1, tzinfo=UTC),
    ) -> None:
        self.cache = FakeCache()
        self.engine = FakeEngine(self.cache, info=info or Info())
        self.engine.read = None if store is None else store.read
        self.book = ConversationBook(max_conversations=max_conversations)
        self._now = begins_at
        self.store = store
        self.writer = None if store is None else Writer()
        self.archive = Archive(
            mode=mode,
            store=store,
            writer=self.writer,
            source=self.engine,
            cache=self.cache,
            book=self.book,
            info=lambda: self.engine.info,
            clock=self.tick,
        )
        keeper = Keeper(self.book, self.cache, self.archive, lambda: self.engine.info, self.tick)
        self.keeper = keeper
        self.turns = TurnService(
            engine=self.engine,
            formatter=Formatter(byte_tokenizer(), chat_template=template),
            source=self.engine,
            book=self.book,
            archive=self.archive,
            keeper=keeper,
            auto_conversation=auto,
        )
        self.conversations = ConversationService(
            engine=self.engine,
            book=self.book,
            archive=self.archive,
            keeper=keeper,
            directory=Directory(self.book, self.cache, self.archive),
            turns=self.turns,
            clock=self.tick,
        )

    def tick(self) -> datetime:
        self._now += timedelta(seconds=1)
        return self._now

    def wait(self, seconds: float) -> None:
        self._now += timedelta(seconds=seconds)

    def serve_another_model(self) -> None:
        identity = replace(self.engine.info.identity, weights="ee" * 16, kv_dtype="float32")
        self.engine.info = replace(self.engine.info, identity=identity)

    async def start(self, *words: str, system: str | None = SYSTEM, **more: Any) -> Turn:
        more.setdefault("tenant", "")
        messages = tuple(more.pop("messages", chat(*words, system=system)))
        return await self.turns.start(TurnRequest(request_id="r", messages=messages, **more))

    async def say(self, *words: str, reply: str = "ok", **more: Any) -> Turn:
        """Start a turn and read it to its end."""
        self.engine.replies.append(reply)
        turn = await self.start(*words, **more)
        assert await text_of(turn) == reply
        return turn

    async def written(self) -> None:
        """Wait for what is written behind turns."""
        assert self.writer is not None
        await self.writer.flush()

    async def info(self, conversation_id: str, tenant: str = "") -> ConversationInfo:
        return (await self.conversations.detail(tenant, conversation_id)).info


@asynccontextmanager
async def durable_house(
    folder: Path,
    mode: PersistMode = PersistMode.AUTO,
    *,
    limits: Limits | None = None,
    disk: Disk | None = None,
    info: Info | None = None,
    **how: Any,
) -> AsyncIterator[House]:
    """A house over the store in `folder`, as a server starts and stops it."""
    info = info or Info()
    now: list[Callable[[], datetime]] = [lambda: datetime(2026, 1, 1, tzinfo=UTC)]
    store = await Store.open(
        folder,
        identity=info.identity,
        limits=limits or Limits(disk_share=1.0),
        disk=disk,
        clock=lambda: now[0](),
    )
    try:
        house = House(mode=mode, store=store, info=info, **how)
        now[0] = lambda: house._now
        await house.archive.open()
        try:
            yield house
        finally:
            await house.archive.close()
    finally:
        await store.aclose()


async def text_of(turn: Turn) -> str:
    try:
        return "".join([e.text async for e in turn if isinstance(e, TextPiece)])
    finally:
        await turn.aclose()


def run(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test on a loop of its own."""

    def sync(*args: Any, **kwargs: Any) -> None:
        asyncio.run(test(*args, **kwargs))

    sync.__name__ = test.__name__
    sync.__wrapped__ = test  # type: ignore[attr-defined]  # so that pytest sees its fixtures
    return sync

"""A chat part and an engine made of plain values, so that HTTP is tested without a model.

`FakeTurns` answers every request with the pieces it was given, holds where it is told to, and
keeps what it was asked and which turns were closed. Not a test module.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, cast

import anyio
import httpx
import numpy as np
from fastapi import FastAPI

from kvserve.api.app import create_app
from kvserve.chat.directory import ConversationDetail, ConversationInfo, ConversationPage
from kvserve.chat.holdings import MessageCut
from kvserve.chat.operations import WarmedInfo
from kvserve.chat.refusals import unknown_conversation
from kvserve.chat.turn import KvSource, TurnRequest
from kvserve.core.types import Finished, FinishReason, TextPiece

MODEL = "someone/tiny-chat"
CHAT = "/v1/chat/completions"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}]}


@dataclass
class FakeTurn:
    turns: FakeTurns
    request: TurnRequest
    conversation_id: str | None
    kv: KvSource = KvSource.HIT
    num_cached: int = 30
    num_prefill: int = 12
    miss_reason: str | None = None
    closed: bool = False

    async def __aiter__(self) -> AsyncIterator[TextPiece | Finished]:
        await self.turns.let_prefill.wait()
        for count, text in enumerate(self.turns.pieces, 1):
            if self.turns.error_after == count - 1:
                raise self.turns.error
            yield TextPiece(text, count)
            await self.turns.let_decode.wait()
        if self.turns.error_after == len(self.turns.pieces):
            raise self.turns.error
        # One token more than pieces: the end of the turn, which has no text.
        token_ids = np.arange(len(self.turns.pieces) + 1, dtype=np.uint32)
        yield Finished(self.turns.reason, token_ids, 50, ttft_s=0.1, decode_s=0.5)

    async def aclose(self) -> None:
        await asyncio.sleep(0)  # as a real one waits for the engine
        self.closed = True
        self.turns.first_closed.set()


def _info(conversation_id: str) -> ConversationInfo:
    return ConversationInfo(
        id=conversation_id,
        title=None,
        model=MODEL,
        tokens=7,
        messages=1,
        bytes=700,
        shared_bytes=0,
        tier="ram",
        saved=False,
        pinned=False,
        pinned_until=None,
        branches=1,
        created_at=datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC),
        used_at=datetime(2026, 1, 2, 3, 4, 6, tzinfo=UTC),
        expires_at=None,
    )


def _set_event() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event


@dataclass
class FakeTurns:
    pieces: Sequence[str] = ("Hel", "lo ", "wörld")
    reason: FinishReason = FinishReason.STOP
    start_error: Exception | None = None
    error: Exception = field(default_factory=RuntimeError)
    error_after: int | None = None
    miss_reason: str | None = None
    kv: KvSource = KvSource.HIT
    conversation_id: str | None = "conv_made"
    let_start: asyncio.Event = field(default_factory=_set_event)
    let_prefill: asyncio.Event = field(default_factory=_set_event)
    let_decode: asyncio.Event = field(default_factory=_set_event)
    asked: list[TurnRequest] = field(default_factory=list)
    started: list[FakeTurn] = field(default_factory=list)
    num_cancelled_starts: int = 0
    # For tests whose server runs in another thread
    first_started: threading.Event = field(default_factory=threading.Event)
    first_closed: threading.Event = field(default_factory=threading.Event)

    async def start(self, request: TurnRequest) -> FakeTurn:
        self.asked.append(request)
        if self.start_error is not None:
            raise self.start_error
        try:
            await self.let_start.wait()
        except asyncio.CancelledError:
            self.num_cancelled_starts += 1
            raise
        conversation_id = request.conversation_id or self.conversation_id
        turn = FakeTurn(self, request, conversation_id, kv=self.kv, miss_reason=self.miss_reason)
        self.started.append(turn)
        self.first_started.set()
        return turn

    @property
    def all_closed(self) -> bool:
        return all(turn.closed for turn in self.started)


class FakeFile:
    """An export in pieces; an error among them is raised in its place."""

    def __init__(self, pieces: Sequence[bytes | Exception]) -> None:
        self.pieces = pieces
        self.nbytes = sum(len(piece) for piece in pieces if isinstance(piece, bytes))
        self.closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            for piece in self.pieces:
                if isinstance(piece, Exception):
                    raise piece
                yield piece
        finally:
            self.closed = True


@dataclass
class FakeConversations:
    """Knows the ids of each tenant. Keeps the orders it was given; `error` refuses them all."""

    held: dict[str, list[str]] = field(default_factory=dict)
    error: Exception | None = None
    file: FakeFile = field(default_factory=lambda: FakeFile([b"one", b"two"]))
    orders: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    received: bytes | None = None
    let_load: asyncio.Event = field(default_factory=_set_event)
    num_cancelled: int = 0

    def stats(self) -> dict[str, Any]:
        return {"persist": "auto"}

    async def page(self, tenant: str, *, limit: int, after: str | None) -> ConversationPage:
        ids = [i for i in self.held.get(tenant, []) if after is None or i > after]
        return ConversationPage(
            items=tuple(_info(i) for i in ids[:limit]),
            has_more=len(ids) > limit,
            totals={"conversations": len(ids)},
            guards={"max_conversations": 9},
        )

    async def detail(self, tenant: str, conversation_id: str) -> ConversationDetail:
        cut = MessageCut(message=0, role="user", start=0, end=7, tier="ram", bytes=700)
        return ConversationDetail(info=self._known(tenant, conversation_id), cuts=(cut,))

    async def delete(self, tenant: str, conversation_id: str) -> None:
        self._known(tenant, conversation_id)
        self.held[tenant].remove(conversation_id)

    async def save(self, tenant: str, conversation_id: str, **how: Any) -> ConversationInfo:
        return self._obey("save", tenant, conversation_id, how)

    async def load(self, tenant: str, conversation_id: str) -> ConversationInfo:
        try:
            await self.let_load.wait()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        return self._obey("load", tenant, conversation_id, {})

    async def fork(self, tenant: str, conversation_id: str, **how: Any) -> ConversationInfo:
        self._obey("fork", tenant, conversation_id, how)
        return _info(how["new_name"] or "conv_new")

    async def rollback(self, tenant: str, conversation_id: str, **how: Any) -> ConversationInfo:
        return self._obey("rollback", tenant, conversation_id, how)

    async def pin(self, tenant: str, conversation_id: str, **how: Any) -> ConversationInfo:
        return self._obey("pin", tenant, conversation_id, how)

    async def unpin(self, tenant: str, conversation_id: str) -> ConversationInfo:
        return self._obey("unpin", tenant, conversation_id, {})

    async def warm(self, request: TurnRequest, **how: Any) -> WarmedInfo:
        self.orders.append(("warm", {"request": request, **how}))
        if self.error is not None:
            raise self.error
        return WarmedInfo(_info("warm_1"), 5, 2)

    async def export(self, tenant: str, conversation_id: str) -> FakeFile:
        self._obey("export", tenant, conversation_id, {})
        return self.file

    async def import_(
        self, tenant: str, chunks: AsyncIterator[bytes], **how: Any
    ) -> ConversationInfo:
        self.orders.append(("import", how))
        if self.error is not None:
            raise self.error
        self.received = b"".join([chunk async for chunk in chunks])
        return _info(how["new_name"] or "from-file")

    def _obey(
        self, order: str, tenant: str, conversation_id: str, how: dict[str, Any]
    ) -> ConversationInfo:
        info = self._known(tenant, conversation_id)
        self.orders.append((order, how))
        if self.error is not None:
            raise self.error
        return info

    def _known(self, tenant: str, conversation_id: str) -> ConversationInfo:
        if conversation_id not in self.held.get(tenant, []):
            raise unknown_conversation()
        return _info(conversation_id)


@dataclass
class FakeInfo:
    name: str = MODEL
    context_length: int = 2048
    fingerprint: str = "0123456789abcdef"
    created: int = 1_700_000_000
    notes: tuple[str, ...] = ()
    caching: bool = True


@dataclass
class FakeEngine:
    info: FakeInfo = field(default_factory=FakeInfo)
    ready: bool = True
    failure: str | None = None

    def stats(self) -> dict[str, Any]:
        return {"num_running": 1, "tokens": {"prefilled": np.int64(7)}}


def make_app(
    turns: FakeTurns | None = None,
    engine: FakeEngine | None = None,
    conversations: FakeConversations | None = None,
    **settings: Any,
) -> FastAPI:
    return create_app(
        turns=cast(Any, turns or FakeTurns()),
        conversations=cast(Any, conversations or FakeConversations()),
        engine=cast(Any, engine or FakeEngine()),
        **settings,
    )


def client_of(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


def error_of(response: httpx.Response) -> dict[str, Any]:
    """Return the error of an answer whose body must be OpenAI's error body and nothing else."""
    body = response.json()
    assert set(body) == {"error"}, body
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    return cast(dict[str, Any], body["error"])


def events_of(text: str) -> list[Any]:
    """Return the data of each event of a stream, decoded; comments are left out."""
    data = [
        line.removeprefix("data: ")
        for block in text.split("\n\n")
        for line in block.split("\n")
        if line.startswith("data: ")
    ]
    return [item if item == "[DONE]" else json.loads(item) for item in data]


class Connection:
    """One request to an ASGI app whose client can leave at any moment, and what it has received."""

    def __init__(self, app: FastAPI, body: Any, **headers: str) -> None:
        self.sent = bytearray()
        self.status: int | None = None
        self.scope = anyio.CancelScope()
        self.progress = asyncio.Event()
        self._body: bytes | None = json.dumps(body).encode()
        self._left = asyncio.Event()
        pairs = {"content-type": "application/json"} | headers
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "path": CHAT,
            "raw_path": CHAT.encode(),
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "headers": [(k.encode(), v.encode()) for k, v in pairs.items()],
            "client": ("10.0.0.7", 1234),
            "server": ("test", 80),
        }
        self.task = asyncio.ensure_future(self._within_scope(app, scope))

    async def _within_scope(self, app: FastAPI, scope: Any) -> None:
        with self.scope:
            await app(scope, self._receive, self._send)

    async def _receive(self) -> dict[str, Any]:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}  # from then on at every call, as servers do

    async def _send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        self.sent += message.get("body", b"")
        self.progress.set()

    async def receive_until(self, text: bytes) -> None:
        while text not in self.sent:
            self.progress.clear()
            await asyncio.wait_for(self.progress.wait(), 5)

    async def leave(self) -> None:
        """Close the connection and wait for the server to be done with it."""
        self._left.set()
        await asyncio.wait_for(self.task, 1)

"""From a request to a running turn, and the conversations that turns leave behind.

State: two lanes to worker threads; the conversations are the keeper's. Every method runs on the
event loop thread. Rendering and tokenising go through the lanes: a prompt of 10 MB holds up neither
short prompts nor the other users of the default thread pool.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Literal

import anyio
import anyio.to_thread

from kvserve.chat.conversations import ConversationBook, new_id
from kvserve.chat.directory import ConversationDetail, ConversationPage, Directory
from kvserve.chat.keeper import Keeper, Run
from kvserve.chat.miss import Asked, KvSource, kv_source, miss_reason
from kvserve.chat.ports import Cache, Engine, Renderer
from kvserve.chat.request import TurnRequest, ask, namespace_of, size_of
from kvserve.chat.running import Turn, close
from kvserve.core.errors import ContextTooLong, RequestFailed
from kvserve.core.types import GenerationRequest, Started

__all__ = [
    "AutoConversation",
    "KvSource",
    "Turn",
    "TurnRequest",
    "TurnService",
]

AutoConversation = Literal["content", "client", "off"]

LONG_PROMPT_CHARS = 200_000
"""From here on a prompt takes the slow lane: about 50 ms of tokenising, were it all new."""


class TurnService:
    """Answers turns and lists conversations; one per server.

    `clock` gives aware datetimes in UTC.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        formatter: Renderer,
        cache: Cache,
        book: ConversationBook,
        auto_conversation: AutoConversation = "content",
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._engine = engine
        self._formatter = formatter
        self._book = book
        self._auto = auto_conversation
        self._keeper = Keeper(book, cache, lambda: engine.info, clock)
        self._directory = Directory(book, cache)
        self._short_lane = anyio.CapacityLimiter(4)
        self._long_lane = anyio.CapacityLimiter(2)

    async def start(self, request: TurnRequest) -> Turn:
        """Return the turn once its prefill has begun, so that its figures are known.

        Raises `InvalidRequest`, `ContextTooLong`, and what the engine raises.
        """
        info = self._engine.info
        long = size_of(request.messages) > LONG_PROMPT_CHARS
        asked = await anyio.to_thread.run_sync(
            ask,
            request,
            self._formatter,
            info.context_length,
            limiter=self._long_lane if long else self._short_lane,
        )
        room = info.context_length - len(asked.prompt)
        if room < 1:
            raise ContextTooLong(len(asked.prompt), info.context_length)
        run = self._resolve(request, asked)
        generation = self._engine.submit(
            GenerationRequest(
                request_id=request.request_id,
                prompt=asked.prompt,
                max_tokens=room if request.max_tokens is None else min(request.max_tokens, room),
                namespace=run.namespace,
                sampling=request.sampling,
                stop=request.stop,
                use_cache=info.caching,
            )
        )
        events = aiter(generation)
        try:
            started = await anext(events)
            if not isinstance(started, Started):
                raise RequestFailed("The engine ended the request without starting it.")
        except StopAsyncIteration:
            await close(generation)
            raise RequestFailed("The engine ended the request without starting it.") from None
        except BaseException:
            await close(generation)
            raise
        self._keeper.begin(run)
        kv, reason = self._explain(run, started)
        return Turn(
            generation,
            events,
            conversation_id=None if run.key is None else run.key[1],
            kv=kv,
            started=started,
            miss_reason=reason,
            finished=lambda text, event: self._keeper.finish(run, text, event),
            abandoned=lambda: self._keeper.abandon(run),
        )

    def _resolve(self, request: TurnRequest, asked: Asked) -> Run:
        """Find which conversation the request is of."""
        tenant, namespace = request.tenant, namespace_of(request.tenant, request.cache_salt)
        conversation_id = request.conversation_id
        if conversation_id is None and self._auto == "content":
            found = self._book.continued_by(tenant, namespace, asked.chain)
            fresh = found is None or request.reset_conversation
            conversation_id = new_id() if fresh or found is None else found.id
        elif conversation_id is None and self._auto == "client":
            address = request.client_address
            conversation_id = (
                new_id() if address is None else self._book.id_of_client(tenant, namespace, address)
            )
        key = None if conversation_id is None else (tenant, conversation_id)
        held = None if key is None else self._book.find(*key)
        return Run(request, asked, namespace, key, held, request.keep and key is not None)

    def _explain(self, run: Run, started: Started) -> tuple[KvSource, str | None]:
        if not self._engine.info.caching:
            return KvSource.DISABLED, None
        if run.key is None:
            return KvSource.NONE, None
        # Another salt is another namespace: what the id held there could not have been reused, and
        # must not be told of.
        if run.held is None or run.held.namespace != run.namespace:
            return KvSource.FRESH, None
        return (
            kv_source(run.held, run.asked, started.num_cached),
            miss_reason(run.held, run.asked, started.num_cached),
        )

    def conversations(
        self, tenant: str, *, limit: int = 100, after: str | None = None
    ) -> ConversationPage:
        """As `Directory.page`."""
        return self._directory.page(tenant, limit=limit, after=after)

    def conversation(self, tenant: str, conversation_id: str) -> ConversationDetail:
        """Return one conversation with its cuts. Raises `NotFound`."""
        return self._directory.detail(self._directory.get(tenant, conversation_id))

    def delete_conversation(self, tenant: str, conversation_id: str) -> None:
        """As `Keeper.delete`. Raises `NotFound`."""
        self._keeper.delete(self._directory.get(tenant, conversation_id))

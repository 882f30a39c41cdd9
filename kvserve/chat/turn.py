"""From a request to a running turn.

State: two lanes to worker threads; the conversations are the keeper's. Every method runs on the
event loop thread. Rendering and tokenising go through the lanes: a prompt of 10 MB holds up neither
short prompts nor the other users of the default thread pool.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Literal

import anyio
import anyio.to_thread

from kvserve.chat.archive import Archive
from kvserve.chat.conversations import Conversation, ConversationBook, new_id, warm_id
from kvserve.chat.keeper import Keeper, Run
from kvserve.chat.messages import digest
from kvserve.chat.miss import Asked, KvSource, kv_source, miss_reason, num_shared
from kvserve.chat.ports import Engine, Generation, Renderer, StateSource
from kvserve.chat.request import TurnRequest, ask, namespace_of, size_of
from kvserve.chat.running import Turn, close
from kvserve.core.errors import ContextTooLong, RequestFailed
from kvserve.core.types import (
    Event,
    Finished,
    GenerationRequest,
    Prompt,
    Started,
)
from kvserve.store.segments import StoredPath

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


@dataclass(frozen=True, slots=True)
class Warmed:
    """A prefilled prompt that waits for its users."""

    conversation: Conversation
    num_cached: int
    num_prefill: int


class TurnService:
    """Answers turns; one per server."""

    def __init__(
        self,
        *,
        engine: Engine,
        formatter: Renderer,
        source: StateSource,
        book: ConversationBook,
        archive: Archive,
        keeper: Keeper,
        auto_conversation: AutoConversation = "content",
    ) -> None:
        self._engine = engine
        self._formatter = formatter
        self._source = source
        self._book = book
        self._archive = archive
        self._keeper = keeper
        self._auto = auto_conversation
        self._short_lane = anyio.CapacityLimiter(4)
        self._long_lane = anyio.CapacityLimiter(2)

    async def start(self, request: TurnRequest) -> Turn:
        """Return the turn once its prefill has begun, so that its figures are known.

        Raises `InvalidRequest`, `ContextTooLong`, and what the engine raises.
        """
        asked = await self._ask(request)
        run, expired = await self._resolve(request, asked)
        generation, events, started = await self._submit(run, asked.prompt, request.max_tokens)
        try:
            await self._keeper.begin(run)
        except BaseException:
            await close(generation)
            self._keeper.abandon(run)
            raise
        kv, reason = self._explain(run, started)
        return Turn(
            generation,
            events,
            conversation_id=None if run.key is None else run.key[1],
            kv=kv,
            started=started,
            miss_reason="expired" if expired else reason,
            finished=lambda text, event: self._keeper.finish(run, text, event),
            abandoned=lambda: self._keeper.abandon(run),
        )

    async def warm(self, request: TurnRequest) -> Warmed:
        """Prefill the messages, without a reply, as a conversation that others can go on from.

        The same prompt again is the same conversation, unless the request names one. Raises as
        `start` does.
        """
        asked = await self._ask(request)
        cuts = asked.prompt.cuts
        if cuts:  # what opens a reply does not belong to what the users' prompts will share
            prompt = Prompt(asked.prompt.token_ids[: cuts[-1].position], cuts)
            asked = replace(asked, prompt=prompt)
        if request.conversation_id is None:
            space = namespace_of(request.tenant, request.cache_salt)
            shaped_by = (space, asked.chain[-1], asked.tools_digest, asked.template_digest)
            content = digest([part.hex() for part in shaped_by])
            request = replace(request, conversation_id=warm_id(content))
        run, _ = await self._resolve(request, asked)
        generation, events, started = await self._submit(run, asked.prompt, 0)
        try:
            await self._keeper.begin(run)
            async for event in events:
                if isinstance(event, Finished):
                    record = self._keeper.settle(run, event)
                    return Warmed(record, started.num_cached, started.num_prefill)
            raise RequestFailed("The engine ended the request without finishing it.")
        except BaseException:
            await close(generation)
            self._keeper.abandon(run)
            raise

    async def _ask(self, request: TurnRequest) -> Asked:
        """Render the request in a worker thread. Raises `InvalidRequest`, `ContextTooLong`."""
        info = self._engine.info
        long = size_of(request.messages) > LONG_PROMPT_CHARS
        asked = await anyio.to_thread.run_sync(
            ask,
            request,
            self._formatter,
            info.context_length,
            limiter=self._long_lane if long else self._short_lane,
        )
        if len(asked.prompt) >= info.context_length:
            raise ContextTooLong(len(asked.prompt), info.context_length)
        return asked

    async def _submit(
        self, run: Run, prompt: Prompt, max_tokens: int | None
    ) -> tuple[Generation, AsyncIterator[Event], Started]:
        """Return the running generation of a prompt once its prefill has begun."""
        info, request = self._engine.info, run.request
        room = info.context_length - len(prompt)
        asked_for = GenerationRequest(
            request_id=request.request_id,
            prompt=prompt,
            max_tokens=room if max_tokens is None else min(max_tokens, room),
            namespace=run.namespace,
            sampling=request.sampling,
            stop=request.stop,
            use_cache=info.caching,
        )
        generation = self._engine.submit(asked_for, await self._stored(run, prompt))
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
        return generation, events, started

    async def _stored(self, run: Run, prompt: Prompt) -> StoredPath | None:
        """Return what the disk holds of the prompt, unless memory is known to hold it all."""
        if not self._engine.info.caching:
            return None
        held = run.held
        same = held is not None and held.namespace == run.namespace
        if held is not None and same and held.identity == self._engine.info.identity:
            # The common turn: whoever has the conversation's tip in memory need not ask the disk.
            shared = num_shared(held.token_ids, prompt.token_ids)
            if self._source.held(run.namespace, prompt.token_ids) >= min(shared, len(prompt) - 1):
                return None
        return await self._archive.locate(run.namespace, prompt.token_ids)

    async def _resolve(self, request: TurnRequest, asked: Asked) -> tuple[Run, bool]:
        """Find which conversation the request is of, and whether it has expired."""
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
        held = None if key is None else await self._archive.recall(*key)
        expired = key is not None and held is None and await self._archive.has_expired(*key)
        run = Run(request, asked, namespace, key, held, request.keep and key is not None)
        return run, expired

    def _explain(self, run: Run, started: Started) -> tuple[KvSource, str | None]:
        if not self._engine.info.caching:
            return KvSource.DISABLED, None
        if run.key is None:
            return KvSource.NONE, None
        # Another salt is another namespace: what the id held there could not have been reused, and
        # must not be told of.
        if run.held is None or run.held.namespace != run.namespace:
            return KvSource.FRESH, None
        info = self._engine.info
        return (
            kv_source(run.held, run.asked, started, info.identity),
            miss_reason(run.held, run.asked, started, info.identity),
        )

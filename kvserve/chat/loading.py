"""Bringing a conversation's state into memory by order, ahead of its next turn.

No state of its own; runs on the event loop. The conversation's tokens go through the engine's
line as a prompt without a reply does: what the disk has is read and verified there, and what nobody
has any more is computed.
"""

from __future__ import annotations

import secrets

from kvserve.chat.archive import Archive
from kvserve.chat.conversations import Conversation
from kvserve.chat.ports import Engine
from kvserve.chat.refusals import damaged, model_changed
from kvserve.chat.running import close
from kvserve.core.errors import Conflict, Damaged, RequestFailed
from kvserve.core.types import Finished, GenerationRequest, Prompt, Started


class Loader:
    """Loads conversations of the engine's model."""

    def __init__(self, engine: Engine, archive: Archive) -> None:
        self._engine = engine
        self._archive = archive

    async def load(self, record: Conversation) -> None:
        """Return once memory holds the conversation's state, as far as it has room for it.

        Raises Conflict for another model's conversation, Damaged when a file of it cannot be
        used, and what the engine raises.
        """
        info = self._engine.info
        differs = record.identity.differences(info.identity)
        if differs:
            raise model_changed(differs)
        if not info.caching:
            raise Conflict("This server reuses no state; see /health.", code="caching_off")
        if not len(record.token_ids):
            return
        # What memory holds the engine would not read; but a damaged file is not to be called well.
        try:
            await self._archive.verify(record)
        except Damaged:
            self._archive.keep(record)  # from memory, so that the disk has it again
            raise
        await self._prefill(record, info.context_length - 1)

    async def _prefill(self, record: Conversation, limit: int) -> None:
        token_ids = record.token_ids[:limit]
        cuts = tuple(cut for cut in record.cuts if cut.position <= limit)
        request = GenerationRequest(
            request_id=f"load-{secrets.token_hex(12)}",
            prompt=Prompt(token_ids, cuts),
            max_tokens=0,
            namespace=record.namespace,
        )
        stored = await self._archive.locate(record.namespace, token_ids)
        generation = self._engine.submit(request, stored)
        try:
            async for event in generation:
                if isinstance(event, Started) and event.damaged:
                    raise damaged(event.num_cached, len(record.token_ids))
                if isinstance(event, Finished):
                    return
            raise RequestFailed("The engine ended the request without finishing it.")
        finally:
            await close(generation)

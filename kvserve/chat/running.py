"""One running turn: its events, and what becomes of its conversation when it ends.

State: the turn's own; owned by the event loop thread. A turn ends once, as finished or as abandoned
(cancelled, failed, closed early), and closes its generation in either case.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import anyio

from kvserve.chat.miss import KvSource
from kvserve.chat.ports import Generation
from kvserve.core.errors import RequestFailed
from kvserve.core.types import Event, Finished, Started, TextPiece


class Turn:
    """The reply of one request, once its prefill has begun; iterate it once.

    Call `aclose()` in a `finally`, whatever happened. Either `finished` is called, with the reply's
    text and last event, or `abandoned`, once the engine has let go of an unfinished reply; once.
    """

    def __init__(
        self,
        generation: Generation,
        events: AsyncIterator[Event],
        *,
        conversation_id: str | None,
        kv: KvSource,
        started: Started,
        miss_reason: str | None,
        finished: Callable[[str, Finished], None],
        abandoned: Callable[[], None],
    ) -> None:
        self.conversation_id = conversation_id
        self.kv = kv
        self.num_cached = started.num_cached
        self.num_prefill = started.num_prefill
        self.miss_reason = miss_reason
        self._generation = generation
        self._events = events
        self._finished = finished
        self._abandoned = abandoned
        self._pieces: list[str] = []
        self._ended = False

    def __aiter__(self) -> AsyncIterator[TextPiece | Finished]:
        return self

    async def __anext__(self) -> TextPiece | Finished:
        if self._ended:
            raise StopAsyncIteration
        try:
            event = await anext(self._events)
        except StopAsyncIteration:
            await self.aclose()
            raise RequestFailed("The engine ended the reply without finishing it.") from None
        except BaseException:  # cancelled or failed: the ring is further out, the cleaning here
            await self.aclose()
            raise
        if isinstance(event, TextPiece):
            self._pieces.append(event.text)
            return event
        if isinstance(event, Finished):
            self._ended = True
            self._finished("".join(self._pieces), event)
            await close(self._generation)
            return event
        await self.aclose()
        raise RequestFailed("The engine started the reply twice.")

    async def aclose(self) -> None:
        """Stop the reply if it has not finished; idempotent."""
        ended, self._ended = self._ended, True
        try:
            await close(self._generation)
        finally:
            if not ended:
                self._abandoned()


async def close(generation: Generation) -> None:
    """Close `generation`, also within a cancelled scope, where every await would raise again."""
    with anyio.CancelScope(shield=True):
        await generation.aclose()

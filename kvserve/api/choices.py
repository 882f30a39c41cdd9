"""The `n` replies to one prompt, run side by side and merged into one stream of events.

Owns the turns of one request and a task for each; lives and dies with the request, on the event
loop. The first turn prefills; the others start at its first event, when the prompt lies in the
cache, so that n replies cost one prefill.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import anyio

from kvserve.core.errors import NotReady, RequestFailed
from kvserve.core.types import Finished, TextPiece

if TYPE_CHECKING:
    from kvserve.chat.turn import Turn, TurnRequest, TurnService

_CLOSE_S = 5.0


class Choices:
    """An async iterator over `(choice index, event)`; ends after the last choice's `Finished`.

    Any error of any choice is raised from it and ends the whole. `aclose` must always be called.
    """

    def __init__(self, turns: TurnService, requests: Sequence[TurnRequest]) -> None:
        self._service = turns
        self._requests = requests
        self._turns: list[Turn] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._num_running = len(requests)
        self._prefilled = asyncio.Event()
        # Bounded: a client that reads slowly holds back its own turns, not our memory.
        self._events: asyncio.Queue[tuple[int, TextPiece | Finished] | Exception] = asyncio.Queue(
            64
        )

    @property
    def first(self) -> Turn:
        """The turn whose figures the headers and the usage show; there after `start`."""
        return self._turns[0]

    async def start(self) -> None:
        """Start the first turn and line up the others. Raises what `TurnService.start` raises."""
        self._turns.append(await self._service.start(self._requests[0]))
        self._tasks = [asyncio.create_task(self._run(i)) for i in range(len(self._requests))]

    def stop_when(self, stopping: anyio.Event, grace_s: float) -> None:
        """End with `NotReady` once `stopping` has been set for `grace_s` seconds."""

        async def stop() -> None:
            await stopping.wait()
            await asyncio.sleep(grace_s)
            await self._events.put(NotReady("The server is stopping.", code="stopping"))

        self._tasks.append(asyncio.create_task(stop()))

    def __aiter__(self) -> Choices:
        return self

    async def __anext__(self) -> tuple[int, TextPiece | Finished]:
        if not self._num_running:
            raise StopAsyncIteration
        item = await self._events.get()
        if isinstance(item, Exception):
            raise item
        self._num_running -= isinstance(item[1], Finished)
        return item

    async def _run(self, index: int) -> None:
        try:
            turn = await self._start_later(index) if index else self.first
            async for event in turn:
                self._prefilled.set()
                await self._events.put((index, event))
                if isinstance(event, Finished):
                    return
            raise RequestFailed("The reply ended before it was complete.")
        except Exception as exc:
            await self._events.put(exc)

    async def _start_later(self, index: int) -> Turn:
        await self._prefilled.wait()
        request = replace(
            self._requests[index],
            conversation_id=self.first.conversation_id,
            reset_conversation=False,
        )
        turn = await self._service.start(request)
        self._turns.append(turn)
        return turn

    async def aclose(self) -> None:
        """Cancel what still runs, even while the caller is itself being cancelled. Idempotent."""
        with anyio.move_on_after(_CLOSE_S, shield=True):
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            for turn in self._turns:
                with suppress(Exception):  # one turn's trouble must not keep the others running
                    await turn.aclose()

"""A reply as server-sent events, with comments as keep-alive for as long as nothing is said.

Owns the `Choices` it streams and closes them in every case: at the end, on an error, and when the
client leaves. An error after the first byte is one `error` event, then the end without `[DONE]`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import anyio
import orjson
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.types import Receive, Scope, Send

from kvserve.api.choices import Choices
from kvserve.api.errors import answer_to
from kvserve.api.replies import ReplyHead, chunk, conversation_headers, usage_chunk
from kvserve.core.types import Finished

_DONE = b"data: [DONE]\n\n"


class ChoiceStream(EventSourceResponse):
    """The streamed answer to one chat request. `choices` must have been started."""

    def __init__(
        self,
        choices: Choices,
        head: ReplyHead,
        *,
        request_id: str,
        include_usage: bool,
        keep_alive_s: float,
        shutdown_grace_s: float,
    ) -> None:
        stopping = anyio.Event()
        choices.stop_when(stopping, shutdown_grace_s)
        self._choices = choices
        super().__init__(
            _events(choices, head, request_id, include_usage),
            headers=conversation_headers(choices.first),
            ping=keep_alive_s,
            sep="\n",
            ping_message_factory=lambda: ServerSentEvent(comment="keep-alive", sep="\n"),
            shutdown_event=stopping,
            # A little more than the stream's own grace, so that its last words get out.
            shutdown_grace_period=shutdown_grace_s + 1,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            # Not in the generator: a client that leaves early enough means it never ran.
            await self._choices.aclose()


def _data(content: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(content) + b"\n\n"


async def _events(
    choices: Choices, head: ReplyHead, request_id: str, include_usage: bool
) -> AsyncIterator[bytes]:
    """Yield whole events: per choice a role, text and a finish reason, then usage and `[DONE]`."""
    finished: dict[int, Finished] = {}
    begun: set[int] = set()
    try:
        async for index, event in choices:
            if index not in begun:
                begun.add(index)
                opening = {"role": "assistant", "content": ""}
                yield _data(chunk(head, index, opening, with_usage=include_usage))
            if isinstance(event, Finished):
                finished[index] = event
                end = chunk(
                    head, index, {}, finish_reason=str(event.reason), with_usage=include_usage
                )
                yield _data(end)
            elif event.text:
                yield _data(chunk(head, index, {"content": event.text}, with_usage=include_usage))
        if include_usage:
            ends = [finished[index] for index in sorted(finished)]
            yield _data(usage_chunk(head, choices.first, ends))
    except Exception as exc:
        yield b"event: error\n" + _data(answer_to(exc, request_id).body)
    else:
        yield _DONE

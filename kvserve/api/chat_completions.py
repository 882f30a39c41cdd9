"""`POST /v1/chat/completions`: from wire to turns, and from turns to an answer.

Stateless; runs on the event loop. Knows nothing of templates, tokens or caches: a turn is asked of
the chat part and its events are put into OpenAI's shapes.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from kvserve.api.body import read_json
from kvserve.api.choices import Choices
from kvserve.api.disconnect import unless_gone
from kvserve.api.errors import json_response
from kvserve.api.models import check_served
from kvserve.api.replies import ReplyHead, completion, conversation_headers
from kvserve.api.services import Services
from kvserve.api.stream import ChoiceStream
from kvserve.api.turn_requests import turn_requests_of
from kvserve.api.wire import ChatRequest
from kvserve.chat.turn import TurnRequest
from kvserve.core.errors import NotReady
from kvserve.core.types import Finished

content_logger = logging.getLogger("kvserve.content")


def routes(services: Services) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions", response_model=None)
    async def chat_completions(request: Request) -> Response:
        body, messages = await read_json(request, _shape, max_bytes=services.max_body_bytes)
        info = services.engine.info
        check_served(body.model, info)
        head = ReplyHead(
            id=f"chatcmpl-{secrets.token_hex(12)}",
            created=int(time.time()),
            model=info.name,
            fingerprint=info.fingerprint,
        )
        request.state.reply_id = head.id
        turn_requests = turn_requests_of(request, body, messages, head.id, services.defaults)
        if not services.engine.ready:
            raise NotReady("The model is not ready to answer.", code="not_ready")
        if services.log_content:
            content_logger.info("%s asked %r", head.id, messages)
        return await _answer(request, body, turn_requests, head, services)

    return router


async def _answer(
    request: Request,
    body: ChatRequest,
    turn_requests: Sequence[TurnRequest],
    head: ReplyHead,
    services: Services,
) -> Response:
    choices = Choices(services.turns, turn_requests)
    handed_over = False
    try:
        await unless_gone(request, choices.start())
        if body.stream:
            stream = ChoiceStream(
                choices,
                head,
                request_id=request.state.request_id,
                include_usage=body.include_usage,
                keep_alive_s=services.keep_alive_s,
                shutdown_grace_s=services.shutdown_grace_s,
            )
            handed_over = True
            return stream
        texts, finished = await unless_gone(request, _collect(choices, len(turn_requests)))
        if services.log_content:
            content_logger.info("%s replied %r", head.id, texts)
        return json_response(
            completion(head, choices.first, texts, finished),
            headers=conversation_headers(choices.first),
        )
    finally:
        if not handed_over:
            await choices.aclose()


async def _collect(choices: Choices, num_choices: int) -> tuple[list[str], list[Finished]]:
    """Return text and end of each choice, in the order of their index."""
    pieces: list[list[str]] = [[] for _ in range(num_choices)]
    finished: dict[int, Finished] = {}
    async for index, event in choices:
        if isinstance(event, Finished):
            finished[index] = event
        else:
            pieces[index].append(event.text)
    return ["".join(texts) for texts in pieces], [finished[i] for i in range(num_choices)]


def _shape(body: Any) -> tuple[ChatRequest, tuple[dict[str, Any], ...]]:
    checked = ChatRequest.model_validate(body)
    return checked, tuple(message.as_dict() for message in checked.messages)

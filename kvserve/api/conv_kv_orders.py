"""`/v1/conv_kv`: orders for conversations: save, load, fork, roll back, pin, warm.

Stateless; runs on the event loop. What has been answered with 200 is done, and durable where
conversations are durable. An order goes on when its client leaves, unless it only computes.
"""

from __future__ import annotations

import secrets
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from kvserve.api.body import read_json, read_optional_json
from kvserve.api.disconnect import unless_gone
from kvserve.api.errors import json_response
from kvserve.api.identity import checked_id, conversation_id_of, tenant_of
from kvserve.api.models import check_served
from kvserve.api.services import Services
from kvserve.api.turn_requests import warm_request_of
from kvserve.api.wire_conv_kv import (
    ForkRequest,
    LoadRequest,
    NamedConversation,
    PinRequest,
    RollbackRequest,
    SaveRequest,
    WarmRequest,
)
from kvserve.chat.directory import ConversationInfo
from kvserve.core.errors import InvalidRequest, NotReady

_SHOWN = ("id", "title", "tokens", "messages", "bytes")


def routes(services: Services) -> APIRouter:
    router = APIRouter(prefix="/v1/conv_kv")
    conversations = services.conversations
    max_bytes = services.max_body_bytes

    @router.post("/save", response_model=None)
    async def save(request: Request) -> Response:
        body = await read_json(request, SaveRequest.model_validate, max_bytes=max_bytes)
        named = _named(request, body)
        info = await conversations.save(tenant_of(request.headers), named, title=body.title)
        return json_response({**_short("saved", info), "model": info.model})

    @router.post("/load", response_model=None)
    async def load(request: Request) -> Response:
        body = await read_json(request, LoadRequest.model_validate, max_bytes=max_bytes)
        named = _named(request, body)
        _check_ready(services)
        work = conversations.load(tenant_of(request.headers), named)
        return json_response(_short("loaded", await unless_gone(request, work)))

    @router.post("/warm", response_model=None)
    async def warm(request: Request) -> Response:
        body, messages = await read_json(request, _warm_shape, max_bytes=max_bytes)
        check_served(body.model, services.engine.info)
        _check_ready(services)
        asked = warm_request_of(request, body, messages, f"warm-{secrets.token_hex(12)}")
        work = conversations.warm(asked, ttl_s=body.ttl_s, pin=bool(body.pin))
        warmed = await unless_gone(request, work)
        return json_response(
            {
                "status": "warmed",
                **asdict(warmed.info),
                "cached_tokens": warmed.num_cached,
                "processing_tokens": warmed.num_prefill,
            }
        )

    @router.post("/{id:path}/fork", response_model=None)
    async def fork(request: Request) -> Response:
        source = checked_id(request.path_params["id"], source="id")
        body = await read_optional_json(request, ForkRequest.model_validate, max_bytes=max_bytes)
        new_name = None if body.new_id is None else checked_id(body.new_id, source="new_id")
        info = await conversations.fork(
            tenant_of(request.headers), source, new_name=new_name, at_message=body.at_message
        )
        return json_response({"status": "forked", **asdict(info), "forked_from": source})

    @router.post("/{id:path}/rollback", response_model=None)
    async def rollback(request: Request) -> Response:
        conversation_id = checked_id(request.path_params["id"], source="id")
        body = await read_json(request, RollbackRequest.model_validate, max_bytes=max_bytes)
        info = await conversations.rollback(
            tenant_of(request.headers),
            conversation_id,
            to_message=body.to_message,
            drop_turns=body.drop_turns,
        )
        return json_response({"status": "rolled_back", **asdict(info)})

    @router.post("/{id:path}/pin", response_model=None)
    async def pin(request: Request) -> Response:
        conversation_id = checked_id(request.path_params["id"], source="id")
        body = await read_optional_json(request, PinRequest.model_validate, max_bytes=max_bytes)
        info = await conversations.pin(
            tenant_of(request.headers), conversation_id, ttl_s=body.ttl_s
        )
        return json_response({"status": "pinned", **asdict(info)})

    @router.delete("/{id:path}/pin", response_model=None)
    async def unpin(request: Request) -> Response:
        conversation_id = checked_id(request.path_params["id"], source="id")
        info = await conversations.unpin(tenant_of(request.headers), conversation_id)
        return json_response({"status": "unpinned", **asdict(info)})

    return router


def _named(request: Request, body: NamedConversation) -> str:
    """Return the id that the request names. Raises InvalidRequest."""
    named = conversation_id_of(
        request.headers, conversation=body.conversation, conversation_id=body.conversation_id
    )
    if named is None:
        raise InvalidRequest(
            "'conversation' is required: the id of a conversation.",
            param="conversation",
            code="invalid_value",
        )
    return named


def _check_ready(services: Services) -> None:
    if not services.engine.ready:
        raise NotReady("The model is not ready to answer.", code="not_ready")


def _short(status: str, info: ConversationInfo) -> dict[str, Any]:
    return {"status": status, **{name: getattr(info, name) for name in _SHOWN}}


def _warm_shape(body: Any) -> tuple[WarmRequest, tuple[dict[str, Any], ...]]:
    checked = WarmRequest.model_validate(body)
    return checked, tuple(message.as_dict() for message in checked.messages)

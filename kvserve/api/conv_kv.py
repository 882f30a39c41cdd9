"""`/v1/conv_kv`: what the server holds of the caller's conversations, and forgetting one.

Stateless; runs on the event loop, which owns the book of conversations. A caller sees its own
tenant's conversations only; another's id is as unknown as one that never was.
"""

from __future__ import annotations

from dataclasses import asdict

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from kvserve.api.errors import json_response
from kvserve.api.identity import checked_id, tenant_of
from kvserve.api.services import Services
from kvserve.api.validation import check_query
from kvserve.core.errors import InvalidRequest

MAX_PAGE = 1000
_DEFAULT_PAGE = 100


def _limit(text: str | None) -> int:
    if text is None:
        return _DEFAULT_PAGE
    if not (text.isascii() and text.isdecimal() and len(text) <= 4 and 1 <= int(text) <= MAX_PAGE):
        raise InvalidRequest(
            f"'limit' must be an integer from 1 to {MAX_PAGE}.", param="limit", code="invalid_value"
        )
    return int(text)


def routes(services: Services) -> APIRouter:
    """Return the routes; to be included behind all others of this prefix."""
    router = APIRouter(prefix="/v1/conv_kv")
    conversations = services.conversations

    @router.get("/stats", response_model=None)
    async def stats(request: Request) -> Response:
        check_query(request.query_params, "limit", "after")
        after = request.query_params.get("after")
        page = await conversations.page(
            tenant_of(request.headers),
            limit=_limit(request.query_params.get("limit")),
            after=None if after is None else checked_id(after, source="after"),
        )
        return json_response(page)

    # As a path, so that an id with a slash is told that it is none, not that the URL is unknown.
    @router.api_route("/{id:path}", methods=["GET", "DELETE"], response_model=None)
    async def conversation(request: Request) -> Response:
        conversation_id = checked_id(request.path_params["id"], source="id")
        tenant = tenant_of(request.headers)
        if request.method == "GET":
            detail = await conversations.detail(tenant, conversation_id)
            return json_response(
                {**asdict(detail.info), "cuts": detail.cuts, "shares": detail.shares}
            )
        await conversations.delete(tenant, conversation_id)
        return json_response({"status": "deleted", "id": conversation_id})

    return router

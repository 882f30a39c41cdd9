"""`GET /v1/models`, `GET /v1/models/{id}`, and what a request's `model` may name.

Stateless. One model is served; its id is the one it was loaded under.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from kvserve.api.errors import json_response
from kvserve.api.services import Services
from kvserve.api.validation import shortened
from kvserve.core.errors import NotFound

if TYPE_CHECKING:
    from kvserve.engine.model import ModelInfo


def check_served(name: str | None, info: ModelInfo) -> None:
    """Raise `NotFound` unless `name` is the served model: None, its id, or the last part of it."""
    if name not in (None, info.name, info.name.rsplit("/", 1)[-1]):
        raise NotFound(
            f"There is no model '{shortened(name or '')}' here; '{info.name}' is served.",
            param="model",
            code="model_not_found",
        )


def _entry(info: ModelInfo) -> dict[str, Any]:
    return {
        "id": info.name,
        "object": "model",
        "created": info.created,
        "owned_by": "kvserve",
        "context_length": info.context_length,
    }


def routes(services: Services) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/models", response_model=None)
    async def list_models(request: Request) -> Response:
        return json_response({"object": "list", "data": [_entry(services.engine.info)]})

    @router.get("/v1/models/{model_id:path}", response_model=None)
    async def get_model(request: Request) -> Response:
        check_served(request.path_params["model_id"], services.engine.info)
        return json_response(_entry(services.engine.info))

    return router

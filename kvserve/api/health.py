"""`GET /health` (alive), `/ready` (able to answer), `/stats` (figures).

Stateless. Shows figures and the model's own notes, never prompts, paths or anybody's ids.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from kvserve.api.errors import error_body, json_response
from kvserve.api.services import Services


def routes(services: Services) -> APIRouter:
    router = APIRouter()
    engine = services.engine

    def state(status: str, reason: str | None) -> Response:
        content: dict[str, Any] = {
            "status": status,
            "model": engine.info.name,
            "caching": {"enabled": engine.info.caching, "notes": list(engine.info.notes)},
        }
        if reason is None:
            return json_response(content)
        content |= error_body(reason, "service_unavailable_error", code="not_ready")
        return json_response(content, status=503)

    @router.api_route("/health", methods=["GET", "HEAD"], response_model=None)
    async def health(request: Request) -> Response:
        return state("failed", engine.failure) if engine.failure else state("ok", None)

    @router.api_route("/ready", methods=["GET", "HEAD"], response_model=None)
    async def ready(request: Request) -> Response:
        if engine.failure:
            return state("failed", engine.failure)
        if not engine.ready:
            return state("starting", "The model is not ready to answer.")
        return state("ready", None)

    @router.get("/stats", response_model=None)
    async def stats(request: Request) -> Response:
        return json_response({**engine.stats(), "disk": services.conversations.stats()})

    return router

"""The ASGI application: all routes and error answers over the parts given to it.

Starts and stops nothing itself; whoever joins the parts passes a `lifespan` for that.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.types import Lifespan

from kvserve.api import (
    chat_completions,
    conv_kv,
    conv_kv_orders,
    conv_kv_transfer,
    health,
    models,
)
from kvserve.api.access_log import AccessLog
from kvserve.api.errors import (
    ClientGone,
    on_client_gone,
    on_http_exception,
    on_kvserve_error,
)
from kvserve.api.services import Services
from kvserve.core.errors import KvserveError
from kvserve.core.types import SamplingParams

if TYPE_CHECKING:
    from kvserve.chat.operations import ConversationService
    from kvserve.chat.turn import TurnService
    from kvserve.engine.engine import Engine

MAX_BODY_BYTES = 32 * 2**20


def create_app(
    *,
    turns: TurnService,
    conversations: ConversationService,
    engine: Engine,
    max_body_bytes: int = MAX_BODY_BYTES,
    keep_alive_s: float = 5.0,
    shutdown_grace_s: float = 5.0,
    defaults: SamplingParams | None = None,
    log_content: bool = False,
    lifespan: Lifespan[FastAPI] | None = None,
) -> FastAPI:
    """Return the application. Run it with the server's own access log off: that shows ids.

    `keep_alive_s` between comments of a silent stream, `shutdown_grace_s` for running streams when
    the server stops, `defaults` for sampling parameters that a request leaves out (greedy).
    """
    services = Services(
        turns=turns,
        conversations=conversations,
        engine=engine,
        max_body_bytes=max_body_bytes,
        keep_alive_s=keep_alive_s,
        shutdown_grace_s=shutdown_grace_s,
        defaults=defaults or SamplingParams(),
        log_content=log_content,
    )
    # No schema and no pages: bodies are checked by hand, so a generated one would be false.
    app = FastAPI(title="kvserve", openapi_url=None, redirect_slashes=False, lifespan=lifespan)
    app.add_middleware(AccessLog)
    app.add_exception_handler(KvserveError, on_kvserve_error)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(ClientGone, on_client_gone)
    conversations_parts = (conv_kv_orders, conv_kv_transfer, conv_kv)
    for part in (chat_completions, models, *conversations_parts, health):
        app.include_router(part.routes(services))
    if not log_content:
        # At level DEBUG these log every chunk of a stream, and every value of a statement: text,
        # ids, tokens and titles of users.
        for name in ("sse_starlette", "aiosqlite"):
            logging.getLogger(name).setLevel(logging.INFO)
    return app

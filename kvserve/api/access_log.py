"""The outermost ring of a request: its id, one log line about it, and the last catch of errors.

A plain ASGI wrapper, not Starlette's `BaseHTTPMiddleware`, which stands between a stream and the
client's disconnect. Owns no state. Logs the path's template, never the path: ids are the users'.
"""

from __future__ import annotations

import logging
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvserve.api.errors import ResponseAborted, answer_to
from kvserve.api.identity import request_id_of

logger = logging.getLogger("kvserve.access")


class AccessLog:
    """Wrap `app`: give each request its id, and answer what no route answered for."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = request_id_of(Headers(scope=scope))
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0
        began = time.perf_counter()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as exc:
            answer = answer_to(exc, request_id)
            if status:
                # Only an exception makes the server cut the connection; this one says nothing.
                raise ResponseAborted from None
            await answer.response()(scope, receive, send_with_id)
        finally:
            template = getattr(scope.get("route"), "path", "(no route)")
            logger.info(
                "%s %s %s %.0f ms request=%s%s",
                scope["method"] if template != "(no route)" else "-",
                template,
                status or "-",
                (time.perf_counter() - began) * 1000,
                request_id,
                "".join(f" reply={i}" for i in (scope["state"].get("reply_id"),) if i),
            )

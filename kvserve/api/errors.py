"""The one table from exception to HTTP status and OpenAI's error body.

Stateless. A `KvserveError` is shown in its own words, since those were written for clients; any
other exception becomes a generic 500 whose cause goes to the log without its message, because
messages of foreign exceptions may quote what a user wrote.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from kvserve.core import errors as core

logger = logging.getLogger(__name__)

_JSON_OPTIONS = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_OMIT_MICROSECONDS | orjson.OPT_UTC_Z
CLIENT_CLOSED_REQUEST = 499  # nginx's number; nobody is there to read it but the access log

_TABLE: Mapping[type[core.KvserveError], tuple[int, str]] = {
    core.InvalidRequest: (400, "invalid_request_error"),
    core.NotFound: (404, "invalid_request_error"),
    core.Conflict: (409, "invalid_request_error"),
    core.TooLarge: (413, "invalid_request_error"),
    core.Damaged: (422, "invalid_request_error"),
    core.QueueFull: (429, "rate_limit_error"),
    core.NotReady: (503, "service_unavailable_error"),
    core.RequestFailed: (500, "server_error"),
    core.OutOfSpace: (507, "insufficient_storage_error"),
}


class ClientGone(Exception):
    """The client closed its connection before the answer was complete."""


class ResponseAborted(Exception):
    """A response that had begun cannot be completed; the connection is cut."""


@dataclass(frozen=True, slots=True)
class ErrorAnswer:
    """An error as the client sees it, for a JSON answer and for an event in a stream alike."""

    status: int
    body: dict[str, Any]
    headers: dict[str, str] = field(default_factory=dict)

    def response(self) -> Response:
        return json_response(self.body, status=self.status, headers=self.headers)


def json_response(
    content: Any, *, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Return `content`, of plain values, dataclasses and aware datetimes, as a JSON answer."""
    return Response(
        orjson.dumps(content, option=_JSON_OPTIONS),
        status_code=status,
        headers=headers,
        media_type="application/json",
    )


def error_body(
    message: str, kind: str, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def answer_to(exc: Exception, request_id: str) -> ErrorAnswer:
    """Return what the client is told about `exc`. Logs what it is not told."""
    if isinstance(exc, core.KvserveError):
        status, kind = next(
            (_TABLE[cls] for cls in type(exc).__mro__ if cls in _TABLE), (500, "server_error")
        )
        headers = {}
        if isinstance(exc, core.QueueFull):
            headers["Retry-After"] = str(exc.retry_after_s)
        if isinstance(exc, core.TooLarge):
            headers["Connection"] = "close"  # the rest of the body is not read
        return ErrorAnswer(
            status, error_body(exc.message, kind, param=exc.param, code=exc.code), headers
        )
    log_unexpected(exc, request_id)
    message = f"The server failed to answer this request. Its log says why, under {request_id}."
    return ErrorAnswer(500, error_body(message, "server_error", code="internal_error"))


def log_unexpected(exc: BaseException, request_id: str) -> None:
    """Log where `exc` arose, without its message or any value: those may be a user's words."""
    lines: list[str] = []
    cause: BaseException | None = exc
    while cause is not None and len(lines) < 200:
        lines.append(type(cause).__name__)
        frames = traceback.extract_tb(cause.__traceback__)
        lines += [f"  {f.filename}:{f.lineno} {f.name}" for f in frames[-30:]]
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    logger.error("request %s failed unexpectedly\n%s", request_id, "\n".join(lines))


async def on_kvserve_error(request: Request, exc: Exception) -> Response:
    return answer_to(exc, request.state.request_id).response()


async def on_http_exception(request: Request, exc: Exception) -> Response:
    """Give the router's own 404 and 405 the same body as every other error."""
    assert isinstance(exc, HTTPException)
    headers = dict(exc.headers or {})
    where = f"{request.method} {request.url.path[:200]}"
    match exc.status_code:
        case 404:
            message, code = f"There is no {where}.", "unknown_url"
        case 405:
            allowed = headers.get("Allow", "another method")
            message, code = f"{where} is not possible here, only {allowed}.", "method_not_allowed"
        case _:
            message, code = f"{where} was refused.", "http_error"
    body = error_body(message, "invalid_request_error", code=code)
    return json_response(body, status=exc.status_code, headers=headers)


async def on_client_gone(request: Request, exc: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)

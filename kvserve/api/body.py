"""Reading a request body: its size, its type, its JSON, its shape, in this order.

Stateless. Runs on the event loop, but decoding and checking a big body goes to a worker thread, so
that other streams keep flowing. Nothing over the limit is ever held in memory.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Callable
from typing import Any, TypeVar

import anyio
import anyio.to_thread
import orjson
from pydantic import ValidationError
from starlette.requests import ClientDisconnect, Request

from kvserve.api.errors import ClientGone
from kvserve.api.validation import invalid_request
from kvserve.core.errors import InvalidRequest, TooLarge

T = TypeVar("T")

_OFFLOAD_BYTES = 256 * 1024
# orjson holds the interpreter lock while it decodes: 32 MiB of text take 0.06 s, but the same of
# `[],[],...` 5.8 s (measured), most of it in the garbage collector. So many values take 0.3 s at
# worst, and the longest honest history has fewer.
_MAX_VALUES = 500_000
_STRUCTURE = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[\[{,]', re.DOTALL)
# A client that is cut off while it sends sees a reset instead of the answer, so the rest is read
# and dropped for a while.
_DRAIN_S = 2.0
_JSON_TYPE = re.compile(r"application/(?:[a-z0-9.-]+\+)?json\s*(?:;.*)?", re.IGNORECASE)


async def read_json(request: Request, shape: Callable[[Any], T], *, max_bytes: int) -> T:
    """Return `shape` of the decoded JSON body.

    `shape` may raise pydantic's `ValidationError`; for big bodies it runs in a worker thread.
    Raises `InvalidRequest`, `TooLarge`, or `ClientGone` when the body never becomes complete.
    """
    content_type = request.headers.get("content-type", "")
    if not _JSON_TYPE.fullmatch(content_type):
        # Also what keeps a foreign web page from posting here without being asked for permission.
        raise InvalidRequest("The body must be JSON, sent with Content-Type: application/json.")
    try:
        data = await _read(request, max_bytes)
    except ClientDisconnect:
        raise ClientGone from None
    if len(data) <= _OFFLOAD_BYTES:
        return _decode(data, shape)
    return await anyio.to_thread.run_sync(_decode, data, shape)


async def _read(request: Request, max_bytes: int) -> bytearray:
    """Return the whole body; raise `TooLarge` as soon as it is known to be over `max_bytes`."""
    chunks = request.stream()
    declared = request.headers.get("content-length", "")
    data = bytearray()
    too_large = declared.isdecimal() and int(declared[:20]) > max_bytes
    if not too_large:
        async for chunk in chunks:
            if len(data) + len(chunk) > max_bytes:
                too_large = True
                break
            data += chunk
    if too_large:
        data.clear()
        if "expect" not in request.headers:  # such a client waits for our word before it sends
            await _drain(chunks)
        raise TooLarge(
            f"The body is over the limit of {max_bytes} bytes.", code="request_too_large"
        )
    return data


async def _drain(chunks: AsyncGenerator[bytes, None]) -> None:
    with anyio.move_on_after(_DRAIN_S):
        async for _ in chunks:
            pass


def _decode(data: bytearray, shape: Callable[[Any], T]) -> T:
    if sum(map(data.count, (b"[", b"{", b","))) > _MAX_VALUES:
        _check_structure(data)
    try:
        body = orjson.loads(data)
    except orjson.JSONDecodeError as exc:
        # orjson's words name a position and what was expected there, never the text itself.
        raise InvalidRequest(
            f"The body is not valid JSON: {exc.msg}.", code="invalid_json"
        ) from None
    try:
        return shape(body)
    except ValidationError as exc:
        raise invalid_request(exc) from None


def _check_structure(data: bytearray) -> None:
    """Raise if the body has too many values; what stands within its strings does not count."""
    num_values = 0
    for match in _STRUCTURE.finditer(data):
        num_values += data[match.start()] != 0x22
        if num_values > _MAX_VALUES:
            raise InvalidRequest(
                f"The body holds more than {_MAX_VALUES} values.", code="invalid_json"
            )

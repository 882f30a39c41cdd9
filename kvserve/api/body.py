"""Reading a request body: its size, its type, its JSON, its shape, in this order.

Stateless. Runs on the event loop, but decoding and checking a big body goes to a worker thread, so
that other streams keep flowing. Nothing over the limit is ever held in memory.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
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


async def read_optional_json(request: Request, shape: Callable[[Any], T], *, max_bytes: int) -> T:
    """As `read_json`, but no body at all is the same as `{}`."""
    if "content-type" in request.headers:
        return await read_json(request, shape, max_bytes=max_bytes)
    # Browsers name the page that sends; what a page may send without asking has a type as above.
    if "origin" in request.headers or await _has_body(request):
        raise InvalidRequest("The body must be JSON, sent with Content-Type: application/json.")
    return _decode(bytearray(b"{}"), shape)


async def _has_body(request: Request) -> bool:
    try:
        return bool(await _read(request, 0))
    except TooLarge:
        return True
    except ClientDisconnect:
        raise ClientGone from None


def declared_length(request: Request) -> int | None:
    """Return how long the client says that its body is; None if it does not say."""
    declared = request.headers.get("content-length", "")
    return int(declared[:20]) if declared.isdecimal() else None


async def drained(request: Request, chunks: AsyncGenerator[bytes, None]) -> None:
    """Take in and drop the rest of a body, for a while, so that its sender sees the answer."""
    if "expect" not in request.headers:  # such a client waits for our word before it sends
        with suppress(ClientDisconnect):
            await _drain(chunks)


async def _read(request: Request, max_bytes: int) -> bytearray:
    """Return the whole body; raise `TooLarge` as soon as it is known to be over `max_bytes`."""
    chunks = request.stream()
    data = bytearray()
    too_large = (declared_length(request) or 0) > max_bytes
    if not too_large:
        async for chunk in chunks:
            if len(data) + len(chunk) > max_bytes:
                too_large = True
                break
            data += chunk
    if too_large:
        data.clear()
        await drained(request, chunks)
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

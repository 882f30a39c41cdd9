"""`/v1/conv_kv/{id}/export` and `/import`: a conversation as one file, streamed both ways.

Stateless; runs on the event loop. Neither file is ever whole in memory. What can go wrong before
the first byte has its own status; later the connection is cut, so that no client takes a part for
the whole.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import asdict

import anyio
from fastapi import APIRouter
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from kvserve.api.body import declared_length, drained
from kvserve.api.errors import ClientGone, json_response
from kvserve.api.identity import checked_id, conversation_id_of, tenant_of
from kvserve.api.services import Services
from kvserve.api.validation import check_query
from kvserve.core.errors import InvalidRequest, KvserveError

_BEGINNING_NBYTES = 16 * 2**20
_BINARY = "application/octet-stream"


def routes(services: Services) -> APIRouter:
    router = APIRouter(prefix="/v1/conv_kv")
    conversations = services.conversations

    @router.get("/{id:path}/export", response_model=None)
    async def export(request: Request) -> Response:
        conversation_id = checked_id(request.path_params["id"], source="id")
        file = await conversations.export(tenant_of(request.headers), conversation_id)
        chunks = aiter(file)
        first = await _beginning(chunks)
        # Ids have no other character that a file system might refuse or a header misread.
        name = f"conversation-{conversation_id.replace(':', '_')}.safetensors"
        headers = {
            "Content-Length": str(file.nbytes),
            "Content-Disposition": f'attachment; filename="{name}"',
        }
        return _FileStream(first, chunks, headers)

    @router.post("/import", response_model=None)
    async def import_(request: Request) -> Response:
        check_query(request.query_params, "id")
        content_type = request.headers.get("content-type", "")
        if content_type.partition(";")[0].strip().lower() != _BINARY:
            # Also what keeps a foreign web page from posting here without asking for permission.
            raise InvalidRequest(f"The body must be a file, sent with Content-Type: {_BINARY}.")
        named = request.query_params.get("id")
        if named is not None:
            named = checked_id(named, source="id")
        else:
            named = conversation_id_of(request.headers, conversation=None, conversation_id=None)
        chunks = request.stream()
        try:
            info = await conversations.import_(
                tenant_of(request.headers),
                chunks,
                new_name=named,
                declared=declared_length(request),
            )
        except ClientDisconnect:
            raise ClientGone from None
        except KvserveError:
            await drained(request, chunks)
            raise
        return json_response({"status": "imported", **asdict(info)})

    return router


async def _beginning(chunks: AsyncIterator[bytes]) -> list[bytes]:
    """Return the first pieces: of most files all, so that damage has its status."""
    first: list[bytes] = []
    nbytes = 0
    async for chunk in chunks:
        first.append(chunk)
        nbytes += len(chunk)
        if nbytes >= _BEGINNING_NBYTES:
            break
    return first


class _FileStream(StreamingResponse):
    """A file whose first pieces are there already; closes its source in every case."""

    def __init__(
        self, first: list[bytes], rest: AsyncIterator[bytes], headers: dict[str, str]
    ) -> None:
        self._rest = rest
        super().__init__(self._chunks(first, rest), headers=headers, media_type=_BINARY)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                for chunks in (self.body_iterator, self._rest):
                    if isinstance(chunks, AsyncGenerator):
                        await chunks.aclose()

    @staticmethod
    async def _chunks(first: list[bytes], rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        for chunk in first:
            yield chunk
        async for chunk in rest:
            yield chunk

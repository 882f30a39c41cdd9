"""The store of a running server, through `/v1/conv_kv`.

State: one HTTP client. The server works on the store: what it does not offer, and what would
change files under its feet, is refused in words.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from kvserve.cli.cache.file import blocks_of, write_whole
from kvserve.cli.cache.place import (
    CacheError,
    Detail,
    Item,
    Line,
    Listing,
    Mended,
    Message,
    NotThere,
    Progress,
    Refused,
    Step,
    Unusable,
)

_PAGE = 1000
_TIMEOUT_S = 60.0
_EXIT_CODES = {404: NotThere, 422: Unusable}
_MOMENTS = ("created_at", "used_at", "pinned_until", "expires_at")


@asynccontextmanager
async def connected(url: str, who: str, api_key: str | None) -> AsyncIterator[RunningServer]:
    """Give the server at `url`; `who` names its process."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    # The server is on this machine: no proxy is to see the key.
    async with httpx.AsyncClient(
        base_url=url, headers=headers, timeout=_TIMEOUT_S, trust_env=False
    ) as client:
        try:
            yield RunningServer(client, who)
        except httpx.RequestError as error:
            raise Refused(
                f"{who} holds the data folder, but does not answer at {url} "
                f"({type(error).__name__})"
            ) from error


class RunningServer:
    """See `kvserve.cli.cache.place.Place`: the conversations of the client's key."""

    def __init__(self, client: httpx.AsyncClient, who: str) -> None:
        self._client = client
        self._who = who

    async def ls(self) -> Listing:
        items: list[Item] = []
        more = True
        while more:
            after = {"after": items[-1].id} if items else {}
            page = await self._call("GET", "stats", params={"limit": _PAGE, **after})
            items += map(_item, page["items"])
            more = page["has_more"] and bool(page["items"])
        return Listing(tuple(items), page["guards"].get("stored_bytes"))

    async def show(self, conversation_id: str) -> Detail:
        found = await self._call("GET", quote(conversation_id, safe=""))
        item = _item(found)
        messages = tuple(
            Message(
                cut["message"], cut["role"], cut["start"], cut["end"], cut["tier"], cut["bytes"]
            )
            for cut in found["cuts"]
        )
        return Detail(item, messages, tuple(_lines(item, messages, found.get("shares", ()))))

    async def repair(self, progress: Progress) -> Mended:
        raise self._in_use("repair")

    async def gc(self) -> Mended:
        raise self._in_use("gc")

    async def pin(self, conversation_id: str, ttl_s: float | None) -> datetime | None:
        body = {} if ttl_s is None else {"ttl_s": ttl_s}
        answer = await self._call("POST", f"{quote(conversation_id, safe='')}/pin", json=body)
        until = answer["pinned_until"]
        return None if until is None else datetime.fromisoformat(until)

    async def unpin(self, conversation_id: str) -> None:
        await self._call("DELETE", f"{quote(conversation_id, safe='')}/pin")

    async def rm(self, conversation_id: str) -> None:
        await self._call("DELETE", quote(conversation_id, safe=""))

    async def export(self, conversation_id: str, file: Path, progress: Progress) -> int:
        path = f"/v1/conv_kv/{quote(conversation_id, safe='')}/export"
        async with self._client.stream("GET", path) as answer:
            if answer.is_error:
                await answer.aread()
                raise _error_of(answer)
            total = answer.headers.get("Content-Length")
            try:
                return await write_whole(
                    file, answer.aiter_bytes(), None if total is None else int(total), progress
                )
            except httpx.RemoteProtocolError as error:
                raise Unusable(
                    f"the server broke the export of {conversation_id} off: a file may be damaged"
                ) from error

    async def import_(self, file: Path, conversation_id: str | None, progress: Progress) -> Item:
        nbytes = os.stat(file).st_size
        # The answer comes when all is verified and written; nobody knows how long that takes.
        timeout = httpx.Timeout(_TIMEOUT_S, read=None)
        answer = await self._call(
            "POST",
            "import",
            params={} if conversation_id is None else {"id": conversation_id},
            content=blocks_of(file, nbytes, progress),
            headers={"Content-Length": str(nbytes), "Content-Type": "application/octet-stream"},
            timeout=timeout,
        )
        return await self._item(str(answer["id"]))

    async def _item(self, conversation_id: str) -> Item:
        return _item(await self._call("GET", quote(conversation_id, safe="")))

    async def _call(self, method: str, path: str, **how: Any) -> Mapping[str, Any]:
        answer = await self._client.request(method, f"/v1/conv_kv/{path}", **how)
        if answer.is_error:
            raise _error_of(answer)
        body = answer.json()
        assert isinstance(body, dict)
        return body

    def _in_use(self, command: str) -> Refused:
        return Refused(
            f"`{command}` works on a stopped store only, and the server at "
            f"{self._client.base_url} ({self._who}) has it; stop it first"
        )


def _error_of(answer: httpx.Response) -> CacheError:
    kind = _EXIT_CODES.get(answer.status_code, Refused)
    try:
        message = str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = f"the server answered {answer.status_code}"
    return kind(message)


def _item(found: Mapping[str, Any]) -> Item:
    """Return what the server tells of a conversation; what this version does not know is left."""
    known = {name: found[name] for name in Item.__dataclass_fields__ if name in found}
    for name in _MOMENTS:
        if known.get(name) is not None:
            known[name] = datetime.fromisoformat(known[name])
    return Item(tenant=None, **known)


def _lines(
    item: Item, messages: tuple[Message, ...], shares: Sequence[Mapping[str, Any]]
) -> Iterator[Line]:
    """Yield the conversation, and as much of those that share its beginning as the server tells.

    That is where each leaves this one, not where others part from each other further on.
    """
    own = tuple(
        Step("own", message.start, message.end, message.bytes, message.tier) for message in messages
    )
    yield Line(item.id, item.used_at, own)
    for other in shares:
        steps = list(cut_off(own, other["shared_tokens"]))
        if other["tokens"] > other["shared_tokens"]:
            steps.append(Step(other["id"], other["shared_tokens"], other["tokens"], None, ""))
        yield Line(other["id"], datetime.fromisoformat(other["used_at"]), tuple(steps))


def cut_off(steps: Sequence[Step], end: int) -> Iterator[Step]:
    """Yield the steps up to the token `end`."""
    for step in steps:
        if step.end <= end:
            yield step
        elif step.start < end:
            assert step.nbytes is not None  # they are the server's own
            nbytes = step.nbytes * (end - step.start) // (step.end - step.start)
            yield replace(step, end=end, nbytes=nbytes)

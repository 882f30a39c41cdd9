"""What `/v1/conv_kv` shows of conversations: in lists, and one by one.

No state of its own: it reads the book on the event loop, asks the cache in a worker thread and the
disk's index with one query a page. Shows token counts, sizes and roles; never text, and never
another tenant's conversations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import anyio.to_thread

from kvserve.chat import relatives
from kvserve.chat.archive import Archive
from kvserve.chat.conversations import Conversation, ConversationBook, Key
from kvserve.chat.holdings import Holding, MessageCut, holding, message_cuts
from kvserve.chat.ports import Cache, PathUsage
from kvserve.chat.relatives import Relative
from kvserve.core.errors import InvalidRequest
from kvserve.store.records import ConversationHead


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversationInfo:
    """One item of `GET /v1/conv_kv/stats`, its fields as in the contract.

    `tokens` and `messages` count prompt and reply of the last turn; `bytes` what the `tier` holds
    of them now, `shared_bytes` how much of that others use too. `tier` is `ram`, `disk`, or `none`
    when nothing is held any more. `branches` counts the tenant's conversations, this one included,
    that begin with the same messages up to the first of a user. `pinned_until` is when the pin
    ends by itself, `expires_at` when the conversation does, or else its pin.
    """

    id: str
    title: str | None
    model: str
    tokens: int
    messages: int
    bytes: int
    shared_bytes: int
    tier: str
    saved: bool
    pinned: bool
    pinned_until: datetime | None
    branches: int
    created_at: datetime
    used_at: datetime
    expires_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversationDetail:
    """The answer of `GET /v1/conv_kv/{id}`; `shares` are conversations that begin as it does."""

    info: ConversationInfo
    cuts: tuple[MessageCut, ...]
    shares: tuple[Relative, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversationPage:
    """The answer of `GET /v1/conv_kv/stats`: newest first; `totals` are of all pages.

    `guards` are the limits of the list and the disk, with what is used of them.
    """

    items: tuple[ConversationInfo, ...]
    has_more: bool
    totals: Mapping[str, int]
    guards: Mapping[str, Any]


class Directory:
    """The conversations of one tenant at a time, with what is held of them now."""

    def __init__(self, book: ConversationBook, cache: Cache, archive: Archive) -> None:
        self._book = book
        self._cache = cache
        self._archive = archive

    async def page(
        self, tenant: str, now: datetime, *, limit: int, after: str | None
    ) -> ConversationPage:
        """Return the tenant's conversations, newest first, from behind the id `after`.

        Raises `InvalidRequest` for a limit below 1 or an unknown `after`.
        """
        if limit < 1:
            raise InvalidRequest("limit must be at least 1.", param="limit")
        known = [head for head in self._book.of_tenant(tenant) if not is_over(head, now)]
        known.sort(key=lambda head: (head.created_at, head.id), reverse=True)
        first = 0
        if after is not None:
            ids = [head.id for head in known]
            if after not in ids:
                raise InvalidRequest("after must be the id of a conversation.", param="after")
            first = ids.index(after) + 1
        page = known[first : first + limit]
        held = await self._holdings(page)
        return ConversationPage(
            items=tuple(self._info(head, held[head.tenant, head.id], now) for head in page),
            has_more=first + limit < len(known),
            totals={
                "conversations": len(known),
                "messages": sum(head.num_messages for head in known),
                "tokens": sum(head.num_tokens for head in known),
                "saved": sum(head.saved for head in known),
                "pinned": sum(is_pinned(head, now) for head in known),
            },
            guards={
                "max_conversations": self._book.max_conversations,
                **self._archive.guards(),
            },
        )

    async def info(self, record: Conversation, now: datetime) -> ConversationInfo:
        head = record.head
        return self._info(head, (await self._holdings([head]))[record.key], now)

    async def info_on_disk(self, record: Conversation, now: datetime) -> ConversationInfo:
        """Return it with the bytes that the disk holds of it, wherever else it is."""
        on_disk = await self._archive.disk_usage_of([record.key])
        return self._info(record.head, holding(None, on_disk.get(record.key)), now)

    async def detail(self, record: Conversation, now: datetime) -> ConversationDetail:
        held = (await self._holdings([record.head]))[record.key]
        return ConversationDetail(
            info=self._info(record.head, held, now),
            cuts=message_cuts(record, held),
            shares=await self._relatives(record, now),
        )

    async def _relatives(self, record: Conversation, now: datetime) -> tuple[Relative, ...]:
        heads = {
            head.id: head for head in self._book.of_tenant(record.tenant) if not is_over(head, now)
        }
        bodies = [
            body for id_ in heads if (body := self._book.find(record.tenant, id_)) is not None
        ]
        kin = await self._archive.kin(record, relatives.least_shared(record))
        return await anyio.to_thread.run_sync(relatives.found, record, bodies, kin, heads.keys())

    async def _holdings(self, heads: Sequence[ConversationHead]) -> dict[Key, Holding]:
        """Return what memory and disk hold of each."""
        keys = [(head.tenant, head.id) for head in heads]
        bodies = [body for key in keys if (body := self._book.find(*key)) is not None]
        in_memory = await anyio.to_thread.run_sync(self._usages, bodies)
        on_disk = await self._archive.disk_usage_of(keys)
        return {key: holding(in_memory.get(key), on_disk.get(key)) for key in keys}

    def _info(self, head: ConversationHead, held: Holding, now: datetime) -> ConversationInfo:
        return info_of(head, held, self._book.num_branches(head), now)

    def _usages(self, records: Sequence[Conversation]) -> dict[Key, PathUsage]:
        """Ask the cache, in a worker thread: it compares each conversation's tokens."""
        return {
            record.key: self._cache.usage(record.namespace, record.token_ids) for record in records
        }


def info_of(
    head: ConversationHead, held: Holding, branches: int, now: datetime
) -> ConversationInfo:
    """Return what lists show of a conversation of which `held` is there now."""
    pinned = is_pinned(head, now)
    return ConversationInfo(
        id=head.id,
        title=head.title,
        model=head.model,
        tokens=head.num_tokens,
        messages=head.num_messages,
        bytes=held.nbytes,
        shared_bytes=held.shared_nbytes,
        tier=held.tier,
        saved=head.saved,
        pinned=pinned,
        pinned_until=head.pinned_until if pinned else None,
        branches=branches,
        created_at=head.created_at,
        used_at=head.used_at,
        expires_at=head.expires_at or (head.pinned_until if pinned else None),
    )


def is_over(head: ConversationHead, now: datetime) -> bool:
    """Whether the conversation's time has run out."""
    return head.expires_at is not None and head.expires_at <= now


def is_pinned(head: ConversationHead, now: datetime) -> bool:
    """Whether a pin holds that has not run out."""
    return head.pinned and (head.pinned_until is None or head.pinned_until > now)

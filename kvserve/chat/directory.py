"""What `/v1/conv_kv` shows of conversations.

No state of its own: it reads the book, so it runs on the event loop thread. Shows token counts,
sizes and roles; never text, and never another tenant's conversations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from kvserve.chat.conversations import Conversation, ConversationBook
from kvserve.chat.ports import Cache, PathUsage
from kvserve.core.errors import InvalidRequest, NotFound


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversationInfo:
    """One item of `GET /v1/conv_kv/stats`, its fields as in the contract.

    `tokens` and `messages` count prompt and reply of the last turn; `bytes` what is held of them
    now, `shared_bytes` how much of that others use too. `tier` is `ram`, or `none` when nothing is
    held any more. `branches` counts the tenant's conversations, this one included, that begin with
    the same messages up to the first of a user.
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
    branches: int
    created_at: datetime
    used_at: datetime
    expires_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageCut:
    """The tokens `[start, end)` up to the end of message `message`, and what is held of them.

    A message whose end the template hides has no entry; the next entry covers it too. `tier` is
    `ram` when all of it is held; `bytes` is its share of the segments that cover it.
    """

    message: int
    role: str
    start: int
    end: int
    tier: str
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversationDetail:
    """The answer of `GET /v1/conv_kv/{id}`."""

    info: ConversationInfo
    cuts: tuple[MessageCut, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversationPage:
    """The answer of `GET /v1/conv_kv/stats`: newest first; `totals` are of all pages.

    `guards` are the limits of the conversation list itself; the cache has its own.
    """

    items: tuple[ConversationInfo, ...]
    has_more: bool
    totals: Mapping[str, int]
    guards: Mapping[str, int]


class Directory:
    """The conversations of one tenant at a time, with what the cache holds of them now."""

    def __init__(self, book: ConversationBook, cache: Cache) -> None:
        self._book = book
        self._cache = cache

    def page(self, tenant: str, *, limit: int, after: str | None) -> ConversationPage:
        """Return the tenant's conversations, newest first, from behind the id `after`.

        Raises `InvalidRequest` for a limit below 1 or an unknown `after`.
        """
        if limit < 1:
            raise InvalidRequest("limit must be at least 1.", param="limit")
        known = list(self._book.of_tenant(tenant))
        known.sort(key=lambda record: (record.created_at, record.id), reverse=True)
        first = 0
        if after is not None:
            ids = [record.id for record in known]
            if after not in ids:
                raise InvalidRequest("after must be the id of a conversation.", param="after")
            first = ids.index(after) + 1
        page = known[first : first + limit]
        return ConversationPage(
            items=tuple(self.detail(record).info for record in page),
            has_more=first + limit < len(known),
            totals={
                "conversations": len(known),
                "messages": sum(len(record.roles) for record in known),
                "tokens": sum(len(record.token_ids) for record in known),
            },
            guards={"max_conversations": self._book.max_conversations},
        )

    def get(self, tenant: str, conversation_id: str) -> Conversation:
        """Return the tenant's conversation. Raises `NotFound`, for others' as for unknown ones."""
        record = self._book.find(tenant, conversation_id)
        if record is None:
            raise NotFound(
                "There is no conversation of this id.",
                param="conversation_id",
                code="conversation_not_found",
            )
        return record

    def detail(self, record: Conversation) -> ConversationDetail:
        usage = self._cache.usage(record.namespace, record.token_ids)
        info = ConversationInfo(
            id=record.id,
            title=None,
            model=record.model,
            tokens=len(record.token_ids),
            messages=len(record.roles),
            bytes=usage.nbytes,
            shared_bytes=usage.shared_nbytes,
            tier="ram" if usage.num_tokens else "none",
            saved=False,
            pinned=False,
            branches=self._book.num_branches(record),
            created_at=record.created_at,
            used_at=record.used_at,
            expires_at=None,
        )
        return ConversationDetail(info=info, cuts=_message_cuts(record, usage))


def _message_cuts(conversation: Conversation, usage: PathUsage) -> tuple[MessageCut, ...]:
    """Return the conversation's cuts with what is held of each."""
    cuts = []
    start = 0
    for cut in conversation.cuts:
        held = min(usage.num_tokens, cut.position) - start
        cuts.append(
            MessageCut(
                message=cut.message,
                role=conversation.roles[cut.message],
                start=start,
                end=cut.position,
                tier="ram" if held == cut.position - start else "none",
                bytes=_bytes_within(usage, start, cut.position),
            )
        )
        start = cut.position
    return tuple(cuts)


def _bytes_within(usage: PathUsage, start: int, end: int) -> int:
    total = 0
    for first, last, nbytes in usage.segments:
        overlap = min(last, end) - max(first, start)
        if overlap > 0:
            total += nbytes * overlap // (last - first)
    return total

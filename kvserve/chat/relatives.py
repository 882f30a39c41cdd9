"""Conversations that share a beginning: who parts from one of them where. Pure but for the book.

What is in memory is compared token by token, in a worker thread; of what is only on disk the index
knows which runs it shares, without reading a token.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

import numpy as np

from kvserve.chat.conversations import Conversation
from kvserve.core.types import TokenIds
from kvserve.store.runs import Kin

MOST = 1000
"""Of more only the last used are told: a system prompt may have begun any number of chats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Relative:
    """Another conversation, of `tokens` tokens; the first `shared_tokens` are the same."""

    id: str
    tokens: int
    shared_tokens: int
    used_at: datetime


def least_shared(record: Conversation) -> int:
    """Return how many tokens a relative shares at least: the first message.

    All chats of one template begin alike, with some tokens that say nothing.
    """
    return record.cuts[0].position if record.cuts else 1


def found(
    record: Conversation,
    bodies: Sequence[Conversation],
    kin: Sequence[Kin],
    known: Collection[str],
) -> tuple[Relative, ...]:
    """Return the relatives among `bodies`, and of all others that are `known` those of `kin`."""
    relatives = in_memory(record, bodies)
    compared = {body.id for body in bodies}
    relatives += [one for one in on_disk(record, kin) if one.id in known and one.id not in compared]
    return last_used(relatives)


def in_memory(record: Conversation, others: Iterable[Conversation]) -> list[Relative]:
    """Return the relatives among conversations of the same tenant. Compares tokens: slow."""
    since = least_shared(record)
    found = []
    for other in others:
        same_root = (other.namespace, other.identity) == (record.namespace, record.identity)
        if same_root and other.id != record.id:
            shared = _num_common(record.token_ids, other.token_ids, since)
            if shared >= since:
                found.append(
                    Relative(
                        id=other.id,
                        tokens=len(other.token_ids),
                        shared_tokens=shared,
                        used_at=other.used_at,
                    )
                )
    return found


def on_disk(record: Conversation, kin: Sequence[Kin]) -> list[Relative]:
    """Return the relatives that the index knows; `kin` holds the conversation itself, too."""
    own = next((one.path for one in kin if one.id == record.id), ())
    reached = {at.run_id: at.until for at in own}
    found = []
    for one in kin:
        if one.id != record.id and own:
            shared = max(min(at.until, reached.get(at.run_id, 0)) for at in one.path)
            tokens = one.path[-1].until
            found.append(
                Relative(id=one.id, tokens=tokens, shared_tokens=shared, used_at=one.used_at)
            )
    return found


def last_used(found: Iterable[Relative]) -> tuple[Relative, ...]:
    """Return at most `MOST` of them, the last used first."""
    return tuple(heapq.nlargest(MOST, found, key=lambda one: (one.used_at, one.id)))


def _num_common(first: TokenIds, second: TokenIds, least: int) -> int:
    """Return how many leading tokens are the same, 0 for less than `least`."""
    if not np.array_equal(first[:least], second[:least]):
        return 0
    length = min(len(first), len(second))
    differs = np.flatnonzero(first[:length] != second[:length])
    return int(differs[0]) if len(differs) else length

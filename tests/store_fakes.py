"""KV state that can be told right from wrong without a model, and conversations that have it.

The state of a token depends on the namespace and on every token before it, so state of another
prefix, another caller or another position never looks right.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvserve.core.identity import ModelIdentity
from kvserve.core.types import TokenIds
from kvserve.store.errors import SourceGone
from kvserve.store.records import ConversationHead, StoredConversation, StoredMessage
from kvserve.store.segments import ArraySpec, PackedSegment, SegmentSpec, StoredPath
from kvserve.store.store import Store

NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)
NAMESPACE = b"tenant"
IDENTITY = ModelIdentity(
    weights="w",
    config="c",
    quantisation="none",
    adapter="",
    tokenizer="t",
    chat_template="ct",
    kv_dtype="bfloat16",
    layout="1",
)
WIDTH = 128
TOKEN_NBYTES = 2 * 2 * WIDTH
"""Bytes of one token's keys and values."""


class Clock:
    """A wall that tests move by hand."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> datetime:
        return self.now

    def advance(self, **by: float) -> None:
        self.now += timedelta(**by)


def ids(tokens: Sequence[int] | NDArray[Any]) -> TokenIds:
    return np.asarray(tokens, np.uint32)


def state_of(namespace: bytes, token_ids: TokenIds) -> NDArray[np.uint16]:
    """Return the state after each token, `[tokens, 2 * WIDTH]`."""
    here = int.from_bytes(hashlib.blake2b(namespace, digest_size=8).digest(), "little")
    rows = np.empty((len(token_ids), 2 * WIDTH), np.uint64)
    step = np.arange(1, 2 * WIDTH + 1, dtype=np.uint64)
    for position, token in enumerate(token_ids.tolist()):
        here = (here * 6364136223846793005 + token * 2654435761 + 1442695040888963407) % 2**64
        rows[position] = np.uint64(here >> 13) * step
    return (rows >> np.uint64(24)).astype(np.uint16)


class FakeSource:
    """Segments of `[start, end)` of a prompt, `size` tokens each."""

    def __init__(
        self, namespace: bytes, token_ids: TokenIds, start: int, end: int, size: int = 16
    ) -> None:
        self.state = state_of(namespace, token_ids[:end])
        cuts = [*range(start, end, size), end]
        self.specs = [spec(a, b) for a, b in pairwise(cuts)]
        self.gone = False

    async def data(self, index: int) -> Sequence[memoryview]:
        if self.gone:
            raise SourceGone
        at = self.specs[index]
        return arrays(self.state[at.start : at.end])


def spec(start: int, end: int) -> SegmentSpec:
    array = ArraySpec("BF16", (1, 1, end - start, WIDTH))
    tree = {"tuple": [{"array": 0}, {"array": 1}]}
    return SegmentSpec(
        start=start,
        end=end,
        arrays=(array, array),
        layout=[{"form": "span", "tree": tree, "tokens": end - start}],
    )


def arrays(state: NDArray[np.uint16]) -> list[memoryview]:
    return [np.ascontiguousarray(part).data for part in (state[:, :WIDTH], state[:, WIDTH:])]


def conversation(
    name: str, token_ids: TokenIds | Sequence[int], *, tenant: str = "a", **head: Any
) -> StoredConversation:
    """Return a conversation of one message, named after its tokens."""
    token_ids = ids(token_ids)
    digest = hashlib.blake2b(token_ids.tobytes(), digest_size=16).digest()
    found = ConversationHead(
        tenant=tenant,
        id=name,
        namespace=NAMESPACE,
        model="fake",
        identity=IDENTITY,
        num_tokens=len(token_ids),
        num_messages=1,
        tip=digest,
        stem=digest,
        created_at=NOW,
        used_at=NOW,
    )
    return StoredConversation(
        head=replace(found, **head),
        tools_digest=b"tools",
        template_digest=b"template",
        messages=[StoredMessage("user", digest, len(token_ids))],
        token_ids=token_ids,
    )


Open = Callable[[StoredPath, Sequence[tuple[int, int]]], Awaitable[Sequence[FakeSource]]]


def source_of(stored: StoredConversation, asked: list[tuple[int, int]] | None = None) -> Open:
    """Return an `open_source` that holds the conversation's whole state; notes the ranges."""

    async def open_source(
        path: StoredPath, ranges: Sequence[tuple[int, int]]
    ) -> Sequence[FakeSource]:
        if asked is not None:
            asked.extend(ranges)
        namespace = stored.head.namespace
        return [FakeSource(namespace, stored.token_ids, start, end) for start, end in ranges]

    return open_source


async def write(store: Store, stored: StoredConversation, *, by_order: bool = False) -> Any:
    return await store.write(stored, source_of(stored), by_order=by_order)


def is_right(packed: PackedSegment, namespace: bytes, token_ids: TokenIds) -> bool:
    """Whether a segment holds, bit for bit, the state of this prompt where they overlap."""
    start, end = packed.spec.start, min(packed.spec.end, len(token_ids))
    state = state_of(namespace, token_ids[:end])[start:]
    found = [
        np.frombuffer(part, np.uint16).reshape(-1, WIDTH)[: end - start] for part in packed.data
    ]
    return all(
        np.array_equal(part, state[:, column : column + WIDTH])
        for part, column in zip(found, (0, WIDTH), strict=True)
    )


async def readable(store: Store, token_ids: TokenIds, namespace: bytes = NAMESPACE) -> int:
    """Return up to where the disk gives back a prompt's state without a hole, all of it right."""
    path = await store.walk(namespace, token_ids)
    ends = [*(segment.start for segment in path.segments[1:]), path.num_tokens]
    held = []
    for segment, end in zip(path.segments, ends, strict=False):
        if not segment.readable:
            break
        held.append((segment, end))
    for packed, (_, end) in zip(store.read([at for at, _ in held]), held, strict=True):
        assert is_right(packed, namespace, token_ids[:end])
    return held[-1][1] if held else 0

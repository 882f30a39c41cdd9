"""Where `kvserve cache` works: a stopped store or a running server, seen alike.

A port and the plain values that pass through it; no state, no I/O, and nothing to print with. Token
positions are half-open ranges from the start of the prompt, sizes are bytes, times are aware and in
UTC.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

Progress = Callable[[int, int | None], None]
"""Told how many bytes are done, and of how many, None where that is not known."""


class CacheError(Exception):
    """What was asked for cannot be done; the message is one line for the person who asked."""

    exit_code = 2


class NotThere(CacheError):
    """There is no such conversation, or no store."""

    exit_code = 1


class Unusable(CacheError):
    """What is stored, or the file given, is damaged."""

    exit_code = 1


class Refused(CacheError):
    """It must not be done, or not now, or not here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One conversation, its fields as in `GET /v1/conv_kv/stats`.

    `tenant` is None where only the caller's own can be seen. `expires_at` is the end of the
    conversation, or else of its pin.
    """

    tenant: str | None
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


@dataclass(frozen=True, slots=True)
class Listing:
    """All conversations that can be seen. `nbytes` is what all files of the store take, others'
    too; None for a server that keeps none."""

    items: tuple[Item, ...]
    nbytes: int | None


@dataclass(frozen=True, slots=True)
class Message:
    """The tokens up to the end of message number `message`, and what is held of them where; named
    as in `GET /v1/conv_kv/{id}`."""

    message: int
    role: str
    start: int
    end: int
    tier: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Step:
    """The tokens `[start, end)` of a conversation.

    Conversations that have steps of one `label` share these as far as both go. `nbytes` is what is
    held of the tokens, on `tier`; None and "" where that is not known.
    """

    label: Hashable
    start: int
    end: int
    nbytes: int | None
    tier: str


@dataclass(frozen=True, slots=True)
class Line:
    """A conversation as the steps from the start to its tip, which lie end to end."""

    id: str
    used_at: datetime
    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class Detail:
    """One conversation: `lines` are those that share its beginning, its own among them."""

    item: Item
    messages: tuple[Message, ...]
    lines: tuple[Line, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong in the store: where it is, and what."""

    subject: str
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What was read, and what is wrong with it."""

    files: int
    bytes: int
    conversations: int
    problems: tuple[Problem, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mended:
    """What `repair` and `gc` have done: `problems` are those found, `left` those that remain.

    Files put into quarantine are not deleted; `restored` are rows made for sound files.
    """

    problems: tuple[Problem, ...] = ()
    quarantined_files: int
    restored_rows: int
    ended_conversations: int
    removed_files: int
    freed_bytes: int
    left: tuple[str, ...]


class Place(Protocol):
    """Everything raises `CacheError`, and `NotThere` for an unknown conversation."""

    async def ls(self) -> Listing: ...

    async def show(self, conversation_id: str) -> Detail: ...

    async def repair(self, progress: Progress) -> Mended:
        """Verify, and take out of use what is damaged, so that it costs a prefill and no more."""

    async def gc(self) -> Mended:
        """Remove what nobody needs."""

    async def pin(self, conversation_id: str, ttl_s: float | None) -> datetime | None:
        """Keep the conversation from eviction, for good or for a time; return its end."""

    async def unpin(self, conversation_id: str) -> None: ...

    async def rm(self, conversation_id: str) -> None: ...

    async def export(self, conversation_id: str, file: Path, progress: Progress) -> int:
        """Write the conversation into `file`, which is not there yet; return its size."""

    async def import_(self, file: Path, conversation_id: str | None, progress: Progress) -> Item:
        """Take a verified file in, under an id that is not in use; return the conversation."""

"""What the index keeps of a conversation. Plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from kvserve.core.identity import ModelIdentity
from kvserve.core.types import TokenIds


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversationHead:
    """A conversation without its messages and tokens, as lists show it. Times are aware, in UTC.

    `model` is the name under which it was served, `identity` what its state depends on. `tip` is
    the digest of all its messages, `stem` that up to the first of a user. `saved` means saved by
    order, not in passing. A pin with `pinned_until` None lasts; at `expires_at` the
    conversation itself ends.
    """

    tenant: str
    id: str
    namespace: bytes
    model: str
    identity: ModelIdentity
    title: str | None = None
    num_tokens: int
    num_messages: int
    tip: bytes
    stem: bytes
    saved: bool = False
    pinned: bool = False
    pinned_until: datetime | None = None
    expires_at: datetime | None = None
    created_at: datetime
    used_at: datetime


@dataclass(frozen=True, slots=True)
class StoredMessage:
    """One message: its role, the identity digest of all messages up to it, and where it ends.

    `end` counts tokens; None for a message whose end the template hides.
    """

    role: str
    digest: bytes
    end: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredConversation:
    """A conversation whole. `token_ids` are prompt and reply of its last turn."""

    head: ConversationHead
    tools_digest: bytes
    template_digest: bytes
    messages: Sequence[StoredMessage]
    token_ids: TokenIds

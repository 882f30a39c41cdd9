"""A conversation's record as it travels inside an exported file. Pure; owns nothing.

A JSON object in the file's header: `id`, `title`, `model`, `created_at` (ISO 8601, with its zone),
`tip`, `stem`, `tools_digest` and `template_digest` (hexadecimal), and `messages`, a list of
`{"role", "digest", "end"}`. Whose it was, and under which namespace, does not leave the server;
flags, pins and expiry are not the file's to say either. Tokens and identity stand in the header.

An imported record was written by a stranger: every field is checked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from kvserve.store.records import ConversationHead, StoredConversation, StoredMessage
from kvserve.store.snapshot_header import SnapshotHeader

MAX_TEXT = 1000
"""Characters of a title or a model's name."""
MAX_MESSAGES = 2**16 + 1
"""As many as a request may hold, and its reply. The header has room for a million, and each costs
the event loop some microseconds at every turn."""
_MAX_DIGEST_NBYTES = 64


def carry(conversation: StoredConversation) -> dict[str, Any]:
    """Return the record of a conversation that is about to be exported."""
    head = conversation.head
    return {
        "id": head.id,
        "title": None if head.title is None else _clean(head.title),
        "model": _clean(head.model),
        "created_at": head.created_at.isoformat(),
        "tip": head.tip.hex(),
        "stem": head.stem.hex(),
        "tools_digest": conversation.tools_digest.hex(),
        "template_digest": conversation.template_digest.hex(),
        "messages": [
            {"role": message.role, "digest": message.digest.hex(), "end": message.end}
            for message in conversation.messages
        ],
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Carried:
    """A record that was found in a file, checked. `id` is the name it had where it comes from."""

    id: str
    title: str | None
    model: str
    created_at: datetime
    tip: bytes
    stem: bytes
    tools_digest: bytes
    template_digest: bytes
    messages: Sequence[StoredMessage]

    def conversation(
        self, header: SnapshotHeader, *, tenant: str, namespace: bytes, id: str, now: datetime
    ) -> StoredConversation:
        """Return it as a conversation of a tenant; `now` bounds the time that the file states."""
        head = ConversationHead(
            tenant=tenant,
            id=id,
            namespace=namespace,
            model=self.model,
            identity=header.identity,
            title=self.title,
            num_tokens=header.end,
            num_messages=len(self.messages),
            tip=self.tip,
            stem=self.stem,
            created_at=min(self.created_at, now),
            used_at=now,
        )
        return StoredConversation(
            head=head,
            tools_digest=self.tools_digest,
            template_digest=self.template_digest,
            messages=self.messages,
            token_ids=header.token_ids,
        )


def unpack(record: Mapping[str, Any], num_tokens: int) -> Carried:
    """Return a record found in a file of `num_tokens` tokens. Raises ValueError, naming a field."""
    messages = record.get("messages")
    if type(messages) is not list or len(messages) > MAX_MESSAGES:
        raise ValueError(f"messages: not a list of at most {MAX_MESSAGES}")
    title = record.get("title")
    return Carried(
        id=_text(record, "id"),
        title=None if title is None else _text(record, "title"),
        model=_text(record, "model"),
        created_at=_time(record, "created_at"),
        tip=_digest(record, "tip"),
        stem=_digest(record, "stem"),
        tools_digest=_digest(record, "tools_digest"),
        template_digest=_digest(record, "template_digest"),
        messages=_messages(messages, num_tokens),
    )


def _messages(found: list[Any], num_tokens: int) -> list[StoredMessage]:
    messages, before = [], 0
    for message in found:
        if type(message) is not dict:
            raise ValueError("messages: not an object")
        end = message.get("end")
        if end is not None:
            if type(end) is not int or not before <= end <= num_tokens:
                raise ValueError(f"messages: an end out of order or behind token {num_tokens}")
            before = end
        messages.append(StoredMessage(_text(message, "role"), _digest(message, "digest"), end))
    return messages


def _clean(text: str) -> str:
    """Return text that JSON can hold: a client may have sent half a character."""
    return text.encode("utf-8", "replace").decode()[:MAX_TEXT]


def _text(record: Mapping[str, Any], name: str) -> str:
    value = record.get(name)
    if type(value) is not str or len(value) > MAX_TEXT:
        raise ValueError(f"{name}: not a text of at most {MAX_TEXT} characters")
    return value


def _digest(record: Mapping[str, Any], name: str) -> bytes:
    value = record.get(name)
    if type(value) is not str or len(value) > 2 * _MAX_DIGEST_NBYTES:
        raise ValueError(f"{name}: not a digest")
    try:
        return bytes.fromhex(value)
    except ValueError as error:
        raise ValueError(f"{name}: not a digest") from error


def _time(record: Mapping[str, Any], name: str) -> datetime:
    try:
        time = datetime.fromisoformat(_text(record, name))
        if time.tzinfo is None:
            raise ValueError("which zone?")
        return time.astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{name}: not a time") from error

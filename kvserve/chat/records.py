"""A conversation as turns know it, and as the index keeps it: from one to the other. Pure."""

from __future__ import annotations

from kvserve.chat.conversations import Conversation
from kvserve.core.types import Cut
from kvserve.store.records import StoredConversation, StoredMessage


def to_stored(record: Conversation) -> StoredConversation:
    """Return what the index keeps of the conversation."""
    ends = {cut.message: cut.position for cut in record.cuts}
    return StoredConversation(
        head=record.head,
        tools_digest=record.tools_digest,
        template_digest=record.template_digest,
        messages=[
            StoredMessage(role, digest, ends.get(index))
            for index, (role, digest) in enumerate(zip(record.roles, record.chain[1:], strict=True))
        ],
        token_ids=record.token_ids,
    )


def from_stored(stored: StoredConversation) -> Conversation:
    """Return the conversation that `to_stored` was given."""
    head = stored.head
    return Conversation(
        tenant=head.tenant,
        id=head.id,
        namespace=head.namespace,
        model=head.model,
        identity=head.identity,
        token_ids=stored.token_ids,
        chain=(b"", *(message.digest for message in stored.messages)),
        roles=tuple(message.role for message in stored.messages),
        cuts=tuple(
            Cut(message.end, index)
            for index, message in enumerate(stored.messages)
            if message.end is not None
        ),
        tools_digest=stored.tools_digest,
        template_digest=stored.template_digest,
        created_at=head.created_at,
        used_at=head.used_at,
        title=head.title,
        saved=head.saved,
        pinned=head.pinned,
        pinned_until=head.pinned_until,
        expires_at=head.expires_at,
    )

"""The conversations that the server remembers: which there are, and which one a request continues.

State: the records, owned by the event loop thread. In memory, bounded, oldest unused out first. A
record is immutable; the last turn to finish replaces it. Does not hold KV state, only the token ids
that name it, and tells the caller which records it forgot, so that the caller unbinds them.
"""

from __future__ import annotations

import secrets
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime

from kvserve.core.types import Cut, TokenIds

Key = tuple[str, str]
"""(tenant, conversation id). Another tenant's `chat-1` is another conversation."""


@dataclass(frozen=True, slots=True, eq=False)
class Conversation:
    """What a conversation held when its last turn finished.

    `token_ids` are prompt and reply as far as they were stored. `chain[k]` is the identity digest
    of the first k messages, the reply included; `roles` are those messages' roles. `cuts` are the
    message ends within `token_ids`, the reply's among them. `tools_digest` and `template_digest`
    stand for what else shaped the prompt.
    """

    tenant: str
    id: str
    namespace: bytes
    model: str
    token_ids: TokenIds
    chain: tuple[bytes, ...]
    roles: tuple[str, ...]
    cuts: tuple[Cut, ...]
    tools_digest: bytes
    template_digest: bytes
    created_at: datetime
    used_at: datetime

    @property
    def key(self) -> Key:
        return (self.tenant, self.id)

    @property
    def stem(self) -> bytes:
        """The digest of its messages up to the first of a user: equal stems are branches."""
        first_user = self.roles.index("user") if "user" in self.roles else len(self.roles) - 1
        return self.chain[first_user + 1]


def new_id() -> str:
    """Return an id that nobody can guess."""
    return f"conv_{secrets.token_hex(12)}"


class ConversationBook:
    """At most `max_conversations` records with `max_tokens` token ids (4 bytes each) in all."""

    def __init__(self, *, max_conversations: int = 10_000, max_tokens: int = 100_000_000) -> None:
        if max_conversations < 1 or max_tokens < 1:
            raise ValueError("A conversation book needs room for one conversation.")
        self.max_conversations = max_conversations
        self.max_tokens = max_tokens
        self._num_tokens = 0
        self._records: OrderedDict[Key, Conversation] = OrderedDict()  # least used first
        self._tips: dict[tuple[str, bytes, bytes], str] = {}
        self._clients: OrderedDict[tuple[str, bytes, str], str] = OrderedDict()
        self._stems: Counter[tuple[str, bytes, bytes]] = Counter()

    def __len__(self) -> int:
        return len(self._records)

    def find(self, tenant: str, conversation_id: str) -> Conversation | None:
        return self._records.get((tenant, conversation_id))

    def of_tenant(self, tenant: str) -> Iterator[Conversation]:
        """Yield the tenant's conversations, in no promised order."""
        return (record for record in self._records.values() if record.tenant == tenant)

    def continued_by(
        self, tenant: str, namespace: bytes, chain: tuple[bytes, ...]
    ) -> Conversation | None:
        """Return the conversation whose whole history is the longest prefix of `chain`."""
        for link in reversed(chain[1:]):
            conversation_id = self._tips.get((tenant, namespace, link))
            if conversation_id is not None:
                return self._records[(tenant, conversation_id)]
        return None

    def id_of_client(self, tenant: str, namespace: bytes, address: str) -> str:
        """Return the id bound to a client's address, a new one for a new client."""
        client = (tenant, namespace, address)
        conversation_id = self._clients.setdefault(client, new_id())
        self._clients.move_to_end(client)
        if len(self._clients) > self.max_conversations:
            self._clients.popitem(last=False)
        return conversation_id

    def touch(self, key: Key, now: datetime) -> None:
        """Note that the conversation is in use, if it is known."""
        record = self._records.get(key)
        if record is not None:
            self._records[key] = replace(record, used_at=max(now, record.used_at))
            self._records.move_to_end(key)

    def put(self, conversation: Conversation) -> list[Conversation]:
        """Make this the record of its id; return the other conversations forgotten for room."""
        self.remove(conversation.key)
        self._records[conversation.key] = conversation
        self._num_tokens += len(conversation.token_ids)
        self._tips[_tip(conversation)] = conversation.id
        self._stems[_stem(conversation)] += 1
        forgotten = []
        while len(self._records) > 1 and (
            len(self._records) > self.max_conversations or self._num_tokens > self.max_tokens
        ):
            oldest = next(iter(self._records))
            gone = self.remove(oldest)
            assert gone is not None
            forgotten.append(gone)
        return forgotten

    def remove(self, key: Key) -> Conversation | None:
        """Forget the conversation and return what was known of it."""
        gone = self._records.pop(key, None)
        if gone is None:
            return None
        self._num_tokens -= len(gone.token_ids)
        if self._tips.get(_tip(gone)) == gone.id:
            del self._tips[_tip(gone)]
        self._stems[_stem(gone)] -= 1
        if not self._stems[_stem(gone)]:
            del self._stems[_stem(gone)]
        return gone

    def num_branches(self, conversation: Conversation) -> int:
        """Return how many known conversations, this one included, begin with its first question.

        They share its tenant, its namespace and all messages up to the first of a user.
        """
        return self._stems[_stem(conversation)]

    def check(self) -> None:
        """Recount everything that is counted along the way. For tests."""
        records = self._records.values()
        assert self._num_tokens == sum(len(record.token_ids) for record in records)
        assert self._stems == Counter(_stem(record) for record in records)
        assert all((tenant, id_) in self._records for (tenant, _, _), id_ in self._tips.items())


def _tip(record: Conversation) -> tuple[str, bytes, bytes]:
    return (record.tenant, record.namespace, record.chain[-1])


def _stem(record: Conversation) -> tuple[str, bytes, bytes]:
    return (record.tenant, record.namespace, record.stem)

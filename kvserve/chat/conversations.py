"""The conversations that the server knows: which there are, and which one a request continues.

State: the heads of all conversations, in memory and on disk, and the bodies of those in use; owned
by the event loop thread. Bodies are bounded. Those that the disk has just so leave first, the
oldest unused of them, and go back to being heads. Without any, the oldest unused body goes back to
the version on disk, or is forgotten where there is none; so a head never tells of more than can be
had. The caller is told what left, so that it unbinds it. A record is immutable; the last turn to
finish replaces it. Holds no KV state, only the token ids that name it.
"""

from __future__ import annotations

import secrets
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from kvserve.core.identity import ModelIdentity
from kvserve.core.types import Cut, TokenIds
from kvserve.store.records import ConversationHead

_WARM = "warm_"

Key = tuple[str, str]
"""(tenant, conversation id). Another tenant's `chat-1` is another conversation."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Conversation:
    """What a conversation held when its last turn finished.

    `token_ids` are prompt and reply as far as they were stored. `chain[k]` is the identity digest
    of the first k messages, the reply included; `roles` are those messages' roles. `cuts` are the
    message ends within `token_ids`, the reply's among them. `tools_digest` and `template_digest`
    stand for what else shaped the prompt. The fields behind `used_at` are as in
    `kvserve.store.records.ConversationHead`.
    """

    tenant: str
    id: str
    namespace: bytes
    model: str
    identity: ModelIdentity
    token_ids: TokenIds
    chain: tuple[bytes, ...]
    roles: tuple[str, ...]
    cuts: tuple[Cut, ...]
    tools_digest: bytes
    template_digest: bytes
    created_at: datetime
    used_at: datetime
    title: str | None = None
    saved: bool = False
    pinned: bool = False
    pinned_until: datetime | None = None
    expires_at: datetime | None = None

    @property
    def key(self) -> Key:
        return (self.tenant, self.id)

    @property
    def stem(self) -> bytes:
        """The digest of its messages up to the first of a user: equal stems are branches."""
        first_user = self.roles.index("user") if "user" in self.roles else len(self.roles) - 1
        return self.chain[first_user + 1]

    @property
    def head(self) -> ConversationHead:
        return ConversationHead(
            tenant=self.tenant,
            id=self.id,
            namespace=self.namespace,
            model=self.model,
            identity=self.identity,
            title=self.title,
            num_tokens=len(self.token_ids),
            num_messages=len(self.roles),
            tip=self.chain[-1],
            stem=self.stem,
            saved=self.saved,
            pinned=self.pinned,
            pinned_until=self.pinned_until,
            expires_at=self.expires_at,
            created_at=self.created_at,
            used_at=self.used_at,
        )


def new_id() -> str:
    """Return an id that nobody can guess."""
    return f"conv_{secrets.token_hex(12)}"


def warm_id(content: bytes) -> str:
    """Return the id of a prompt that was prefilled ahead of its users, from a digest of it.

    The same prompt again is the same conversation. No request continues one by content: its first
    user would take it, and its TTL, away from all others.
    """
    return f"{_WARM}{content.hex()}"


class ConversationBook:
    """At most `max_conversations` bodies with `max_tokens` token ids (4 bytes each) in all."""

    def __init__(self, *, max_conversations: int = 10_000, max_tokens: int = 100_000_000) -> None:
        if max_conversations < 1 or max_tokens < 1:
            raise ValueError("A conversation book needs room for one conversation.")
        self.max_conversations = max_conversations
        self.max_tokens = max_tokens
        self._num_tokens = 0
        self._heads: dict[Key, ConversationHead] = {}
        self._tenants: defaultdict[str, dict[Key, None]] = defaultdict(dict)
        self._bodies: OrderedDict[Key, Conversation] = OrderedDict()  # least used first
        self._on_disk: dict[Key, ConversationHead] = {}  # perhaps of an older version
        self._clean: OrderedDict[Key, None] = OrderedDict()  # bodies as they are on disk
        self._tips: defaultdict[tuple[str, bytes, bytes], dict[str, None]] = defaultdict(dict)
        self._clients: OrderedDict[tuple[str, bytes, str], str] = OrderedDict()
        self._stems: Counter[tuple[str, bytes, bytes]] = Counter()

    def __len__(self) -> int:
        return len(self._heads)

    # -- finding ------------------------------------------------------------------------------

    def find(self, tenant: str, conversation_id: str) -> Conversation | None:
        """Return the conversation if its body is in memory."""
        return self._bodies.get((tenant, conversation_id))

    def head(self, tenant: str, conversation_id: str) -> ConversationHead | None:
        """Return what is known of the conversation, wherever its body is."""
        return self._heads.get((tenant, conversation_id))

    def of_tenant(self, tenant: str) -> Iterator[ConversationHead]:
        """Yield the tenant's conversations, in no promised order."""
        keys = self._tenants.get(tenant, ())
        return (self._heads[key] for key in keys)

    def is_durable(self, key: Key) -> bool:
        """Whether a version of the conversation, perhaps an older one, is on disk."""
        return key in self._on_disk

    def on_disk(self, key: Key) -> ConversationHead | None:
        """Return the head of the version that is on disk, if there is one."""
        return self._on_disk.get(key)

    def continued_by(
        self, tenant: str, namespace: bytes, chain: tuple[bytes, ...]
    ) -> ConversationHead | None:
        """Return the conversation whose whole history is the longest prefix of `chain`.

        Of several with this history the one put last; never one that was only prefilled.
        """
        for link in reversed(chain[1:]):
            ids = self._tips.get((tenant, namespace, link))
            if ids:
                return self._heads[(tenant, next(reversed(ids)))]
        return None

    def id_of_client(self, tenant: str, namespace: bytes, address: str) -> str:
        """Return the id bound to a client's address, a new one for a new client."""
        client = (tenant, namespace, address)
        conversation_id = self._clients.setdefault(client, new_id())
        self._clients.move_to_end(client)
        if len(self._clients) > self.max_conversations:
            self._clients.popitem(last=False)
        return conversation_id

    def num_branches(self, conversation: Conversation | ConversationHead) -> int:
        """Return how many known conversations, this one included, begin with its first question.

        They share its tenant, its namespace and all messages up to the first of a user.
        """
        return self._stems[(conversation.tenant, conversation.namespace, conversation.stem)]

    # -- changing -----------------------------------------------------------------------------

    def learn(self, heads: Iterable[ConversationHead]) -> None:
        """Take in what is on disk, at start; conversations known already stay as they are."""
        for head in sorted(heads, key=lambda head: head.used_at):
            key = (head.tenant, head.id)
            if key not in self._heads:
                self._enter(key, head)
                self._on_disk[key] = head

    def touch(self, key: Key, now: datetime) -> None:
        """Note that the conversation is in use, if it is known."""
        head = self._heads.get(key)
        if head is None:
            return
        used_at = max(now, head.used_at)
        self._heads[key] = replace(head, used_at=used_at)
        body = self._bodies.get(key)
        if body is not None:
            self._bodies[key] = replace(body, used_at=used_at)
            self._bodies.move_to_end(key)
            if key in self._clean:
                self._clean.move_to_end(key)

    def put(self, conversation: Conversation) -> list[Conversation]:
        """Make this the record of its id; return the other records that had to leave for it."""
        key = conversation.key
        on_disk = self._on_disk.get(key)
        self.remove(key)
        self._enter(key, conversation.head)
        self._bodies[key] = conversation
        self._num_tokens += len(conversation.token_ids)
        if on_disk is not None:
            self.mark_durable(key, on_disk)
        return self._shrink()

    def revise(self, key: Key, **changes: Any) -> None:
        """Change the flags of a conversation, if it is known; those that its head has too."""
        if key in self._heads:
            self._heads[key] = replace(self._heads[key], **changes)
        if key in self._bodies:
            self._bodies[key] = replace(self._bodies[key], **changes)
            self._compare(key)

    def prefer(self, key: Key) -> None:
        """Let the conversation be the one that is found by its history, should others share it."""
        head = self._heads.get(key)
        if head is not None and head.id in self._tips.get(_tip(head), ()):
            ids = self._tips[_tip(head)]
            del ids[head.id]
            ids[head.id] = None

    def mark_durable(self, key: Key, head: ConversationHead) -> None:
        """Note that the conversation is on disk, in the version with this head."""
        if key in self._heads:
            self._on_disk[key] = head
            self._compare(key)

    def remove(self, key: Key) -> ConversationHead | None:
        """Forget the conversation and return what was known of it."""
        gone = self._heads.pop(key, None)
        if gone is None:
            return None
        del self._tenants[gone.tenant][key]
        if not self._tenants[gone.tenant]:
            del self._tenants[gone.tenant]
        self._on_disk.pop(key, None)
        self._clean.pop(key, None)
        body = self._bodies.pop(key, None)
        if body is not None:
            self._num_tokens -= len(body.token_ids)
        if gone.id in self._tips.get(_tip(gone), ()):
            del self._tips[_tip(gone)][gone.id]
            if not self._tips[_tip(gone)]:
                del self._tips[_tip(gone)]
        self._stems[_stem(gone)] -= 1
        if not self._stems[_stem(gone)]:
            del self._stems[_stem(gone)]
        return gone

    def check(self) -> None:
        """Recount everything that is counted along the way. For tests."""
        bodies = self._bodies.values()
        assert self._num_tokens == sum(len(body.token_ids) for body in bodies)
        assert self._stems == Counter(_stem(head) for head in self._heads.values())
        tips = {(tip, id_) for tip, ids in self._tips.items() for id_ in ids}
        found = [head for head in self._heads.values() if not head.id.startswith(_WARM)]
        assert tips == {(_tip(head), head.id) for head in found} and all(self._tips.values())
        assert {key for keys in self._tenants.values() for key in keys} == set(self._heads)
        assert set(self._bodies) <= set(self._heads)
        assert set(self._on_disk) <= set(self._heads)
        assert set(self._clean) == {key for key in self._bodies if self._is_clean(key)}
        assert all(self._heads[key] == body.head for key, body in self._bodies.items())

    def _enter(self, key: Key, head: ConversationHead) -> None:
        self._heads[key] = head
        self._tenants[head.tenant][key] = None
        if not head.id.startswith(_WARM):
            self._tips[_tip(head)][head.id] = None
        self._stems[_stem(head)] += 1

    def _is_clean(self, key: Key) -> bool:
        """Whether the disk has this version; it may learn of the last use later."""
        head, on_disk = self._heads[key], self._on_disk.get(key)
        return on_disk is not None and replace(on_disk, used_at=head.used_at) == head

    def _compare(self, key: Key) -> None:
        """Note whether the conversation's body, if it is here, could be had from disk again."""
        if key in self._bodies and self._is_clean(key):
            self._clean[key] = None
        else:
            self._clean.pop(key, None)

    def _shrink(self) -> list[Conversation]:
        """Let bodies go until the rest fits; never the newest, which was just put."""
        gone = []
        while len(self._bodies) > 1 and (
            len(self._bodies) > self.max_conversations or self._num_tokens > self.max_tokens
        ):
            newest = next(reversed(self._bodies))
            oldest = next(iter(self._bodies))
            key = next((key for key in self._clean if key != newest), oldest)
            gone.append(self._bodies[key])
            if key in self._clean:
                self._num_tokens -= len(self._bodies.pop(key).token_ids)
                del self._clean[key]
            else:
                on_disk = self._on_disk.get(key)
                self.remove(key)
                self.learn([] if on_disk is None else [on_disk])
        return gone


def _tip(head: ConversationHead) -> tuple[str, bytes, bytes]:
    return (head.tenant, head.namespace, head.tip)


def _stem(head: ConversationHead) -> tuple[str, bytes, bytes]:
    return (head.tenant, head.namespace, head.stem)

"""A small store for tests of `kvserve cache`: two tenants, branches, a name that both have.

    alice/main     system 0-120, user -150, assistant -170, user -200, assistant -230
    alice/fork     the same up to 170, then user -190, assistant -210
    alice/other    the system prompt only, then user -140, assistant -160
    "" (no key)/other  nothing shared

`alice` stands for the tenant of the key "alice".
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from starlette.datastructures import Headers

from kvserve.api.identity import tenant_of
from kvserve.chat.request import namespace_of
from kvserve.core.types import TokenIds
from kvserve.store.guards import Limits
from kvserve.store.records import StoredConversation, StoredMessage
from kvserve.store.store import Store
from tests.store_fakes import IDENTITY, conversation, write

ROLES = ("system", "user", "assistant", "user", "assistant")
ALICE = tenant_of(Headers({"x-api-key": "alice"}))
ROOMY = Limits(disk_share=1.0)


def talk(tenant: str, name: str, token_ids: TokenIds, ends: tuple[int, ...]) -> StoredConversation:
    """Return a conversation of a tenant whose messages end there."""
    stored = conversation(name, token_ids, tenant=tenant, namespace=namespace_of(tenant, None))
    digests = [hashlib.blake2b(token_ids[:end].tobytes(), digest_size=16).digest() for end in ends]
    messages = [
        StoredMessage(role, digest, end)
        for role, digest, end in zip(ROLES, digests, ends, strict=False)
    ]
    head = replace(
        stored.head,
        num_messages=len(messages),
        tip=digests[-1],
        stem=digests[min(1, len(digests) - 1)],
    )
    return replace(stored, head=head, messages=messages)


def talks() -> Mapping[str, StoredConversation]:
    tokens = np.random.default_rng(7).integers(0, 1000, 4000).astype(np.uint32)
    main = tokens[:230]
    fork = np.concatenate([tokens[:170], tokens[1000:1040]])
    other = np.concatenate([tokens[:120], tokens[2000:2040]])
    return {
        "main": talk(ALICE, "main", main, (120, 150, 170, 200, 230)),
        "fork": talk(ALICE, "fork", fork, (120, 150, 170, 190, 210)),
        "other": talk(ALICE, "other", other, (120, 140, 160)),
        "keyless": talk("", "other", tokens[3000:3050], (20, 40, 50)),
    }


def build(folder: Path) -> None:
    """Write the store into `folder`, turn by turn as a server does."""

    async def work() -> None:
        store = await Store.open(folder, identity=IDENTITY, limits=ROOMY)
        try:
            made = talks()
            await write(store, talk(ALICE, "main", made["main"].token_ids[:170], (120, 150, 170)))
            for stored in made.values():
                await write(store, stored)
        finally:
            await store.aclose()

    asyncio.run(work())

"""What turns leave behind: records in the book of conversations, references in the cache.

State: the book and the set of running turns, owned by the event loop thread; every method runs
there and is short; only what ends a conversation awaits, for the disk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

import numpy as np

from kvserve.chat.archive import Archive, name_of
from kvserve.chat.conversations import Conversation, ConversationBook, Key
from kvserve.chat.messages import extend_identity
from kvserve.chat.miss import Asked
from kvserve.chat.ports import Cache, ModelInfo
from kvserve.chat.request import TurnRequest
from kvserve.core.types import Cut, Finished, TokenIds


@dataclass(slots=True, eq=False)
class Run:
    """A turn in the making. `held` is the conversation as the turn found it, None for a new one."""

    request: TurnRequest
    asked: Asked
    namespace: bytes
    key: Key | None
    held: Conversation | None
    keep: bool


class Keeper:
    """Moves conversations on as their turns begin and end; one per server."""

    def __init__(
        self,
        book: ConversationBook,
        cache: Cache,
        archive: Archive,
        info: Callable[[], ModelInfo],
        clock: Callable[[], datetime],
    ) -> None:
        self._book = book
        self._cache = cache
        self._archive = archive
        self._info = info
        self._clock = clock
        self._runs: set[Run] = set()

    async def begin(self, run: Run) -> None:
        """Note that the turn runs; start its conversation anew if it asks for that.

        Then what the conversation held is gone on return, whatever becomes of the turn.
        """
        if run.key is None:
            return
        self._runs.add(run)
        if run.request.reset_conversation:
            run.held = None
            if run.keep:
                await self._archive.reset(run.key)
        self._book.touch(run.key, self._clock())
        self._archive.used(run.key)

    def finish(self, run: Run, text: str, event: Finished) -> None:
        """Make the turn the conversation's tip, whoever else was at it in the meantime."""
        self._runs.discard(run)
        if not run.keep or run.key is None:
            return
        asked = run.asked
        stored = np.concatenate([asked.prompt.token_ids, event.token_ids])[: event.num_stored]
        chain, roles = asked.chain, asked.roles
        if asked.begun is not None:  # the client will send back one message, its words and ours
            chain, roles, text = chain[:-1], roles[:-1], asked.begun + text
        reply = {"role": "assistant", "content": text}
        chain = (*chain, extend_identity(chain[-1], reply))
        self._record(run, stored, chain=chain, roles=(*roles, "assistant"))

    def settle(self, run: Run, event: Finished) -> Conversation:
        """Make a prefilled prompt without a reply a conversation; the run must have a key."""
        self._runs.discard(run)
        asked = run.asked
        stored = asked.prompt.token_ids[: event.num_stored]
        return self._record(run, stored, chain=asked.chain, roles=asked.roles)

    def abandon(self, run: Run) -> None:
        """Keep the reference on what was prefilled, unless something newer is there.

        To be called once the engine has let go of the turn. What the conversation held before stays
        its record, so that a retry, or an edit of what was asked, is known as its continuation.
        """
        self._runs.discard(run)
        if not run.keep or run.key is None:
            return
        current = self._book.find(*run.key)
        if current is None and run.held is None:
            asked = run.asked
            # Only what was reached: a retry must not hear that the rest was evicted.
            done = self._cache.usage(run.namespace, asked.prompt.token_ids).num_tokens
            reached = asked.prompt.token_ids[:done]
            self._record(run, reached, chain=asked.chain, roles=asked.roles)
        elif current is not None and run.held is not None and _same_tip(current, run.held):
            self._bind(run.key, run.namespace, run.asked.prompt.token_ids)

    def _record(
        self, run: Run, token_ids: TokenIds, *, chain: tuple[bytes, ...], roles: tuple[str, ...]
    ) -> Conversation:
        assert run.key is not None
        now = self._clock()
        before = self._book.head(*run.key)
        cuts = [cut for cut in run.asked.prompt.cuts if cut.position <= len(token_ids)]
        if len(token_ids) > len(run.asked.prompt):
            cuts.append(Cut(len(token_ids), len(roles) - 1))
        record = Conversation(
            tenant=run.key[0],
            id=run.key[1],
            namespace=run.namespace,
            model=self._info().name,
            identity=self._info().identity,
            token_ids=token_ids,
            chain=chain,
            roles=roles,
            cuts=tuple(cuts),
            tools_digest=run.asked.tools_digest,
            template_digest=run.asked.template_digest,
            created_at=now if before is None else before.created_at,
            used_at=now,
            title=None if before is None else before.title,
            saved=before is not None and before.saved,
            pinned=before is not None and before.pinned,
            pinned_until=None if before is None else before.pinned_until,
            expires_at=None if before is None else before.expires_at,
        )
        forgotten = self._book.put(record)
        self._bind(run.key, run.namespace, token_ids)
        self._archive.forget(forgotten)
        if len(token_ids):
            self._archive.keep(record)
        return record

    def _bind(self, key: Key, namespace: bytes, token_ids: TokenIds) -> None:
        if self._info().caching:
            self._cache.bind(name_of(key), namespace, token_ids)

    def replace(self, record: Conversation) -> None:
        """Make this the record of its conversation, its reference in the cache moved with it."""
        self._archive.forget(self._book.put(record))
        self._bind(record.key, record.namespace, record.token_ids)

    async def delete(self, key: Key) -> None:
        """Forget the conversation and free what it alone holds, in memory and on disk.

        Turns of it that still run are answered, and leave nothing behind.
        """
        for run in self._runs:
            if run.key == key:
                run.keep = False
        await self._archive.delete(key)


def _same_tip(a: Conversation, b: Conversation) -> bool:
    """Return whether no turn has finished between the two records."""
    return a.token_ids is b.token_ids

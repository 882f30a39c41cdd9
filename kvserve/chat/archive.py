"""Conversations that outlive the process: written behind their turns, fetched when asked for.

State: the lock that puts writes and deletions in order, the leases of what waits to be written,
the uses that the disk has yet to learn of, and the paths that it is about to lose; the book says
what there is, the store keeps it. Runs on the event loop; files and SQL are the store's, in other
threads. A write behind a turn that fails costs durability and nothing else: the turn has long been
answered.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from enum import StrEnum
from functools import partial
from typing import Any

from kvserve.cache.stored import restorable
from kvserve.chat.conversations import Conversation, ConversationBook, Key
from kvserve.chat.ports import Cache, ModelInfo, StateSource
from kvserve.chat.records import from_stored, to_stored
from kvserve.chat.refusals import (
    damaged,
    id_taken,
    model_changed,
    persistence_off,
    state_not_held,
    unknown_conversation,
)
from kvserve.core.errors import Damaged, KvserveError
from kvserve.core.types import TokenIds
from kvserve.store.errors import SnapshotDamaged, SourceGone
from kvserve.store.offload import offload
from kvserve.store.runs import Kin, PathUsage
from kvserve.store.segments import SegmentSource, StoredPath
from kvserve.store.store import Store, Written
from kvserve.store.writer import Writer

log = logging.getLogger(__name__)

_GUARDS = (
    *("stored_bytes", "budget_bytes", "save_limit_bytes"),
    *("written_today_bytes", "written_total_bytes", "daily_budget_bytes"),
    *("disk_used_bytes", "disk_free_bytes", "disk_limit_bytes"),
)


class PersistMode(StrEnum):
    """When conversations are written: behind each turn, when saved by order, never."""

    AUTO = "auto"
    MANUAL = "manual"
    OFF = "off"


OpenSource = Callable[[StoredPath, Sequence[tuple[int, int]]], Awaitable[Sequence[SegmentSource]]]
"""`(what the disk has, token ranges it lacks) -> a source for each`."""


class Archive:
    """The conversations on disk; one per server. `store` and `writer` are None in mode `off`."""

    def __init__(
        self,
        *,
        mode: PersistMode,
        store: Store | None,
        writer: Writer | None,
        source: StateSource,
        cache: Cache,
        book: ConversationBook,
        info: Callable[[], ModelInfo],
        clock: Callable[[], datetime],
    ) -> None:
        self.mode = mode
        self._store = store
        self._writer = writer
        self._source = source
        self._cache = cache
        self._book = book
        self._info = info
        self._clock = clock
        self._lock = asyncio.Lock()
        self._leases: dict[Key, Any] = {}
        self._used: dict[Key, datetime] = {}
        self._distrusted: Counter[tuple[bytes, bytes]] = Counter()  # namespace, first token

    @property
    def store(self) -> Store:
        """Return the store. Raises Conflict when the server keeps nothing on disk."""
        if self._store is None:
            raise persistence_off()
        return self._store

    async def open(self) -> None:
        """Learn what is on disk."""
        if self._store is not None:
            self._book.learn(await self._store.heads())

    async def close(self) -> None:
        """Write what waits to be written."""
        if self._writer is not None:
            await self._writer.close()
        try:
            await self.tell_uses()
        except KvserveError as error:
            log.warning("the times of use were not written: %s", error)

    # -- reading ------------------------------------------------------------------------------

    async def recall(self, tenant: str, conversation_id: str) -> Conversation | None:
        """As `fetch`, for a turn: what the disk cannot tell now is unknown."""
        try:
            return await self.fetch(tenant, conversation_id)
        except KvserveError as error:
            log.warning("a conversation could not be read from the index: %s", error)
            return None

    async def fetch(self, tenant: str, conversation_id: str) -> Conversation | None:
        """Return the conversation, its body brought from disk if need be; None if unknown.

        Raises RequestFailed when the index cannot be read.
        """
        key = (tenant, conversation_id)
        head = self._book.head(*key)
        if head is not None and head.expires_at is not None and head.expires_at <= self._clock():
            # The store sees the time itself, and can tell for a while that there was one.
            self._book.remove(key)
            self._let_go(key)
            self._cache.unbind(name_of(key), drop=True)
            return None
        return await self._body(key)

    async def _body(self, key: Key) -> Conversation | None:
        found = self._book.find(*key)
        if found is not None or self._store is None or not self._book.is_durable(key):
            return found
        stored = await self._store.find(*key)
        found = self._book.find(*key)
        if found is not None or self._book.head(*key) is None:
            return found  # a turn, or a deletion, was quicker
        if stored is None:
            self._book.remove(key)
            return None
        found = from_stored(stored)
        self.forget(self._book.put(found))
        self._book.mark_durable(key, found.head)
        return found

    async def has_expired(self, tenant: str, conversation_id: str) -> bool:
        """Whether the conversation is gone because its time was over, not long ago."""
        if self._store is None or self._book.head(tenant, conversation_id) is not None:
            return False
        try:
            return await self._store.find_expired(tenant, conversation_id)
        except KvserveError:
            return False

    async def locate(self, namespace: bytes, token_ids: TokenIds) -> StoredPath | None:
        """Return what the disk holds of a prompt, if that is more than memory does."""
        if self._store is None or (namespace, token_ids[:1].tobytes()) in self._distrusted:
            return None
        path = await self._store.walk(namespace, token_ids)
        held = self._source.held(namespace, token_ids)
        return path if path.num_tokens > held else None

    async def verify(self, record: Conversation) -> None:
        """Read all files of what memory holds of a conversation, and so would not be read again.

        Raises Damaged, and takes the first bad one out of use.
        """
        if self._store is None:
            return
        held = self._source.held(record.namespace, record.token_ids)
        path = await self._store.walk(record.namespace, record.token_ids)
        for segment in path.segments:
            if not segment.readable or segment.start >= held:
                continue
            try:
                await offload(self._store.read, [segment])
            except SnapshotDamaged as damage:
                # Unless it was evicted, or found by another reader, since the walk.
                now = await self._store.walk(record.namespace, record.token_ids)
                if segment in now.segments:
                    raise await self.damage(record, damage) from None

    async def damage(self, record: Conversation, damage: SnapshotDamaged) -> Damaged:
        """Take a bad file out of use; return the error that says what is left without it."""
        await self.report(damage.run_id, damage.reason)
        path = await self.store.walk(record.namespace, record.token_ids)
        held = self._source.held(record.namespace, record.token_ids)
        num_tokens = len(record.token_ids)
        return damaged(restorable(path, num_tokens, held), num_tokens)

    async def disk_usage_of(self, keys: Sequence[Key]) -> Mapping[Key, PathUsage]:
        """Return what the disk holds of those conversations that are there."""
        durable = [key for key in keys if self._book.is_durable(key)]
        if self._store is None or not durable:
            return {}
        return await self._store.disk_usage_of(durable)

    async def kin(self, record: Conversation, since: int) -> Sequence[Kin]:
        """Return the conversations on disk that share its first `since` tokens, itself included."""
        if self._store is None or not self._book.is_durable(record.key):
            return ()
        return await self._store.kin(*record.key, since)

    async def report(self, run_id: int, reason: str) -> None:
        """Take a damaged file out of use."""
        if self._store is not None:
            await self._store.quarantine(run_id, reason)

    async def distrust(self, namespace: bytes, token_ids: TokenIds) -> None:
        """Take what the disk holds of a path that gave wrong replies out of use.

        No turn is given any of it from now on: memory, which has dropped it, would have it again.
        """
        if self._store is None:
            return
        root = (namespace, token_ids[:1].tobytes())
        self._distrusted[root] += 1
        try:
            async with self._lock:  # behind a write that may have taken the wrong state along
                num_files = await self._store.distrust(namespace, token_ids)
        finally:
            self._distrusted[root] -= 1
            self._distrusted += Counter()
        log.error("%d files of a path that gave wrong replies were taken out of use", num_files)

    def used(self, key: Key) -> None:
        """Note that a conversation is in use; the disk learns of it in `tell_uses`."""
        if self._book.is_durable(key):
            self._used[key] = self._clock()

    async def tell_uses(self) -> None:
        """Let the disk know which conversations were used since the last time."""
        used, self._used = self._used, {}
        if self._store is None or not used:
            return
        try:
            await self._store.touch(used)
        except BaseException:
            self._used = used | self._used  # to be told the next time
            raise

    # -- writing ------------------------------------------------------------------------------

    def keep(self, record: Conversation) -> None:
        """Let the record, its turn being over, be written soon; in mode `auto` only."""
        if self.mode is not PersistMode.AUTO or self._writer is None:
            return
        key = record.key
        self._let_go(key)
        # Yields to requests that need the memory: then this turn is not written, but answered.
        self._leases[key] = self._source.hold(record.namespace, record.token_ids)
        write = partial(self._write_behind, key)
        self._writer.submit(key, write, dropped=partial(self._let_go, key))

    async def _write_behind(self, key: Key) -> None:
        lease = self._leases.get(key)
        try:
            if self._book.find(*key) is not None:
                await self.write(key, by_order=False)
        finally:
            if self._leases.get(key) is lease:  # else a later turn waits to be written
                self._let_go(key)

    async def write(self, key: Key, *, by_order: bool, **changes: Any) -> Written:
        """Write what is not on disk yet of a conversation; durable on return.

        `changes` of its flags are written with it, and hold for what a turn makes of it meanwhile.
        Raises NotFound, TooLarge, OutOfSpace, Conflict (mode `off`; state no longer in memory).
        """
        async with self._lock:
            return await self._write(key, by_order, changes)

    async def admit(self, record: Conversation, open_source: OpenSource) -> None:
        """Make a conversation from elsewhere known and durable; its state comes from the source.

        Raises Conflict (id taken), TooLarge, OutOfSpace, and what the source raises.
        """
        taken = id_taken(record.id, "id")
        async with self._lock:
            if await self.fetch(*record.key) is not None:
                raise taken
            await self.store.write(to_stored(record), open_source, by_order=True)
            if self._book.head(*record.key) is not None:  # a turn was quicker, and is written later
                await self.store.delete(*record.key)
                raise taken
            self.forget(self._book.put(record))
            self._book.mark_durable(record.key, replace(record.head, saved=True))

    async def update(self, key: Key, **changes: Any) -> None:
        """Change flags and make the record durable, if it or every conversation is to be so.

        Raises as `write` does; nothing is changed then.
        """
        if self._store is None or not (self._book.is_durable(key) or self.mode is PersistMode.AUTO):
            self._book.revise(key, **changes)
            return
        async with self._lock:
            record = await self._current(key, changes)
            if not len(record.token_ids):  # its first turn never got that far
                self._book.revise(key, **changes)
                return
            try:
                await self._store.put(to_stored(record))
            except LookupError:  # not all of its tokens have been written yet
                await self._write(key, False, changes)
            else:
                self._book.revise(key, **changes)
                self._book.mark_durable(key, record.head)

    async def _write(self, key: Key, by_order: bool, changes: Mapping[str, Any]) -> Written:
        store = self.store
        record = await self._current(key, changes)
        differs = record.identity.differences(self._info().identity)
        if differs:
            raise model_changed(differs)
        if not len(record.token_ids):
            raise state_not_held()
        lease = self._source.hold(record.namespace, record.token_ids)
        try:
            written = await store.write(
                to_stored(record), partial(self._source.sources, lease), by_order=by_order
            )
        except SourceGone:
            raise state_not_held() from None
        finally:
            self._source.release(lease)
        self._book.revise(key, **changes)
        head = record.head
        self._book.mark_durable(key, replace(head, saved=True) if by_order else head)
        return written

    async def _current(self, key: Key, changes: Mapping[str, Any]) -> Conversation:
        """Return the record as it is now, with some flags changed. Raises NotFound."""
        record = await self._body(key)
        if record is None:  # deleted while this waited for others to be written
            raise unknown_conversation()
        return replace(record, **changes)

    async def delete(self, key: Key) -> None:
        """Forget a conversation in memory and on disk; gone for good on return."""
        head = self._book.on_disk(key) or self._book.head(*key)
        self._book.remove(key)
        self._let_go(key)
        if self._writer is not None:
            self._writer.cancel(key)
        if self._store is None:
            self._cache.unbind(name_of(key), drop=True)
            return
        try:
            async with self._lock:  # behind a write of it under way, which also holds its state
                if self._book.head(*key) is None:  # else a new turn has the name
                    self._cache.unbind(name_of(key), drop=True)
                if not self._book.is_durable(key):  # else it has put its own there
                    await self._store.delete(*key)
        except BaseException:
            if head is not None:  # still on disk: it must not come back unseen at the next start
                self._book.learn([head])
            raise

    async def reset(self, key: Key) -> None:
        """Take from a conversation all that it held; durably, where it is on disk, on return.

        Its state stays as cache, in memory and on disk. A disk that fails is logged, and does not
        cost the turn that begins the id anew.
        """
        if self._book.remove(key) is None:
            return
        self._let_go(key)
        self._cache.unbind(name_of(key), drop=False)
        if self._store is None or self._writer is None:
            return
        self._writer.cancel(key)
        try:
            async with self._lock:  # also behind a write of it that is under way
                if not self._book.is_durable(key):  # else another turn has put its own there
                    await self._store.reset(*key)
        except KvserveError as error:
            log.warning("a conversation that began anew is still on disk: %s", error)

    def forget(self, gone: list[Conversation]) -> None:
        """Drop the references of conversations that the book has let go of."""
        for record in gone:
            self._let_go(record.key)
            self._cache.unbind(name_of(record.key), drop=False)

    def _let_go(self, key: Key) -> None:
        lease = self._leases.pop(key, None)
        if lease is not None:
            self._source.release(lease)

    def guards(self) -> dict[str, Any]:
        """Return the limits of the disk with what is used of them; no counts of others' doings."""
        figures = self.stats()
        names = {name: figures[name] for name in _GUARDS if name in figures}
        return {"persist": self.mode.value, **names}

    def stats(self) -> dict[str, Any]:
        """Return figures, JSON-able, without anything that a user wrote."""
        figures: dict[str, Any] = {"persist": self.mode.value}
        if self._store is not None and self._writer is not None:
            figures |= {**self._store.stats(), "writer": self._writer.stats()}
        return figures


def name_of(key: Key) -> tuple[str, str, str]:
    """Return what the conversation's reference is called in the cache."""
    return ("conv", *key)

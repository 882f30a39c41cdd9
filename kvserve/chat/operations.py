"""What `/v1/conv_kv` does: orders of users for conversations of their own.

No state of its own; runs on the event loop. Every order is for one tenant: another's conversation
is as unknown as one that never was. An order that has been answered is durable where conversations
are durable; one that fails has changed nothing. A turn that runs meanwhile is not disturbed, and if
it ends later it is the tip.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from kvserve.chat import branching
from kvserve.chat.archive import Archive, PersistMode
from kvserve.chat.conversations import Conversation, ConversationBook, Key, new_id
from kvserve.chat.directory import (
    ConversationDetail,
    ConversationInfo,
    ConversationPage,
    Directory,
    is_over,
)
from kvserve.chat.exporting import ExportedFile, open_file
from kvserve.chat.importing import Importer
from kvserve.chat.keeper import Keeper
from kvserve.chat.loading import Loader
from kvserve.chat.ports import Engine
from kvserve.chat.refusals import id_taken, persistence_off, unknown_conversation
from kvserve.chat.request import TurnRequest
from kvserve.chat.turn import TurnService

FLAGS = ("title", "saved", "pinned", "pinned_until", "expires_at", "used_at")
"""What changes of a conversation without a turn."""


@dataclass(frozen=True, slots=True)
class WarmedInfo:
    """A prefilled conversation, and what its prompt took: tokens reused and computed."""

    info: ConversationInfo
    num_cached: int
    num_prefill: int


class ConversationService:
    """Does what users order; one per server."""

    def __init__(
        self,
        *,
        engine: Engine,
        book: ConversationBook,
        archive: Archive,
        keeper: Keeper,
        directory: Directory,
        turns: TurnService,
        clock: Callable[[], datetime],
    ) -> None:
        self._engine = engine
        self._book = book
        self._archive = archive
        self._keeper = keeper
        self._directory = directory
        self._turns = turns
        self._clock = clock
        self._loader = Loader(engine, archive)
        self._importer = Importer(engine, archive)

    # -- looking ------------------------------------------------------------------------------

    async def page(self, tenant: str, *, limit: int, after: str | None) -> ConversationPage:
        """Return some of the tenant's conversations. Raises as `Directory.page`."""
        return await self._directory.page(tenant, self._clock(), limit=limit, after=after)

    async def detail(self, tenant: str, conversation_id: str) -> ConversationDetail:
        """Return what is held of one. Raises NotFound."""
        return await self._directory.detail(await self._get(tenant, conversation_id), self._clock())

    def stats(self) -> dict[str, Any]:
        """Return the disk's figures, JSON-able, without anything that a user wrote."""
        return self._archive.stats()

    # -- keeping ------------------------------------------------------------------------------

    async def save(
        self, tenant: str, conversation_id: str, *, title: str | None
    ) -> ConversationInfo:
        """Write what is not on disk yet and never evict it; durable on return.

        `bytes` are those on disk. Raises NotFound, Conflict, TooLarge, OutOfSpace.
        """
        record = await self._get(tenant, conversation_id)
        changes: dict[str, Any] = {"saved": True} | ({} if title is None else {"title": title})
        await self._write(record, by_order=True, **changes)
        return await self._directory.info_on_disk(
            await self._get(tenant, conversation_id), self._clock()
        )

    async def load(self, tenant: str, conversation_id: str) -> ConversationInfo:
        """Bring the state into memory. Raises NotFound, and as `Loader.load`."""
        await self._loader.load(await self._get(tenant, conversation_id))
        # Not the record from before: a turn may have moved the tip on.
        record = await self._get(tenant, conversation_id)
        self._keeper.replace(record)
        return await self._directory.info(record, self._clock())

    async def delete(self, tenant: str, conversation_id: str) -> None:
        """Forget it in memory and on disk. Raises NotFound."""
        head = self._book.head(tenant, conversation_id)
        if head is None:
            raise unknown_conversation()
        await self._keeper.delete((tenant, conversation_id))
        if is_over(head, self._clock()):
            raise unknown_conversation()

    async def pin(
        self, tenant: str, conversation_id: str, *, ttl_s: float | None
    ) -> ConversationInfo:
        """Write it, and let nothing evict it, for some time or until it is unpinned.

        Raises NotFound, Conflict, TooLarge, OutOfSpace.
        """
        record = await self._get(tenant, conversation_id)
        until = None if ttl_s is None else self._clock() + timedelta(seconds=ttl_s)
        await self._write(record, by_order=False, pinned=True, pinned_until=until)
        return await self._info(record.key)

    async def unpin(self, tenant: str, conversation_id: str) -> ConversationInfo:
        """Take the pin away, if there is one. Raises NotFound."""
        record = await self._get(tenant, conversation_id)
        await self._archive.update(record.key, pinned=False, pinned_until=None)
        return await self._info(record.key)

    # -- branches -----------------------------------------------------------------------------

    async def fork(
        self, tenant: str, conversation_id: str, *, new_name: str | None, at_message: int | None
    ) -> ConversationInfo:
        """Return a new conversation that shares all state with this one, up to a message.

        Raises NotFound, Conflict if the new id is taken, and as `branching.fork`.
        """
        source = await self._get(tenant, conversation_id)
        key = (tenant, new_id() if new_name is None else new_name)
        await self._check_free(key, "new_id")
        made = branching.fork(source, key[1], self._clock(), at_message=at_message)
        self._keeper.replace(made)
        # Who names no conversation meant the one that was there before.
        self._book.prefer(source.key)
        try:
            await self._archive.update(key)
        except BaseException:
            if self._still(made):
                await self._keeper.delete(key)
            raise
        return await self._info(key)

    async def rollback(
        self,
        tenant: str,
        conversation_id: str,
        *,
        to_message: int | None,
        drop_turns: int | None,
    ) -> ConversationInfo:
        """Take the conversation back to an earlier message.

        Raises NotFound, and as `branching.rollback`.
        """
        before = await self._get(tenant, conversation_id)
        after = branching.rollback(before, to_message=to_message, drop_turns=drop_turns)
        self._keeper.replace(after)
        try:
            await self._archive.update(after.key)
        except BaseException:
            now = self._book.head(*after.key)
            if now is not None and self._still(after):  # but for flags that changed meanwhile
                flags = {name: getattr(now, name) for name in FLAGS}
                self._keeper.replace(replace(before, **flags))
            raise
        return await self._info(after.key)

    # -- coming and going ---------------------------------------------------------------------

    async def warm(self, request: TurnRequest, *, ttl_s: float | None, pin: bool) -> WarmedInfo:
        """Prefill a prompt as a conversation, which ends after `ttl_s`.

        Raises as `TurnService.warm`, and for `pin` as `pin`; the prompt is in memory then.
        """
        if pin:
            self._check_on()
        warmed = await self._turns.warm(request)
        key = warmed.conversation.key
        # Before anything is awaited: what is written behind the prefill must have it already.
        ends = None if ttl_s is None else self._clock() + timedelta(seconds=ttl_s)
        self._book.revise(key, expires_at=ends)
        if pin:
            await self._archive.write(key, by_order=False, pinned=True, pinned_until=None)
        return WarmedInfo(await self._info(key), warmed.num_cached, warmed.num_prefill)

    async def export(self, tenant: str, conversation_id: str) -> ExportedFile:
        """Return one file with all of the conversation, to be streamed.

        What is not on disk yet is written first. Raises NotFound, Conflict, Damaged, TooLarge,
        OutOfSpace.
        """
        record = await self._get(tenant, conversation_id)
        await self._write(record, by_order=False)
        return await open_file(self._archive, record)

    async def import_(
        self,
        tenant: str,
        chunks: AsyncIterator[bytes],
        *,
        new_name: str | None,
        declared: int | None,
    ) -> ConversationInfo:
        """Take in an exported file as a new conversation; durable on return.

        Its id is `new_name`, or that in the file; `declared` is its size, if that is known. `bytes`
        are those on disk. Raises Conflict (mode `off`; id taken; another model), Damaged, TooLarge,
        OutOfSpace, and what `chunks` raises.
        """
        if new_name is not None:  # before the whole file has come in
            await self._check_free((tenant, new_name), "id")
        record = await self._importer.bring(
            chunks, tenant, new_name, now=self._clock(), declared=declared
        )
        return await self._directory.info_on_disk(record, self._clock())

    # -- helping ------------------------------------------------------------------------------

    async def _check_free(self, key: Key, param: str) -> None:
        if await self._archive.fetch(*key) is not None:
            raise id_taken(key[1], param)

    def _still(self, record: Conversation) -> bool:
        """Whether no turn has made anything else of the conversation since."""
        current = self._book.find(*record.key)
        return current is not None and current.token_ids is record.token_ids

    async def _get(self, tenant: str, conversation_id: str) -> Conversation:
        record = await self._archive.fetch(tenant, conversation_id)
        if record is None:
            raise unknown_conversation()
        return record

    async def _info(self, key: Key) -> ConversationInfo:
        return await self._directory.info(await self._get(*key), self._clock())

    def _check_on(self) -> None:
        if self._archive.mode is PersistMode.OFF:
            raise persistence_off()

    async def _write(self, record: Conversation, *, by_order: bool, **changes: Any) -> None:
        """Write state and record; the record alone where another model made the state."""
        self._check_on()
        if record.identity == self._engine.info.identity:
            await self._archive.write(record.key, by_order=by_order, **changes)
        else:  # it came from disk and is there
            await self._archive.update(record.key, **changes)

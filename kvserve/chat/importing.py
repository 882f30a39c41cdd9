"""Taking in a conversation that another server exported.

State: the upload at hand, on disk. Runs on the event loop; files are read and written in worker
threads. The file was made by a stranger: it is verified to its last byte before anything of it is
used, and becomes a conversation of whoever sent it, in that tenant's namespace.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from itertools import pairwise

from kvserve.chat.archive import Archive
from kvserve.chat.conversations import Conversation
from kvserve.chat.ports import Engine
from kvserve.chat.records import from_stored
from kvserve.chat.refusals import model_changed, unreadable_upload
from kvserve.chat.request import namespace_of
from kvserve.store.errors import SnapshotDamaged
from kvserve.store.offload import offload
from kvserve.store.staging import stage
from kvserve.store.transfer import Staged

_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Importer:
    """Imports conversations of the engine's model."""

    def __init__(self, engine: Engine, archive: Archive) -> None:
        self._engine = engine
        self._archive = archive

    async def bring(
        self,
        chunks: AsyncIterator[bytes],
        tenant: str,
        conversation_id: str | None,
        *,
        now: datetime,
        declared: int | None,
    ) -> Conversation:
        """Return the uploaded conversation, durable and kept as if saved by order.

        Its id is `conversation_id`, or that in the file. Raises Conflict (mode `off`, id taken,
        another model), Damaged, TooLarge, OutOfSpace, and what `chunks` raises.
        """
        store = self._archive.store
        disk = store.shelves.disk
        path = await stage(disk, store.folder.imports, store.limits, chunks, declared=declared)
        try:
            async with Staged(disk, path) as staged:
                return await self._admit(staged, tenant, conversation_id, now)
        except SnapshotDamaged as damage:
            raise unreadable_upload(damage.reason) from None
        finally:
            with suppress(OSError):  # then the next start removes it
                await offload(disk.unlink, path)

    async def _admit(
        self, staged: Staged, tenant: str, conversation_id: str | None, now: datetime
    ) -> Conversation:
        differs = staged.header.identity.differences(self._engine.info.identity)
        if differs:
            raise model_changed(differs)
        # In a thread: a long one has many messages.
        found = await offload(_record, staged, tenant, conversation_id, now)
        record = replace(found, saved=True)
        await self._archive.admit(record, staged.open_source)
        return record


def _record(staged: Staged, tenant: str, name: str | None, now: datetime) -> Conversation:
    """Return what the file says as a conversation of a tenant. Raises Damaged."""
    found = from_stored(
        staged.conversation(
            tenant=tenant,
            namespace=namespace_of(tenant, None),
            id=staged.carried.id if name is None else name,
            now=now,
        )
    )
    check_record(found)
    return found


def check_record(record: Conversation) -> None:
    """Raise Damaged for a record that no kvserve has written."""
    ends = [0, *(cut.position for cut in record.cuts)]
    ascending = all(before < after for before, after in pairwise(ends))
    if not (_ID.fullmatch(record.id) and record.roles and ascending):
        raise unreadable_upload("record")

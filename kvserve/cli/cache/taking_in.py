"""`kvserve cache import` into a stopped store: a file becomes a conversation, as through a server.

State: the open file. It was made by a stranger, so it is verified to its last byte before anything
of it is used; it stays open meanwhile, so that what is taken in is what was verified.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from kvserve.api.identity import checked_id
from kvserve.chat.importing import check_record
from kvserve.chat.records import from_stored
from kvserve.chat.request import namespace_of
from kvserve.cli.cache.place import Progress, Refused, Unusable
from kvserve.store.errors import SnapshotDamaged
from kvserve.store.offload import offload
from kvserve.store.records import ConversationHead
from kvserve.store.segments import Buffer, SegmentSource, SegmentSpec, StoredPath
from kvserve.store.store import OpenSource, Store
from kvserve.store.transfer import Staged


async def take_in(
    store: Store, file: Path, tenant: str, conversation_id: str | None, progress: Progress
) -> ConversationHead:
    """Return the conversation, durable and kept as if saved by order.

    Its id is `conversation_id`, or that in the file. Raises Unusable for a file that is not sound
    and Refused for an id that is taken; guards refuse as for a save.
    """
    nbytes = (await offload(file.stat)).st_size
    try:
        async with Staged(store.shelves.disk, file) as staged:
            stored = staged.conversation(
                tenant=tenant,
                namespace=namespace_of(tenant, None),
                id=staged.carried.id if conversation_id is None else conversation_id,
                now=datetime.now(UTC),
            )
            head = stored.head
            checked_id(head.id, source="--id")
            check_record(from_stored(stored))
            if await store.find(tenant, head.id) is not None:
                raise Refused(f"there is a conversation {head.id} already; give another --id")
            await store.write(stored, _told(staged, nbytes, progress), by_order=True)
    except SnapshotDamaged as error:
        why = str(error).removeprefix("run 0: ")
        raise Unusable(f"{file} is not an exported conversation, or damaged: {why}") from error
    return replace(head, saved=True)


def _told(staged: Staged, nbytes: int, progress: Progress) -> OpenSource:
    """Return what opens a verified file's segments and tells how many of its bytes were read."""
    done = 0

    class Told:
        def __init__(self, source: SegmentSource) -> None:
            self._source = source

        @property
        def specs(self) -> Sequence[SegmentSpec]:
            return self._source.specs

        async def data(self, index: int) -> Sequence[Buffer]:
            nonlocal done
            done += self._source.specs[index].nbytes
            progress(done, nbytes)
            return await self._source.data(index)

    async def sources(
        path: StoredPath, ranges: Sequence[tuple[int, int]]
    ) -> Sequence[SegmentSource]:
        return [Told(staged.source(start, end)) for start, end in ranges]

    return sources

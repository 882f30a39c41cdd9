"""A conversation on its way out, as one file.

State: the files it reads, from the first piece on until it is closed. Runs on the event loop; files
are read in worker threads.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import cast

from kvserve.chat.archive import Archive
from kvserve.chat.conversations import Conversation
from kvserve.store.errors import SnapshotDamaged
from kvserve.store.transfer import Export


class ExportedFile:
    """`nbytes` in pieces; iterate it once, and close what `aiter` gives.

    Iteration raises Damaged where a file below proves bad; what came before is no whole file, and
    every importer refuses it.
    """

    def __init__(self, archive: Archive, record: Conversation, export: Export) -> None:
        self.nbytes = export.nbytes
        self._archive = archive
        self._record = record
        self._export = export

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            blocks = cast(AsyncGenerator[bytes, None], aiter(self._export))
            async with aclosing(blocks):  # it has a file open
                async for block in blocks:
                    yield block
        except SnapshotDamaged as damage:
            raise await self._archive.damage(self._record, damage) from None


async def open_file(archive: Archive, record: Conversation) -> ExportedFile:
    """Return what the disk has of a conversation as a file. Raises NotFound, Damaged, TooLarge."""
    try:
        export = await archive.store.export(*record.key)
    except SnapshotDamaged as damage:
        raise await archive.damage(record, damage) from None
    return ExportedFile(archive, record, export)

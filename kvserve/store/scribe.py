"""One write, from the question what is missing to the transaction that makes it known.

State: none but counts. Runs on the event loop under the store's lock; files are written in worker
threads. The order is the promise: files durable, then the transaction that names them. What fails
on the way takes its files back, or leaves them nameless for the sweep.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime

from kvserve.store import writing
from kvserve.store.catalog import Catalog
from kvserve.store.errors import IndexFailed, TreeChanged
from kvserve.store.guards import Limits
from kvserve.store.offload import offload
from kvserve.store.reader import Reader
from kvserve.store.records import StoredConversation
from kvserve.store.room import make_room, survey
from kvserve.store.runs import RunFile, Walk
from kvserve.store.segments import SegmentSource, StoredPath
from kvserve.store.shelves import Shelves
from kvserve.store.snapshot import write_snapshot
from kvserve.store.snapshot_header import SnapshotHeader

OpenSource = Callable[[StoredPath, Sequence[tuple[int, int]]], Awaitable[Sequence[SegmentSource]]]
"""Returns a source for each of the token ranges behind the path. Raises SourceGone."""


@dataclass(frozen=True, slots=True)
class Written:
    """What a write has put on disk: file bytes, and tokens of the conversation now durable."""

    nbytes: int
    num_tokens: int
    num_files: int


class Scribe:
    """Writes conversations into one data folder; evictions are added to `counts`."""

    def __init__(
        self,
        catalog: Catalog,
        shelves: Shelves,
        reader: Reader,
        limits: Limits,
        counts: Counter[str],
    ) -> None:
        self._catalog = catalog
        self._shelves = shelves
        self._reader = reader
        self._limits = limits
        self._counts = counts

    async def write(
        self, conversation: StoredConversation, open_source: OpenSource, now: datetime
    ) -> Written:
        """Write what is missing, and the record.

        Raises OSError, IndexFailed, and what `Store.write` does.
        """
        try:
            return await self._write(conversation, open_source, now)
        except TreeChanged:
            # With what was evicted for it, rows of its path went that nothing else needed.
            return await self._write(conversation, open_source, now)

    async def _write(
        self, conversation: StoredConversation, open_source: OpenSource, now: datetime
    ) -> Written:
        head, token_ids = conversation.head, conversation.token_ids
        walk = await self._catalog.walk(head.identity, head.namespace, token_ids)
        gaps = writing.gaps(walk, len(token_ids))
        ranges = [(gap.start, gap.end) for gap in gaps]
        sources = await open_source(walk.path, ranges) if ranges else ()
        headers = [
            writing.header(gap, head.identity, head.namespace, token_ids, source.specs)
            for gap, source in zip(gaps, sources, strict=True)
        ]
        await self._make_room(walk, headers, now)
        files: list[RunFile] = []
        try:
            for header, source in zip(headers, sources, strict=True):
                files.append(await self._write_file(header, source))
            keys = [header.key for header in headers]
            whole = list(zip(gaps, keys, files, strict=True))
            await self._catalog.commit(writing.commit(walk, conversation, whole, now))
        except BaseException:
            await self._take_back([file.file for file in files])
            raise
        for gap in gaps:
            if gap.run is not None:
                self._reader.forget(gap.run.id)
        return Written(sum(file.nbytes for file in files), head.num_tokens, len(files))

    async def _make_room(
        self, walk: Walk, headers: Sequence[SnapshotHeader], now: datetime
    ) -> None:
        """Let the guards decide, and evict if they say so."""
        new_nbytes = sum([await offload(header.file_nbytes) for header in headers])
        situation = await survey(
            self._catalog,
            self._shelves,
            new_nbytes=new_nbytes,
            path_nbytes=new_nbytes + sum(at.run.nbytes for at in walk.runs),
            now=now,
        )
        self._counts["evicted"] += await make_room(
            self._catalog,
            self._shelves,
            self._limits,
            situation,
            keep={at.run.id for at in walk.runs},
            now=now,
        )

    async def _write_file(self, header: SnapshotHeader, source: SegmentSource) -> RunFile:
        name = writing.file_name(header.key, header.start)
        self._shelves.expect(name)
        sealed = await write_snapshot(
            self._shelves.disk,
            header,
            source,
            target=self._shelves.folder.of(name),
            drafts=self._shelves.folder.drafts,
        )
        return RunFile(file=name, nbytes=sealed.nbytes, digest=sealed.digest, specs=header.segments)

    async def _take_back(self, files: Sequence[str]) -> None:
        """Remove files of a write that failed, unless its transaction has come to pass after all.

        Where the index cannot be asked they stay, and are swept at the next start.
        """
        if not files:
            return
        try:
            known = await self._catalog.known_files(files)
        except IndexFailed:
            return
        await offload(self._shelves.remove, [file for file in files if file not in known])

"""The conversations on disk: one object through which everything else uses them.

State: the lock on the data folder, the index, what was last counted, and how often things happened.
Writing is `kvserve.store.scribe`'s, reading `kvserve.store.reader`'s. Owned by the event loop;
files are touched in worker threads only. Every change goes through one `asyncio.Lock`, so that what
a write found out still holds when it commits. Questions do not wait for it.

On a write the files are durable before the transaction that names them; on a deletion the
transaction comes first. Whatever fails in between leaves files that nobody names, which
`kvserve.store.upkeep.sweep` removes, and never a name without its file. Eviction that a write made
necessary stays even if the disk then fails it: what was evicted is cache.

Does not decide when to write (`kvserve.store.writer`, `kvserve.chat.archive`) nor what the state of
a token range is (the `SegmentSource`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Unpack

from kvserve.core.errors import NotFound, OutOfSpace, TooLarge
from kvserve.core.identity import ModelIdentity
from kvserve.core.types import TokenIds
from kvserve.store import upkeep
from kvserve.store.catalog import Catalog, Key
from kvserve.store.catalog_conversations import Changes
from kvserve.store.disk import Disk
from kvserve.store.errors import IndexDamaged, IndexFailed, SnapshotDamaged, StoreError
from kvserve.store.failures import disk_failed, index_failed
from kvserve.store.folder import DataFolder
from kvserve.store.guards import Limits
from kvserve.store.lock import StoreLock
from kvserve.store.offload import offload
from kvserve.store.opening import open_index
from kvserve.store.reader import Reader
from kvserve.store.records import ConversationHead, StoredConversation
from kvserve.store.runs import Kin, PathUsage, Totals
from kvserve.store.scribe import OpenSource, Scribe, Written
from kvserve.store.segments import PackedSegment, StoredPath, StoredSegment
from kvserve.store.shelves import Shelves
from kvserve.store.snapshot import verify_file
from kvserve.store.transfer import Export, ExportPart, open_export
from kvserve.store.upkeep import Progress, UpkeepReport, expected_of

__all__ = ["OpenSource", "Store", "Written", "utc_now"]

logger = logging.getLogger(__name__)

REMEMBERED = timedelta(days=1)
"""So long after its end a conversation's name is still known as expired."""


def utc_now() -> datetime:
    return datetime.now(UTC)


class Store:
    """The store of one data folder. Use `open`; close it in the same event loop."""

    def __init__(
        self,
        shelves: Shelves,
        catalog: Catalog,
        lock: StoreLock,
        *,
        identity: ModelIdentity | None,
        limits: Limits,
        clock: Callable[[], datetime],
    ) -> None:
        self.catalog = catalog
        self.shelves = shelves
        self.limits = limits
        self.identity = identity
        self._disk = shelves.disk
        self._process_lock = lock
        self._clock = clock
        self._change = asyncio.Lock()
        self._counts: Counter[str] = Counter()
        self._index_damaged = False
        self._reader = Reader(shelves)
        self._scribe = Scribe(catalog, shelves, self._reader, limits, self._counts)
        self._totals = Totals(0, 0, 0, 0, 0, 0)
        self._volume = (0, 0)

    @classmethod
    async def open(
        cls,
        folder: Path,
        *,
        identity: ModelIdentity | None,
        limits: Limits,
        disk: Disk | None = None,
        clock: Callable[[], datetime] = utc_now,
    ) -> Store:
        """Lock the folder, bring its index up to date, and return the store.

        No snapshot is opened or listed. A damaged index is moved aside and made again from the
        files' headers, which takes its time. `identity` is that of the loaded model; without one,
        everything works but `walk`. Raises StoreLocked, SchemaTooNew, StoreError.
        """
        place = DataFolder(folder)
        shelves = Shelves(disk if disk is not None else Disk(), place)
        await offload(shelves.prepare)
        lock = await offload(StoreLock.acquire, place.path)
        try:
            await offload(shelves.clear)
            catalog = await open_index(shelves, clock())
            store = cls(shelves, catalog, lock, identity=identity, limits=limits, clock=clock)
            try:
                await store._recount()
            except BaseException:
                await catalog.aclose()
                raise
        except BaseException as error:
            lock.release()
            if isinstance(error, IndexFailed | OSError):
                raise StoreError(f"The data folder cannot be used: {error}.") from error
            raise
        return store

    async def aclose(self) -> None:
        """Wait for the change under way, then let go of the index and the folder; idempotent.

        An index that proved damaged meanwhile is made again at the next start.
        """
        async with self._change:
            await self.catalog.aclose()
            if self._index_damaged:
                await offload(self.shelves.suspect_index)
            self._process_lock.release()

    def announce(self, url: str) -> None:
        """Write into the lock file where this process can be reached."""
        self._process_lock.announce(url)

    @property
    def folder(self) -> DataFolder:
        return self.shelves.folder

    # -- questions ----------------------------------------------------------------------------

    async def heads(self) -> list[ConversationHead]:
        """Return all conversations, but for those whose time is over and those that were reset."""
        now = self._clock()
        with self._in_words():
            return [head for head in await self.catalog.heads() if not _is_gone(head, now)]

    async def find(self, tenant: str, id: str) -> StoredConversation | None:
        """Return a conversation whole, unless its time is over or it was reset."""
        with self._in_words():
            found = await self.catalog.find(tenant, id)
        return None if found is None or _is_gone(found.head, self._clock()) else found

    async def find_expired(self, tenant: str, id: str) -> bool:
        """Whether there was such a conversation whose time ended within the last day."""
        with self._in_words():
            found = await self.catalog.find(tenant, id)
        if found is None or found.head.expires_at is None:
            return False
        now = self._clock()
        return found.head.expires_at <= now < found.head.expires_at + REMEMBERED

    async def walk(self, namespace: bytes, token_ids: TokenIds) -> StoredPath:
        """Return how far the disk knows a prompt of this store's model.

        An index that cannot be read makes it a miss, counted and logged.
        """
        assert self.identity is not None, "opened without a model"
        try:
            walk = await self.catalog.walk(self.identity, namespace, token_ids)
        except IndexFailed as error:
            self._note_index(error)
            logger.warning("the index could not be asked: %s", error)
            return StoredPath(namespace, token_ids, 0, ())
        self._reader.learn(walk.runs, self.identity)
        return walk.path

    def read(self, segments: Sequence[StoredSegment]) -> list[PackedSegment]:
        """Return segments that a walk has found, each verified, in the order given.

        For worker threads; any number at a time. Raises SnapshotDamaged, "missing" for one that
        was evicted since.
        """
        return self._reader.read(segments)

    async def disk_usage_of(self, heads: Sequence[Key]) -> dict[Key, PathUsage]:
        """Return what conversations hold on disk; unknown ones are left out."""
        with self._in_words():
            return await self.catalog.usage(heads)

    async def kin(self, tenant: str, id: str, since: int) -> Sequence[Kin]:
        """Return the tenant's conversations that share at least `since` tokens with one of them."""
        with self._in_words():
            return await self.catalog.kin(tenant, id, since)

    def stats(self) -> dict[str, Any]:
        """Return figures, JSON-able, without anything that a user wrote."""
        totals, (used, free) = self._totals, self._volume
        names = ("writes", "failed", "refused", "evicted", "quarantined", "index_failures")
        return {
            "conversations": totals.num_conversations,
            "runs": totals.num_runs,
            "files": totals.num_files,
            "stored_bytes": totals.nbytes,
            "budget_bytes": self.limits.store_nbytes,
            "written_today_bytes": totals.today_nbytes,
            "written_total_bytes": totals.written_nbytes,
            "daily_budget_bytes": self.limits.daily_nbytes,
            "save_limit_bytes": self.limits.save_nbytes,
            "disk_used_bytes": used,
            "disk_free_bytes": free,
            "disk_limit_bytes": int((used + free) * self.limits.disk_share),
            **{name: self._counts[name] for name in names},
        }

    # -- writing ------------------------------------------------------------------------------

    async def write(
        self, conversation: StoredConversation, open_source: OpenSource, *, by_order: bool
    ) -> Written:
        """Put what is missing of a conversation's state on disk, and its record; durable on return.

        `by_order` marks it as saved: never evicted from now on. Raises TooLarge and OutOfSpace
        with the figures, RequestFailed when the disk or the index fails, SourceGone, and whatever
        the source raises; the conversation is then on disk as it was before.
        """
        if by_order:
            conversation = replace(conversation, head=replace(conversation.head, saved=True))
        begun = time.perf_counter()
        async with self._changing():
            written = await self._scribe.write(conversation, open_source, self._clock())
            self._counts["writes"] += 1
        logger.info(
            "wrote %d tokens: %d bytes in %d files, %.0f ms",
            *(written.num_tokens, written.nbytes, written.num_files),
            (time.perf_counter() - begun) * 1000,
        )
        return written

    async def put(self, conversation: StoredConversation) -> None:
        """Keep a record whose tokens the disk knows already. Raises LookupError otherwise."""
        async with self._changing():
            await self.catalog.put(conversation)

    async def set_flags(self, tenant: str, id: str, **changes: Unpack[Changes]) -> bool:
        """Change title, saved, pinned, pinned_until or expires_at; return whether it is known."""
        async with self._changing():
            return await self.catalog.change(tenant, id, **changes)

    async def touch(self, used: Mapping[Key, datetime]) -> None:
        """Note when conversations were used last, many at a time."""
        async with self._changing():
            await self.catalog.touch(used)

    async def delete(self, tenant: str, id: str) -> bool:
        """Delete a conversation and the files that only it used; return whether it was known.

        Of one whose time is over the name alone is kept, for `find_expired`.
        """
        async with self._changing():
            expired = await self.find_expired(tenant, id)
            forget = self.catalog.empty if expired else self.catalog.delete
            files = await forget(tenant, id)
            await offload(self.shelves.remove, files or ())
            return files is not None

    async def reset(self, tenant: str, id: str) -> None:
        """Take tokens, messages and flags from a conversation, which is unknown then.

        Its runs stay as cache, and are deleted with whatever is written under its name.
        """
        async with self._changing():
            await self.catalog.reset(tenant, id)

    async def quarantine(self, run_id: int, reason: str) -> None:
        """Take a run's file out of use if it is bad indeed; `reason` is for the log.

        It is verified once more first: by the time of a report the run may have been evicted, or
        written anew, or the disk may have come back.
        """
        async with self._changing():
            record = await self.catalog.record(run_id)
            if record is None or record.run.file is None:
                return
            path = self.folder.of(record.run.file)
            expected = expected_of(record.run, record.identity)
            try:
                await offload(verify_file, self._disk, path, run_id=run_id, expected=expected)
            except SnapshotDamaged as error:
                file = await self.catalog.quarantine(run_id)
                self._reader.forget(run_id)
                self._counts["quarantined"] += 1
                if file is not None:
                    await offload(self.shelves.set_aside, file)
                logger.error("run %d quarantined: %s (reported: %s)", run_id, error, reason)

    async def distrust(self, namespace: bytes, token_ids: TokenIds) -> int:
        """Take a path that gave wrong replies out of use, with all that was computed behind it.

        Its files are whole, so that nothing but their content can be blamed; returns how many.
        """
        path = await self.walk(namespace, token_ids)
        if not path.segments:
            return 0
        async with self._changing():
            files = await self.catalog.distrust(path.segments[0].run_id)
            for run_id, file in files.items():
                self._reader.forget(run_id)
                await offload(self.shelves.set_aside, file)
            self._counts["quarantined"] += len(files)
        return len(files)

    # -- transfer -----------------------------------------------------------------------------

    async def export(self, tenant: str, id: str) -> Export:
        """Return a conversation as one file, ready to be streamed.

        Raises NotFound, SnapshotDamaged ("missing" where state was evicted), TooLarge for one that
        is too long for a file.
        """
        with self._in_words():
            whole = await self.catalog.whole(tenant, id)
        if whole is None or not whole[1] or _is_gone(whole[0].head, self._clock()):
            raise NotFound("There is no such conversation on disk.", code="unknown_conversation")
        found, path = whole
        parts = []
        for at in path:
            if at.run.file is None:
                raise SnapshotDamaged(at.run.id, "missing", at.run.state)
            parts.append(
                ExportPart(
                    run_id=at.run.id,
                    path=self.folder.of(at.run.file),
                    expected=expected_of(at.run, found.head.identity),
                    end=at.until,
                )
            )
        return await open_export(self._disk, found, parts)

    # -- upkeep -------------------------------------------------------------------------------

    async def sweep(self) -> UpkeepReport:
        """Remove what crashes, failures and time have left behind; for the background.

        Works in short steps, so that writes are not held up.
        """
        return await self._recounted(upkeep.sweep(self._upkeep()))

    def verify(self) -> AsyncIterator[Progress]:
        """Compare every row with its file and every file with its row; changes nothing."""
        return upkeep.verify(self.catalog, self.shelves)

    async def repair(self, progress: Callable[[Progress], None] | None = None) -> UpkeepReport:
        """Quarantine what is bad, make rows for good files without one, and sweep."""
        return await self._recounted(upkeep.repair(self._upkeep(), progress))

    async def gc(self) -> UpkeepReport:
        """Delete everything that no conversation uses, and conversations whose time is over."""
        return await self._recounted(upkeep.gc(self._upkeep()))

    async def _recounted(self, work: Awaitable[UpkeepReport]) -> UpkeepReport:
        with self._in_words():
            report = await work
        await self._recount()
        return report

    def _upkeep(self) -> upkeep.Upkeep:
        return upkeep.Upkeep(
            catalog=self.catalog,
            shelves=self.shelves,
            change=self._change,
            clock=self._clock,
            remembered=REMEMBERED,
            quarantine=self.quarantine,
        )

    # -- inside -------------------------------------------------------------------------------

    @asynccontextmanager
    async def _changing(self) -> AsyncIterator[None]:
        """The one change at a time."""
        async with self._change:
            try:
                with self._in_words():
                    yield
            except (OutOfSpace, TooLarge):
                self._counts["refused"] += 1
                raise
            finally:
                await self._recount()

    @contextmanager
    def _in_words(self) -> Iterator[None]:
        """Let failures of disk and index out as answers for a client."""
        try:
            yield
        except OSError as error:
            self._counts["failed"] += 1
            raise disk_failed(error, *self._volume) from error
        except IndexFailed as error:
            self._note_index(error)
            self._counts["failed"] += 1
            raise index_failed(error, *self._volume) from error

    def _note_index(self, error: IndexFailed) -> None:
        self._counts["index_failures"] += 1
        self._index_damaged |= isinstance(error, IndexDamaged)

    async def _recount(self) -> None:
        """Bring the figures up to date; they stay as they were where that fails."""
        try:
            self._totals = await self.catalog.totals(self._clock())
            volume = await offload(self._disk.usage, self.folder.path)
            self._volume = (volume.used, volume.free)
        except (IndexFailed, OSError) as error:
            logger.warning("the figures of the store are old: %s", error)


def _is_gone(head: ConversationHead, now: datetime) -> bool:
    """Whether of a conversation only the name is left: its time is over, or it was reset."""
    empty = not head.num_messages and not head.num_tokens
    return empty or (head.expires_at is not None and head.expires_at <= now)

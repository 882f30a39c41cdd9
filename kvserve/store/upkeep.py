"""Looking after the store: verify, sweep, repair, gc.

State: none; `Upkeep` holds what they work on. Works in short steps beside running requests: what
changes anything takes the store's lock for one folder, one file or one transaction at a time, and
looks again under it, because the world may have moved since. `verify` takes no lock and changes
nothing, so it may also run on an index that another process works with.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

import numpy as np

from kvserve.core.identity import ModelIdentity
from kvserve.store.catalog import Catalog
from kvserve.store.errors import SnapshotDamaged
from kvserve.store.offload import offload
from kvserve.store.opening import restore_rows
from kvserve.store.runs import Run, RunRecord
from kvserve.store.shelves import Shelves
from kvserve.store.snapshot import Expected, verify_file
from kvserve.store.snapshot_header import SnapshotHeader

logger = logging.getLogger(__name__)

UNUSED = timedelta(days=7)
"""So long a branch that no conversation is on any more is kept as cache; `gc` does not wait."""

BATCH_RUNS = 64
BATCH_NBYTES = 64 * 2**20
"""At most so many files, or bytes of them unless one is larger, are verified in one go."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that is not as it should be: of a run, of a file, or of the index (neither)."""

    run_id: int | None
    file: str | None
    detail: str


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a verification has come, and what it has found wrong since the last of these."""

    done_nbytes: int
    total_nbytes: int
    faults: tuple[Fault, ...] = ()


@dataclass(frozen=True, slots=True)
class UpkeepReport:
    """What was done. `freed_nbytes` are file bytes; `left` are faults that remain, in words."""

    removed_files: int = 0
    freed_nbytes: int = 0
    quarantined: int = 0
    restored: int = 0
    expired: int = 0
    left: tuple[str, ...] = ()

    def plus(self, other: UpkeepReport) -> UpkeepReport:
        return UpkeepReport(
            self.removed_files + other.removed_files,
            self.freed_nbytes + other.freed_nbytes,
            self.quarantined + other.quarantined,
            self.restored + other.restored,
            self.expired + other.expired,
            self.left + other.left,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Upkeep:
    """What upkeep works on: parts of an open store, and its lock `change`."""

    catalog: Catalog
    shelves: Shelves
    change: asyncio.Lock
    clock: Callable[[], datetime]
    remembered: timedelta
    quarantine: Callable[[int, str], Awaitable[None]]

    async def remove(self, files: list[str]) -> UpkeepReport:
        """Remove files that the index has let go of; the lock is held."""
        freed = sum([await offload(self.shelves.nbytes, file) for file in files])
        return UpkeepReport(await offload(self.shelves.remove, files), freed)


def expected_of(run: Run, identity: ModelIdentity) -> Expected:
    """Return what the file of a run has to say of itself."""
    return Expected(
        key=run.key,
        start=run.start,
        end=run.end,
        identity=identity.digest(),
        content=run.digest,
    )


# -- looking ------------------------------------------------------------------------------------


async def verify(catalog: Catalog, shelves: Shelves) -> AsyncIterator[Progress]:
    """Yield how far it is, and every fault: of the index, of files with a row, of files without."""
    unknown = set(await offload(shelves.files))
    unknown -= await catalog.known_files(unknown)
    total, sizes = 0, []
    async for chunk in catalog.runs():
        present = [run for run in chunk if run.file is not None]
        sizes += [(run.id, run.nbytes) for run in present]
        total += sum(run.nbytes for run in present)
    faults = tuple(Fault(None, None, words) for words in await catalog.check())
    yield Progress(0, total, faults)
    done = 0
    for batch in _batches(sizes):
        known = await catalog.records([run_id for run_id, _ in batch])
        bad = await offload(_bad_ones, shelves, list(known.values()))
        # Looked at again, by a row that is not as old as this batch.
        found = [await _fault_of(catalog, shelves, run_id) for run_id in bad]
        done += sum(nbytes for _, nbytes in batch)
        yield Progress(done, total, tuple(fault for fault in found if fault is not None))
    # Once more: a write may have been between its file and its row when the folder was read.
    unknown -= await catalog.known_files(unknown)
    strays = [file for file in sorted(unknown) if await offload(shelves.nbytes, file)]
    yield Progress(
        total, total, tuple(Fault(None, file, "a file without a row") for file in strays)
    )


def _batches(sizes: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Yield runs with the bytes of their files, as many as may be looked at in one go."""
    batch: list[tuple[int, int]] = []
    room = BATCH_NBYTES
    for run_id, nbytes in sizes:
        if batch and (len(batch) == BATCH_RUNS or nbytes > room):
            yield batch
            batch, room = [], BATCH_NBYTES
        batch.append((run_id, nbytes))
        room -= nbytes
    if batch:
        yield batch


def _bad_ones(shelves: Shelves, records: Sequence[RunRecord]) -> list[int]:
    """Return the runs whose file is not the one that the row means. Blocks."""
    return [
        record.run.id
        for record in records
        if record.run.file is not None and _detail(shelves, record, record.run.file) is not None
    ]


def _detail(shelves: Shelves, record: RunRecord, file: str) -> str | None:
    """Return what is wrong with the file of a run, in words. Blocks."""
    expected = expected_of(record.run, record.identity)
    try:
        path = shelves.folder.of(file)
        header = verify_file(shelves.disk, path, run_id=record.run.id, expected=expected)
    except SnapshotDamaged as error:
        return str(error)
    return _difference(record, header)


async def _fault_of(catalog: Catalog, shelves: Shelves, run_id: int) -> Fault | None:
    """Return what is wrong with a run's file; None, too, if it lost its file meanwhile."""
    record = await catalog.record(run_id)
    if record is None or record.run.file is None:
        return None
    file = record.run.file
    detail = await offload(_detail, shelves, record, file)
    if detail is None:
        return None
    again = await catalog.record(run_id)
    if again is None or again.run.file is None:
        return None
    return Fault(run_id, file, detail)


def _difference(record: RunRecord, header: SnapshotHeader) -> str | None:
    """Return in what a sound file is not the one that the row means."""
    run = record.run
    if header.namespace != record.namespace:
        return "namespaces differ"
    if not np.array_equal(header.token_ids, record.tokens):
        return "tokens differ"
    if header.content_digest != run.digest or header.file_nbytes() != run.nbytes:
        return "contents differ"
    rows = [
        (s.start, s.end, s.nbytes, s.restorable, s.whole, dict(s.windows)) for s in run.segments
    ]
    own = [
        (s.start, s.end, s.nbytes, s.restorable, s.whole, dict(s.windows)) for s in header.segments
    ]
    return None if rows == own else "segments differ"


# -- mending ------------------------------------------------------------------------------------


async def sweep(work: Upkeep) -> UpkeepReport:
    """Remove files without rows, branches long left, and what is left of expired conversations."""
    report = await _end_expired(work)
    report = report.plus(await _collect(work, before=work.clock() - UNUSED))
    return report.plus(await _remove_strays(work))


async def gc(work: Upkeep) -> UpkeepReport:
    """Do as `sweep`, but leave no branch that no conversation is on."""
    report = await _end_expired(work)
    report = report.plus(await _collect(work, before=None))
    return report.plus(await _remove_strays(work))


async def repair(work: Upkeep, progress: Callable[[Progress], None] | None) -> UpkeepReport:
    """Verify; quarantine what is bad; make rows for good files without one; then sweep."""
    report = UpkeepReport()
    left: list[str] = []
    strays: list[str] = []
    async for step in verify(work.catalog, work.shelves):
        if progress is not None:
            progress(step)
        for fault in step.faults:
            if fault.run_id is not None:
                await _condemn(work, fault)
                report = replace(report, quarantined=report.quarantined + 1)
            elif fault.file is not None:
                strays.append(fault.file)
            else:
                left.append(fault.detail)
    async with work.change:
        known = await work.catalog.known_files(strays)
        waiting = [file for file in strays if file not in known]
        restored, damaged = await restore_rows(work.catalog, work.shelves, waiting, work.clock())
        for file in damaged:
            await offload(work.shelves.set_aside, file)
    num_quarantined = report.quarantined + len(damaged)
    report = replace(report, quarantined=num_quarantined, restored=restored, left=tuple(left))
    return report.plus(await sweep(work))


async def _condemn(work: Upkeep, fault: Fault) -> None:
    """Take a run's file out of use; one that is sound but not the row's goes as well."""
    assert fault.run_id is not None
    await work.quarantine(fault.run_id, fault.detail)
    async with work.change:
        if await _fault_of(work.catalog, work.shelves, fault.run_id) is not None:
            file = await work.catalog.quarantine(fault.run_id)
            if file is not None:
                await offload(work.shelves.set_aside, file)


async def _end_expired(work: Upkeep) -> UpkeepReport:
    """Free what conversations hold whose time is over; forget their names a day later."""
    report = UpkeepReport()
    for tenant, name in await work.catalog.expired(work.clock()):
        async with work.change:
            now = work.clock()
            found = await work.catalog.find(tenant, name)
            if found is None or found.head.expires_at is None or found.head.expires_at > now:
                continue
            if found.head.expires_at + work.remembered <= now:
                files = await work.catalog.delete(tenant, name)
            elif found.head.num_messages or found.head.num_tokens:
                files = await work.catalog.empty(tenant, name)
            else:
                continue
            report = report.plus(replace(await work.remove(files or []), expired=1))
    async with work.change:
        await work.catalog.forget_reset()
    return report


async def _collect(work: Upkeep, *, before: datetime | None) -> UpkeepReport:
    async with work.change:
        return await work.remove(await work.catalog.collect(before=before))


async def _remove_strays(work: Upkeep) -> UpkeepReport:
    """Remove files without rows, folder by folder; under the lock no write is in flight."""
    report = UpkeepReport()
    for shelf in await offload(work.shelves.shelves):
        async with work.change:
            names = await offload(work.shelves.on, shelf)
            if names:
                known = await work.catalog.known_files(names)
                strays = [name for name in names if name not in known]
                if strays:
                    logger.info("removing %d files without a row", len(strays))
                    report = report.plus(await work.remove(strays))
    return report

"""`kvserve cache verify`: reads a store without opening it, so that nothing of it changes.

State: a reading connection to the index, for as long as it takes. Needs no lock: it may run beside
a server, whose writes are only ever added behind what has been read.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from kvserve.cli.cache import words
from kvserve.cli.cache.place import Checked, Problem, Progress, Refused
from kvserve.store import migrate, upkeep
from kvserve.store.catalog import Catalog
from kvserve.store.disk import Disk
from kvserve.store.errors import IndexDamaged, IndexFailed
from kvserve.store.folder import DataFolder
from kvserve.store.lock import read_holder
from kvserve.store.offload import offload
from kvserve.store.shelves import Shelves
from kvserve.store.upkeep import Fault

_MOST_NAMES = 5


async def verify(folder: Path, progress: Progress) -> Checked:
    """Check every row and every file; return what is wrong. Raises Refused for an older index."""
    place = DataFolder(folder)
    try:
        if not await offload(migrate.is_current, place.index):
            raise Refused(
                "the index is of an earlier version: the next start of the server, or "
                "`kvserve cache ls`, brings it up to date"
            )
        catalog = Catalog(place.index)
        try:
            return await _verify(catalog, Shelves(Disk(), place), progress)
        finally:
            await catalog.aclose()
    except IndexDamaged as error:
        return Checked(files=0, bytes=0, conversations=0, problems=(of_index(error),))
    except IndexFailed as error:
        raise Refused(f"the index cannot be read: {error}") from error


async def _verify(catalog: Catalog, shelves: Shelves, progress: Progress) -> Checked:
    totals = await catalog.totals(datetime.now(UTC))
    problems: list[Problem] = []
    done = 0
    async for step in upkeep.verify(catalog, shelves):
        done = step.done_nbytes
        progress(done, step.total_nbytes)
        for fault in step.faults:
            # A server makes a file before its row.
            if fault.run_id is None and fault.file is not None and read_holder(shelves.folder.path):
                continue
            problems.append(await problem_of(catalog, fault))
    return Checked(
        files=totals.num_files,
        bytes=done,
        conversations=totals.num_conversations,
        problems=tuple(problems),
    )


async def problem_of(catalog: Catalog, fault: Fault) -> Problem:
    """Return a fault with the conversations that it costs something."""
    if fault.run_id is None:
        return Problem("index" if fault.file is None else f"file {fault.file}", fault.detail)
    users = [name for _, name in await catalog.users_of(fault.run_id)]
    detail = fault.detail.removeprefix(f"run {fault.run_id}: ")
    where = f" (file {fault.file})" if fault.file is not None else ""
    needed = f", needed by {words.listed(users, _MOST_NAMES) or 'no conversation'}"
    return Problem(f"run {fault.run_id}{where}", detail + needed)


def of_index(error: IndexDamaged) -> Problem:
    return Problem("index", f"damaged ({error})")

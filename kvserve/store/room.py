"""Makes room for a write, or refuses it with the figures.

State: none. Decisions are those of `kvserve.store.guards`; here they meet the index and the disk.
Runs on the event loop, under the store's lock, so that the figures hold until the write is done.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from datetime import datetime

from kvserve.store import guards
from kvserve.store.catalog import Catalog
from kvserve.store.guards import Limits, Situation
from kvserve.store.offload import offload
from kvserve.store.shelves import Shelves

logger = logging.getLogger(__name__)


async def survey(
    catalog: Catalog, shelves: Shelves, *, new_nbytes: int, path_nbytes: int, now: datetime
) -> Situation:
    """Return the figures that a write meets. Raises OSError, IndexFailed."""
    totals = await catalog.totals(now)
    volume = await offload(shelves.disk.usage, shelves.folder.snapshots)
    return Situation(
        new_nbytes=new_nbytes,
        path_nbytes=path_nbytes,
        held_nbytes=totals.nbytes,
        written_today=totals.today_nbytes,
        disk_used=volume.used,
        disk_free=volume.free,
    )


async def make_room(
    catalog: Catalog,
    shelves: Shelves,
    limits: Limits,
    situation: Situation,
    *,
    keep: Collection[int],
    now: datetime,
) -> int:
    """Evict what the write needs and return how many runs lost their file.

    Raises TooLarge or OutOfSpace, and then nothing was changed. `keep` are runs that must stay.
    """
    guards.check_save(limits, situation)
    guards.check_day(limits, situation)
    needed = guards.shortfall(limits, situation)
    if needed <= 0:
        return 0
    holdings = await catalog.holdings(now)
    spare = situation.held_nbytes // guards.SPARE
    # In a thread: a hundred thousand runs take a tenth of a second.
    chosen = await offload(guards.victims, holdings, needed, spare=spare, keep=keep)
    if chosen is None:
        evictable = await offload(guards.evictable_nbytes, holdings, keep)
        raise guards.refusal(limits, situation, evictable)
    files = await catalog.evict(chosen)
    await offload(shelves.remove, files)
    logger.info("evicted %d runs to make room for %d bytes", len(chosen), situation.new_nbytes)
    return len(chosen)

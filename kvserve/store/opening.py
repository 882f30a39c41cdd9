"""Opens the index; makes it again from the files' headers when it is damaged.

State: none. What the headers do not hold is lost with an index: the names of the conversations and
their messages' ends. The state itself is found again by its tokens, so that a client that sends its
history goes on without a prefill. Runs while the store is opened or repaired, under its lock.
"""

from __future__ import annotations

import logging
import secrets
from contextlib import suppress
from datetime import datetime

from kvserve.core.keys import prefix_key, root_key
from kvserve.store import migrate
from kvserve.store.catalog import Catalog
from kvserve.store.errors import IndexDamaged, SnapshotDamaged
from kvserve.store.offload import offload
from kvserve.store.runs import Found, NewRun, RunFile
from kvserve.store.shelves import Shelves
from kvserve.store.snapshot import read_header
from kvserve.store.snapshot_header import SnapshotHeader
from kvserve.store.writing import file_name

logger = logging.getLogger(__name__)


async def open_index(shelves: Shelves, now: datetime) -> Catalog:
    """Return the index of a folder, made where there is none. Raises SchemaTooNew, IndexFailed."""
    path = shelves.folder.index
    why = "there is none, but there are snapshots"
    files = []
    suspected = await offload(shelves.folder.suspicion.exists)
    if suspected:
        why = "it proved damaged while in use"
        files = await offload(shelves.files)
    elif not await offload(path.exists):
        # Without its index a sweep would take every file for one that nobody needs.
        files = await offload(shelves.files)
    if not files and not suspected:
        try:
            await offload(migrate.upgrade, path)
            return Catalog(path)
        except IndexDamaged as error:
            why = str(error)
            files = await offload(shelves.files)
    logger.error(
        "THE INDEX OF SAVED CONVERSATIONS IS DAMAGED (%s). It is made again from the snapshots: "
        "their state is kept, conversations' names are lost. A damaged index is in quarantine.",
        why,
    )
    await _make_again(shelves, files, now)
    return Catalog(path)


async def _make_again(shelves: Shelves, files: list[str], now: datetime) -> None:
    """Put a new index in the place of a damaged one, which goes into quarantine.

    It gets its name when it is complete. If the process dies before, the next start finds no index
    and begins anew; it must never take a half-made one for what there is.
    """
    fresh = shelves.folder.index.with_name("index-new.sqlite3")
    await offload(shelves.set_index_aside, secrets.token_hex(4))
    with suppress(FileNotFoundError):
        await offload(shelves.disk.unlink, shelves.folder.suspicion)
    await offload(shelves.remove_index, fresh)
    await offload(migrate.upgrade, fresh)
    catalog = Catalog(fresh)
    try:
        num_restored, bad = await restore_rows(catalog, shelves, files, now)
    finally:
        await catalog.aclose()
    await offload(shelves.disk.rename, fresh, shelves.folder.index)
    await offload(shelves.disk.fsync_folder, shelves.folder.path)
    logger.error("the index was made again: %d runs, %d files unusable", num_restored, len(bad))


async def restore_rows(
    catalog: Catalog, shelves: Shelves, files: list[str], now: datetime
) -> tuple[int, list[str]]:
    """Make rows for files that have none; return how many, and the files that are damaged.

    A file whose place in the tree is not known, or taken, stays where it is, without a row.
    """
    num_restored, damaged = 0, []
    for file in sorted(files, key=_start_of):
        try:
            found = await offload(_look, shelves, file)
        except SnapshotDamaged as error:
            logger.warning("a file is of no use: %s", error)
            damaged.append(file)
            continue
        num_restored += await catalog.restore(found, now) is not None
    return num_restored, damaged


def _start_of(file: str) -> int:
    """Return where a file's tokens begin: parents have to go before their children."""
    return int(file.partition("-")[2].partition(".")[0])


def _look(shelves: Shelves, file: str) -> Found:
    """Return what a file says of itself, if that may be believed. Raises SnapshotDamaged."""
    header = read_header(shelves.disk, shelves.folder.of(file))
    if header.namespace is None or file != file_name(header.key, header.start):
        raise SnapshotDamaged(0, "foreign", "under another name")
    root = root_key(header.identity.digest(), header.namespace)
    if header.start == 0 and header.key != prefix_key(root, header.token_ids):
        raise SnapshotDamaged(0, "foreign", "other tokens")
    return Found(
        identity=header.identity,
        namespace=header.namespace,
        parent_key=header.parent or None,
        prefix_key=header.prefix,
        run=_run_of(header, file, shelves.nbytes(file)),
    )


def _run_of(header: SnapshotHeader, file: str, nbytes: int) -> NewRun:
    return NewRun(
        start=header.start,
        tokens=header.token_ids,
        key=header.key,
        content=RunFile(
            file=file, nbytes=nbytes, digest=header.content_digest, specs=header.segments
        ),
    )

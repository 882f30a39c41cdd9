"""Fail the Nth operation of the disk, or of the database, for N = 1, 2, 3... until none is left.

After each: nothing but a KvserveError came out, `verify` is clean, everything acknowledged is there
bit for bit, everything else is whole or absent, and the next write succeeds.

`once` fails one operation, `for good` that one and all after it that can fail so. The database
fails at SQLite's own calls, below SQLAlchemy, with the errors that SQLite has for a broken or a
full disk; "told late" is a commit that took place and whose answer was lost.
"""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event

from kvserve.core.errors import KvserveError
from kvserve.store.disk import Disk
from kvserve.store.store import Store
from tests.faults.failing import FailingDisk
from tests.faults.scenario import LIMITS, THOROUGH, Journal, check, live
from tests.store_fakes import IDENTITY, Clock

STEP = 12
"""The short ladder takes every twelfth rung; the slow one takes all."""


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder that was opened and closed; making its index takes longer than copying it."""
    folder = tmp_path_factory.mktemp("empty") / "data"

    async def make() -> None:
        store = await Store.open(folder, identity=IDENTITY, limits=LIMITS)
        await store.aclose()

    asyncio.run(make())
    return folder


async def climb(
    folder: Path, journal: Journal, disk: Disk, prepare: Callable[[Store], None]
) -> None:
    """Live through the scenario on a failing disk or database, then look at what is left."""
    clock = Clock()
    try:
        store = await Store.open(folder, identity=IDENTITY, limits=LIMITS, disk=disk, clock=clock)
    except KvserveError:
        journal.failures += 1
    else:
        try:
            prepare(store)
            await live(store, clock, journal)
            await store.sweep()
        except KvserveError:
            journal.failures += 1  # of the sweep
        finally:
            await store.aclose()
    await check(folder, journal)


@pytest.mark.parametrize("thorough", [False, pytest.param(True, marks=THOROUGH)])
@pytest.mark.parametrize("for_good", [False, True], ids=["once", "for good"])
@pytest.mark.parametrize("fault", ["EIO", "ENOSPC", "EACCES", "short"])
def test_whatever_operation_of_the_disk_fails_nothing_acknowledged_is_lost(
    empty: Path, tmp_path: Path, fault: str, for_good: bool, thorough: bool
) -> None:
    nth, step = (1, 1) if thorough else (1 + len(fault) % STEP, STEP)
    met = 0
    while True:
        folder = tmp_path / str(nth)
        shutil.copytree(empty, folder)
        disk = FailingDisk(fault, nth, for_good=for_good)
        journal = Journal()
        asyncio.run(climb(folder, journal, disk, lambda store: None))
        shutil.rmtree(folder)
        if not disk.failed:
            break
        met += 1
        nth += step
    assert met >= (4 if thorough else 1)
    assert not journal.failures  # the last run met no fault, and all went well


@dataclass
class FailingDatabase:
    """Fails at the Nth call of SQLite, `late` only at commits and after they took place."""

    nth: int
    code: int
    for_good: bool
    late: bool
    met: int = 0
    failed: int = 0

    def __call__(self, store: Store) -> None:
        for engine in store.catalog.database.engines:
            sync = engine.sync_engine
            commit = sync.dialect.do_commit

            def fails(connection: Any, commit: Any = commit) -> None:
                if not self.late:
                    self.step()
                commit(connection)
                if self.late:
                    self.step()

            sync.dialect.do_commit = fails  # type: ignore[method-assign, assignment]
            if not self.late:
                event.listen(sync, "do_execute", lambda *_: self.step())
                event.listen(sync, "do_executemany", lambda *_: self.step())

    def step(self) -> None:
        self.met += 1
        if self.met == self.nth or (self.for_good and self.met > self.nth):
            self.failed += 1
            error = sqlite3.OperationalError("made up")
            error.sqlite_errorcode = self.code
            raise error


@pytest.mark.parametrize("thorough", [False, pytest.param(True, marks=THOROUGH)])
@pytest.mark.parametrize("for_good", [False, True], ids=["once", "for good"])
@pytest.mark.parametrize(
    ("code", "late"),
    [
        (sqlite3.SQLITE_IOERR, False),
        (sqlite3.SQLITE_FULL, False),
        (sqlite3.SQLITE_READONLY, False),
        (sqlite3.SQLITE_IOERR, True),
    ],
    ids=["IOERR", "FULL", "READONLY", "told late"],
)
def test_whatever_operation_of_the_database_fails_nothing_acknowledged_is_lost(
    empty: Path, tmp_path: Path, code: int, late: bool, for_good: bool, thorough: bool
) -> None:
    # SQLite is called more often than the disk, but commits are few.
    nth, step = (1, 1) if thorough or late else (1 + code % STEP, 3 * STEP)
    met = 0
    while True:
        folder = tmp_path / str(nth)
        shutil.copytree(empty, folder)
        database = FailingDatabase(nth, code, for_good, late)
        # Where the answer of a commit is lost, what failed may have happened.
        journal = Journal(strict=not late)
        asyncio.run(climb(folder, journal, Disk(), database))
        shutil.rmtree(folder)
        if not database.failed:
            break
        met += 1
        nth += step
    assert met >= 4
    assert not journal.failures

"""Connections to the index and transactions on them: one writer, a few readers.

State: two SQLAlchemy engines on one SQLite file in WAL mode, so that reading never waits for a
write. Owned by the event loop thread; SQLite itself works in aiosqlite's threads. What is done in a
transaction is a plain function over a `Connection`, given by `kvserve.store.catalog`. Does not know
the tables, and does not create or upgrade them.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from sqlalchemy import URL, Connection, Engine, NullPool, create_engine, event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from kvserve.store.errors import IndexDamaged, IndexFailed
from kvserve.store.offload import offload

T = TypeVar("T")
Work = Callable[[Connection], T]

_NUM_READERS = 2
_BUSY_TIMEOUT_MS = 10_000  # another process may look into the index; only one works on it
_WAL_LIMIT_NBYTES = 64 * 2**20
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def pragmas(*, writes: bool) -> list[str]:
    """Return what is set on each new connection."""
    settings = [
        "journal_mode = WAL",
        "synchronous = FULL",  # a commit is on the platter when it returns
        "foreign_keys = ON",
        f"busy_timeout = {_BUSY_TIMEOUT_MS}",
        f"journal_size_limit = {_WAL_LIMIT_NBYTES}",
        # On macOS fsync alone leaves data in the drive's own memory. No effect elsewhere.
        *("fullfsync = ON", "checkpoint_fullfsync = ON"),
    ]
    if not writes:
        settings.append("query_only = ON")
    return settings


def common_tokens(first: bytes, second: bytes) -> int:
    """Return how many leading tokens two runs of token bytes share."""
    length = min(len(first), len(second)) // 4
    differs = np.frombuffer(first, "<u4", length) != np.frombuffer(second, "<u4", length)
    at = int(differs.argmax()) if length else 0
    return at if length and differs[at] else length


class Database:
    """A SQLite file that has its tables. Close it in the event loop that used it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._reader = _engine(path, num_connections=_NUM_READERS, writes=False)
        self._writer = _engine(path, num_connections=1, writes=True)
        self._turn = asyncio.Lock()  # first come, first served; SQLite itself makes no queue

    @property
    def engines(self) -> tuple[AsyncEngine, AsyncEngine]:
        """The readers' and the writer's; tests listen on them to make statements fail."""
        return self._reader, self._writer

    async def read(self, work: Work[T]) -> T:
        """Return `work(connection)`, which sees one state of the index throughout.

        Raises IndexFailed. A cancelled caller leaves once the work has ended.
        """
        return await _to_its_end(self._run(self._reader, work, lambda: False))

    async def read_apart(self, work: Work[T]) -> T:
        """Do as `read`, in a worker thread: for work on so many rows that the loop would notice."""
        return await offload(self._apart, work)

    def _apart(self, work: Work[T]) -> T:
        engine = create_engine(URL.create("sqlite", database=str(self._path)), poolclass=NullPool)
        _prepare(engine, writes=False)
        try:
            with engine.connect() as connection:
                return work(connection)
        except (DBAPIError, sqlite3.Error) as error:
            raise _failure(error) from error
        finally:
            engine.dispose()

    async def write(self, work: Work[T]) -> T:
        """Return `work(connection)` and what it changed is durable; or it raises and nothing is.

        A caller that is cancelled before the commit begins leaves nothing behind, later all of it;
        either way the transaction has ended when the caller goes on. Raises IndexFailed.
        """
        gone = False

        async def whole() -> T:
            async with self._turn:
                if gone:
                    raise asyncio.CancelledError
                return await self._run(self._writer, work, lambda: not gone)

        def abandon() -> None:
            nonlocal gone
            gone = True

        return await _to_its_end(whole(), abandon)

    async def _run(self, engine: AsyncEngine, work: Work[T], commits: Callable[[], bool]) -> T:
        try:
            async with engine.connect() as connection:
                result = await connection.run_sync(work)
                if commits():
                    await connection.commit()
                return result
        except (DBAPIError, sqlite3.Error) as error:
            raise _failure(error) from error

    async def aclose(self) -> None:
        """Close all connections; the last one folds the log into the file."""
        async with self._turn:
            await self._reader.dispose()
            await self._writer.dispose()


def _engine(path: Path, *, num_connections: int, writes: bool) -> AsyncEngine:
    engine = create_async_engine(
        URL.create("sqlite+aiosqlite", database=str(path)),
        pool_size=num_connections,
        max_overflow=0,
        pool_timeout=3600,  # callers wait their turn
        pool_reset_on_return=None,  # every transaction is ended here
    )
    _prepare(engine.sync_engine, writes=writes)
    return engine


def _prepare(engine: Engine, *, writes: bool) -> None:
    """Arrange for what every connection needs before it is used."""
    settings = pragmas(writes=writes)
    # A deferred transaction that reads and then writes fails at once when another has written in
    # between, whatever the busy timeout; so one that may write takes the lock as it begins.
    begin = "BEGIN IMMEDIATE" if writes else "BEGIN"

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, record: object) -> None:
        connection.isolation_level = None  # the driver is to begin nothing on its own
        cursor = connection.cursor()
        for setting in settings:
            cursor.execute(f"PRAGMA {setting}")
        cursor.close()
        connection.create_function("common_tokens", 2, common_tokens, deterministic=True)

    @event.listens_for(engine, "begin")
    def start(connection: Connection) -> None:
        connection.exec_driver_sql(begin)


def _failure(error: DBAPIError | sqlite3.Error) -> IndexFailed:
    cause = error.orig if isinstance(error, DBAPIError) else error
    code = getattr(cause, "sqlite_errorcode", 0) & 0xFF
    if code in _DAMAGED:
        return IndexDamaged(str(cause))
    return IndexFailed(str(cause), full=code == sqlite3.SQLITE_FULL)


async def _to_its_end(
    coroutine: Coroutine[Any, Any, T], abandon: Callable[[], None] | None = None
) -> T:
    """Await `coroutine`, which runs to its end even if the caller is cancelled meanwhile.

    Cancelling SQLAlchemy amid a statement would throw the connection away while its thread still
    works on it. `abandon` is called at the first cancellation, which is passed on at the end.
    """
    task: Awaitable[T] = asyncio.ensure_future(coroutine)
    assert isinstance(task, asyncio.Task)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        if abandon is not None:
            abandon()
        while not task.done():
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError:
                continue
        if not task.cancelled():
            task.exception()  # seen; the caller learns that it was cancelled
        raise

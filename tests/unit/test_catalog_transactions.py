"""Transactions on the index: all or nothing, whoever is cancelled and whatever fails."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, event

from kvserve.store.catalog import Catalog
from kvserve.store.database import common_tokens
from kvserve.store.errors import IndexDamaged, IndexFailed
from tests.catalog_fixtures import (
    IDENTITY,
    NAMESPACE,
    NOW,
    conversation,
    ids,
    on_catalog,
    opened,
    run,
    turn,
)


def insert_root(connection: Connection) -> None:
    connection.exec_driver_sql("INSERT INTO identities (digest, json) VALUES ('d', '{}')")


async def num_identities(catalog: Catalog) -> int:
    return await catalog.database.read(
        lambda c: c.exec_driver_sql("SELECT count(*) FROM identities").scalar_one()
    )


@on_catalog
async def test_a_cancelled_write_leaves_nothing_and_the_next_one_works(catalog: Catalog) -> None:
    inside, go_on = threading.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def hold() -> int:
        inside.set()
        go_on.wait()
        return 0

    def work(connection: Connection) -> None:
        insert_root(connection)
        connection.connection.dbapi_connection.create_function("hold", 0, hold)  # type: ignore[union-attr]
        connection.exec_driver_sql("SELECT hold()")

    writing = asyncio.ensure_future(catalog.database.write(work))
    waiting = asyncio.ensure_future(catalog.put(conversation("never", [])))
    await loop.run_in_executor(None, inside.wait)
    for _ in range(3):  # whoever is impatient cancels again
        writing.cancel()
        waiting.cancel()
        await asyncio.sleep(0)
    assert not writing.done()  # its transaction has not ended yet
    assert await num_identities(catalog) == 0  # and nobody waits for it to read
    go_on.set()
    outcomes = await asyncio.gather(writing, waiting, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [asyncio.CancelledError] * 2
    assert await num_identities(catalog) == 0 and await catalog.heads() == []
    await turn(catalog, "c", range(5))
    assert len(await catalog.heads()) == 1


@on_catalog
async def test_a_cancelled_read_gives_its_connection_back(catalog: Catalog) -> None:
    await turn(catalog, "c", range(5))
    for _ in range(10):
        reading = [asyncio.ensure_future(catalog.find("t", "c")) for _ in range(4)]
        await asyncio.sleep(0)
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)
    assert await catalog.find("t", "c") is not None


@on_catalog
async def test_whatever_statement_fails_nothing_is_changed(catalog: Catalog) -> None:
    await turn(catalog, "c", range(5), num_messages=3)
    before = await catalog.totals(NOW)
    writer = catalog.database.engines[1].sync_engine
    left = 0

    def fail(*_: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise error

    event.listen(writer, "before_cursor_execute", fail)
    failures = 0
    for nth in range(1, 50):
        left = nth
        try:
            await turn(catalog, "c", range(9), num_messages=5)
        except IndexFailed as error:
            failures += error.full
            assert await catalog.totals(NOW) == before
            (head,) = await catalog.heads()
            assert (head.num_tokens, head.num_messages) == (5, 3)
        else:
            break
    assert failures > 8 and (await catalog.heads())[0].num_tokens == 9


def test_a_full_disk_is_told_apart(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with opened(tmp_path) as catalog:
            await turn(catalog, "c", range(5))
            async with catalog.database.engines[1].connect() as connection:
                await connection.exec_driver_sql("COMMIT")
                pages = (await connection.exec_driver_sql("PRAGMA page_count")).scalar_one()
                await connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
            with pytest.raises(IndexFailed) as caught:
                await turn(catalog, "c", range(50_000))
            assert caught.value.full
            found = await catalog.find("t", "c")
            assert found is not None and list(found.token_ids) == list(range(5))
            assert await catalog.check() == []

    run(scenario())


def test_a_damaged_page_is_told_apart(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with opened(tmp_path) as catalog:
            for n in range(200):
                await catalog.put(conversation(f"c{n}", [], num_messages=8))
        path = tmp_path / "index.sqlite3"
        data = bytearray(path.read_bytes())
        for page in range(1, len(data) // 4096):
            data[page * 4096 : page * 4096 + 8] = b"\xff" * 8
        path.write_bytes(data)
        async with opened(tmp_path) as catalog:
            with pytest.raises(IndexDamaged):
                await catalog.heads()

    run(scenario())


@on_catalog
async def test_readers_cannot_write(catalog: Catalog) -> None:
    with pytest.raises(IndexFailed):
        await catalog.database.read(insert_root)


@on_catalog
async def test_writers_queue_and_all_get_through(catalog: Catalog) -> None:
    await asyncio.gather(*(catalog.put(conversation(f"c{n}", [])) for n in range(30)))
    assert [head.id for head in await catalog.heads()] == [f"c{n}" for n in range(30)]


@on_catalog
async def test_what_is_committed_is_on_the_platter_and_checked(catalog: Catalog) -> None:
    names = "journal_mode", "synchronous", "foreign_keys", "fullfsync", "checkpoint_fullfsync"

    def settings(connection: Connection) -> list[Any]:
        return [connection.exec_driver_sql(f"PRAGMA {name}").scalar_one() for name in names]

    assert await catalog.database.write(settings) == ["wal", 2, 1, 1, 1]
    assert (await catalog.walk(IDENTITY, NAMESPACE, ids([1]))).runs == ()


@pytest.mark.parametrize(
    ("first", "second", "common"),
    [
        ([], [1], 0),
        ([1, 2, 3], [1, 2, 3], 3),
        ([1, 256], [1, 1], 1),
        ([5], [6, 7], 0),
        ([1], [1, 2], 1),
    ],
)
def test_common_tokens_are_counted_whole(first: list[int], second: list[int], common: int) -> None:
    assert common_tokens(ids(first).tobytes(), ids(second).tobytes()) == common

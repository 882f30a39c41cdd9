"""Looking through all of the index, and making it again from what the files say."""

from __future__ import annotations

import random

import pytest

from kvserve.store import catalog_repair
from kvserve.store.catalog import Catalog
from kvserve.store.runs import Found, NewRun
from tests.catalog_fixtures import (
    IDENTITY,
    NAMESPACE,
    NOW,
    content,
    conversation,
    ids,
    key,
    on_catalog,
    run,
    temporary,
    turn,
)

A, B, C = [*range(10)], [*range(6), 90, 91, 92], [*range(6), 90, 91, 80]


async def found_in(catalog: Catalog) -> list[Found]:
    """What the headers of the files would say, parents first."""
    found = []
    async for chunk in catalog.runs():
        for here in chunk:
            record = await catalog.record(here.id)
            assert record is not None and record.run == here
            tip = next(t for t in (A, B, C) if key(t[: here.end]) == here.key)
            assert list(record.tokens) == tip[here.start : here.end]
            assert here.file is not None
            found.append(
                Found(
                    identity=record.identity,
                    namespace=record.namespace,
                    parent_key=record.parent_key,
                    prefix_key=key(tip[: here.start]),
                    run=NewRun(
                        start=here.start,
                        tokens=record.tokens,
                        key=here.key,
                        content=content(here.file, here.start, here.end),
                    ),
                )
            )
    return sorted(found, key=lambda at: at.run.start)


async def three(catalog: Catalog) -> list[Found]:
    for id, tokens in [("a", A), ("b", B), ("c", C)]:
        await turn(catalog, id, tokens)
    return await found_in(catalog)


@on_catalog
async def test_an_index_is_made_again_from_the_files(catalog: Catalog) -> None:
    async with temporary() as lost:
        found = await three(lost)
        walks = [await lost.walk(IDENTITY, NAMESPACE, ids(tokens)) for tokens in (A, B, C)]
    for _ in range(2):  # a second time it changes nothing
        restored = [await catalog.restore(at, NOW) for at in found]
        assert None not in restored and len(set(restored)) == 3
    for tokens, before in zip((A, B, C), walks, strict=True):
        walk = await catalog.walk(IDENTITY, NAMESPACE, ids(tokens))
        assert [at.run.file for at in walk.runs] == [at.run.file for at in before.runs]
        assert [s.end for s in walk.path.segments] == [s.end for s in before.path.segments]
    await catalog.put(conversation("b", B))


@on_catalog
async def test_a_file_whose_place_is_not_known_is_left_out(catalog: Catalog) -> None:
    async with temporary() as lost:
        found = await three(lost)
    assert [await catalog.restore(at, NOW) for at in found[1:]] == [None, None]
    assert (await catalog.totals(NOW)).num_runs == 0


@on_catalog
async def test_a_file_whose_place_is_taken_is_left_out(catalog: Catalog) -> None:
    async with temporary() as lost:
        found = await three(lost)
    await turn(catalog, "other", [0, 1, 5])
    assert await catalog.restore(found[0], NOW) is None


@on_catalog
async def test_a_known_run_without_a_file_gets_the_file_back(catalog: Catalog) -> None:
    found = await three(catalog)
    await catalog.evict([1, 2, 3])
    restored = [await catalog.restore(at, NOW) for at in found]
    assert restored == [1, 2, 3] and (await catalog.totals(NOW)).num_files == 3


@on_catalog
async def test_files_are_known_by_name(catalog: Catalog) -> None:
    await three(catalog)
    names = [f"x{n}" for n in range(2000)] + ["a-0-10", "c-8-9"]
    random.Random(1).shuffle(names)
    assert await catalog.known_files(names) == {"a-0-10", "c-8-9"}
    assert await catalog.known_files([]) == set()
    assert await catalog.record(99) is None


DAMAGES = {
    "UPDATE contents SET tokens = substr(tokens, 5) WHERE run_id = 2": "tokens of run 2",
    "UPDATE contents SET tokens = zeroblob(12) WHERE run_id = 2": "tokens of run 2",
    "DELETE FROM contents WHERE run_id = 2": "tokens of run 2",
    "UPDATE contents SET tokens = zeroblob(40) WHERE run_id = 1": "run 1 has the key",
    "UPDATE runs SET key = zeroblob(16) WHERE id = 3": "run 3 has the key",
    'UPDATE runs SET start = 11, "end" = 14 WHERE id = 2': "run 2 does not fit its parent",
    "UPDATE conversations SET num_tokens = 12 WHERE name = 'a'": "a does not end in its tip",
    "UPDATE conversations SET tip_id = 3 WHERE name = 'a'": "a does not end in its tip",
    "UPDATE runs SET parent_id = 77 WHERE id = 3": "a row of runs names one of runs",
}


@pytest.mark.parametrize("at_a_time", [1, 500])
@pytest.mark.parametrize("statement", DAMAGES)
def test_what_is_wrong_in_the_index_is_said(
    statement: str, at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog_repair, "_CHUNK", at_a_time)

    async def scenario() -> None:
        async with temporary() as catalog:
            await three(catalog)
            assert await catalog.check() == []
            async with catalog.database.engines[1].connect() as connection:
                await connection.exec_driver_sql("COMMIT")
                await connection.exec_driver_sql("PRAGMA foreign_keys = OFF")
                await connection.exec_driver_sql(statement)
            faults = await catalog.check()
            assert faults and DAMAGES[statement] in faults[0]

    run(scenario())

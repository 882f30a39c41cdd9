"""Room: what may go, what goes with a conversation, and what that leaves behind."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta

import pytest

from kvserve.store.catalog import Catalog
from kvserve.store.errors import TreeChanged
from kvserve.store.guards import victims
from tests.catalog_fixtures import (
    IDENTITY,
    NAMESPACE,
    NOW,
    SECOND,
    conversation,
    filling,
    ids,
    on_catalog,
    split,
    turn,
)


async def may_go(catalog: Catalog, now: datetime = NOW, spared: tuple[int, ...] = ()) -> list[int]:
    """Return what eviction would take if it needed all that it may have, in order."""
    holdings = await catalog.holdings(now)
    every = sum(holding.nbytes for holding in holdings)
    chosen = victims(holdings, 0, spare=every, keep=spared)
    assert chosen is not None
    return chosen


async def states(catalog: Catalog) -> dict[int, str]:
    return {run.id: run.state async for chunk in catalog.runs() for run in chunk}


@on_catalog
async def test_leaves_go_first_and_the_longest_unused_of_them(catalog: Catalog) -> None:
    now = NOW + timedelta(minutes=1)
    (stem,) = await turn(catalog, "a", range(10))
    (early,) = await turn(catalog, "b", [*range(5), 90], now=NOW + 2 * SECOND)
    (late,) = await turn(catalog, "c", [*range(10), 80], now=NOW + SECOND)
    assert await may_go(catalog, now) == [late, early, stem]
    assert await catalog.evict([late]) == ["c-10-11"]
    assert await may_go(catalog, now) == [early, stem]
    assert await catalog.evict([early, late]) == ["b-5-6"]
    left = [holding for holding in await catalog.holdings(now) if holding.nbytes]
    # How what hung on it was used is now said of it.
    assert [(holding.run_id, holding.age_s) for holding in left] == [(stem, 58)]


@on_catalog
async def test_what_hangs_below_a_run_without_a_file_keeps_those_above(catalog: Catalog) -> None:
    (first,) = await turn(catalog, "c", range(4))
    (second,) = await turn(catalog, "c", range(8))
    (third,) = await turn(catalog, "c", range(12))
    assert await catalog.quarantine(second) == "c-4-8"
    assert await catalog.quarantine(second) is None
    assert await may_go(catalog) == [third, first]
    await catalog.evict([third])
    assert await may_go(catalog) == [first]
    assert await states(catalog) == {first: "present", second: "quarantined", third: "evicted"}


@on_catalog
async def test_saved_and_pinned_paths_never_go(catalog: Catalog) -> None:
    until = NOW + SECOND
    (saved,) = await turn(catalog, "saved", [1, 2, 3], saved=True)
    (lasting,) = await turn(catalog, "lasting", [2, 2, 3], pinned=True)
    (timed,) = await turn(catalog, "timed", [3, 2, 3], pinned=True, pinned_until=until)
    (free,) = await turn(catalog, "free", [4, 2, 3], pinned_until=until)
    assert await may_go(catalog) == [free]
    assert sorted(await may_go(catalog, until)) == [timed, free]
    # Below what is protected all may go, above nothing, wherever in the run the tip is.
    (below,) = await turn(catalog, "free", [1, 2, 3, 4])
    assert sorted(await may_go(catalog)) == [free, below]
    await catalog.put(conversation("saved", [1, 2], saved=True))
    assert sorted(await may_go(catalog)) == [free, below]
    assert {saved, lasting} & set(await may_go(catalog, until)) == set()


@on_catalog
async def test_a_protected_tip_without_a_file_protects_what_is_above(catalog: Catalog) -> None:
    await turn(catalog, "c", range(4))
    (lower,) = await turn(catalog, "c", range(8), saved=True)
    await catalog.quarantine(lower)
    assert await may_go(catalog) == []


@on_catalog
async def test_spared_runs_and_those_above_never_go(catalog: Catalog) -> None:
    await turn(catalog, "c", range(4))
    (second,) = await turn(catalog, "c", range(8))
    (other,) = await turn(catalog, "d", [9])
    assert await may_go(catalog, spared=(second,)) == [other]


@on_catalog
async def test_the_row_of_an_evicted_run_stays_while_it_is_needed(catalog: Catalog) -> None:
    (first,) = await turn(catalog, "c", range(4))
    (second,) = await turn(catalog, "c", range(8))
    (branch,) = await turn(catalog, "c", [0, 1, 50])
    (cached,) = await turn(catalog, "c", [0, 60])
    await catalog.put(conversation("c", range(8)))
    assert sorted(await catalog.evict([branch, cached, second, first])) == sorted(
        ["c-2-3", "c-1-2", "c-4-8", "c-0-4"]
    )
    assert await states(catalog) == {first: "evicted", second: "evicted"}
    found = await catalog.find("t", "c")
    assert found is not None and list(found.token_ids) == list(range(8))
    assert (await catalog.totals(NOW)).nbytes == 0
    assert await catalog.delete("t", "c") == []
    assert await states(catalog) == {}


@on_catalog
async def test_deleting_takes_what_only_that_conversation_used(catalog: Catalog) -> None:
    await turn(catalog, "a", range(4))
    await turn(catalog, "a", range(8))
    await turn(catalog, "a", [*range(4), 90, 91])  # it left the branch to 8
    await turn(catalog, "b", [0, 1, 2, 80])
    before = await catalog.walk(IDENTITY, NAMESPACE, ids([0, 1, 2, 80]))
    assert sorted(await catalog.delete("t", "a") or ()) == ["a-4-6", "a-4-8"]
    assert await catalog.delete("t", "a") is None
    assert await catalog.walk(IDENTITY, NAMESPACE, ids([0, 1, 2, 80])) is not before
    found = await catalog.find("t", "b")
    assert found is not None and list(found.token_ids) == [0, 1, 2, 80]
    # Its writer is gone, so now it is only b's.
    assert sorted(await catalog.delete("t", "b") or ()) == ["a-0-4", "b-3-4"]
    assert (await catalog.totals(NOW)).num_runs == 0


@on_catalog
async def test_deleting_leaves_what_another_wrote_as_cache(catalog: Catalog) -> None:
    (branch,) = await turn(catalog, "a", [1, 2, 3])
    await catalog.put(conversation("fork", [1, 2, 3]))
    await turn(catalog, "fork", [1, 2, 3, 4])
    await turn(catalog, "a", [5, 6])  # edited: it may come back to the branch
    assert await catalog.delete("t", "fork") == ["fork-3-4"]
    assert branch in await states(catalog)
    assert await catalog.collect(before=NOW) == []
    assert await catalog.collect() == ["a-0-3"]
    found = await catalog.find("t", "a")
    assert found is not None and list(found.token_ids) == [5, 6]


@on_catalog
async def test_a_conversation_that_was_reset_keeps_its_name_only_and_nothing_from_eviction(
    catalog: Catalog,
) -> None:
    (old,) = await turn(catalog, "a", [1, 2, 3], saved=True, pinned=True, title="t")
    assert await may_go(catalog) == []
    await catalog.reset("t", "a")
    await catalog.reset("t", "unknown")
    (head,) = await catalog.heads()
    assert (head.num_messages, head.num_tokens, head.saved, head.title) == (0, 0, False, None)
    assert await may_go(catalog) == [old]
    await turn(catalog, "a", [4, 5])
    await catalog.forget_reset()
    assert sorted(await catalog.delete("t", "a") or ()) == ["a-0-2", "a-0-3"]
    await turn(catalog, "b", [6])
    await catalog.reset("t", "b")
    await catalog.forget_reset()
    assert await catalog.heads() == []


@on_catalog
async def test_old_unused_runs_are_collected_by_their_age(catalog: Catalog) -> None:
    await turn(catalog, "a", [1, 1])
    await turn(catalog, "a", [2, 2, 2], now=NOW + SECOND)
    await turn(catalog, "a", [3, 3, 3, 3])
    assert await catalog.collect(before=NOW + SECOND) == ["a-0-2"]
    assert (await catalog.totals(NOW)).num_files == 2


@on_catalog
async def test_disk_use_counts_files_and_says_which_are_shared(catalog: Catalog) -> None:
    await turn(catalog, "a", range(10), nbytes=1000)
    await turn(catalog, "a", range(20), nbytes=500)
    await turn(catalog, "b", [*range(4), 90, 91], nbytes=30)
    await turn(catalog, "empty", [])
    used = await catalog.usage([("t", "a"), ("t", "b"), ("t", "empty"), ("t", "unknown")])
    assert set(used) == {("t", "a"), ("t", "b")}
    a, b = used["t", "a"], used["t", "b"]
    assert (a.nbytes, a.shared_nbytes, a.held_tokens) == (1500, 1000, 20)
    assert a.ranges == ((0, 10, 1000), (10, 20, 500))
    assert (b.nbytes, b.shared_nbytes, b.held_tokens) == (1030, 1000, 6)
    assert b.ranges == ((0, 4, 400), (4, 6, 30))
    await catalog.put(conversation("fork", range(15)))
    assert (await catalog.usage([("t", "a")]))["t", "a"].shared_nbytes == 1500
    await catalog.delete("t", "fork")
    await catalog.delete("t", "b")
    assert (await catalog.usage([("t", "a")]))["t", "a"].shared_nbytes == 0
    await catalog.evict([2])
    a = (await catalog.usage([("t", "a")]))["t", "a"]
    assert (a.nbytes, a.held_tokens, a.ranges) == (1000, 10, ((0, 10, 1000),))


@on_catalog
async def test_only_runs_without_files_are_split_and_inside_only(catalog: Catalog) -> None:
    (held,) = await turn(catalog, "a", range(8))
    (bare,) = await turn(catalog, "b", [9, 8, 7], held=False)
    for run_id, position in [(held, 4), (bare, 0), (bare, 3), (bare + 1, 1)]:
        with pytest.raises(TreeChanged):
            await split(catalog, run_id, position)
    lower = await split(catalog, bare, 2)
    path = await catalog.path("t", "b") or ()
    assert [(at.run.id, at.until) for at in path] == [(bare, 2), (lower, 3)]
    with pytest.raises(TreeChanged):
        await catalog.commit(filling(bare, [9, 8, 7], 0))
    await catalog.commit(replace(filling(bare, [9], 0), nbytes=1))
    assert [at.until for at in await catalog.path("t", "b") or ()] == [1, 2, 3]
    assert timedelta(0) == (await catalog.heads())[0].used_at - NOW

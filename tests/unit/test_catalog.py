"""The index: conversations come back as they were put, walks find exactly what is there."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
from sqlalchemy import event

from kvserve.store.catalog import Catalog
from kvserve.store.errors import TreeChanged
from kvserve.store.records import StoredMessage
from kvserve.store.runs import Commit, NewRun
from tests.catalog_fixtures import (
    IDENTITY,
    NAMESPACE,
    NOW,
    SECOND,
    content,
    conversation,
    filling,
    ids,
    key,
    on_catalog,
    opened,
    renamed,
    run,
    turn,
)


async def depth(catalog: Catalog, tokens: range | list[int]) -> int:
    return (await catalog.walk(IDENTITY, NAMESPACE, ids(tokens))).path.num_tokens


def same(found: Any, put: Any) -> bool:
    return bool(
        found.head == put.head
        and found.messages == put.messages
        and (found.tools_digest, found.template_digest) == (put.tools_digest, put.template_digest)
        and np.array_equal(found.token_ids, put.token_ids)
    )


def test_a_conversation_comes_back_whole_after_the_index_was_closed(tmp_path: Any) -> None:
    moment = NOW + timedelta(days=400)
    flags: dict[str, Any] = {
        "title": "Ein «Titel»",
        "saved": True,
        "pinned": True,
        "pinned_until": moment,
    }

    async def scenario() -> None:
        async with opened(tmp_path) as catalog:
            for end in (3, 10, 11):
                await turn(catalog, "c", range(end), num_messages=end, expires_at=moment, **flags)
        async with opened(tmp_path) as catalog:
            found = await catalog.find("t", "c")
            put = conversation("c", range(11), num_messages=11, expires_at=moment, **flags)
            assert found is not None and same(found, put)
            assert found.token_ids.dtype == np.uint32
            assert await catalog.heads() == [put.head]
            assert await catalog.find("T", "c") is None and await catalog.find("t", "C") is None

    run(scenario())


@on_catalog
async def test_ids_belong_to_their_tenant(catalog: Catalog) -> None:
    await turn(catalog, "c", [1, 2], tenant="a")
    await turn(catalog, "c", [1, 3], tenant="b")
    a, b = await catalog.find("a", "c"), await catalog.find("b", "c")
    assert a is not None and b is not None
    assert (list(a.token_ids), list(b.token_ids)) == ([1, 2], [1, 3])


@on_catalog
async def test_roots_of_other_models_and_namespaces_are_apart(catalog: Catalog) -> None:
    await turn(catalog, "c", range(9))
    other = replace(IDENTITY, kv_dtype="2")
    for identity, namespace in [(other, NAMESPACE), (IDENTITY, b"other"), (IDENTITY, b"")]:
        assert (await catalog.walk(identity, namespace, ids(range(9)))).path.num_tokens == 0


@on_catalog
async def test_a_walk_goes_on_from_the_middle_of_a_run(catalog: Catalog) -> None:
    await turn(catalog, "a", range(20))
    await turn(catalog, "b", [*range(10), 90, 91, 92])
    await turn(catalog, "c", [*range(10), 90, 91, 80, 81])
    await turn(catalog, "d", [*range(20), 70])
    assert await depth(catalog, [*range(10), 90, 91, 80, 81, 5]) == 14
    assert await depth(catalog, [*range(10), 90, 91, 92, 80]) == 13
    assert await depth(catalog, [*range(10), 91]) == 10
    assert await depth(catalog, [*range(20), 70, 1]) == 21
    assert await depth(catalog, [1]) == 0
    assert await depth(catalog, []) == 0


@on_catalog
async def test_the_segments_of_a_walk_lie_end_to_end(catalog: Catalog) -> None:
    await turn(catalog, "a", range(10))  # segments end at 4, 8, 10
    await turn(catalog, "b", [*range(8), 90, 91])
    await turn(catalog, "c", [*range(5), 80])
    for tokens, starts in [
        ([*range(8), 90, 91, 92], [0, 4, 8]),
        ([*range(5), 80], [0, 4, 5]),
        ([*range(7), 1], [0, 4]),
    ]:
        walk = await catalog.walk(IDENTITY, NAMESPACE, ids(tokens))
        assert [segment.start for segment in walk.path.segments] == starts
        assert walk.path.segments[-1].end >= walk.path.num_tokens
        assert all(segment.readable for segment in walk.path.segments)
    first = walk.path.segments[0]
    assert (first.nbytes, first.restorable, first.whole) == (128, True, True)
    assert first.windows == {8: 3} and first.index == 0
    assert [(at.run.start, at.until) for at in walk.runs] == [(0, 7)]


@on_catalog
async def test_big_token_ids_are_compared_exactly(catalog: Catalog) -> None:
    await turn(catalog, "a", [2**32 - 1, 256, 0, 65536])
    assert await depth(catalog, [2**32 - 1, 256, 0, 65536]) == 4
    assert await depth(catalog, [2**32 - 1, 256, 0, 1]) == 3
    assert await depth(catalog, [255, 256]) == 0


@on_catalog
async def test_a_growing_conversation_writes_rows_for_what_is_new_only(catalog: Catalog) -> None:
    rows: Counter[str] = Counter()

    def count(_: Any, __: Any, statement: str, parameters: Any, ___: Any, many: bool) -> None:
        if statement.startswith(("INSERT", "DELETE")):
            rows[statement.split()[2]] += len(parameters) if many else 1

    for turns in range(1, 20):
        await turn(catalog, "c", range(turns * 5), num_messages=turns * 2)
    event.listen(catalog.database.engines[1].sync_engine, "after_cursor_execute", count)
    await turn(catalog, "c", range(100), num_messages=40)
    assert rows == {"runs": 1, "contents": 1, "messages": 2, "writes": 1}
    found = await catalog.find("t", "c")
    assert found is not None and same(found, conversation("c", range(100), num_messages=40))


@on_catalog
async def test_messages_follow_an_edit_and_a_rollback(catalog: Catalog) -> None:
    await turn(catalog, "c", range(10), num_messages=6)
    edited = conversation("c", range(8), num_messages=4)
    messages = [*edited.messages[:2], StoredMessage("tool", b"x" * 16, None), edited.messages[3]]
    await catalog.put(replace(edited, messages=messages))
    found = await catalog.find("t", "c")
    assert found is not None and found.messages == messages


@on_catalog
async def test_a_fork_copies_nothing_and_needs_known_tokens(catalog: Catalog) -> None:
    await turn(catalog, "c", range(10))
    before = await catalog.totals(NOW)
    await catalog.put(conversation("fork", range(7)))
    after = await catalog.totals(NOW)
    assert after == replace(before, num_conversations=2)
    with pytest.raises(LookupError):
        await catalog.put(conversation("longer", range(11)))
    with pytest.raises(LookupError):
        await catalog.put(conversation("elsewhere", range(7), namespace=b"other"))
    assert await catalog.totals(NOW) == after
    found = await catalog.find("t", "fork")
    assert found is not None and list(found.token_ids) == list(range(7))


@on_catalog
async def test_a_conversation_without_tokens_is_kept(catalog: Catalog) -> None:
    await catalog.put(conversation("c", []))
    found = await catalog.find("t", "c")
    assert found is not None and same(found, conversation("c", []))
    assert await catalog.path("t", "c") == ()
    assert await catalog.delete("t", "c") == []


@on_catalog
async def test_a_write_on_an_outdated_walk_changes_nothing(catalog: Catalog) -> None:
    (first,) = await turn(catalog, "c", range(10))
    before = await catalog.totals(NOW)

    def change(parent_id: int | None, start: int, tokens: list[int], file: str = "new") -> Commit:
        new = NewRun(
            start=start,
            tokens=ids(tokens),
            key=key([*range(start), *tokens]),
            content=content(file, start, start + len(tokens)),
        )
        return Commit(
            identity=IDENTITY,
            namespace=NAMESPACE,
            now=NOW,
            parent_id=parent_id,
            new_runs=[new],
            nbytes=100,
        )

    for outdated in [
        change(first, 5, [5, 6]),  # the parent goes on so
        change(None, 0, [0, 7]),  # a sibling begins so
        change(first, 11, [5]),  # behind its end
        change(first, 0, [5]),  # above it
        change(first + 1, 5, [9]),  # gone
        change(None, 5, [9]),  # nowhere
        change(first, 5, [9], file="c-0-10"),  # a file of another run
    ]:
        with pytest.raises(TreeChanged):
            await catalog.commit(outdated)
    with pytest.raises(TreeChanged):
        await catalog.commit(filling(first, range(10), 0))  # it has a file
    rest = conversation("d", range(12))
    with pytest.raises(LookupError):
        await catalog.commit(replace(change(first, 5, [9]), conversation=rest))
    assert await catalog.totals(NOW) == before and await catalog.find("t", "d") is None
    (added,) = await catalog.commit(change(first, 5, [9, 9]))
    assert added > first and await depth(catalog, [*range(5), 9, 9]) == 7


@on_catalog
async def test_segments_that_do_not_cover_their_run_are_refused(catalog: Catalog) -> None:
    for start, end in [(0, 3), (1, 4), (0, 5)]:
        new = NewRun(
            start=0, tokens=ids(range(4)), key=key(range(4)), content=content("f", start, end)
        )
        with pytest.raises(ValueError, match="end to end"):
            await catalog.commit(
                Commit(identity=IDENTITY, namespace=NAMESPACE, now=NOW, new_runs=[new])
            )


@on_catalog
async def test_a_healed_run_is_split_where_the_newcomer_parts(catalog: Catalog) -> None:
    (first,) = await turn(catalog, "a", range(10))
    (below,) = await turn(catalog, "b", [*range(8), 90, 91])
    (above,) = await turn(catalog, "c", [*range(3), 80, 81])
    await catalog.put(conversation("early", range(6)))
    await catalog.put(conversation("late", range(9)))
    await catalog.evict([below, above])
    await catalog.evict([first])
    await catalog.commit(
        replace(
            filling(first, range(6), 0),
            parent_id=first,
            new_runs=[
                NewRun(
                    start=6,
                    tokens=ids([70]),
                    key=key([*range(6), 70]),
                    content=content("more", 6, 7),
                )
            ],
            conversation=conversation("d", [*range(6), 70]),
        )
    )
    for id, tokens in [
        ("a", [*range(10)]),
        ("b", [*range(8), 90, 91]),
        ("c", [*range(3), 80, 81]),
        ("d", [*range(6), 70]),
        ("early", [*range(6)]),
        ("late", [*range(9)]),
    ]:
        found = await catalog.find("t", id)
        assert found is not None and list(found.token_ids) == tokens
        walk = await catalog.walk(IDENTITY, NAMESPACE, ids(tokens))
        assert walk.path.num_tokens == len(tokens)
        assert [(at.run.id, at.until) for at in walk.runs] == [
            (at.run.id, at.until) for at in await catalog.path("t", id) or ()
        ]
    walk = await catalog.walk(IDENTITY, NAMESPACE, ids(range(10)))
    shape = [(at.run.start, at.until, at.run.file, at.run.state) for at in walk.runs]
    assert shape == [(0, 6, "filled", "present"), (6, 10, None, "evicted")]
    readable = [(at.start, at.end, at.readable) for at in walk.path.segments]
    assert readable == [(0, 4, True), (4, 6, True), (6, 10, False)]


@on_catalog
async def test_flags_change_alone(catalog: Catalog) -> None:
    await turn(catalog, "c", range(4))
    until = NOW + timedelta(hours=1)
    assert await catalog.change("t", "c", pinned=True, pinned_until=until)
    assert await catalog.change("t", "c", title="new", saved=True)
    assert await catalog.change("t", "c", expires_at=until)
    assert not await catalog.change("t", "other", saved=True)
    (head,) = await catalog.heads()
    expected = conversation("c", range(4)).head
    assert head == replace(
        expected, pinned=True, pinned_until=until, title="new", saved=True, expires_at=until
    )
    assert await catalog.expired(until - SECOND) == []
    assert await catalog.expired(until) == [("t", "c")]


@on_catalog
async def test_use_moves_forward_only(catalog: Catalog) -> None:
    await turn(catalog, "c", range(4))
    later = NOW + timedelta(days=1)
    await catalog.touch({("t", "c"): later, ("t", "gone"): later})
    await catalog.touch({("t", "c"): NOW})
    await catalog.touch({})
    assert (await catalog.heads())[0].used_at == later
    (tip,) = await catalog.path("t", "c") or ()
    assert tip.run.used_at == later
    assert [holding.age_s for holding in await catalog.holdings(later)] == [0]


@on_catalog
async def test_bytes_written_are_counted_by_utc_day(catalog: Catalog) -> None:
    await turn(catalog, "a", [1], nbytes=10)
    await turn(catalog, "b", [2], nbytes=5)
    await turn(catalog, "c", [3], nbytes=7, now=NOW + SECOND)  # midnight has passed
    today, tomorrow = await catalog.totals(NOW), await catalog.totals(NOW + SECOND)
    assert (today.today_nbytes, tomorrow.today_nbytes, today.written_nbytes) == (15, 7, 22)
    assert (today.num_files, today.num_runs, today.nbytes) == (3, 3, 22)


@on_catalog
async def test_the_last_writer_of_an_id_may_have_another_root(catalog: Catalog) -> None:
    await turn(catalog, "c", range(5))
    other = replace(IDENTITY, weights="2")
    put = renamed(conversation("x", [], identity=other), "c")
    await catalog.put(put)
    found = await catalog.find("t", "c")
    assert found is not None and same(found, put)

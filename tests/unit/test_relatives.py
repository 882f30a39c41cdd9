"""Who shares a beginning with whom: told alike from memory and from the index."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kvserve.chat.records import from_stored
from kvserve.chat.relatives import MOST, in_memory, last_used, least_shared, on_disk
from kvserve.core.types import TokenIds
from kvserve.store.runs import Kin
from kvserve.store.store import Store
from tests.store_fakes import IDENTITY, write
from tests.unit.cache_stores import ALICE, ROOMY, talk, talks
from tests.unit.chat_house import House, durable_house, run


async def stored(folder: Path, *conversations: object) -> Store:
    store = await Store.open(folder, identity=IDENTITY, limits=ROOMY)
    for conversation in conversations:
        await write(store, conversation)  # type: ignore[arg-type]
    return store


def pairs(found: object) -> dict[str, tuple[int, int]]:
    return {one.id: (one.tokens, one.shared_tokens) for one in found}  # type: ignore[attr-defined]


def test_memory_and_index_tell_the_same(tmp_path: Path) -> None:
    made = talks()
    records = {name: from_stored(one) for name, one in made.items()}
    want = {
        "main": {"fork": (210, 170), "other": (160, 120)},
        "fork": {"main": (230, 170), "other": (160, 120)},
        "other": {"main": (230, 120), "fork": (210, 120)},
    }

    async def scenario() -> None:
        store = await stored(tmp_path, *made.values())
        try:
            for name, expected in want.items():
                record = records[name]
                same_tenant = [one for one in records.values() if one.tenant == ALICE]
                assert pairs(in_memory(record, same_tenant)) == expected
                kin = await store.catalog.kin(ALICE, name, least_shared(record))
                assert {one.id for one in kin} == {name, *expected}
                assert pairs(on_disk(record, kin)) == expected
            assert pairs(in_memory(records["main"], [records["keyless"]])) == {}
            assert await store.catalog.kin("", "main", 1) == ()
            assert [one.id for one in await store.catalog.kin("", "other", 1)] == ["other"]
            assert await store.catalog.kin(ALICE, "other", 161) == ()
        finally:
            await store.aclose()

    asyncio.run(scenario())


def grown(seed: int) -> list[TokenIds]:
    """Return prompts each of which leaves an earlier one somewhere, or stops there."""
    random = np.random.default_rng(seed)
    prompts = [random.integers(0, 3, 40).astype(np.uint32)]
    for _ in range(11):
        base = prompts[random.integers(len(prompts))]
        at = int(random.integers(1, len(base) + 1))
        tail = random.integers(0, 3, random.integers(8, 20)).astype(np.uint32)
        prompts.append(np.concatenate([base[:at], tail]))
    return prompts


@pytest.mark.parametrize("seed", range(6))
def test_the_index_knows_the_fork_to_the_token(seed: int, tmp_path: Path) -> None:
    prompts = grown(seed)
    made = [talk(ALICE, f"c{n}", prompt, (8, len(prompt))) for n, prompt in enumerate(prompts)]
    records = [from_stored(one) for one in made]

    async def scenario() -> None:
        store = await stored(tmp_path, *made)
        try:
            for record in records:
                kin = await store.catalog.kin(ALICE, record.id, least_shared(record))
                assert pairs(on_disk(record, kin)) == pairs(in_memory(record, records))
                for one in kin:
                    ends = [0, *(at.until for at in one.path)]
                    assert [at.start for at in one.path] == ends[:-1]
        finally:
            await store.aclose()

    asyncio.run(scenario())


def test_another_models_conversation_is_no_relative() -> None:
    record = from_stored(talks()["main"])
    other = replace(record, id="b", identity=replace(record.identity, weights="others"))
    assert in_memory(record, [other]) == [] and len(in_memory(record, [replace(record, id="b")]))


def test_of_too_many_the_last_used_are_told() -> None:
    record = from_stored(talks()["main"])
    [one] = in_memory(record, [replace(record, id="b")])
    many = [replace(one, id=f"{number:05}") for number in range(MOST + 5)]
    assert [one.id for one in last_used(many)] == sorted((o.id for o in many), reverse=True)[:MOST]


def test_a_conversation_unknown_to_the_index_has_no_relatives_there() -> None:
    record = from_stored(talks()["main"])
    assert on_disk(record, [Kin("other", record.used_at, ())]) == []


@run
async def test_relatives_are_shown_from_memory_alone() -> None:
    house = House()
    await house.say("Hi", conversation_id="c")
    await house.say("Hi", "ok", "More", conversation_id="d")
    await house.say("Hi", conversation_id="foreign", tenant="B")
    detail = await house.conversations.detail("", "c")
    assert [one.id for one in detail.shares] == ["d"]


@run
async def test_relatives_on_disk_are_shown_after_a_restart(tmp_path: Path) -> None:
    async with durable_house(tmp_path) as house:
        await house.say("Hi", conversation_id="c")
        await house.say("Hi", "ok", "More", conversation_id="d")
        await house.written()
        before = await house.conversations.detail("", "c")
    async with durable_house(tmp_path) as house:
        after = await house.conversations.detail("", "c")
        assert house.book.find("", "d") is None, "its tokens are not read"
        assert pairs(after.shares) == pairs(before.shares) != {}
        await house.conversations.delete("", "d")
        assert (await house.conversations.detail("", "c")).shares == ()

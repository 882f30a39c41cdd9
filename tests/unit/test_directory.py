"""What is shown of conversations: lists, totals, tiers, and the cuts of one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvserve.chat.archive import PersistMode
from kvserve.chat.holdings import Holding, message_cuts
from kvserve.core.errors import InvalidRequest, NotFound
from kvserve.core.types import Cut
from tests.unit.chat_house import House, durable_house, run


@run
async def test_the_list_shows_own_conversations_page_by_page() -> None:
    house = House()
    for i in range(5):
        await house.say(f"Hi {i}", conversation_id=f"a{i}", tenant="A")
    await house.say("Secret", conversation_id="b", tenant="B")
    first = await house.conversations.page("A", limit=2, after=None)
    assert [item.id for item in first.items] == ["a4", "a3"] and first.has_more
    rest = await house.conversations.page("A", limit=9, after="a3")
    assert [item.id for item in rest.items] == ["a2", "a1", "a0"] and not rest.has_more
    assert first.totals["conversations"] == 5 and first.totals["messages"] == 15
    assert first.guards["persist"] == "off"
    item = first.items[0]
    assert (item.tier, item.model, item.saved, item.pinned) == ("ram", "tiny", False, False)
    assert item.bytes == 10 * item.tokens and item.created_at <= item.used_at
    for limit, after in ((0, None), (9, "b")):
        with pytest.raises(InvalidRequest):
            await house.conversations.page("A", limit=limit, after=after)


@run
async def test_one_conversation_shows_its_cuts() -> None:
    house = House()
    await house.say("Hi", "ok", "And?", conversation_id="c", reply="Yes.")
    detail = await house.conversations.detail("", "c")
    assert [cut.role for cut in detail.cuts] == ["system", "user", "assistant", "user", "assistant"]
    starts, ends = [c.start for c in detail.cuts], [c.end for c in detail.cuts]
    assert starts == [0, *ends[:-1]] and ends[-1] == detail.info.tokens
    assert {cut.tier for cut in detail.cuts} == {"ram"}
    assert abs(sum(cut.bytes for cut in detail.cuts) - detail.info.bytes) <= len(detail.cuts)
    house.cache.paths.clear()
    gone = await house.conversations.detail("", "c")
    assert gone.info.tier == "none" and gone.info.bytes == 0
    assert {cut.tier for cut in gone.cuts} == {"none"}


@run
async def test_others_conversations_are_not_found() -> None:
    house = House()
    await house.say("Hi", conversation_id="c", tenant="A")
    for act in (house.conversations.detail, house.conversations.delete):
        for tenant, id_ in (("B", "c"), ("", "c"), ("A", "d")):
            with pytest.raises(NotFound, match="no conversation of this id"):
                await act(tenant, id_)
    await house.conversations.delete("A", "c")
    assert house.cache.dropped == [(("conv", "A", "c"), True)]
    with pytest.raises(NotFound):
        await house.conversations.detail("A", "c")


@run
async def test_what_is_on_disk_is_shown_after_a_restart_without_reading_it(tmp_path: Path) -> None:
    async with durable_house(tmp_path) as house:
        await house.say("Hi", conversation_id="c")
        await house.say("Hi", "ok", "Branch", conversation_id="d")
        await house.written()
        before = await house.conversations.page("", limit=9, after=None)
        assert [item.tier for item in before.items] == ["ram", "ram"]
    async with durable_house(tmp_path) as house:
        page = await house.conversations.page("", limit=9, after=None)
        assert house.book.find("", "c") is None, "a list needs no bodies"
        for new, old in zip(page.items, before.items, strict=True):
            assert (new.id, new.tokens, new.messages) == (old.id, old.tokens, old.messages)
            assert new.tier == "disk" and new.bytes >= new.shared_bytes > 0
            assert new.branches == 2 and new.created_at == old.created_at
        assert page.totals == before.totals
        guards = page.guards
        assert guards["stored_bytes"] > 0
        assert guards["save_limit_bytes"] == 200 * 2**30 and guards["persist"] == "auto"


@run
async def test_each_message_shows_where_it_is(tmp_path: Path) -> None:
    async with durable_house(tmp_path, PersistMode.MANUAL) as house:
        await house.say("Hi", conversation_id="c")
        await house.conversations.save("", "c", title=None)
        path = house.cache.paths[-1]
        await house.say("Hi", "ok", "And?", conversation_id="c")
        house.cache.paths[:] = [(path[0], path[1][:40])]
        detail = await house.conversations.detail("", "c")
        tiers = [cut.tier for cut in detail.cuts]
        # The end of the reply was never fed, and so is not on disk: two tokens of message 2.
        assert tiers == ["ram", "disk", "none", "none", "none"]
        assert detail.info.tier == "disk"
        assert all(cut.bytes > 0 for cut in detail.cuts[:2])


@run
async def test_what_has_ended_is_neither_listed_nor_counted(tmp_path: Path) -> None:
    async with durable_house(tmp_path) as house:
        await house.say("Hi", conversation_id="c")
        house.book.revise(("", "c"), expires_at=house.tick())
        house.wait(1)
        page = await house.conversations.page("", limit=9, after=None)
        assert page.items == () and page.totals["conversations"] == 0
        with pytest.raises(NotFound):
            await house.conversations.detail("", "c")


class Counted(list[tuple[int, int, int]]):
    """Ranges that count how often one of them is looked at."""

    num_looks = 0

    def __getitem__(self, at: Any) -> Any:
        self.num_looks += 1
        return super().__getitem__(at)

    def __iter__(self) -> Any:
        raise AssertionError("all of them are looked at for each message")


@run
async def test_the_cuts_of_a_long_chat_cost_no_square_of_its_messages() -> None:
    house = House()
    await house.say("Hi", conversation_id="c")
    short = house.book.find("", "c")
    assert short is not None
    num = 2000
    cuts = tuple(Cut(10 * at + 10, at) for at in range(num))
    record = replace(short, roles=("user",) * num, cuts=cuts)
    on_disk = Counted((10 * at, 10 * at + 10, 100) for at in range(0, num, 2))
    found = message_cuts(record, Holding("disk", 0, 0, 5, [(0, 5, 20)], on_disk))
    # Of the first one, half is in memory; of the others each second one is on disk.
    assert [(cut.tier, cut.bytes) for cut in found] == [("disk", 100), ("none", 0)] * (num // 2)
    assert on_disk.num_looks < 30 * num

"""Orders for conversations, over a real store: what is answered is done and durable."""

from __future__ import annotations

import asyncio
import errno
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import event

from kvserve.chat.archive import PersistMode
from kvserve.chat.miss import KvSource
from kvserve.chat.request import TurnRequest
from kvserve.core.errors import (
    Conflict,
    Damaged,
    InvalidRequest,
    KvserveError,
    NotFound,
    OutOfSpace,
    RequestFailed,
    TooLarge,
)
from kvserve.store.disk import Disk, DiskUsage
from kvserve.store.guards import Limits
from tests.unit.chat_fixtures import Info, chat
from tests.unit.chat_house import SYSTEM, House, durable_house, run, text_of

AUTO, MANUAL, OFF = PersistMode.AUTO, PersistMode.MANUAL, PersistMode.OFF


async def two_turns(house: House, conversation_id: str = "c", tenant: str = "") -> None:
    await house.say("Hi", conversation_id=conversation_id, tenant=tenant)
    await house.say("Hi", "ok", "And?", conversation_id=conversation_id, tenant=tenant)


def tokens_of(house: House, conversation_id: str) -> list[int]:
    found = house.book.find("", conversation_id)
    assert found is not None
    ids: list[int] = found.token_ids.tolist()
    return ids


@contextmanager
def failing_index(house: House) -> Iterator[None]:
    """Let every statement fail, as on a bad disk."""

    def fail(*args: Any) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    assert house.store is not None
    engines = [engine.sync_engine for engine in house.store.catalog.database.engines]
    for engine in engines:
        event.listen(engine, "before_cursor_execute", fail)
    try:
        yield
    finally:
        for engine in engines:
            event.remove(engine, "before_cursor_execute", fail)


def snapshots(folder: Path) -> list[Path]:
    return sorted(folder.glob("snapshots/??/*.safetensors"))


# -- saving and loading ------------------------------------------------------------------------


@run
async def test_what_was_saved_is_there_after_a_restart(tmp_path: Path) -> None:
    async with durable_house(tmp_path, MANUAL) as house:
        await two_turns(house)
        saved = await house.conversations.save("", "c", title="My chat")
        assert saved.saved and saved.title == "My chat" and saved.messages == 5
        assert saved.bytes == sum(file.stat().st_size for file in snapshots(tmp_path)) > 0
        tokens = tokens_of(house, "c")
        assert house.engine.num_leases == 0
    async with durable_house(tmp_path, MANUAL) as house:
        info = await house.info("c")
        assert (info.saved, info.title, info.tier) == (True, "My chat", "disk")
        assert tokens_of(house, "c") == tokens
        turn = await house.say("Hi", "ok", "And?", "ok", "So?", conversation_id="c")
        assert (turn.kv, turn.miss_reason) == (KvSource.SNAPSHOT, None)
        assert turn.num_cached == len(tokens)


@run
async def test_what_is_written_behind_a_turn_is_held_until_then_and_no_longer(
    tmp_path: Path,
) -> None:
    async with durable_house(tmp_path) as house:
        await two_turns(house)
        await house.written()
        assert house.engine.num_leases == 0  # a held path would be the last to be evicted
        store = house.store
        assert store is not None
        write, held = store.write, []

        async def meanwhile_a_turn(*args: Any, **kwargs: Any) -> Any:
            held.append(house.engine.num_leases)
            if len(held) == 1:
                await house.say("Hi", "ok", "And?", "ok", "So?", "ok", "Go on", conversation_id="c")
            return await write(*args, **kwargs)

        store.write = meanwhile_a_turn  # type: ignore[method-assign]
        await house.say("Hi", "ok", "And?", "ok", "So?", conversation_id="c")
        await house.written()
        assert held == [2, 2]  # the write's own, and the waiting turn's
        assert house.engine.num_leases == 0


@run
async def test_what_was_not_saved_in_mode_manual_is_not_there(tmp_path: Path) -> None:
    async with durable_house(tmp_path, MANUAL) as house:
        await two_turns(house)
    async with durable_house(tmp_path, MANUAL) as house:
        with pytest.raises(NotFound):
            await house.info("c")


@run
async def test_saving_twice_writes_once_and_keeps_the_title(tmp_path: Path) -> None:
    async with durable_house(tmp_path) as house:
        await two_turns(house)
        await house.conversations.save("", "c", title="T")
        files = {file: file.stat().st_mtime_ns for file in snapshots(tmp_path)}
        again = await house.conversations.save("", "c", title=None)
        assert again.title == "T"
        assert files == {file: file.stat().st_mtime_ns for file in snapshots(tmp_path)}


@run
async def test_a_turn_that_ends_during_a_save_keeps_the_flag(tmp_path: Path) -> None:
    async with durable_house(tmp_path) as house:
        await two_turns(house)
        sources = house.engine.sources

        async def slow(*args: Any) -> Any:
            await house.say("Hi", "ok", "And?", "ok", "So?", conversation_id="c")
            return await sources(*args)

        house.engine.sources = slow  # type: ignore[assignment, method-assign]
        await house.conversations.save("", "c", title="T")
        house.engine.sources = sources  # type: ignore[method-assign]
        info = await house.info("c")
        assert (info.messages, info.saved, info.title) == (7, True, "T")
        await house.written()
    async with durable_house(tmp_path) as house:
        info = await house.info("c")
        assert (info.messages, info.saved, info.title) == (7, True, "T")


class FullDisk(Disk):
    """A disk that says it is full when told to."""

    full = False

    def usage(self, folder: Path) -> DiskUsage:
        return DiskUsage(990, 10, 1000) if self.full else DiskUsage(10, 10**12, 10**12)


@pytest.mark.parametrize("mode", [AUTO, MANUAL])
def test_a_refused_save_changes_nothing(tmp_path: Path, mode: PersistMode) -> None:
    disk = FullDisk()

    @run
    async def test() -> None:
        async with durable_house(tmp_path, mode, disk=disk) as house:
            disk.full = True
            await two_turns(house)
            with pytest.raises(OutOfSpace, match="990 bytes of 1000 bytes are used"):
                await house.conversations.save("", "c", title="T")
            with pytest.raises(OutOfSpace):
                await house.conversations.pin("", "c", ttl_s=None)
            info = await house.info("c")
            assert (info.saved, info.pinned, info.title) == (False, False, None)
            assert snapshots(tmp_path) == []
            await house.say("Hi", "ok", "And?", "ok", "So?", conversation_id="c")
            disk.full = False
            assert (await house.conversations.save("", "c", title="T")).saved

    test()


@run
async def test_a_save_over_the_limit_is_too_large(tmp_path: Path) -> None:
    async with durable_house(tmp_path, MANUAL, limits=Limits(save_nbytes=100)) as house:
        await two_turns(house)
        with pytest.raises(TooLarge, match="100 bytes are allowed"):
            await house.conversations.save("", "c", title=None)
        assert not (await house.info("c")).saved


@run
async def test_state_that_is_gone_cannot_be_saved_and_comes_back_with_a_turn(
    tmp_path: Path,
) -> None:
    async with durable_house(tmp_path, MANUAL) as house:
        await two_turns(house)
        house.engine.let_go = True
        with pytest.raises(Conflict, match="next turn") as raised:
            await house.conversations.save("", "c", title=None)
        assert raised.value.code == "state_not_held"
        house.engine.let_go = False
        await house.conversations.save("", "c", title=None)


@run
async def test_with_persistence_off_what_needs_a_disk_is_refused_by_that_name() -> None:
    house = House()
    await two_turns(house)
    orders: list[Callable[[], Any]] = [
        lambda: house.conversations.save("", "c", title=None),
        lambda: house.conversations.pin("", "c", ttl_s=None),
        lambda: house.conversations.export("", "c"),
        lambda: house.conversations.import_("", nothing(), new_name="x", declared=None),
        lambda: house.conversations.warm(warm("x"), ttl_s=None, pin=True),
    ]
    submitted = len(house.engine.submitted)
    for order in orders:
        with pytest.raises(Conflict) as raised:
            await order()
        assert raised.value.code == "persistence_off"
    assert len(house.engine.submitted) == submitted, "refused before anything is computed"
    await house.conversations.fork("", "c", new_name="d", at_message=None)
    await house.conversations.rollback("", "c", to_message=1, drop_turns=None)
    await house.conversations.unpin("", "c")
    assert (await house.info("c")).messages == 2


async def nothing() -> AsyncIterator[bytes]:
    yield b""


@run
async def test_loading_brings_the_state_from_disk(tmp_path: Path) -> None:
    async with durable_house(tmp_path) as house:
        await two_turns(house)
    async with durable_house(tmp_path) as house:
        loaded = await house.conversations.load("", "c")
        assert (loaded.tier, loaded.messages) == ("ram", 5) and loaded.bytes > 0
        (generation,) = house.engine.submitted
        assert generation.request.max_tokens == 0 and generation.stored is not None
        assert ("conv", "", "c") in house.cache.bound
        turn = await house.say("Hi", "ok", "And?", "ok", "So?", conversation_id="c")
        assert turn.kv is KvSource.HIT


@run
async def test_loading_what_is_in_memory_still_looks_at_the_files(tmp_path: Path) -> None:
    async with durable_house(tmp_path) as house:
        await two_turns(house)
        await house.written()
        assert (await house.conversations.load("", "c")).tier == "ram"
        flip(snapshots(tmp_path)[0])
        tokens = len(tokens_of(house, "c"))
        with pytest.raises(Damaged, match=f"{tokens} of its {tokens} tokens") as raised:
            await house.conversations.load("", "c")
        assert raised.value.code == "snapshot_damaged"
        await house.written()  # again, from memory
        assert (await house.conversations.load("", "c")).tier == "ram"
        assert len(names(tmp_path / "quarantine")) == 1


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-5] ^= 4
    file.write_bytes(data)


@run
async def test_loading_damaged_files_says_how_many_tokens_are_left(tmp_path: Path) -> None:
    async with durable_house(tmp_path) as house:
        await house.say("Hi", conversation_id="c")
        await house.written()
        (first,) = snapshots(tmp_path)
        await house.say("Hi", "ok", "And?", conversation_id="c")
        await house.written()
        (second,) = (file for file in snapshots(tmp_path) if file != first)
    flip(second)
    async with durable_house(tmp_path) as house:
        with pytest.raises(Damaged, match=r"tokens can still be used"):
            await house.conversations.load("", "c")
        assert house.engine.submitted[0].num_closed >= 1, "nothing is computed for it"


@run
async def test_another_models_conversation_is_refused_with_what_differs(tmp_path: Path) -> None:
    async with durable_house(tmp_path) as house:
        await two_turns(house)
    other = Info(identity=replace(Info().identity, weights="ee" * 16, kv_dtype="float32"))
    async with durable_house(tmp_path, info=other) as house:
        with pytest.raises(Conflict, match="weights, kv_dtype") as raised:
            await house.conversations.load("", "c")
        assert raised.value.code == "model_changed"
        assert not house.engine.submitted
        # Its records and files can be looked after all the same.
        await house.conversations.save("", "c", title="Old")
        await house.conversations.pin("", "c", ttl_s=None)
        await house.conversations.fork("", "c", new_name="d", at_message=2)
        await house.conversations.rollback("", "c", to_message=2, drop_turns=None)
        exported = await house.conversations.export("", "d")
        assert exported.nbytes == len(b"".join([chunk async for chunk in exported]))
    async with durable_house(tmp_path) as house:
        assert (await house.info("c")).saved and (await house.info("c")).messages == 3
        assert (await house.conversations.load("", "d")).messages == 3


@run
async def test_a_server_that_reuses_nothing_cannot_load() -> None:
    house = House(info=Info(caching=False))
    await house.say("Hi", conversation_id="c")
    with pytest.raises(Conflict) as raised:
        await house.conversations.load("", "c")
    assert raised.value.code == "caching_off"


# -- forks and rollbacks -----------------------------------------------------------------------


@pytest.mark.parametrize("mode", [AUTO, OFF])
def test_a_fork_goes_its_own_way(tmp_path: Path, mode: PersistMode) -> None:
    async def check(house: House) -> None:
        await two_turns(house)
        made = await house.conversations.fork("", "c", new_name="d", at_message=2)
        assert (made.id, made.messages, made.branches) == ("d", 3, 2)
        turn = await house.say("Hi", "ok", "Else?", conversation_id="d")
        assert turn.kv is KvSource.HIT and turn.num_cached >= made.tokens
        assert (await house.info("c")).messages == 5
        whole = await house.conversations.fork("", "c", new_name=None, at_message=None)
        assert whole.id.startswith("conv_") and tokens_of(house, whole.id) == tokens_of(house, "c")

    @run
    async def test() -> None:
        if mode is OFF:
            await check(House())
        else:
            async with durable_house(tmp_path) as house:
                await check(house)
            async with durable_house(tmp_path) as house:
                assert (await house.info("d")).messages == 5
                assert len(house.book) == 3

    test()


@run
async def test_a_fork_and_a_rollback_are_durable_when_they_are_answered(tmp_path: Path) -> None:
    async with durable_house(tmp_path) as house:
        await two_turns(house)
        await house.written()
        files = snapshots(tmp_path)
        await house.conversations.fork("", "c", new_name="d", at_message=2)
        await house.conversations.rollback("", "c", to_message=None, drop_turns=1)
        assert house.store is not None
        for id_ in ("c", "d"):
            stored = await house.store.find("", id_)
            assert stored is not None and stored.token_ids.tolist() == tokens_of(house, id_)
        assert snapshots(tmp_path) == files, "no state is copied"


@run
async def test_a_fork_of_what_is_not_written_yet_is_durable_too(tmp_path: Path) -> None:
    async with durable_house(tmp_path) as house:
        await two_turns(house)
        await house.conversations.fork("", "c", new_name="d", at_message=2)
        assert house.store is not None and await house.store.find("", "d") is not None


@run
async def test_requests_without_an_id_go_on_with_the_source_of_a_fork() -> None:
    house = House()
    await two_turns(house)
    await house.conversations.fork("", "c", new_name="d", at_message=None)
    turn = await house.say("Hi", "ok", "And?", "ok", "So?")
    assert turn.conversation_id == "c"


@run
async def test_a_taken_id_is_a_conflict_and_another_tenants_is_not_taken() -> None:
    house = House()
    await two_turns(house)
    await house.say("Mine", conversation_id="mine", tenant="B")
    with pytest.raises(Conflict) as raised:
        await house.conversations.fork("", "c", new_name="c", at_message=None)
    assert (raised.value.param, raised.value.code) == ("new_id", "id_taken")
    made = await house.conversations.fork("", "c", new_name="mine", at_message=None)
    assert made.messages == 5
    assert (await house.info("mine", "B")).messages == 3


@run
async def test_a_rollback_forgets_what_came_later(tmp_path: Path) -> None:
    async with durable_house(tmp_path) as house:
        await two_turns(house)
        await house.conversations.save("", "c", title="T")
        back = await house.conversations.rollback("", "c", to_message=2, drop_turns=None)
        assert (back.messages, back.saved, back.title) == (3, True, "T")
        assert len(house.cache.bound["conv", "", "c"][1]) == back.tokens
        turn = await house.say("Hi", "ok", "Other", conversation_id="c")
        assert (turn.kv, turn.miss_reason) == (KvSource.HIT, None)
        assert turn.num_cached >= back.tokens
    async with durable_house(tmp_path) as house:
        assert (await house.info("c")).messages == 5


@run
async def test_a_turn_that_ends_after_a_rollback_is_the_tip(tmp_path: Path) -> None:
    async with durable_house(tmp_path) as house:
        await two_turns(house)
        house.engine.replies.append("late")
        turn = await house.start("Hi", "ok", "And?", "ok", "So?", conversation_id="c")
        await house.conversations.rollback("", "c", to_message=2, drop_turns=None)
        assert (await house.info("c")).messages == 3
        assert await text_of(turn) == "late"
        assert (await house.info("c")).messages == 7
    async with durable_house(tmp_path) as house:
        assert (await house.info("c")).messages == 7


@run
async def test_what_the_disk_refuses_is_put_back(tmp_path: Path) -> None:
    disk = FullDisk()
    async with durable_house(tmp_path, disk=disk) as house:
        disk.full = True
        await two_turns(house)
        await house.written()
        with pytest.raises(OutOfSpace):
            await house.conversations.fork("", "c", new_name="d", at_message=2)
        assert house.book.head("", "d") is None and ("conv", "", "d") not in house.cache.bound
        tip = tokens_of(house, "c")
        assert house.store is not None
        put = house.store.put

        async def late(*args: Any) -> None:
            house.book.touch(("", "c"), house.tick())  # as a turn does that begins
            await put(*args)

        house.store.put = late  # type: ignore[assignment, method-assign]
        with pytest.raises(OutOfSpace):
            await house.conversations.rollback("", "c", to_message=2, drop_turns=None)
        assert tokens_of(house, "c") == tip == house.cache.bound["conv", "", "c"][1].tolist()
        house.book.check()


@run
async def test_a_bad_place_changes_nothing() -> None:
    house = House()
    await two_turns(house)
    with pytest.raises(InvalidRequest):
        await house.conversations.fork("", "c", new_name="d", at_message=5)
    with pytest.raises(InvalidRequest):
        await house.conversations.rollback("", "c", to_message=None, drop_turns=9)
    assert house.book.head("", "d") is None and (await house.info("c")).messages == 5


# -- pins and life times -----------------------------------------------------------------------


@run
async def test_a_pin_is_durable_and_ends_by_itself(tmp_path: Path) -> None:
    async with durable_house(tmp_path, MANUAL) as house:
        await two_turns(house)
        pinned = await house.conversations.pin("", "c", ttl_s=100.0)
        assert pinned.pinned and pinned.pinned_until == pinned.expires_at is not None
        assert not pinned.saved
    async with durable_house(tmp_path, MANUAL) as house:
        assert (await house.info("c")).pinned
        house.wait(200)  # the clock of tests begins anew with each server
        info = await house.info("c")
        assert not info.pinned and info.pinned_until is None and info.expires_at is None


@run
async def test_a_pin_holds_until_it_is_taken_away(tmp_path: Path) -> None:
    async with durable_house(tmp_path) as house:
        await two_turns(house)
        assert (await house.conversations.pin("", "c", ttl_s=None)).pinned_until is None
        await house.say("Hi", "ok", "And?", "ok", "So?", conversation_id="c")
        house.wait(10**8)
        assert (await house.info("c")).pinned, "a turn leaves the pin where it is"
        assert not (await house.conversations.unpin("", "c")).pinned
        assert not (await house.conversations.unpin("", "c")).pinned
    async with durable_house(tmp_path) as house:
        assert not (await house.info("c")).pinned


def warm(*words: str, **more: Any) -> TurnRequest:
    messages = tuple(chat(*words, system=SYSTEM))
    return TurnRequest(request_id="w", tenant="", messages=messages, **more)


@run
async def test_a_warmed_prompt_is_reused_by_everybody_and_taken_by_nobody() -> None:
    house = House()
    warmed = await house.conversations.warm(warm(), ttl_s=None, pin=False)
    assert warmed.info.id.startswith("warm_") and warmed.info.messages == 1
    assert (warmed.num_cached, warmed.num_prefill) == (0, warmed.info.tokens)
    one = await house.say("First")
    two = await house.say("Second")
    assert one.num_cached >= warmed.info.tokens <= two.num_cached
    assert len({one.conversation_id, two.conversation_id, warmed.info.id}) == 3
    again = await house.conversations.warm(warm(), ttl_s=None, pin=False)
    assert again.info.id == warmed.info.id and again.num_prefill == 1
    other = await house.conversations.warm(warm("A document"), ttl_s=None, pin=False)
    salted = await house.conversations.warm(warm(cache_salt="s"), ttl_s=None, pin=False)
    assert len({again.info.id, other.info.id, salted.info.id}) == 3


@run
async def test_a_warmed_prompt_ends_after_its_time_even_over_a_restart(tmp_path: Path) -> None:
    async with durable_house(tmp_path) as house:
        made = await house.conversations.warm(warm(), ttl_s=100.0, pin=True)
        assert made.info.pinned and made.info.expires_at is not None
        short = await house.conversations.warm(warm("x"), ttl_s=50.0, pin=False)
        await house.written()
    async with durable_house(tmp_path) as house:
        assert (await house.info(made.info.id)).expires_at == made.info.expires_at
        house.wait(60)
        with pytest.raises(NotFound):
            await house.info(short.info.id)
        assert (await house.info(made.info.id)).pinned
        house.wait(60)
        with pytest.raises(NotFound):
            await house.conversations.delete("", made.info.id)


@run
async def test_an_index_that_cannot_be_read_costs_a_turn_its_history_and_no_more(
    tmp_path: Path,
) -> None:
    async with durable_house(tmp_path) as house:
        await two_turns(house)
    async with durable_house(tmp_path) as house:
        with failing_index(house):
            turn = await house.say("Hi", "ok", "And?", "ok", "So?", conversation_id="c")
            assert (turn.kv, turn.num_cached) == (KvSource.FRESH, 0)
            await house.say("Hi", conversation_id="unheard-of")
            for order in (house.info("c"), house.conversations.save("", "c", title=None)):
                with pytest.raises(RequestFailed):
                    await order
        assert (await house.info("c")).messages == 7
        with failing_index(house):
            await house.archive.close()  # a server that ends: logged, and no traceback


@run
async def test_a_path_that_gave_wrong_replies_is_not_read_again_while_it_is_taken_away(
    tmp_path: Path,
) -> None:
    async with durable_house(tmp_path) as house:
        await two_turns(house)
        record = house.book.find("", "c")
        assert record is not None
    async with durable_house(tmp_path) as house:
        store = house.store
        assert store is not None
        distrust, begun, go_on = store.distrust, asyncio.Event(), asyncio.Event()

        async def slow(*path: Any) -> int:
            begun.set()
            await go_on.wait()
            return await distrust(*path)

        store.distrust = slow  # type: ignore[assignment, method-assign]
        taking = asyncio.ensure_future(house.archive.distrust(record.namespace, record.token_ids))
        await begun.wait()
        turn = await house.say("Hi", "ok", "And?", "ok", "So?", conversation_id="c")
        assert turn.num_cached == 0
        go_on.set()
        await taking


# -- deleting ----------------------------------------------------------------------------------


@run
async def test_what_is_deleted_stays_away(tmp_path: Path) -> None:
    async with durable_house(tmp_path) as house:
        await two_turns(house)
        await house.written()
        await two_turns(house, "unwritten")
        for id_ in ("c", "unwritten"):
            await house.conversations.delete("", id_)
        assert snapshots(tmp_path) == []
    async with durable_house(tmp_path) as house:
        assert len(house.book) == 0


@run
async def test_a_reset_that_was_acknowledged_outlives_a_turn_that_never_ends(
    tmp_path: Path,
) -> None:
    async with durable_house(tmp_path) as house:
        await two_turns(house)
        await house.conversations.save("", "c", title="Old")
        files = snapshots(tmp_path)
        await house.start("New", conversation_id="c", reset_conversation=True)
        # The process ends here: nobody reads the turn, nobody closes it.
    async with durable_house(tmp_path) as house:
        assert len(house.book) == 0
        await house.say("Hi", "ok", "And?", conversation_id="c")
        await house.written()
        info = await house.info("c")
        assert (info.messages, info.saved, info.title) == (5, False, None)
        assert snapshots(tmp_path) == files  # what it had computed is still of use
        await house.conversations.delete("", "c")
        assert snapshots(tmp_path) == []  # and goes with the name, whoever held that


@run
async def test_a_reset_that_the_disk_refuses_costs_no_turn(tmp_path: Path) -> None:
    async with durable_house(tmp_path) as house:
        await two_turns(house)
        await house.written()
        assert house.store is not None

        async def fails(*args: Any) -> None:
            raise RequestFailed("The disk failed.")

        reset, house.store.reset = house.store.reset, fails  # type: ignore[assignment, method-assign]
        turn = await house.say("New", conversation_id="c", reset_conversation=True)
        assert turn.kv is KvSource.FRESH
        await house.written()
        house.store.reset = reset  # type: ignore[method-assign]
    async with durable_house(tmp_path) as house:
        assert (await house.info("c")).messages == 3


@run
async def test_a_turn_cancelled_while_its_reset_is_written_leaves_nothing_running(
    tmp_path: Path,
) -> None:
    async with durable_house(tmp_path) as house:
        await two_turns(house)
        await house.written()
        assert house.store is not None
        writing = asyncio.Event()

        async def waits(*args: Any) -> None:
            writing.set()
            await asyncio.Event().wait()

        house.store.reset = waits  # type: ignore[assignment, method-assign]
        turn = asyncio.create_task(house.start("New", conversation_id="c", reset_conversation=True))
        await writing.wait()
        turn.cancel()
        with pytest.raises(asyncio.CancelledError):
            await turn
        assert house.engine.submitted[-1].num_closed == 1
        await house.conversations.delete("", "c")
        await house.written()
        assert len(house.book) == 0


@run
async def test_a_delete_frees_memory_once_a_write_has_let_go_of_it(tmp_path: Path) -> None:
    async with durable_house(tmp_path) as house:
        assert house.store is not None
        write, writing, go_on = house.store.write, asyncio.Event(), asyncio.Event()

        async def slow(*args: Any, **kwargs: Any) -> Any:
            writing.set()
            await go_on.wait()
            return await write(*args, **kwargs)

        house.store.write = slow  # type: ignore[method-assign]
        await two_turns(house)
        await writing.wait()
        deleting = asyncio.create_task(house.conversations.delete("", "c"))
        await asyncio.sleep(0)
        assert house.engine.num_leases == 1 and not house.cache.dropped
        go_on.set()
        await deleting
        assert house.engine.num_leases == 0
        assert house.cache.dropped == [(("conv", "", "c"), True)]
        assert snapshots(tmp_path) == [] and len(house.book) == 0


@run
async def test_a_delete_that_fails_can_be_tried_again(tmp_path: Path) -> None:
    async with durable_house(tmp_path) as house:
        await two_turns(house)
        await house.written()
        assert house.store is not None
        delete = house.store.delete

        async def fails(*args: Any) -> bool:
            raise RequestFailed("The disk failed.")

        house.store.delete = fails  # type: ignore[assignment, method-assign]
        with pytest.raises(RequestFailed):
            await house.conversations.delete("", "c")
        assert (await house.info("c")).messages == 5
        house.store.delete = delete  # type: ignore[method-assign]
        await house.conversations.delete("", "c")
        assert len(house.book) == 0


# -- export and import -------------------------------------------------------------------------


async def exported(house: House, conversation_id: str = "c") -> bytes:
    file = await house.conversations.export("", conversation_id)
    data = b"".join([chunk async for chunk in file])
    assert len(data) == file.nbytes
    return data


async def pieces(data: bytes, size: int = 1000) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


@run
async def test_an_exported_conversation_goes_on_elsewhere(tmp_path: Path) -> None:
    async with durable_house(tmp_path / "a", MANUAL) as house:
        await two_turns(house)
        data = await exported(house)
        assert not (await house.info("c")).saved
        tokens = tokens_of(house, "c")
    async with durable_house(tmp_path / "b", MANUAL) as house:
        info = await house.conversations.import_("A", pieces(data), new_name=None, declared=None)
        assert (info.id, info.messages, info.saved) == ("c", 5, True) and info.bytes > 0
        named = await house.conversations.import_(
            "", pieces(data), new_name="d", declared=len(data)
        )
        assert named.id == "d" and tokens_of(house, "d") == tokens
        turn = await house.say("Hi", "ok", "And?", "ok", "So?", conversation_id="d")
        assert (turn.kv, turn.num_cached) == (KvSource.SNAPSHOT, len(tokens))
        assert names(tmp_path / "b" / "imports") == []
    async with durable_house(tmp_path / "b", MANUAL) as house:
        assert (await house.info("c", "A")).messages == 5


@run
async def test_an_import_never_replaces_a_conversation(tmp_path: Path) -> None:
    async with durable_house(tmp_path) as house:
        await two_turns(house)
        data = await exported(house)
        for name in ("c", None):
            with pytest.raises(Conflict) as raised:
                await house.conversations.import_("", pieces(data), new_name=name, declared=None)
            assert raised.value.code == "id_taken"
        assert names(tmp_path / "imports") == []


@run
async def test_an_import_takes_the_place_of_what_has_expired(tmp_path: Path) -> None:
    async with durable_house(tmp_path) as house:
        await two_turns(house)
        data = await exported(house)
        house.book.revise(("", "c"), expires_at=house.tick())
        await house.conversations.import_("", pieces(data), new_name=None, declared=None)
        info = await house.info("c")
        assert info.saved and info.expires_at is None


@run
async def test_a_rollback_that_fails_takes_no_flag_away_that_came_meanwhile(
    tmp_path: Path,
) -> None:
    async with durable_house(tmp_path) as house:
        await two_turns(house)
        await house.written()
        store = house.store
        assert store is not None

        async def fails(*args: Any) -> None:
            house.book.revise(("", "c"), saved=True)  # as a save before it does
            raise RequestFailed("The disk failed.")

        store.put = fails  # type: ignore[assignment, method-assign]
        with pytest.raises(RequestFailed):
            await house.conversations.rollback("", "c", to_message=2, drop_turns=None)
        info = await house.info("c")
        assert (info.messages, info.saved) == (5, True)


@run
async def test_an_import_for_another_model_says_what_differs(tmp_path: Path) -> None:
    async with durable_house(tmp_path / "a") as house:
        await two_turns(house)
        data = await exported(house)
    other = Info(identity=replace(Info().identity, quantisation="q4"))
    async with durable_house(tmp_path / "b", info=other) as house:
        with pytest.raises(Conflict, match="differs: quantisation") as raised:
            await house.conversations.import_("", pieces(data), new_name=None, declared=None)
        assert raised.value.code == "model_changed"
        assert len(house.book) == 0 and snapshots(tmp_path / "b") == []


@run
async def test_a_damaged_import_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    async with durable_house(tmp_path / "a") as house:
        await two_turns(house)
        data = await exported(house)
    async with durable_house(tmp_path / "b") as house:
        random = np.random.default_rng(1)
        flipped = []
        for at in random.integers(0, len(data), 20).tolist():
            copy = bytearray(data)
            copy[at] ^= 1 << int(random.integers(8))
            flipped.append(bytes(copy))
        for bad in (b"", b"x", b"{}" * 1000, data[:-1], data + b"x", data[:100], *flipped):
            with pytest.raises(Damaged) as raised:
                await house.conversations.import_("", pieces(bad), new_name="d", declared=None)
            assert raised.value.code == "snapshot_damaged"
        assert len(house.book) == 0
        for folder in ("imports", "quarantine"):
            assert names(tmp_path / "b" / folder) == []
        assert snapshots(tmp_path / "b") == []


@run
async def test_an_upload_stops_at_the_limits_and_with_its_sender(tmp_path: Path) -> None:
    disk = FullDisk()
    taken = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal taken
        while True:
            taken += 2**20
            yield bytes(2**20)

    async def broken() -> AsyncIterator[bytes]:
        yield b"half"
        raise ConnectionError

    limits = Limits(save_nbytes=10 * 2**20)
    async with durable_house(tmp_path, disk=disk, limits=limits) as house:

        async def bring(chunks: AsyncIterator[bytes], declared: int | None = None) -> None:
            await house.conversations.import_("", chunks, new_name="d", declared=declared)

        with pytest.raises(TooLarge):
            await bring(endless())
        assert taken <= 16 * 2**20
        taken = 0
        with pytest.raises(TooLarge):
            await bring(endless(), declared=11 * 2**20)
        assert taken == 0
        with pytest.raises(ConnectionError):
            await bring(broken())
        disk.full = True
        with pytest.raises(OutOfSpace, match="990 bytes of 1000 bytes"):
            await bring(pieces(bytes(100)))
        assert names(tmp_path / "imports") == []


@run
async def test_a_disk_that_fills_while_it_receives_is_out_of_space(tmp_path: Path) -> None:
    class Filling(Disk):
        def write_some(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
            raise OSError(errno.ENOSPC, "full")

    async with durable_house(tmp_path, disk=Filling()) as house:
        with pytest.raises(OutOfSpace):
            await house.conversations.import_("", pieces(b"x"), new_name="d", declared=None)
        assert names(tmp_path / "imports") == []


@run
async def test_a_disk_that_fails_while_it_receives_is_told_in_words(tmp_path: Path) -> None:
    class Broken(Disk):
        broken = ""

        def create(self, path: Path) -> int:
            if self.broken == "create":
                raise OSError(errno.ENOSPC, "full")
            return super().create(path)

        def write_some(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
            if self.broken == "write":
                raise OSError(errno.EIO, "broken")
            return super().write_some(fd, buffers, offset)

    disk = Broken()
    async with durable_house(tmp_path, disk=disk) as house:
        await two_turns(house)
        data = await exported(house)
        errors: dict[str, type[KvserveError]] = {"create": OutOfSpace, "write": RequestFailed}
        for disk.broken, error in errors.items():
            with pytest.raises(error, match="disk"):
                await house.conversations.import_("", pieces(data), new_name="d", declared=None)
            disk.broken = ""
            assert names(tmp_path / "imports") == []


@run
async def test_an_export_of_damaged_files_says_so(tmp_path: Path) -> None:
    async with durable_house(tmp_path) as house:
        await two_turns(house)
        await house.written()
        flip(snapshots(tmp_path)[0])
        with pytest.raises(Damaged, match="can still be used"):
            await exported(house)
        data = await exported(house)  # written again from memory
    async with durable_house(tmp_path / "b") as house:
        await house.conversations.import_("", pieces(data), new_name=None, declared=None)


@run
async def test_an_export_during_a_turn_is_of_one_moment(tmp_path: Path) -> None:
    async with durable_house(tmp_path) as house:
        await two_turns(house)
        await house.written()
        store = house.store
        assert store is not None
        database = store.catalog.database
        read = database.read

        async def then_a_turn_is_written(work: Callable[..., Any]) -> Any:
            result = await read(work)
            database.read = read  # type: ignore[method-assign]
            await house.say("Hi", "ok", "And?", "ok", "So?", conversation_id="c")
            await house.written()
            return result

        num_tokens = len(tokens_of(house, "c"))
        database.read = then_a_turn_is_written  # type: ignore[method-assign]
        export = await store.export("", "c")
        assert export.header.end == num_tokens < len(tokens_of(house, "c"))
        assert sum([len(block) async for block in export]) == export.nbytes


@run
async def test_nothing_is_done_for_what_another_tenant_has(tmp_path: Path) -> None:
    async with durable_house(tmp_path) as house:
        await two_turns(house, tenant="A")
        orders: list[Callable[[str], Any]] = [
            lambda id_: house.conversations.save("B", id_, title=None),
            lambda id_: house.conversations.load("B", id_),
            lambda id_: house.conversations.detail("B", id_),
            lambda id_: house.conversations.delete("B", id_),
            lambda id_: house.conversations.fork("B", id_, new_name=None, at_message=None),
            lambda id_: house.conversations.rollback("B", id_, to_message=0, drop_turns=None),
            lambda id_: house.conversations.pin("B", id_, ttl_s=None),
            lambda id_: house.conversations.unpin("B", id_),
            lambda id_: house.conversations.export("B", id_),
        ]
        for order in orders:
            errors = []
            for id_ in ("c", "never-was"):
                with pytest.raises(KvserveError) as raised:
                    await order(id_)
                errors.append((type(raised.value), raised.value.message))
            assert errors[0] == errors[1] and errors[0][0] is NotFound
        assert (await house.info("c", "A")).messages == 5

"""Turns: what a request is answered with, and what it leaves of its conversation."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from kvserve.chat.keeper import Run
from kvserve.chat.turn import KvSource
from kvserve.core.errors import (
    ContextTooLong,
    InvalidRequest,
    KvserveError,
    QueueFull,
    RequestFailed,
)
from kvserve.core.types import Finished
from tests.unit.chat_fixtures import THINKING, Info, byte_tokenizer, chat, message
from tests.unit.chat_house import House, run, text_of


@run
async def test_each_turn_reuses_the_whole_turn_before() -> None:
    house = House()
    first = await house.say("Hi", conversation_id="c")
    assert (first.kv, first.num_cached, first.miss_reason) == (KvSource.FRESH, 0, None)
    second = await house.say("Hi", "ok", "And?", conversation_id="c")
    held = first.num_prefill + len("ok")
    assert (second.kv, second.num_cached, second.miss_reason) == (KvSource.HIT, held, None)
    assert second.conversation_id == "c"
    namespace, tip = house.cache.bound["conv", "", "c"]
    assert namespace == house.engine.submitted[0].request.namespace
    assert len(tip) == second.num_cached + second.num_prefill + len("ok")


@run
async def test_a_conversation_is_found_by_its_content() -> None:
    house = House()
    first = await house.say("Hi", reply="Hello.")
    second = await house.say("Hi", "Hello.", "And?", reply="Yes")
    other = await house.say("Hi", "Goodbye.", "And?")
    third = await house.say("Hi", "Hello.", "And?", "Yes", "So?")
    assert first.conversation_id and first.conversation_id.startswith("conv_")
    assert first.conversation_id == second.conversation_id == third.conversation_id
    assert other.conversation_id != first.conversation_id
    assert (third.kv, other.kv) == (KvSource.HIT, KvSource.FRESH)
    house.book.check()


@run
async def test_found_by_content_never_crosses_tenants_or_salts() -> None:
    house = House()
    first = await house.say("Hi", tenant="A")
    ids = {first.conversation_id}
    for more in ({"tenant": "B"}, {"tenant": "A", "cache_salt": "s"}, {"tenant": "A2"}):
        turn = await house.say("Hi", "ok", "x", **more)
        assert (turn.kv, turn.num_cached, turn.miss_reason) == (KvSource.FRESH, 0, None)
        ids.add(turn.conversation_id)
    assert len(ids) == 4


@run
async def test_an_id_under_another_salt_tells_nothing_of_what_it_held() -> None:
    house = House()
    await house.say("Hi", conversation_id="c", cache_salt="one")
    turn = await house.say("Other words", conversation_id="c", cache_salt="two")
    assert (turn.kv, turn.num_cached, turn.miss_reason) == (KvSource.FRESH, 0, None)


@run
async def test_clients_are_told_apart_by_address() -> None:
    house = House("client")
    one = await house.say("Hi", client_address="10.0.0.1")
    two = await house.say("Hi", client_address="10.0.0.2")
    again = await house.say("Other", client_address="10.0.0.1")
    assert one.conversation_id == again.conversation_id != two.conversation_id
    assert (await house.say("Hi")).conversation_id not in {one.conversation_id, None}


@run
async def test_off_keeps_no_conversation_but_those_named() -> None:
    house = House("off")
    turn = await house.say("Hi")
    again = await house.say("Hi")
    assert (turn.conversation_id, turn.kv, again.kv) == (None, KvSource.NONE, KvSource.NONE)
    assert again.num_cached > 0 and not house.cache.bound and len(house.book) == 0
    assert (await house.say("Hi", conversation_id="c")).conversation_id == "c"


@run
async def test_reset_starts_the_id_anew() -> None:
    house = House()
    await house.say("Hi", conversation_id="c")
    created = (await house.info("c")).created_at
    turn = await house.say("Other", conversation_id="c", reset_conversation=True)
    assert (turn.kv, turn.miss_reason, turn.conversation_id) == (KvSource.FRESH, None, "c")
    assert (("conv", "", "c"), False) in house.cache.dropped
    assert (await house.info("c")).created_at > created
    renewed = await house.say("Hi", "ok", "x", reset_conversation=True)
    assert renewed.conversation_id != "c"


@run
async def test_two_requests_on_one_id_are_both_right_and_the_last_to_finish_is_the_tip() -> None:
    house = House()
    await house.say("Hi", conversation_id="c")
    house.engine.replies += ["left", "right"]
    left = await house.start("Hi", "ok", "go left", conversation_id="c")
    right = await house.start("Hi", "ok", "go right", conversation_id="c")
    assert left.kv is right.kv is KvSource.HIT
    assert left.num_cached < left.num_prefill + left.num_cached
    assert await text_of(right) == "right"
    assert await text_of(left) == "left"
    prompts = [
        str(byte_tokenizer().decode(generation.request.prompt.token_ids.tolist()))
        for generation in house.engine.submitted
    ]
    assert "go right" not in prompts[1] and "go left" not in prompts[2]
    _, tip = house.cache.bound["conv", "", "c"]
    assert "go left" in byte_tokenizer().decode(tip.tolist())
    found = await house.say("Hi", "ok", "go left", "left", "more")
    assert found.conversation_id == "c"


@run
async def test_a_cancelled_first_turn_leaves_what_was_prefilled() -> None:
    house = House()
    house.engine.kept = 50
    house.engine.replies.append("never read to its end")
    turn = await house.start("Hi" * 50, conversation_id="c")
    await turn.aclose()
    await turn.aclose()
    assert [e async for e in turn] == []
    assert house.engine.submitted[0].num_closed >= 1
    assert (await house.info("c")).tokens == 50
    retry = await house.say("Hi" * 50, conversation_id="c")
    assert (retry.kv, retry.num_cached, retry.miss_reason) == (KvSource.HIT, 50, None)


@run
async def test_a_cancelled_consumer_closes_the_generation_even_in_a_cancelled_scope() -> None:
    house = House()
    house.engine.replies.append("abc")
    turn = await house.start("Hi", conversation_id="c")
    reading = asyncio.Event()

    async def consume() -> None:
        try:
            async for _ in turn:
                reading.set()
                await asyncio.Event().wait()
        finally:
            await turn.aclose()

    task = asyncio.create_task(consume())
    await reading.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert house.engine.submitted[0].num_closed == 1
    assert ("conv", "", "c") in house.cache.bound


@run
async def test_a_failed_turn_leaves_the_conversation_usable() -> None:
    house = House()
    await house.say("Hi", conversation_id="c")
    before = house.book.find("", "c")
    house.engine.fail_after = RequestFailed("broke")
    turn = await house.start("Hi", "ok", "And?", conversation_id="c")
    with pytest.raises(RequestFailed, match="broke"):
        await text_of(turn)
    assert house.engine.submitted[1].num_closed >= 1
    after = house.book.find("", "c")
    assert before and after and after.chain == before.chain
    _, path = house.cache.bound["conv", "", "c"]
    assert len(path) == turn.num_cached + turn.num_prefill
    house.engine.fail_after = None
    assert (await house.say("Hi", "ok", "And?", conversation_id="c")).kv is KvSource.HIT


@run
async def test_a_cancelled_turn_never_moves_a_newer_tip_back() -> None:
    house = House()
    await house.say("Hi", conversation_id="c")
    house.engine.replies += ["slow", "fast"]
    slow = await house.start("Hi", "ok", "slow", conversation_id="c")
    fast = await house.start("Hi", "ok", "fast", conversation_id="c")
    await text_of(fast)
    tip = house.cache.bound["conv", "", "c"]
    await slow.aclose()
    assert house.cache.bound["conv", "", "c"] is tip


@run
async def test_what_fails_before_it_starts_leaves_nothing() -> None:
    house = House()
    house.engine.fail_before = QueueFull("full")
    with pytest.raises(QueueFull):
        await house.start("Hi", conversation_id="c")
    assert len(house.book) == 0 and not house.cache.bound
    assert house.engine.submitted[0].num_closed == 1


@run
async def test_later_choices_leave_the_reference_alone() -> None:
    house = House()
    await house.say("Hi", conversation_id="c")
    tip = house.cache.bound["conv", "", "c"]
    second = await house.say("Hi", conversation_id="c", keep=False, reply="another")
    cancelled = await house.start("Hi", conversation_id="c", keep=False, reset_conversation=True)
    await cancelled.aclose()
    assert second.conversation_id == "c"
    assert house.cache.bound["conv", "", "c"] is tip and len(house.book) == 1


@run
async def test_the_reply_is_clamped_to_the_context() -> None:
    house = House(info=Info(context_length=100))
    turn = await house.say("Hi", max_tokens=10_000)
    request = house.engine.submitted[0].request
    assert request.max_tokens == 100 - len(request.prompt)
    assert turn.num_prefill == len(request.prompt)
    await house.say("Hi", max_tokens=3)
    assert house.engine.submitted[1].request.max_tokens == 3
    room = 100 - len(request.prompt)
    await house.say("Hi" + "x" * (room - 1))
    assert house.engine.submitted[2].request.max_tokens == 1
    with pytest.raises(ContextTooLong, match="has 100 tokens"):
        await house.say("Hi" + "x" * room)
    with pytest.raises(ContextTooLong, match="at least"):
        await house.say("x" * 10_000_000)


@run
async def test_reasons_reach_the_turn() -> None:
    house = House()
    await house.say("One question", "r1", "Two", conversation_id="c")
    words = ("One question", "r1", "Two", "ok", "Three")
    edited = await house.say("One question", "r1", "2", "ok", "Three", conversation_id="c")
    assert (edited.kv, edited.miss_reason) == (KvSource.HIT, "messages_changed; message=3")
    await house.say(*words, conversation_id="c")
    other = await house.say(*words, conversation_id="c", system="Another.")
    assert (other.kv, other.miss_reason) == (KvSource.FRESH, "system_changed")
    house.cache.paths.clear()
    lost = await house.say(*words, conversation_id="c", system="Another.")
    assert (lost.kv, lost.num_cached, lost.miss_reason) == (KvSource.FRESH, 0, "evicted")
    again = await house.say(*words, conversation_id="c", system="Another.")
    assert (again.kv, again.miss_reason) == (KvSource.HIT, None)


@run
async def test_a_suffix_that_is_not_repeated_costs_no_more_than_itself() -> None:
    house = House(template=THINKING)
    first = await house.say("Hi", conversation_id="c")
    second = await house.say("Hi", "ok", "And?", conversation_id="c")
    assert second.kv is KvSource.HIT
    assert second.num_cached >= house.engine.submitted[0].request.prompt.cuts[-1].position
    assert second.miss_reason == "template_changed"
    rolled_back = await house.say("Hi", conversation_id="c")
    assert rolled_back.miss_reason is None
    assert rolled_back.num_cached == first.num_prefill - 1


@run
async def test_caching_off_says_disabled_and_binds_nothing() -> None:
    house = House(info=Info(caching=False))
    turn = await house.say("Hi", conversation_id="c")
    again = await house.say("Hi", "ok", "x", conversation_id="c")
    assert turn.kv is again.kv is KvSource.DISABLED
    assert again.miss_reason is None and not house.cache.bound
    assert not house.engine.submitted[0].request.use_cache


@run
async def test_a_reply_that_goes_on_from_given_words_is_one_message() -> None:
    house = House()
    first = await house.say("Name one.", "I choose", reply=" red.")
    second = await house.say("Name one.", "I choose red.", "Why?")
    assert second.conversation_id == first.conversation_id
    assert (second.kv, second.miss_reason) == (KvSource.HIT, None)


@run
async def test_bad_input_is_refused_with_an_answer() -> None:
    house = House()
    for messages in ([], chat("\ud800"), [message("user", [{"type": "image_url"}])]):
        with pytest.raises(InvalidRequest):
            await house.start(messages=messages)
    with pytest.raises(KvserveError):
        await house.start("Hi", template_kwargs={"chat_template": "x"})
    assert not house.engine.submitted


@run
async def test_rendering_leaves_the_event_loop_free() -> None:
    house = House()
    loop, rendering, go_on = asyncio.get_running_loop(), asyncio.Event(), threading.Event()
    render = house.turns._formatter.render

    def slow(*args: Any, **kwargs: Any) -> Any:
        loop.call_soon_threadsafe(rendering.set)
        assert go_on.wait(10)
        return render(*args, **kwargs)

    house.turns._formatter.render = slow  # type: ignore[method-assign]
    task = asyncio.create_task(house.say("Hi"))
    await rendering.wait()
    go_on.set()
    await task


@run
async def test_a_turn_that_ends_after_its_conversation_was_deleted_does_not_revive_it() -> None:
    house = House()
    await house.say("Hi", conversation_id="c")
    house.engine.replies.append("late")
    turn = await house.start("Hi", "ok", "x", conversation_id="c")
    await house.conversations.delete("", "c")
    assert await text_of(turn) == "late"
    assert len(house.book) == 0 and not house.cache.bound


@run
async def test_a_forgotten_conversation_is_unbound_but_not_dropped() -> None:
    house = House(max_conversations=2)
    for i in range(3):
        await house.say(f"Hi {i}", conversation_id=f"c{i}")
    assert house.cache.dropped == [(("conv", "", "c0"), False)]
    assert set(house.cache.bound) == {("conv", "", "c1"), ("conv", "", "c2")}


@run
async def test_ended_turns_are_not_remembered_as_running() -> None:
    house = House()
    await house.say("Hi", conversation_id="c")
    turn = await house.start("Hi", conversation_id="c")
    running: set[Run] = house.turns._keeper._runs
    assert len(running) == 1
    events = [event async for event in turn]
    assert isinstance(events[-1], Finished) and not running
    await turn.aclose()

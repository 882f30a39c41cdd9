"""The book of conversations: bounded, separated, found by content; and the reasons for a miss."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from kvserve.chat.conversations import Conversation, ConversationBook, warm_id
from kvserve.chat.messages import identity_chain
from kvserve.chat.miss import Asked, KvSource, kv_source, miss_reason
from kvserve.chat.request import namespace_of
from kvserve.core.types import Cut, Prompt, Started
from tests.unit.chat_fixtures import chat, message
from tests.unit.snapshot_fixtures import IDENTITY

NOW = datetime(2026, 1, 1, tzinfo=UTC)
SPACE = namespace_of("", None)


def held(
    *words: str,
    id_: str = "c",
    tenant: str = "",
    tokens: list[int] | None = None,
    cuts: tuple[int, ...] = (),
    tools: bytes = b"",
    template: bytes = b"",
    system: str = "Be brief.",
) -> Conversation:
    messages = chat(*words, system=system)
    return Conversation(
        tenant=tenant,
        id=id_,
        namespace=namespace_of(tenant, None),
        model="tiny",
        identity=IDENTITY,
        token_ids=np.array(tokens or [1], dtype=np.uint32),
        chain=identity_chain(messages),
        roles=tuple(m["role"] for m in messages),
        cuts=tuple(Cut(position, i) for i, position in enumerate(cuts)),
        tools_digest=tools,
        template_digest=template,
        created_at=NOW,
        used_at=NOW,
    )


def asked(
    *words: str,
    tokens: list[int],
    cuts: tuple[int, ...],
    tools: bytes = b"",
    template: bytes = b"",
    system: str = "Be brief.",
) -> Asked:
    messages = chat(*words, system=system)
    marks = tuple(Cut(position, i) for i, position in enumerate(cuts))
    return Asked(
        Prompt(np.array(tokens, dtype=np.uint32), marks),
        identity_chain(messages),
        tuple(m["role"] for m in messages),
        tools,
        template,
    )


def test_the_longest_whole_history_is_continued() -> None:
    book = ConversationBook()
    book.put(held("a", "b", id_="short"))
    book.put(held("a", "b", "c", "d", id_="long"))
    book.put(held("a", "b", "c", "d", "e", "f", id_="longer"))

    def find(*words: str) -> str | None:
        found = book.continued_by("", SPACE, identity_chain(chat(*words)))
        return None if found is None else found.id

    assert find("a", "b", "c") == "short"
    assert find("a", "b", "c", "d", "x") == "long"
    assert find("a", "b", "c", " d\n", "x") == "long"  # clients trim replies
    assert find("x", "b", "c") is None
    assert find("a") is None
    assert book.continued_by("other", SPACE, identity_chain(chat("a", "b", "c"))) is None
    salted = namespace_of("", "salt")
    assert book.continued_by("", salted, identity_chain(chat("a", "b", "c"))) is None
    book.check()


def test_the_oldest_unused_conversation_goes_first() -> None:
    book = ConversationBook(max_conversations=2)
    book.put(held("a", "b", id_="1"))
    book.put(held("c", "d", id_="2"))
    book.touch(("", "1"), NOW)
    assert [gone.id for gone in book.put(held("e", "f", id_="3"))] == ["2"]
    assert book.find("", "2") is None and book.find("", "1") is not None
    assert book.continued_by("", SPACE, identity_chain(chat("c", "d", "x"))) is None
    book.check()


def test_token_ids_are_bounded_too() -> None:
    book = ConversationBook(max_tokens=10)
    book.put(held("a", "b", id_="1", tokens=[1] * 6))
    assert [gone.id for gone in book.put(held("c", "d", id_="2", tokens=[1] * 6))] == ["1"]
    assert book.put(held("c", "d", id_="2", tokens=[1] * 99)) == []
    book.check()
    with pytest.raises(ValueError, match="room"):
        ConversationBook(max_conversations=0)


def test_another_tenants_id_is_another_conversation() -> None:
    book = ConversationBook()
    book.put(held("a", "b", id_="chat-1", tenant="A"))
    assert book.find("B", "chat-1") is None
    assert list(book.of_tenant("B")) == []
    assert book.remove(("B", "chat-1")) is None
    assert book.find("A", "chat-1") is not None


def test_branches_share_their_first_question() -> None:
    book = ConversationBook()
    for id_, words in (("1", "ab"), ("2", "axyz"), ("3", "bb")):
        book.put(held(*words, id_=id_))
    counts = {r.id: book.num_branches(r) for r in book.of_tenant("")}
    assert counts == {"1": 2, "2": 2, "3": 1}


def test_a_clients_address_keeps_its_id() -> None:
    book = ConversationBook(max_conversations=2)
    first = book.id_of_client("", SPACE, "10.0.0.1")
    assert book.id_of_client("", SPACE, "10.0.0.1") == first
    assert book.id_of_client("", namespace_of("", "s"), "10.0.0.1") != first
    assert book.id_of_client("B", SPACE, "10.0.0.1") != first
    assert len(book._clients) == 2


def test_tenant_and_salt_cannot_pass_for_each_other() -> None:
    pairs = [("", None), ("", ""), ("a", "b"), ("ab", ""), ("ab", None), ("", "ab"), ("a", None)]
    assert len({namespace_of(*pair) for pair in pairs}) == len(pairs)
    namespace_of("\ud800", "\ud800")


# A conversation of system, user, assistant: ten tokens, ends at 3, 6 and 10.
HELD = held("q", "r", tokens=[*range(10)], cuts=(3, 6, 10), tools=b"t", template=b"k")


def why(prompt: Asked, num_cached: int) -> tuple[KvSource, str | None]:
    started = Started(num_cached, len(prompt.prompt) - num_cached)
    return (
        kv_source(HELD, prompt, started, IDENTITY),
        miss_reason(HELD, prompt, started, IDENTITY),
    )


def ask(
    *words: str,
    tokens: list[int],
    cuts: tuple[int, ...],
    system: str = "Be brief.",
    tools: bytes = b"t",
    template: bytes = b"k",
) -> Asked:
    return asked(*words, tokens=tokens, cuts=cuts, system=system, tools=tools, template=template)


def test_a_continuation_that_reuses_all_is_a_hit_without_reason() -> None:
    more = ask("q", "r", "s", tokens=[*range(14)], cuts=(3, 6, 10, 12))
    assert why(more, 10) == (KvSource.HIT, None)


def test_a_regenerate_or_a_rollback_is_no_miss() -> None:
    again = ask("q", tokens=[*range(8)], cuts=(3, 6))
    assert why(again, 7) == (KvSource.HIT, None)
    other_suffix = ask("q", tokens=[*range(6), 90, 91], cuts=(3, 6))
    assert why(other_suffix, 6) == (KvSource.HIT, None)


def test_a_changed_message_is_named() -> None:
    edited = ask("Q", tokens=[0, 1, 2, 3, 90, 91], cuts=(3, 5))
    assert why(edited, 4) == (KvSource.HIT, "messages_changed; message=1")
    reply = ask("q", "R", "s", tokens=[*range(8), 90, 91, 92], cuts=(3, 6, 9, 11))
    assert why(reply, 8) == (KvSource.HIT, "messages_changed; message=2")


def test_a_changed_system_prompt_is_named() -> None:
    other = ask("q", tokens=[0, 90, 2, 3], cuts=(2, 4), system="Be long.")
    assert why(other, 1) == (KvSource.FRESH, "system_changed")


def test_changed_tools_are_named() -> None:
    other = ask("q", "r", "s", tokens=[0, 90, 2, 3], cuts=(2, 4), tools=b"u")
    assert why(other, 1) == (KvSource.FRESH, "tools_changed")
    both = ask("q", "R", "s", tokens=[0, 90, 2, 3], cuts=(2, 4), tools=b"u")
    assert why(both, 1)[1] == "tools_changed"
    later = ask("q", "R", "s", tokens=[*range(8), 90, 91, 92], cuts=(3, 6, 9, 11), tools=b"u")
    assert why(later, 8)[1] == "messages_changed; message=2"


def test_same_messages_in_other_tokens_are_the_templates_doing() -> None:
    dropped = ask("q", "r", "s", tokens=[*range(6), 90, 91, 92], cuts=(3, 6, 8))
    assert why(dropped, 6) == (KvSource.HIT, "template_changed")
    switched = ask("q", tokens=[90, 91, 92], cuts=(2,), template=b"other")
    assert why(switched, 0) == (KvSource.FRESH, "template_changed")


def test_equal_tokens_that_were_not_reused_were_evicted() -> None:
    more = ask("q", "r", "s", tokens=[*range(14)], cuts=(3, 6, 10, 12))
    assert why(more, 0) == (KvSource.FRESH, "evicted")
    assert why(more, 6) == (KvSource.HIT, "evicted")
    edited = ask("Q", tokens=[0, 1, 2, 3, 90, 91], cuts=(3, 5))
    assert why(edited, 0) == (KvSource.FRESH, "evicted")


def test_a_conversation_that_held_nothing_misses_nothing() -> None:
    empty = held("q", "r")
    object.__setattr__(empty, "token_ids", np.array([], dtype=np.uint32))
    prompt = ask("q", tokens=[1, 2], cuts=(1,))
    assert miss_reason(empty, prompt, Started(0, 2), IDENTITY) is None
    assert kv_source(empty, prompt, Started(1, 1), IDENTITY) is KvSource.FRESH


def test_a_user_message_is_compared_exactly_and_reasoning_is_forgiven() -> None:
    one = identity_chain([message("user", "a"), message("assistant", "b", reasoning_content="r")])
    assert one == identity_chain([message("user", "a"), message("assistant", "b")])
    assert one[:2] != identity_chain([message("user", "a ")])


def test_a_durable_conversation_goes_back_to_being_a_head() -> None:
    book = ConversationBook(max_conversations=1)
    book.put(held("a", "b", id_="1"))
    book.mark_durable(("", "1"), held("a", "b", id_="1").head)
    book.touch(("", "1"), NOW + timedelta(hours=1))  # the disk learns of uses later
    assert [gone.id for gone in book.put(held("c", "d", id_="2"))] == ["1"]
    assert book.find("", "1") is None and book.head("", "1") is not None
    found = book.continued_by("", SPACE, identity_chain(chat("a", "b", "x")))
    assert found is not None and found.id == "1"
    assert book.is_durable(("", "1")) and not book.is_durable(("", "2"))
    book.revise(("", "1"), pinned=True, title="kept")
    head = book.head("", "1")
    assert head is not None and head.pinned and head.title == "kept"
    book.check()


def test_bodies_that_the_disk_has_leave_before_older_ones_that_it_has_not() -> None:
    book = ConversationBook(max_conversations=4)
    for id_ in ("never", "moved on", "pinned since", "clean"):
        record = held("a", "b", id_=id_)
        book.put(record)
        if id_ != "never":
            book.mark_durable(record.key, record.head)
    book.put(held("a", "b", "c", "d", id_="moved on"))
    book.revise(("", "pinned since"), pinned=True)
    book.check()
    assert [gone.id for gone in book.put(held("e", "f", id_="new"))] == ["clean"]
    assert book.head("", "clean") is not None
    book.check()


def test_a_head_never_tells_of_more_than_can_be_had() -> None:
    book = ConversationBook(max_conversations=1)
    written = held("a", "b", id_="1")
    book.put(written)
    book.mark_durable(written.key, written.head)
    book.put(held("a", "b", "c", "d", id_="1"))
    assert [gone.id for gone in book.put(held("e", "f", id_="2"))] == ["1"]
    assert book.find("", "1") is None and book.head("", "1") == written.head
    found = book.continued_by("", SPACE, identity_chain(chat("a", "b", "c", "d", "x")))
    assert found == written.head and book.is_durable(written.key)
    book.check()
    # A write of the older version that ends only now does not make the newer one durable.
    book.put(held("a", "b", "c", "d", id_="1"))
    book.mark_durable(written.key, written.head)
    book.put(held("g", "h", id_="3"))
    assert book.head("", "1") == written.head
    book.check()


def test_what_is_on_disk_is_learned_but_never_over_what_is_known() -> None:
    book = ConversationBook()
    book.put(held("a", "b", id_="1"))
    book.learn([held("x", "y", id_="1").head, held("c", "d", id_="2").head])
    known = book.find("", "1")
    assert known is not None and known.chain == identity_chain(chat("a", "b"))
    assert not book.is_durable(("", "1")) and book.is_durable(("", "2"))
    book.check()


def test_of_two_with_one_history_the_preferred_is_found_and_then_the_other() -> None:
    book = ConversationBook()
    book.put(held("a", "b", id_="source"))
    book.put(held("a", "b", id_="fork"))
    book.prefer(("", "source"))

    def find() -> str | None:
        found = book.continued_by("", SPACE, identity_chain(chat("a", "b", "c")))
        return None if found is None else found.id

    assert find() == "source"
    book.check()
    book.remove(("", "source"))
    assert find() == "fork"
    book.remove(("", "fork"))
    assert find() is None
    book.check()


def test_a_warmed_prompt_is_nobodys_history() -> None:
    book = ConversationBook()
    book.put(held("a", id_=warm_id(b"12")))
    assert book.continued_by("", SPACE, identity_chain(chat("a", "b", "c"))) is None
    book.check()
    book.remove(("", warm_id(b"12")))
    book.check()


def test_another_models_state_is_a_miss_that_says_what_differs() -> None:
    more = ask("q", "r", "s", tokens=[*range(14)], cuts=(3, 6, 10, 12))
    started = Started(0, 14)
    for change, reason in (
        ({"chat_template": "x"}, "template_changed"),
        ({"weights": "x"}, "model_changed; differs=weights"),
        ({"kv_dtype": "x", "layout": "2"}, "model_changed; differs=kv_dtype,layout"),
    ):
        now = replace(IDENTITY, **change)
        assert miss_reason(HELD, more, started, now) == reason
        assert kv_source(HELD, more, started, now) is KvSource.FRESH


def test_what_came_from_disk_is_a_snapshot_and_a_damaged_file_is_the_reason() -> None:
    more = ask("q", "r", "s", tokens=[*range(14)], cuts=(3, 6, 10, 12))
    assert kv_source(HELD, more, Started(10, 4, 4), IDENTITY) is KvSource.SNAPSHOT
    assert miss_reason(HELD, more, Started(6, 8, 0, damaged=True), IDENTITY) == "corrupt"

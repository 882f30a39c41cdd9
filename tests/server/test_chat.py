"""Conversations on a real server process, through the official client."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from tests.server.conftest import ServerProcess
from tests.server.talk import Answer, Message, ask, assistant, cold, system, user
from tests.tiny_models import words

pytestmark = pytest.mark.server

DOCUMENT = words(1500, 100)


def grown(messages: list[Message], answer: Answer, text: str) -> list[Message]:
    return [*messages, assistant(answer.text), user(text)]


def check_cold(client: openai.OpenAI, messages: list[Message], answer: Answer) -> None:
    assert answer.text == cold(client, messages).text


def test_each_turn_prefills_only_what_is_new(client: openai.OpenAI) -> None:
    messages = [system(words(200, 1)), user(words(20, 2))]
    answer = ask(client, messages, "turns")
    assert (answer.kv, answer.num_cached) == ("fresh", 0)
    for turn in range(4):
        before = answer
        messages = grown(messages, answer, words(15, 10 + turn))
        answer = ask(client, messages, "turns")
        assert answer.kv == "hit"
        assert answer.num_cached >= before.num_prompt
        assert answer.conversation_id == "turns"
        check_cold(client, messages, answer)


def test_an_edit_reuses_all_before_it_and_says_why_not_more(client: openai.OpenAI) -> None:
    messages = [system(words(100, 1)), user(words(20, 30))]
    for turn in range(4):
        answer = ask(client, messages, "edited")
        if turn == 1:
            third = answer
        messages = grown(messages, answer, words(15, 40 + turn))
    edited = [*messages[:3], user("something else, " + words(15, 50)), *messages[4:]]
    again = ask(client, edited, "edited")
    assert again.kv == "hit"
    assert third.num_prompt > again.num_cached > 100
    assert again.miss_reason == "messages_changed; message=3"
    check_cold(client, edited, again)


def test_a_regenerate_prefills_next_to_nothing(client: openai.OpenAI) -> None:
    messages = [system(words(300, 1)), user(words(40, 60))]
    first = ask(client, messages, "again")
    second = ask(client, messages, "again")
    assert second.num_prefill == 1
    assert (second.kv, second.miss_reason) == ("hit", None)
    assert second.text == first.text


def test_a_fork_under_another_id_shares_everything(client: openai.OpenAI) -> None:
    messages = [system(words(200, 1)), user(words(40, 70))]
    first = ask(client, messages, "trunk")
    messages = grown(messages, first, words(10, 71))
    trunk = ask(client, messages, "trunk")
    branch = ask(client, messages, "branch")
    assert branch.conversation_id == "branch"
    assert branch.num_prefill == 1
    assert branch.text == trunk.text
    for name in ("trunk", "branch"):
        following = grown(messages, trunk, words(5, 72))
        assert ask(client, following, name).num_cached >= trunk.num_prompt


def test_a_second_user_of_a_document_prefills_the_question_alone(client: openai.OpenAI) -> None:
    first = ask(client, [system(DOCUMENT), user("who is the first?")], "user-1")
    second = ask(client, [system(DOCUMENT), user("and what of winter?")], "user-2")
    assert first.num_cached < 100
    assert second.num_prefill < 30
    assert second.kv == "fresh"  # nothing of this conversation was there
    check_cold(client, [system(DOCUMENT), user("and what of winter?")], second)


def test_the_document_is_held_once_for_all_its_users(
    client: openai.OpenAI, server: ServerProcess
) -> None:
    text = words(800, 101)
    first = ask(client, [system(text), user("one?")], "reader-0")
    held = server.get("/stats")["cache"]["stored_bytes"]
    for i in range(1, 6):
        ask(client, [system(text), user(f"{i}?")], f"reader-{i}")
    grown_by = server.get("/stats")["cache"]["stored_bytes"] - held
    item = server.get("/v1/conv_kv/stats")
    assert grown_by < 0.5 * first.num_prompt * 2048
    assert item["totals"]["conversations"] == 0  # those are the client's, who has a key


def test_a_stream_says_the_same_as_a_reply_in_one_piece(client: openai.OpenAI) -> None:
    messages: Any = [user(words(30, 80))]
    whole = cold(client, messages, max_tokens=40)
    model = client.models.list().data[0].id
    with client.chat.completions.with_streaming_response.create(
        model=model,
        messages=messages,
        max_tokens=40,
        stream=True,
        stream_options={"include_usage": True},
        extra_headers={"X-Conversation-Id": "streamed"},
    ) as raw:
        headers = raw.headers
        chunks = list(raw.parse())
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.text
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.finish_reason
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.completion_tokens == whole.num_reply
    assert headers["x-conv-id"] == "streamed"
    figures = [int(headers[f"x-conv-{name}-tokens"]) for name in ("cached", "processing")]
    assert sum(figures) == usage.prompt_tokens


def test_a_stop_string_ends_the_reply_before_itself(client: openai.OpenAI) -> None:
    messages = [user(words(30, 81))]
    whole = ask(client, messages, max_tokens=60).text
    for length in (1, 2, 5):
        stop = whole[20 : 20 + length]
        answer = ask(client, messages, max_tokens=60, stop=["never said", stop])
        assert answer.text == whole[: whole.index(stop)]
        assert answer.finish_reason == "stop"


def test_max_tokens_are_exact_and_said_to_be_the_reason(client: openai.OpenAI) -> None:
    for limit in (1, 2, 17):
        answer = ask(client, [user("count to a thousand")], max_tokens=limit)
        assert answer.num_reply <= limit
        assert (answer.finish_reason == "length") == (answer.num_reply == limit)


def test_a_seed_repeats_a_reply_and_another_one_does_not(client: openai.OpenAI) -> None:
    messages = [user(words(30, 82))]
    replies = [
        ask(client, messages, max_tokens=30, temperature=1.5, seed=seed).text for seed in (1, 1, 2)
    ]
    assert replies[0] == replies[1] != replies[2]
    assert cold(client, messages, max_tokens=30, temperature=1.5, seed=1).text == replies[0]


def test_several_choices_cost_one_prefill(client: openai.OpenAI, server: ServerProcess) -> None:
    messages: Any = [system(words(400, 83)), user("hello")]
    before = server.get("/stats")["prefilled_tokens"]
    reply = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=messages, n=2, max_tokens=20, temperature=1.5, seed=3,
    )  # fmt: skip
    prefilled = server.get("/stats")["prefilled_tokens"] - before
    assert [choice.index for choice in reply.choices] == [0, 1]
    assert reply.choices[0].message.content != reply.choices[1].message.content
    assert reply.usage is not None
    assert prefilled <= reply.usage.prompt_tokens + 8


def test_eight_at_once_say_what_they_say_one_after_the_other(client: openai.OpenAI) -> None:
    chats = [[system(words(60 * i, 90)), user(words(10 + i, 91 + i))] for i in range(1, 9)]
    alone = [cold(client, chat, max_tokens=30).text for chat in chats]
    with ThreadPoolExecutor(8) as pool:
        together = list(
            pool.map(lambda i: ask(client, chats[i], f"at-once-{i}", max_tokens=30), range(8))
        )
    assert [answer.text for answer in together] == alone


def test_two_at_once_on_one_id_are_both_right(client: openai.OpenAI) -> None:
    start = [system(words(100, 1)), user(words(10, 110))]
    first = ask(client, start, "shared-id")
    histories = [grown(start, first, words(20, seed)) for seed in (111, 112)]
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda m: ask(client, m, "shared-id", max_tokens=40), histories))
    for history, answer in zip(histories, answers, strict=True):
        assert answer.text == cold(client, history, max_tokens=40).text
        following = grown(history, answer, "go on")
        again = ask(client, following, "shared-id")
        assert again.num_cached >= answer.num_prompt
        check_cold(client, following, again)


def test_another_key_shares_nothing_and_knows_nothing(server: ServerProcess) -> None:
    messages = [system(words(200, 120)), user("hello")]
    with server.client("key-one") as one, server.client("key-two") as two:
        first = ask(one, messages, "secret")
        other = ask(two, messages, "secret")
        assert (other.num_cached, other.kv) == (0, "fresh")
        assert other.text == first.text
        assert ask(one, messages, "secret").num_prefill == 1
        with pytest.raises(openai.NotFoundError):
            two.get("/conv_kv/secret-2", cast_to=object)
        ask(one, messages, "secret-2")
        with pytest.raises(openai.NotFoundError):
            two.get("/conv_kv/secret-2", cast_to=object)
        with pytest.raises(openai.NotFoundError):
            two.delete("/conv_kv/secret-2", cast_to=object)
        found: Any = one.get("/conv_kv/secret-2", cast_to=object)
        assert found["id"] == "secret-2"


def test_a_salt_separates_what_one_caller_stores(client: openai.OpenAI) -> None:
    messages = [system(words(200, 121)), user("hello")]
    assert ask(client, messages, "salted", cache_salt="a").num_cached == 0
    assert ask(client, messages, "salted", cache_salt="b").num_cached == 0
    # The words that begin every chat.
    assert ask(client, messages, "salted").num_cached < 20
    assert ask(client, messages, "salted", cache_salt="a").num_prefill == 1


def test_a_deleted_conversation_is_gone_and_its_memory_back(
    client: openai.OpenAI, server: ServerProcess
) -> None:
    before = server.get("/stats")["cache"]["stored_bytes"]
    messages = [system(words(500, 122)), user("hello")]
    ask(client, messages, "to-delete")
    shown: Any = client.get("/conv_kv/to-delete", cast_to=object)
    assert shown["tier"] == "ram"
    assert shown["messages"] == 3
    client.delete("/conv_kv/to-delete", cast_to=object)
    with pytest.raises(openai.NotFoundError):
        client.get("/conv_kv/to-delete", cast_to=object)
    assert server.get("/stats")["cache"]["stored_bytes"] <= before
    assert ask(client, messages, "to-delete").num_cached < 20


def test_without_an_id_a_chat_is_continued_by_what_it_says(client: openai.OpenAI) -> None:
    messages = [system(words(50, 123)), user(words(10, 124))]
    first = ask(client, messages)
    following = grown(messages, first, "and then?")
    second = ask(client, following)
    assert first.conversation_id.startswith("conv_")
    assert second.conversation_id == first.conversation_id
    assert second.num_cached >= first.num_prompt
    other = ask(client, [system(words(50, 123)), user("quite another question")])
    assert other.conversation_id != first.conversation_id


def test_errors_are_the_clients_own_classes(client: openai.OpenAI) -> None:
    messages: Any = [user("hello")]
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-17", messages=messages)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as hot:
        client.chat.completions.create(model="random-qwen3", messages=messages, temperature=9)
    assert hot.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="X-Conversation-Id"):
        ask(client, messages, "a/b")

"""The defects that others had with conversation caches, each shown not to be here."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.server.conftest import ServerProcess, start_server
from tests.server.talk import ask, assistant, cold, system, user
from tests.tiny_models import words

pytestmark = pytest.mark.server


def test_ids_that_differ_in_one_sign_are_two_conversations(client: openai.OpenAI) -> None:
    names = ["a:b", "a_b", "A:b", "a.b"]
    messages = {n: [system(words(100, i)), user("hello")] for i, n in enumerate(names)}
    for name, history in messages.items():
        assert ask(client, history, name).kv == "fresh"
    for name, history in messages.items():
        again = ask(client, history, name)
        assert (again.kv, again.num_prefill, again.miss_reason) == ("hit", 1, None)
        shown: Any = client.get(f"/conv_kv/{name}", cast_to=object)
        assert shown["id"] == name


def test_two_streams_on_one_id_do_not_mix(client: openai.OpenAI) -> None:
    model = client.models.list().data[0].id
    histories = [[system(words(50, 1)), user(words(30, seed))] for seed in (2, 3, 4)]
    expected = [cold(client, history, max_tokens=60).text for history in histories]

    def stream(history: Any) -> str:
        pieces = client.chat.completions.create(
            model=model,
            messages=history,
            max_tokens=60,
            stream=True,
            extra_headers={"X-Conversation-Id": "streams"},
        )
        return "".join(piece.choices[0].delta.content or "" for piece in pieces)

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(stream, histories)) == expected


def test_going_back_behind_a_reply_forgets_what_was_generated(client: openai.OpenAI) -> None:
    start = [system(words(60, 5)), user("one")]
    first = ask(client, start, "rollback", max_tokens=40)
    longer = [*start, assistant(first.text), user("two")]
    ask(client, longer, "rollback", max_tokens=40)
    other = [*start, assistant("no, quite another reply"), user("two")]
    for history in (other, start, longer):
        answer = ask(client, history, "rollback", max_tokens=40)
        assert answer.num_cached < answer.num_prompt
        assert answer.text == cold(client, history, max_tokens=40).text


def test_two_users_behind_one_address_are_two_conversations(
    embedded_server: ServerProcess,
) -> None:
    question = user("What is the secret code of Alice?")
    secret = [user("The secret code of Alice is 4711. Remember it."), assistant("I will.")]
    with embedded_server.client() as one, embedded_server.client() as two:
        mine = ask(one, [*secret, question])
        theirs = ask(two, [question])
        alone = cold(two, [question])
        assert theirs.conversation_id != mine.conversation_id
        assert theirs.kv == "fresh"
        assert theirs.text == alone.text
        assert "4711" not in theirs.text


def test_the_server_answers_others_during_a_long_prefill(
    server: ServerProcess, client: openai.OpenAI
) -> None:
    messages = [system(words(3000, 6)), user("hello")]
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, client, messages, "long")
        seen_running = False
        while not answer.done():
            assert server.get("/health")["status"] == "ok"
            seen_running |= server.get("/stats")["running"] > 0 and not answer.done()
        assert seen_running
        assert answer.result().num_prompt > 3000


def test_never_more_is_reported_as_reused_than_was_held_or_asked_for(
    client: openai.OpenAI, server: ServerProcess
) -> None:
    history = [system(words(120, 7)), user("hello")]
    for turn in range(4):
        held = server.get("/stats")["cache"]["tokens"]
        answer = ask(client, history, "counted")
        assert answer.num_cached <= min(held, answer.num_prompt - 1)
        history += [assistant(answer.text), user(words(5, turn))]


@pytest.fixture(scope="module")
def small_server(
    tmp_path_factory: pytest.TempPathFactory, random_model: Path
) -> Iterator[ServerProcess]:
    """A server with room for about 1,500 tokens of state in all, one chat of them at a time."""
    folder = tmp_path_factory.mktemp("data")
    running = start_server(folder, "--model", str(random_model), "--ram-budget", "3MiB")
    try:
        running.wait_ready()
        yield running
    finally:
        code = running.end()
    assert code == 0


def test_what_the_budget_made_it_forget_is_neither_reported_nor_used(
    small_server: ServerProcess,
) -> None:
    with small_server.client() as client:
        chats = [[system(words(300, 10 + i)), user("hello")] for i in range(6)]
        expected = [cold(client, chat).text for chat in chats]
        for _ in range(2):
            for i, chat in enumerate(chats):
                held = small_server.get("/stats")["cache"]["tokens"]
                answer = ask(client, chat, f"chat-{i}")
                assert answer.num_cached <= held
                assert answer.text == expected[i]
                cache = small_server.get("/stats")["cache"]
                assert cache["stored_bytes"] + cache["working_bytes"] <= cache["budget_bytes"]
        assert cache["evicted_segments"] > 0
        again = ask(client, chats[0], "chat-0")
        assert again.num_cached > 200 or again.miss_reason == "evicted"


def test_a_request_over_the_whole_budget_is_413_and_not_the_end(
    small_server: ServerProcess,
) -> None:
    with small_server.client() as client:
        with pytest.raises(openai.APIStatusError) as refused:
            ask(client, [system(words(3000, 8)), user("hello")])
        assert refused.value.status_code == 413
        assert refused.value.code == "kv_budget_exceeded"
        assert ask(client, [user("hello")]).text


def test_an_exact_repeat_is_answered_again(client: openai.OpenAI) -> None:
    messages = [user("hello")]
    answers = [ask(client, messages, "repeat") for _ in range(3)]
    assert len({answer.text for answer in answers}) == 1
    assert [answer.num_prefill for answer in answers[1:]] == [1, 1]


def test_neither_figures_nor_lists_nor_log_show_a_users_words_or_paths(
    server: ServerProcess, random_model: Path
) -> None:
    secret = "xyzzyplugh"
    key = "sk-very-secret-key"
    with server.client(key) as client:
        for stream in (False, True):
            model = client.models.list().data[0].id
            reply: Any = client.chat.completions.create(
                model=model,
                messages=[{"role": "system", "content": secret}, {"role": "user", "content": "hi"}],
                max_tokens=5,
                stream=stream,
                tools=[{"type": "function", "function": {"name": secret}}],
                tool_choice="none",
                stop=["plugh-stop"],
                extra_headers={"X-Conversation-Id": "private-id"},
            )
            list(reply)
        shown = [
            json.dumps(client.get(path, cast_to=object))
            for path in ("/conv_kv/stats", "/conv_kv/private-id", "/models")
        ]
    open_to_all = [
        httpx.get(server.url + path).text
        for path in ("/stats", "/health", "/ready", "/v1/conv_kv/stats", "/v1/models")
    ]
    for text in (*shown, *open_to_all, server.log):
        assert secret not in text
        assert key not in text
        assert "plugh" not in text
        assert str(random_model.parent) not in text
    for text in (*open_to_all, server.log):
        assert "private-id" not in text


def test_a_conversation_in_use_by_many_threads_stays_right(client: openai.OpenAI) -> None:
    # Turns, forks and repeats of one chat from all sides, then one more question.
    start = [system(words(80, 20)), user("begin")]
    barrier = threading.Barrier(4)

    def talk(seed: int) -> None:
        barrier.wait(30)
        history = list(start)
        for turn in range(3):
            answer = ask(client, history, "busy")
            history += [assistant(answer.text), user(words(3, seed * 10 + turn))]

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(talk, range(4)))
    answer = ask(client, [*start, assistant("so"), user("well?")], "busy")
    assert answer.text == cold(client, [*start, assistant("so"), user("well?")]).text

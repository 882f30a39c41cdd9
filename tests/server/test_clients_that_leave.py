"""Clients that go away: the work stops, what was done is kept, the conversation stays usable."""

from __future__ import annotations

import json
import socket
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest

from tests.server.conftest import ServerProcess
from tests.server.talk import Message, ask, cold, system, user
from tests.tiny_models import words

pytestmark = pytest.mark.server


def send(server: ServerProcess, messages: list[Message], name: str, **how: Any) -> socket.socket:
    """Send a request and return its connection, without waiting for anything."""
    body = json.dumps({"messages": messages, "conversation": name, **how}).encode()
    address = urlsplit(server.url)
    assert address.hostname is not None
    connection = socket.create_connection((address.hostname, address.port or 80), timeout=30)
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer none\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    connection.sendall(head.encode() + body)
    return connection


def idle(stats: dict[str, Any]) -> bool:
    working: int = stats["cache"]["working_bytes"]
    return stats["running"] == 0 and stats["waiting"] == 0 and working == 0


def wait_idle(server: ServerProcess) -> None:
    """A second, and the step of the engine that was under way: this machine may be busy."""
    server.wait_for_stats(idle, 1.0 + 2 * float(server.get("/stats")["longest_chunk_s"]))


@pytest.mark.parametrize("stream", [False, True])
def test_one_that_leaves_during_prefill(
    server: ServerProcess, client: openai.OpenAI, stream: bool
) -> None:
    # Four thousand tokens, and then a reply that would go on for thousands more.
    messages = [system(words(4000, 10 + stream)), user("hello")]
    before = server.get("/stats")["prefilled_tokens"]
    with send(server, messages, f"left-prefill-{stream}", stream=stream, ignored=None) as refused:
        assert refused.recv(16).startswith(b"HTTP/1.1 400")
    with send(server, messages, f"left-prefill-{stream}", stream=stream):
        server.wait_for_stats(lambda s: s["prefilled_tokens"] - before > 200, 30)
    wait_idle(server)
    done = server.get("/stats")["prefilled_tokens"] - before
    answer = ask(client, messages, f"left-prefill-{stream}")
    assert answer.num_cached >= 0.9 * min(done, answer.num_prompt)
    assert answer.text == cold(client, messages).text


@pytest.mark.parametrize("stream", [False, True])
def test_one_that_leaves_during_the_reply(
    server: ServerProcess, client: openai.OpenAI, stream: bool
) -> None:
    name = f"left-reply-{stream}"
    messages = [system(words(200, 20 + stream)), user("hello")]
    decoded = server.get("/stats")["decoded_tokens"]
    # No end-of-turn token, so that only the leaving ends it.
    how: dict[str, Any] = {"stream": stream, "logit_bias": {"2": -100}}
    with send(server, messages, name, **how) as connection:
        if stream:
            received = b""
            while received.count(b"data: ") < 5:
                received += connection.recv(4096)
        server.wait_for_stats(lambda s: s["decoded_tokens"] - decoded > 20, 30)
    wait_idle(server)
    answer = ask(client, messages, name)
    assert answer.num_prefill == 1
    assert answer.text == cold(client, messages).text
    following = [*messages, {"role": "assistant", "content": answer.text}, user("go on")]
    again = ask(client, following, name)
    assert again.num_cached >= answer.num_prompt
    assert again.text == cold(client, following).text


def test_one_of_many_that_leaves_does_not_touch_the_others(
    server: ServerProcess, client: openai.OpenAI
) -> None:
    messages: list[Any] = [[user(words(40, 30 + i))] for i in range(3)]
    expected = [cold(client, m, max_tokens=100).text for m in messages]
    leaver = send(server, [user(words(60, 40))], "leaver", stream=True, logit_bias={"2": -100})
    server.wait_for_stats(lambda s: s["running"] >= 1, 30)
    model = client.models.list().data[0].id
    streams: list[Any] = [
        client.chat.completions.create(
            model=model,
            messages=m,
            max_tokens=100,
            stream=True,
        )
        for m in messages
    ]
    texts = ["" for _ in messages]
    leaver.close()
    for i, stream in enumerate(streams):
        for chunk in stream:
            texts[i] += chunk.choices[0].delta.content or ""
    assert texts == expected
    wait_idle(server)


def test_a_stream_left_unread_by_the_official_client(
    server: ServerProcess, client: openai.OpenAI
) -> None:
    stream = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": "hello"}],
        logit_bias={"2": -100},
        stream=True,
    )
    next(iter(stream))
    stream.close()
    wait_idle(server)

"""Replies over HTTP, streamed and not: shapes, headers, usage, several choices, and what is asked
of the chat part. The chat part is a fake; the app is the real one.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from kvserve.chat.turn import KvSource
from kvserve.core.errors import KvserveError, NotReady, QueueFull
from kvserve.core.types import FinishReason, SamplingParams
from tests.server.api_fakes import (
    CHAT,
    HELLO,
    MODEL,
    FakeEngine,
    FakeTurns,
    client_of,
    error_of,
    events_of,
    make_app,
)

pytestmark = pytest.mark.anyio
STREAM = HELLO | {"stream": True}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def ask(turns: FakeTurns, body: Any, **headers: str) -> Any:
    async with client_of(make_app(turns)) as client:
        return await client.post(CHAT, json=body, headers=headers)


async def test_a_reply_has_openais_shape_and_the_figures_of_its_turn() -> None:
    turns = FakeTurns(miss_reason="messages_changed; message=3")
    response = await ask(turns, HELLO, **{"X-Conversation-Id": "chat-1", "X-Request-Id": "mine"})
    assert response.status_code == 200
    body = response.json()
    assert body["id"].startswith("chatcmpl-")
    assert (body["object"], body["model"]) == ("chat.completion", MODEL)
    assert body["choices"] == [
        {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": "Hello wörld",
                "refusal": None,
                "annotations": [],
            },
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert body["usage"] == {
        "prompt_tokens": 42,
        "completion_tokens": 4,
        "total_tokens": 46,
        "prompt_tokens_details": {"cached_tokens": 30},
        "completion_tokens_details": {"reasoning_tokens": 0},
        "input_tokens_details": {"cached_tokens": 30},
        "tokens_per_second": 8.0,
    }
    assert body["metadata"] == {"conversation_id": "chat-1"}
    assert turns.all_closed
    headers = {k: v for k, v in response.headers.items() if k.startswith("x-")}
    assert headers == {
        "x-conv-id": "chat-1",
        "x-conv-kv": "hit",
        "x-conv-cached-tokens": "30",
        "x-conv-processing-tokens": "12",
        "x-conv-miss-reason": "messages_changed; message=3",
        "x-request-id": "mine",
    }


async def test_headers_without_a_value_are_absent() -> None:
    response = await ask(FakeTurns(conversation_id=None, kv=KvSource.NONE), HELLO)
    assert "x-conv-id" not in response.headers
    assert "x-conv-miss-reason" not in response.headers
    assert response.headers["x-conv-kv"] == "none"
    assert response.json()["metadata"] == {"conversation_id": None}


async def test_the_finish_reason_is_the_turns() -> None:
    turns = FakeTurns(reason=FinishReason.LENGTH)
    assert (await ask(turns, HELLO)).json()["choices"][0]["finish_reason"] == "length"
    last = events_of((await ask(turns, STREAM)).text)[-2]
    assert last["choices"][0]["finish_reason"] == "length"


async def test_a_stream_is_a_role_then_text_then_a_finish_reason_then_done() -> None:
    turns = FakeTurns()
    response = await ask(turns, STREAM, **{"X-Session-Id": "chat-2"})
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["x-conv-id"] == "chat-2"
    assert response.headers["x-conv-cached-tokens"] == "30"
    assert response.headers["x-request-id"]
    *chunks, done = events_of(response.text)
    assert done == "[DONE]"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "Hel"},
        {"content": "lo "},
        {"content": "wörld"},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 4 + ["stop"]
    assert turns.all_closed


async def test_usage_of_a_stream_comes_last_and_only_when_asked_for() -> None:
    response = await ask(FakeTurns(), STREAM | {"stream_options": {"include_usage": True}})
    *chunks, last, done = events_of(response.text)
    assert done == "[DONE]"
    assert last["choices"] == []
    assert last["usage"]["prompt_tokens"] == 42
    assert last["usage"]["completion_tokens"] == 4
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 30}
    assert all(chunk["usage"] is None for chunk in chunks)


async def test_an_empty_reply_is_an_empty_string() -> None:
    turns = FakeTurns(pieces=())
    assert (await ask(turns, HELLO)).json()["choices"][0]["message"]["content"] == ""
    chunks = events_of((await ask(turns, STREAM)).text)
    assert [c["choices"][0]["delta"] for c in chunks[:-1]] == [
        {"role": "assistant", "content": ""},
        {},
    ]


async def test_several_choices_are_numbered_and_counted_together() -> None:
    turns = FakeTurns()
    response = await ask(turns, HELLO | {"n": 3, "seed": 2**63 - 1}, **{"X-Session-Id": "c"})
    body = response.json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert body["usage"]["prompt_tokens"] == 42
    assert body["usage"]["completion_tokens"] == 12
    assert [request.keep for request in turns.asked] == [True, False, False]
    assert [request.sampling.seed for request in turns.asked] == [
        2**63 - 1,
        -(2**63),
        -(2**63) + 1,
    ]
    assert len({request.request_id for request in turns.asked}) == 3
    assert turns.all_closed


async def test_a_stream_of_several_choices_finishes_each_of_them() -> None:
    turns = FakeTurns()
    response = await ask(turns, STREAM | {"n": 3, "stream_options": {"include_usage": True}})
    *chunks, last, done = events_of(response.text)
    assert done == "[DONE]"
    assert last["usage"]["completion_tokens"] == 12
    for index in range(3):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(c["delta"].get("content", "") for c in mine) == "Hello wörld"
        assert [c["finish_reason"] for c in mine] == [None] * 4 + ["stop"]
    assert turns.all_closed


async def test_later_choices_start_only_when_the_first_has_prefilled_the_prompt() -> None:
    turns = FakeTurns(let_prefill=asyncio.Event())
    asking = asyncio.ensure_future(ask(turns, HELLO | {"n": 2, "reset_conversation": True}))
    for _ in range(50):
        await asyncio.sleep(0)
    assert len(turns.asked) == 1
    turns.let_prefill.set()
    assert (await asking).status_code == 200
    first, second = turns.asked
    assert (first.conversation_id, first.reset_conversation) == (None, True)
    # The second takes up the conversation that the first has just begun anew.
    assert (second.conversation_id, second.reset_conversation) == ("conv_made", False)


async def test_the_turn_is_asked_for_what_the_request_says() -> None:
    turns = FakeTurns()
    body = HELLO | {
        "model": "tiny-chat",
        "temperature": 1,
        "top_p": 0.5,
        "top_k": -1,
        "min_p": 0.1,
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "repetition_penalty": 1.1,
        "logit_bias": {"5": 2},
        "seed": 7,
        "max_completion_tokens": 9,
        "stop": "END",
        "cache_salt": "salt",
        "chat_template_kwargs": {"enable_thinking": False},
        "conversation": {"id": "a:b"},
        "reset_conversation": True,
    }
    response = await ask(turns, body, Authorization="Bearer key")
    assert response.status_code == 200
    (request,) = turns.asked
    assert request.sampling == SamplingParams(
        temperature=1.0,
        top_p=0.5,
        top_k=0,
        min_p=0.1,
        presence_penalty=1.0,
        frequency_penalty=-1.0,
        repetition_penalty=1.1,
        logit_bias={5: 2.0},
        seed=7,
    )
    assert request.messages == ({"role": "user", "content": "hello"},)
    assert (request.max_tokens, request.stop) == (9, ("END",))
    assert (request.conversation_id, request.reset_conversation) == ("a:b", True)
    assert request.cache_salt == "salt"
    assert request.template_kwargs == {"enable_thinking": False}
    assert request.client_address == "127.0.0.1"
    assert request.tenant not in ("", "key")
    assert request.keep


async def test_parameters_left_out_are_the_servers_defaults() -> None:
    turns = FakeTurns()
    defaults = SamplingParams(temperature=0.6, top_p=0.95, top_k=20)
    async with client_of(make_app(turns, defaults=defaults)) as client:
        await client.post(CHAT, json=HELLO | {"top_p": 1, "temperature": 0, "seed": None})
    assert turns.asked[0].sampling == SamplingParams(temperature=0, top_p=1, top_k=20)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (QueueFull("The line is full.", retry_after_s=7), 429, "rate_limit_error"),
        (NotReady("Stopping."), 503, "service_unavailable_error"),
        (KvserveError("Some kind that is new."), 500, "server_error"),
    ],
)
async def test_an_error_before_the_first_byte_is_a_json_answer(
    stream: bool, error: KvserveError, status: int, kind: str
) -> None:
    response = await ask(FakeTurns(start_error=error), HELLO | {"stream": stream})
    assert response.status_code == status
    assert error_of(response) == {
        "message": error.message,
        "type": kind,
        "param": None,
        "code": error.code,
    }
    assert response.headers.get("retry-after") == ("7" if status == 429 else None)


async def test_a_server_that_is_not_ready_does_not_begin_a_turn() -> None:
    turns = FakeTurns()
    async with client_of(make_app(turns, FakeEngine(ready=False))) as client:
        response = await client.post(CHAT, json=HELLO)
    assert response.status_code == 503
    assert error_of(response)["code"] == "not_ready"
    assert turns.asked == []

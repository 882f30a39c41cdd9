"""Requests that are wrong as bytes, as JSON, or in their fields: always OpenAI's error body."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.requests import Request

from kvserve.api.body import read_json
from kvserve.api.wire import ChatRequest
from tests.server.api_fakes import (
    CHAT,
    HELLO,
    FakeTurns,
    client_of,
    error_of,
    make_app,
)

pytestmark = pytest.mark.anyio
JSON = {"Content-Type": "application/json"}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def refused(content: bytes, **headers: str) -> dict[str, Any]:
    turns = FakeTurns()
    async with client_of(make_app(turns)) as client:
        response = await client.post(CHAT, content=content, headers=JSON | headers)
    assert response.status_code == 400
    assert turns.asked == []
    return error_of(response)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"not json",
        b'{"messages": [}',
        b"\xff\xfe",
        b'{"messages":"\xff"}',
        b"[1,]",
        b'{"messages":"\\ud800"}',
        b'{"temperature": NaN}',
        b'{"temperature": -Infinity}',
        b'{"temperature": 1e999}',
        b"[" * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a":' * 100_000,
        b"\xef\xbb\xbf{}",
    ],
)
async def test_a_body_that_is_no_json_is_refused(content: bytes) -> None:
    error = await refused(content)
    assert error["type"] == "invalid_request_error"
    assert error["code"] == "invalid_json"
    assert "not valid JSON" in error["message"]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "json"])
async def test_a_body_that_does_not_say_it_is_json_is_refused(kind: str) -> None:
    error = await refused(b'{"messages":[{"role":"user","content":"a"}]}', **{"Content-Type": kind})
    assert "application/json" in error["message"]


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "Application/JSON"])
async def test_json_is_known_by_its_usual_names(kind: str) -> None:
    async with client_of(make_app()) as client:
        content = b'{"messages":[{"role":"user","content":"a"}]}'
        response = await client.post(CHAT, content=content, headers={"Content-Type": kind})
    assert response.status_code == 200


async def test_a_wrong_field_is_named_with_what_it_accepts() -> None:
    error = await refused(b'{"messages":[{"role":"user","content":"a"}],"temperature":"hot"}')
    assert error == {
        "message": "'temperature' must be a number from 0 to 2, not \"hot\".",
        "type": "invalid_request_error",
        "param": "temperature",
        "code": "invalid_value",
    }


@pytest.mark.parametrize("value", ["a/b", "x" * 300, "", "a b", "ä"])
@pytest.mark.parametrize("field", ["conversation", "conversation_id"])
async def test_an_id_that_is_none_is_refused_naming_its_field(field: str, value: str) -> None:
    async with client_of(make_app()) as client:
        response = await client.post(CHAT, json=HELLO | {field: value})
    assert response.status_code == 400
    assert error_of(response)["param"] == field


async def test_an_unknown_model_is_not_found_and_the_served_one_named() -> None:
    async with client_of(make_app()) as client:
        response = await client.post(CHAT, json=HELLO | {"model": "gpt-9"})
        assert response.status_code == 404
        error = error_of(response)
        assert (error["param"], error["code"]) == ("model", "model_not_found")
        assert "someone/tiny-chat" in error["message"]
        for name in ("someone/tiny-chat", "tiny-chat", None):
            response = await client.post(CHAT, json=HELLO | {"model": name})
            assert response.status_code == 200
            assert response.json()["model"] == "someone/tiny-chat"
        for name in ("tiny", "someone", "", "default"):
            response = await client.post(CHAT, json=HELLO | {"model": name})
            assert response.status_code == 404


async def chunks_of(num_bytes: int) -> AsyncIterator[bytes]:
    for _ in range(num_bytes // 1000):
        yield b" " * 1000


@pytest.mark.parametrize("declared", [True, False])
async def test_a_body_over_the_limit_is_refused_however_it_comes(declared: bool) -> None:
    async with client_of(make_app(max_body_bytes=10_000)) as client:
        content: Any = b" " * 20_000 if declared else chunks_of(20_000)
        response = await client.post(CHAT, content=content, headers=JSON)
    assert ("content-length" in response.request.headers) == declared
    assert response.status_code == 413
    assert response.headers["connection"] == "close"
    assert error_of(response)["message"] == "The body is over the limit of 10000 bytes."


async def test_a_body_of_exactly_the_limit_is_read() -> None:
    content = b'{"messages":[{"role":"user","content":"a"}]}'
    async with client_of(make_app(max_body_bytes=len(content))) as client:
        response = await client.post(CHAT, content=content, headers=JSON)
    assert response.status_code == 200


async def longest_pause_during(work: Any) -> tuple[Any, float]:
    """Return the result of `work` and the longest time in seconds that the loop stood still.

    In processor time of all threads, which the machine's other work does not change.
    """
    longest = 0.0
    task = asyncio.ensure_future(work)
    while not task.done():
        before = time.process_time()
        await asyncio.sleep(0)
        longest = max(longest, time.process_time() - before)
    return task.result(), longest


async def test_ten_megabytes_of_text_are_checked_while_the_loop_runs_on() -> None:
    turns = FakeTurns()
    text = "some words, [and] {signs}\n" * 400_000
    content = json.dumps({"messages": [{"role": "user", "content": text}]}).encode()
    async with client_of(make_app(turns)) as client:
        began = time.process_time()
        response, pause = await longest_pause_during(
            client.post(CHAT, content=content, headers=JSON)
        )
    assert response.status_code == 200
    assert turns.asked[0].messages[0]["content"] == text
    assert time.process_time() - began < 2
    assert pause < 0.2


@pytest.mark.parametrize("value", [b"[]", b"{}", b"1", b'{"a":[]}'])
async def test_millions_of_values_do_not_stop_the_loop(value: bytes) -> None:
    content = b'{"messages":[' + (value + b",") * 3_000_000 + b"1]}"
    async with client_of(make_app()) as client:
        response, pause = await longest_pause_during(
            client.post(CHAT, content=content, headers=JSON)
        )
    assert response.status_code == 400
    assert "values" in error_of(response)["message"]
    assert pause < 0.3


@pytest.mark.parametrize(("num_bytes", "offloaded"), [(200_000, False), (300_000, True)])
async def test_a_big_body_is_decoded_and_checked_off_the_loop(
    num_bytes: int, offloaded: bool
) -> None:
    content = b'"' + b"a" * num_bytes + b'"'

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": content, "more_body": False}

    scope = {"type": "http", "headers": [(b"content-type", b"application/json")]}
    thread = await read_json(
        Request(scope, receive), lambda body: threading.get_ident(), max_bytes=10**6
    )
    assert (thread != threading.get_ident()) == offloaded


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)
MESSAGES = st.lists(
    st.dictionaries(
        st.sampled_from(["role", "content", "name", "tool_calls", "tool_call_id", "audio"]),
        JSON_VALUES | st.sampled_from(["user", "system", "assistant", "tool"]),
        max_size=4,
    ),
    max_size=3,
)
BODIES = (
    JSON_VALUES
    | st.dictionaries(st.sampled_from(sorted(ChatRequest.model_fields)), JSON_VALUES, max_size=4)
    | st.fixed_dictionaries(
        {"messages": MESSAGES | st.just(HELLO["messages"])},
        optional={name: JSON_VALUES for name in ChatRequest.model_fields if name != "messages"},
    )
)


APP = make_app()


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(body=BODIES)
def test_no_json_at_all_makes_a_server_error(body: Any) -> None:
    async def send() -> None:
        async with client_of(APP) as client:
            response = await client.post(CHAT, json=body)
        assert response.status_code in (200, 400, 404), response.text
        if response.status_code != 200:
            assert error_of(response)["message"]

    asyncio.run(send())


@settings(max_examples=50)
@given(content=st.binary(max_size=200))
def test_no_bytes_at_all_make_a_server_error(content: bytes) -> None:
    async def send() -> None:
        async with client_of(APP) as client:
            response = await client.post(CHAT, content=content, headers=JSON)
        assert response.status_code == 400

    asyncio.run(send())

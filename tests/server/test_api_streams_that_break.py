"""Clients that leave, turns that fail half-way, servers that stop: what is sent, what is closed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import pytest

from kvserve.api.errors import ResponseAborted
from kvserve.core.errors import RequestFailed
from tests.server.api_fakes import (
    CHAT,
    HELLO,
    Connection,
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


async def until(condition: Callable[[], object]) -> None:
    """Let the loop run until `condition` holds."""
    for _ in range(10_000):
        if condition():
            return
        await asyncio.sleep(0)
    raise TimeoutError


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_while_waiting_in_line_cancels_its_turn(stream: bool) -> None:
    turns = FakeTurns(let_start=asyncio.Event())
    connection = Connection(make_app(turns), HELLO | {"stream": stream})
    await until(lambda: turns.asked)
    await connection.leave()
    assert turns.num_cancelled_starts == 1
    assert connection.status == 499  # for the access log; there is nobody to read it


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("num_choices", [1, 3])
async def test_a_client_that_leaves_during_prefill_cancels_its_turn(
    stream: bool, num_choices: int
) -> None:
    turns = FakeTurns(let_prefill=asyncio.Event())
    connection = Connection(make_app(turns), HELLO | {"stream": stream, "n": num_choices})
    await until(lambda: turns.started)
    await connection.leave()
    assert len(turns.started) == 1
    assert turns.all_closed


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_during_decode_cancels_all_its_turns(stream: bool) -> None:
    turns = FakeTurns(let_decode=asyncio.Event())
    connection = Connection(make_app(turns), HELLO | {"stream": stream, "n": 3})
    await until(lambda: len(turns.started) == 3)
    if stream:
        await connection.receive_until(b'"Hel"')
    await connection.leave()
    assert turns.all_closed


async def test_a_stream_that_cannot_even_begin_is_closed() -> None:
    turns = FakeTurns(let_decode=asyncio.Event())

    class BrokenConnection(Connection):
        async def _send(self, message: object) -> None:
            raise OSError("the socket is gone")

    connection = BrokenConnection(make_app(turns), STREAM)
    # The server that runs the app cuts the connection, and has nothing of ours to log.
    with pytest.raises(ResponseAborted):
        await asyncio.wait_for(connection.task, 5)
    assert len(turns.started) == 1
    assert turns.all_closed


@pytest.mark.parametrize("by_scope", [False, True])
async def test_a_handler_that_is_cancelled_closes_its_turn(by_scope: bool) -> None:
    turns = FakeTurns(let_prefill=asyncio.Event())
    connection = Connection(make_app(turns), HELLO)
    await until(lambda: turns.started)
    if by_scope:
        connection.scope.cancel()  # each await within raises again, those in finally too
    else:
        connection.task.cancel()
    await asyncio.wait([connection.task])
    assert turns.all_closed


@pytest.mark.parametrize("error_after", [0, 1, 3])
async def test_an_error_in_a_stream_is_one_event_and_then_the_end(error_after: int) -> None:
    turns = FakeTurns(error=RequestFailed("It broke.", code="broke"), error_after=error_after)
    async with client_of(make_app(turns)) as client:
        response = await client.post(CHAT, json=STREAM)
    assert response.status_code == 200
    events = events_of(response.text)
    assert "[DONE]" not in events
    assert events[-1] == {
        "error": {"message": "It broke.", "type": "server_error", "param": None, "code": "broke"}
    }
    assert response.text.count("event: error\n") == 1
    assert response.text.endswith("\n\n")
    assert turns.all_closed


async def test_an_error_of_one_choice_ends_all_of_them() -> None:
    turns = FakeTurns(error=RequestFailed("It broke."), error_after=2)
    async with client_of(make_app(turns)) as client:
        response = await client.post(CHAT, json=STREAM | {"n": 3})
        plain = await client.post(CHAT, json=HELLO | {"n": 3})
    assert response.text.count("event: error\n") == 1
    assert plain.status_code == 500
    assert error_of(plain)["message"] == "It broke."
    assert turns.all_closed


@pytest.mark.parametrize("stream", [False, True])
async def test_an_unexpected_error_tells_client_and_log_nothing_that_was_said(
    stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    turns = FakeTurns(error=KeyError("my secret words, /var/lib/path"), error_after=1)
    body = {"messages": [{"role": "user", "content": "my secret words"}], "stream": stream}
    async with client_of(make_app(turns)) as client:
        response = await client.post(CHAT, json=body, headers={"X-Request-Id": "find-me"})
    assert response.status_code == (200 if stream else 500)
    assert "find-me" in response.text
    assert "internal_error" in response.text
    assert "secret" not in response.text + caplog.text
    assert "/var/lib" not in response.text
    assert "request find-me failed unexpectedly\nKeyError" in caplog.text


async def test_a_turn_that_ends_without_finishing_is_an_error() -> None:
    turns = FakeTurns(error=StopAsyncIteration(), error_after=None)

    async def cut_short(self: object) -> object:
        return
        yield

    async with client_of(make_app(turns)) as client:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tests.server.api_fakes.FakeTurn.__aiter__", cut_short)
            response = await client.post(CHAT, json=HELLO)
    assert response.status_code == 500
    assert "before it was complete" in error_of(response)["message"]


async def test_a_silent_stream_sends_comments_from_prefill_on() -> None:
    turns = FakeTurns(let_prefill=asyncio.Event())
    connection = Connection(make_app(turns, keep_alive_s=0.01), STREAM)
    await connection.receive_until(b": keep-alive\n\n: keep-alive\n\n")
    assert b"data:" not in connection.sent
    turns.let_prefill.set()
    await asyncio.wait_for(connection.task, 5)
    assert connection.sent.endswith(b"data: [DONE]\n\n")


async def test_a_stream_of_a_stopping_server_says_so_after_its_grace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    turns = FakeTurns(let_decode=asyncio.Event())
    connection = Connection(make_app(turns, shutdown_grace_s=0.01), STREAM)
    await connection.receive_until(b'"Hel"')
    monkeypatch.setattr("sse_starlette.sse.AppStatus.should_exit", True)
    await asyncio.wait_for(connection.task, 5)
    assert b"event: error\n" in connection.sent
    assert b"The server is stopping." in connection.sent
    assert b"[DONE]" not in connection.sent
    assert turns.all_closed


async def test_nothing_that_was_said_is_logged_unless_asked_for(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    said = {"messages": [{"role": "user", "content": "what I said"}], "user": "Ann"}
    ids = {"X-Conversation-Id": "my-chat", "X-Request-Id": "r-1", "Authorization": "Bearer sk-1"}
    async with client_of(make_app()) as client:
        for stream in (True, False):
            await client.post(CHAT, json=said | {"stream": stream}, headers=ids)
        await client.post(CHAT, json=said | {"what I said": 1}, headers=ids)
        await client.get("/v1/conv_kv/my-chat", headers=ids)
        await client.get("/what I said")
    ours = "\n".join(r.getMessage() for r in caplog.records if not r.name.startswith("httpx"))
    for word in ("what I said", "wörld", "w\\xc3", "Ann", "my-chat", "sk-1"):
        assert word not in ours
    assert "POST /v1/chat/completions 200" in ours
    assert "POST /v1/chat/completions 400" in ours
    assert "GET /v1/conv_kv/{id:path} 404" in ours
    assert "- (no route) 404" in ours
    assert "request=r-1" in ours
    caplog.clear()
    async with client_of(make_app(log_content=True)) as client:
        await client.post(CHAT, json=said)
    assert "what I said" in caplog.text
    assert "Hello wörld" in caplog.text

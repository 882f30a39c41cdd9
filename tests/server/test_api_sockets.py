"""What only real sockets show: bodies that are too big, clients that hang up, streams as they come.

The server is uvicorn on a free port in a thread of its own, the chat part a fake.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import pytest
import uvicorn

from tests.server.api_fakes import CHAT, HELLO, FakeTurns, make_app

LIMIT = 100_000


@dataclass
class Server:
    turns: FakeTurns
    port: int
    loop: asyncio.AbstractEventLoop

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=5)

    def post(self, connection: socket.socket, body: bytes, *headers: str) -> None:
        lines = [f"POST {CHAT} HTTP/1.1", "Host: test", "Content-Type: application/json", *headers]
        connection.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + body)


@pytest.fixture
def server() -> Iterator[Server]:
    started = threading.Event()
    holder: list[Server] = []
    listener = socket.create_server(("127.0.0.1", 0))

    async def run() -> None:
        turns = FakeTurns(let_decode=asyncio.Event())
        app = make_app(turns, max_body_bytes=LIMIT, keep_alive_s=0.05, shutdown_grace_s=0.05)
        config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off")
        running = uvicorn.Server(config)
        holder.append(Server(turns, listener.getsockname()[1], asyncio.get_running_loop()))
        task = asyncio.ensure_future(running.serve(sockets=[listener]))
        started.set()
        await asyncio.get_running_loop().run_in_executor(None, stop.wait)
        running.should_exit = True
        await task

    stop = threading.Event()
    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    assert started.wait(5)
    yield holder[0]
    holder[0].loop.call_soon_threadsafe(holder[0].turns.let_decode.set)
    stop.set()
    thread.join(10)
    assert not thread.is_alive()


def answer_of(connection: socket.socket) -> bytes:
    """Return all that comes until the server closes the connection."""
    received = b""
    while piece := connection.recv(65536):
        received += piece
    return received


def test_a_declared_body_over_the_limit_is_answered_and_the_connection_closed(
    server: Server,
) -> None:
    with server.connect() as connection:
        server.post(connection, b" " * 3_000_000, "Content-Length: 3000000")
        answer = answer_of(connection)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b'"code":"request_too_large"' in answer


def test_a_client_that_asks_first_is_refused_before_it_sends(server: Server) -> None:
    with server.connect() as connection:
        server.post(connection, b"", "Content-Length: 3000000", "Expect: 100-continue")
        answer = answer_of(connection)
    assert answer.startswith(b"HTTP/1.1 413 ")


def test_a_chunked_body_over_the_limit_is_refused_while_it_comes(server: Server) -> None:
    chunk = b"2710\r\n" + b" " * 10_000 + b"\r\n"
    with server.connect() as connection:
        server.post(connection, chunk * 50 + b"0\r\n\r\n", "Transfer-Encoding: chunked")
        answer = answer_of(connection)
    assert answer.startswith(b"HTTP/1.1 413 ")


def test_httpx_sees_the_refusal_of_a_body_that_it_is_still_sending(server: Server) -> None:
    response = httpx.post(
        f"http://127.0.0.1:{server.port}{CHAT}",
        content=b" " * 20_000_000,
        headers={"Content-Type": "application/json"},
    )
    assert response.status_code == 413


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_is_noticed_within_a_second(server: Server, stream: bool) -> None:
    body = json.dumps(HELLO | {"stream": stream}).encode()
    with server.connect() as connection:
        server.post(connection, body, f"Content-Length: {len(body)}")
        if stream:
            received = b""
            while b'"Hel"' not in received:
                received += connection.recv(65536)
            assert b"[DONE]" not in received
        server.turns.first_started.wait(5)
        assert not server.turns.first_closed.is_set()
    assert server.turns.first_closed.wait(1)


def test_a_body_that_never_becomes_complete_starts_nothing(server: Server) -> None:
    with server.connect() as connection:
        server.post(connection, b'{"messages":', "Content-Length: 100")
    response = httpx.get(f"http://127.0.0.1:{server.port}/health")
    assert response.status_code == 200
    assert server.turns.asked == []

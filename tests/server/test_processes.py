"""How the process begins and ends."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.server.conftest import ROOT, ServerProcess, start_server

pytestmark = pytest.mark.server


def test_a_port_in_use_is_one_clear_line_and_exit_code_2(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = subprocess.run(
            [sys.executable, "-m", "kvserve", "serve", "--port", str(port), "--data-dir", tmp_path],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert ended.returncode == 2
    lines = (ended.stdout + ended.stderr).strip().splitlines()
    assert len(lines) == 1
    assert str(port) in lines[0]
    assert "in use" in lines[0]


@pytest.mark.parametrize("model", ["/no/such/folder", "."])
def test_no_model_is_one_clear_line_and_exit_code_2(tmp_path: Path, model: str) -> None:
    server = start_server(tmp_path, "--model", model)
    assert server.process.wait(120) == 2
    assert server.end() == 2
    assert "Traceback" not in server.log
    assert server.log.count("kvserve: ") == 1


def test_a_signal_during_a_stream_ends_it_and_the_process_cleanly(tmp_path: Path) -> None:
    server = start_server(tmp_path)
    server.wait_ready()
    body = {
        "messages": [{"role": "user", "content": "hello"}],
        "stream": True,
        "logit_bias": {"2": -100},
    }
    received = b""
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=60) as stream:
        for piece in stream.iter_raw():
            if not received:
                server.process.send_signal(signal.SIGTERM)
            received += piece
    assert server.end() == 0
    # All was said in the time of grace, or the stream says that it ends early.
    assert (b"data: [DONE]" in received) != (b"event: error" in received)
    assert "Traceback" not in server.log


DYING = """
import sys
from kvserve.engine.loop import EngineLoop
from kvserve.cli.main import main

def die(self):
    raise SystemExit("planted")

EngineLoop._decode = die
sys.argv = ["kvserve", "serve", "--port", "0", "--data-dir", sys.argv[1]]
main()
"""


def test_a_dead_engine_answers_all_and_ends_the_process_with_1(tmp_path: Path) -> None:
    server = ServerProcess(
        subprocess.Popen(
            [sys.executable, "-c", DYING, tmp_path],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    )
    server.wait_ready()
    body = {"messages": [{"role": "user", "content": "hello"}]}
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    assert response.status_code == 503
    assert response.json()["error"]["type"] == "service_unavailable_error"
    assert server.process.wait(60) == 1
    assert server.end() == 1


def test_the_embedded_model_answers_without_being_named(tmp_path: Path) -> None:
    server = start_server(tmp_path)
    server.wait_ready()
    with server.client() as client:
        (model,) = client.models.list().data
        reply = client.chat.completions.create(
            model=model.id, messages=[{"role": "user", "content": "hello"}]
        )
    assert reply.choices[0].message.content
    assert server.get("/ready")["status"] == "ready"
    assert server.get("/health")["caching"]["enabled"] is True
    assert server.end(signal.SIGINT) == 0


def test_settings_come_from_the_environment_and_bad_ones_are_refused(tmp_path: Path) -> None:
    server = start_server(tmp_path, "--max-queue", "0")
    assert server.process.wait(120) == 2
    server.end()
    assert "--max-queue" in server.log


def test_a_second_server_on_one_data_folder_is_refused_in_words(tmp_path: Path) -> None:
    first = start_server(tmp_path)
    first.wait_ready()
    second = start_server(tmp_path)
    assert second.process.wait(120) == 2
    assert second.end() == 2
    assert second.log.count("kvserve: ") == 1 and "Traceback" not in second.log
    assert first.url in second.log and str(first.process.pid) in second.log
    assert "loading" not in second.log
    third = start_server(tmp_path, "--persist", "off")
    third.wait_ready()
    assert third.end() == first.end() == 0

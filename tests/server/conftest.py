"""Real server processes, their models, and the official client on them.

A process is shared by the tests of a module. Its log is kept, shown when a test of it fails, and
can be searched for what must not be there.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.tiny_models import qwen3_config, write_model

ROOT = Path(__file__).resolve().parents[2]
START_S = 120
DEADLINE_S = 30


@dataclass
class ServerProcess:
    """One running server. `log` is all that it has written so far, both streams together."""

    process: subprocess.Popen[str]
    url: str = ""
    lines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._announced = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if found := re.match(r"kvserve is ready at (http://\S+) ", line):
                self.url = found[1]
                self._announced.set()
        self._announced.set()

    @property
    def log(self) -> str:
        return "".join(self.lines)

    def wait_ready(self) -> None:
        assert self._announced.wait(START_S) and self.url, f"the server did not start:\n{self.log}"

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal unless the process has ended; return its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            code = self.process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            pytest.fail(f"the server did not end on signal {number}:\n{self.log}")
        finally:
            self._reader.join(DEADLINE_S)
            if self.process.stdout is not None:
                self.process.stdout.close()
        return code

    def client(self, api_key: str = "none", **how: Any) -> openai.OpenAI:
        """Return the official client, without retries, to be closed by the caller."""
        options = {"max_retries": 0, "timeout": 60, **how}
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=api_key, **options)

    def get(self, path: str) -> Any:
        response = httpx.get(self.url + path, timeout=DEADLINE_S)
        response.raise_for_status()
        return response.json()

    def wait_for_stats(self, good: Callable[[dict[str, Any]], bool], within_s: float) -> None:
        """Poll `/stats` until it is `good`; fail when that takes longer."""
        deadline = time.monotonic() + within_s
        while not good(stats := self.get("/stats")):
            assert time.monotonic() < deadline, stats


def start_server(data_dir: Path, *flags: str) -> ServerProcess:
    """Start a server on a free port and return before it is ready."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("KVSERVE_")}
    process = subprocess.Popen(
        [sys.executable, "-m", "kvserve", "serve", "--port", "0", "--data-dir", data_dir, *flags],
        cwd=ROOT,
        env={**environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return ServerProcess(process)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """Show the logs of the servers that a failed test used."""
    report = yield
    if report.failed:
        for value in getattr(item, "funcargs", {}).values():
            if isinstance(value, ServerProcess):
                report.sections.append(("server log", "".join(value.lines[-100:])))
    return report


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random-weight qwen3 of a million parameters with a context of 16k."""
    return write_model(tmp_path_factory.mktemp("models") / "random-qwen3", qwen3_config())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, random_model: Path) -> Iterator[ServerProcess]:
    """A server of the random model; it must end well when the module is through."""
    running = start_server(
        tmp_path_factory.mktemp("data"), "--model", str(random_model), "--log-level", "debug"
    )
    try:
        running.wait_ready()
        yield running
    finally:
        code = running.end()
    assert code == 0, running.log
    assert "Traceback" not in running.log


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with server.client() as made:
        yield made


@pytest.fixture(scope="module")
def embedded_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server of the embedded model."""
    running = start_server(tmp_path_factory.mktemp("data"))
    try:
        running.wait_ready()
        yield running
    finally:
        code = running.end()
    assert code == 0, running.log

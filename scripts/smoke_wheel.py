"""Build the wheel and use it where only its own dependencies are installed.

Run as `python -m scripts.smoke_wheel` from the repository's root, by a Python that has the build
backend. The wheel goes into `.venv-smoke`, whose other packages come from the wheel's own metadata
(pinned by the lock) and are kept between runs. Then, from a folder outside the project: the
version, `doctor`, and a server on the embedded model that answers two turns of a chat and stops
cleanly on SIGTERM. Uses the standard library alone, as a user's machine would have it.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scripts.environment import ROOT, install, locked, prepare, say, stamp_of

ENVIRONMENT = ROOT / ".venv-smoke"
LOCK = ROOT / "requirements.lock"
READY = re.compile(r"kvserve is ready at (http://127\.0\.0\.1:\d+) \(model (.+)\)")
START_TIMEOUT_S = 120.0
ANSWER_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 30.0


def build_wheel(folder: Path) -> Path:
    """Build the wheel into `folder` without isolation: the lock pins the build backend too."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "-qq"]
    subprocess.run(
        [*pip, "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT], check=True
    )
    return next(folder.glob("kvserve-*.whl"))


def install_wheel(wheel: Path) -> Path:
    """Install `wheel` with what its metadata asks for; return the program's path."""
    stamp = stamp_of(LOCK, ROOT / "pyproject.toml")
    prepare(ENVIRONMENT, "wheel", stamp, [["--constraint", LOCK, wheel]])
    # The same version may hold other code than last time.
    install(ENVIRONMENT, [["--force-reinstall", "--no-deps", wheel]])
    subprocess.run([ENVIRONMENT / "bin" / "python", "-m", "pip", "check"], check=True)
    return ENVIRONMENT / "bin" / "kvserve"


def clean_environment(home: Path) -> dict[str, str]:
    """Return an environment without settings, without the source tree and without a model hub."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("KVSERVE_", "PYTHON"))
    }
    return kept | {"HOME": str(home), "HF_HUB_OFFLINE": "1"}


@contextmanager
def server(program: Path, home: Path) -> Iterator[tuple[str, str]]:
    """Run a server; yield its address and its model's name. Raise unless it then stops with 0."""
    process = subprocess.Popen(
        [program, "serve", "--port", "0", "--data-dir", home / "data"],
        cwd=home,
        env=clean_environment(home),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        guard = threading.Timer(START_TIMEOUT_S, process.kill)
        guard.start()
        ready = next((m for line in process.stdout if (m := READY.search(line))), None)
        guard.cancel()
        if ready is None:
            raise SystemExit(f"the server did not become ready (status {process.wait()})")
        yield ready[1], ready[2]
        process.send_signal(signal.SIGTERM)
        status = process.wait(STOP_TIMEOUT_S)
        if status != 0:
            raise SystemExit(f"the server ended with status {status} on SIGTERM")
    finally:
        process.kill()
        process.wait()


def chat(address: str, body: dict[str, Any]) -> dict[str, Any]:
    """Return the reply to a chat completion, checked for the figures that it must carry."""
    request = urllib.request.Request(
        address + "/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json", "X-Conversation-Id": "smoke"},
    )
    with urllib.request.urlopen(request, timeout=ANSWER_TIMEOUT_S) as response:
        reply: dict[str, Any] = json.load(response)
        cached = int(response.headers["X-Conv-Cached-Tokens"])
        processed = int(response.headers["X-Conv-Processing-Tokens"])
    if cached + processed != reply["usage"]["prompt_tokens"]:
        raise SystemExit(f"{cached} cached + {processed} prefilled tokens are not {reply['usage']}")
    return reply


def two_turns(address: str, model: str) -> None:
    """Hold a chat of two turns; raise unless the second reuses the first."""
    messages = [{"role": "system", "content": "The code of the blue door is 4417."}]
    cached = []
    for question, expected in (
        ("What is the code of the blue door?", "4417"),
        ("Who are you?", "kvserve"),
    ):
        messages.append({"role": "user", "content": question})
        reply = chat(address, {"model": model, "messages": messages, "max_tokens": 40})
        answer = reply["choices"][0]["message"]
        if expected not in answer["content"]:
            raise SystemExit(f"{question} was answered: {answer['content']!r}")
        messages.append({"role": "assistant", "content": answer["content"]})
        cached.append(reply["usage"]["prompt_tokens_details"]["cached_tokens"])
    if cached[0] != 0 or cached[1] == 0:
        raise SystemExit(f"cached tokens of the two turns: {cached}")


def main() -> int:
    with tempfile.TemporaryDirectory() as folder, locked(ENVIRONMENT):
        home = Path(folder)
        wheel = build_wheel(home)
        say(f"built {wheel.name} ({wheel.stat().st_size / 1e6:.1f} MB)")
        program = install_wheel(wheel)
        for command in ("--version", "doctor"):
            subprocess.run([program, command], cwd=home, env=clean_environment(home), check=True)
        with server(program, home) as (address, model):
            two_turns(address, model)
    say("the wheel works without development dependencies")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as error:
        say(f"{Path(error.cmd[0]).name} failed with status {error.returncode}")
        sys.exit(1)

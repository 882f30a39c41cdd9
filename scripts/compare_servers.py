"""Compare kvserve with mlx_lm.server on one random-weight model, request by request, in one run.

Run as `python -m scripts.compare_servers --peer-python VENV/bin/python`, with the Python of a
virtual environment that has mlx-lm; without it kvserve is measured alone. Both servers get the same
model folder and the same BLAS, one after the other, and the same requests. Prints cached and
prefilled tokens and the seconds to the whole answer, which are comparable within one run only.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from kvserve.core import blas
from scripts import random_model

Message = dict[str, str]
REPLY_TOKENS = 24
SUBJECTS = ("harbour", "garden", "station", "market", "library", "bridge", "mill", "chapel")
NOUNS = ("gate", "lamp", "clock", "bench", "wall", "roof", "bell", "stair", "window", "door")


def prose(words: int, seed: int) -> str:
    """Return about `words` words that no other seed gives."""
    draw = random.Random(seed)
    sentences = []
    count = 0
    while count < words:
        sentence = (
            f"The {draw.choice(NOUNS)} of the {draw.choice(SUBJECTS)} has number "
            f"{draw.randrange(10000)} and stands {draw.randrange(90)} steps from the "
            f"{draw.choice(NOUNS)}."
        )
        sentences.append(sentence)
        count += len(sentence.split())
    return " ".join(sentences)


@dataclass
class Server:
    """A running server: where it listens, its process, and what it calls the model."""

    name: str
    url: str
    process: psutil.Process
    model: str
    client: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=240))

    def ask(self, messages: list[Message], conversation: str, **more: Any) -> dict[str, Any]:
        """Send one chat request; return its reply with `cached`, `prefilled` and `seconds`."""
        body = {"model": self.model, "messages": messages, "max_tokens": REPLY_TOKENS,
                "temperature": 0, **more}  # fmt: skip
        started = time.monotonic()
        response = self.client.post(
            f"{self.url}/v1/chat/completions",
            json=body,
            headers={"X-Conversation-Id": conversation},
        )
        seconds = time.monotonic() - started
        response.raise_for_status()
        answer = response.json()
        usage = answer["usage"]
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        return {
            "text": answer["choices"][0]["message"].get("content") or "",
            "cached": cached,
            "prefilled": usage["prompt_tokens"] - cached,
            "seconds": seconds,
        }

    def stored_nbytes(self) -> int | None:
        """Return the bytes of stored KV state, where the server tells."""
        answer = self.client.get(f"{self.url}/stats")
        return int(answer.json()["cache"]["stored_bytes"]) if answer.is_success else None

    def rss(self) -> int:
        """Return the bytes of memory that the process holds."""
        return int(self.process.memory_info().rss)


@contextmanager
def kvserve(model: Path, scratch: Path) -> Iterator[Server]:
    """Run kvserve on `model`."""
    command = [sys.executable, "-m", "kvserve", "serve", "--port", "0", "--model", str(model),
               "--data-dir", str(scratch), "--log-level", "warning"]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        ready = next(filter(None, (re.search(r"at (http://\S+)", x) for x in process.stdout)))
        try:
            yield Server("kvserve", ready[1], psutil.Process(process.pid), model.name)
        finally:
            process.terminate()


@contextmanager
def mlx_lm_server(python: Path, model: Path, scratch: Path) -> Iterator[Server]:
    """Run mlx_lm.server on `model`, with the same BLAS as kvserve has."""
    port = "18097"
    environment = dict(os.environ, HOME=str(scratch), HF_HUB_OFFLINE="1")
    if library := blas.preload():
        environment["LD_PRELOAD"] = library
    command = [str(python), "-m", "mlx_lm", "server", "--model", str(model), "--port", port,
               "--prompt-cache-size", "64"]  # fmt: skip
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        url = f"http://127.0.0.1:{port}"
        try:
            for _ in range(600):
                try:
                    httpx.get(f"{url}/v1/models", timeout=5)
                    break
                except httpx.TransportError:
                    time.sleep(0.1)
            yield Server("mlx_lm.server", url, psutil.Process(process.pid), str(model))
        finally:
            process.terminate()


Row = tuple[str, int, int, float]


def conversation_rows(server: Server) -> Iterator[Row]:
    """Ten turns, an edit at turn 3, a regenerate and a fork at turn 5."""

    def row(what: str, answer: dict[str, Any]) -> Row:
        return what, answer["cached"], answer["prefilled"], answer["seconds"]

    history: list[Message] = [{"role": "system", "content": prose(150, 1)}]
    sent: list[list[Message]] = []
    for turn in range(1, 11):
        history.append({"role": "user", "content": prose(40, 10 + turn)})
        sent.append(list(history))
        answer = server.ask(history, "ten-turns")
        history.append({"role": "assistant", "content": answer["text"]})
        yield row(f"turn {turn}", answer)
    edited = [*sent[2][:-1], {"role": "user", "content": prose(40, 99)}]
    yield row("edit at turn 3", server.ask(edited, "ten-turns"))
    yield row("regenerate turn 10", server.ask(sent[9], "ten-turns"))
    fork = [*sent[4][:-1], {"role": "user", "content": prose(40, 98)}]
    yield row("fork at turn 5", server.ask(fork, "a-fork"))


def document_rows(server: Server, words: int) -> Iterator[Row]:
    """One document, a first and a second user, then eighteen more; memory before and after."""
    document: Message = {"role": "system", "content": prose(words, 2)}
    before = server.rss()
    for user in range(1, 21):
        question: Message = {"role": "user", "content": prose(12, 200 + user)}
        answer = server.ask([document, question], f"user-{user}")
        if user <= 2:
            yield f"document, user {user}", answer["cached"], answer["prefilled"], answer["seconds"]
    grown = f"the process grew by {(server.rss() - before) / 2**20:.0f} MiB"
    if stored := server.stored_nbytes():
        grown += f", {stored / 2**20:.0f} MiB of state stored in all"
    yield f"20 users of it: {grown}", 0, 0, 0.0


def cancelled_row(server: Server, words: int) -> Iterator[Row]:
    """A client leaves half-way through a long prompt, comes back and asks again."""
    warm_up = [{"role": "system", "content": prose(words, 3)}, {"role": "user", "content": "Hm?"}]
    cold = server.ask(warm_up, "cold")
    yield "long prompt, cold", cold["cached"], cold["prefilled"], cold["seconds"]
    messages = [{"role": "system", "content": prose(words, 4)}, {"role": "user", "content": "Hm?"}]
    try:
        impatient = httpx.Timeout(cold["seconds"] / 2)
        body = {"model": server.model, "messages": messages, "max_tokens": 4}
        httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=impatient)
    except httpx.TimeoutException:
        pass
    again = server.ask(messages, "again")
    yield "left half-way, asked again", again["cached"], again["prefilled"], again["seconds"]


def stall_row(server: Server, words: int) -> Iterator[Row]:
    """Seven streams run while a long prompt arrives; the worst pause between two pieces of any."""
    gaps: list[float] = []
    quiet: list[float] = []
    arrival = threading.Event()
    finished = threading.Event()

    def stream(index: int) -> None:
        messages = [{"role": "user", "content": prose(30, 300 + index)}]
        body = {"model": server.model, "messages": messages, "max_tokens": 600,
                "temperature": 0, "stream": True, "logit_bias": {"2": -100}}  # fmt: skip
        with httpx.stream(
            "POST", f"{server.url}/v1/chat/completions", json=body, timeout=240
        ) as response:
            last: float | None = None
            pieces = 0
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                now = time.monotonic()
                if last is not None:
                    (gaps if arrival.is_set() else quiet).append(now - last)
                last, pieces = now, pieces + 1
                if finished.is_set():
                    return

    threads = [threading.Thread(target=stream, args=(i,)) for i in range(7)]
    for thread in threads:
        thread.start()
    while len(quiet) < 140 and any(thread.is_alive() for thread in threads):
        time.sleep(0.05)
    arrival.set()
    long = [{"role": "system", "content": prose(words, 5)}, {"role": "user", "content": "Hm?"}]
    try:
        answer = server.ask(long, "long")
    finally:
        finished.set()
        for thread in threads:
            thread.join()
    what = f"worst gap of 7 streams {max(gaps):.2f} s (before: {max(quiet):.2f} s)"
    yield what, answer["cached"], answer["prefilled"], answer["seconds"]


def measure(server: Server) -> list[Row]:
    """Run every scenario on one server, printing as it goes; one that fails is a line saying so."""
    rows: list[Row] = []
    print(f"\n{server.name}\n{'cached':>8} {'prefilled':>10} {'seconds':>8}  what", flush=True)
    for name, scenario in (
        ("ten turns", conversation_rows(server)),
        ("one document", document_rows(server, 2720)),
        ("cancelled prefill", cancelled_row(server, 4090)),
        ("stall", stall_row(server, 4360)),
    ):
        try:
            for row in scenario:
                rows.append(row)
                what, cached, prefilled, seconds = row
                print(f"{cached:>8} {prefilled:>10} {seconds:>8.2f}  {what}", flush=True)
        except httpx.HTTPError as error:
            print(f"{'failed':>28}  {name}: {type(error).__name__}", flush=True)
    return rows


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--peer-python", type=Path, help="Python of an environment with mlx-lm")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--json", type=Path, help="write all figures here too")
    options = parser.parse_args()
    results: dict[str, list[Row]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        model = random_model.make(
            Path(scratch) / "random", hidden=options.hidden, layers=options.layers
        )
        with kvserve(model, Path(scratch) / "data") as server:
            results[server.name] = measure(server)
        if options.peer_python:
            with mlx_lm_server(options.peer_python, model, Path(scratch)) as server:
                results[server.name] = measure(server)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()

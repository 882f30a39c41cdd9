"""Measure a restart beside a hit in memory, a cold prompt and mlx_lm.server, in one run.

Run as `python -m scripts.measure_restart [--peer-python VENV/bin/python]`. Several conversations
of about 4,000 tokens are started, go on (a hit in memory), the server is killed (`kill -9`) and
started again, and they go on once more. Both servers get the same random-weight model, BLAS and
requests. Times are of whole answers of a few tokens, medians over the conversations; they are
comparable within one run only.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from scripts import random_model
from scripts.compare_servers import Message, Server, kvserve, mlx_lm_server, prose

Start = Callable[[], AbstractContextManager[Server]]
SETTLE_S = 2.0


def question(number: int) -> Message:
    return {"role": "user", "content": prose(25, 5000 + number)}


def go_on(server: Server, history: list[Message], name: str, number: int) -> dict[str, Any]:
    """Ask the next question of a conversation and note the reply in its history."""
    history.append(question(number))
    answer = server.ask(history, name, max_tokens=4)
    history.append({"role": "assistant", "content": answer["text"]})
    return answer


def measure(start: Start, words: int, num_conversations: int) -> dict[str, list[dict[str, Any]]]:
    """Return the answers of each kind: cold, from memory, after the restart, and once more."""
    kinds: dict[str, list[dict[str, Any]]] = {
        kind: [] for kind in ("cold", "memory", "restart", "memory again")
    }
    histories: list[list[Message]] = [
        [{"role": "system", "content": prose(words, 4000 + i)}] for i in range(num_conversations)
    ]
    with start() as server:
        server.ask([question(0)], "warm-up", max_tokens=4)
        for kind in ("cold", "memory"):
            for i, history in enumerate(histories):
                kinds[kind].append(go_on(server, history, f"chat-{i}", 10 * i + len(history)))
        time.sleep(SETTLE_S)  # both servers get the time to write what they may want to
        server.process.kill()
    with start() as server:
        server.ask([question(0)], "warm-up", max_tokens=4)
        for kind in ("restart", "memory again"):
            for i, history in enumerate(histories):
                kinds[kind].append(go_on(server, history, f"chat-{i}", 10 * i + len(history)))
    return kinds


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--peer-python", type=Path, help="Python of an environment with mlx-lm")
    parser.add_argument("--words", type=int, default=2180, help="length of each conversation")
    parser.add_argument("--conversations", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--json", type=Path, help="write all figures here too")
    options = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        model = random_model.make(
            Path(scratch) / "random", hidden=options.hidden, layers=options.layers
        )
        starts: dict[str, Start] = {"kvserve": lambda: kvserve(model, Path(scratch) / "data")}
        if options.peer_python:
            starts["mlx_lm.server"] = lambda: mlx_lm_server(
                options.peer_python, model, Path(scratch)
            )
        for name, start in starts.items():
            results[name] = measure(start, options.words, options.conversations)
            print(f"\n{name}\n{'cached':>8} {'prefilled':>10} {'seconds':>8}", flush=True)
            for kind, answers in results[name].items():
                middle = statistics.median(a["seconds"] for a in answers)
                cached = statistics.median(a["cached"] for a in answers)
                prefilled = statistics.median(a["prefilled"] for a in answers)
                print(f"{cached:>8.0f} {prefilled:>10.0f} {middle:>8.3f}  {kind}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Nobody is told another's secret, over restarts, kills and evictions, and every load is right.

Many conversations of several users, worded alike, with memory for a tenth of them and disk for
a third. `SECRET_TURNS=2000 SECRET_CHATS=200` in the environment is the long version, `SECRET_SEED`
another sequence.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from kvserve.store.guards import Limits
from kvserve.store.store import Store
from tests.faults.secrets import TIMEOUT_S, Gone, Mint, Tally, User
from tests.server.conftest import ROOT, ServerProcess

NUM_TURNS = int(os.environ.get("SECRET_TURNS", "100"))
NUM_CHATS = int(os.environ.get("SECRET_CHATS", "20"))
SEED = int(os.environ.get("SECRET_SEED", "1"))
LONG = NUM_TURNS >= 1000
NUM_USERS = 4
NUM_LIVES = max(3, NUM_TURNS // 100)
TOKEN_NBYTES = 2 * 4 * 2 * 32 * 4
"""Keys and values of the embedded model: 4 layers of 2 heads of 32, in float32 on the CPU."""
CHAT_TOKENS = 190 + 35 * NUM_TURNS // NUM_CHATS
"""About how long a conversation is in the end: its document, and its turns."""
WORKING_SET = NUM_CHATS * CHAT_TOKENS * TOKEN_NBYTES
RAM_NBYTES = max(WORKING_SET // 10, 7 << 20)  # three requests at once take most of that
DISK_NBYTES = WORKING_SET // 3 if LONG else 5 << 20

pytestmark = [pytest.mark.server, pytest.mark.slow]


@contextmanager
def watched(folder: Path) -> Iterator[ServerProcess]:
    """A server of the embedded model under watch; killed at the end unless it has ended."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("KVSERVE_")}
    flags = {
        "--port": "0",
        "--data-dir": folder / "data",
        "--auto-conversation": "off",
        "--log-level": "warning",
        "--ram-budget": str(RAM_NBYTES),
        "--disk-budget": str(DISK_NBYTES),
        "--verify-cache": "0.1",
    }
    words = [str(word) for pair in flags.items() for word in pair]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.watched", folder / "notes", "serve", *words],
        cwd=ROOT,
        env={**environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    server = ServerProcess(process)
    try:
        server.wait_ready()
        yield server
    finally:
        server.end(signal.SIGKILL)


def test_nobody_is_told_a_secret_of_another(tmp_path: Path) -> None:
    choose, mint, tally = random.Random(SEED), Mint(SEED), Tally()
    users = [User(number, SEED, mint, tally) for number in range(NUM_USERS)]
    for number in range(NUM_CHATS):
        user = users[number % NUM_USERS]
        salt = None if number % 3 else f"salt-{number % 2}"
        user.chats.append(user.new_chat(salt=salt))
    life = 0
    while tally.counts["turns"] < NUM_TURNS and not tally.faults:
        life += 1
        with watched(tmp_path) as server:
            due = min(NUM_TURNS, NUM_TURNS * life // NUM_LIVES)
            stop = threading.Event()
            for user in users:
                user.url = server.url
            threads = [
                threading.Thread(target=work, args=(user, due, stop, tally)) for user in users
            ]
            for thread in threads:
                thread.start()
            number = signal.SIGKILL if life % 2 else signal.SIGTERM
            while tally.counts["turns"] < due and not tally.faults:
                assert any(thread.is_alive() for thread in threads), server.log
                time.sleep(0.02)
            add_stats(tally, server.get("/stats"))
            if number == signal.SIGTERM:
                stop.set()
            else:
                time.sleep(choose.uniform(0.0, 0.3))  # into the next turns, and into their writes
                server.process.send_signal(number)
            for thread in threads:
                thread.join(TIMEOUT_S)
            code = server.end(number)
            assert code == (0 if number == signal.SIGTERM else -number), server.log
        assert "Traceback" not in server.log, server.log
        tally.counts[f"ended by {number.name}"] += 1
    read_notes(tally, tmp_path / "notes")
    audit(tally, tmp_path / "data")
    counts = tally.counts
    counts["tokens of all conversations"] = held_tokens(users)
    print(json.dumps(dict(sorted(counts.items())), indent=1))
    assert not tally.faults, tally.faults[:5]
    assert counts["turns"] >= NUM_TURNS
    assert counts["right answers"] >= 0.95 * counts["answers"]
    wanted = [
        "loads",
        "kv snapshot",
        "cold comparisons",
        "evicted from memory",
        "evicted from disk",
    ]
    wanted += ["fork", "rollback", "save", "delete", "verified"] * LONG
    for name in wanted:
        assert counts[name] > 0, name


def work(user: User, due: int, stop: threading.Event, tally: Tally) -> None:
    """Act until told to stop or the server is gone; one's errors are not lost."""
    with httpx.Client(timeout=TIMEOUT_S) as client:
        try:
            while not stop.is_set() and not tally.faults:
                user.act(client)
        except Gone:
            return
        except Exception as error:
            tally.faults.append(f"{user.key}: {error!r}")


def add_stats(tally: Tally, stats: dict[str, Any]) -> None:
    """Add what a server has counted in its life; what must not be is a fault."""
    cache, disk = stats["cache"], stats["disk"]
    tally.counts += Counter(
        {
            "evicted from memory": cache["evicted_segments"],
            "evicted from disk": disk["evicted"],
            "written bytes": disk["written_total_bytes"] - tally.counts["written bytes"],
            "writes": disk["writes"],
            "writes failed": disk["writer"]["failed"],
            "verified": stats["verified"],
            "preempted": stats["preempted"],
        }
    )
    for name in ("verify_mismatches", "failed_restores", "failed", "recovered_batches"):
        if stats[name]:
            tally.faults.append(f"{name}: {stats[name]}")
    for name in ("failed", "quarantined", "index_failures"):
        if disk[name]:
            tally.faults.append(f"disk {name}: {disk[name]}")


def read_notes(tally: Tally, notes: Path) -> None:
    """Take in what was noted at each load."""
    for line in notes.read_text(encoding="utf-8").splitlines() if notes.exists() else ():
        note = json.loads(line)
        if "fault" in note:
            tally.faults.append(note["fault"])
            continue
        tally.counts["loads"] += 1
        tally.counts["loaded tokens"] += note["load"] - note["held"]
        tally.counts["loads on top of memory"] += note["held"] > 0


def audit(tally: Tally, folder: Path) -> None:
    """Verify every digest and row of what is left."""

    async def run() -> None:
        store = await Store.open(folder, identity=None, limits=Limits())
        try:
            await store.sweep()
            async for step in store.verify():
                tally.faults += [str(fault) for fault in step.faults]
        finally:
            await store.aclose()

    asyncio.run(run())


def held_tokens(users: list[User]) -> int:
    """Return about how many tokens all conversations have, at 2.3 characters each."""
    texts = (m["content"] for user in users for chat in user.chats for m in chat.history)
    return round(sum(len(text) / 2.3 + 4 for text in texts))

"""Kill -9 at random moments: nothing acknowledged is lost, nothing wrong is said, no rubbish stays.

`KILLS=500` in the environment tries more than the few of an ordinary run; `KILL_SEED` another
sequence.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
from pathlib import Path

import httpx
import mlx.core as mx
import numpy as np
import pytest

from kvserve.engine.model import load
from kvserve.store.guards import Limits
from kvserve.store.store import Store
from tests.faults.killing import REPLY_TOKENS, TIMEOUT_S, Actor, Message, Tally
from tests.server.conftest import ServerProcess, start_server
from tests.tiny_models import qwen3_config, write_model

KILLS = int(os.environ.get("KILLS", "6"))
SEED = int(os.environ.get("KILL_SEED", "1"))
NUM_ACTORS = 3
VERIFY_EVERY = 5
TIE = 1e-5
"""Of the range of the logits: what float32 loses in sums of another order."""

pytestmark = [pytest.mark.server, pytest.mark.slow]


def start(data_dir: Path, model: Path) -> ServerProcess:
    """Start a server with room for a few conversations only, in memory and on disk."""
    server = start_server(
        data_dir,
        *("--model", str(model), "--auto-conversation", "off", "--log-level", "warning"),
        *("--ram-budget", "6MiB", "--disk-budget", "8MiB"),
    )
    server.wait_ready()
    return server


def audit(data_dir: Path, tally: Tally) -> None:
    """Verify every digest and row of a stopped store, and that what is left over was swept."""

    async def run() -> None:
        store = await Store.open(data_dir, identity=None, limits=Limits())
        try:
            await store.sweep()
            async for step in store.verify():
                tally.faults += [f"kill {tally.kills}: {fault}" for fault in step.faults]
        finally:
            await store.aclose()
        drafts = list((data_dir / "snapshots" / "tmp").iterdir())
        tally.faults += [f"kill {tally.kills}: draft {path.name} stayed" for path in drafts]
        if (data_dir / "quarantine").exists():
            bad = list((data_dir / "quarantine").iterdir())
            tally.faults += [f"kill {tally.kills}: {path.name} was damaged" for path in bad]

    asyncio.run(run())


def margin(model: Path, messages: list[Message]) -> float:
    """Return by how much of the logits' range the greedy reply's closest choice was made."""
    loaded = load(model, name="truth")
    ids = loaded.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    cache, least, tokens = loaded.fresh_cache(), float("inf"), list(ids)
    for _ in range(REPLY_TOKENS):
        logits = np.array(loaded.forward(mx.array([tokens]), cache=cache)[0, -1])
        second, first = np.sort(logits)[-2:]
        least = min(least, float((first - second) / (logits.max() - logits.min())))
        tokens = [int(logits.argmax())]
    return least


def test_nothing_acknowledged_is_lost_to_kill_9(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", qwen3_config())
    data_dir = tmp_path / "data"
    choose, tally = random.Random(SEED), Tally()

    def is_tie(messages: list[Message]) -> bool:
        least = margin(model, messages)
        print(f"the closest choice was made by {least:.1e} of the range")
        return least < TIE

    actors = [Actor(number, SEED, tally, is_tie) for number in range(NUM_ACTORS)]
    while tally.kills < KILLS and not tally.faults:
        server = start(data_dir, model)
        try:
            with httpx.Client(timeout=TIMEOUT_S) as client:
                for actor in actors:
                    actor.url = server.url
                    actor.check(client)
                actors[tally.kills % NUM_ACTORS].check_reply(client)
            stop = threading.Event()
            threads = [threading.Thread(target=actor.work, args=(stop,)) for actor in actors]
            for thread in threads:
                thread.start()
            stop.wait(choose.uniform(0.0, 1.5))
            server.process.send_signal(signal.SIGKILL)
            stop.set()
            for thread in threads:
                thread.join(TIMEOUT_S)
        finally:
            server.end(signal.SIGKILL)
        assert "Traceback" not in server.log, server.log
        tally.kills += 1
        if tally.kills % VERIFY_EVERY == 0 or tally.kills == KILLS:
            audit(data_dir, tally)
            print(tally, flush=True)
    assert not tally.faults, tally
    assert tally.checked_replies > 0
    assert sum(tally.interrupted.values()) > 0 or KILLS < 20

"""How long a server takes to start with many stored conversations, beside one with none."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from kvserve.core.types import TokenIds
from kvserve.store.disk import Disk
from kvserve.store.guards import Limits
from kvserve.store.records import ConversationHead, StoredConversation, StoredMessage
from kvserve.store.segments import Buffer, SegmentSpec, StoredPath
from kvserve.store.slicing import slice_spec
from kvserve.store.snapshot import read_header
from kvserve.store.snapshot_header import SnapshotHeader
from kvserve.store.store import Store, utc_now
from scripts.store_figures.parts import Row, middle, running

MADE_TOKENS = 16
"""Length of the made-up conversations: the index does not know how much a file holds."""
Message = dict[str, str]
REAL = 3


class Unsynced(Disk):
    """A disk that says that all is durable, to fill a store in minutes."""

    def fsync(self, fd: int) -> None:
        pass

    def fsync_folder(self, folder: Path) -> None:
        pass


class Noise:
    """State of the right shape, and of no meaning."""

    def __init__(self, spec: SegmentSpec) -> None:
        self.specs: Sequence[SegmentSpec] = [spec]
        self._data = [np.ones(array.nbytes // 4, np.float32) for array in spec.arrays]

    async def data(self, index: int) -> Sequence[Buffer]:
        return [array.data.cast("B") for array in self._data]


async def fill(folder: Path, model: Path | None, count: int) -> list[list[Message]]:
    """Store `count` conversations, all but a few of noise; return the messages of those few."""
    histories: list[list[Message]] = []
    async with running(folder, model) as here:
        for i in range(REAL):
            messages = [
                {"role": "system", "content": f"The door code of Maple House is {4417 + i}."}
            ]
            for text in ("My dog is called Biscuit.", "What is the door code of Maple House?"):
                messages.append({"role": "user", "content": text})
                await here.say(messages, f"real-{i}", 40)
            histories.append(messages)
        identity, name = here.engine.info.identity, here.engine.info.name
        vocabulary = here.engine.model.vocab_size
    store = await Store.open(folder, identity=identity, limits=Limits(), disk=Unsynced())
    try:
        header = _some_header(folder)

        async def sources(path: StoredPath, ranges: Sequence[tuple[int, int]]) -> list[Noise]:
            return [Noise(slice_spec(header.segments[0], *part)) for part in ranges]

        draw, now = np.random.default_rng(5), utc_now()
        for i in range(count - REAL):
            ids = draw.integers(0, vocabulary, MADE_TOKENS).astype(np.uint32)
            ids[:2] = divmod(i, vocabulary)  # no two are alike
            head = ConversationHead(
                tenant="",
                id=f"made-{i}",
                namespace=header.namespace or b"",
                model=name,
                identity=identity,
                num_tokens=MADE_TOKENS,
                num_messages=2,
                tip=ids.tobytes(),
                stem=ids.tobytes(),
                created_at=now,
                used_at=now,
            )
            await store.write(_conversation(head, ids), sources, by_order=False)
    finally:
        await store.aclose()
    return histories


def _some_header(folder: Path) -> SnapshotHeader:
    """Return the header of a file of the model, whose layout the noise is to have."""
    return read_header(Disk(), next(folder.glob("snapshots/??/*-0.safetensors")))


def _conversation(head: ConversationHead, ids: TokenIds) -> StoredConversation:
    messages = [StoredMessage("user", b"asked", 8), StoredMessage("assistant", head.tip, len(ids))]
    return StoredConversation(
        head=head, tools_digest=b"", template_digest=b"", messages=messages, token_ids=ids
    )


@contextmanager
def served(folder: Path, model: Path | None) -> Iterator[tuple[str, float]]:
    """Run a server; gives its address and the seconds until it said that it is ready."""
    named = [] if model is None else ["--model", str(model)]
    command = [sys.executable, "-m", "kvserve", "serve", "--port", "0", "--data-dir", str(folder)]
    begun = time.perf_counter()
    with subprocess.Popen(
        [*command, "--log-level", "warning", *named], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            ready = next(filter(None, (re.search(r"at (http://\S+)", x) for x in process.stdout)))
            yield ready[1], time.perf_counter() - begun
        finally:
            process.terminate()


def many_conversations(folder: Path, model: Path | None, *, count: int, rounds: int) -> list[Row]:
    """Start a server on a full store and on an empty one by turns; use the full one at last."""
    full, empty = folder / "full", folder / "empty"
    begun = time.perf_counter()
    histories = asyncio.run(fill(full, model, count))
    filled_s = time.perf_counter() - begun
    taken: dict[Path, list[float]] = {full: [], empty: []}
    for data in (full, empty):  # the first start of a folder writes its fingerprints
        with served(data, model):
            pass
    for _ in range(rounds):
        for data in (full, empty):
            with served(data, model) as (_, seconds):
                taken[data].append(seconds)
    with served(full, model) as (url, _):
        rows = _use(url, histories, count)
    with_all, with_none = middle(taken[full]), middle(taken[empty])
    index = (full / "index.sqlite3").stat().st_size
    return [
        (
            "stored conversations",
            f"{count}, index of {index / 1e6:.1f} MB, made in {filled_s:.0f} s",
        ),
        ("ready after, empty store", f"{with_none:.2f} s (median of {rounds})"),
        ("ready after, full store", f"{with_all:.2f} s ({with_all - with_none:+.2f} s)"),
        *rows,
    ]


def _use(url: str, histories: list[list[Message]], count: int) -> list[Row]:
    """Go on with a conversation that was stored; its reply must be the one of a cold run."""
    with httpx.Client(base_url=url, timeout=120) as client:
        asked = [*histories[0], {"role": "user", "content": "What is my dog called?"}]
        body: dict[str, Any] = {"messages": asked, "max_tokens": 40, "temperature": 0}
        begun = time.perf_counter()
        named = {"X-Conversation-Id": "real-0"}
        warm = client.post("/v1/chat/completions", json=body, headers=named)
        seconds = time.perf_counter() - begun
        cold = client.post("/v1/chat/completions", json={**body, "cache_salt": "cold"})
        same = (
            warm.json()["choices"][0]["message"]["content"]
            == cold.json()["choices"][0]["message"]["content"]
        )
        loaded = client.post("/v1/conv_kv/load", json={"conversation_id": f"made-{count // 2}"})
        listed = client.get("/v1/conv_kv/stats").json()
        cached, prefilled = (
            warm.headers[f"x-conv-{name}-tokens"] for name in ("cached", "processing")
        )
        how = (
            f"{warm.headers['x-conv-kv']}, {cached} tokens reused, {prefilled} prefilled, "
            f"{1000 * seconds:.0f} ms, reply as cold: {same}"
        )
        return [
            ("next turn of a stored one", how),
            ("loading one by order", f"{loaded.status_code}, {loaded.json().get('tokens')} tokens"),
            ("listed", f"{len(listed['items'])} on the first page"),
        ]

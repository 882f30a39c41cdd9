"""What turns cost on disk, and how soon they are safe there."""

from __future__ import annotations

import asyncio
import struct
import time
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

from kvserve.cache.tree import common_prefix
from kvserve.core.types import TokenIds
from scripts.compare_servers import prose
from scripts.store_figures.parts import Row, Running, running, share

Key = tuple[str, str]
_WAL_HEADER, _FRAME_HEADER = 32, 24


class Wal:
    """Counts the bytes that SQLite appends to its log; ask at least once per checkpoint."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._salts = b""
        self._seen = 0

    def new_nbytes(self) -> int:
        """Return what was appended since the last call."""
        data = self._path.read_bytes() if self._path.exists() else b""
        if len(data) < _WAL_HEADER:
            return 0
        (page,) = struct.unpack_from(">I", data, 8)
        salts, size = data[16:24], page + _FRAME_HEADER
        if salts != self._salts:  # begun anew after a checkpoint
            self._salts, self._seen = salts, 0
        count = 0
        for at in range(_WAL_HEADER, len(data) - size + 1, size):
            if data[at + 8 : at + 16] != salts:
                break  # left from before the checkpoint
            count += 1
        new, self._seen = count - self._seen, count
        return int(new * size)


@dataclass
class Meter:
    """Watches turns end and writes come to their end, inside the server."""

    here: Running
    nbytes: int = 0
    held: dict[Key, TokenIds] = field(default_factory=dict)
    new_tokens: int = 0
    delays_s: list[float] = field(default_factory=list)
    _ended: defaultdict[Key, list[float]] = field(default_factory=lambda: defaultdict(list))

    def attach(self, stack: ExitStack) -> None:
        keep, write = self.here.archive.keep, self.here.store.write

        def noted_keep(record: Any) -> None:
            self._ended[record.key].append(time.perf_counter())
            keep(record)

        async def noted_write(stored: Any, *arguments: Any, **more: Any) -> Any:
            key = (stored.head.tenant, stored.head.id)
            ended = self._ended.pop(key, [])
            written = await write(stored, *arguments, **more)
            now = time.perf_counter()
            self.delays_s += [now - then for then in ended]
            self.nbytes += written.nbytes
            before = self.held.get(key, stored.token_ids[:0])
            # A reply that comes back as other tokens has been computed anew.
            self.new_tokens += len(stored.token_ids) - common_prefix(before, stored.token_ids)
            self.held[key] = stored.token_ids
            return written

        stack.enter_context(patch.object(self.here.archive, "keep", noted_keep))
        stack.enter_context(patch.object(self.here.store, "write", noted_write))

    async def settle(self) -> None:
        """Wait until everything that has ended is durable."""
        while self.here.archive.stats()["writer"]["pending"]:  # noqa: ASYNC110
            await asyncio.sleep(0.002)


def question(seed: int, words: int = 25) -> dict[str, str]:
    return {"role": "user", "content": prose(words, seed)}


async def chats(folder: Path, model: Path | None, *, turns: int, reply: int) -> list[Row]:
    """Measure three conversations of a few words per turn, then four at once."""
    async with running(folder, model) as here:
        with ExitStack() as stack:
            meter, wal = Meter(here), Wal(folder / "index.sqlite3-wal")
            meter.attach(stack)
            token_nbytes = here.engine.model.footprint.span_nbytes
            ratios, logged = [], []
            for chat in range(3):
                messages = [{"role": "system", "content": prose(60, 100 + chat)}]
                for turn in range(turns):
                    wal.new_nbytes()
                    nbytes, new = meter.nbytes, meter.new_tokens
                    messages.append(question(1000 * chat + turn))
                    await here.say(messages, f"chat-{chat}", reply)
                    await meter.settle()
                    fresh = (meter.new_tokens - new) * token_nbytes
                    ratios.append((meter.nbytes - nbytes) / fresh)
                    logged.append(wal.new_nbytes())
            total, written = meter.new_tokens * token_nbytes, meter.nbytes
            alone = list(meter.delays_s)
            meter.delays_s.clear()
            await asyncio.gather(*(_burst(here, i, turns, reply) for i in range(4)))
            await meter.settle()
        return [
            ("turns", f"{len(ratios)}, {total // len(ratios)} new KV bytes each"),
            ("file bytes over new KV bytes", f"{written / total:.3f}; {_spread(ratios)}"),
            ("SQLite log bytes per turn", f"{sum(logged) // len(logged)}"),
            ("log bytes over new KV bytes", f"{sum(logged) / total:.3f}"),
            ("end of turn to durable, one chat", _delays(alone)),
            ("end of turn to durable, four at once", _delays(meter.delays_s)),
        ]


def _spread(ratios: list[float]) -> str:
    return f"per turn {min(ratios):.3f} to {max(ratios):.3f}"


def _delays(delays_s: list[float]) -> str:
    p50, p99 = (1000 * share(delays_s, of) for of in (0.5, 0.99))
    return f"p50 {p50:.0f} ms, p99 {p99:.0f} ms (of {len(delays_s)})"


async def _burst(here: Running, number: int, turns: int, reply: int) -> None:
    messages = [{"role": "system", "content": prose(60, 500 + number)}]
    for turn in range(turns):
        messages.append(question(7000 + 100 * number + turn))
        await here.say(messages, f"burst-{number}", reply)


async def one_document(
    folder: Path, model: Path | None, *, words: int, num_chats: int, reply: int
) -> list[Row]:
    """Compare what conversations over one document take with the document and their tails."""
    document = {"role": "system", "content": prose(words, 42)}
    async with running(folder, model) as here:
        with ExitStack() as stack:
            meter = Meter(here)
            meter.attach(stack)
            for chat in range(num_chats):
                messages = [document]
                for turn in range(2):
                    messages.append(question(50 * chat + turn))
                    await here.say(messages, f"chat-{chat}", reply)
                await meter.settle()
        found = [await here.store.find("", f"chat-{chat}") for chat in range(num_chats)]
        held = sorted((s.token_ids for s in found if s is not None), key=bytes)
        assert len(held) == num_chats
        # The distinct prefixes: each one's tokens but those that it has in common with another.
        distinct = len(held[0]) + sum(len(b) - common_prefix(a, b) for a, b in pairwise(held))
        shared = min(common_prefix(a, b) for a, b in pairwise(held))
        token_nbytes = here.engine.model.footprint.span_nbytes
        stored = here.store.stats()["stored_bytes"]
        every = sum(map(len, held))
        return [
            ("document and tails", f"{shared} tokens, {distinct - shared} in {num_chats} tails"),
            ("stored bytes", f"{stored}"),
            ("over one document and the tails", f"{stored / (distinct * token_nbytes):.3f}"),
            ("over each conversation by itself", f"{stored / (every * token_nbytes):.3f}"),
        ]

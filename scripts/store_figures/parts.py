"""The server's parts in this process, joined as `kvserve.app` does, to be measured inside."""

from __future__ import annotations

import math
import statistics
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from kvserve import app
from kvserve.chat.archive import Archive
from kvserve.config import Settings
from kvserve.engine.engine import Engine
from kvserve.store.store import Store

Row = tuple[str, str]
"""What was measured, and the figure with its unit."""


@dataclass(frozen=True, slots=True)
class Running:
    """A server without its socket; `client` talks to it in this process."""

    engine: Engine
    store: Store
    archive: Archive
    client: httpx.AsyncClient

    async def say(self, messages: list[dict[str, str]], name: str, max_tokens: int) -> Any:
        """Send one chat request and return its answer; the reply goes to the end of `messages`."""
        answer = await self.client.post(
            "/v1/chat/completions",
            json={"messages": messages, "max_tokens": max_tokens, "temperature": 0},
            headers={"X-Conversation-Id": name},
        )
        answer.raise_for_status()
        text = answer.json()["choices"][0]["message"]["content"] or ""
        messages.append({"role": "assistant", "content": text})
        return answer


@asynccontextmanager
async def running(folder: Path, model: Path | None, **more: Any) -> AsyncIterator[Running]:
    """Start the parts on a data folder; everything is written and closed at the end."""
    settings = Settings(data_dir=folder, model=None if model is None else str(model), **more)
    engine = app.make_engine(settings)
    await engine.start()
    try:
        store = await app.open_store(settings, engine)
        assert store is not None
        try:
            parts = app.make_parts(settings, engine, store)
            await parts.archive.open()
            served = app.make_app(settings, engine, parts)
            transport = httpx.ASGITransport(app=served)
            async with httpx.AsyncClient(
                transport=transport, base_url="http://here", timeout=600
            ) as client:
                yield Running(engine, store, parts.archive, client)
            await parts.archive.close()
        finally:
            await store.aclose()
    finally:
        await engine.stop()


def middle(figures: Sequence[float]) -> float:
    """Return the median."""
    return statistics.median(figures)


def share(figures: Sequence[float], of: float) -> float:
    """Return the smallest figure that at least a share of all does not exceed."""
    ordered = sorted(figures)
    return ordered[max(0, math.ceil(len(ordered) * of) - 1)]

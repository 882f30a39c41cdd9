"""An index to try things on, and what is put into it. Files are names only."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import cache, wraps
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import Connection

from kvserve.core.identity import ModelIdentity
from kvserve.core.keys import prefix_key, root_key
from kvserve.core.types import TokenIds
from kvserve.store.catalog import Catalog
from kvserve.store.catalog_runs import key_within, split_run
from kvserve.store.migrate import upgrade
from kvserve.store.records import ConversationHead, StoredConversation, StoredMessage
from kvserve.store.runs import Commit, Fill, NewRun, RunFile
from kvserve.store.segments import ArraySpec, SegmentSpec

FIELDS = "weights config quantisation adapter tokenizer chat_template kv_dtype layout".split()
IDENTITY = ModelIdentity(**dict.fromkeys(FIELDS, "1"))
NAMESPACE = b"caller"
NOW = datetime(2026, 11, 20, 23, 59, 59, 123457, UTC)
ROOT = root_key(IDENTITY.digest(), NAMESPACE)
SECOND = timedelta(seconds=1)


def ids(tokens: Iterable[int]) -> TokenIds:
    return np.fromiter(tokens, np.uint32)


def key(tokens: Iterable[int]) -> bytes:
    return prefix_key(ROOT, ids(tokens))


@cache
def _fresh() -> bytes:
    """An empty index; Alembic makes one in a tenth of a second, and tests are many."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index.sqlite3"
        upgrade(path)
        return path.read_bytes()


@asynccontextmanager
async def opened(folder: Path) -> AsyncIterator[Catalog]:
    path = folder / "index.sqlite3"
    if not path.exists():
        path.write_bytes(_fresh())
    catalog = Catalog(path)
    try:
        yield catalog
    finally:
        await catalog.aclose()


@asynccontextmanager
async def temporary() -> AsyncIterator[Catalog]:
    folder = Path(tempfile.mkdtemp())
    try:
        async with opened(folder) as catalog:
            yield catalog
    finally:
        shutil.rmtree(folder)


def on_catalog(test: Callable[[Catalog], Awaitable[None]]) -> Callable[[], None]:
    """Let a test have an empty catalog of its own, in an event loop of its own."""

    async def scenario() -> None:
        async with temporary() as catalog:
            await test(catalog)
            assert await catalog.check() == []

    @wraps(test)
    def run() -> None:
        asyncio.run(scenario())

    del run.__wrapped__  # pytest would look for its parameters
    return run


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(coroutine)


def content(file: str, start: int, end: int, *, nbytes: int = 100, cut: int = 4) -> RunFile:
    """A file of segments of at most `cut` tokens."""
    specs = []
    for at in range(start, end, cut):
        array = ArraySpec("F32", (1, 2, min(cut, end - at), 4))
        spec = SegmentSpec(at, min(at + cut, end), (array,), None, windows={8: 3})
        specs.append(replace(spec, restorable=at % 2 == 0))
    return RunFile(file=file, nbytes=nbytes, digest=b"d" * 16, specs=specs)


def conversation(id: str, tokens: Iterable[int], **head: Any) -> StoredConversation:
    token_ids = ids(tokens)
    messages = [
        StoredMessage("user" if at % 2 == 0 else "assistant", bytes([at]) * 16, min(at * 3, 7))
        for at in range(head.pop("num_messages", 2))
    ]
    values: dict[str, Any] = {"tenant": "t", "namespace": NAMESPACE, "model": "m"}
    values |= {"identity": IDENTITY, "tip": b"tip", "stem": b"stem"}
    values |= {"created_at": NOW, "used_at": NOW, "num_messages": len(messages)} | head
    return StoredConversation(
        head=ConversationHead(id=id, num_tokens=len(token_ids), **values),
        tools_digest=b"tools",
        template_digest=b"template",
        messages=messages,
        token_ids=token_ids,
    )


async def turn(
    catalog: Catalog,
    id: str,
    tokens: Iterable[int],
    *,
    held: bool = True,
    now: datetime = NOW,
    nbytes: int = 100,
    file: str | None = None,
    **head: Any,
) -> tuple[int, ...]:
    """Write a conversation as a turn does: walk, then add what is missing. Return its new runs.

    Files are named after the conversation and the range; `held` False writes the tokens only.
    """
    whole = conversation(id, tokens, used_at=now, **head)
    walk = await catalog.walk(IDENTITY, NAMESPACE, whole.token_ids)
    start, end = walk.path.num_tokens, whole.head.num_tokens
    new = NewRun(
        start=start,
        tokens=whole.token_ids[start:],
        key=prefix_key(ROOT, whole.token_ids),
        content=content(file or f"{id}-{start}-{end}", start, end, nbytes=nbytes) if held else None,
    )
    return await catalog.commit(
        Commit(
            identity=IDENTITY,
            namespace=NAMESPACE,
            now=now,
            parent_id=walk.parent_id,
            new_runs=[new] if end > start else [],
            conversation=whole,
            nbytes=nbytes if held else 0,
        )
    )


def filling(run_id: int, tokens: Iterable[int], start: int, *, file: str = "filled") -> Commit:
    """A write that fills a run up to the end of `tokens`, which begin at the root."""
    token_ids = ids(tokens)
    end = len(token_ids)
    fill = Fill(
        run_id=run_id,
        end=end,
        key=prefix_key(ROOT, token_ids),
        content=content(file, start, end),
    )
    return Commit(identity=IDENTITY, namespace=NAMESPACE, now=NOW, fills=[fill])


async def split(catalog: Catalog, run_id: int, position: int) -> int:
    """Cut a run without a file in two, as a newcomer does that parts from it there."""

    def work(connection: Connection) -> int:
        key = key_within(connection, run_id, position)
        return split_run(connection, run_id, position, key)

    return await catalog.database.write(work)


def renamed(whole: StoredConversation, id: str) -> StoredConversation:
    return replace(whole, head=replace(whole.head, id=id))

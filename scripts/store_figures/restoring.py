"""How fast a long conversation comes back from disk, beside reading the same bytes plainly."""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kvserve.core.types import Finished, GenerationRequest, Prompt
from kvserve.store.records import ConversationHead, StoredConversation, StoredMessage
from kvserve.store.segments import StoredPath
from kvserve.store.store import utc_now
from scripts.store_figures.parts import Row, Running, middle, running

NAMESPACE = b"measured"
CAPACITY_TOKENS = 256
"""Room for a reply in the working cache, as a request reserves it."""


async def long_conversation(
    folder: Path, model: Path, *, num_tokens: int, rounds: int
) -> list[Row]:
    """Store a conversation, then bring it back in every way, `rounds` times each."""
    async with running(folder, model, ram_budget=1 << 33) as here:
        ids = np.random.default_rng(1).integers(10, 1000, num_tokens).astype(np.uint32)
        prefilled_s = await _timed(partial(_prefill, here, ids))
        written_s = await _timed(partial(_write, here, ids))
        path = await here.store.walk(NAMESPACE, ids)
        assert path.num_tokens == len(ids)
        nbytes = sum(segment.nbytes for segment in path.segments)
        files = _files(folder)
        rows: list[Row] = [
            ("state", f"{num_tokens} tokens, {nbytes / 1e6:.0f} MB in {len(files)} file(s)"),
            ("computing it", f"{prefilled_s:.1f} s"),
            ("writing it, durable", _speed(nbytes, written_s)),
        ]

        async def plain() -> None:
            for file in files:
                _read(file)

        async def verified() -> None:
            here.store.read(path.segments)

        async def whole() -> None:
            await _drop(here, ids)
            await _again(here, ids, path)

        async def from_memory() -> None:
            await _again(here, ids, None)

        ways: list[tuple[str, Callable[[], Awaitable[None]]]] = [
            ("plain read", plain),
            ("read and verify", verified),
            ("request, state on disk", whole),
        ]
        for cached in (True, False):
            for name, way in ways:
                taken = []
                for _ in range(rounds):
                    if not cached:
                        _forget(files)
                    taken.append(await _timed(way))
                where = "page cache" if cached else "not cached"
                rows.append((f"{name}, {where}", _speed(nbytes, middle(taken))))
        taken = [await _timed(from_memory) for _ in range(rounds)]
        rows.append(("the same request, state in memory", f"{1000 * middle(taken):.0f} ms"))
        rows += await _in_parts(here, path, nbytes, rounds)
        return rows


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("snapshots/??/*.safetensors"))


def _speed(nbytes: int, seconds: float) -> str:
    return f"{nbytes / 1e6 / seconds:.0f} MB/s ({1000 * seconds:.0f} ms)"


async def _timed(way: Callable[[], Awaitable[None]]) -> float:
    begun = time.perf_counter()
    await way()
    return time.perf_counter() - begun


def _read(file: Path) -> None:
    """Read a file into fresh memory, as much at once as the system gives."""
    with open(file, "rb", buffering=0) as raw:
        buffer = np.empty(os.fstat(raw.fileno()).st_size, np.uint8).data
        at = 0
        while at < len(buffer):
            at += raw.readinto(buffer[at:]) or 0


def _forget(files: list[Path]) -> None:
    """Let the system drop what it holds of files; they are durable, so it can."""
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


async def _prefill(here: Running, ids: Any) -> None:
    request = GenerationRequest("measure", Prompt(ids), 0, NAMESPACE)
    async for event in here.engine.submit(request):
        if isinstance(event, Finished):
            assert event.num_stored == len(ids)


async def _again(here: Running, ids: Any, path: StoredPath | None) -> None:
    """Take the conversation up for one token more, which computes that token and no other."""
    request = GenerationRequest(
        "measure", Prompt(np.append(ids, 5).astype(np.uint32)), 0, NAMESPACE
    )
    before = here.engine.stats()["prefilled_tokens"]
    async for _ in here.engine.submit(request, path):
        pass
    assert here.engine.stats()["prefilled_tokens"] == before + 1


async def _drop(here: Running, ids: Any) -> None:
    await here.engine.call(lambda: here.engine.cache.drop_path(NAMESPACE, ids))


async def _write(here: Running, ids: Any) -> None:
    now, info = utc_now(), here.engine.info
    head = ConversationHead(
        tenant="",
        id="long",
        namespace=NAMESPACE,
        model=info.name,
        identity=info.identity,
        num_tokens=len(ids),
        num_messages=1,
        tip=b"tip",
        stem=b"tip",
        created_at=now,
        used_at=now,
    )
    message = StoredMessage("user", b"tip", len(ids))
    stored = StoredConversation(
        head=head, tools_digest=b"", template_digest=b"", messages=[message], token_ids=ids
    )
    lease = here.engine.hold(NAMESPACE, ids)
    try:
        await here.store.write(stored, partial(here.engine.sources, lease), by_order=False)
    finally:
        here.engine.release(lease)


async def _in_parts(here: Running, path: StoredPath, nbytes: int, rounds: int) -> list[Row]:
    """Time what the engine thread does with the bytes; everything in the page cache."""
    import mlx.core as mx

    from kvserve.cache.codec import arrays_of, restore
    from kvserve.cache.codec_pack import unpack

    model = here.engine.model
    unpacking: list[float] = []
    restoring: list[float] = []

    def work() -> None:
        begun = time.perf_counter()
        held = [(s.start, s.end, unpack(p)) for s, p in zip(path.segments, packed, strict=True)]
        mx.eval([arrays_of_payload(payload) for _, _, payload in held])
        unpacked = time.perf_counter()
        fresh = model.fresh_cache()
        restore(fresh, held, path.num_tokens, path.num_tokens + CAPACITY_TOKENS)
        mx.eval(arrays_of(fresh))
        unpacking.append(unpacked - begun)
        restoring.append(time.perf_counter() - unpacked)

    for _ in range(rounds):
        packed = here.store.read(path.segments)
        await here.engine.call(work)
    return [
        ("bytes to arrays", _speed(nbytes, middle(unpacking))),
        ("arrays to a working cache", _speed(nbytes, middle(restoring))),
    ]


def arrays_of_payload(payload: Any) -> list[Any]:
    """Return the arrays of a payload that holds keys and values only."""
    return [part.arrays for part in payload.parts if part is not None]

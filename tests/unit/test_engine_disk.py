"""What the disk holds is taken up again as if memory had held it, and costs a prefill otherwise.

The disk is a fake that keeps whole paths in memory; the store has tests of its own.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import pytest

from kvserve.cache.tree import common_prefix
from kvserve.core.types import Finished, Started, TokenIds
from kvserve.store.errors import SnapshotDamaged, SourceGone
from kvserve.store.segments import PackedSegment, StoredPath, StoredSegment
from tests.fakes import (
    TOKEN_NBYTES,
    CheckedEngine,
    Tokens,
    ask,
    collect,
    expected_reply,
    random_tokens,
    running_engine,
)

pytestmark = pytest.mark.anyio

EMPTY = StoredPath(b"", np.zeros(0, np.uint32), 0, ())


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@dataclass
class FakeDisk:
    """Paths by the number under which they were saved, each whole."""

    paths: dict[int, tuple[bytes, TokenIds, list[PackedSegment]]] = field(default_factory=dict)
    damaged: set[int] = field(default_factory=set)
    reported: list[tuple[int, str]] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)
    entered: threading.Event = field(default_factory=threading.Event)
    num_read: int = 0

    def __post_init__(self) -> None:
        self.gate.set()

    async def save(self, engine: CheckedEngine, tokens: Tokens, namespace: bytes = b"") -> None:
        ids = np.array(tokens, np.uint32)
        lease = engine.hold(namespace, ids)
        try:
            (source,) = await engine.sources(lease, EMPTY, [(0, len(ids))])
            segments = [
                PackedSegment(spec, await source.data(i)) for i, spec in enumerate(source.specs)
            ]
        finally:
            engine.release(lease)
        self.paths[len(self.paths)] = (namespace, ids, segments)

    def walk(self, tokens: Tokens, namespace: bytes = b"") -> StoredPath:
        ids = np.array(tokens, np.uint32)
        best, shared = -1, 0
        for number, (space, held, _) in self.paths.items():
            common = common_prefix(held, ids)
            if space == namespace and common > shared:
                best, shared = number, common
        if best < 0:
            return StoredPath(namespace, ids, 0, ())
        segments = [
            StoredSegment(
                run_id=best,
                index=index,
                start=packed.spec.start,
                end=packed.spec.end,
                nbytes=packed.spec.nbytes,
                restorable=packed.spec.restorable,
                whole=packed.spec.whole,
                windows=packed.spec.windows,
                readable=True,
            )
            for index, packed in enumerate(self.paths[best][2])
            if packed.spec.start < shared
        ]
        return StoredPath(namespace, ids, shared, tuple(segments))

    def read(self, segments: Sequence[StoredSegment]) -> list[PackedSegment]:
        self.entered.set()
        self.gate.wait(60)
        for segment in segments:
            if segment.run_id in self.damaged:
                raise SnapshotDamaged(segment.run_id, "digest")
        self.num_read += len(segments)
        return [self.paths[segment.run_id][2][segment.index] for segment in segments]

    def attach(self, engine: CheckedEngine) -> None:
        engine.attach_disk(self.read, lambda run_id, why: self.reported.append((run_id, why)))


async def answer(
    engine: CheckedEngine, disk: FakeDisk, tokens: Tokens, namespace: bytes = b""
) -> tuple[Started, Tokens]:
    """Return how the request started, and its reply, which must be the true one."""
    request = ask(tokens, 6, cuts=[len(tokens)], namespace=namespace)
    started = None
    async for event in engine.submit(request, disk.walk(tokens, namespace)):
        if isinstance(event, Started):
            started = event
        if isinstance(event, Finished):
            reply = event.token_ids.tolist()
    assert started is not None
    assert reply == expected_reply(tokens, 6)
    return started, [*tokens, *reply]


async def saved_chat(disk: FakeDisk, num_tokens: int = 400) -> Tokens:
    """Return what a chat holds that an engine, gone by now, has saved."""
    async with running_engine() as engine:
        _, held = await answer(engine, disk, random_tokens(num_tokens, seed=1))
        await disk.save(engine, held[:-1])
    return held


async def test_a_chat_goes_on_in_another_process_with_its_tail_only() -> None:
    disk = FakeDisk()
    held = await saved_chat(disk)
    async with running_engine() as engine:
        disk.attach(engine)
        started, held = await answer(engine, disk, [*held, *random_tokens(20, seed=2)])
        assert (started.num_cached, started.num_prefill) == (405, 21)
        assert started.num_from_disk == 405
        # What was read is in memory now, and is not read again.
        num_read = disk.num_read
        started, _ = await answer(engine, disk, [*held, *random_tokens(5, seed=3)])
        assert started.num_from_disk == 0 and started.num_cached > 405
        assert disk.num_read == num_read


async def test_only_what_memory_lacks_is_read() -> None:
    disk = FakeDisk()
    held = await saved_chat(disk)
    async with running_engine() as engine:
        disk.attach(engine)
        await answer(engine, disk, held[:300])
        before = disk.num_read
        started, _ = await answer(engine, disk, [*held, 7, 8])
        assert started.num_cached == 405
        assert 0 < started.num_from_disk < 120
        assert disk.num_read - before == 4  # from 256, 320, 384 and 400 on


async def test_a_prompt_that_parts_inside_a_stored_segment_takes_what_agrees() -> None:
    disk = FakeDisk()
    held = await saved_chat(disk)
    async with running_engine() as engine:
        disk.attach(engine)
        started, _ = await answer(engine, disk, [*held[:333], *random_tokens(40, seed=9)])
        assert started.num_from_disk == started.num_cached == 333
        # The rest of that segment is not taken for the prompt's own.
        started, _ = await answer(engine, disk, [*held[:380], *random_tokens(3, seed=8)])
        assert started.num_cached == 380


async def test_damage_costs_a_prefill_and_is_reported() -> None:
    disk = FakeDisk()
    held = await saved_chat(disk)
    disk.damaged.add(0)
    async with running_engine() as engine:
        disk.attach(engine)
        started, _ = await answer(engine, disk, [*held, 1])
        assert started == Started(0, len(held) + 1, 0, damaged=True)
    assert disk.reported == [(0, "digest")]


async def test_state_of_another_shape_is_a_miss() -> None:
    disk = FakeDisk()
    held = await saved_chat(disk)
    namespace, ids, segments = disk.paths[0]
    first = segments[0]
    bad = PackedSegment(first.spec, [bytes(8) for _ in first.data])
    disk.paths[0] = (namespace, ids, [bad, *segments[1:]])
    async with running_engine() as engine:
        disk.attach(engine)
        started, _ = await answer(engine, disk, [*held, 1])
        assert started.num_cached == 0
        assert engine.stats()["failed_restores"] == 1


async def test_a_slow_disk_holds_up_nobody_else() -> None:
    disk = FakeDisk()
    held = await saved_chat(disk)
    async with running_engine() as engine:
        disk.attach(engine)
        disk.gate.clear()
        waiting = asyncio.create_task(answer(engine, disk, [*held, 1]))
        await asyncio.to_thread(disk.entered.wait, 30)
        started, _ = await answer(engine, disk, random_tokens(100, seed=5))
        assert started.num_cached == 0 and not waiting.done()
        disk.gate.set()
        started, _ = await waiting
        assert started.num_from_disk == 405


async def test_a_request_can_be_given_up_while_its_state_is_read() -> None:
    disk = FakeDisk()
    held = await saved_chat(disk)
    async with running_engine() as engine:
        disk.attach(engine)
        disk.gate.clear()
        generation = engine.submit(ask([*held, 1]), disk.walk(held))
        await asyncio.to_thread(disk.entered.wait, 30)
        await asyncio.wait_for(generation.aclose(), 30)
        disk.gate.set()
        started, _ = await answer(engine, disk, [*held, 1])
        assert started.num_from_disk == 405


async def test_memory_that_cannot_keep_what_was_read_still_answers_from_it() -> None:
    disk = FakeDisk()
    held = await saved_chat(disk)
    async with running_engine(budget_nbytes=800 * TOKEN_NBYTES) as engine:
        disk.attach(engine)
        started, _ = await answer(engine, disk, [*held, 1])
        assert started.num_from_disk == 405


async def test_what_memory_no_longer_holds_cannot_be_written() -> None:
    async with running_engine() as engine:
        tokens = random_tokens(100, seed=1)
        await collect(engine.submit(ask(tokens)))
        ids = np.array([*tokens, 1, 2, 3], np.uint32)
        lease = engine.hold(b"", ids)
        with pytest.raises(SourceGone):
            await engine.sources(lease, EMPTY, [(0, len(ids))])
        engine.release(lease)


@pytest.mark.parametrize("budget_tokens", [1 << 20, 1800])
@pytest.mark.parametrize("seed", [1, 2])
async def test_every_reply_is_the_true_one_through_restarts(seed: int, budget_tokens: int) -> None:
    choose = random.Random(seed)
    disk = FakeDisk()
    chats: list[tuple[Tokens, bytes]] = [(random_tokens(90, seed=seed), b"a")]
    from_disk = 0
    for _ in range(4):
        async with running_engine(budget_nbytes=budget_tokens * TOKEN_NBYTES) as engine:
            disk.attach(engine)
            for _ in range(12):
                tokens, namespace = choose.choice(chats)
                keep = len(tokens) if choose.random() < 0.6 else choose.randrange(1, len(tokens))
                more = random_tokens(choose.randrange(1, 150), seed=choose.randrange(1000))
                namespace = namespace if choose.random() < 0.8 else b"b"
                prompt = [*tokens[:keep], *more][-700:] if keep > 700 else [*tokens[:keep], *more]
                started, held = await answer(engine, disk, prompt, namespace)
                from_disk += started.num_from_disk
                chats = [*chats[-5:], (held, namespace)]
                if choose.random() < 0.5:
                    with suppress(SourceGone):  # memory had no room for all of it
                        await disk.save(engine, held[:-1], namespace)
    assert from_disk > 500

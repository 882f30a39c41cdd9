"""What is read for one conversation is never taken for more than its tokens, where others part.

On disk a run may hang anywhere on another one, which goes on beyond that place with other tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from kvserve.engine.fetch import Fetched
from kvserve.store.segments import StoredPath, StoredSegment
from tests.fakes import Tokens, random_tokens, running_engine
from tests.unit.test_engine_disk import FakeDisk, answer

pytestmark = pytest.mark.anyio

TRUNK, BRANCH = 300, 210
"""Length of the first conversation, and where the second parts from it, inside a segment."""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@dataclass
class ForkedDisk(FakeDisk):
    """Path 0 is a conversation, path 1 another one that is stored as hanging on it at `BRANCH`."""

    readable: bool = True

    def walk(self, tokens: Tokens, namespace: bytes = b"") -> StoredPath:
        if len(self.paths) < 2:
            return super().walk(tokens, namespace)
        _, ids, _ = self.paths[1]
        asked = np.array(tokens, np.uint32)
        if not np.array_equal(asked[: len(ids)], ids):
            return super().walk(tokens, namespace)
        trunk = [segment for segment in self._listed(0) if segment.start < BRANCH]
        branch = [segment for segment in self._listed(1) if segment.start >= BRANCH]
        branch = [replace(segment, readable=self.readable) for segment in branch]
        assert branch[0].start == BRANCH < trunk[-1].end
        return StoredPath(namespace, asked, len(ids), (*trunk, *branch))

    def _listed(self, number: int) -> list[StoredSegment]:
        return [
            StoredSegment(
                run_id=number,
                index=index,
                start=packed.spec.start,
                end=packed.spec.end,
                nbytes=packed.spec.nbytes,
                restorable=packed.spec.restorable,
                whole=packed.spec.whole,
                windows=packed.spec.windows,
                readable=True,
            )
            for index, packed in enumerate(self.paths[number][2])
        ]


@pytest.mark.parametrize("why", ["evicted", "damaged", "there"])
async def test_tokens_behind_a_fork_are_not_taken_from_the_other_branch(why: str) -> None:
    disk = ForkedDisk()
    trunk = random_tokens(TRUNK, seed=1)
    branch = [*trunk[:BRANCH], *random_tokens(120, seed=2)]
    async with running_engine() as engine:
        _, held = await answer(engine, disk, trunk)
        await disk.save(engine, held[:-1])
        _, held = await answer(engine, disk, branch)
        await disk.save(engine, held[:-1])
    disk.readable = why != "evicted"
    if why == "damaged":
        disk.damaged.add(1)
    async with running_engine() as engine:
        disk.attach(engine)
        started, held = await answer(engine, disk, [*held, 7, 8])  # its reply must be the true one
        assert started.num_cached == (len(held) - 8 - 1 if why == "there" else BRANCH)
        # What is in memory now is used by whoever asks next; that reply must be true as well.
        for more in ([1, 2, 3], random_tokens(90, seed=3)):
            _, held = await answer(engine, disk, [*held, *more])
        for cut in (BRANCH - 5, BRANCH + 1, BRANCH + 30):
            await answer(engine, disk, [*branch[:cut], *random_tokens(20, seed=cut)])
            await answer(engine, disk, [*trunk[:cut], *random_tokens(20, seed=cut + 1)])


async def test_what_was_read_for_a_path_that_memory_has_lost_is_not_joined_to_another() -> None:
    disk = FakeDisk()
    wanted = random_tokens(TRUNK, seed=1)
    other = [*wanted[:100], *random_tokens(TRUNK, seed=2)]
    async with running_engine(segment_tokens=64) as engine:
        _, held = await answer(engine, disk, wanted)
        await disk.save(engine, held[:-1])
    async with running_engine(segment_tokens=512) as engine:
        await answer(engine, disk, other)  # one segment, of which the first 100 tokens agree
        disk.attach(engine)
        assert engine._loop is not None and engine._loop.fetcher is not None
        fetch = engine._loop.fetcher.fetch

        def as_if_memory_had_held_more(path: StoredPath, at: int, limit: int) -> Fetched:
            fetched = fetch(path, at, limit)
            return replace(fetched, segments=[s for s in fetched.segments if s.spec.start >= 128])

        engine._loop.fetcher.fetch = as_if_memory_had_held_more  # type: ignore[assignment, method-assign]
        started, _ = await answer(engine, disk, [*held, 7, 8])  # its reply must be the true one
        assert started.num_cached == 100

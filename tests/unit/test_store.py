"""The store as a whole: what is written comes back, once, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvserve.core.errors import OutOfSpace, TooLarge
from kvserve.store.disk import Disk, DiskUsage
from kvserve.store.errors import SnapshotDamaged, SourceGone, StoreLocked
from kvserve.store.guards import Limits
from kvserve.store.snapshot import read_header, write_snapshot
from kvserve.store.store import Store
from tests.store_fakes import (
    IDENTITY,
    NAMESPACE,
    NOW,
    TOKEN_NBYTES,
    Clock,
    FakeSource,
    conversation,
    ids,
    readable,
    source_of,
    write,
)

ROOMY = Limits(disk_share=1.0)


@asynccontextmanager
async def opened(
    folder: Path, *, limits: Limits = ROOMY, clock: Clock | None = None, disk: Disk | None = None
) -> AsyncIterator[Store]:
    store = await Store.open(
        folder, identity=IDENTITY, limits=limits, clock=clock or Clock(), disk=disk
    )
    try:
        yield store
    finally:
        await store.aclose()


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(scenario())  # type: ignore[arg-type]


def tokens(seed: int, length: int) -> Any:
    return ids(np.random.default_rng(seed).integers(0, 1000, length))


def files_in(folder: Path) -> list[Path]:
    return sorted((folder / "snapshots").glob("??/*.safetensors"))


async def faults(store: Store) -> list[str]:
    return [str(fault) async for step in store.verify() for fault in step.faults]


def test_what_is_written_is_there_after_a_restart(tmp_path: Path) -> None:
    prompt = tokens(1, 50)

    async def scenario() -> None:
        stored = conversation("c", prompt, title="Über", pinned=True)
        async with opened(tmp_path) as store:
            written = await write(store, stored, by_order=True)
            assert written.num_tokens == 50 and written.num_files == 1
            assert written.nbytes == sum(file.stat().st_size for file in files_in(tmp_path))
        async with opened(tmp_path) as store:
            found = await store.find("a", "c")
            assert found is not None and found.head == replace(stored.head, saved=True)
            assert np.array_equal(found.token_ids, prompt) and found.messages == stored.messages
            assert await store.heads() == [found.head]
            assert await readable(store, prompt) == 50
            assert await faults(store) == []
            assert await store.find("b", "c") is None
            assert await readable(store, prompt, b"another tenant") == 0

    run(scenario)


def test_a_turn_writes_its_new_tokens_only(tmp_path: Path) -> None:
    prompt = tokens(2, 4000)

    async def scenario() -> None:
        async with opened(tmp_path) as store:
            for end in range(400, 4001, 400):
                asked: list[tuple[int, int]] = []
                stored = conversation("c", prompt[:end])
                written = await store.write(stored, source_of(stored, asked), by_order=False)
                assert asked == [(end - 400, end)]
                assert written.nbytes <= 1.1 * 400 * TOKEN_NBYTES
            stats = store.stats()
            assert stats["written_total_bytes"] == stats["stored_bytes"]
            assert stats["stored_bytes"] == sum(f.stat().st_size for f in files_in(tmp_path))
            assert await readable(store, prompt) == 4000
            again = await write(store, conversation("c", prompt), by_order=True)
            assert again.nbytes == 0 and again.num_files == 0

    run(scenario)


def test_other_state_under_the_name_of_a_run_is_not_read(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with opened(tmp_path) as store:
            prompt, other = tokens(1, 100), tokens(2, 100)
            await write(store, conversation("c", prompt))
            (file,) = files_in(tmp_path)
            # As by one who found tokens of his own with the same key.
            await write_snapshot(
                Disk(),
                replace(read_header(Disk(), file), digests=()),
                FakeSource(NAMESPACE, other, 0, 100),
                target=file,
                drafts=tmp_path,
            )
            path = await store.walk(NAMESPACE, prompt)
            with pytest.raises(SnapshotDamaged, match="foreign"):
                store.read(path.segments)

    run(scenario)


def test_twenty_conversations_over_one_document_store_it_once(tmp_path: Path) -> None:
    document = tokens(3, 300)

    async def scenario() -> None:
        async with opened(tmp_path) as store:
            prompts = [np.concatenate([document, tokens(100 + n, 10)]) for n in range(20)]
            total = 0
            for n, prompt in enumerate(prompts):
                total += (await write(store, conversation(f"c{n}", prompt))).nbytes
            assert total < (300 + 20 * 10) * TOKEN_NBYTES * 1.1 + 20 * 2048
            for prompt in prompts:
                assert await readable(store, prompt) == 310
            usage = await store.disk_usage_of([("a", "c0"), ("a", "c1"), ("a", "nobody")])
            assert set(usage) == {("a", "c0"), ("a", "c1")}
            assert usage[("a", "c1")].held_tokens == 310
            assert usage[("a", "c1")].shared_nbytes > 300 * TOKEN_NBYTES
            for n in range(19):
                assert await store.delete("a", f"c{n}")
            assert await readable(store, prompts[19]) == 310
            assert await store.delete("a", "c19") and not await store.delete("a", "c19")
            assert files_in(tmp_path) == [] and await faults(store) == []

    run(scenario)


def test_a_fork_and_a_rollback_write_no_state(tmp_path: Path) -> None:
    prompt = tokens(4, 60)

    async def scenario() -> None:
        async with opened(tmp_path) as store:
            await write(store, conversation("c", prompt))
            before = files_in(tmp_path)
            await store.put(conversation("fork", prompt[:33]))
            await store.put(conversation("c", prompt[:20]))
            assert files_in(tmp_path) == before
            fork = await store.find("a", "fork")
            assert fork is not None and np.array_equal(fork.token_ids, prompt[:33])
            with pytest.raises(LookupError):
                await store.put(conversation("x", tokens(5, 10)))
            branch = np.concatenate([prompt[:33], tokens(6, 20)])
            await write(store, conversation("fork", branch))
            assert await readable(store, branch) == 53 and await readable(store, prompt) == 60
            assert await faults(store) == []

    run(scenario)


def test_evicted_runs_are_healed_by_the_next_write(tmp_path: Path) -> None:
    prompt = tokens(7, 90)

    async def scenario() -> None:
        async with opened(tmp_path) as store:
            for end in (30, 60):
                await write(store, conversation("c", prompt[:end]))
            path = await store.walk(NAMESPACE, prompt)
            runs = sorted({segment.run_id for segment in path.segments})
            files = await store.catalog.evict([runs[0]])
            store.shelves.remove(files)
            assert await readable(store, prompt) == 0
            with pytest.raises(SnapshotDamaged) as caught:
                store.read(path.segments)
            assert caught.value.reason == "missing"
            await store.quarantine(caught.value.run_id, caught.value.reason)  # no file: no change
            asked: list[tuple[int, int]] = []
            stored = conversation("c", prompt)
            await store.write(stored, source_of(stored, asked), by_order=False)
            assert asked == [(0, 30), (60, 90)]
            assert await readable(store, prompt) == 90 and await faults(store) == []

    run(scenario)


def test_a_branch_out_of_an_evicted_run_splits_its_row(tmp_path: Path) -> None:
    prompt, other = tokens(8, 40), tokens(9, 10)

    async def scenario() -> None:
        async with opened(tmp_path) as store:
            await write(store, conversation("c", prompt))
            store.shelves.remove(await store.catalog.evict([1]))
            branch = np.concatenate([prompt[:25], other])
            asked: list[tuple[int, int]] = []
            stored = conversation("d", branch)
            await store.write(stored, source_of(stored, asked), by_order=False)
            assert asked == [(0, 25), (25, 35)]
            assert await readable(store, branch) == 35 and await readable(store, prompt) == 25
            found = await store.find("a", "c")
            assert found is not None and np.array_equal(found.token_ids, prompt)
            await store.put(conversation("e", prompt[:10]))
            asked.clear()
            await store.write(
                conversation("c", prompt),
                source_of(conversation("c", prompt), asked),
                by_order=False,
            )
            assert asked == [(25, 40)]
            assert await readable(store, prompt) == 40 and await faults(store) == []

    run(scenario)


# -- guards -------------------------------------------------------------------------------------


def test_a_conversation_over_the_per_save_limit_is_refused_and_changes_nothing(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        limits = Limits(save_nbytes=100 * TOKEN_NBYTES, disk_share=1.0)
        async with opened(tmp_path, limits=limits) as store:
            prompt = tokens(10, 120)
            await write(store, conversation("c", prompt[:50]))
            before = store.stats() | {"refused": 1}
            with pytest.raises(TooLarge, match="bytes"):
                await write(store, conversation("c", prompt), by_order=True)
            found = await store.find("a", "c")
            assert found is not None and found.head.num_tokens == 50 and not found.head.saved
            after = {name: before[name] for name in before if not name.startswith("disk_")}
            assert store.stats() | after == store.stats() and store.stats()["refused"] == 1
            assert len(files_in(tmp_path)) == 1

    run(scenario)


def test_the_budget_evicts_the_stalest_and_never_what_is_saved_or_pinned(tmp_path: Path) -> None:
    async def scenario() -> None:
        clock = Clock()
        limits = Limits(store_nbytes=60 * 100 * TOKEN_NBYTES // 10, disk_share=1.0)
        prompts = [tokens(20 + n, 100) for n in range(8)]
        async with opened(tmp_path, limits=limits, clock=clock) as store:
            await write(store, conversation("saved", prompts[0]), by_order=True)
            await write(store, conversation("pinned", prompts[1], pinned=True))
            for n in range(2, 8):
                clock.advance(minutes=1)
                await write(store, conversation(f"c{n}", prompts[n], used_at=clock.now))
                assert store.stats()["stored_bytes"] <= limits.store_nbytes
            held = [await readable(store, prompt) for prompt in prompts]
            assert held[:2] == [100, 100] and held[2] == 0 and held[7] == 100
            assert store.stats()["evicted"] == held.count(0)
            assert len(await store.heads()) == 8  # transcripts stay
            assert await faults(store) == []

    run(scenario)


def test_a_write_whose_room_takes_rows_of_its_path_along_comes_to_pass(tmp_path: Path) -> None:
    async def scenario() -> None:
        limits = Limits(store_nbytes=330 * TOKEN_NBYTES, disk_share=1.0)
        async with opened(tmp_path, limits=limits) as store:
            prompt = tokens(1, 200)
            await write(store, conversation("left", prompt[:100]))
            (file,) = files_in(tmp_path)
            await write(store, conversation("left", prompt))
            await write(store, conversation("left", tokens(2, 50)))
            file.write_bytes(file.read_bytes()[:-1])
            path = await store.walk(NAMESPACE, prompt)
            await store.quarantine(path.segments[0].run_id, "damaged")
            # Its first tokens are those of a run without a file, which is there for the one below
            # it, which has to go.
            stored = conversation("new", ids([*prompt[:60], *tokens(3, 160)]))
            await write(store, stored, by_order=True)
            assert store.stats()["evicted"] > 0
            assert await readable(store, stored.token_ids) == 220
            assert await faults(store) == []

    run(scenario)


def test_what_cannot_be_had_by_eviction_is_refused_before_anything_is_deleted(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        limits = Limits(store_nbytes=350 * TOKEN_NBYTES, disk_share=1.0)
        async with opened(tmp_path, limits=limits) as store:
            await write(store, conversation("saved", tokens(30, 150)), by_order=True)
            await write(store, conversation("plain", tokens(31, 100)))
            before = files_in(tmp_path)
            with pytest.raises(OutOfSpace, match="budget") as caught:
                await write(store, conversation("big", tokens(32, 300)), by_order=True)
            assert caught.value.code == "store_budget"
            assert files_in(tmp_path) == before and await store.find("a", "big") is None
            assert store.stats()["evicted"] == 0

    run(scenario)


def test_a_pin_that_has_run_out_protects_no_more(tmp_path: Path) -> None:
    async def scenario() -> None:
        clock = Clock()
        limits = Limits(store_nbytes=200 * TOKEN_NBYTES, disk_share=1.0)
        until = NOW + timedelta(hours=1)
        async with opened(tmp_path, limits=limits, clock=clock) as store:
            pinned = conversation("p", tokens(33, 150), pinned=True, pinned_until=until)
            await write(store, pinned)
            with pytest.raises(OutOfSpace):
                await write(store, conversation("c", tokens(34, 100)))
        clock.advance(hours=1)  # while the server is down
        async with opened(tmp_path, limits=limits, clock=clock) as store:
            await write(store, conversation("c", tokens(34, 100)))
            assert await readable(store, pinned.token_ids) == 0

    run(scenario)


def test_a_day_has_its_write_budget_and_the_next_day_another(tmp_path: Path) -> None:
    async def scenario() -> None:
        clock = Clock()
        limits = Limits(daily_nbytes=250 * TOKEN_NBYTES, disk_share=1.0)
        async with opened(tmp_path, limits=limits, clock=clock) as store:
            await write(store, conversation("c", tokens(35, 150)))
            for by_order in (False, True):
                with pytest.raises(OutOfSpace, match="00:00 UTC") as caught:
                    await write(store, conversation("d", tokens(36, 150)), by_order=by_order)
                assert caught.value.code == "write_budget"
            await write(store, conversation("c", tokens(35, 150)), by_order=True)  # writes nothing
            clock.advance(hours=13)
            await write(store, conversation("d", tokens(36, 150)))
            stats = store.stats()
            assert 0 < stats["written_today_bytes"] < stats["written_total_bytes"]

    run(scenario)


class SmallDisk(Disk):
    """A volume of its own size, of which other programs use a part."""

    def __init__(self, total: int, others: int) -> None:
        super().__init__()
        self.total = total
        self.others = others

    def usage(self, folder: Path) -> DiskUsage:
        used = self.others + sum(f.stat().st_size for f in folder.rglob("*.safetensors"))
        return DiskUsage(used=used, free=self.total - used, total=self.total)


def test_the_disk_stays_below_its_share(tmp_path: Path) -> None:
    async def scenario() -> None:
        disk = SmallDisk(total=1000 * TOKEN_NBYTES, others=500 * TOKEN_NBYTES)
        async with opened(tmp_path, limits=Limits(), disk=disk) as store:
            for n in range(10):
                await write(store, conversation(f"c{n}", tokens(40 + n, 100)))
                usage = disk.usage(tmp_path / "snapshots")
                assert usage.used <= 0.9 * usage.total
            disk.others = 890 * TOKEN_NBYTES
            with pytest.raises(OutOfSpace, match="90%") as caught:
                await write(store, conversation("big", tokens(60, 400)))
            assert caught.value.code == "disk_full"

    run(scenario)


# -- failures that are nobody's fault -----------------------------------------------------------


def test_a_source_that_is_gone_leaves_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with opened(tmp_path) as store:
            stored = conversation("c", tokens(70, 40))

            async def gone(path: Any, ranges: Any) -> Any:
                sources = await source_of(stored)(path, ranges)
                sources[-1].gone = True
                return sources

            with pytest.raises(SourceGone):
                await store.write(stored, gone, by_order=True)
            assert files_in(tmp_path) == [] and await store.heads() == []
            assert list((tmp_path / "snapshots" / "tmp").iterdir()) == []

    run(scenario)


def test_a_cancelled_write_leaves_nothing_or_all(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with opened(tmp_path) as store:
            stored = conversation("c", tokens(71, 40))
            for steps in range(0, 120, 2):
                task = asyncio.create_task(write(store, stored))
                for _ in range(steps):
                    await asyncio.sleep(0)
                task.cancel()
                result = (await asyncio.gather(task, return_exceptions=True))[0]
                assert list((tmp_path / "snapshots" / "tmp").iterdir()) == []
                found = await store.find("a", "c")
                assert len(files_in(tmp_path)) == (found is not None)
                assert await faults(store) == []
                if found is not None:
                    assert await readable(store, stored.token_ids) == 40
                    await store.delete("a", "c")
                else:
                    assert isinstance(result, asyncio.CancelledError)

    run(scenario)


def test_a_second_process_is_refused_in_words(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with opened(tmp_path) as store:
            store.announce("http://127.0.0.1:8000")
            with pytest.raises(StoreLocked, match="8000"):
                await Store.open(tmp_path, identity=None, limits=ROOMY)
        async with opened(tmp_path):
            pass

    run(scenario)


# -- time ---------------------------------------------------------------------------------------


def test_a_conversation_ends_at_its_time_and_is_remembered_for_a_day(tmp_path: Path) -> None:
    async def scenario() -> None:
        clock = Clock()
        async with opened(tmp_path, clock=clock) as store:
            stored = conversation("c", tokens(72, 40), expires_at=NOW + timedelta(hours=1))
            await write(store, stored, by_order=True)
            assert not await store.find_expired("a", "c")
            clock.advance(hours=1)
            assert await store.find("a", "c") is None and await store.heads() == []
            assert await store.find_expired("a", "c") and not await store.find_expired("a", "x")
            assert (await store.sweep()).expired == 1
            assert files_in(tmp_path) == [] and await store.find_expired("a", "c")
            assert await store.delete("a", "c") and await store.find_expired("a", "c")
            clock.advance(hours=24)
            assert not await store.find_expired("a", "c")
            await store.sweep()
            assert await store.catalog.heads() == [] and await faults(store) == []
            await write(store, conversation("c", tokens(72, 40)))
            assert await store.find("a", "c") is not None

    run(scenario)

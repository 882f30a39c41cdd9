"""Damage is found, quarantined and mended; what nobody needs goes; a lost index is made again."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import Connection

from kvserve.core.errors import TooLarge
from kvserve.store import snapshot_header
from kvserve.store.catalog_conversations import get_root, put
from kvserve.store.catalog_runs import add_run
from kvserve.store.disk import Disk
from kvserve.store.errors import SnapshotDamaged, StoreError
from kvserve.store.guards import Limits
from kvserve.store.runs import NewRun
from kvserve.store.segments import PackedSegment
from kvserve.store.store import Store
from kvserve.store.transfer import Staged
from kvserve.store.upkeep import UpkeepReport
from kvserve.store.writing import file_name
from tests.catalog_fixtures import content
from tests.store_fakes import (
    IDENTITY,
    NAMESPACE,
    NOW,
    Clock,
    conversation,
    ids,
    readable,
    source_of,
    write,
)
from tests.unit.test_store import faults, files_in, opened, run, tokens

PROMPT = tokens(1, 90)


async def three_turns(store: Store, name: str = "c") -> list[int]:
    """Write a conversation in three files; return the ids of its runs."""
    for end in (30, 60, 90):
        await write(store, conversation(name, PROMPT[:end]))
    path = await store.walk(NAMESPACE, PROMPT)
    return sorted({segment.run_id for segment in path.segments})


def file_at(folder: Path, start: int) -> Path:
    return next(file for file in files_in(folder) if file.stem.endswith(f"-{start}"))


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


# -- damage -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["flip header", "flip data", "truncate", "empty", "zero", "gone"])
def test_a_damaged_file_is_found_reported_and_healed(tmp_path: Path, how: str) -> None:
    async def scenario() -> None:
        async with opened(tmp_path) as store:
            runs = await three_turns(store)
            file = file_at(tmp_path, 30)
            nbytes = file.stat().st_size
            if how.startswith("flip"):
                flip(file, 60 if how == "flip header" else nbytes - 100)
            elif how == "gone":
                file.unlink()
            else:
                size = {"truncate": nbytes - 1, "empty": 0, "zero": 0}[how]
                os.truncate(file, size)
                if how == "zero":
                    os.truncate(file, nbytes)
            found = [fault async for step in store.verify() for fault in step.faults]
            assert [fault.run_id for fault in found] == [runs[1]]
            path = await store.walk(NAMESPACE, PROMPT)
            with pytest.raises(SnapshotDamaged) as caught:
                store.read(path.segments)
            assert caught.value.run_id == runs[1]
            await store.quarantine(caught.value.run_id, caught.value.reason)
            assert store.stats()["quarantined"] == 1
            quarantined = list((tmp_path / "quarantine").iterdir())
            assert len(quarantined) == (how != "gone")
            assert await readable(store, PROMPT) == 30 and await faults(store) == []
            stored = conversation("c", PROMPT)
            asked: list[tuple[int, int]] = []
            await store.write(stored, source_of(stored, asked), by_order=False)
            assert asked == [(30, 60)] and await readable(store, PROMPT) == 90

    run(scenario)


def test_a_report_of_a_file_that_is_sound_changes_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with opened(tmp_path) as store:
            runs = await three_turns(store)
            await store.quarantine(runs[0], "io")
            await store.quarantine(10**6, "never was")
            assert await readable(store, PROMPT) == 90 and store.stats()["quarantined"] == 0

    run(scenario)


def test_files_that_changed_places_are_found(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with opened(tmp_path) as store:
            await three_turns(store)
            a, b = file_at(tmp_path, 0), file_at(tmp_path, 30)
            shutil.copy(a, tmp_path / "x")
            shutil.copy(b, a)
            shutil.copy(tmp_path / "x", b)
            path = await store.walk(NAMESPACE, PROMPT)
            for segment in path.segments[:4]:
                with pytest.raises(SnapshotDamaged, match="foreign"):
                    store.read([segment])
            assert len(await faults(store)) == 2
            report = await store.repair()
            assert report.quarantined == 2 and await faults(store) == []
            assert await readable(store, PROMPT) == 0

    run(scenario)


def test_repair_makes_rows_for_files_that_lost_theirs(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with opened(tmp_path) as store:
            runs = await three_turns(store)
            await store.catalog.evict(runs[1:])  # the rows forget; the files stay
            assert len(await faults(store)) == 2
            seen: list[int] = []
            report = await store.repair(lambda step: seen.append(step.done_nbytes))
            assert report.restored == 2 and report.quarantined == 0 and seen
            assert await readable(store, PROMPT) == 90 and await faults(store) == []

    run(scenario)


def test_a_sweep_removes_what_a_crash_has_left_and_nothing_else(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with opened(tmp_path) as store:
            await three_turns(store)
        draft = tmp_path / "snapshots" / "tmp" / "draft.0"
        upload = tmp_path / "imports" / "upload"
        stray = tmp_path / "snapshots" / "ab" / f"{'ab' * 16}-0.safetensors"
        stray.parent.mkdir(exist_ok=True)
        notes = tmp_path / "snapshots" / "README"
        for path in (draft, upload, stray, notes):
            path.write_bytes(b"12345")
        async with opened(tmp_path) as store:
            assert not draft.exists() and not upload.exists() and stray.exists()
            report = await store.sweep()
            assert (report.removed_files, report.freed_nbytes) == (1, 5)
            assert not stray.exists() and notes.exists()
            assert await readable(store, PROMPT) == 90 and await faults(store) == []
            assert await store.sweep() == UpkeepReport()

    run(scenario)


def test_a_sweep_beside_writes_takes_nothing_of_theirs(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with opened(tmp_path) as store:
            prompts = [tokens(100 + n, 20) for n in range(30)]

            async def sweeping() -> None:
                while True:
                    await store.sweep()
                    assert await faults(store) == []

            sweeper = asyncio.create_task(sweeping())
            for n, prompt in enumerate(prompts):
                await write(store, conversation(f"c{n}", prompt))
            sweeper.cancel()
            await asyncio.gather(sweeper, return_exceptions=True)
            for prompt in prompts:
                assert await readable(store, prompt) == 20

    run(scenario)


def test_branches_that_were_left_go_at_gc_or_after_a_week(tmp_path: Path) -> None:
    async def scenario() -> None:
        clock = Clock()
        async with opened(tmp_path, clock=clock) as store:
            await three_turns(store)
            await store.put(conversation("c", PROMPT[:30]))
            await store.sweep()
            assert len(files_in(tmp_path)) == 3  # a regenerate may come back to it
            report = await store.gc()
            assert report.removed_files == 2 and report.freed_nbytes > 0
            await write(store, conversation("c", PROMPT))
            await store.put(conversation("c", PROMPT[:30]))
            clock.advance(days=8)
            assert (await store.sweep()).removed_files == 1
            assert await readable(store, PROMPT[:30]) == 30 and await faults(store) == []

    run(scenario)


# -- the index ----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["not a database", "torn", "gone"])
def test_a_lost_index_is_made_again_from_the_files(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    branch = np.concatenate([PROMPT[:45], tokens(2, 20)])
    index = tmp_path / "index.sqlite3"

    async def scenario() -> None:
        async with opened(tmp_path) as store:
            await three_turns(store)
            await write(store, conversation("d", branch))
            await write(store, conversation("e", tokens(3, 10), namespace=b"other"))
        flip(file_at(tmp_path, 60), 60)
        if how == "not a database":
            index.write_bytes(b"SQLite format 4, surely" * 1000)
        elif how == "torn":
            data = bytearray(index.read_bytes())
            data[4096:] = os.urandom(len(data) - 4096)
            index.write_bytes(data)
        else:
            index.unlink()
        with caplog.at_level(logging.ERROR):
            async with opened(tmp_path) as store:
                assert "THE INDEX OF SAVED CONVERSATIONS IS DAMAGED" in caplog.text
                aside = list((tmp_path / "quarantine").glob("index-*.sqlite3"))
                assert len(aside) == (how != "gone")
                assert await readable(store, PROMPT) == 60
                assert await readable(store, branch) == 65
                assert await readable(store, tokens(3, 10), b"other") == 10
                await store.repair()
                assert await faults(store) == []
                await write(store, conversation("c", PROMPT))
                assert await readable(store, PROMPT) == 90

    run(scenario)


def test_an_index_that_fails_is_a_miss_for_readers_and_words_for_writers(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with opened(tmp_path) as store:
            await three_turns(store)
            await store.catalog.aclose()
            index = tmp_path / "index.sqlite3"
            index.write_bytes(b"no" * 4096)
            path = await store.walk(NAMESPACE, PROMPT)
            assert path.num_tokens == 0 and store.stats()["index_failures"] == 1
            with pytest.raises(Exception, match="index of saved conversations") as caught:
                await write(store, conversation("c", tokens(5, 20)))
            assert str(tmp_path) not in str(caught.value)
            assert list((tmp_path / "snapshots" / "tmp").iterdir()) == []

    run(scenario)


def test_an_index_that_proved_damaged_in_use_is_made_again_at_the_next_start(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with opened(tmp_path) as store:
            await three_turns(store)
            await store.catalog.aclose()  # and behind its back:
            (tmp_path / "index.sqlite3").write_bytes(b"no" * 4096)
            assert (await store.walk(NAMESPACE, PROMPT)).num_tokens == 0
        assert (tmp_path / "index.damaged").exists()
        async with opened(tmp_path) as store:
            assert not (tmp_path / "index.damaged").exists()
            assert await readable(store, PROMPT) == 90 and await faults(store) == []

    run(scenario)


def test_a_folder_that_cannot_be_used_is_refused_in_words(tmp_path: Path) -> None:
    async def scenario() -> None:
        (tmp_path / "file").write_bytes(b"")
        with pytest.raises(StoreError, match="cannot be used"):
            await Store.open(tmp_path / "file" / "data", identity=None, limits=Limits())
        async with opened(tmp_path / "a" / "b" / "c") as store:
            assert await store.heads() == []
            assert (tmp_path / "a" / "b" / "c").stat().st_mode & 0o777 == 0o700

    run(scenario)


class LookingDisk(Disk):
    """Notes the files and folders that were looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[Path] = set()

    def open(self, path: Path) -> int:
        self.seen.add(path)
        return super().open(path)

    def names(self, folder: Path) -> list[str]:
        self.seen.add(folder)
        return super().names(folder)

    def size_of(self, path: Path) -> int:
        self.seen.add(path)
        return super().size_of(path)


def test_two_thousand_conversations_open_without_a_look_at_their_snapshots(
    tmp_path: Path,
) -> None:
    prompts = [ids([number, *range(40)]) for number in range(2000)]

    def rows(connection: Connection) -> None:
        root_id = get_root(connection, IDENTITY, NAMESPACE)
        for number, prompt in enumerate(prompts):
            key = number.to_bytes(16, "big")
            new = NewRun(
                start=0,
                tokens=prompt,
                key=key,
                content=content(file_name(key, 0), 0, len(prompt)),
            )
            add_run(connection, root_id, None, new, writer_id=None, now=NOW)
            put(connection, root_id, conversation(f"c{number}", prompt))

    async def scenario() -> None:
        async with opened(tmp_path) as store:
            await store.catalog.database.write(rows)
            folder = store.folder
        disk = LookingDisk()
        async with opened(tmp_path, disk=disk) as store:
            assert len(await store.heads()) == 2000
            assert (await store.walk(NAMESPACE, prompts[7])).num_tokens == 41
            assert store.stats()["files"] == 2000
            assert disk.seen == {folder.drafts, folder.imports}
            with pytest.raises(SnapshotDamaged, match="missing"):
                store.read((await store.walk(NAMESPACE, prompts[7])).segments)
            assert disk.seen > {folder.drafts, folder.imports}

    run(scenario)


# -- transfer -----------------------------------------------------------------------------------


def test_an_exported_conversation_is_the_same_elsewhere(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"

    async def scenario() -> None:
        async with opened(here) as store, opened(there) as other:
            await three_turns(store)
            await write(store, conversation("d", np.concatenate([PROMPT[:45], tokens(2, 20)])))
            for name, length in (("c", 90), ("d", 65)):
                export = await store.export("a", name)
                staged = there / "imports" / name
                staged.write_bytes(b"".join([block async for block in export]))
                assert staged.stat().st_size == export.nbytes
                async with Staged(other.shelves.disk, staged) as upload:
                    stored = upload.conversation(
                        tenant="b", namespace=b"theirs", id=f"copy-{name}", now=NOW
                    )
                    await other.write(stored, upload.open_source, by_order=False)
                found = await other.find("b", f"copy-{name}")
                original = await store.find("a", name)
                assert found is not None and original is not None
                assert np.array_equal(found.token_ids, original.token_ids)
                assert found.messages == original.messages and not found.head.saved
                path = await other.walk(b"theirs", stored.token_ids)
                assert path.num_tokens == length
                held = other.read(path.segments)
                mine = store.read((await store.walk(NAMESPACE, stored.token_ids)).segments)
                assert all_bytes(held, length) == all_bytes(mine, length)
            assert await faults(other) == []

    def all_bytes(packed: list[PackedSegment], length: int) -> bytes:
        """Return the keys of a path, each token's once; segments may overlap."""
        rows: dict[int, bytes] = {}
        for segment in packed:
            keys = np.frombuffer(segment.data[0], np.uint8)
            start, end = segment.spec.start, segment.spec.end
            for position, row in zip(range(start, end), keys.reshape(end - start, -1), strict=True):
                rows[position] = row.tobytes()
        return b"".join(rows[position] for position in range(length))

    run(scenario)


def test_what_is_too_long_for_one_file_is_refused_with_the_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with opened(tmp_path) as store:
            await three_turns(store)
            files, heads = files_in(tmp_path), await store.heads()
            longest = max(read_header_nbytes(file) for file in files)
            # Each turn is within it, all of them in one file are not.
            monkeypatch.setattr(snapshot_header, "MAX_HEADER_NBYTES", longest)
            with pytest.raises(TooLarge, match=f"90 tokens .* {longest} bytes") as caught:
                await store.export("a", "c")
            assert caught.value.code == "conversation_too_large"
            with pytest.raises(TooLarge, match=f"400 tokens .* {longest} bytes") as caught:
                await write(store, conversation("d", tokens(7, 400)))
            assert caught.value.code == "conversation_too_large"
            assert store.stats()["refused"] == 1
            assert files_in(tmp_path) == files and await store.heads() == heads
            assert await faults(store) == []

    def read_header_nbytes(file: Path) -> int:
        return int.from_bytes(file.read_bytes()[:8], "little")

    run(scenario)


def test_what_was_evicted_cannot_be_exported(tmp_path: Path) -> None:
    async def scenario() -> None:
        clock = Clock()
        async with opened(tmp_path, clock=clock) as store:
            runs = await three_turns(store)
            store.shelves.remove(await store.catalog.evict(runs[2:]))
            with pytest.raises(SnapshotDamaged, match="missing"):
                await store.export("a", "c")
            await store.set_flags("a", "c", expires_at=NOW + timedelta(seconds=1))
            clock.advance(seconds=1)
            with pytest.raises(Exception, match="no such conversation"):
                await store.export("a", "c")

    run(scenario)

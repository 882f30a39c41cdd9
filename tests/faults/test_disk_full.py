"""The disk is full, or becomes so at any moment of a write: refused with figures, well afterwards.

On a small tmpfs where one may be mounted (root on Linux), for snapshots and index alike; and, where
not, with a quota on the snapshots alone.
"""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvserve.core.errors import OutOfSpace
from kvserve.store.disk import Disk
from kvserve.store.guards import Limits
from kvserve.store.store import Store
from tests.store_fakes import IDENTITY, TOKEN_NBYTES, conversation, ids, readable, source_of, write

VOLUME_NBYTES = 4 * 2**20
PROMPT = ids(np.random.default_rng(1).integers(0, 1000, 400))
ROOMY = Limits(disk_share=1.0)


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Path]:
    """A volume of 4 MiB."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root on Linux")
    folder = tmp_path / "volume"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={VOLUME_NBYTES}", "kvserve-test", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this container may not mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path, leave: int) -> None:
    """Let another program take the volume, all but `leave` bytes."""
    found = os.statvfs(folder)
    nbytes = found.f_bavail * found.f_frsize - leave
    with (folder / "filler").open("wb") as file:
        file.write(bytes(max(0, nbytes)))


async def assert_as_before(store: Store, held: int) -> None:
    found = await store.find("a", "c")
    assert found is not None and found.head.num_tokens == held and not found.head.saved
    assert await readable(store, PROMPT) == held
    assert not list(store.folder.drafts.iterdir())
    assert [fault async for step in store.verify() for fault in step.faults] == []


def test_a_disk_without_room_refuses_with_the_figures_and_takes_again_what_fits(
    volume: Path,
) -> None:
    async def scenario() -> None:
        store = await Store.open(volume / "data", identity=IDENTITY, limits=ROOMY)
        try:
            await write(store, conversation("c", PROMPT[:100]))
            fill(volume, leave=200_000)
            before = store.stats()["stored_bytes"]
            with pytest.raises(OutOfSpace) as caught:
                await write(store, conversation("big", PROMPT[::-1].repeat(2)), by_order=True)
            assert caught.value.code == "disk_full" and "bytes" in caught.value.message
            await write(store, conversation("small", PROMPT[50:70]))
            assert store.stats()["stored_bytes"] > before
            await assert_as_before(store, 100)
            (volume / "filler").unlink()
            await write(store, conversation("c", PROMPT), by_order=True)
            assert await readable(store, PROMPT) == 400
        finally:
            await store.aclose()

    asyncio.run(scenario())


def test_a_disk_that_fills_up_during_a_write_leaves_things_as_they_were(volume: Path) -> None:
    """The guard sees room; then another program takes all but some of it."""

    async def scenario() -> None:
        outcomes = set()
        for leave in [0, *range(4_096, 400_000, 36_864)]:
            folder = volume / "data"
            store = await Store.open(folder, identity=IDENTITY, limits=ROOMY)
            try:
                await write(store, conversation("c", PROMPT[:100]))
                stored = conversation("c", PROMPT)
                opens = source_of(stored)

                async def taken(
                    path: Any, ranges: Any, leave: int = leave, opens: Any = opens
                ) -> Any:
                    sources = await opens(path, ranges)
                    give: Any = sources[0].data

                    async def data(index: int) -> Any:
                        if index == 0:
                            fill(volume, leave)
                        return await give(index)

                    sources[0].data = data
                    return sources

                refusal = None
                try:
                    await store.write(stored, taken, by_order=True)
                except OutOfSpace as error:
                    refusal = error
                outcomes.add("written" if refusal is None else refusal.code)
                if refusal is None:
                    assert await readable(store, PROMPT) == 400
                else:
                    assert str(volume) not in refusal.message
                    await assert_as_before(store, 100)
                (volume / "filler").unlink()
                await write(store, stored, by_order=True)
                assert await readable(store, PROMPT) == 400
                assert await store.delete("a", "c")
            finally:
                await store.aclose()
        assert outcomes == {"written", "disk_full"}

    asyncio.run(scenario())


class QuotaDisk(Disk):
    """Takes so many bytes and then none; `usage` knows nothing of the quota."""

    def __init__(self, quota: int) -> None:
        super().__init__()
        self.left = quota

    def write_some(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if not self.left:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        taken = super().write_some(fd, [buffers[0][: self.left]], offset)
        self.left -= taken
        return taken


def test_a_quota_that_runs_out_is_a_full_disk(tmp_path: Path) -> None:
    async def scenario() -> None:
        disk = QuotaDisk(quota=150 * TOKEN_NBYTES)
        store = await Store.open(tmp_path / "data", identity=IDENTITY, limits=ROOMY, disk=disk)
        try:
            await write(store, conversation("c", PROMPT[:100]))
            with pytest.raises(OutOfSpace, match=r"full: \d+ bytes") as caught:
                await write(store, conversation("c", PROMPT), by_order=True)
            assert caught.value.code == "disk_full" and str(tmp_path) not in caught.value.message
            await assert_as_before(store, 100)
            disk.left = 10**9
            await write(store, conversation("c", PROMPT), by_order=True)
            assert await readable(store, PROMPT) == 400
        finally:
            await store.aclose()

    asyncio.run(scenario())

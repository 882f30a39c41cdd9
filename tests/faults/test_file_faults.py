"""The Nth operation of writing or reading a snapshot fails, for every N, once and for good."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from kvserve.store.disk import Disk
from kvserve.store.errors import SnapshotDamaged
from kvserve.store.snapshot import read_segments, verify_file
from tests.faults.failing import FAULTS, FailingDisk
from tests.unit.snapshot_fixtures import (
    WINDOW,
    bytes_of,
    expected_of,
    make_segment,
    make_spec,
    write_file,
)

SEGMENTS = [
    make_segment(make_spec(0, 4, window=WINDOW, state=True)),
    make_segment(make_spec(4, 9, window=WINDOW, state=True)),
]
ONCE_AND_FOR_GOOD = pytest.mark.parametrize("for_good", [False, True], ids=["once", "for good"])
EVERY_FAULT = pytest.mark.parametrize("fault", FAULTS)


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@EVERY_FAULT
@ONCE_AND_FOR_GOOD
def test_a_write_is_whole_or_leaves_nothing(tmp_path: Path, fault: str, for_good: bool) -> None:
    nth = num_faults = 0
    while True:
        nth += 1
        folder = tmp_path / str(nth)
        disk = FailingDisk(fault, nth, for_good=for_good)
        try:
            path, header = asyncio.run(write_file(folder, SEGMENTS, disk=disk))
        except OSError as error:
            assert error.errno == disk.error  # noqa: PT017 - some calls succeed
            left = files_below(folder)
            # What cannot be removed either is a draft, or whole: the start of the store sweeps it.
            assert not left or "unlink" in disk.meets, (nth, left)
            for rest in left:
                assert rest.parent.name == "tmp" or verify_file(Disk(), rest)
        else:
            found = read_segments(Disk(), path, [0, 1], expected=expected_of(header))
            assert [bytes_of(s) for s in found] == [bytes_of(s) for s in SEGMENTS]
            assert files_below(folder) == [path]
        if not disk.failed:
            break
        num_faults += 1
    assert num_faults >= 3


@EVERY_FAULT
@ONCE_AND_FOR_GOOD
def test_a_read_gives_the_right_bytes_or_says_why(
    tmp_path: Path, fault: str, for_good: bool
) -> None:
    path, header = asyncio.run(write_file(tmp_path, SEGMENTS))
    nth = num_faults = 0
    while True:
        nth += 1
        disk = FailingDisk(fault, nth, for_good=for_good)
        try:
            found = read_segments(disk, path, [1, 0], run_id=3, expected=expected_of(header))
        except SnapshotDamaged as damage:
            assert (damage.run_id, damage.reason) == (3, "io")  # noqa: PT017
        else:
            assert [bytes_of(s) for s in found] == [bytes_of(s) for s in reversed(SEGMENTS)]
        if not disk.failed:
            break
        num_faults += 1
    assert num_faults >= {"EIO": 4, "ENOSPC": 0, "EACCES": 1, "short": 4}[fault]


def test_a_file_that_shrinks_while_it_is_read_is_truncated(tmp_path: Path) -> None:
    class ShrinkingDisk(Disk):
        def read_some(self, fd: int, buffer: memoryview, offset: int) -> int:
            return super().read_some(fd, buffer, offset) if offset < 100 else 0

    path, _ = asyncio.run(write_file(tmp_path, SEGMENTS))
    with pytest.raises(SnapshotDamaged, match="truncated"):
        verify_file(ShrinkingDisk(), path)


def test_a_disk_that_takes_nothing_is_full_and_not_waited_for(tmp_path: Path) -> None:
    class FullDisk(Disk):
        def write_some(self, fd: int, buffers: object, offset: int) -> int:
            return 0

    with pytest.raises(OSError, match="no more bytes"):
        asyncio.run(write_file(tmp_path, SEGMENTS, disk=FullDisk()))
    assert files_below(tmp_path) == []

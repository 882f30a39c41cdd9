"""Power is lost after any operation of writing a snapshot; what was acknowledged is there."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from kvserve.store.disk import Disk
from kvserve.store.errors import SnapshotDamaged
from kvserve.store.snapshot import read_segments
from tests.faults.recording import CrashState, RecordingDisk
from tests.unit.snapshot_fixtures import (
    bytes_of,
    make_segment,
    make_spec,
    write_file,
)

RUNS = [
    [make_segment(make_spec(0, 4)), make_segment(make_spec(4, 9))],
    [make_segment(make_spec(9, 12))],
]


def record(disk: RecordingDisk) -> None:
    for number, run in enumerate(RUNS):
        asyncio.run(write_file(disk.root, run, disk=disk))
        disk.note(f"run {number}")


def targets(root: Path) -> list[Path]:
    """Return where the runs lie, by writing them elsewhere."""
    return [asyncio.run(write_file(root, run))[0].relative_to(root) for run in RUNS]


def violations(states: Sequence[CrashState], work: Path) -> list[str]:
    """Return the states in which an acknowledged run is not there, or any run is half there."""
    where = targets(work / "reference")
    found = []
    for number, state in enumerate(states):
        root = work / str(number)
        root.mkdir()
        state.materialise(root)
        for run, path in enumerate(where):
            try:
                read = read_segments(Disk(), root / path, range(len(RUNS[run])))
                whole = [bytes_of(s) for s in read] == [bytes_of(s) for s in RUNS[run]]
            except SnapshotDamaged as damage:
                whole = damage.reason == "missing" and f"run {run}" not in state.notes
            if not whole:
                found.append(f"run {run} {state.name}")
    return found


def recorded(tmp_path: Path, kind: type[RecordingDisk]) -> list[CrashState]:
    root = tmp_path / "store"
    (root / "tmp").mkdir(parents=True)
    disk = kind(root)
    record(disk)
    return list(disk.crash_states())


def test_every_state_after_a_loss_of_power_opens_as_before_or_after(tmp_path: Path) -> None:
    states = recorded(tmp_path, RecordingDisk)
    assert len(states) > 20  # different ones
    assert violations(states, tmp_path / "work") == []


class WithoutFsync(RecordingDisk):
    def fsync(self, fd: int) -> None:
        pass


class WithoutFolderFsync(RecordingDisk):
    def fsync_folder(self, folder: Path) -> None:
        pass


class WithoutParentFsync(RecordingDisk):
    def settle(self, folder: Path) -> None:
        self.make_folder(folder)


@pytest.mark.parametrize("kind", [WithoutFsync, WithoutFolderFsync, WithoutParentFsync])
def test_each_forgotten_sync_is_noticed(tmp_path: Path, kind: type[RecordingDisk]) -> None:
    assert violations(recorded(tmp_path, kind), tmp_path / "work") != []


def test_the_last_state_is_what_is_on_the_disk(tmp_path: Path) -> None:
    root = tmp_path / "store"
    (root / "tmp").mkdir(parents=True)
    disk = RecordingDisk(root)
    record(disk)
    disk.unlink(root / targets(tmp_path / "reference")[0])
    last = max(disk.crash_states(), key=lambda state: (state.num_operations, "kept" in state.name))
    (tmp_path / "again").mkdir()
    last.materialise(tmp_path / "again")

    def content(folder: Path) -> dict[str, bytes]:
        files = (path for path in folder.rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}

    assert content(tmp_path / "again") == content(root)


def test_loose_writes_meet_every_fate(tmp_path: Path) -> None:
    disk = RecordingDisk(tmp_path)
    fd = disk.create(tmp_path / "file")
    offset = disk.write(fd, [memoryview(b"abcd")], 0)
    disk.fsync(fd)
    disk.fsync_folder(tmp_path)
    disk.write(fd, [memoryview(b"efgh")], disk.write(fd, [memoryview(b"EF")], offset))
    disk.close(fd)
    found = {state.files[Path("file")] for state in disk.crash_states() if state.files}
    fates = {b"abcdEFefgh", b"abcd", b"abcd" + bytes(6), b"abcdEFef", b"abcd" + bytes(2) + b"efgh"}
    assert fates <= found

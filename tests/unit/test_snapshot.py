from __future__ import annotations

import asyncio
import os
import stat
import time
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from kvserve.store.disk import Disk
from kvserve.store.errors import SnapshotDamaged, SourceGone
from kvserve.store.segments import (
    DTYPE_NBYTES,
    ArraySpec,
    Buffer,
    PackedSegment,
    SegmentSpec,
)
from kvserve.store.snapshot import (
    Expected,
    read_header,
    read_segments,
    verify_file,
    write_snapshot,
)
from kvserve.store.snapshot_header import encode
from tests.unit.snapshot_fixtures import (
    WINDOW,
    ListSource,
    bytes_of,
    expected_of,
    make_header,
    make_segment,
    make_spec,
    write_file,
)

RUN = [
    make_segment(make_spec(0, 4, window=WINDOW, state=False)),
    make_segment(make_spec(4, 5, window=WINDOW, state=True)),
    make_segment(make_spec(5, 25, window=WINDOW, state=True)),
]


def everything_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_what_was_written_is_read_back_byte_for_byte(tmp_path: Path) -> None:
    path, header = asyncio.run(write_file(tmp_path, RUN))
    expected = expected_of(header)
    found = read_header(Disk(), path, expected=expected)
    assert found.token_ids.tolist() == header.token_ids.tolist()
    assert replace(found, token_ids=header.token_ids, digests=()) == header
    read = read_segments(Disk(), path, [2, 0], expected=expected)
    assert [segment.spec for segment in read] == [RUN[2].spec, RUN[0].spec]
    assert [bytes_of(segment) for segment in read] == [bytes_of(RUN[2]), bytes_of(RUN[0])]
    assert verify_file(Disk(), path).digests == found.digests


def test_the_size_is_known_before_the_file_is_written(tmp_path: Path) -> None:
    path, header = asyncio.run(write_file(tmp_path, RUN))
    assert path.stat().st_size == header.file_nbytes()


def test_safetensors_opens_a_snapshot(tmp_path: Path) -> None:
    segment = make_segment(make_spec(0, 4, dtype="F32", state=True))
    path, _ = asyncio.run(write_file(tmp_path, [segment]))
    with safe_open(path, "np") as file:
        assert list(file.metadata()) == ["kvserve"]
        assert sorted(file.keys()) == [f"0/{i}" for i in range(5)]
        for i, array in enumerate(segment.spec.arrays):
            found = file.get_tensor(f"0/{i}")
            assert found.shape == array.shape
            assert found.tobytes() == bytes(segment.data[i])


@pytest.mark.parametrize("dtype", sorted(DTYPE_NBYTES))
def test_every_number_format_passes(tmp_path: Path, dtype: str) -> None:
    segment = make_segment(make_spec(0, 3, dtype=dtype))
    path, _ = asyncio.run(write_file(tmp_path, [segment]))
    with safe_open(path, "np") as file:
        assert file.get_slice("0/0").get_dtype() == dtype
    assert bytes_of(read_segments(Disk(), path, [0])[0]) == bytes_of(segment)


def test_a_run_without_any_bytes_passes(tmp_path: Path) -> None:
    empty = PackedSegment(SegmentSpec(3, 9, (), [None, None]), [])
    path, header = asyncio.run(write_file(tmp_path, [empty]))
    assert read_segments(Disk(), path, [0], expected=expected_of(header)) == [empty]
    assert verify_file(Disk(), path).segments == (empty.spec,)


def test_buffers_of_any_kind_and_shape_are_written(tmp_path: Path) -> None:
    spec = make_spec(0, 4, dtype="F32")
    numbers = np.arange(24, dtype=np.float32).reshape(1, 2, 4, 3)
    segment = PackedSegment(spec, [numbers.data, bytearray()])
    path, _ = asyncio.run(write_file(tmp_path, [segment]))
    assert bytes_of(read_segments(Disk(), path, [0])[0]) == [numbers.tobytes(), b""]


def test_a_segment_of_many_arrays_is_written_whole(tmp_path: Path) -> None:
    arrays = tuple(ArraySpec("U8", (i % 3,)) for i in range(2000))
    tree = {"list": [{"array": i} for i in range(2000)]}
    layout = [{"form": "state", "attributes": {"all": tree}}]
    segment = make_segment(SegmentSpec(0, 1, arrays, layout, True, False, {}))
    path, _ = asyncio.run(write_file(tmp_path, [segment]))
    assert bytes_of(read_segments(Disk(), path, [0])[0]) == bytes_of(segment)


@pytest.mark.parametrize("mask", [0o000, 0o077, 0o777])
def test_only_the_owner_may_read_whatever_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        path = tmp_path / "ab" / "file"
        disk = Disk()
        disk.settle(path.parent)
        disk.close(disk.create(path))
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_folder_that_others_could_read_is_closed(tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir(mode=0o755)
    Disk().make_folder(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_file_in_a_folders_place_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FileExistsError):
        Disk().make_folder(tmp_path / "file")


class CountingSource(ListSource):
    """Notes how many segments it gave are still held when it gives the next one."""

    def __init__(self, segments: Sequence[PackedSegment]) -> None:
        super().__init__(segments)
        self.most = 0
        self.held: weakref.WeakSet[Held] = weakref.WeakSet()

    async def data(self, index: int) -> Sequence[Buffer]:
        data = [Held(buffer) for buffer in self.segments[index].data]
        deadline = time.monotonic() + 30
        while self.held and time.monotonic() < deadline:  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0)  # the thread that wrote them lets go after it has said so
        self.most = max(self.most, len(self.held))
        self.held.update(data)
        return data


class Held(bytearray):
    """A buffer that can be asked whether it is still there."""

    __hash__ = object.__hash__  # type: ignore[assignment]


def test_one_segment_at_a_time_is_in_memory(tmp_path: Path) -> None:
    source = CountingSource([make_segment(make_spec(i, i + 1)) for i in range(5)])
    header = make_header(source.specs)
    asyncio.run(write_snapshot(Disk(), header, source, target=tmp_path / "f", drafts=tmp_path))
    assert source.most == 0


@pytest.mark.parametrize("fails_at", [0, 2])
@pytest.mark.parametrize("fault", [SourceGone(), OSError(5, "EIO"), asyncio.CancelledError()])
def test_a_source_that_fails_leaves_nothing(
    tmp_path: Path, fails_at: int, fault: BaseException
) -> None:
    source = ListSource(RUN, fails_at, fault)
    header = make_header(source.specs)
    with pytest.raises(type(fault)):
        asyncio.run(write_snapshot(Disk(), header, source, target=tmp_path / "f", drafts=tmp_path))
    assert everything_below(tmp_path) == set()


def test_a_source_that_gives_other_sizes_than_described_is_refused(tmp_path: Path) -> None:
    short = PackedSegment(RUN[0].spec, [*RUN[0].data[:-1], b""])
    with pytest.raises(ValueError, match="not as described"):
        asyncio.run(write_file(tmp_path, [short]))
    assert everything_below(tmp_path) == set()


class SlowDisk(Disk):
    """Waits in one operation until told to go on."""

    def __init__(self, waits_in: str) -> None:
        super().__init__()
        self.waits_in = waits_in
        self.loop = asyncio.get_running_loop()
        self.reached = asyncio.Event()
        self.go_on = asyncio.Event()

    def _wait(self, name: str) -> None:
        if name == self.waits_in:
            self.loop.call_soon_threadsafe(self.reached.set)
            asyncio.run_coroutine_threadsafe(self.go_on.wait(), self.loop).result()

    def create(self, path: Path) -> int:
        self._wait("create")
        return super().create(path)

    def write_some(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self._wait("write_some")
        return super().write_some(fd, buffers, offset)

    def fsync_folder(self, folder: Path) -> None:
        self._wait("fsync_folder")
        super().fsync_folder(folder)


@pytest.mark.parametrize("operation", ["create", "write_some", "fsync_folder"])
def test_a_cancelled_write_waits_for_its_thread_and_leaves_nothing(
    tmp_path: Path, operation: str
) -> None:
    async def cancel() -> None:
        disk = SlowDisk(operation)
        write = asyncio.ensure_future(write_file(tmp_path, RUN, disk=disk))
        await disk.reached.wait()
        write.cancel()
        done, _ = await asyncio.wait({write}, timeout=0.02)
        assert not done, "the write was left behind by its caller"
        disk.waits_in = ""
        disk.go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await write

    asyncio.run(cancel())
    assert everything_below(tmp_path) == set()


def test_a_missing_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(SnapshotDamaged) as caught:
        read_header(Disk(), tmp_path / "none", run_id=7)
    assert (caught.value.run_id, caught.value.reason) == (7, "missing")


def test_a_folder_or_a_link_in_a_files_place_is_an_io_error(tmp_path: Path) -> None:
    path, _ = asyncio.run(write_file(tmp_path, RUN))
    (tmp_path / "link").symlink_to(path)
    for place in (tmp_path, tmp_path / "link"):
        with pytest.raises(SnapshotDamaged) as caught:
            verify_file(Disk(), place)
        assert caught.value.reason == "io"


@pytest.mark.parametrize(
    "change",
    [{"key": b"another"}, {"start": 1}, {"end": 24}, {"identity": "of another model"}],
)
def test_a_file_that_is_not_the_expected_one_is_foreign(
    tmp_path: Path, change: dict[str, object]
) -> None:
    path, header = asyncio.run(write_file(tmp_path, RUN))
    expected: Expected = replace(expected_of(header), **change)  # type: ignore[arg-type]
    with pytest.raises(SnapshotDamaged) as caught:
        read_segments(Disk(), path, [0], expected=expected)
    assert caught.value.reason == "foreign"


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    path, header = asyncio.run(write_file(tmp_path, RUN))
    with path.open("r+b") as file:  # damage in the first segment
        file.seek(len(encode(header)))
        file.write(b"\xff\x00\xff")
    assert bytes_of(read_segments(Disk(), path, [1])[0]) == bytes_of(RUN[1])
    with pytest.raises(SnapshotDamaged) as caught:
        read_segments(Disk(), path, [1, 0])
    assert caught.value.reason == "digest"


def test_a_volume_is_used_and_free_within_its_size(tmp_path: Path) -> None:
    usage = Disk().usage(tmp_path)
    assert 0 < usage.used <= usage.total and 0 <= usage.free <= usage.total - usage.used

"""Every kind of damage to a real file is found by whoever reads it, and never by another error."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvserve.store.disk import Disk
from kvserve.store.errors import SnapshotDamaged
from kvserve.store.segments import PackedSegment
from kvserve.store.snapshot import Expected, read_segments, verify_file
from kvserve.store.snapshot_header import SnapshotHeader, encode
from tests.unit.snapshot_fixtures import (
    WINDOW,
    bytes_of,
    expected_of,
    make_segment,
    make_spec,
    write_file,
)

NUM_FLIPS = 2000
NUM_CUTS = 200
SEGMENTS = [
    make_segment(make_spec(0, 40, window=WINDOW, state=True)),
    make_segment(make_spec(40, 41, window=WINDOW, state=False)),
    make_segment(make_spec(41, 300, window=WINDOW, state=True)),
]
EVERY = range(len(SEGMENTS))
RIGHT = [bytes_of(segment) for segment in SEGMENTS]

File = tuple[Path, SnapshotHeader]


@pytest.fixture
def file(tmp_path: Path) -> File:
    return asyncio.run(write_file(tmp_path, SEGMENTS))


def reason(call: Callable[[], object]) -> str:
    """Return why a call finds damage; any other error, or none, fails the test."""
    with pytest.raises(SnapshotDamaged) as caught:
        call()
    return caught.value.reason


def reasons(path: Path, expected: Expected | None = None) -> set[str]:
    """Return what reading all and verifying say."""
    disk = Disk()
    return {
        reason(lambda: read_segments(disk, path, EVERY, expected=expected)),
        reason(lambda: verify_file(disk, path, expected=expected)),
    }


@contextmanager
def flipped(fd: int, bit: int) -> Iterator[None]:
    offset = bit // 8
    byte = os.pread(fd, 1, offset)
    os.pwrite(fd, bytes([byte[0] ^ 1 << bit % 8]), offset)
    try:
        yield
    finally:
        os.pwrite(fd, byte, offset)


def test_every_flipped_bit_of_a_header_is_found(file: File) -> None:
    path, header = file
    fd = os.open(path, os.O_RDWR)
    try:
        for bit in range(8 * len(encode(header))):
            with flipped(fd, bit):
                assert reasons(path) <= {"header", "truncated"}, f"bit {bit}"
    finally:
        os.close(fd)
    verify_file(Disk(), path)


def test_flipped_bits_of_the_payload_are_found_where_they_are(file: File) -> None:
    path, header = file
    start = len(encode(header))
    ends = [start + sum(s.spec.nbytes for s in SEGMENTS[: i + 1]) for i in EVERY]
    random_bits = random.Random(20260504)
    fd = os.open(path, os.O_RDWR)
    try:
        for number in range(NUM_FLIPS):
            bit = random_bits.randrange(8 * start, 8 * path.stat().st_size)
            hit = next(i for i in EVERY if bit // 8 < ends[i])
            with flipped(fd, bit):
                assert reasons(path) == {"digest"}, f"bit {bit}"
                if number % 20 == 0:
                    others = [i for i in EVERY if i != hit]
                    read = read_segments(Disk(), path, others)
                    assert [bytes_of(segment) for segment in read] == [RIGHT[i] for i in others]
    finally:
        os.close(fd)
    verify_file(Disk(), path)


def test_a_file_that_ends_early_is_found_wherever_it_ends(file: File) -> None:
    path, header = file
    size, start = path.stat().st_size, len(encode(header))
    near = {0, 1, 7, 8, 9, 49, 50, 82, start - 1, start, start + 1, size - 1}
    cuts = near | set(random.Random(1).sample(range(size), NUM_CUTS))
    for cut in sorted(cuts, reverse=True):
        os.truncate(path, cut)
        assert reasons(path) == {"truncated"}, f"{cut} of {size} bytes"


def test_a_file_that_grew_is_found(file: File) -> None:
    path, _ = file
    for more in (b"\0", b"\0" * 4096, path.read_bytes()):
        with path.open("ab") as grown:
            grown.write(more)
        assert reasons(path) == {"header"}


@pytest.mark.parametrize("shift", [-1, 1, 512])
def test_bytes_that_moved_are_found(file: File, shift: int) -> None:
    path, header = file
    raw, start = path.read_bytes(), len(encode(header))
    data = raw[start:]
    path.write_bytes(raw[:start] + data[-shift:] + data[:-shift])
    assert reasons(path) == {"digest"}


def test_a_file_of_zeros_is_found(file: File) -> None:
    path, header = file
    size, start = path.stat().st_size, len(encode(header))
    for first, last in ((0, size), (0, 4096), (0, start), (8, start), (0, 8)):
        raw = bytearray(path.read_bytes())
        raw[first:last] = bytes(last - first)
        copy = path.with_suffix(".zeros")
        copy.write_bytes(raw)
        assert reasons(copy) == {"header"}
    raw = bytearray(path.read_bytes())
    raw[start:] = bytes(size - start)
    path.write_bytes(raw)
    assert reasons(path) == {"digest"}


def test_two_files_that_changed_places_are_found(file: File, tmp_path: Path) -> None:
    path, header = file
    shifted = [make_segment(make_spec(0, 40)), make_segment(make_spec(40, 300))]
    other, other_header = asyncio.run(write_file(tmp_path, shifted, key=b"another key" + bytes(5)))
    shutil.move(path, tmp_path / "aside")
    shutil.move(other, path)
    shutil.move(tmp_path / "aside", other)
    assert reasons(path, expected_of(header)) == {"foreign"}
    assert reasons(other, expected_of(other_header)) == {"foreign"}


def test_segments_that_changed_places_are_found(tmp_path: Path) -> None:
    pair: list[PackedSegment] = [make_segment(make_spec(i, i + 9)) for i in (0, 9)]
    path, header = asyncio.run(write_file(tmp_path, pair))
    raw, start = path.read_bytes(), len(encode(header))
    half = (len(raw) - start) // 2
    path.write_bytes(raw[:start] + raw[start + half :] + raw[start : start + half])
    assert reasons(path) == {"digest"}

"""Snapshot files: written once, durably, then read and verified. See `snapshot_header` for bytes.

Holds no state between calls; everything but `write_snapshot` blocks and belongs into a worker
thread. A file is immutable once it has its name. Nothing is mapped into memory: an I/O error on a
mapped page would end the process, on a read it is a miss. Knows nothing of the index, the budget
or quarantine.
"""

from __future__ import annotations

import errno
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import xxhash

from kvserve.store.disk import Disk
from kvserve.store.errors import SnapshotDamaged
from kvserve.store.offload import offload
from kvserve.store.segments import Buffer, PackedSegment, SegmentSource, SegmentSpec
from kvserve.store.snapshot_header import (
    LENGTH_NBYTES,
    SnapshotHeader,
    decode,
    encode,
    header_nbytes,
)

BLOCK_NBYTES = 2**20
"""Read and hashed at a time: what was just read is still in the processor's cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What the index says of a file; two files that changed places are found by it.

    `identity` is `ModelIdentity.digest()`, `content` the header's `content_digest`, None for any:
    keys do not resist one who looks for two prompts of the same, whose files would have one name.
    """

    key: bytes
    start: int
    end: int
    identity: str
    content: bytes | None = None

    def differs_from(self, header: SnapshotHeader) -> bool:
        found = (header.key, header.start, header.end, header.identity.digest())
        if found != (self.key, self.start, self.end, self.identity):
            return True
        return self.content is not None and self.content != header.content_digest


# -- writing -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sealed:
    """A file that is durable: its size, and `content_digest` of its header."""

    nbytes: int
    digest: bytes


async def write_snapshot(
    disk: Disk, header: SnapshotHeader, source: SegmentSource, *, target: Path, drafts: Path
) -> Sealed:
    """Write the segments of `source` as the file `target`; return once it is durable.

    `header` describes them (`header.segments == source.specs`), its digests are filled in here.
    One segment is in memory at a time. `drafts` must be there, on the same volume; the folder of
    `target` is made. On any error, a cancellation too, neither draft nor target is left: OSError,
    SourceGone and whatever else the source raises, TooLarge for more than one file may describe,
    ValueError if the source does not give what it described.
    """
    draft = _Draft(disk, header, drafts / f"{target.name}.{secrets.token_hex(8)}")
    try:
        await offload(draft.open)
        for index in range(len(header.segments)):
            data = await source.data(index)
            await offload(draft.add, data)
            del data  # not beside the next one
        return await offload(draft.finish, target)
    except BaseException:
        await offload(draft.abandon)
        raise


class _Draft:
    """A file that is being written, from the arrays on; the header comes last."""

    def __init__(self, disk: Disk, header: SnapshotHeader, path: Path) -> None:
        self.disk = disk
        self.header = header
        self.path: Path | None = path
        self.fd: int | None = None
        self.digests: list[bytes] = []
        self.offset = 0

    def open(self) -> None:
        """Create the file. Digests have a fixed width, so the header's length is known already."""
        assert self.path is not None
        self.offset = len(encode(self.header))
        self.fd = self.disk.create(self.path)

    def add(self, data: Sequence[Buffer]) -> None:
        """Append the next segment."""
        assert self.fd is not None
        spec = self.header.segments[len(self.digests)]
        buffers = flat(spec, data)
        hasher = xxhash.xxh3_128()
        for buffer in buffers:
            hasher.update(buffer)
        self.offset = self.disk.write(self.fd, buffers, self.offset)
        self.digests.append(hasher.digest())

    def finish(self, target: Path) -> Sealed:
        assert self.fd is not None and self.path is not None
        header = replace(self.header, digests=tuple(self.digests))
        raw = encode(header)
        self.disk.write(self.fd, [memoryview(raw)], 0)
        self.disk.fsync(self.fd)
        self._close()
        self.disk.settle(target.parent)
        self.disk.rename(self.path, target)
        self.path = target
        self.disk.fsync_folder(target.parent)
        return Sealed(self.offset, header.content_digest)

    def abandon(self) -> None:
        """Remove what there is of the file. An error here leaves a draft, which the start sweeps,
        or a file without a row, which it sweeps too."""
        with suppress(OSError):
            self._close()
        if self.path is not None:
            with suppress(OSError):
                self.disk.unlink(self.path)

    def _close(self) -> None:
        fd, self.fd = self.fd, None
        if fd is not None:
            self.disk.close(fd)


def flat(spec: SegmentSpec, data: Sequence[Buffer]) -> list[memoryview]:
    """Return the arrays' bytes as flat views. Raises ValueError if they are not as described."""
    buffers = [_bytes_of(buffer) for buffer in data]
    if [buffer.nbytes for buffer in buffers] != [array.nbytes for array in spec.arrays]:
        raise ValueError(f"segment [{spec.start}, {spec.end}) is not as described")
    return buffers


def _bytes_of(buffer: Buffer) -> memoryview:
    view = memoryview(buffer)
    # A view with a zero in its shape cannot be cast.
    return view.cast("B") if view.nbytes else memoryview(b"")


# -- reading -----------------------------------------------------------------------------------


def read_header(
    disk: Disk, path: Path, *, run_id: int = 0, expected: Expected | None = None
) -> SnapshotHeader:
    """Return the header of a file whose size is right. Raises SnapshotDamaged."""
    with SnapshotFile(disk, path, run_id=run_id, expected=expected) as file:
        return file.header


def read_segments(
    disk: Disk,
    path: Path,
    indices: Sequence[int],
    *,
    run_id: int = 0,
    expected: Expected | None = None,
) -> list[PackedSegment]:
    """Return some segments, each verified, in the order asked for. Raises SnapshotDamaged."""
    with SnapshotFile(disk, path, run_id=run_id, expected=expected) as file:
        return [file.read(index) for index in indices]


def verify_file(
    disk: Disk, path: Path, *, run_id: int = 0, expected: Expected | None = None
) -> SnapshotHeader:
    """Read everything and return the header. Raises SnapshotDamaged."""
    with SnapshotFile(disk, path, run_id=run_id, expected=expected) as file:
        buffer = memoryview(bytearray(BLOCK_NBYTES))
        for index in range(len(file.header.segments)):
            file.check(index, buffer)
        return file.header


class SnapshotFile:
    """An open file whose header and size have been verified; a context manager.

    Every method raises SnapshotDamaged, naming `run_id`, whatever is wrong.
    """

    def __init__(
        self, disk: Disk, path: Path, *, run_id: int = 0, expected: Expected | None = None
    ) -> None:
        self._disk = disk
        self._run_id = run_id
        try:
            self._fd = disk.open(path)
        except FileNotFoundError:
            raise SnapshotDamaged(run_id, "missing") from None
        except OSError as error:
            raise self._failed(error) from error
        try:
            self.header, data_start = self._read_header()
            if expected is not None and expected.differs_from(self.header):
                raise SnapshotDamaged(run_id, "foreign")
        except BaseException:
            self.close()
            raise
        self._offsets = [data_start]
        for segment in self.header.segments:
            self._offsets.append(self._offsets[-1] + segment.nbytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        with suppress(OSError):  # nothing was written
            self._disk.close(self._fd)

    def read(self, index: int) -> PackedSegment:
        """Return a segment, verified. Its arrays are views of one piece of memory."""
        spec = self.header.segments[index]
        # Not `bytearray`, which writes zeros first; and numpy asks for huge pages.
        memory = np.empty(spec.nbytes, np.uint8).data
        hasher = xxhash.xxh3_128()
        for start in range(0, spec.nbytes, BLOCK_NBYTES):
            block = memory[start : start + BLOCK_NBYTES]
            self._fill(block, self._offsets[index] + start)
            hasher.update(block)
        self._compare(index, hasher.digest())
        data, offset = [], 0
        for array in spec.arrays:
            data.append(memory[offset : offset + array.nbytes])
            offset += array.nbytes
        return PackedSegment(spec, data)

    def check(self, index: int, buffer: memoryview) -> None:
        """Verify a segment without keeping it, through `buffer`."""
        hasher = xxhash.xxh3_128()
        position, end = self._offsets[index], self._offsets[index + 1]
        while position < end:
            block = buffer[: min(len(buffer), end - position)]
            self._fill(block, position)
            hasher.update(block)
            position += len(block)
        self._compare(index, hasher.digest())

    def _compare(self, index: int, digest: bytes) -> None:
        if digest != self.header.digests[index]:
            raise SnapshotDamaged(self._run_id, "digest", f"segment {index}")

    def _read_header(self) -> tuple[SnapshotHeader, int]:
        try:
            size = self._disk.size(self._fd)
            start = bytearray(min(size, LENGTH_NBYTES))
            self._fill(memoryview(start), 0)
            raw = bytearray(header_nbytes(start, size))
            self._fill(memoryview(raw), 0)
            return decode(raw, size), len(raw)
        except OSError as error:
            raise self._failed(error) from error
        except EOFError as error:
            raise SnapshotDamaged(self._run_id, "truncated", str(error)) from error
        except ValueError as error:
            raise SnapshotDamaged(self._run_id, "header", str(error)) from error

    def _fill(self, buffer: memoryview, offset: int) -> None:
        while buffer:
            try:
                taken = self._disk.read_some(self._fd, buffer, offset)
            except OSError as error:
                raise self._failed(error) from error
            if not taken:
                raise SnapshotDamaged(self._run_id, "truncated", f"at {offset}")
            offset += taken
            buffer = buffer[taken:]

    def _failed(self, error: OSError) -> SnapshotDamaged:
        return SnapshotDamaged(self._run_id, "io", errno.errorcode.get(error.errno or 0, ""))

"""A conversation leaves as one file and comes back as one.

Export joins the runs of a conversation's path to a single snapshot of `[0, n)`, streamed: the
header first, made from the runs' own headers, then segment by segment. Every segment is verified
before its first byte goes out. Import verifies a staged file, which a stranger may have made, and
offers its segments for the ranges that a store lacks.

Owns nothing but the files it has open; reads in worker threads. Decides neither what is exported
nor whether an import is wanted: identity, limits and the index are the store's.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Self

import xxhash

from kvserve.core.identity import ModelIdentity
from kvserve.core.types import TokenIds
from kvserve.store.carried import Carried, carry, unpack
from kvserve.store.disk import Disk
from kvserve.store.errors import SnapshotDamaged
from kvserve.store.offload import offload
from kvserve.store.records import StoredConversation
from kvserve.store.segments import Buffer, PackedSegment, SegmentSpec, StoredPath
from kvserve.store.slicing import slice_segment, slice_spec
from kvserve.store.snapshot import BLOCK_NBYTES, Expected, SnapshotFile, flat
from kvserve.store.snapshot_header import SnapshotHeader, encode

AT_ONCE_NBYTES = 64 * 2**20
"""Of an upload verified in one go: some tens of milliseconds."""


def export_key(identity: ModelIdentity, token_ids: TokenIds) -> bytes:
    """Return the key of an exported state: of model and tokens alone, no namespace."""
    hasher = xxhash.xxh3_128(identity.digest().encode())
    hasher.update(token_ids.astype("<u4", copy=False).tobytes())
    return hasher.digest()


# -- out ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportPart:
    """A run of the path to export, of which the tokens up to `end` are taken."""

    run_id: int
    path: Path
    expected: Expected
    end: int


@dataclass(frozen=True, slots=True)
class _Piece:
    """Segment `index` of a part, or its beginning, as the exported file has it."""

    part: ExportPart
    index: int
    spec: SegmentSpec
    digest: bytes


class Export:
    """An exported conversation: `nbytes` long, to be iterated once.

    If a run proves damaged or is gone when its turn comes, iteration raises SnapshotDamaged: the
    bytes so far are a truncated file, which every importer refuses.
    """

    def __init__(self, disk: Disk, header: SnapshotHeader, pieces: Sequence[_Piece]) -> None:
        self.header = header
        self._raw = encode(header)
        self.nbytes = len(self._raw) + header.data_nbytes
        self._disk = disk
        self._pieces = pieces

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for start in range(0, len(self._raw), BLOCK_NBYTES):
            yield self._raw[start : start + BLOCK_NBYTES]
        reader = _Reader(self._disk)
        try:
            for piece in self._pieces:
                packed = await offload(reader.read, piece)
                for block in _blocks(flat(packed.spec, packed.data)):
                    yield block
        finally:
            reader.close()


async def open_export(
    disk: Disk, conversation: StoredConversation, parts: Sequence[ExportPart]
) -> Export:
    """Return the conversation as one file, ready to be streamed; `parts` lead from token 0 to it.

    Raises SnapshotDamaged if a run's header is, and TooLarge for a conversation whose description
    is too long for one file.
    """
    return await offload(_plan, disk, conversation, parts)


def _plan(disk: Disk, conversation: StoredConversation, parts: Sequence[ExportPart]) -> Export:
    token_ids = conversation.token_ids
    pieces: list[_Piece] = []
    for part in parts:
        with _open(disk, part) as file:
            own = token_ids[file.header.start : part.end]
            if file.header.token_ids[: len(own)].tobytes() != own.tobytes():
                raise SnapshotDamaged(part.run_id, "foreign", "other tokens")
            pieces += _pieces(part, file)
    identity = conversation.head.identity
    header = SnapshotHeader(
        identity=identity,
        namespace=None,
        start=0,
        end=len(token_ids),
        parent=b"",
        prefix=b"",
        key=export_key(identity, token_ids),
        token_ids=token_ids,
        segments=tuple(piece.spec for piece in pieces),
        digests=tuple(piece.digest for piece in pieces),
        conversation=carry(conversation),
    )
    return Export(disk, header, pieces)


def _pieces(part: ExportPart, file: SnapshotFile) -> Iterator[_Piece]:
    """Yield what is taken of a run. A segment that is left inside is read now for its digest."""
    for index, spec in enumerate(file.header.segments):
        if spec.end <= part.end:
            yield _Piece(part, index, spec, file.header.digests[index])
        elif spec.start < part.end:
            packed = slice_segment(file.read(index), spec.start, part.end)
            yield _Piece(part, index, packed.spec, _digest(packed))


def _open(disk: Disk, part: ExportPart) -> SnapshotFile:
    return SnapshotFile(disk, part.path, run_id=part.run_id, expected=part.expected)


class _Reader:
    """Reads pieces one after the other, with one file open at a time.

    An object, so that a file that was opened for a reader who has gone meanwhile gets closed.
    """

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._part: ExportPart | None = None
        self._file: SnapshotFile | None = None

    def read(self, piece: _Piece) -> PackedSegment:
        """Return a piece, verified against what the header that is already sent says of it."""
        if self._file is None or piece.part is not self._part:
            self.close()
            self._file = _open(self._disk, piece.part)
            self._part = piece.part
        segments, spec = self._file.header.segments, piece.spec
        if piece.index < len(segments) and _lies_in(segments[piece.index], spec):
            packed = slice_segment(self._file.read(piece.index), spec.start, spec.end)
            if packed.spec == spec and _digest(packed) == piece.digest:
                return packed
        raise SnapshotDamaged(piece.part.run_id, "foreign", "changed while it was exported")

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()


def _lies_in(segment: SegmentSpec, part: SegmentSpec) -> bool:
    return segment.start == part.start and part.end <= segment.end


def _digest(packed: PackedSegment) -> bytes:
    hasher = xxhash.xxh3_128()
    for buffer in flat(packed.spec, packed.data):
        hasher.update(buffer)
    return hasher.digest()


def _blocks(buffers: Sequence[memoryview]) -> Iterator[bytes]:
    """Yield the same bytes in blocks of a size that suits a socket."""
    waiting: list[memoryview] = []
    nbytes = 0
    for buffer in buffers:
        while len(buffer):
            taken = buffer[: BLOCK_NBYTES - nbytes]
            buffer = buffer[len(taken) :]
            waiting.append(taken)
            nbytes += len(taken)
            if nbytes == BLOCK_NBYTES:
                yield b"".join(waiting)
                waiting, nbytes = [], 0
    if waiting:
        yield b"".join(waiting)


# -- in ----------------------------------------------------------------------------------------


class Staged:
    """An uploaded file: `async with Staged(disk, path) as staged` verifies it from end to end.

    Entering raises SnapshotDamaged for a file that is not, in every detail, an exported
    conversation. Inside it stays open, so that nobody exchanges it. `header` and `carried` are
    what it says.
    """

    header: SnapshotHeader
    carried: Carried

    def __init__(self, disk: Disk, path: Path) -> None:
        self._disk = disk
        self._path = path
        self._file: SnapshotFile | None = None

    async def __aenter__(self) -> Self:
        try:
            await offload(self._open)
            index = 0
            while index < len(self.header.segments):
                index = await offload(self._checked_from, index)
        except BaseException:
            self.close()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def conversation(
        self, *, tenant: str, namespace: bytes, id: str, now: datetime
    ) -> StoredConversation:
        """Return the record as one of a tenant: neither saved nor pinned, last used `now`."""
        return self.carried.conversation(
            self.header, tenant=tenant, namespace=namespace, id=id, now=now
        )

    async def open_source(
        self, path: StoredPath, ranges: Sequence[tuple[int, int]]
    ) -> Sequence[StagedSource]:
        """Return a source for each range, whatever the store has: for `Store.write`."""
        return [self.source(start, end) for start, end in ranges]

    def source(self, start: int, end: int) -> StagedSource:
        """Return the segments of the tokens `[start, end)`, sliced at both ends if need be."""
        assert self._file is not None
        specs = [
            (index, slice_spec(spec, max(start, spec.start), min(end, spec.end)))
            for index, spec in enumerate(self.header.segments)
            if spec.start < end and start < spec.end
        ]
        return StagedSource(self._file, specs)

    def _open(self) -> None:
        file = self._file = SnapshotFile(self._disk, self._path)
        header = self.header = file.header
        try:
            if header.start or header.parent or header.prefix or header.namespace is not None:
                raise ValueError("this is a part of a store, not an exported conversation")
            if header.key != export_key(header.identity, header.token_ids):
                raise ValueError("the key does not follow from the tokens")
            self.carried = unpack(header.conversation or {}, header.end)
        except ValueError as error:
            raise SnapshotDamaged(0, "header", str(error)) from error

    def _checked_from(self, index: int) -> int:
        """Verify some segments from `index` on; return the first that is still to be verified.

        Not all at once: nobody can stop a thread, and few threads serve everybody.
        """
        assert self._file is not None
        buffer = memoryview(bytearray(BLOCK_NBYTES))
        nbytes = 0
        for spec in self.header.segments[index:]:
            self._file.check(index, buffer)
            index += 1
            nbytes += spec.nbytes
            if nbytes >= AT_ONCE_NBYTES:
                break
        return index


class StagedSource:
    """A SegmentSource of some of a staged file's segments; usable until the file is closed."""

    def __init__(self, file: SnapshotFile, specs: Sequence[tuple[int, SegmentSpec]]) -> None:
        self._file = file
        self._specs = specs

    @property
    def specs(self) -> Sequence[SegmentSpec]:
        return [spec for _, spec in self._specs]

    async def data(self, index: int) -> Sequence[Buffer]:
        """Return a segment's bytes, verified once more. Raises SnapshotDamaged."""
        return await offload(self._read, index)

    def _read(self, index: int) -> Sequence[Buffer]:
        number, spec = self._specs[index]
        return slice_segment(self._file.read(number), spec.start, spec.end).data

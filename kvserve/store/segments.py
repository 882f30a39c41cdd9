"""Segments as they pass between the cache and the disk: bytes and descriptions, no MLX.

Token positions are half-open ranges counted from the start of the prompt. Array bytes are
little-endian and in C order; bfloat16 travels as the two bytes of each number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Protocol

from kvserve.core.types import TokenIds

Buffer = bytes | bytearray | memoryview

DTYPE_NBYTES = {
    **{"BOOL": 1, "U8": 1, "I8": 1},
    **{"U16": 2, "I16": 2, "F16": 2, "BF16": 2},
    **{"U32": 4, "I32": 4, "F32": 4},
    **{"U64": 8, "I64": 8, "F64": 8, "C64": 8},
}
"""Bytes of one number, by the names that safetensors gives to number formats."""


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """Number format (a key of `DTYPE_NBYTES`) and shape of one array."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return DTYPE_NBYTES[self.dtype] * prod(self.shape)


@dataclass(frozen=True, slots=True)
class SegmentSpec:
    """What one segment `[start, end)` holds, without its bytes.

    `layout` is JSON-able and belongs to the cache's codec: it says what each of `arrays` is.
    `restorable`, `whole` and `windows` answer as `kvserve.cache.tree.Payload` does.
    """

    start: int
    end: int
    arrays: tuple[ArraySpec, ...]
    layout: Any
    restorable: bool = True
    whole: bool = True
    windows: Mapping[int, int] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays)


@dataclass(frozen=True, slots=True)
class PackedSegment:
    """A segment with its bytes: `data[i]` holds `spec.arrays[i]`, contiguous."""

    spec: SegmentSpec
    data: Sequence[Buffer]


class SegmentSource(Protocol):
    """Where a write takes consecutive segments from; the first begins where it was asked to."""

    @property
    def specs(self) -> Sequence[SegmentSpec]: ...

    async def data(self, index: int) -> Sequence[Buffer]:
        """Return the bytes of `specs[index]`. Raises SourceGone when they are no longer held."""


@dataclass(frozen=True, slots=True)
class StoredSegment:
    """A segment of a run as the index knows it: enough to decide without opening its file.

    `index` counts the segments of the run; `readable` is False when the run's file was evicted
    or quarantined and only its tokens are known.
    """

    run_id: int
    index: int
    start: int
    end: int
    nbytes: int
    restorable: bool
    whole: bool
    windows: Mapping[int, int]
    readable: bool


@dataclass(frozen=True, slots=True)
class StoredPath:
    """How far the disk's tree agrees with a prompt: its first `num_tokens` tokens.

    `segments` lie end to end from 0 and cover exactly that: of a run that the prompt leaves
    early, the last one is listed with its own end beyond the position where the next begins (or
    beyond `num_tokens`), and only its leading tokens agree.
    """

    namespace: bytes
    token_ids: TokenIds
    num_tokens: int
    segments: tuple[StoredSegment, ...]

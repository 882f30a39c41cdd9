"""Held paths as bytes for the disk: described at once, copied segment by segment.

The caller holds the lease; only bytes that were copied ahead are kept here. Arrays are touched on
the engine thread only, some megabytes between two steps, so that writing a long document stalls
nobody, and a turn of many short segments does not wait for as many steps. Whatever is no longer
held by then is a skip with a reason.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from kvserve.cache.codec import SegmentPayload
from kvserve.cache.codec_pack import Piece, Unstorable, pieces
from kvserve.cache.leases import Lease
from kvserve.cache.segments import SegmentCache
from kvserve.store.errors import SourceGone
from kvserve.store.segments import Buffer, SegmentSource, SegmentSpec, StoredPath

AT_ONCE_NBYTES = 16 << 20
"""Copied between two steps, or one segment if that is larger: some ms at the memory's speed."""

Call = Callable[[Callable[[], Any]], Awaitable[Any]]
"""Runs a function on the engine thread."""


class HeldRange:
    """The segments of one token range of a leased path."""

    def __init__(
        self,
        cache: SegmentCache[SegmentPayload],
        call: Call,
        lease: Lease[SegmentPayload],
        made: Sequence[Piece],
    ) -> None:
        self._cache = cache
        self._call = call
        self._lease = lease
        self._pieces = made
        self._copied: dict[int, Sequence[Buffer]] = {}
        self.specs: Sequence[SegmentSpec] = [piece.spec for piece in made]

    async def data(self, index: int) -> Sequence[Buffer]:
        """Return the bytes of `specs[index]`. Raises SourceGone when they are no longer held."""
        if index not in self._copied:
            self._copied = await _or_gone(self._call, lambda: self._copy(index))
        return self._copied.pop(index)

    def _copy(self, first: int) -> dict[int, Sequence[Buffer]]:
        """Copy a segment and as many behind it as may be copied at once; on the engine thread."""
        held = _held(self._cache, self._lease)
        copied: dict[int, Sequence[Buffer]] = {}
        nbytes = 0
        for index in range(first, len(self._pieces)):
            nbytes += self.specs[index].nbytes
            if copied and nbytes > AT_ONCE_NBYTES:
                break
            copied[index] = self._pieces[index].pack(held)
        return copied


async def held_sources(
    cache: SegmentCache[SegmentPayload],
    call: Call,
    lease: Lease[SegmentPayload],
    path: StoredPath,
    ranges: Sequence[tuple[int, int]],
) -> list[SegmentSource]:
    """Return what is to be stored of a leased path for each range, behind what the disk has.

    Raises SourceGone when a range is not held, or cannot be written at all.
    """
    reached = max((stop for _, stop in ranges), default=0)
    if lease.num_tokens < reached:  # what lies behind in its last segment are others' tokens
        raise SourceGone(f"{lease.num_tokens} of {reached} tokens are held")
    found: list[list[Piece]] = await _or_gone(
        call, lambda: pieces(_held(cache, lease), path, ranges)
    )
    return [HeldRange(cache, call, lease, made) for made in found]


def _held(
    cache: SegmentCache[SegmentPayload], lease: Lease[SegmentPayload]
) -> list[tuple[int, int, SegmentPayload]]:
    if lease.released:  # requests needed the room
        raise LookupError("the path is no longer held")
    return cache.payloads(lease)


async def _or_gone(call: Call, function: Callable[[], Any]) -> Any:
    try:
        return await call(function)
    except (LookupError, Unstorable) as error:
        raise SourceGone(str(error)) from error

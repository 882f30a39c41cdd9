"""What the engine thread does next: pure decisions over plain values.

Prefill is compute-bound and runs for one sequence at a time; decode is one step for all. When both
wait they alternate, one chunk then one step, and the chunk is as long as can be computed in the
set slice of time, so that no running stream pauses longer than that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MIN_CHUNK = 16
CHUNK_GRANULE = 16
"""Chunks are multiples of this, so that kernels see few shapes."""

QUIET_SLICE_S = 0.5
"""How long a chunk may take when nothing decodes: within a second a client that left is noticed."""

MAX_WAIT_CHUNKS = 8
"""A prefill that was passed over this often goes next, however long it is."""


@dataclass(frozen=True, slots=True)
class Prefill:
    """A prompt being prefilled: tokens left, and for how many chunks others went first."""

    remaining: int
    passed_over: int = 0


@dataclass(frozen=True, slots=True)
class Decode:
    """Run one step for all decoding rows."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Prefill up to `size` tokens of the prompt at `index` of the list that was given."""

    index: int
    size: int


@dataclass(frozen=True, slots=True)
class Idle:
    """Nothing to do."""


Step = Decode | Chunk | Idle


def next_step(
    num_decoding: int,
    prefills: Sequence[Prefill],
    *,
    decoded_last: bool,
    chunk_size: int,
) -> Step:
    """Return the next step.

    Among prompts the one with the fewest tokens left goes first, in order of arrival among
    equals, so that a short question does not wait for a long document; ageing keeps the long one
    from starving.
    """
    if prefills and (decoded_last or not num_decoding):
        starved = [i for i, p in enumerate(prefills) if p.passed_over >= MAX_WAIT_CHUNKS]
        index = starved[0] if starved else shortest(prefills)
        return Chunk(index, chunk_size)
    if num_decoding:
        return Decode()
    return Idle()


def shortest(prefills: Sequence[Prefill]) -> int:
    """Return the index of the first prompt with the fewest tokens left."""
    return min(range(len(prefills)), key=lambda i: prefills[i].remaining)


class ChunkSizer:
    """Chooses the chunk size from measured speed.

    Attention makes tokens dearer as the context grows, so the last chunk's speed counts most.
    """

    def __init__(self, slice_s: float, max_chunk: int) -> None:
        self._slice_s = slice_s
        self._max_chunk = max_chunk
        self._token_s: float | None = None

    def record(self, num_tokens: int, seconds: float) -> None:
        """Note that a chunk of `num_tokens` took `seconds`.

        Tiny chunks say more of fixed costs than of speed and are left out.
        """
        if num_tokens < MIN_CHUNK or seconds <= 0:
            return
        token_s = seconds / num_tokens
        self._token_s = token_s if self._token_s is None else (self._token_s + token_s) / 2

    def size(self, *, streams: bool = True) -> int:
        """Return the size of the next chunk in tokens; longer when no stream waits for it."""
        if self._token_s is None:
            return 4 * MIN_CHUNK
        slice_s = self._slice_s if streams else max(self._slice_s, QUIET_SLICE_S)
        fitting = int(slice_s / self._token_s) // CHUNK_GRANULE * CHUNK_GRANULE
        return max(MIN_CHUNK, min(fitting, self._max_chunk))

    @property
    def tokens_per_s(self) -> float | None:
        """Measured prefill speed, None before the first chunk."""
        return None if self._token_s is None else 1 / self._token_s

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

QUIET_SLICE_S = 0.4
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
    """Prefill a chunk of the prompt at `index` of the list that was given."""

    index: int


@dataclass(frozen=True, slots=True)
class Idle:
    """Nothing to do."""


Step = Decode | Chunk | Idle


def next_step(
    num_decoding: int,
    prefills: Sequence[Prefill],
    *,
    decoded_last: bool,
) -> Step:
    """Return the next step.

    Among prompts the one with the fewest tokens left goes first, in order of arrival among
    equals, so that a short question does not wait for a long document; ageing keeps the long one
    from starving.
    """
    if prefills and (decoded_last or not num_decoding):
        starved = [i for i, p in enumerate(prefills) if p.passed_over >= MAX_WAIT_CHUNKS]
        index = starved[0] if starved else shortest(prefills)
        return Chunk(index)
    if num_decoding:
        return Decode()
    return Idle()


def shortest(prefills: Sequence[Prefill]) -> int:
    """Return the index of the first prompt with the fewest tokens left."""
    return min(range(len(prefills)), key=lambda i: prefills[i].remaining)


class ChunkSizer:
    """Chooses the chunk size from measured speed.

    Attention makes tokens dearer as the context before them grows, so a line is fitted to the last
    chunks: seconds per token over context, older chunks counting ever less.
    """

    _MEMORY = 0.7

    def __init__(self, slice_s: float, max_chunk: int) -> None:
        self._slice_s = slice_s
        self._max_chunk = max_chunk
        self._weight = self._x = self._y = self._xx = self._xy = 0.0

    def record(self, num_tokens: int, seconds: float, context: int = 0) -> None:
        """Note that a chunk of `num_tokens` behind `context` others took `seconds`.

        Tiny chunks say more of fixed costs than of speed and are left out.
        """
        if num_tokens < MIN_CHUNK or seconds <= 0:
            return
        x, y = float(context), seconds / num_tokens
        self._weight = self._weight * self._MEMORY + 1
        self._x = self._x * self._MEMORY + x
        self._y = self._y * self._MEMORY + y
        self._xx = self._xx * self._MEMORY + x * x
        self._xy = self._xy * self._MEMORY + x * y

    def size(self, context: int = 0, *, streams: bool = True) -> int:
        """Return the size in tokens of a chunk behind `context` tokens.

        Longer when no stream waits for it.
        """
        if not self._weight:
            return 4 * MIN_CHUNK
        slice_s = self._slice_s if streams else max(self._slice_s, QUIET_SLICE_S)
        fitting = int(slice_s / self._token_s(context)) // CHUNK_GRANULE * CHUNK_GRANULE
        return max(MIN_CHUNK, min(fitting, self._max_chunk))

    def _token_s(self, context: int) -> float:
        """Return the expected seconds per token; never far below what was seen."""
        mean_x, mean_y = self._x / self._weight, self._y / self._weight
        spread = self._xx / self._weight - mean_x**2
        slope = 0.0
        if spread > MIN_CHUNK**2:
            slope = max(0.0, (self._xy / self._weight - mean_x * mean_y) / spread)
        return max(mean_y + slope * (context - mean_x), mean_y / 4)

    @property
    def tokens_per_s(self) -> float | None:
        """Measured prefill speed, None before the first chunk."""
        return self._weight / self._y if self._weight else None

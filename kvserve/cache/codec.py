"""Between mlx-lm's cache objects and stored segments.

A working cache is the list that `make_prompt_cache` gives. Its leaves (those inside a `CacheList`
too, in order) are held in one of three forms:

- **span**: keys and values per token, for `KVCache`, `ConcatenateKVCache` and `QuantizedKVCache`.
- **window**: a span whose old tokens vanish, for `RotatingKVCache` without kept tokens. A segment
  holds its last `min(window, length)` tokens, which is all that a later token can see.
- **state**: everything else, by a copy of all its attributes at one position.

Only the engine thread calls this module: MLX arrays belong to the thread that made them. Payloads
are immutable. Arrays are cut out with `mx.contiguous` and evaluated at once: a live slice of a
working buffer would make MLX copy the whole buffer at its next write in place (194 ms against
0.06 ms for 410 MB, measured).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.models.cache import (
    CacheList,
    ConcatenateKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
)

from kvserve.cache.plan import Traits

WorkingCache = list[Any]

_SPANS = (KVCache, ConcatenateKVCache, QuantizedKVCache)
TOKEN_AXIS = -2

LONGEST_CHUNK_TOKENS = 2048
"""No chunk of prefill is longer."""


def leaves(cache: Iterable[Any]) -> list[Any]:
    """Return the cache objects of all layers in order, those inside a `CacheList` one by one."""
    found: list[Any] = []
    for entry in cache:
        if isinstance(entry, CacheList):
            found.extend(leaves(entry.caches))
        elif entry is not None:
            found.append(entry)
    return found


def form_of(leaf: Any) -> str:
    """Return "span", "window" or "state". Subclasses may differ in anything, so they are states."""
    if type(leaf) in _SPANS:
        return "span"
    if type(leaf) is RotatingKVCache and leaf.keep == 0:
        return "window"
    return "state"


def traits_of(cache: WorkingCache) -> Traits:
    """Return what plans must respect for a model with such a working cache."""
    forms = [(form_of(leaf), leaf) for leaf in leaves(cache)]
    return Traits(
        reach=max((leaf.max_size for form, leaf in forms if form == "window"), default=0),
        stateful=any(form == "state" for form, _ in forms),
    )


@dataclass(frozen=True, slots=True)
class Span:
    """Keys and values of a run of tokens, ending with the segment's last one.

    `arrays` is any nesting of arrays shaped `[1, kv_heads, tokens, dim]`. `window` is None for
    layers that see everything, else the number of tokens that a later token can see.
    """

    arrays: Any
    num_tokens: int
    window: int | None = None


@dataclass(frozen=True, slots=True)
class State:
    """All attributes of a cache object at one position."""

    attributes: dict[str, Any]


class SegmentPayload:
    """The state that one segment adds, one part per leaf; None where a leaf holds nothing."""

    __slots__ = ("_nbytes", "_windows", "length", "parts")

    def __init__(self, length: int, parts: Sequence[Span | State | None]) -> None:
        self.length = length
        self.parts = tuple(parts)
        self._nbytes = sum(_nbytes(part) for part in self.parts)
        self._windows: dict[int, int] = {}
        for part in self.parts:
            if isinstance(part, Span) and part.window is not None:
                held = self._windows.get(part.window, part.num_tokens)
                self._windows[part.window] = min(held, part.num_tokens)

    @property
    def nbytes(self) -> int:
        return self._nbytes

    @property
    def restorable(self) -> bool:
        return not any(_is_missing(part) for part in self.parts)

    @property
    def whole(self) -> bool:
        return not any(isinstance(part, State) for part in self.parts)

    @property
    def windows(self) -> dict[int, int]:
        return self._windows

    def split(self, at: int, length: int) -> tuple[SegmentPayload, SegmentPayload]:
        """Return the payloads of the first `at` tokens and of the rest; end states stay behind."""
        assert length == self.length and 0 < at < length
        first: list[Span | State | None] = []
        second: list[Span | State | None] = []
        for part in self.parts:
            if isinstance(part, Span):
                upper, lower = _split_span(part, at, length)
                first.append(upper)
                second.append(lower)
            else:
                first.append(_MISSING if isinstance(part, State) else None)
                second.append(part)
        halves = SegmentPayload(at, first), SegmentPayload(length - at, second)
        _evaluate(halves)
        return halves

    def without_state(self) -> SegmentPayload:
        """Return the same payload with its end states dropped."""
        parts = [_MISSING if isinstance(part, State) else part for part in self.parts]
        return SegmentPayload(self.length, parts)


SegmentPath = Sequence[tuple[int, int, SegmentPayload]]
"""`(start, end, payload)` of consecutive segments, as `SegmentCache.payloads` gives them."""

_MISSING = State({})
"""Stands for an end state that was not kept at this position."""


def _is_missing(part: Span | State | None) -> bool:
    return isinstance(part, State) and not part.attributes


def _nbytes(part: Span | State | None) -> int:
    if part is None:
        return 0
    held = part.arrays if isinstance(part, Span) else part.attributes
    return sum(leaf.nbytes for leaf in arrays_in(held))


def arrays_in(tree: Any) -> list[mx.array]:
    if isinstance(tree, mx.array):
        return [tree]
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, list | tuple):
        return [array for part in tree for array in arrays_in(part)]
    return []


def _evaluate(payloads: Iterable[SegmentPayload]) -> None:
    arrays: list[mx.array] = []
    for payload in payloads:
        for part in payload.parts:
            if part is not None:
                held = part.arrays if isinstance(part, Span) else part.attributes
                arrays.extend(arrays_in(held))
    mx.eval(arrays)


def _cut(tree: Any, start: int, stop: int) -> Any:
    """Return the tokens `[start, stop)` of every array, in memory of their own."""
    return tree_map(lambda a: mx.contiguous(a[..., start:stop, :]), tree)


def _split_span(span: Span, at: int, length: int) -> tuple[Span, Span]:
    """Split a span: of what it holds, the last `length - at` tokens go below, the rest above."""
    below = min(length - at, span.num_tokens)
    above = span.num_tokens - below
    upper = Span(_cut(span.arrays, 0, above), above, span.window)
    lower = Span(_cut(span.arrays, above, span.num_tokens), below, span.window)
    return upper, lower


# -- taking ------------------------------------------------------------------------------------


def capture(
    cache: WorkingCache, position: int, start: int, end: int, *, with_state: bool, contained: bool
) -> SegmentPayload:
    """Copy the tokens `[start, end)` out of a working cache that stands at `position`.

    `with_state` takes end states too, which needs `end == position`. With `contained` a window
    holds all that a later token can see, even from before `start`.
    """
    assert 0 <= start < end <= position
    parts: list[Span | State | None] = []
    for leaf in leaves(cache):
        form = form_of(leaf)
        if form == "state":
            if with_state and end == position:
                parts.append(State(tree_map(_copy, vars(leaf))))
            else:
                parts.append(_MISSING)
        elif leaf.keys is None:
            parts.append(None)
        elif form == "window":
            num_tokens = min(leaf.max_size, end if contained else end - start)
            parts.append(_cut_window(leaf, end, num_tokens))
        else:
            arrays = (leaf.keys, leaf.values)
            parts.append(Span(_cut(arrays, start, end), end - start))
    payload = SegmentPayload(end - start, parts)
    _evaluate([payload])
    return payload


def section(segments: SegmentPath, start: int, end: int, *, contained: bool) -> SegmentPayload:
    """Return the state of the tokens `[start, end)`, however `segments` are cut.

    As `capture` would have taken it, but of a window only what is held, and end states only if a
    segment ends at `end`. `segments` lie end to end from the root, without holes. Arrays are
    lazy: shapes can be asked for at no cost, and nothing is copied if a segment fits.
    Raises LookupError if `segments` end before `end`.
    """
    assert 0 <= start < end
    behind = [segment for segment in segments if segment[0] < end]
    if not behind or behind[-1][1] < end:
        raise LookupError(f"tokens up to {end} are not held")
    _, tip_end, tip = behind[-1]
    parts: list[Span | State | None] = []
    for index, part in enumerate(tip.parts):
        if isinstance(part, State):
            parts.append(part if end == tip_end else _MISSING)
        elif part is None:
            parts.append(None)
        elif part.window is None:
            pieces = _collect(behind, index, start, end)
            parts.append(Span(_joined(pieces, part), end - start))
        else:
            first = max(0, end - part.window) if contained else max(start, end - part.window)
            pieces, first = _held(behind, index, first, end)
            parts.append(Span(_joined(pieces, part), end - first, part.window))
    return SegmentPayload(end - start, parts)


def _joined(pieces: list[Any] | None, like: Span) -> Any:
    """Join arrays along the tokens; no pieces make arrays like those of `like` without tokens."""
    if not pieces:
        return tree_map(lambda a: a[..., :0, :], like.arrays)
    if len(pieces) == 1:
        return pieces[0]
    return tree_map(lambda *arrays: mx.concatenate(list(arrays), axis=TOKEN_AXIS), *pieces)


def _copy(value: Any) -> Any:
    """Copy an attribute: later writes in place must not reach the copy."""
    return mx.contiguous(value) if isinstance(value, mx.array) else value


def _cut_window(leaf: RotatingKVCache, end: int, num_tokens: int) -> Span:
    """Take the `num_tokens` before `end` from a sliding window.

    Right after a chunk the buffer holds the chunk and the window before it, while decoding the
    last `max_size` tokens, in both cases in temporal order once the ring is unrolled.
    """
    unroll: Callable[[Any], mx.array] = leaf._temporal_order
    keys, values = unroll(leaf.keys), unroll(leaf.values)
    last = keys.shape[TOKEN_AXIS]
    stop = last - (leaf.offset - end)
    start = stop - num_tokens
    if start < 0:
        num_tokens, start = max(0, stop), 0  # overwritten already: `windows` tells
    return Span(_cut((keys, values), start, max(start, stop)), num_tokens, leaf.max_size)


# -- restoring ---------------------------------------------------------------------------------


def restore(
    fresh: WorkingCache,
    segments: SegmentPath,
    num_tokens: int,
    capacity: int,
) -> None:
    """Bring an empty working cache to the state after `num_tokens`, in place.

    `segments` are `(start, end, payload)` from the root on, without holes, the last one reaching
    at least to `num_tokens`. Buffers get room for `capacity` tokens, so that growing does not
    copy them again. Raises LookupError if a needed token or end state is not there: a miss.
    """
    for index, leaf in enumerate(leaves(fresh)):
        form = form_of(leaf)
        tip_start, tip_end, tip = segments[-1]
        if form == "state":
            part = tip.parts[index]
            if not isinstance(part, State) or _is_missing(part) or tip_end != num_tokens:
                raise LookupError(f"no end state at {num_tokens} in [{tip_start}, {tip_end})")
            vars(leaf).update(tree_map(_copy, part.attributes))
            continue
        needed = num_tokens if form == "span" else min(num_tokens, leaf.max_size)
        pieces = _collect(segments, index, num_tokens - needed, num_tokens)
        if pieces is None:
            continue
        room = 0 if form == "window" else max(0, capacity - num_tokens)
        _fill(leaf, pieces, num_tokens, room)
    mx.eval(arrays_of(fresh))


def _collect(segments: SegmentPath, index: int, first: int, last: int) -> list[Any] | None:
    """Return the arrays of leaf `index` for the tokens `[first, last)`, in order of position.

    None for a leaf that the model does not use. Raises LookupError if a token is not held.
    """
    if segments[-1][2].parts[index] is None:
        return None
    pieces, reached = _held(segments, index, first, last)
    if reached > first:
        raise LookupError(f"tokens [{first}, {reached}) are not held")
    return pieces


def _held(segments: SegmentPath, index: int, first: int, last: int) -> tuple[list[Any], int]:
    """Return what is held of leaf `index` right before `last`, in order of position.

    The second value is where that begins: `first`, or later if a token in between is not held.
    """
    pieces: list[Any] = []
    wanted = last
    for segment_start, end, payload in reversed(segments):
        part = payload.parts[index]
        if wanted <= first or part is None:
            break
        assert isinstance(part, Span)
        held_from = end - part.num_tokens
        if segment_start >= wanted and held_from >= wanted:
            continue  # a window behind it reaches back before it
        if held_from >= wanted or end < wanted:
            break
        start, stop = max(first, held_from), wanted
        if start == held_from and stop == end:
            pieces.append(part.arrays)
        else:
            a, b = start - held_from, stop - held_from
            pieces.append(tree_map(lambda x, a=a, b=b: x[..., a:b, :], part.arrays))
        wanted = start
    pieces.reverse()
    return pieces, wanted


def _fill(leaf: Any, pieces: list[Any], num_tokens: int, room: int) -> None:
    """Set keys and values from consecutive pieces, with `room` unused tokens behind them."""

    def join(*arrays: mx.array) -> mx.array:
        parts = list(arrays)
        if room and type(leaf) is not ConcatenateKVCache:
            shape = list(parts[0].shape)
            shape[TOKEN_AXIS] = room
            parts.append(mx.zeros(shape, parts[0].dtype))
        return mx.concatenate(parts, axis=TOKEN_AXIS)

    leaf.keys, leaf.values = tree_map(join, *pieces)
    leaf.offset = num_tokens
    if type(leaf) is RotatingKVCache:
        leaf._idx = leaf.keys.shape[TOKEN_AXIS]


def reserve_room(cache: WorkingCache, capacity: int) -> None:
    """Grow the plain buffers to `capacity` tokens at once, if they are smaller.

    mlx-lm grows a buffer by steps and copies it at each; over a long prefill that is quadratic.
    """
    for leaf in leaves(cache):
        if type(leaf) is not KVCache or leaf.keys is None or leaf.values is None:
            continue
        room = capacity - leaf.keys.shape[TOKEN_AXIS]
        if room > 0:
            leaf.keys, leaf.values = (
                mx.concatenate(
                    [a, mx.zeros((*a.shape[:-2], room, a.shape[-1]), a.dtype)], axis=TOKEN_AXIS
                )
                for a in (leaf.keys, leaf.values)
            )


def arrays_of(cache: WorkingCache) -> list[mx.array]:
    """Return every array in a working cache, for `mx.eval`."""
    arrays: list[mx.array] = []
    for leaf in leaves(cache):
        arrays.extend(arrays_in(vars(leaf)))
    return arrays

"""Capture and restore, bit for bit, for every form of cache that mlx-lm has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    ChunkedKVCache,
    ConcatenateKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
)

from kvserve.cache.codec import (
    SegmentPayload,
    WorkingCache,
    arrays_of,
    capture,
    leaves,
    reserve_room,
    restore,
    traits_of,
)
from kvserve.cache.codec_forms import fits, footprint, forms_of
from kvserve.cache.plan import Traits

HEADS, DIM = 2, 64


def keys_for(start: int, stop: int, dim: int = DIM) -> mx.array:
    """Return `[1, heads, stop - start, dim]`, each token unlike any other."""
    tokens = mx.arange(start, stop, dtype=mx.float32)[None, None, :, None]
    rest = mx.arange(HEADS)[None, :, None, None] * 0.25 + mx.arange(dim) * 1e-3
    return tokens + rest


def feed(cache: WorkingCache, start: int, stop: int, value_dim: int = DIM) -> None:
    """Do to a working cache what a model does that is fed the tokens `[start, stop)`."""
    for leaf in leaves(cache):
        if isinstance(leaf, ArraysCache):
            leaf[0] = mx.full((1, 3), float(stop))
            leaf[1] = keys_for(max(0, stop - 2), stop)
        else:
            if isinstance(leaf, ChunkedKVCache):
                leaf.maybe_trim_front()
            keys, values = keys_for(start, stop), keys_for(start, stop, value_dim) + 0.5
            leaf.update_and_fetch(keys, values)
    mx.eval(arrays_of(cache))


def seen(leaf: Any) -> list[Any]:
    """Return all that later tokens depend on, in temporal order."""
    kind = type(leaf).__name__
    if kind == "ArraysCache":
        return [part.tolist() for part in leaf.cache]
    if leaf.keys is None:
        return [leaf.offset]
    if kind == "RotatingKVCache":
        order = leaf._temporal_order
        if leaf.keep == 0:
            last = min(leaf.offset, leaf.max_size)
            held = [order(part)[..., -last:, :] for part in (leaf.keys, leaf.values)]
        else:
            held = [order(part) for part in (leaf.keys, leaf.values)]
        return [leaf.offset, *(part.tolist() for part in held)]
    if kind == "QuantizedKVCache":
        parts = [
            part[..., : leaf.offset, :] for whole in (leaf.keys, leaf.values) for part in whole
        ]
        return [leaf.offset, *(part.tolist() for part in parts)]
    held = list(leaf.keys_and_values())
    return [leaf.offset, *(part.tolist() for part in held)]


Make = Callable[[], WorkingCache]


def quantized() -> Any:
    return QuantizedKVCache(group_size=32, bits=8)


def nested(*parts: Any) -> Any:
    made: Callable[..., Any] = CacheList
    return made(*parts)


MAKES: dict[str, Make] = {
    "plain": lambda: [KVCache(), KVCache()],
    "concatenated": lambda: [ConcatenateKVCache()],
    "quantized": lambda: [quantized()],
    "window": lambda: [RotatingKVCache(max_size=8)],
    "window_and_plain": lambda: [RotatingKVCache(max_size=8), KVCache(), RotatingKVCache(4)],
    "kept_window": lambda: [RotatingKVCache(max_size=8, keep=2), KVCache()],
    "arrays": lambda: [ArraysCache(2), KVCache()],
    "chunked": lambda: [ChunkedKVCache(8), KVCache()],
    "nested": lambda: [nested(KVCache(), nested(RotatingKVCache(8), ArraysCache(2))), None],
}
FLEETING = {"kept_window", "arrays", "chunked", "nested"}


def test_traits_tell_windows_and_states() -> None:
    assert traits_of(MAKES["plain"]()) == traits_of(MAKES["quantized"]()) == Traits()
    assert traits_of(MAKES["window_and_plain"]()) == Traits(reach=8)
    assert traits_of(MAKES["nested"]()) == Traits(reach=8, stateful=True)
    assert traits_of(MAKES["kept_window"]()) == Traits(stateful=True)


@pytest.mark.parametrize("name", MAKES)
@pytest.mark.parametrize("steps", [(5, 12, 13, 14, 15, 16, 27, 28), (1, 2, 3, 4, 30, 31, 50)])
def test_a_state_restored_at_any_cut_goes_on_as_the_first_did(
    name: str, steps: tuple[int, ...]
) -> None:
    make = MAKES[name]
    first = make()
    segments: list[tuple[int, int, SegmentPayload]] = []
    begin = 0
    for index, end in enumerate(steps):
        feed(first, begin, end)
        part = capture(first, end, begin, end, with_state=True, contained=False)
        segments.append((begin, end, part))
        begin = end
        for capacity in (end, end + 40):
            second = make()
            restore(second, segments, end, capacity)
            reference = [seen(leaf) for leaf in leaves(first)]
            assert [seen(leaf) for leaf in leaves(second)] == reference
            # The same tokens, in chunks and one by one, lead to the same states.
            again, rest = make(), steps[index + 1 :]
            restore(again, segments, end, capacity)
            at = end
            for stop in rest:
                feed(again, at, stop)
                at = stop
            whole, at = make(), 0
            for stop in steps:
                feed(whole, at, stop)
                at = stop
            assert [seen(leaf) for leaf in leaves(again)] == [seen(leaf) for leaf in leaves(whole)]


@pytest.mark.parametrize("name", sorted(MAKES.keys() - FLEETING))
def test_any_cut_inside_a_chunk_can_be_taken_right_after_it(name: str) -> None:
    make = MAKES[name]
    for end in range(11, 31):
        cache = make()
        feed(cache, 0, 10)
        feed(cache, 10, 30)
        segments = [(0, end, capture(cache, 30, 0, end, with_state=False, contained=False))]
        second, expected = make(), make()
        restore(second, segments, end, end)
        feed(expected, 0, end)
        assert [seen(leaf) for leaf in leaves(second)] == [seen(leaf) for leaf in leaves(expected)]


@given(
    cuts=st.sets(st.integers(1, 39), max_size=6),
    splits=st.lists(st.integers(1, 39), max_size=6),
    contained=st.booleans(),
    name=st.sampled_from(["plain", "quantized", "window", "window_and_plain"]),
)
@settings(max_examples=40)
def test_split_segments_hold_what_the_whole_held(
    cuts: set[int], splits: list[int], contained: bool, name: str
) -> None:
    make, segments, begin = MAKES[name], [], 0
    cache = make()
    for end in [*sorted(cuts), 40]:
        feed(cache, begin, end)
        part = capture(cache, end, begin, end, with_state=False, contained=contained)
        segments.append((begin, end, part))
        begin = end
    expected = [seen(leaf) for leaf in leaves(cache)]
    for at in splits:
        for index, (start, end, part) in enumerate(segments):
            if start < at < end:
                upper, lower = part.split(at - start, end - start)
                assert upper.nbytes + lower.nbytes == part.nbytes
                segments[index : index + 1] = [(start, at, upper), (at, end, lower)]
                break
    second = make()
    restore(second, segments, 40, 40)
    assert [seen(leaf) for leaf in leaves(second)] == expected


def test_a_plain_segment_restores_in_its_middle() -> None:
    cache = MAKES["plain"]()
    feed(cache, 0, 20)
    segment = capture(cache, 20, 0, 20, with_state=False, contained=False)
    for length in range(1, 21):
        second, expected = MAKES["plain"](), MAKES["plain"]()
        restore(second, [(0, 20, segment)], length, 30)
        feed(expected, 0, length)
        assert [seen(leaf) for leaf in leaves(second)] == [seen(leaf) for leaf in leaves(expected)]


def test_what_is_not_held_is_a_lookup_error() -> None:
    windowed = MAKES["window"]()
    feed(windowed, 0, 30)
    part = capture(windowed, 30, 0, 30, with_state=False, contained=False)
    upper, _ = part.split(26, 30)
    for segments, length in (([(0, 26, upper)], 26), ([(0, 30, part)], 25)):
        with pytest.raises(LookupError):
            restore(MAKES["window"](), segments, length, 40)
    stateful = MAKES["arrays"]()
    feed(stateful, 0, 10)
    part = capture(stateful, 10, 0, 10, with_state=True, contained=False)
    bare = part.without_state()
    assert part.restorable and not bare.restorable and not bare.whole
    assert bare.nbytes < part.nbytes
    for payload, length in ((bare, 10), (part, 9)):
        with pytest.raises(LookupError):
            restore(MAKES["arrays"](), [(0, 10, payload)], length, 20)


def test_windows_that_were_overwritten_show_what_is_left() -> None:
    cache = MAKES["window"]()
    feed(cache, 0, 20)
    for position in range(20, 26):
        feed(cache, position, position + 1)
    assert capture(cache, 26, 10, 26, with_state=False, contained=False).windows == {8: 8}
    assert capture(cache, 26, 10, 22, with_state=False, contained=False).windows == {8: 4}
    assert capture(cache, 26, 5, 10, with_state=False, contained=True).windows == {8: 0}


@pytest.mark.parametrize("name", MAKES)
def test_payloads_do_not_change_when_the_working_cache_goes_on(name: str) -> None:
    make = MAKES[name]
    cache = make()
    feed(cache, 0, 20)
    feed(cache, 20, 21)
    payload = capture(cache, 21, 0, 21, with_state=True, contained=False)

    def content(segment: SegmentPayload) -> list[Any]:
        second = make()
        restore(second, [(0, 21, segment)], 21, 60)
        found = [seen(leaf) for leaf in leaves(second)]
        # What was restored is written too, and must not reach the payload either.
        feed(second, 21, 30)
        for position in range(30, 35):
            feed(second, position, position + 1)
        return found

    before = content(payload)
    for position in range(21, 45):
        feed(cache, position, position + 1)
    feed(cache, 45, 300)
    assert content(payload) == before


def test_writing_on_after_a_capture_does_not_copy_the_buffer() -> None:
    if mx.default_device() != mx.cpu:
        pytest.skip("counts the bytes of one device")
    cache: WorkingCache = [KVCache()]
    feed(cache, 0, 3)
    reserve_room(cache, 20_000)
    mx.eval(arrays_of(cache))
    buffer_nbytes = sum(array.nbytes for array in arrays_of(cache))
    held = capture(cache, 3, 0, 3, with_state=False, contained=False)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    feed(cache, 3, 4)
    assert mx.get_peak_memory() - before < buffer_nbytes / 4
    assert held.nbytes < buffer_nbytes / 1000


def test_zero_width_values_and_unused_leaves_are_kept_as_they_are() -> None:
    cache: WorkingCache = [KVCache()]
    feed(cache, 0, 10, value_dim=0)
    segment = capture(cache, 10, 0, 10, with_state=False, contained=False)
    second: WorkingCache = [KVCache()]
    restore(second, [(0, 10, segment)], 10, 20)
    assert seen(second[0]) == seen(cache[0])
    assert second[0].values.shape[-1] == 0

    half_used: WorkingCache = [KVCache(), KVCache(), RotatingKVCache(8)]
    feed(half_used[:1], 0, 10)
    segment = capture(half_used, 10, 0, 10, with_state=False, contained=False)
    third: WorkingCache = [KVCache(), KVCache(), RotatingKVCache(8)]
    restore(third, [(0, 10, segment)], 6, 20)
    assert [leaf.offset for leaf in third] == [6, 0, 0]
    assert third[1].keys is None


def test_room_that_is_reserved_is_used_without_growing() -> None:
    cache: WorkingCache = [KVCache(), RotatingKVCache(8)]
    feed(cache, 0, 5)
    reserve_room(cache, 700)
    reserve_room(cache, 100)
    for start, stop in ((5, 400), (400, 700)):
        feed(cache, start, stop)
    assert cache[0].keys.shape[2] == 700
    plain: WorkingCache = [KVCache()]
    feed(plain, 0, 700)
    assert seen(cache[0]) == seen(plain[0])


@pytest.mark.parametrize("name", sorted(MAKES))
@pytest.mark.parametrize("length", [1, 100, 256, 300])
def test_footprints_are_upper_bounds(name: str, length: int) -> None:
    small = MAKES[name]()
    feed(small, 0, 3)
    bound = footprint(small)
    cache = MAKES[name]()
    feed(cache, 0, length)
    assert sum(array.nbytes for array in arrays_of(cache)) <= bound.working(length)
    if name in ("chunked", "kept_window"):
        return  # what such a state takes is counted once it is captured
    for start in {0, length // 2}:
        part = capture(cache, length, start, length, with_state=True, contained=False)
        assert part.nbytes <= bound.segment(length - start, True)


@pytest.mark.parametrize("name", MAKES)
def test_a_payload_fits_its_own_model_and_no_other(name: str) -> None:
    def used(make: Make, stop: int) -> WorkingCache:
        cache = make()
        for begin in range(stop):
            feed(cache, begin, begin + 1)
        return cache

    cache = used(MAKES[name], 20)
    whole = capture(cache, 20, 12, 20, with_state=True, contained=False)
    for other, make in MAKES.items():
        assert fits(whole, forms_of(used(make, 3))) == (other == name)
    forms = forms_of(used(MAKES[name], 3))
    assert all(fits(part, forms) for part in (*whole.split(3, 8), whole.without_state()))


def test_a_payload_of_another_width_or_of_nothing_does_not_fit() -> None:
    def taken(dim: int) -> tuple[WorkingCache, SegmentPayload]:
        cache: WorkingCache = [KVCache()]
        feed(cache, 0, 5, dim)
        return cache, capture(cache, 5, 0, 5, with_state=False, contained=False)

    cache, payload = taken(DIM)
    _, wider = taken(2 * DIM)
    assert fits(payload, forms_of(cache))
    assert not fits(wider, forms_of(cache))
    assert not fits(SegmentPayload(5, [None]), forms_of(cache))
    assert not fits(payload, (None,))

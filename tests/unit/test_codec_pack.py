"""Payloads to bytes and back: bit for bit, type for type, and what cannot be stored is refused."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import KVCache, RotatingKVCache

from kvserve.cache.codec import (
    SegmentPayload,
    Span,
    State,
    WorkingCache,
    arrays_of,
    capture,
    leaves,
    restore,
)
from kvserve.cache.codec_pack import Unstorable, describe, pack, pieces, unpack
from kvserve.store.segments import PackedSegment, StoredPath, StoredSegment
from tests.unit.test_codec import FLEETING, MAKES, feed, seen

Made = tuple[int, int, SegmentPayload]
NOTHING = StoredPath(b"", np.zeros(0, np.uint32), 0, ())


def packed(payload: SegmentPayload, start: int = 0) -> PackedSegment:
    """Pack as a file would have it: the layout is JSON, the arrays lie back to back."""
    spec = describe(payload, start, start + payload.length)
    data = pack(payload)
    file = b"?" + b"".join(bytes(buffer) for buffer in data)
    views, offset = [], 1
    for array in spec.arrays:
        views.append(memoryview(file)[offset : offset + array.nbytes])
        offset += array.nbytes
    assert offset == len(file)
    return PackedSegment(replace(spec, layout=json.loads(json.dumps(spec.layout))), views)


def content(tree: Any) -> Any:
    """Return a value with its types spelled out and its arrays as bytes."""
    if isinstance(tree, mx.array):
        view: Any = mx.contiguous(tree)
        return str(tree.dtype), tree.shape, bytes(memoryview(view))
    if isinstance(tree, dict):
        return {key: content(part) for key, part in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree), [content(part) for part in tree]
    return type(tree), repr(tree)


def content_of(payload: SegmentPayload) -> list[Any]:
    parts: list[Any] = []
    for part in payload.parts:
        if isinstance(part, Span):
            parts.append((part.num_tokens, part.window, content(part.arrays)))
        else:
            parts.append(None if part is None else content(part.attributes))
    return [payload.length, *parts]


def state(**attributes: Any) -> SegmentPayload:
    return SegmentPayload(1, [State(attributes)])


def through(**attributes: Any) -> dict[str, Any]:
    """Return a state's attributes after a round trip, which must be what they were."""
    payload = state(**attributes)
    back = unpack(packed(payload))
    assert content_of(back) == content_of(payload)
    part = back.parts[0]
    assert isinstance(part, State)
    return part.attributes


# -- round trips -------------------------------------------------------------------------------


UNSIGNED: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
DTYPES = [
    *(mx.uint8, mx.int8, mx.uint16, mx.int16, mx.uint32, mx.int32, mx.uint64, mx.int64),
    *(mx.float16, mx.bfloat16, mx.float32, mx.float64, mx.complex64),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 5), (1, 2, 0, 4), (257,)], ids=str)
def test_every_bit_pattern_of_every_number_format_comes_back(
    dtype: mx.Dtype, shape: tuple[int, ...]
) -> None:
    random = np.random.default_rng(7)
    size = dtype.size * int(np.prod(shape, dtype=int))
    bits = np.frombuffer(random.bytes(size), UNSIGNED[dtype.size]).reshape(shape)
    array = mx.array(bits).view(dtype, stream=mx.cpu)  # NaNs, infinities, denormals among them
    held = through(x=array, y=[array, array])
    assert held["x"].dtype == dtype and held["x"].shape == shape
    assert content(held["x"])[2] == bits.tobytes()


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32, mx.complex64], ids=str)
def test_signalling_nans_keep_their_payloads(dtype: mx.Dtype) -> None:
    patterns = {
        2: [0x7C01, 0xFD55, 0x7F81, 0xFFAA],
        4: [0x7F800001, 0xFFA55AA5],
        8: [0x7F8000017FBFFFFF, 0xFF800001FFA00000],
    }[dtype.size]
    bits = np.array(patterns, UNSIGNED[dtype.size])
    held = through(x=mx.array(bits).view(dtype))
    assert content(held["x"])[2] == bits.tobytes()


def test_truth_values_come_back() -> None:
    assert through(x=mx.array([True, False, True]))["x"].tolist() == [True, False, True]


def test_arrays_that_are_not_contiguous_are_packed_in_their_logical_order() -> None:
    table = mx.arange(24).reshape(2, 3, 4)
    for view in (table.T, table[:, ::2], table[1, 1:, 1:3], mx.broadcast_to(table[0, 0], (5, 4))):
        assert through(x=view)["x"].tolist() == view.tolist()


def test_attributes_come_back_with_their_types() -> None:
    held = through(
        offset=7,
        flag=True,
        zero=0,
        no=False,
        nothing=None,
        name="ring \u00e9 \u2603",
        cache=[mx.ones((1, 2)), None, (mx.zeros((2,)), 3)],
        pair=(1, (2.0, [])),
        table={"a": mx.array(1), "b": {"c": (True,)}, "": ()},
        low=-(2**63),
        high=2**63 - 1,
    )
    assert held["flag"] is True and held["zero"] == 0 and type(held["zero"]) is int
    assert type(held["cache"]) is list and type(held["cache"][2]) is tuple
    assert list(held["table"]) == ["a", "b", ""]


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_come_back_exactly(value: float) -> None:
    held = through(x=value)
    assert type(held["x"]) is float and held["x"].hex() == value.hex()


def cyclic() -> list[Any]:
    held: list[Any] = []
    held.append(held)
    return held


@pytest.mark.parametrize(
    "value",
    [
        *(object(), b"bytes", {1, 2}, {1: 2}, 1j, len, np.float64(1), np.zeros(2), mx.float16),
        *(OrderedDict(a=1), [{"deep": [object()]}], float("nan"), float("inf"), 2**63),
        cyclic(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_files_do_not_hold_is_refused(value: Any) -> None:
    # SegmentPayload counts bytes, which a cycle would never end.
    payload = state(x=1)
    part = payload.parts[0]
    assert isinstance(part, State)
    part.attributes["x"] = value
    with pytest.raises(Unstorable):
        describe(payload, 0, 1)


@pytest.mark.parametrize("name", MAKES)
def test_every_form_of_cache_restores_from_its_bytes(name: str) -> None:
    make, begin = MAKES[name], 0
    cache = make()
    held: list[Made] = []
    loaded: list[Made] = []
    for end in (5, 12, 13, 30, 50):
        feed(cache, begin, end)
        part = capture(cache, end, begin, end, with_state=True, contained=end == 13)
        back = unpack(packed(part, begin))
        assert content_of(back) == content_of(part)
        assert (back.nbytes, back.windows) == (part.nbytes, part.windows)
        assert (back.restorable, back.whole) == (part.restorable, part.whole)
        held.append((begin, end, part))
        loaded.append((begin, end, back))
        second, third = make(), make()
        restore(second, held, end, end + 9)
        restore(third, loaded, end, end + 9)
        assert [seen(leaf) for leaf in leaves(third)] == [seen(leaf) for leaf in leaves(second)]
        begin = end


def test_leaves_without_state_and_states_that_were_not_kept_come_back_as_such() -> None:
    cache: WorkingCache = [KVCache(), KVCache(), *MAKES["arrays"]()[:1]]
    feed([cache[0], cache[2]], 0, 4)
    part = capture(cache, 4, 0, 4, with_state=True, contained=False).without_state()
    back = unpack(packed(part))
    assert back.parts[1] is None
    assert not back.restorable and not back.whole
    assert content_of(back) == content_of(part)


def test_packed_bytes_do_not_belong_to_mlx() -> None:
    cache = MAKES["plain"]()
    feed(cache, 0, 9)
    part = capture(cache, 9, 0, 9, with_state=True, contained=False)
    before = mx.get_active_memory()
    data = pack(part)
    assert mx.get_active_memory() == before
    expected = [bytes(buffer) for buffer in data]
    del cache, part
    mx.clear_cache()
    mx.eval(mx.ones((4, 1000)))  # takes the memory that has become free
    assert [bytes(buffer) for buffer in data] == expected


def test_a_description_costs_no_computation() -> None:
    if mx.default_device() != mx.cpu:
        pytest.skip("counts the bytes of one device")
    lazy = mx.zeros((1, 4, 1000, 256)) + 1
    part = SegmentPayload(1000, [Span((lazy, lazy), 1000)])
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    describe(part, 0, 1000)
    assert mx.get_peak_memory() <= before


# -- what does not fit -------------------------------------------------------------------------


def damaged(change: Callable[[Any], Any]) -> PackedSegment:
    cache: WorkingCache = [KVCache(), RotatingKVCache(8)]
    feed(cache, 0, 12)
    whole = packed(capture(cache, 12, 0, 12, with_state=False, contained=False))
    return replace(whole, **change(whole))


@pytest.mark.parametrize(
    "change",
    [
        lambda p: {"data": p.data[:-1]},
        lambda p: {"data": [*p.data[:-1], bytes(p.data[-1])[:-1]]},
        lambda p: {"data": [*p.data, b""]},
        lambda p: {"spec": replace(p.spec, layout={})},
        lambda p: {"spec": replace(p.spec, layout=p.spec.layout[:1])},
        lambda p: {"spec": replace(p.spec, end=13)},
        lambda p: {"spec": replace(p.spec, layout=[{**p.spec.layout[0], "tokens": 11}, None])},
        lambda p: {"spec": replace(p.spec, arrays=(replace(p.spec.arrays[0], dtype="F8"),))},
        lambda p: {
            "spec": replace(
                p.spec,
                arrays=tuple(
                    replace(a, shape=(a.shape[0] * a.shape[1], *a.shape[2:])) for a in p.spec.arrays
                ),
            )
        },
    ],
)
def test_bytes_that_do_not_fit_their_description_are_refused(
    change: Callable[[PackedSegment], dict[str, Any]],
) -> None:
    with pytest.raises(ValueError, match=r".*"):
        unpack(damaged(change))


# -- what a write takes ------------------------------------------------------------------------


def stored(segments: Sequence[Any], num_tokens: int | None = None) -> StoredPath:
    """Return what the index knows after these specs were written, one run each."""
    found = tuple(
        StoredSegment(run, 0, s.start, s.end, s.nbytes, s.restorable, s.whole, s.windows, True)
        for run, s in enumerate(segments)
    )
    length = found[-1].end if num_tokens is None else num_tokens
    return StoredPath(b"", np.zeros(length, np.uint32), length, found)


def captured(name: str, ends: Sequence[int], chunk: int = 1000) -> tuple[WorkingCache, list[Made]]:
    cache, held, begin = MAKES[name](), [], 0
    for end in ends:
        feed(cache, begin, end)
        part = capture(cache, end, begin, end, with_state=True, contained=False)
        held.append((begin, end, part))
        begin = end
    return cache, held


def restores(name: str, segments: Sequence[Made], length: int) -> bool:
    """Whether the state after `length` tokens can be had from them; asserts that it is right."""
    expected, found = MAKES[name](), MAKES[name]()
    feed(expected, 0, length)
    try:
        restore(found, [part for part in segments if part[0] < length], length, length)
    except LookupError:
        return False
    assert [seen(leaf) for leaf in leaves(found)] == [seen(leaf) for leaf in leaves(expected)]
    return True


def test_segments_that_fit_are_packed_as_they_are() -> None:
    _, held = captured("nested", (6, 20, 33))
    (made,) = pieces(held, NOTHING, [(0, 33)])
    assert [(p.spec.start, p.spec.end, p.contained) for p in made] == [
        *((0, 6, False), (6, 20, False), (20, 33, False))
    ]
    for piece, (start, end, payload) in zip(made, held, strict=True):
        assert piece.spec == describe(payload, start, end)
        assert piece.pack(held) == pack(payload)


@given(
    ends=st.sets(st.integers(1, 39), max_size=6),
    disk=st.sets(st.integers(1, 39), max_size=4),
    parts=st.sets(st.integers(1, 39), max_size=3),
    start=st.integers(0, 39),
    name=st.sampled_from(["plain", "quantized", "window", "window_and_plain"]),
)
@settings(max_examples=60, deadline=None)
def test_whatever_the_disk_has_pieces_complete_it(
    ends: set[int], disk: set[int], parts: set[int], start: int, name: str
) -> None:
    """The disk has other cuts, made by one capture so that its windows have holes."""
    cache = MAKES[name]()
    feed(cache, 0, 40)
    whole = capture(cache, 40, 0, 40, with_state=False, contained=False)
    there: list[Made] = []
    begin, rest = 0, whole
    for at in sorted({*(d for d in disk if d < start), *({start} - {0})}):
        upper, rest = rest.split(at - begin, 40 - begin)
        there.append((begin, at, upper))
        begin = at
    path = stored([describe(p, a, b) for a, b, p in there]) if there else NOTHING
    _, held = captured(name, [*sorted(ends), 40])
    bounds = [start, *sorted(part for part in parts if part > start), 40]
    ranges = list(pairwise(bounds))
    made = [piece for group in pieces(held, path, ranges) for piece in group]
    assert made[0].spec.start == start and made[-1].spec.end == 40
    segments = list(there)
    for piece in made:
        back = unpack(PackedSegment(piece.spec, piece.pack(held)))
        segments.append((piece.spec.start, piece.spec.end, back))
        if restores(name, held, piece.spec.end):
            assert restores(name, segments, piece.spec.end)
    assert {end for end in ends if end > start} <= {piece.spec.end for piece in made}


def test_a_range_that_begins_in_a_segment_takes_its_lower_part_with_the_state() -> None:
    _, held = captured("arrays", (10, 20))
    (made,) = pieces(held, stored([describe(held[0][2], 0, 10)]), [(14, 20)])
    assert [(p.spec.start, p.spec.end, p.spec.restorable) for p in made] == [(14, 20, True)]
    back = unpack(PackedSegment(made[0].spec, made[0].pack(held)))
    assert content(back.parts[0].attributes) == content(held[1][2].parts[0].attributes)  # type: ignore[union-attr]


def test_a_range_that_ends_in_a_segment_goes_without_its_state() -> None:
    _, held = captured("arrays", (10, 20))
    (made,) = pieces(held, NOTHING, [(0, 17)])
    assert [(p.spec.start, p.spec.end, p.spec.restorable) for p in made] == [
        *((0, 10, True), (10, 17, False))
    ]


def test_several_ranges_count_as_stored_for_those_behind_them() -> None:
    _, held = captured("window", (10, 20, 22, 30))
    specs = [describe(payload, start, end) for start, end, payload in held]
    gone = stored(specs[:3])
    gone = replace(gone, segments=(gone.segments[0], *(
        replace(segment, readable=False) for segment in gone.segments[1:]
    )))  # fmt: skip
    healed, tail = pieces(held, gone, [(10, 22), (22, 30)])
    assert not any(piece.contained for piece in (*healed, *tail))
    (alone,) = pieces(held, gone, [(22, 24)])
    assert alone[0].contained and alone[0].spec.windows == {8: 8}


def test_pieces_follow_a_path_that_was_split_since() -> None:
    _, held = captured("window_and_plain", (12, 30))
    (made,) = pieces(held, NOTHING, [(0, 30)])
    before = [piece.pack(held) for piece in made]
    start, end, payload = held[1]
    upper, lower = payload.split(7, end - start)
    now = [held[0], (start, start + 7, upper), (start + 7, end, lower)]
    assert [piece.pack(now) for piece in made] == before


def test_a_state_that_is_gone_since_is_a_lookup_error() -> None:
    _, held = captured("arrays", (10, 20))
    (made,) = pieces(held, NOTHING, [(0, 20)])
    thinned = [(0, 10, held[0][2].without_state()), held[1]]
    with pytest.raises(LookupError):
        made[0].pack(thinned)
    assert made[1].pack(thinned) == made[1].pack(held)
    with pytest.raises(LookupError):
        made[1].pack(held[:1])


def test_a_path_that_is_too_short_is_a_lookup_error() -> None:
    _, held = captured("plain", (10, 20))
    for path in (held, held[:1], []):
        with pytest.raises(LookupError):
            pieces(path, NOTHING, [(0, 21)])


def test_windows_that_ram_lacks_too_are_stored_as_far_as_held() -> None:
    cache = MAKES["window"]()
    feed(cache, 0, 30)
    whole = capture(cache, 30, 0, 30, with_state=False, contained=False)
    upper, lower = whole.split(25, 30)
    held = [(0, 25, upper), (25, 30, lower)]
    made = pieces(held, NOTHING, [(0, 22), (22, 24), (24, 30)])
    assert [piece.spec.windows for (piece, *_) in made] == [{8: 0}, {8: 2}, {8: 3}]
    assert [piece.spec.windows for piece in made[2]] == [{8: 3}, {8: 5}]


@pytest.mark.parametrize("name", sorted(MAKES.keys() - FLEETING))
def test_plain_loaded_segments_restore_where_they_are_left_early(name: str) -> None:
    """Of a run that a prompt leaves early, only the leading tokens count."""
    _, held = captured(name, (10, 20))
    cache = MAKES[name]()
    feed(cache, 0, 16)
    tail = capture(cache, 16, 12, 16, with_state=False, contained=True)
    mx.eval(arrays_of(cache))
    overlapping = [*held, (12, 16, tail)]
    second = MAKES[name]()
    restore(second, [(s, e, unpack(packed(p, s))) for s, e, p in overlapping], 16, 16)
    assert [seen(leaf) for leaf in leaves(second)] == [seen(leaf) for leaf in leaves(cache)]

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest

from kvserve.store.layout import check_spec
from kvserve.store.segments import DTYPE_NBYTES, ArraySpec, PackedSegment, SegmentSpec
from kvserve.store.slicing import slice_segment, slice_spec
from tests.unit.snapshot_fixtures import WINDOW, bytes_of, make_segment, make_spec

START, END = 10, 20
SEGMENT = make_segment(make_spec(START, END, window=WINDOW, state=True))


def rows(packed: PackedSegment, index: int) -> np.ndarray[Any, Any]:
    """View array `index` as bytes of numbers, token by token: [tokens, ...]."""
    spec = packed.spec.arrays[index]
    width = DTYPE_NBYTES[spec.dtype]
    array = np.frombuffer(packed.data[index], np.uint8).reshape(*spec.shape, width)
    return np.moveaxis(array, -3, 0)


@pytest.mark.parametrize(("start", "end"), list(combinations(range(START, END + 1), 2)))
def test_a_part_holds_its_tokens_and_no_others(start: int, end: int) -> None:
    part = slice_segment(SEGMENT, start, end)
    assert part.spec == slice_spec(SEGMENT.spec, start, end)
    check_spec(part.spec)
    assert [len(buffer) for buffer in part.data] == [array.nbytes for array in part.spec.arrays]
    assert np.array_equal(rows(part, 0), rows(SEGMENT, 0)[start - START : end - START])
    window = part.spec.layout[2]
    assert np.array_equal(rows(part, 2), rows(SEGMENT, 2)[: window["tokens"]])
    # The last token of the window is the last of the part, as far as the window holds it.
    assert window["tokens"] == max(0, WINDOW - (END - end))
    assert part.spec.windows == {WINDOW: window["tokens"]}
    assert part.spec.restorable == (end == END) and not part.spec.whole
    if end == END:
        assert bytes_of(part)[4:] == bytes_of(SEGMENT)[4:]
        assert part.spec.layout[3] == SEGMENT.spec.layout[3]
    else:
        assert part.spec.layout[3] == {"form": "missing"}


def test_the_whole_is_given_as_it_is() -> None:
    assert slice_segment(SEGMENT, START, END) is SEGMENT


def test_parts_of_spans_join_to_the_whole() -> None:
    whole = make_segment(make_spec(0, 7, dtype="C64"))
    parts = [slice_segment(whole, *span) for span in ((0, 1), (1, 6), (6, 7))]
    joined = np.concatenate([rows(part, 0) for part in parts])
    assert np.array_equal(joined, rows(whole, 0))
    assert all(part.spec.whole and part.spec.restorable for part in parts)


def test_a_part_of_a_part_is_a_part_of_the_whole() -> None:
    once = slice_segment(SEGMENT, 12, 18)
    twice = slice_segment(slice_segment(SEGMENT, 11, 19), 12, 18)
    assert once.spec == twice.spec and bytes_of(once) == bytes_of(twice)


def test_arrays_behind_a_lost_state_keep_their_meaning() -> None:
    arrays = (ArraySpec("F32", (3,)), ArraySpec("F16", (1, 1, 2, 1)))
    state = {"form": "state", "attributes": {"x": {"array": 0}}}
    span = {"form": "span", "tree": {"list": [{"array": 1}]}, "tokens": 2}
    segment = make_segment(SegmentSpec(0, 2, arrays, [state, span], True, False, {}))
    part = slice_segment(segment, 0, 1)
    left = {"form": "span", "tree": {"list": [{"array": 0}]}, "tokens": 1}
    assert part.spec.layout == [{"form": "missing"}, left]
    assert bytes_of(part) == [bytes(segment.data[1])[:2]]

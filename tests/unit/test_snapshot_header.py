from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import orjson
import pytest
import xxhash

from kvserve.store.layout import check_spec
from kvserve.store.segments import ArraySpec, SegmentSpec
from kvserve.store.snapshot_header import MAX_HEADER_VALUES, decode, encode, header_nbytes
from tests.unit.snapshot_fixtures import WINDOW, make_header, make_spec

SPECS = [
    make_spec(0, 4, window=WINDOW, state=False),
    make_spec(4, 5, window=WINDOW, state=True),
]
HEADER = make_header(SPECS, digests=(b"1" * 16, b"2" * 16), conversation={"id": "é"})
RAW = encode(HEADER)
SIZE = len(RAW) + HEADER.data_nbytes


def sign(outer: dict[str, Any], own: dict[str, Any] | str) -> bytes:
    """Return a header with a right digest, whatever it says."""
    text = own if isinstance(own, str) else orjson.dumps({**own, "digest": "0" * 32}).decode()
    body = orjson.dumps({"__metadata__": {"kvserve": text}, **outer})
    raw = len(body).to_bytes(8, "little") + body
    return raw[:50] + xxhash.xxh3_128_hexdigest(raw).encode() + raw[82:]


def parts() -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arrays' entries and the metadata of a valid header."""
    outer = orjson.loads(RAW[8:])
    own = orjson.loads(outer.pop("__metadata__")["kvserve"])
    return outer, own


def refuse(raw: bytes, size: int = SIZE) -> None:
    assert header_nbytes(raw[:8], len(raw)) == len(raw)
    with pytest.raises((ValueError, EOFError)):
        decode(raw, size - len(RAW) + len(raw))


def test_a_header_survives_the_way_to_bytes_and_back() -> None:
    found = decode(RAW, SIZE)
    assert found.token_ids.dtype == np.uint32
    assert found.token_ids.tolist() == HEADER.token_ids.tolist()
    assert replace(found, token_ids=HEADER.token_ids) == HEADER
    assert encode(found) == RAW


def test_the_largest_token_ids_survive() -> None:
    tokens = np.array([0, 2**32 - 1, 2**31, 1], np.uint32)
    header = make_header([make_spec(0, 4)], token_ids=tokens, digests=(b"1" * 16,))
    raw = encode(header)
    found = decode(raw, len(raw) + header.data_nbytes)
    assert found.token_ids.tolist() == tokens.tolist()


def test_digests_do_not_change_the_length() -> None:
    assert len(encode(replace(HEADER, digests=()))) == len(RAW)
    assert len(RAW) % 8 == 0


def test_the_signature_of_the_test_is_that_of_the_code() -> None:
    outer, own = parts()
    raw = sign(outer, own)
    assert encode(decode(raw, len(raw) + HEADER.data_nbytes)) == RAW


@pytest.mark.parametrize("length", [0, 1, 40, 2**26 + 1, 2**63, 2**64 - 1])
def test_a_length_that_cannot_be_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="length"):
        header_nbytes(length.to_bytes(8, "little"), 2**40)


@pytest.mark.parametrize("size", [0, 7, 8, 100])
def test_a_file_that_ends_inside_the_header_is_truncated(size: int) -> None:
    with pytest.raises(EOFError):
        header_nbytes(RAW[: min(8, size)], size)


@pytest.mark.parametrize("difference", [-1, -HEADER.data_nbytes, 1, 4096])
def test_the_size_of_the_file_must_be_what_the_arrays_take(difference: int) -> None:
    with pytest.raises(EOFError if difference < 0 else ValueError):
        decode(RAW, SIZE + difference)


def places(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to every value in a JSON value."""
    if way:
        yield way
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*way, key))
    elif isinstance(value, list):
        for index in range(len(value)):
            yield from places(value[index], (*way, index))


def deep(levels: int) -> Any:
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


STRANGE = [None, True, -1, 0, 1, 2**40, 2**63 - 1, 1.5, "", "x", "0" * 32, [], {}, [[]], deep(90)]
MAKE_NO_DIFFERENCE = {"conversation", "digest"}
"""Fields whose values are checked elsewhere or not at all."""


def change(value: Any, way: tuple[Any, ...], new: Any) -> Any:
    """Put `new` at a place, or remove what is there if it is `...`; return what was there."""
    for step in way[:-1]:
        value = value[step]
    old = value[way[-1]]
    if new is ...:
        del value[way[-1]]
    else:
        value[way[-1]] = new
    return old


@pytest.mark.parametrize("where", [0, 1], ids=["arrays", "metadata"])
def test_no_value_in_any_place_of_a_header_breaks_the_reader(where: int) -> None:
    num_refused = 0
    for way in places(parts()[where]):
        for new in (*STRANGE, ...):
            changed = parts()
            if change(changed[where], way, new) == new or way[0] in MAKE_NO_DIFFERENCE:
                continue
            raw = sign(*changed)
            try:
                found = decode(raw, len(raw) + HEADER.data_nbytes)
            except (ValueError, EOFError):
                num_refused += 1
                continue
            # What is believed all the same is sound: it can be written, and has the right size.
            assert found.data_nbytes == HEADER.data_nbytes
            encode(found)
    assert num_refused > 300


@pytest.mark.parametrize("text", ["", "null", "[]", "1", "x", '{"digest":"', "{" * 3000])
def test_metadata_that_is_no_object_is_refused(text: str) -> None:
    opening = '{"digest":"' + "0" * 32 + '"}'
    refuse(sign({}, opening))
    body = orjson.dumps({"__metadata__": {"kvserve": text}}).ljust(50)
    refuse(len(body).to_bytes(8, "little") + body)


def test_a_shape_beyond_the_file_is_refused_before_anything_is_allocated() -> None:
    outer, own = parts()
    nbytes = 2**38 * 2
    outer = {"0/0": {"dtype": "BF16", "shape": [1, 1, 4, 2**36], "data_offsets": [0, nbytes]}}
    tree = {"tuple": [{"array": 0}]}
    own["segments"] = [
        {
            **own["segments"][0],
            "arrays": 1,
            "restorable": True,
            "whole": True,
            "windows": {},
            "layout": [{"form": "span", "tree": tree, "tokens": 4}],
        }
    ]
    own["end"] = 4
    own["tokens"] = "AAAA" * 5 + "AA=="  # 16 bytes
    raw = sign(outer, own)
    tracemalloc.start()
    with pytest.raises(EOFError):
        decode(raw, len(raw) + 8)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10**6


def test_a_claim_of_many_tokens_does_not_allocate_them() -> None:
    outer, own = parts()
    own["start"], own["end"] = 0, 2**40
    own["segments"][-1]["end"] = 2**40
    refuse(sign(outer, own))


def test_a_header_of_brackets_is_refused_before_it_is_parsed() -> None:
    body = orjson.dumps({"__metadata__": {"kvserve": '{"digest":"' + "0" * 32 + '"}'}})
    body = body[:-1] + b',"x":[' + b"[]," * MAX_HEADER_VALUES + b"[]]}"
    raw = len(body).to_bytes(8, "little") + body
    raw = raw[:50] + xxhash.xxh3_128_hexdigest(raw).encode() + raw[82:]
    tracemalloc.start()
    with pytest.raises(ValueError, match="too many"):
        decode(raw, len(raw))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * len(raw)  # the lists would take 18 times as much


@pytest.mark.parametrize(
    "changes",
    [
        {"token_ids": np.zeros(3, np.uint32)},
        {"start": 1},
        {"end": 6},
        {"segments": ()},
        {"segments": (SPECS[1], SPECS[0])},
        {"conversation": {"title": "\ud800"}},
        {"conversation": {"title": object()}},
    ],
)
def test_what_cannot_be_read_again_is_not_written(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the words differ
        encode(replace(HEADER, **{"digests": (), **changes}))


SPAN = {"form": "span", "tree": {"array": 0}, "tokens": 4}
BROKEN = [
    SegmentSpec(0, 4, (), None),
    SegmentSpec(0, 4, (), "layout"),
    SegmentSpec(0, 4, (), ["leaf"]),
    SegmentSpec(0, 4, (), [{"form": "pickle"}]),
    SegmentSpec(0, 4, (), [{"form": "missing", "more": 1}]),
    SegmentSpec(0, 4, (), [{"form": "state", "attributes": {}}]),
    SegmentSpec(0, 4, (ArraySpec("F32", (1, 4, 2)),), []),
    SegmentSpec(0, 4, (ArraySpec("F32", (1, 4, 2)),), [SPAN, SPAN]),
    SegmentSpec(0, 4, (ArraySpec("F32", (1, 3, 2)),), [SPAN]),
    SegmentSpec(0, 4, (ArraySpec("F32", (4,)),), [SPAN]),
    SegmentSpec(0, 3, (ArraySpec("F32", (1, 4, 2)),), [SPAN]),
    SegmentSpec(0, 4, (), [{**SPAN, "tree": {"array": -1}}]),
    SegmentSpec(0, 4, (), [{**SPAN, "tree": {"array": True}}]),
    SegmentSpec(0, 4, (), [{**SPAN, "tree": {"value": float("nan")}}]),
    SegmentSpec(0, 4, (), [{**SPAN, "tree": {"value": 2**63}}]),
    SegmentSpec(0, 4, (), [{**SPAN, "tree": {"dict": {1: {"value": 1}}}}]),
    SegmentSpec(0, 4, (), [{**SPAN, "tree": {"list": [], "tuple": []}}]),
    SegmentSpec(0, 4, (), [{**SPAN, "tree": deep(5)}]),
    SegmentSpec(0, 4, (), [{**SPAN, "tree": {"value": 1}, "window": 4}]),
    SegmentSpec(0, 4, (), [{"form": "missing"}], restorable=True, whole=False),
    SegmentSpec(0, 4, (), [{"form": "missing"}], restorable=False, whole=True),
    SegmentSpec(0, 4, (), [], windows={4: 4}),
]


@pytest.mark.parametrize("broken", BROKEN)
def test_a_layout_that_does_not_fit_its_arrays_is_refused(broken: SegmentSpec) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the words differ
        check_spec(broken)


def test_a_tree_too_deep_to_walk_is_refused() -> None:
    tree: dict[str, Any] = {"value": 1}
    for _ in range(500):
        tree = {"list": [tree]}
    with pytest.raises(ValueError, match="not a tree"):
        check_spec(SegmentSpec(0, 4, (), [{**SPAN, "tree": tree}]))


def test_the_segments_of_the_fixtures_are_sound() -> None:
    for spec in SPECS:
        check_spec(spec)

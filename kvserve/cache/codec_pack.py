"""Between segment payloads and plain bytes, in both directions, bit for bit.

`describe` says what a payload holds without touching its bytes, `pack` copies them out of MLX,
`unpack` makes MLX arrays of them again. Of cache objects with attributes of their own (end states)
the layout keeps numbers, texts, booleans, None, arrays, and lists, tuples and dictionaries of
them, each with its type; whatever else one holds makes the segment `Unstorable`. Nothing is ever
pickled, so a file can only ever give values.

`kvserve.store.layout` has the grammar of the layout.

Holds no state. Only the engine thread calls this module: MLX arrays belong to the thread that made
them, and reading one's bytes waits for it to be computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from kvserve.cache.codec import SegmentPath, SegmentPayload, Span, State, arrays_in, section
from kvserve.cache.stored import beyond, followed_by, root
from kvserve.cache.tree import lacks_window
from kvserve.store.layout import check_spec
from kvserve.store.segments import ArraySpec, Buffer, PackedSegment, SegmentSpec, StoredPath

_FORMATS: dict[mx.Dtype, tuple[str, type[np.generic] | None]] = {
    mx.bool_: ("BOOL", np.bool_),
    mx.uint8: ("U8", np.uint8),
    mx.int8: ("I8", np.int8),
    mx.uint16: ("U16", np.uint16),
    mx.int16: ("I16", np.int16),
    mx.float16: ("F16", np.float16),
    mx.bfloat16: ("BF16", None),
    mx.uint32: ("U32", np.uint32),
    mx.int32: ("I32", np.int32),
    mx.float32: ("F32", np.float32),
    mx.uint64: ("U64", np.uint64),
    mx.int64: ("I64", np.int64),
    mx.float64: ("F64", None),
    mx.complex64: ("C64", np.complex64),
}
"""The name in files, and numpy's type where MLX takes its arrays as they are."""

_BY_NAME = {name: (dtype, same) for dtype, (name, same) in _FORMATS.items()}
_UNSIGNED = {2: np.uint16, 8: np.uint64}

_DEEPEST = 16
"""Levels of nesting in an attribute; deeper ones would be a cycle."""


class Unstorable(ValueError):
    """A payload holds something that has no place in a file; the message says what."""


# -- out ---------------------------------------------------------------------------------------


def describe(payload: SegmentPayload, start: int, end: int) -> SegmentSpec:
    """Return what the payload of the tokens `[start, end)` holds. Raises Unstorable."""
    assert payload.length == end - start
    layout, arrays = _layout(payload)
    spec = SegmentSpec(
        start=start,
        end=end,
        arrays=tuple(ArraySpec(_FORMATS[a.dtype][0], tuple(a.shape)) for a in arrays),
        layout=layout,
        restorable=payload.restorable,
        whole=payload.whole,
        windows=dict(payload.windows),
    )
    try:
        check_spec(spec)  # numbers that JSON lacks, among others
    except ValueError as error:
        raise Unstorable(str(error)) from error
    return spec


def pack(payload: SegmentPayload) -> list[Buffer]:
    """Return copies of all arrays' bytes, in the order of `describe`, as views of one memory.

    Raises Unstorable.
    """
    _, arrays = _layout(payload)
    arrays = [mx.contiguous(array, stream=_stream(array.dtype)) for array in arrays]
    mx.eval(arrays)
    # One piece, for which numpy asks for huge pages: first touches cost more than the copy.
    memory = np.empty(sum(array.nbytes for array in arrays), np.uint8)
    data: list[Buffer] = []
    offset = 0
    for array in arrays:
        part = memory[offset : offset + array.nbytes]
        if array.nbytes:
            view: Any = array  # a buffer, which MLX's stubs do not tell
            part[:] = np.frombuffer(memoryview(view), np.uint8)
        data.append(part.data)
        offset += array.nbytes
    return data


def _layout(payload: SegmentPayload) -> tuple[list[Any], list[mx.array]]:
    arrays: list[mx.array] = []
    layout: list[Any] = []
    for part in payload.parts:
        if part is None:
            layout.append(None)
        elif isinstance(part, Span):
            entry = {"form": "span", "tree": _tree(part.arrays, arrays), "tokens": part.num_tokens}
            if part.window is not None:
                entry |= {"form": "window", "window": part.window}
            layout.append(entry)
        elif part.attributes:
            attributes = _tree(part.attributes, arrays)["dict"]
            layout.append({"form": "state", "attributes": attributes})
        else:
            layout.append({"form": "missing"})
    return layout, arrays


def _tree(value: Any, arrays: list[mx.array], depth: int = 0) -> dict[str, Any]:
    """Return the layout of a value, and append its arrays to `arrays`.

    Types are compared exactly: a subclass (a numpy float, a named tuple) would come back as
    something else.
    """
    if depth > _DEEPEST:
        raise Unstorable("an attribute is nested too deep")
    kind = type(value)
    if kind is mx.array:
        arrays.append(value)
        return {"array": len(arrays) - 1}
    if value is None or kind in (bool, int, float, str):
        return {"value": value}  # JSON keeps a float by its shortest exact text
    if kind in (list, tuple):
        return {kind.__name__: [_tree(part, arrays, depth + 1) for part in value]}
    if kind is dict and all(type(key) is str for key in value):
        return {"dict": {key: _tree(part, arrays, depth + 1) for key, part in value.items()}}
    raise Unstorable(f"an attribute is of a kind that files do not hold: {kind.__name__}")


# -- back --------------------------------------------------------------------------------------


def unpack(packed: PackedSegment) -> SegmentPayload:
    """Return the payload that was packed; the buffers are no longer needed afterwards.

    Raises ValueError if description and bytes do not fit each other.
    """
    spec = packed.spec
    check_spec(spec)
    arrays = [_array(form, data) for form, data in zip(spec.arrays, packed.data, strict=True)]
    mx.eval(arrays)
    return SegmentPayload(spec.end - spec.start, [_part(leaf, arrays) for leaf in spec.layout])


def _array(form: ArraySpec, data: Buffer) -> mx.array:
    """Make an array of bytes, in one copy and without looking at the numbers."""
    if form.dtype not in _BY_NAME or memoryview(data).nbytes != form.nbytes:
        raise ValueError("an array's bytes do not fit its description")
    dtype, same = _BY_NAME[form.dtype]
    flat = np.frombuffer(data, same or _UNSIGNED[dtype.size])
    if not flat.flags.aligned:
        flat = flat.copy()  # in a file, arrays of wide numbers may follow one of narrow ones
    array = mx.array(flat.reshape(form.shape))
    # Numpy has no bfloat16, and MLX would make float32 of its float64.
    return array if same is not None else array.view(dtype, stream=_stream(dtype))


def _stream(dtype: mx.Dtype) -> Any:
    """Return where to compute: GPUs have no float64."""
    return mx.cpu if dtype == mx.float64 else None


def _part(leaf: Any, arrays: Sequence[mx.array]) -> Span | State | None:
    if leaf is None:
        return None
    if leaf["form"] == "missing":
        return State({})
    if leaf["form"] == "state":
        return State(_value({"dict": leaf["attributes"]}, arrays))
    held = _value(leaf["tree"], arrays)
    if any(array.ndim != 4 or array.shape[0] != 1 for array in arrays_in(held)):
        raise ValueError("keys and values are shaped [1, kv_heads, tokens, dim]")
    return Span(held, leaf["tokens"], leaf.get("window"))


def _value(tree: Any, arrays: Sequence[mx.array]) -> Any:
    ((kind, held),) = tree.items()
    if kind == "array":
        return arrays[held]
    if kind == "value":
        return held
    if kind == "dict":
        return {key: _value(part, arrays) for key, part in held.items()}
    parts = [_value(part, arrays) for part in held]
    return tuple(parts) if kind == "tuple" else parts


# -- what a write takes ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Piece:
    """A segment to be stored. Refers to no array, so that what it names can still be evicted.

    With `contained` its windows reach back before it, for the disk lacks tokens there.
    """

    spec: SegmentSpec
    contained: bool

    def pack(self, held: SegmentPath) -> list[Buffer]:
        """Return copies of its bytes from the path as it is now held, however that is cut.

        Raises LookupError if the path no longer holds all that `spec` promises.
        """
        payload = section(held, self.spec.start, self.spec.end, contained=self.contained)
        if describe(payload, self.spec.start, self.spec.end) != self.spec:
            raise LookupError(f"the state of [{self.spec.start}, {self.spec.end}) has changed")
        return pack(payload)


def pieces(
    held: SegmentPath, stored: StoredPath, ranges: Sequence[tuple[int, int]]
) -> list[list[Piece]]:
    """Return, for each of the token ranges, the segments that fill it on disk, from a path in RAM.

    `held` begins at the root. `ranges` ascend; each lies on the stored path or begins where it
    ends, and earlier ones count as stored for later ones. Segments are cut as the RAM has them, and
    at the ends of the range; a state goes with its segment's end. Costs no copy of any array.
    Raises LookupError if `held` does not reach that far, Unstorable as `describe` does.
    """
    windows = {window for _, _, payload in held for window in payload.windows}
    place = root()
    found: list[list[Piece]] = []
    for start, stop in ranges:
        made: list[Piece] = []
        place = beyond(place, stored, start, windows)
        inside = [end for _, end, _ in held if start < end < stop]
        for begin, end in zip([start, *inside], [*inside, stop], strict=True):
            contained = lacks_window(place, begin, end)
            payload = section(held, begin, end, contained=contained)
            made.append(Piece(describe(payload, begin, end), contained))
            place = followed_by(place, made[-1].spec)
        found.append(made)
    return found

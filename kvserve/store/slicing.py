"""Parts of stored segments: the tokens from one position to another. Pure, by numpy; owns nothing.

A path on disk may be taken up or left inside a segment: an import stops where the disk already
has the tokens, an export where a conversation ends. What a part can be restored at follows as it
does when the cache splits a segment in memory:

- spans keep the rows of their tokens;
- windows keep all they hold up to the new end. Tokens from before the new start stay: they may be
  the only ones of their kind, and a window may reach back behind its segment;
- end states stay behind if the end does, and are missing otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvserve.store.layout import arrays_in, flags, renumber
from kvserve.store.segments import (
    DTYPE_NBYTES,
    ArraySpec,
    Buffer,
    PackedSegment,
    SegmentSpec,
)

Rows = tuple[int, int, int]
"""Array `i` of the original, of which the rows `[start, stop)` of the token axis are taken."""

_WHOLE = -1


def slice_spec(spec: SegmentSpec, start: int, end: int) -> SegmentSpec:
    """Describe the tokens `[start, end)` of a segment, `spec.start <= start < end <= spec.end`."""
    return _plan(spec, start, end)[0]


def slice_segment(packed: PackedSegment, start: int, end: int) -> PackedSegment:
    """Return the tokens `[start, end)` of a segment, in memory of their own if it is a part."""
    if (start, end) == (packed.spec.start, packed.spec.end):
        return packed
    spec, taken = _plan(packed.spec, start, end)
    data: list[Buffer] = []
    for i, first, stop in taken:
        if first == _WHOLE:
            data.append(packed.data[i])
        else:
            data.append(_array(packed.spec.arrays[i], packed.data[i])[..., first:stop, :].tobytes())
    return PackedSegment(spec, data)


def _plan(spec: SegmentSpec, start: int, end: int) -> tuple[SegmentSpec, list[Rows]]:
    """Return the description of a part and where its arrays come from, in their order."""
    assert spec.start <= start < end <= spec.end
    taken: list[Rows] = []
    layout: list[dict[str, Any] | None] = []
    for leaf in spec.layout:
        form = None if leaf is None else leaf["form"]
        if leaf is not None and form == "span":
            first = start - spec.start
            layout.append(_take(leaf, first, first + end - start, taken))
        elif leaf is not None and form == "window":
            held_from = spec.end - leaf["tokens"]
            layout.append(_take(leaf, 0, max(0, end - held_from), taken))
        elif leaf is not None and form == "state" and end < spec.end:
            layout.append({"form": "missing"})
        elif leaf is not None and form == "state":
            tree = {"dict": leaf["attributes"]}
            layout.append({"form": "state", "attributes": _keep(tree, _WHOLE, 0, taken)["dict"]})
        else:
            layout.append(leaf)
    restorable, whole, windows = flags(layout)
    arrays = tuple(_described(spec.arrays, rows) for rows in taken)
    part = SegmentSpec(start, end, arrays, layout, restorable, whole, windows)
    return part, taken


def _take(leaf: dict[str, Any], first: int, stop: int, taken: list[Rows]) -> dict[str, Any]:
    return {**leaf, "tree": _keep(leaf["tree"], first, stop, taken), "tokens": stop - first}


def _keep(tree: Any, first: int, stop: int, taken: list[Rows]) -> Any:
    """Note the rows of every array in a tree; return the tree with their new numbers."""
    numbers = {}
    for i in arrays_in(tree):
        numbers[i] = len(taken)
        taken.append((i, first, stop))
    return renumber(tree, numbers.__getitem__)


def _described(arrays: Sequence[ArraySpec], rows: Rows) -> ArraySpec:
    i, first, stop = rows
    array = arrays[i]
    if first == _WHOLE:
        return array
    return replace(array, shape=(*array.shape[:-2], stop - first, array.shape[-1]))


def _array(spec: ArraySpec, data: Buffer) -> NDArray[Any]:
    """View bytes as numbers of the right width; which kind of number does not matter here."""
    return np.frombuffer(data, f"u{DTYPE_NBYTES[spec.dtype]}").reshape(spec.shape)

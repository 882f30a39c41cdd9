"""What the arrays of a segment are, as its description says it. Pure; owns nothing.

`layout` is a list with one entry per leaf of the working cache, in order:

    null                                                     the leaf holds nothing
    {"form": "missing"}                                      an end state that was not kept
    {"form": "span", "tree": T, "tokens": n}                 arrays [..., n, dim], n == end - start
    {"form": "window", "tree": T, "tokens": n, "window": w}  the last n tokens before `end`
    {"form": "state", "attributes": {name: T}}               the leaf's attributes at `end`

A window may hold more tokens than the segment has. A tree T is one of `{"array": i}`, an index into
the segment's arrays, `{"list": [T...]}`, `{"tuple": [T...]}`, `{"dict": {key: T}}` and
`{"value": scalar}` of JSON. Each array is named exactly once.

Descriptions also come from files that others uploaded: everything is checked before it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import isfinite
from typing import Any

from kvserve.store.segments import SegmentSpec

Layout = list[dict[str, Any] | None]
_DEEPEST = 32
_INT64 = 2**63
_MAX_WINDOWS = 64
"""Different sizes in one segment. Models have one or two; each is looked at whenever it is asked
how far a path can be restored, and a hostile file has room for half a million."""


def check_spec(spec: SegmentSpec) -> None:
    """Raise ValueError, saying where, unless layout, arrays and flags of a segment agree."""
    if type(spec.layout) is not list:
        raise ValueError("layout is not a list")
    named = [False] * len(spec.arrays)
    for index, leaf in enumerate(spec.layout):
        try:
            for array in _arrays_of(leaf):
                if not 0 <= array < len(named) or named[array]:
                    raise ValueError(f"array {array} is unknown or named twice")
                named[array] = True
            _check_tokens(leaf, spec)
        except ValueError as error:
            raise ValueError(f"leaf {index}: {error}") from error
    if not all(named):
        raise ValueError(f"array {named.index(False)} is not named")
    if len(spec.windows) > _MAX_WINDOWS:
        raise ValueError(f"{len(spec.windows)} sizes of windows")
    if (spec.restorable, spec.whole, dict(spec.windows)) != flags(spec.layout):
        raise ValueError("restorable, whole or windows do not follow from the layout")


def flags(layout: Layout) -> tuple[bool, bool, dict[int, int]]:
    """Return `restorable`, `whole` and `windows` of a segment with this checked layout."""
    forms = [leaf["form"] for leaf in layout if leaf is not None]
    windows: dict[int, int] = {}
    for leaf in layout:
        if leaf is not None and leaf["form"] == "window":
            window, tokens = leaf["window"], leaf["tokens"]
            windows[window] = min(windows.get(window, tokens), tokens)
    whole = "state" not in forms and "missing" not in forms
    return "missing" not in forms, whole, windows


def renumber(tree: Any, numbers: Callable[[int], int]) -> Any:
    """Return a checked tree with the index of each array replaced."""
    ((kind, held),) = tree.items()
    if kind == "array":
        return {"array": numbers(held)}
    if kind == "dict":
        return {kind: {key: renumber(part, numbers) for key, part in held.items()}}
    if kind in ("list", "tuple"):
        return {kind: [renumber(part, numbers) for part in held]}
    return tree


def arrays_in(tree: Any, depth: int = 0) -> Iterator[int]:
    """Yield the indices of the arrays in a tree, in order. Raises ValueError for no tree."""
    if type(tree) is not dict or len(tree) != 1 or depth > _DEEPEST:
        raise ValueError("not a tree of arrays")
    ((kind, held),) = tree.items()
    if kind == "array" and type(held) is int:
        yield held
    elif kind in ("list", "tuple") and type(held) is list:
        for part in held:
            yield from arrays_in(part, depth + 1)
    elif kind == "dict" and type(held) is dict and all(type(key) is str for key in held):
        for part in held.values():
            yield from arrays_in(part, depth + 1)
    elif kind != "value" or not _is_scalar(held):
        raise ValueError(f"not a tree of arrays: {kind!r:.40}")


def _is_scalar(value: Any) -> bool:
    """Whether JSON gives back exactly this value."""
    if type(value) is int:
        return -_INT64 <= value < _INT64
    return isfinite(value) if type(value) is float else value is None or type(value) in (bool, str)


def _arrays_of(leaf: Any) -> Iterator[int]:
    if leaf is None or leaf == {"form": "missing"}:
        return
    if type(leaf) is not dict:
        raise ValueError("not a leaf")
    form = leaf.get("form")
    if form == "state" and leaf.keys() == {"form", "attributes"}:
        if type(leaf["attributes"]) is not dict or not leaf["attributes"]:
            raise ValueError("a state without attributes")
        yield from arrays_in({"dict": leaf["attributes"]})
    elif (form == "span" and leaf.keys() == {"form", "tree", "tokens"}) or (
        form == "window" and leaf.keys() == {"form", "tree", "tokens", "window"}
    ):
        yield from arrays_in(leaf["tree"])
    else:
        raise ValueError("unknown form")


def _check_tokens(leaf: Any, spec: SegmentSpec) -> None:
    if leaf is None or "tree" not in leaf:
        return
    tokens, window = leaf["tokens"], leaf.get("window", 1)
    if type(tokens) is not int or type(window) is not int or window < 1:
        raise ValueError("tokens or window is not a count")
    if leaf["form"] == "span" and tokens != spec.end - spec.start:
        raise ValueError(f"{tokens} tokens for the span of [{spec.start}, {spec.end})")
    if not 0 <= tokens <= spec.end:
        raise ValueError(f"{tokens} tokens before {spec.end}")
    for array in arrays_in(leaf["tree"]):
        shape = spec.arrays[array].shape
        if len(shape) < 2 or shape[-2] != tokens:
            raise ValueError(f"array {array} is shaped {list(shape)} for {tokens} tokens")

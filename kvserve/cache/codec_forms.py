"""What the state of a model looks like, measured on a working cache: shapes and bytes.

Holds no state. Only the engine thread calls this module, for it looks at MLX arrays; the results
are plain values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from kvserve.cache.codec import (
    LONGEST_CHUNK_TOKENS,
    TOKEN_AXIS,
    SegmentPayload,
    Span,
    State,
    WorkingCache,
    arrays_in,
    form_of,
    leaves,
)

Forms = tuple[Any, ...]
"""What each leaf of a model's working cache holds: see `forms_of`."""


def forms_of(cache: WorkingCache) -> Forms:
    """Return, for a working cache that holds some tokens, what any payload of its model has.

    Of spans and windows number formats and shapes but for the tokens, of states the names of their
    attributes, None for leaves that the model does not use.
    """
    return tuple(
        (leaf_form, tuple(sorted(vars(leaf))))
        if (leaf_form := form_of(leaf)) == "state"
        else _per_token(leaf.keys is not None, (leaf.keys, leaf.values), leaf)
        for leaf in leaves(cache)
    )


def _per_token(used: bool, arrays: Any, leaf: Any) -> Any:
    if not used:
        return None
    window = leaf.max_size if form_of(leaf) == "window" else None
    return ("tokens", window, tuple(_kind(array) for array in arrays_in(arrays)))


def _kind(array: mx.array) -> tuple[Any, ...]:
    *outer, _, dim = array.shape
    return (array.dtype, *outer, dim)


def fits(payload: SegmentPayload, forms: Forms) -> bool:
    """Whether a payload from elsewhere could have been taken from a model of these forms.

    A file that was made to deceive can name the right model and hold the state of another.
    """
    return len(payload.parts) == len(forms) and all(
        _part_fits(part, form) for part, form in zip(payload.parts, forms, strict=True)
    )


def _part_fits(part: Span | State | None, form: Any) -> bool:
    if part is None or form is None:
        return part is form
    if isinstance(part, Span):
        kinds = tuple(_kind(array) for array in arrays_in(part.arrays))
        return bool(form == ("tokens", part.window, kinds))
    if form[0] != "state":
        return False
    return not part.attributes or tuple(sorted(part.attributes)) == form[1]


# -- bytes ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of a model's state: per token of plain spans, per token of each window, fixed."""

    span_nbytes: int
    windows: tuple[tuple[int, int], ...]
    state_nbytes: int

    def working(self, num_tokens: int) -> int:
        """Return the bytes of a working cache of `num_tokens`, growth steps included."""
        rounded = -(-num_tokens // KVCache.step) * KVCache.step
        # While a chunk is computed, a window's buffer holds all of it behind the window.
        windows = sum(
            size * min(rounded, window + LONGEST_CHUNK_TOKENS) for window, size in self.windows
        )
        return self.span_nbytes * rounded + windows + self.state_nbytes

    def segment(self, num_tokens: int, with_state: bool) -> int:
        """Return about the bytes of a segment's payload; exact but for states that grow."""
        windows = sum(size * min(num_tokens, window) for window, size in self.windows)
        return self.span_nbytes * num_tokens + windows + self.state_nbytes * with_state


def footprint(cache: WorkingCache) -> Footprint:
    """Measure a working cache that holds some tokens."""
    span = state = 0
    windows: list[tuple[int, int]] = []
    for leaf in leaves(cache):
        form = form_of(leaf)
        limit = getattr(leaf, "max_size", getattr(leaf, "chunk_size", None))
        if form == "state" and not isinstance(limit, int):
            state += sum(a.nbytes for a in arrays_in(vars(leaf)))
        elif leaf.keys is not None:
            arrays = arrays_in((leaf.keys, leaf.values))
            per_token = sum(a.nbytes // max(1, a.shape[TOKEN_AXIS]) for a in arrays)
            if isinstance(limit, int):  # windows, and states that grow like one
                windows.append((limit, per_token))
            else:
                span += per_token
    return Footprint(span, tuple(windows), state)

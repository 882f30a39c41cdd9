"""Whether a model's state can be cached at all: tried at start, never assumed.

A prompt is fed in pieces, its state cut into segments and restored, and the next logits compared
with those of one uncut run. Two causes cannot be seen on a short prompt and are known by their
config: rope scaling whose base follows the length, and a mask wider than the window it keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from kvserve.cache.codec import WorkingCache, arrays_of, capture, restore
from kvserve.engine.batch import relative_difference

_FED = 24
_CUT = 10


def caching_fault(
    config: dict[str, Any],
    forward: Callable[..., mx.array],
    fresh: Callable[[], WorkingCache],
    vocab_size: int,
) -> str:
    """Return why states of this model cannot be reused, or "" if they can."""
    known = _known_fault(config)
    if known:
        return known
    prompt = (mx.arange(_FED) * 7919 % vocab_size).astype(mx.uint32)[None]
    try:
        expected = forward(prompt, cache=fresh())[:, -1]
        first = fresh()
        mx.eval(forward(prompt[:, :_CUT], cache=first), arrays_of(first))
        segment = capture(first, _CUT, 0, _CUT, with_state=True, contained=False)
        second = fresh()
        restore(second, [(0, _CUT, segment)], _CUT, _FED)
        got = forward(prompt[:, _CUT:], cache=second)[:, -1]
        error = relative_difference(got, expected)
    except Exception as fault:  # whatever a model file raises: its state is not one we can handle
        return f"its state cannot be taken up again ({type(fault).__name__}: {fault})"[:300]
    limit = 1e-3 if expected.dtype == mx.float32 else 1e-1
    if not error <= limit:
        return f"a restored state gives other logits (relative difference {error:.1e})"
    return ""


def _known_fault(config: dict[str, Any]) -> str:
    for part in (config, config.get("text_config") or {}):
        for key in ("rope_scaling", "rope_parameters"):
            scaling = part.get(key)
            if isinstance(scaling, dict):
                kind = scaling.get("rope_type", scaling.get("type"))
                if kind == "dynamic":
                    return "dynamic rope scaling makes keys depend on the length they were fed at"
        if part.get("model_type") == "plamo3":
            return "mlx-lm masks one token more than the sliding window keeps"
    return ""

"""How much memory KV states may use when nobody says so."""

from __future__ import annotations

import mlx.core as mx

from kvserve.core.memory import machine_memory

DEFAULT_SHARE = 0.5
"""Of the memory that the weights leave. The rest is for activations, MLX's spare buffers, the
tokenizer, the operating system and the user's other programs."""

MIN_BUDGET_NBYTES = 1 << 26


def usable_nbytes() -> int:
    """Return the memory of the device that computes."""
    if mx.default_device() != mx.cpu:
        info = mx.device_info()
        for key in ("max_recommended_working_set_size", "memory_size", "total_memory"):
            if isinstance(size := info.get(key), int):
                return size
    return machine_memory()


def default_budget(weights_nbytes: int) -> int:
    """Return the byte budget of KV states beside a model of `weights_nbytes`."""
    return max(MIN_BUDGET_NBYTES, int((usable_nbytes() - weights_nbytes) * DEFAULT_SHARE))

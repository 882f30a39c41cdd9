"""How much memory KV states may use when nobody says so."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import psutil

DEFAULT_SHARE = 0.5
"""Of the memory that the weights leave. The rest is for activations, MLX's spare buffers, the
tokenizer, the operating system and the user's other programs."""

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def usable_nbytes() -> int:
    """Return the memory that this process may count on: the device's, or the container's limit."""
    if mx.default_device() != mx.cpu:
        info = mx.device_info()
        for key in ("max_recommended_working_set_size", "memory_size"):
            if isinstance(size := info.get(key), int):
                return size
    total = int(psutil.virtual_memory().total)
    try:
        return min(total, int(_CGROUP_LIMIT.read_text()))
    except (OSError, ValueError):
        return total


def default_budget(weights_nbytes: int) -> int:
    """Return the byte budget of KV states beside a model of `weights_nbytes`."""
    return max(1 << 26, int((usable_nbytes() - weights_nbytes) * DEFAULT_SHARE))

"""The one MLX thread: loading, scheduling, batching, sampling; an async face for the rest."""

from kvserve.core import runtime

runtime.prepare()

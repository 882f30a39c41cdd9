"""KV states by content: keys, the segment tree, eviction, and the codec to MLX caches."""

from kvserve.core import runtime

runtime.prepare()

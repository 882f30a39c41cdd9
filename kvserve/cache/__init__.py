"""KV states by content: keys, the segment tree, eviction, and the codec to MLX caches.

OpenBLAS is loaded here because this package is the first, in import order, that reaches MLX.
"""

from kvserve.core import blas

blas.preload()

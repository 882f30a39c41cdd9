"""The one MLX thread: loading, scheduling, batching, sampling; an async face for the rest.

OpenBLAS is loaded here, before any module of this package imports MLX.
"""

from kvserve.core import blas

blas.preload()

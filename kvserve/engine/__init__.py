"""The one MLX thread: loading, scheduling, batching, sampling; an async face for the rest.

OpenBLAS is loaded here, before any module of this package imports MLX.
"""

import os

from kvserve.core import blas

blas.preload()
# transformers tells every user at start that PyTorch is missing; kvserve has no use for it.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

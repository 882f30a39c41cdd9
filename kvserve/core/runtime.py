"""What must be arranged before MLX and transformers are imported for the first time."""

from __future__ import annotations

import os

from kvserve.core import blas


def prepare() -> None:
    """Load OpenBLAS where it helps, and keep transformers from missing PyTorch aloud; idempotent.

    Called by the packages that import either library, in their `__init__`.
    """
    blas.preload()
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

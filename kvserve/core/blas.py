"""OpenBLAS for MLX on Linux CPUs.

The Linux wheel of MLX links reference BLAS (7.8 GFLOP/s in float32 where OpenBLAS reaches 231 on
the same two cores). The dynamic linker resolves the `cblas_*` symbols to whichever library was
loaded first, so loading OpenBLAS globally before `mlx.core` is imported makes prefill about thirty
times faster. Used when found, never required. Owns one process-wide fact: which library, if any,
was loaded.
"""

from __future__ import annotations

import ctypes
import sys

_CANDIDATES = ("libopenblas.so.0", "libopenblasp.so.0", "libopenblas.so")
_loaded: str | None = None


def preload() -> str | None:
    """Load OpenBLAS unless MLX is already imported; return the library's name, or None.

    Call before `mlx.core` is imported for the first time. Later calls return the first result.
    """
    global _loaded
    if _loaded is not None or sys.platform != "linux" or "mlx.core" in sys.modules:
        return _loaded
    for name in _CANDIDATES:
        try:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        _loaded = name
        break
    return _loaded


def describe() -> str:
    """Return one line for people: what is used, or how to get it."""
    if sys.platform != "linux":
        return "not needed on this platform"
    if _loaded is not None:
        return f"OpenBLAS ({_loaded})"
    return (
        "reference BLAS: prefill on the CPU is about 30 times slower than with OpenBLAS "
        "(Debian, Ubuntu: apt install libopenblas0-pthread; Fedora: dnf install openblas-threads)"
    )

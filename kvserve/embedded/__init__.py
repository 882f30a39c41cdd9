"""The model that answers when none is given: where it lies, and nothing else.

A chat model of one million parameters that recalls what its context says, kept as an ordinary
folder that `mlx_lm.load` reads. `docs/embedded-model.md` tells what it can do, and
`scripts/train_embedded_model.py` makes it. This package holds no state and does not import MLX.
"""

from __future__ import annotations

from pathlib import Path


def path() -> Path:
    """Return the folder of the embedded model."""
    return Path(__file__).parent / "model"

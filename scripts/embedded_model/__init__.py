"""How the embedded model is made: text, tokenizer, network, training, export, evaluation.

Nothing here is imported by kvserve itself. The parts, in the order in which they are used:

    words          entities, attributes and values, and the split into trained and held-out pairs
    facts          how a fact is stated, asked, answered and found missing
    conversation   whole conversations of a wanted length, made of those facts
    vocabulary     the byte-level BPE tokenizer, learned from such conversations
    network        the qwen3 network as plain functions, with a fast exponential for CPUs
    optimiser      Muon for the matrices, Adam for the rest
    training       two processes, one gradient, a curriculum of context lengths
    export         the folder that `mlx_lm.load` reads
    evaluation     exact-match recall on held-out conversations
"""

from __future__ import annotations

import contextlib
import ctypes

# MLX's CPU wheel links a slow BLAS. Loaded first, OpenBLAS takes its place; it is not required.
with contextlib.suppress(OSError):
    ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)

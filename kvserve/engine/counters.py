"""The engine's running totals. Plain state without behaviour of its own."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Counters:
    """Running totals since start; written by the engine thread, read by any."""

    requests: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    cached_tokens: int = 0
    cached_tokens_from_disk: int = 0
    prefilled_tokens: int = 0
    decoded_tokens: int = 0
    decode_steps: int = 0
    preempted: int = 0
    recovered_batches: int = 0
    longest_chunk_s: float = 0.0

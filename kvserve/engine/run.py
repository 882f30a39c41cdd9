"""One request inside the engine: its tokens, its working cache, and where its events go.

Plain state without behaviour of its own, touched by the engine thread only (but for `submitted_at`
and the immutable request).
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from kvserve.cache.codec import SegmentPayload, WorkingCache
from kvserve.cache.leases import Lease
from kvserve.cache.plan import Plan
from kvserve.core.types import Event, FinishReason, GenerationRequest, TokenIds
from kvserve.engine.fetch import Fetched
from kvserve.engine.sampling import Sampler
from kvserve.engine.text import TextStream
from kvserve.store.segments import StoredPath

Emit = Callable[[Event | Exception], None]


@dataclass(eq=False, slots=True)
class Run:
    """A request from submission to its last event.

    `reply` are the tokens read so far. `num_fed` tokens of prompt + reply are in the working
    cache. `stored` is what the disk holds of the prompt; it is read while `fetching`, and then
    `fetched`; `num_from_disk` of the reused tokens came from there. `num_cached` tokens of the
    prompt were reused at first; `evidence` are the logits behind it, `[vocab]`, if they are to be
    compared with a cold run's. `pending` is the next token, shape `[1]`, sampled but not yet read.
    `solo` runs were in a step that failed and are stepped alone from then on.
    """

    request: GenerationRequest
    emit: Emit
    lease: Lease[SegmentPayload] | None = None
    stored: StoredPath | None = None
    fetching: bool = False
    fetched: Fetched | None = None
    num_from_disk: int = 0
    damaged: bool = False
    num_cached: int = 0
    evidence: mx.array | None = None
    reply: list[int] = field(default_factory=list)
    num_fed: int = 0
    cache: WorkingCache | None = None
    plan: Plan | None = None
    pending: mx.array | None = None
    sampler: Sampler | None = None
    text: TextStream | None = None
    reserved_nbytes: int = 0
    capacity: int = 0
    num_published: int = 0
    num_held: int = 0
    passed_over: int = 0
    started: bool = False
    solo: bool = False
    follows: tuple[Run, int] | None = None
    finish: FinishReason | None = None
    seed: int = field(default_factory=lambda: secrets.randbits(63))
    submitted_at: float = field(default_factory=time.monotonic)
    first_token_at: float = 0.0

    @property
    def token_ids(self) -> TokenIds:
        """Return prompt and reply; the reply is counted in as far as it has been read."""
        if not self.reply:
            return self.request.prompt.token_ids
        return np.concatenate([self.request.prompt.token_ids, np.array(self.reply, np.uint32)])

    @property
    def length(self) -> int:
        return len(self.request.prompt) + len(self.reply)

    @property
    def remaining(self) -> int:
        """How many more tokens may be read."""
        return self.request.max_tokens - len(self.reply)

    @property
    def message_ends(self) -> list[int]:
        return [cut.position for cut in self.request.prompt.cuts]

"""Whether hits are right: a share of them is computed again without the cache, and compared.

A hit is chosen by a draw when its prompt is done; the logits that choose its first token are kept.
Once it is answered it waits here, and when the engine has nothing else to do its prompt is run
cold, a chunk at a time, so that a request that comes in waits for one chunk at most. The cold
logits must be the kept ones, and each token of a greedy reply must be the likeliest, up to what
two ways of computing may differ. If not, what memory holds of the path is dropped with all that
was computed behind it, and whoever keeps the disk is told.

Owns the few cases that wait and one working cache, which it gives up as soon as a request needs
the memory. Engine thread only. Looks at what comes out, not at the states themselves: an error
too small to move any logit by more than the tolerance is not found.
"""

from __future__ import annotations

import logging
import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from kvserve.cache.codec import SegmentPayload, arrays_of
from kvserve.cache.segments import SegmentCache
from kvserve.core.types import GenerationRequest, Prompt, TokenIds
from kvserve.engine.model import LoadedModel
from kvserve.engine.run import Run
from kvserve.engine.scheduler import ChunkSizer
from kvserve.engine.working import WorkingCaches

log = logging.getLogger(__name__)

MAX_WAITING = 4
"""Hits that wait to be compared; a server without pauses would else collect them without end."""
MAX_STARTS = 3
"""How often a run that has lost its memory to requests begins again."""
_LOGITS_TOKENS = 64
"""Tokens of a chunk whose logits are all wanted; an output layer may be 150,000 wide."""


@dataclass(slots=True)
class Verified:
    """Totals since start; written by the engine thread, read by any."""

    verified: int = 0
    verify_mismatches: int = 0
    verify_skipped: int = 0


@dataclass(frozen=True, slots=True)
class Case:
    """A hit as it was answered. `logits`, `[vocab]`, are those behind the prompt."""

    request_id: str
    namespace: bytes
    token_ids: TokenIds
    num_prompt: int
    num_cached: int
    logits: mx.array
    greedy: bool

    @property
    def num_compared(self) -> int:
        """How many tokens are to be fed: to the last that chose one of a greedy reply."""
        return len(self.token_ids) - 1 if self.greedy else self.num_prompt


class Verifier:
    """Compares hits with cold runs.

    Args:
        model: what runs.
        working: where memory for the cold run comes from.
        cache: whose paths are dropped where they are wrong.
        sizer: chooses chunk sizes.
        share: of the hits, in [0, 1].
        on_mismatch: told the namespace and the tokens of a wrong path, on the engine thread.
    """

    def __init__(
        self,
        model: LoadedModel,
        working: WorkingCaches,
        cache: SegmentCache[SegmentPayload],
        sizer: ChunkSizer,
        share: float,
        on_mismatch: Callable[[bytes, TokenIds], None],
    ) -> None:
        self.counters = Verified()
        self._model = model
        self._working = working
        self._cache = cache
        self._sizer = sizer
        self._share = share
        self._on_mismatch = on_mismatch
        # As at loading (selfcheck): the numbers of half formats differ by how a prompt is cut.
        self._tolerance = 1e-3 if model.info.identity.kv_dtype == "float32" else 5e-2
        self._waiting: deque[Case] = deque()
        self._case: Case | None = None
        self._run: Run | None = None
        self._starts = 0
        self._random = random.Random()
        working.make_way = self.give_back

    def draw(self, run: Run, logits: mx.array) -> None:
        """At the end of a prompt: perhaps keep `logits`, `[vocab]`, for a comparison."""
        if run.evidence is not None or run.reply or not run.num_cached:
            return
        if self._random.random() < self._share:
            # A copy: a slice would keep the logits of a whole chunk.
            run.evidence = logits.astype(mx.float32) + 0.0
            launch: Callable[..., None] = mx.async_eval
            launch(run.evidence)

    def offer(self, run: Run) -> None:
        """At the end of a reply: put the run in line if it was drawn and there is room."""
        if run.evidence is None or run.sampler is None or not run.reply:
            return
        if len(self._waiting) >= MAX_WAITING:
            self.counters.verify_skipped += 1
            return
        request = run.request
        self._waiting.append(
            Case(
                request_id=request.request_id,
                namespace=request.namespace,
                token_ids=run.token_ids,
                num_prompt=len(request.prompt),
                num_cached=run.num_cached,
                logits=run.evidence,
                greedy=run.sampler.plain_greedy,
            )
        )

    def give_back(self) -> None:
        """Free the working cache of a comparison under way, which begins again later."""
        if self._run is not None:
            self._working.end(self._run)
            self._run = None

    def step(self) -> bool:
        """Compute a chunk for a comparison; False when there is none to make."""
        if self._case is None:
            if not self._waiting:
                return False
            self._case, self._starts = self._waiting.popleft(), 0
        case = self._case
        try:
            if self._run is None:
                self._run = self._started(case)
            if self._run is not None:
                self._compute(case, self._run)
        except Exception:  # request ring: nobody waits for this
            log.exception("the comparison of request %s with a cold run failed", case.request_id)
            self._skip()
        return True

    def _started(self, case: Case) -> Run | None:
        """Return a cold run with its memory; None, and the case is given up, if that is refused."""
        prompt = Prompt(case.token_ids[: case.num_compared])
        request = GenerationRequest(case.request_id, prompt, max_tokens=0, use_cache=False)
        run = Run(request, lambda event: None)
        self._starts += 1
        if self._starts > MAX_STARTS or not self._working.reserve(run):
            self._skip()
            return None
        run.cache = self._model.fresh_cache()
        return run

    def _compute(self, case: Case, run: Run) -> None:
        assert run.cache is not None
        begin, silent = run.num_fed, case.num_prompt - 1
        size = self._sizer.size(begin)
        end = min(begin + size, silent)
        if begin >= silent:
            end = min(begin + min(size, _LOGITS_TOKENS), case.num_compared)
        started = time.monotonic()
        logits = self._model.forward(mx.array(case.token_ids[begin:end])[None], cache=run.cache)
        if begin == 0:
            self._working.make_room_at_once(run)
        mx.eval(arrays_of(run.cache))
        self._sizer.record(end - begin, time.monotonic() - started, begin)
        run.num_fed = end
        wrong = self._wrong(case, logits[0], begin) if begin >= silent else None
        if wrong is not None:
            self._quarantine(case, *wrong)
        if wrong is not None or end == case.num_compared:
            self.counters.verified += 1
            self._close()

    def _wrong(self, case: Case, logits: mx.array, begin: int) -> tuple[int, float] | None:
        """Return the token that was chosen by other logits, and how far they differ, if any.

        `logits` are `[tokens, vocab]` for the tokens from `begin` on.
        """
        if begin < case.num_prompt:
            difference = relative_to_range(_numpy(case.logits), _numpy(logits[0]))
            if not difference <= self._tolerance:
                return case.num_prompt, difference
        if case.greedy:
            chosen = case.token_ids[begin + 1 : begin + 1 + logits.shape[0]]
            behind = behind_the_likeliest(logits, chosen)
            # Twice: the likeliest may have lost as much as the chosen one has gained.
            beyond = np.flatnonzero(behind > 2 * self._tolerance)
            if beyond.size:
                return begin + 1 + int(beyond[0]), float(behind[beyond[0]])
        return None

    def _quarantine(self, case: Case, position: int, difference: float) -> None:
        self.counters.verify_mismatches += 1
        log.error(
            "WRONG STATE: request %s with %d tokens from the cache chose token %d by logits that "
            "differ from a cold run's by %.1e of their range; all state of its path is dropped",
            *(case.request_id, case.num_cached, position, difference),
        )
        self._cache.drop_path(case.namespace, case.token_ids)
        # Others that went through it say nothing of what will be computed in its place.
        kept = [other for other in self._waiting if not _meet(other, case)]
        self.counters.verify_skipped += len(self._waiting) - len(kept)
        self._waiting = deque(kept)
        self._on_mismatch(case.namespace, case.token_ids)

    def _skip(self) -> None:
        self.counters.verify_skipped += 1
        self._close()

    def _close(self) -> None:
        self.give_back()
        self._case = None


def relative_to_range(got: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Return the largest difference over the range of the expected values; NaN if one has NaN.

    Entries that are equally infinite or both NaN, as masked ones are, do not differ.
    """
    differ = ~((got == expected) | (np.isnan(got) & np.isnan(expected)))
    if not differ.any():
        return 0.0
    finite = expected[np.isfinite(expected)]
    spread = float(finite.max() - finite.min()) if finite.size else 0.0
    largest = float(np.abs(got[differ] - expected[differ]).max())
    return largest / spread if spread else float("inf")


def behind_the_likeliest(logits: mx.array, chosen: TokenIds) -> NDArray[np.float32]:
    """Return how far each row's chosen token lies behind its highest, over the row's range.

    0 for rows with NaN, of which nothing can be said.
    """
    rows = logits.astype(mx.float32)
    highest = mx.max(rows, axis=-1)
    lowest = mx.min(mx.where(mx.isfinite(rows), rows, highest[:, None]), axis=-1)
    taken = mx.take_along_axis(rows, mx.array(chosen)[:, None], axis=-1)[:, 0]
    behind = (highest - taken) / mx.maximum(highest - lowest, 1e-30)
    return _numpy(mx.where(mx.any(mx.isnan(rows), axis=-1), 0.0, behind))


def _numpy(array: mx.array) -> NDArray[np.float32]:
    return np.array(array.astype(mx.float32))


def _meet(one: Case, other: Case) -> bool:
    """Whether two paths have a token in common, so that dropping one drops of the other."""
    return one.namespace == other.namespace and one.token_ids[0] == other.token_ids[0]

"""Working caches: brought up from stored segments, published back as they grow.

The only place where runs and the segment cache meet. Owns the byte reservation of every run. The
cache may only make things faster: a state that cannot be restored is a miss, one that does not fit
is not stored. Engine thread only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import mlx.core as mx

from kvserve.cache.codec import SegmentPayload, capture, reserve_room, restore
from kvserve.cache.codec_forms import fits
from kvserve.cache.codec_pack import unpack
from kvserve.cache.leases import Lease
from kvserve.cache.plan import finished_ends, plan, state_ends
from kvserve.cache.segments import SegmentCache
from kvserve.engine.fetch import Fetched
from kvserve.engine.model import LoadedModel
from kvserve.engine.run import Run

log = logging.getLogger(__name__)

HEADROOM_TOKENS = 256
"""Reply tokens that a reservation covers ahead, one growth step of mlx-lm's buffers."""


class WorkingCaches:
    """Starts, grows, publishes and ends the working caches of runs."""

    def __init__(
        self, model: LoadedModel, cache: SegmentCache[SegmentPayload], segment_tokens: int
    ) -> None:
        self._model = model
        self._cache = cache
        self._segment_tokens = segment_tokens
        self.num_failed_restores = 0
        self.make_way: Callable[[], None] = lambda: None
        """Called where a run needs memory that is not free, before anything is evicted."""

    # -- memory -------------------------------------------------------------------------------

    def nbytes_for(self, run: Run) -> int:
        """Return what a run needs to start: all its tokens and some reply."""
        return self._model.footprint.working(self._wanted(run))

    def reserve(self, run: Run) -> bool:
        """Set the memory of a run aside; False when it cannot be had now."""
        needed = self.nbytes_for(run)
        if not self._reserve(needed):
            return False
        run.reserved_nbytes, run.capacity = needed, self._wanted(run)
        return True

    def ensure_room(self, run: Run) -> bool:
        """Extend a run's reservation when its next token would outgrow it."""
        if run.num_fed < run.capacity:
            return True
        wanted = self._wanted(run)
        more = self._model.footprint.working(wanted) - run.reserved_nbytes
        if more > 0 and not self._reserve(more):
            return False
        run.reserved_nbytes += max(0, more)
        run.capacity = wanted
        return True

    def _reserve(self, nbytes: int) -> bool:
        if nbytes > self._cache.free_nbytes:
            self.make_way()
        return self._cache.reserve(nbytes)

    def _wanted(self, run: Run) -> int:
        # Whole growth steps: a buffer that is full in the middle of one grows past its reservation.
        num_tokens = run.length + min(run.remaining, HEADROOM_TOKENS)
        return -(-num_tokens // HEADROOM_TOKENS) * HEADROOM_TOKENS

    # -- a run's life -------------------------------------------------------------------------

    def begin(self, run: Run) -> None:
        """Give a run its working cache, restored as far as segments are held; sets its plan."""
        token_ids = run.token_ids
        run.cache, reuse = self._model.fresh_cache(), 0
        if self.uses_cache(run):
            run.cache, reuse = self._restored(run)
        run.num_fed = run.num_published = run.num_held = reuse
        run.plan = plan(
            len(token_ids), run.request.prompt.cuts, reuse, self._model.traits, self._segment_tokens
        )

    def _restored(self, run: Run) -> tuple[list[object], int]:
        token_ids, namespace = run.token_ids, run.request.namespace
        limit = len(token_ids) - 1
        lease, run.lease = run.lease, None
        if lease is None or lease.released:
            lease = self._cache.lookup(namespace, token_ids, limit)
        else:
            lease = self._cache.extend(lease, token_ids, limit)
        fetched, run.fetched, run.stored = run.fetched, None, None
        if fetched is not None and fetched.num_tokens > lease.num_tokens:
            restored = self._restored_from_disk(run, lease, fetched)
            if restored is not None:
                return restored, fetched.num_tokens
        while lease.num_tokens:
            fresh = self._model.fresh_cache()
            try:
                segments = self._cache.payloads(lease)
                restore(fresh, segments, lease.num_tokens, run.capacity)
            except LookupError as error:
                self.num_failed_restores += 1
                log.warning("a held state could not be restored, going further back: %s", error)
                limit = lease.num_tokens - 1
                self._cache.release(lease)
                lease = self._cache.lookup(namespace, token_ids, limit)
                continue
            self._cache.release(lease)
            return fresh, lease.num_tokens
        self._cache.release(lease)
        return self._model.fresh_cache(), 0

    def _restored_from_disk(
        self, run: Run, lease: Lease[SegmentPayload], fetched: Fetched
    ) -> list[object] | None:
        """Join what memory and disk hold, and let memory have the latter too; None for a miss."""
        fresh = self._model.fresh_cache()
        try:
            loaded = [(p.spec.start, p.spec.end, unpack(p)) for p in fetched.segments]
            if not all(fits(payload, self._model.forms) for _, _, payload in loaded):
                raise ValueError("it is not of this model")
            if loaded[0][0] > lease.num_tokens:
                # Behind that, the last segment that memory has is another conversation's.
                raise LookupError("memory no longer holds what the read went on from")
            held = self._cache.payloads(lease)
            restore(fresh, [*held, *loaded], fetched.num_tokens, run.capacity)
        except (LookupError, ValueError) as error:
            self.num_failed_restores += 1
            log.warning("a stored state could not be restored: %s", error)
            return None
        run.num_from_disk = fetched.num_tokens - lease.num_tokens
        self._cache.release(lease)
        # Of the last one, what agrees with the prompt: the rest is another conversation's.
        matched = run.token_ids[: fetched.num_matched]
        self._cache.adopt(run.request.namespace, matched, loaded)
        return fresh

    def make_room_at_once(self, run: Run) -> None:
        """After the first chunk: grow the buffers to the run's capacity in one step."""
        assert run.cache is not None
        reserve_room(run.cache, run.capacity)

    def publish(self, run: Run, *, tip: bool) -> None:
        """Store what has been completed since the last time; with `tip` up to the last token.

        The working cache must stand at `run.num_fed` tokens.
        """
        if run.cache is None or run.plan is None or not self.uses_cache(run):
            return
        position = run.num_fed
        token_ids = run.token_ids[:position]
        # The suffix that opens the reply, and the reply, are cut like a message of their own.
        ends = finished_ends(run.message_ends, position, self._segment_tokens)
        if tip:
            ends.append(position)
        traits = self._model.traits
        for end in sorted({end for end in ends if end > run.num_published}):
            stops = tip or end in run.plan.states or end > run.plan.length
            run.num_held = self._cache.publish(
                run.request.namespace,
                token_ids[:end],
                with_state=traits.stateful and end == position and stops,
                capture=partial(_capture, run.cache, position),
            )
            if run.num_held < end:
                break
            run.num_published = end
        if tip and traits.stateful:
            message_ends = [*run.message_ends, position]
            keep = state_ends(message_ends, position, self._segment_tokens)
            self._cache.thin_states(
                run.request.namespace, token_ids, keep, SegmentPayload.without_state
            )

    def at_cut(self, run: Run) -> bool:
        """Whether a decoding run stands at a cut that must be taken in passing."""
        if not self._model.traits.fleeting:
            return False
        cuts = run.request.prompt.cuts
        base = cuts[-1].position if cuts else 0
        return (run.num_fed - base) % self._segment_tokens == 0

    def end(self, run: Run) -> None:
        """Free a run's working cache, its lease and its reservation; idempotent."""
        if run.lease is not None:
            self._cache.release(run.lease)
            run.lease = None
        if run.reserved_nbytes:
            self._cache.unreserve(run.reserved_nbytes)
            run.reserved_nbytes = run.capacity = 0
        run.cache = run.pending = None

    def housekeeping(self) -> None:
        """Free what other threads dropped, and MLX's spare buffers."""
        self._cache.bury()
        mx.clear_cache()

    def uses_cache(self, run: Run) -> bool:
        """Whether states are reused and kept for this run."""
        return self._model.info.caching and run.request.use_cache


def _capture(
    cache: list[object], position: int, start: int, end: int, with_state: bool, contained: bool
) -> SegmentPayload:
    return capture(cache, position, start, end, with_state=with_state, contained=contained)

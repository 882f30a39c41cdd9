"""The engine thread: admits, prefills, decodes, publishes, one step after the other.

Everything MLX lives and dies here. Errors stop at three rings, each with an answer for whoever
waits: the request (its own prefill or sampling failed), the batch (a joint step failed: every row
is rebuilt from its tokens and stepped alone, so that only the culprit fails), and the loop
(anything else: all are told, `failure` is set, the process is to exit).

Decode runs one step ahead: the next step is launched before the last one's tokens are read, so
that detokenising and delivery overlap with computing. A row that turns out to have ended has then
been fed its last token too, which is what the next turn's prompt contains anyway.
"""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx
import numpy as np

from kvserve.cache.codec import arrays_of
from kvserve.cache.plan import chunk_end
from kvserve.core.errors import KvserveError, NotReady, RequestFailed
from kvserve.core.types import Finished, FinishReason, Started, TextPiece
from kvserve.engine.commands import FAILURE, Arrived, Call, Cancel, Cancelled, Command, Stop
from kvserve.engine.counters import Counters
from kvserve.engine.fetch import Fetcher
from kvserve.engine.line import Line
from kvserve.engine.model import LoadedModel
from kvserve.engine.run import Run
from kvserve.engine.sampling import Sampler
from kvserve.engine.scheduler import Chunk, ChunkSizer, Decode, Idle, Prefill, next_step
from kvserve.engine.text import TextStream
from kvserve.engine.verify import Verifier
from kvserve.engine.working import WorkingCaches

log = logging.getLogger(__name__)

FULL_LOGITS_TOKENS = 64
"""A last chunk up to this long goes through in one pass, logits for all its tokens included; a
longer one leaves its last token for a pass of its own, since a wide output layer is dear."""


class EngineLoop:
    """The body of the engine thread.

    Args:
        model: loaded on this thread.
        working: the working caches.
        inbox: commands from other threads.
        flush: called after each step, to hand emitted events over in one go.
        max_batch: how many runs may be prefilled or decoded at once.
        sizer: chooses chunk sizes.
        verifier: compares hits with cold runs while there is nothing else to do.
    """

    def __init__(
        self,
        model: LoadedModel,
        working: WorkingCaches,
        inbox: queue.SimpleQueue[Command],
        *,
        flush: Callable[[], None],
        max_batch: int,
        sizer: ChunkSizer,
        budget_nbytes: int,
        verifier: Verifier,
    ) -> None:
        self.counters = Counters()
        self.verifier = verifier
        self.fetcher: Fetcher | None = None
        self._model = model
        self._working = working
        self._inbox = inbox
        self._flush = flush
        self._sizer = sizer
        self._line = Line(working, max_running=max_batch, budget_nbytes=budget_nbytes)
        self._prefilling: list[Run] = []
        self._decoding: list[Run] = []
        self._decoded_last = True
        self._stopping = False

    @property
    def num_waiting(self) -> int:
        """Runs not yet admitted; may be read by any thread."""
        return len(self._line) + self._inbox.qsize()

    @property
    def num_running(self) -> int:
        return len(self._prefilling) + len(self._decoding)

    @property
    def num_failed_restores(self) -> int:
        """How often a held state could not be restored, which is a miss and should not happen."""
        return self._working.num_failed_restores

    def run(self) -> None:
        """Work until told to stop. An exception from here is the outermost ring."""
        try:
            while not self._stopping:
                self.advance()
        finally:
            self._dismiss_all("The server is stopping." if self._stopping else FAILURE)
            self._flush()

    def advance(self) -> None:
        """Take commands, then do one step, or wait for a command when there is none to do."""
        while not self._inbox.empty():
            self._obey(self._inbox.get())
        self._admit()
        stepped = self._step()
        self._flush()
        if not stepped and not self._stopping:
            if not (self._prefilling or len(self._line)):
                self._working.housekeeping()
            self._obey(self._inbox.get())

    # -- commands -----------------------------------------------------------------------------

    def _obey(self, command: Command) -> None:
        match command:
            case Run():
                self.counters.requests += 1
                self._line.join(command)
            case Cancel(run):
                self._cancel(run)
            case Call(function):
                function()
            case Arrived(run, fetched):
                run.fetching, run.fetched = False, fetched
                run.damaged = fetched.damaged
            case Stop():
                self._stopping = True

    def _cancel(self, run: Run) -> None:
        if run in self._prefilling or run in self._decoding:
            self._keep(run)
        elif not self._line.leave(run):
            return
        self.counters.cancelled += 1
        self._leave(run)
        run.emit(Cancelled())

    def _keep(self, run: Run) -> None:
        """Publish what an unfinished run has, so that asking again goes on from there."""
        try:
            self._model.batcher.sync()
            self._working.publish(run, tip=True)
        except Exception:  # request ring: keeping is a favour
            log.exception("the state of a cancelled request could not be kept")

    def _leave(self, run: Run) -> None:
        """Take a run out of wherever it is and free what it holds."""
        self._prefilling = [other for other in self._prefilling if other is not run]
        self._decoding = [other for other in self._decoding if other is not run]
        self._working.end(run)

    def _fail(self, run: Run, error: Exception) -> None:
        """The request ring: answer one run with an error."""
        if not isinstance(error, KvserveError):
            log.error("request %s failed", run.request.request_id, exc_info=error)
            error = RequestFailed("The model failed on this request; others were not affected.")
        self.counters.failed += 1
        self._leave(run)
        run.emit(error)

    def _dismiss_all(self, why: str) -> None:
        runs = [*self._line.dismiss(), *self._prefilling, *self._decoding]
        while not self._inbox.empty():
            command = self._inbox.get()
            if isinstance(command, Run):
                runs.append(command)
            elif isinstance(command, Call):
                command.refuse(why)
        for run in runs:
            run.emit(NotReady(why))

    # -- admission ----------------------------------------------------------------------------

    def _admit(self) -> None:
        while admitted := self._line.admit([*self._prefilling, *self._decoding]):
            run, refusal = admitted
            if refusal is not None:
                self._fail(run, refusal)
                continue
            run.follows = self._line.leader_of(run, self._prefilling)
            self._prefilling.append(run)
            self._fetch(run)

    def _fetch(self, run: Run) -> None:
        """Begin to read what the disk holds of a prompt beyond what memory does."""
        if run.stored is None or self.fetcher is None or not self._working.uses_cache(run):
            return
        run.fetching = True
        held = run.lease.num_tokens if run.lease is not None and not run.lease.released else 0
        self.fetcher.begin(
            run.stored,
            held,
            run.length - 1,
            lambda fetched: self._inbox.put(Arrived(run, fetched)),
        )

    def _is_behind(self, run: Run) -> bool:
        """Whether the disk, or another run, is about to give what this one needs."""
        if run.fetching:
            return True
        if run.follows is None or run.cache is not None:
            return False
        leader, shared = run.follows
        return leader in self._prefilling and leader.num_fed < shared

    # -- steps --------------------------------------------------------------------------------

    def _step(self) -> bool:
        """Do what is next; False when there is nothing to do."""
        ahead = [run for run in self._prefilling if not self._is_behind(run)]
        prefills = [Prefill(run.length - run.num_fed, run.passed_over) for run in ahead]
        match next_step(len(self._decoding), prefills, decoded_last=self._decoded_last):
            case Chunk(index):
                self._decoded_last = False
                self._prefill(ahead[index])
            case Decode():
                self._decoded_last = True
                self._decode()
            case Idle():
                return not (self._prefilling or len(self._line)) and self.verifier.step()
        return True

    def _prefill(self, run: Run) -> None:
        for other in self._prefilling:
            other.passed_over += other is not run and not self._is_behind(other)
        run.passed_over = 0
        try:
            self._prefill_chunk(run)
        except Exception as error:  # request ring
            self._fail(run, error)

    def _prefill_chunk(self, run: Run) -> None:
        if run.cache is None:
            self._start(run)
        assert run.plan is not None and run.cache is not None
        token_ids = run.token_ids
        size = self._sizer.size(run.num_fed, streams=bool(self._decoding))
        begin, end = run.num_fed, chunk_end(run.num_fed, run.plan, size)
        if end == run.plan.length and end - begin > FULL_LOGITS_TOKENS:
            end -= 1
        started = time.monotonic()
        logits = self._model.forward(mx.array(token_ids[begin:end])[None], cache=run.cache)
        if begin == 0:
            self._working.make_room_at_once(run)
        mx.eval(arrays_of(run.cache))
        elapsed = time.monotonic() - started
        self._sizer.record(end - begin, elapsed, begin)
        self.counters.longest_chunk_s = max(self.counters.longest_chunk_s, elapsed)
        self.counters.prefilled_tokens += end - begin
        run.num_fed = end
        self._working.publish(run, tip=False)
        if end < run.plan.length:
            return
        if run.request.max_tokens:
            self._join(run, logits[0, -1])
        else:
            self._end(run, FinishReason.LENGTH)

    def _start(self, run: Run) -> None:
        run.follows = None
        self._working.begin(run)
        if run.started:
            return  # taken up again after a failed step or for lack of memory
        run.started = True
        prompt, cached = len(run.request.prompt), run.num_fed
        run.num_cached = cached
        self.counters.cached_tokens += cached
        self.counters.cached_tokens_from_disk += run.num_from_disk
        run.emit(Started(cached, prompt - cached, run.num_from_disk, run.damaged))

    def _join(self, run: Run, logits: mx.array) -> None:
        """Move a prefilled run to the decoding rows."""
        params = run.request.sampling
        if params.seed is None:
            params = replace(params, seed=run.seed)
        prompt = run.request.prompt.token_ids
        run.sampler = Sampler(params, logits.shape[-1], prompt, run.reply)
        if run.text is None:
            backend = self._model.tokenizer.backend_tokenizer
            run.text = TextStream(backend, run.request.stop)
        self.verifier.draw(run, logits)
        run.pending = run.sampler.sample(logits)
        _launch(run.pending)
        self._prefilling = [other for other in self._prefilling if other is not run]
        self._decoding.append(run)

    def _decode(self) -> None:
        self._ensure_room()
        solo = [run for run in self._decoding if run.solo]
        joint = [run for run in self._decoding if not run.solo]
        for rows in ([joint] if joint else []) + [[run] for run in solo]:
            try:
                self._decode_rows(rows)
            except Exception as error:  # batch ring
                self._recover(rows, error)

    def _decode_rows(self, rows: list[Run]) -> None:
        self.counters.decode_steps += 1
        going_on = [run for run in rows if run.remaining > 1]
        pending = mx.concatenate([_pending(run) for run in rows])
        following: dict[int, mx.array] = {}
        if going_on:
            tokens = mx.concatenate([_pending(run) for run in going_on])
            logits = self._model.batcher.step(tokens, [run.cache or [] for run in going_on])
            following = self._sample(going_on, logits)
        values: list[int] = pending.tolist()  # type: ignore[assignment]
        for run in going_on:
            run.num_fed += 1
        self.counters.decoded_tokens += len(rows)
        for run, value in zip(rows, values, strict=True):
            if run not in self._decoding:
                continue  # its sampling failed
            run.pending = following.get(id(run))
            try:
                self._take(run, value)
            except Exception as error:  # request ring
                self._fail(run, error)

    def _sample(self, rows: list[Run], logits: mx.array) -> dict[int, mx.array]:
        """Launch the choice of every row's next token; a row whose sampler fails drops out."""
        chosen: dict[int, mx.array] = {}
        if all(run.sampler is not None and run.sampler.plain_greedy for run in rows):
            tokens = mx.argmax(logits, axis=-1).astype(mx.uint32)
            chosen = {id(run): tokens[i : i + 1] for i, run in enumerate(rows)}
            _launch(tokens)
            return chosen
        for i, run in enumerate(rows):
            assert run.sampler is not None
            try:
                chosen[id(run)] = run.sampler.sample(logits[i])
            except Exception as error:  # request ring
                self._fail(run, error)
        _launch(*chosen.values())
        return chosen

    def _take(self, run: Run, token: int) -> None:
        """Account for a token that has been read: text out, or the end."""
        assert run.text is not None
        run.reply.append(token)
        if not run.first_token_at:
            run.first_token_at = time.monotonic()
        if token in self._model.eos_token_ids:
            self._finish(run, FinishReason.STOP)
            return
        piece = run.text.feed(token)
        if piece:
            run.emit(TextPiece(piece, len(run.reply)))
        if run.text.stopped:
            self._finish(run, FinishReason.STOP)
        elif run.remaining <= 0:
            self._finish(run, FinishReason.LENGTH)
        elif self._working.at_cut(run):
            self._model.batcher.sync()
            self._working.publish(run, tip=True)

    def _finish(self, run: Run, reason: FinishReason) -> None:
        assert run.text is not None
        rest = run.text.finish()
        if run.text.stopped:
            reason = FinishReason.STOP
        if rest:
            run.emit(TextPiece(rest, len(run.reply)))
        self._end(run, reason)

    def _end(self, run: Run, reason: FinishReason) -> None:
        """Publish all that a run has, free it, and tell its last event."""
        self._keep(run)
        self._leave(run)
        self.verifier.offer(run)
        self.counters.finished += 1
        ended = time.monotonic()
        run.emit(
            Finished(
                reason=reason,
                token_ids=np.array(run.reply, np.uint32),
                # What was reused is on disk where memory has no room for it.
                num_stored=max(run.num_held, run.num_cached),
                ttft_s=run.first_token_at - run.submitted_at,
                decode_s=ended - run.first_token_at,
            )
        )

    # -- when things go wrong -----------------------------------------------------------------

    def _recover(self, rows: list[Run], error: Exception) -> None:
        """The batch ring: rebuild every row from its tokens; a row that was alone fails."""
        self._model.batcher.forget()
        rows = [run for run in rows if run in self._decoding]
        if len(rows) == 1 and rows[0].solo:
            self._fail(rows[0], error)
            return
        log.error("a decode step of %d rows failed; stepping them alone", len(rows), exc_info=error)
        self.counters.recovered_batches += 1
        for run in rows:
            run.solo = True
            self._requeue(run)

    def _requeue(self, run: Run) -> None:
        """Put a decoding run back in line; it is rebuilt from its tokens when its turn comes."""
        self._leave(run)
        run.num_fed = 0
        self._line.rejoin(run)

    def _ensure_room(self) -> None:
        """Make sure that every row may take one more token; the youngest yield if not."""
        for run in list(self._decoding):
            while run in self._decoding and not self._working.ensure_room(run):
                youngest = max(self._decoding, key=lambda other: other.submitted_at)
                if self._line.release_leases():
                    continue  # stored state goes before anyone's turn does
                if len(self._decoding) == 1 and not self._prefilling:
                    self._fail(run, self._line.too_large(run))
                    return
                # Its token in flight is dropped, and sampled again with the same outcome.
                self.counters.preempted += 1
                self._keep(youngest)
                self._requeue(youngest)


def _launch(*arrays: mx.array) -> None:
    """Begin to compute without waiting."""
    evaluate: Callable[..., None] = mx.async_eval
    evaluate(*arrays)


def _pending(run: Run) -> mx.array:
    assert run.pending is not None
    return run.pending

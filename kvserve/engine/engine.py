"""The async face of the engine thread.

Everything here runs on the event loop; it owns the waiting line's bound and the delivery of events
to the coroutines that wait. Looking up a prompt happens here, off the MLX thread, so that what it
needs is protected from eviction while it waits in line.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kvserve.cache.codec import LONGEST_CHUNK_TOKENS, SegmentPayload
from kvserve.cache.leases import Lease
from kvserve.cache.segments import SegmentCache
from kvserve.core.errors import ContextTooLong, InvalidRequest, NotReady, QueueFull
from kvserve.core.types import Event, Finished, GenerationRequest, TokenIds
from kvserve.engine.commands import FAILURE, Call, Cancel, Cancelled, Command, Stop
from kvserve.engine.exports import held_sources
from kvserve.engine.fetch import Fetcher, Read
from kvserve.engine.loop import EngineLoop
from kvserve.engine.memory import default_budget
from kvserve.engine.model import LoadedModel, ModelInfo
from kvserve.engine.run import Run
from kvserve.engine.scheduler import ChunkSizer
from kvserve.engine.verify import Verifier
from kvserve.engine.working import WorkingCaches
from kvserve.store.segments import SegmentSource, StoredPath

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How the engine shares the machine.

    `budget_nbytes` bounds stored segments and working caches together, None for the default
    share. `prefill_slice_s` is how long one prefill chunk may hold up running streams. With
    `caching` off nothing is reused and nothing kept. `verify_share` of the hits, in [0, 1], are
    computed again without the cache and compared.
    """

    budget_nbytes: int | None = None
    segment_tokens: int = 512
    max_batch: int = 16
    max_queue: int = 64
    prefill_slice_s: float = 0.25
    caching: bool = True
    verify_share: float = 0.0


class Generation:
    """The events of one request: `Started`, then `TextPiece`s, then `Finished`.

    Errors are raised from the iteration. Leaving early needs `aclose`, which gives the request
    up within one engine step.
    """

    def __init__(self, cancel: Callable[[], None]) -> None:
        self._events: asyncio.Queue[Event | Exception] = asyncio.Queue()
        self._cancel = cancel
        self._done = False
        self._let_go = asyncio.Event()

    def deliver(self, event: Event | Exception) -> None:
        """Hand over an event; on the event loop."""
        self._events.put_nowait(event)
        if isinstance(event, Finished | Exception):
            self._let_go.set()

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        if self._done:
            raise StopAsyncIteration
        event = await self._events.get()
        if isinstance(event, Cancelled):  # closed while we waited here
            raise StopAsyncIteration
        if isinstance(event, Exception):
            self._done = True
            raise event
        if isinstance(event, Finished):
            self._done = True
        return event

    async def aclose(self) -> None:
        """Give the request up unless it has ended; idempotent.

        Returns once the engine has let go of it: what was prefilled is then in the cache.
        """
        if not self._done:
            self._done = True
            self._cancel()
        await self._let_go.wait()


class Engine:
    """Owns the engine thread: start it, submit requests, read its figures, stop it.

    Args:
        load: called on the engine thread to load the model.
        settings: limits.
        on_death: called on the event loop if the thread dies; the process is to exit.
    """

    def __init__(
        self,
        load: Callable[[], LoadedModel],
        settings: EngineSettings,
        on_death: Callable[[], None] | None = None,
    ) -> None:
        self.settings = settings
        self.failure: str | None = None
        self._load = load
        self._on_death = on_death
        self._inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._outbox: list[tuple[Generation, Event | Exception]] = []
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self._event_loop: asyncio.AbstractEventLoop | None = None
        self._loaded: asyncio.Future[None] | None = None
        self._model: LoadedModel | None = None
        self._cache: SegmentCache[SegmentPayload] | None = None
        self._loop: EngineLoop | None = None
        self._sizer = ChunkSizer(settings.prefill_slice_s, LONGEST_CHUNK_TOKENS)
        self._stopping = False
        self.on_mismatch: Callable[[bytes, TokenIds], object] = lambda namespace, token_ids: None
        """Told, on the event loop, of a path whose state proved wrong; memory has dropped it."""

    # -- life ---------------------------------------------------------------------------------

    async def start(self) -> None:
        """Load the model and begin to serve. Raises what loading raises."""
        self._event_loop = asyncio.get_running_loop()
        self._loaded = self._event_loop.create_future()
        self._thread.start()
        await self._loaded

    async def stop(self) -> None:
        """End the thread; whoever still waits gets NotReady."""
        self._stopping = True
        self._inbox.put(Stop())
        if self._thread.is_alive():
            await asyncio.to_thread(_join, self._thread)
        if self._loop is not None and self._loop.fetcher is not None:
            await asyncio.to_thread(self._loop.fetcher.close)

    @property
    def ready(self) -> bool:
        return self._loop is not None and not self._stopping and self.failure is None

    @property
    def model(self) -> LoadedModel:
        if self._model is None:
            raise NotReady("The model is still loading.")
        return self._model

    @property
    def info(self) -> ModelInfo:
        return self.model.info

    @property
    def cache(self) -> SegmentCache[SegmentPayload]:
        if self._cache is None:
            raise NotReady("The model is still loading.")
        return self._cache

    # -- requests -----------------------------------------------------------------------------

    def submit(self, request: GenerationRequest, stored: StoredPath | None = None) -> Generation:
        """Put a request in line; `stored` is what the disk holds of its prompt.

        Raises QueueFull, NotReady, ContextTooLong or InvalidRequest at once.
        """
        loop = self._loop
        if loop is None or not self.ready:
            raise NotReady(self.failure or "The server is not ready.")
        self._validate(request)
        if loop.num_waiting >= self.settings.max_queue:
            raise QueueFull(
                f"{self.settings.max_queue} requests are waiting already (--max-queue).",
                retry_after_s=self._retry_after_s(),
            )
        generation = Generation(lambda: self._inbox.put(Cancel(run)))
        run = Run(request, lambda event: self._outbox.append((generation, event)))
        if self.info.caching and request.use_cache:
            ids = request.prompt.token_ids
            run.lease = self.cache.lookup(request.namespace, ids, len(ids) - 1)
            run.stored = stored
        self._inbox.put(run)
        return generation

    def _validate(self, request: GenerationRequest) -> None:
        num_tokens, vocab_size = len(request.prompt), self.model.vocab_size
        if num_tokens == 0:
            raise InvalidRequest("The prompt is empty.", param="messages")
        if num_tokens >= self.info.context_length:
            raise ContextTooLong(num_tokens, self.info.context_length)
        if int(request.prompt.token_ids.max()) >= vocab_size:
            raise InvalidRequest(
                f"The prompt has a token id outside the model's vocabulary of {vocab_size}.",
                param="messages",
            )
        outside = [i for i in request.sampling.logit_bias if not 0 <= i < vocab_size]
        if outside:
            raise InvalidRequest(
                f"logit_bias: token id {outside[0]} is not in [0, {vocab_size}).",
                param="logit_bias",
            )

    def _retry_after_s(self) -> int:
        speed = self._sizer.tokens_per_s
        return 1 if speed is None else max(1, min(60, round(self.settings.max_queue * 256 / speed)))

    async def call(self, function: Callable[[], Any]) -> Any:
        """Run a short function on the engine thread, between two steps, and return its result.

        Raises NotReady when the thread ends before, and what `function` raises.
        """
        if not self.ready:
            raise NotReady(self.failure or "The server is not ready.")
        done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def answer() -> None:
            try:
                result = function()
            except Exception as error:  # request ring: the caller's, not the loop's
                refuse(error)
            except BaseException:  # the loop's
                refuse(NotReady(FAILURE))
                raise
            else:
                self._call_soon(lambda: None if done.done() else done.set_result(result))

        def refuse(error: Exception) -> None:
            self._call_soon(lambda: None if done.done() else done.set_exception(error))

        self._inbox.put(Call(answer, lambda why: refuse(NotReady(why))))
        return await done

    # -- the disk -----------------------------------------------------------------------------

    def attach_disk(self, read: Read, on_damage: Callable[[int, str], None]) -> None:
        """Let requests take up what is on disk; both are called in reader threads."""
        if self._loop is None:
            raise NotReady("The model is still loading.")
        self._loop.fetcher = Fetcher(read, on_damage)

    def held(self, namespace: bytes, token_ids: TokenIds) -> int:
        """Return how many leading tokens can be taken up again from memory."""
        return self.cache.held(namespace, token_ids)

    def hold(self, namespace: bytes, token_ids: TokenIds) -> Lease[SegmentPayload]:
        """Protect what memory holds of a path, as long as requests can do without its room."""
        return self.cache.lookup(namespace, token_ids, yielding=True)

    def release(self, lease: Lease[SegmentPayload]) -> None:
        """Give a held path back; idempotent."""
        self.cache.release(lease)

    async def sources(
        self, lease: Lease[SegmentPayload], path: StoredPath, ranges: Sequence[tuple[int, int]]
    ) -> list[SegmentSource]:
        """Return what is to be stored of a held path for each of the token ranges.

        `path` is what the disk has of it. Raises SourceGone when memory no longer holds a range.
        """
        return await held_sources(self.cache, self.call, lease, path, ranges)

    def stats(self) -> dict[str, Any]:
        """Return figures since start, JSON-able, without anything a user wrote."""
        loop = self._loop
        if loop is None:
            return {"ready": False}
        return {
            "ready": self.ready,
            "waiting": loop.num_waiting,
            "running": loop.num_running,
            "prefill_tokens_per_s": self._sizer.tokens_per_s,
            "batching": "ragged" if self.model.batcher.ragged else "row by row",
            **asdict(loop.counters),
            **asdict(loop.verifier.counters),
            "failed_restores": loop.num_failed_restores,
            "cache": self.cache.stats(),
        }

    # -- the engine thread --------------------------------------------------------------------

    def _main(self) -> None:
        assert self._event_loop is not None
        assert self._loaded is not None
        try:
            settings = self.settings
            model = self._load()
            if not settings.caching:
                notes = (*model.info.notes, "CACHING IS OFF (--no-caching)")
                model = replace(model, info=replace(model.info, caching=False, notes=notes))
            budget = settings.budget_nbytes or default_budget(model.weights_nbytes)
            self._cache = SegmentCache(
                model.traits,
                budget,
                model.footprint.segment,
                on_drop=lambda: self._inbox.put(Call(self.cache.bury)),
            )
            self._model = model
            working = WorkingCaches(model, self._cache, settings.segment_tokens)
            self._loop = EngineLoop(
                model,
                working,
                self._inbox,
                flush=self._flush,
                max_batch=settings.max_batch,
                sizer=self._sizer,
                budget_nbytes=budget,
                verifier=Verifier(
                    model,
                    working,
                    self._cache,
                    self._sizer,
                    settings.verify_share,
                    lambda *path: self._call_soon(self.on_mismatch, *path),
                ),
            )
        except BaseException as error:  # loop ring: told to whoever starts the server
            self._call_soon(self._loaded.set_exception, error)
            return
        self._call_soon(self._loaded.set_result, None)
        try:
            self._loop.run()
        except BaseException:  # loop ring: nothing can be answered any more
            log.exception("the engine has died")
            self.failure = FAILURE
            self._call_soon(self._answer_the_late)

    def _answer_the_late(self) -> None:
        """After the thread's death, on the event loop: what came in while it died is answered."""
        while not self._inbox.empty():
            command = self._inbox.get()
            if isinstance(command, Run):
                command.emit(NotReady(self.failure or ""))
            elif isinstance(command, Call):
                command.refuse(self.failure or "")
        self._flush()
        if self._on_death is not None:
            self._on_death()

    def _flush(self) -> None:
        """Hand the events of one step to the event loop, in one call."""
        if self._outbox:
            batch, self._outbox = self._outbox, []
            self._call_soon(_deliver, batch)

    def _call_soon(self, function: Callable[..., object], *args: Any) -> None:
        assert self._event_loop is not None
        try:
            self._event_loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # the event loop is closed: nobody waits any more
            log.debug("an event came after the event loop had closed")


def _join(thread: threading.Thread) -> None:
    """Wait until a thread has ended, and all that it takes with it.

    MLX frees what it has compiled as the system's thread ends, and needs Python for that. Before
    3.13 `join` does not wait so long, and an interpreter that is gone by then ends in SIGABRT.
    """
    thread.join()
    task = Path("/proc/self/task", str(thread.native_id))  # on Linux; elsewhere it is never there
    deadline = time.monotonic() + 5
    while task.exists() and time.monotonic() < deadline:
        time.sleep(0.001)


def _deliver(batch: list[tuple[Generation, Event | Exception]]) -> None:
    for generation, event in batch:
        generation.deliver(event)

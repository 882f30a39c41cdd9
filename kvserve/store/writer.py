"""The write-behind queue: what turns leave for the disk, done one after the other behind them.

State: the waiting jobs by key, the one that runs, and the counts; owned by the event loop on which
jobs are submitted. Jobs are opaque coroutine functions: the writer knows no store, retries nothing
and decides nothing about what to write. The queue is bounded and coalesces: a conversation that
takes turns faster than the disk takes bytes is written once, as it then is. Losing a job costs a
prefill after a restart, never an answer; every loss is counted and has one line in the log.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from kvserve.core.errors import KvserveError
from kvserve.store.errors import SourceGone

logger = logging.getLogger(__name__)

MAX_WAITING = 256

Job = Callable[[], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class _Waiting:
    job: Job
    dropped: Callable[[], None] | None


class Writer:
    """Runs submitted jobs one at a time, in the order in which their keys first came.

    `counts` has "done", "failed", "dropped" (the oldest, when the queue was full), "replaced" and
    "abandoned" (left when the writer was closed).
    """

    def __init__(self, max_waiting: int = MAX_WAITING) -> None:
        self.counts: Counter[str] = Counter()
        self._max_waiting = max_waiting
        self._waiting: dict[Hashable, _Waiting] = {}
        self._running: Hashable | None = None
        self._busy = False
        self._closed = False
        self._changed = asyncio.Condition()
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def num_pending(self) -> int:
        """Jobs that wait or run."""
        return len(self._waiting) + self._busy

    def pending(self, key: Hashable) -> bool:
        """Whether a job of `key` waits or runs."""
        return key in self._waiting or (self._busy and self._running == key)

    def submit(self, key: Hashable, job: Job, *, dropped: Callable[[], None] | None = None) -> None:
        """Queue a job; one of the same key that still waits gives its place to it.

        When the queue is full the oldest waiting job is dropped: newer conversations are the ones
        that will go on. `dropped` is called if the job will never run for that, or because the
        writer is closed; not if it is replaced.
        """
        waiting = _Waiting(job, dropped)
        if self._closed:
            self._lose(waiting, "abandoned")
            return
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._work())
        if key in self._waiting:
            self.counts["replaced"] += 1
        elif len(self._waiting) >= self._max_waiting:
            self._lose(self._waiting.pop(next(iter(self._waiting))), "dropped")
            logger.warning("write dropped: %d are waiting already", self._max_waiting)
        self._waiting[key] = waiting
        self._news.set()

    def cancel(self, key: Hashable) -> bool:
        """Forget a waiting job, as when its conversation is deleted; a running one goes on."""
        return self._waiting.pop(key, None) is not None

    def stats(self) -> dict[str, Any]:
        """Return counts of jobs, JSON-able."""
        names = ("done", "failed", "dropped", "replaced", "abandoned")
        return {"pending": self.num_pending, **{name: self.counts[name] for name in names}}

    async def flush(self, key: Hashable | None = None) -> None:
        """Wait until no job (of `key`) that was submitted before is waiting or running."""

        def over() -> bool:
            return not self.num_pending if key is None else not self.pending(key)

        async with self._changed:
            await self._changed.wait_for(lambda: self._task is None or self._task.done() or over())

    async def close(self, *, drain: bool = True, timeout_s: float = 30.0) -> None:
        """Stop; with `drain` after the waiting jobs are done, or `timeout_s` seconds. Idempotent.

        A job that still runs then is cancelled; jobs leave nothing half done.
        """
        self._closed = True
        if self._task is None:
            return
        if drain:
            with suppress(TimeoutError):
                await asyncio.wait_for(self.flush(), timeout_s)
        left = self.num_pending
        for waiting in self._waiting.values():
            self._lose(waiting, "abandoned")
        self._waiting.clear()
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        if left:
            logger.warning("writer closed: %d conversations were not written", left)
        async with self._changed:
            self._changed.notify_all()

    def _lose(self, waiting: _Waiting, why: str) -> None:
        self.counts[why] += 1
        if waiting.dropped is not None:
            waiting.dropped()

    async def _work(self) -> None:
        while True:
            await self._news.wait()
            while self._waiting:
                self._running = next(iter(self._waiting))
                job = self._waiting.pop(self._running).job
                self._busy = True
                try:
                    await self._run(job)
                finally:
                    self._busy = False
                async with self._changed:
                    self._changed.notify_all()
            self._news.clear()

    async def _run(self, job: Job) -> None:
        """Run one job; whatever goes wrong in it ends here."""
        begun = time.perf_counter()
        try:
            await job()
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._closed or (task is not None and task.cancelling()):
                self.counts["abandoned"] += 1
                raise
            self.counts["failed"] += 1  # something inside the job was cancelled, not the writer
        except SourceGone:
            self.counts["failed"] += 1
            logger.info("write skipped: its state is no longer in memory")
        except KvserveError as error:
            self.counts["failed"] += 1
            ms = (time.perf_counter() - begun) * 1000
            logger.warning("write refused after %.0f ms: %s", ms, error.message)
        except Exception:
            # The ring of the writer: one bad conversation must not end the writing of all.
            self.counts["failed"] += 1
            ms = (time.perf_counter() - begun) * 1000
            logger.exception("write failed after %.0f ms", ms)
        else:
            self.counts["done"] += 1

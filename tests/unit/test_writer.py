"""The write-behind queue: bounded, coalescing, in order, and not to be killed by one job."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

import pytest

from kvserve.core.errors import TooLarge
from kvserve.store.errors import SourceGone
from kvserve.store.writer import Writer


class Jobs:
    """Makes jobs that note their names when they are done; `gate` holds them up."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.begun: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self.gate = asyncio.Event()
        self.gate.set()

    def __call__(self, name: str) -> Callable[[], Awaitable[None]]:
        async def job() -> None:
            self.begun[name].set()
            await self.gate.wait()
            self.done.append(name)

        return job


@asynccontextmanager
async def writing(max_waiting: int = 8) -> AsyncIterator[tuple[Writer, Jobs]]:
    writer = Writer(max_waiting)
    try:
        yield writer, Jobs()
    finally:
        await writer.close(drain=False)


def failing(error: BaseException) -> Callable[[], Awaitable[None]]:
    async def job() -> None:
        raise error

    return job


def test_jobs_run_in_the_order_in_which_their_keys_came() -> None:
    async def scenario() -> None:
        async with writing() as (writer, jobs):
            for name in "abc":
                writer.submit(name, jobs(name))
            await writer.flush()
            assert jobs.done == ["a", "b", "c"] and writer.num_pending == 0
            assert writer.stats()["done"] == 3

    asyncio.run(scenario())


def test_a_newer_job_of_the_same_key_takes_the_place_of_a_waiting_one() -> None:
    async def scenario() -> None:
        async with writing() as (writer, jobs):
            jobs.gate.clear()
            writer.submit("x", jobs("x1"))
            await jobs.begun["x1"].wait()
            writer.submit("a", jobs("a1"))
            writer.submit("x", jobs("x2"))  # x1 runs already: this one waits
            writer.submit("a", jobs("a2"))
            assert writer.num_pending == 3
            jobs.gate.set()
            await writer.flush()
            assert jobs.done == ["x1", "a2", "x2"] and writer.counts["replaced"] == 1

    asyncio.run(scenario())


def test_a_full_queue_drops_the_oldest_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with writing(max_waiting=2) as (writer, jobs):
            jobs.gate.clear()
            writer.submit("running", jobs("running"))
            await jobs.begun["running"].wait()
            dropped: list[str] = []
            for name in "abc":
                writer.submit(name, jobs(name), dropped=partial(dropped.append, name))
            assert dropped == ["a"] and not writer.pending("a")
            jobs.gate.set()
            await writer.flush()
            assert jobs.done == ["running", "b", "c"] and writer.counts["dropped"] == 1

    asyncio.run(scenario())
    assert "write dropped" in caplog.text


@pytest.mark.parametrize(
    ("error", "level", "words"),
    [
        (ValueError("bad"), "ERROR", "write failed"),
        (TooLarge("12 bytes, 10 allowed"), "WARNING", "12 bytes, 10 allowed"),
        (SourceGone("gone"), "INFO", "no longer in memory"),
        (asyncio.CancelledError(), None, ""),
    ],
)
def test_a_failing_job_is_counted_and_the_next_one_runs(
    error: BaseException, level: str | None, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with writing() as (writer, jobs):
            writer.submit("bad", failing(error))
            writer.submit("good", jobs("good"))
            await writer.flush()
            assert jobs.done == ["good"] and writer.counts["failed"] == 1

    with caplog.at_level(logging.INFO, "kvserve.store.writer"):
        asyncio.run(scenario())
    assert level is None or (level, True) in [
        (record.levelname, words in record.getMessage()) for record in caplog.records
    ]


def test_flush_of_a_key_waits_for_that_key_only() -> None:
    async def scenario() -> None:
        async with writing() as (writer, jobs):
            writer.submit("a", jobs("a"))
            await writer.flush("a")
            jobs.gate.clear()
            writer.submit("b", jobs("b"))
            await writer.flush("a")  # b holds up nobody who does not ask for it
            waiter = asyncio.create_task(writer.flush("b"))
            await jobs.begun["b"].wait()
            assert not waiter.done()
            jobs.gate.set()
            await waiter
            assert jobs.done == ["a", "b"]

    asyncio.run(scenario())


def test_close_finishes_what_waits() -> None:
    async def scenario() -> None:
        async with writing() as (writer, jobs):
            writer.submit("a", jobs("a"))
            writer.submit("b", jobs("b"))
            await writer.close()
            assert jobs.done == ["a", "b"]
            lost: list[str] = []
            writer.submit("c", jobs("c"), dropped=lambda: lost.append("c"))
            assert lost == ["c"] and writer.counts["abandoned"] == 1
            await writer.close()
            await writer.flush()

    asyncio.run(scenario())


def test_close_gives_up_after_its_time_and_counts_what_was_left() -> None:
    async def scenario() -> None:
        async with writing() as (writer, jobs):
            jobs.gate.clear()
            lost: list[str] = []
            writer.submit("a", jobs("a"))
            writer.submit("b", jobs("b"), dropped=lambda: lost.append("b"))
            await jobs.begun["a"].wait()
            waiter = asyncio.create_task(writer.flush("a"))
            await writer.close(timeout_s=0.01)
            await waiter
            assert jobs.done == [] and writer.counts["abandoned"] == 2 and lost == ["b"]

    asyncio.run(scenario())


def test_a_cancelled_job_is_not_written() -> None:
    async def scenario() -> None:
        async with writing() as (writer, jobs):
            writer.submit("a", jobs("a"))
            writer.submit("b", jobs("b"))
            assert writer.cancel("b") and not writer.cancel("c")
            await writer.flush()
            assert jobs.done == ["a"]

    asyncio.run(scenario())

"""A conversation that memory can run, but not keep beside it, loses nothing that is on disk."""

from __future__ import annotations

import pytest

from kvserve.core.types import Finished, Started
from tests.fakes import TOKEN_NBYTES, ask, running_engine
from tests.unit.test_engine_disk import FakeDisk, saved_chat

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.parametrize("budget_tokens", [800, 900, 1500])
async def test_a_turn_counts_as_stored_what_it_took_from_disk(budget_tokens: int) -> None:
    disk = FakeDisk()
    held = await saved_chat(disk)
    async with running_engine(budget_nbytes=budget_tokens * TOKEN_NBYTES) as engine:
        disk.attach(engine)
        prompt = [*held, 1]
        async for event in engine.submit(ask(prompt, 6), disk.walk(prompt)):
            if isinstance(event, Started):
                assert event.num_from_disk == len(held) - 1
            if isinstance(event, Finished):
                # Else the conversation's record would be cut short, in memory and on disk.
                assert event.num_stored >= len(held) - 1

"""What is copied for the disk is copied in few steps, and each step is short."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvserve.engine import exports
from tests.fakes import TOKEN_NBYTES, ask, collect, random_tokens, running_engine
from tests.unit.test_engine_disk import EMPTY

pytestmark = pytest.mark.anyio

CUTS = range(10, 300, 10)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.parametrize(
    ("at_once", "num_steps"),
    [
        (1 << 20, 1),
        (100 * TOKEN_NBYTES, 3),
        (1, 30),
    ],
)
async def test_short_segments_are_copied_together_as_far_as_a_step_may_take(
    at_once: int, num_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exports, "AT_ONCE_NBYTES", at_once)
    tokens = random_tokens(300, seed=1)
    async with running_engine() as engine:
        await collect(engine.submit(ask(tokens, 0, cuts=CUTS)))
        ids = np.array(tokens, np.uint32)
        lease = engine.hold(b"", ids)
        (source,) = await engine.sources(lease, EMPTY, [(0, 300)])
        assert [spec.end for spec in source.specs] == [*CUTS, 300]
        counted, call = 0, engine.call

        async def counting(function: Callable[[], Any]) -> Any:
            nonlocal counted
            counted += 1
            return await call(function)

        monkeypatch.setattr(source, "_call", counting)
        for index, spec in enumerate(source.specs):
            keys, values = (np.frombuffer(part, np.float32) for part in await source.data(index))
            own = slice(spec.start, spec.end)
            assert keys.reshape(-1, 16)[:, 0].tolist() == tokens[own]
            assert values.reshape(-1, 16)[:, 0].tolist() == list(range(300)[own])
        assert counted == num_steps
        engine.release(lease)

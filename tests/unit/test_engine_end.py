"""The engine's thread leaves nothing to do for an interpreter that is about to go."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import mlx.core as mx
import pytest

from tests.fakes import FakeNetwork, ask, collect, random_tokens, running_engine

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class SlowToGo:
    """A Python object in MLX's cache of compiled functions, which goes with the thread."""

    gone = 0

    def __del__(self) -> None:
        time.sleep(0.2)
        SlowToGo.gone += 1


class CompilingNetwork(FakeNetwork):
    """The fake, with a compiled function called on the engine's thread."""

    def __init__(self) -> None:
        super().__init__()

        def twice(x: mx.array) -> Any:
            return x * 2, SlowToGo()

        self._twice: Any = mx.compile(twice)

    def __call__(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        mx.eval(self._twice(mx.ones(3))[0])
        return super().__call__(tokens, cache)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
async def test_a_stopped_engine_has_no_thread_that_still_frees_what_it_compiled() -> None:
    async with running_engine(CompilingNetwork()) as engine:
        await collect(engine.submit(ask(random_tokens(20, seed=1))))
        thread = engine._thread
        before = SlowToGo.gone
    assert str(thread.native_id) not in os.listdir("/proc/self/task")
    assert SlowToGo.gone > before

"""Blocking work off the event loop, such that nobody outruns it.

Stateless. `asyncio.to_thread` lets its caller go on when it is cancelled while the thread still
works: a file would then be closed under a write, and its number given to another file.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def offload(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Return `function(*args, **kwargs)`, called in a worker thread.

    When cancelled, waits for the thread before it lets the cancellation through.
    """
    call = partial(function, *args, **kwargs)
    # A future, not a task: the end of the loop cancels tasks, and no thread heeds that.
    work = asyncio.get_running_loop().run_in_executor(None, call)
    cancelled: asyncio.CancelledError | None = None
    while not work.done():
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError as error:
            cancelled = error
        except BaseException:
            break  # the work's own; told below
    if cancelled is not None:
        work.exception()  # taken note of: the cancellation is what the caller hears
        raise cancelled
    return work.result()

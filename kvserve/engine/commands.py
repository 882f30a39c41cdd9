"""What other threads ask of the engine thread, and what it says when it cannot.

Plain values, put into the loop's inbox by any thread and taken out by the engine thread.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvserve.engine.fetch import Fetched
from kvserve.engine.run import Run

FAILURE = "The engine has failed; the server must be restarted."


@dataclass(frozen=True, slots=True)
class Cancel:
    """Ask the loop to give up a run; what it has computed is kept."""

    run: Run


@dataclass(frozen=True, slots=True)
class Call:
    """Ask the loop to call a function on its thread; `refuse` is told why it never will."""

    function: Callable[[], None]
    refuse: Callable[[str], None] = lambda why: None


@dataclass(frozen=True, slots=True)
class Arrived:
    """Tell the loop that what the disk holds of a run's prompt has been read."""

    run: Run
    fetched: Fetched


class Cancelled(Exception):
    """The last event of a run that was given up; nobody waits for more."""


class Stop:
    """Ask the loop to end."""


Command = Run | Cancel | Call | Arrived | Stop

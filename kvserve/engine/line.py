"""Who waits, and who may start: the line in front of the engine's steps.

Owns the runs that are not yet admitted. First come, first served: memory is set aside for the one
at the head or nobody goes. Engine thread only, but for the length.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from kvserve.cache.tree import common_prefix
from kvserve.core.errors import KvserveError, TooLarge
from kvserve.engine.run import Run
from kvserve.engine.working import WorkingCaches

WORTH_WAITING_TOKENS = 64
"""A run waits for another's prefill when that saves it at least this many tokens."""


class Line:
    """The waiting runs.

    Args:
        working: where memory is set aside.
        max_running: how many runs may be prefilled or decoded at once.
        budget_nbytes: the memory of all KV states; a run that needs more can never start.
    """

    def __init__(self, working: WorkingCaches, *, max_running: int, budget_nbytes: int) -> None:
        self._working = working
        self._max_running = max_running
        self._budget_nbytes = budget_nbytes
        self._runs: deque[Run] = deque()

    def __len__(self) -> int:
        return len(self._runs)

    def join(self, run: Run) -> None:
        """Put a new run at the end."""
        self._runs.append(run)

    def rejoin(self, run: Run) -> None:
        """Put a run that had started back at the head."""
        self._runs.appendleft(run)

    def leave(self, run: Run) -> bool:
        """Take a run out; whether it was there."""
        if run not in self._runs:
            return False
        self._runs.remove(run)
        return True

    def dismiss(self) -> list[Run]:
        """Take all runs out and return them."""
        runs = list(self._runs)
        self._runs.clear()
        return runs

    def admit(self, running: Sequence[Run]) -> tuple[Run, KvserveError | None] | None:
        """Take out the run that may start now, its memory set aside; None if nobody may.

        A run that could never start comes with the error that it is to be answered with.
        """
        if not self._runs or len(running) >= self._max_running:
            return None
        run = self._runs[0]
        unfit = self._working.nbytes_for(run) > self._budget_nbytes
        while not unfit and not self._working.reserve(run):
            if running:
                return None  # memory comes back when a running request ends
            unfit = not self.release_leases()
        self._runs.popleft()
        return run, self.too_large(run) if unfit else None

    def release_leases(self) -> bool:
        """Let go of what waiting runs hold, so that it can be evicted; whether there was any."""
        leased = [run for run in self._runs if run.lease is not None]
        for run in leased:
            self._working.end(run)
        return bool(leased)

    def too_large(self, run: Run) -> KvserveError:
        """Return the answer to a run whose state does not fit the budget."""
        return TooLarge(
            f"This request needs {self._working.nbytes_for(run)} bytes of KV state for its "
            f"{run.length} tokens; the server may use {self._budget_nbytes} (--ram-budget).",
            param="messages",
            code="kv_budget_exceeded",
        )

    def leader_of(self, run: Run, prefilling: Sequence[Run]) -> tuple[Run, int] | None:
        """Return the run in prefill that shares most with this one beyond what is held already.

        Eight users who ask about one new document at once are to cost one prefill of it.
        """
        if not self._working.uses_cache(run):
            return None
        held = run.lease.num_tokens if run.lease is not None else 0
        leader, shared = None, held + WORTH_WAITING_TOKENS
        for other in prefilling:
            if other.request.namespace != run.request.namespace:
                continue
            if not self._working.uses_cache(other):
                continue
            common = common_prefix(other.request.prompt.token_ids, run.request.prompt.token_ids)
            if common > shared:
                leader, shared = other, common
        return None if leader is None else (leader, shared)

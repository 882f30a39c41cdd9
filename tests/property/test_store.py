"""Any history of writes, forks, deletes, time and restarts, beside a plain dictionary.

After each step: every conversation is what the dictionary says; whatever the disk gives back is
right; what was saved is there in full; the budget holds; figures equal a recount; `verify` is
clean.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import TypeVar

import numpy as np
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from kvserve.core.errors import OutOfSpace
from kvserve.store.guards import Limits
from kvserve.store.store import Store
from tests.store_fakes import IDENTITY, TOKEN_NBYTES, Clock, conversation, ids, readable, write

T = TypeVar("T")
NAMES = st.sampled_from("abcdef")
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=24).map(tuple)


@dataclass(frozen=True)
class Kept:
    """What the dictionary says of a conversation. `whole`: saved, and so all there."""

    tokens: tuple[int, ...]
    whole: bool = False
    pinned: bool = False
    pinned_until: datetime | None = None
    expires_at: datetime | None = None


class StoreMachine(RuleBasedStateMachine):
    limits = Limits(disk_share=1.0)

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.clock = Clock()
        self.runner = asyncio.Runner()
        self.kept: dict[str, Kept] = {}
        self.store = self.open()
        self.evicted = 0

    def run(self, act: Awaitable[T]) -> T:
        async def wait() -> T:
            return await act

        return self.runner.run(wait())

    def open(self) -> Store:
        return self.run(
            Store.open(self.folder, identity=IDENTITY, limits=self.limits, clock=self.clock)
        )

    def teardown(self) -> None:
        self.run(self.store.aclose())
        self.runner.close()
        shutil.rmtree(self.folder)

    # -- what happens -------------------------------------------------------------------------

    def keep(self, name: str, kept: Kept, act: Callable[..., Awaitable[object]]) -> bool:
        stored = conversation(
            name,
            ids(kept.tokens),
            saved=kept.whole,
            pinned=kept.pinned,
            pinned_until=kept.pinned_until,
            expires_at=kept.expires_at,
            used_at=self.clock.now,
        )
        files = set(self.files())
        try:
            self.run(act(stored))
        except OutOfSpace:
            assert self.limits.store_nbytes is not None
            assert set(self.files()) == files
            return False
        self.kept[name] = kept
        return True

    @rule(name=NAMES, tokens=TOKENS, by_order=st.booleans())
    def write(self, name: str, tokens: tuple[int, ...], by_order: bool) -> None:
        kept = replace(self.kept.get(name, Kept(())), tokens=tokens, whole=by_order)
        self.keep(name, kept, lambda stored: write(self.store, stored, by_order=by_order))

    @rule(name=NAMES, tokens=TOKENS)
    def go_on(self, name: str, tokens: tuple[int, ...]) -> None:
        """A turn: the same conversation with more behind it."""
        if name in self.kept:
            kept = replace(self.kept[name], tokens=(*self.kept[name].tokens, *tokens)[:60])
            self.keep(name, kept, lambda stored: write(self.store, stored))

    @rule(name=NAMES, new=NAMES, length=st.integers(1, 24))
    def fork_or_roll_back(self, name: str, new: str, length: int) -> None:
        if name in self.kept:
            kept = replace(self.kept[name], tokens=self.kept[name].tokens[:length])
            assert self.keep(new, kept, self.store.put)

    @rule(name=NAMES, minutes=st.none() | st.integers(1, 30))
    def pin(self, name: str, minutes: int | None) -> None:
        until = None if minutes is None else self.clock.now + timedelta(minutes=minutes)
        known = self.run(self.store.set_flags("a", name, pinned=True, pinned_until=until))
        assert known == (name in self.kept)
        if known:
            self.kept[name] = replace(self.kept[name], pinned=True, pinned_until=until)

    @rule(name=NAMES)
    def expire_soon(self, name: str) -> None:
        if name in self.kept:
            end = self.clock.now + timedelta(minutes=5)
            assert self.run(self.store.set_flags("a", name, expires_at=end))
            self.kept[name] = replace(self.kept[name], expires_at=end)

    @rule(name=NAMES)
    def delete(self, name: str) -> None:
        assert self.run(self.store.delete("a", name)) == (name in self.kept)
        self.kept.pop(name, None)

    @rule(name=NAMES)
    def touch(self, name: str) -> None:
        self.run(self.store.touch({("a", name): self.clock.now}))

    @rule(minutes=st.integers(1, 10))
    def time_passes(self, minutes: int) -> None:
        self.clock.advance(minutes=minutes)
        now = self.clock.now
        ends = {name: kept.expires_at for name, kept in self.kept.items()}
        over = [name for name, end in ends.items() if end is not None and end <= now]
        for name in over:
            del self.kept[name]
        for sweeps in range(2):
            assert all(self.run(self.store.find_expired("a", name)) for name in over)
            if not sweeps:
                self.run(self.store.sweep())
        if over:
            self.clock.advance(days=1)
            assert not any(self.run(self.store.find_expired("a", name)) for name in over)
            for name, end in ends.items():  # so did others, meanwhile
                if end is not None and name in self.kept:
                    del self.kept[name]

    @rule(all_of_it=st.booleans())
    def clean(self, all_of_it: bool) -> None:
        self.run(self.store.gc() if all_of_it else self.store.sweep())

    @rule()
    def restart(self) -> None:
        self.evicted += self.store.stats()["evicted"]
        self.run(self.store.aclose())
        self.store = self.open()

    # -- what is always so --------------------------------------------------------------------

    def files(self) -> list[Path]:
        return sorted((self.folder / "snapshots").glob("??/*.safetensors"))

    @invariant()
    def conversations_are_what_was_kept(self) -> None:
        heads = {head.id: head for head in self.run(self.store.heads())}
        assert set(heads) == set(self.kept)
        for name, kept in self.kept.items():
            found = self.run(self.store.find("a", name))
            assert found is not None and found.head == heads[name]
            assert np.array_equal(found.token_ids, ids(kept.tokens))
            assert (found.head.pinned, found.head.expires_at) == (kept.pinned, kept.expires_at)

    @invariant()
    def what_the_disk_gives_back_is_right(self) -> None:
        nothing_left = self.evicted + self.store.stats()["evicted"] == 0
        for kept in self.kept.values():
            held = self.run(readable(self.store, ids(kept.tokens)))
            assert held == len(kept.tokens) or not (kept.whole or nothing_left)

    @invariant()
    def figures_equal_a_recount_and_hold(self) -> None:
        nbytes = sum(file.stat().st_size for file in self.files())
        stats = self.store.stats()
        assert stats["stored_bytes"] == nbytes and stats["files"] == len(self.files())
        assert self.limits.store_nbytes is None or nbytes <= self.limits.store_nbytes

    @invariant()
    def verify_is_clean(self) -> None:
        async def look() -> list[object]:
            return [fault async for step in self.store.verify() for fault in step.faults]

        assert self.run(look()) == []


class TightMachine(StoreMachine):
    limits = Limits(disk_share=1.0, store_nbytes=60 * TOKEN_NBYTES)


# To shrink a history of files and transactions takes minutes: the first one found is told.
SOME = settings(
    max_examples=20, stateful_step_count=20, phases=[Phase.explicit, Phase.reuse, Phase.generate]
)


def test_any_history_leaves_the_store_right() -> None:
    run_state_machine_as_test(StoreMachine, settings=SOME)


def test_any_history_under_a_small_budget_leaves_the_store_right() -> None:
    run_state_machine_as_test(TightMachine, settings=SOME)

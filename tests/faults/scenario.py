"""A short life of a store, and what must be true of it whatever happened meanwhile.

Writes, a turn that follows one, a fork that grows, a save by order that needs an eviction, a pin, a
delete, and a sweep. `Journal` knows what was acknowledged; `check` reopens the folder and compares.
Not a test module.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from kvserve.core.errors import KvserveError
from kvserve.core.types import TokenIds
from kvserve.store.disk import Disk
from kvserve.store.guards import Limits
from kvserve.store.store import Store
from tests.store_fakes import IDENTITY, TOKEN_NBYTES, Clock, conversation, ids, readable, write

LIMITS = Limits(store_nbytes=215 * TOKEN_NBYTES, disk_share=1.0)
"""For all but "once", which has to make room for "big"."""

THOROUGH = pytest.mark.skipif(
    os.environ.get("ALL_FAULTS") != "1", reason="takes half an hour; set ALL_FAULTS=1"
)
"""Marks what tries every fault; an ordinary run takes a sample."""


def _tokens(seed: int, length: int) -> TokenIds:
    return ids(np.random.default_rng(seed).integers(0, 1000, length))


PROMPTS: dict[str, TokenIds] = {
    "chat": _tokens(1, 60),
    "fork": np.concatenate([_tokens(1, 60)[:45], _tokens(2, 20)]),
    "once": _tokens(3, 50),
    "big": _tokens(4, 80),
    "late": _tokens(5, 30),
}

State = int | None
"""Tokens of a conversation's record, None for none."""


@dataclass
class Journal:
    """What each conversation may be, by what was acknowledged.

    With `strict` a step that fails has changed nothing; without, it may have happened (the answer
    was lost, or the power). `note` hears of every acknowledgement.
    """

    strict: bool = True
    note: Callable[[str], None] = lambda text: None
    may: dict[str, set[State]] = field(default_factory=lambda: {name: {None} for name in PROMPTS})
    saved: set[str] = field(default_factory=set)
    failures: int = 0

    async def step(
        self, name: str, after: State, act: Awaitable[object], *, saves: bool = False
    ) -> None:
        """Do something that makes of a conversation what `after` says."""
        before = set(self.may[name])
        self.may[name] |= {after}
        if after is None:
            self.saved.discard(name)
        self.note(f"begin {name} {after}")
        try:
            await act
        except KvserveError:
            self.failures += 1
            if self.strict:
                self.may[name] = before
            return
        except LookupError:  # a fork of what could not be written
            assert self.failures
            self.may[name] = before
            return
        self.may[name] = {after}
        if saves:
            self.saved.add(name)
        self.note(f"done {name} {after} {int(saves)}")


async def live(store: Store, clock: Clock, journal: Journal) -> None:
    """Go through the scenario; failures are the journal's to judge."""

    def part(name: str, length: int, *, by_order: bool = False) -> Awaitable[object]:
        stored = conversation(name, PROMPTS[name][:length], used_at=clock.now)
        return write(store, stored, by_order=by_order)

    await journal.step("chat", 30, part("chat", 30))
    await journal.step("chat", 60, part("chat", 60))
    fork = conversation("fork", PROMPTS["fork"][:45], saved=True)
    await journal.step("fork", 45, store.put(fork))
    await journal.step("fork", 65, part("fork", 65, by_order=True), saves=True)
    await journal.step("once", 50, part("once", 50))
    clock.advance(minutes=10)
    await journal.step("big", 80, part("big", 80, by_order=True), saves=True)
    try:
        await store.set_flags("a", "chat", pinned=True)
    except KvserveError:
        journal.failures += 1
    await journal.step("chat", None, store.delete("a", "chat"))
    await journal.step("late", 30, part("late", 30))


async def check(folder: Path, journal: Journal) -> None:
    """Open what is left, on a disk that works, and compare it with the journal."""
    store = await Store.open(
        folder, identity=IDENTITY, limits=Limits(disk_share=1.0), disk=Disk(), clock=Clock()
    )
    try:
        # Before the sweep there may be files that nobody names, and nothing else.
        found = [fault async for step in store.verify() for fault in step.faults]
        assert all(fault.run_id is None and fault.file is not None for fault in found), found
        assert not list(store.folder.drafts.iterdir())
        await store.sweep()
        for name, prompt in PROMPTS.items():
            stored = await store.find("a", name)
            state = None if stored is None else stored.head.num_tokens
            assert state in journal.may[name], f"{name}: {state} of {journal.may[name]}"
            assert stored is None or np.array_equal(stored.token_ids, prompt[:state])
            held = await readable(store, prompt)  # whatever is there is right
            assert name not in journal.saved or held == len(prompt), f"{name}: {held} tokens"
        await write(store, conversation("chat", PROMPTS["chat"]), by_order=True)
        assert await readable(store, PROMPTS["chat"]) == len(PROMPTS["chat"])
        assert [fault async for step in store.verify() for fault in step.faults] == []
    finally:
        await store.aclose()

"""Power is lost at any moment of a store's life; every state of the disk that may leave opens.

Modelled: the store's own files, by `tests.faults.recording` (un-synced bytes kept, dropped, zeroed,
torn or reordered; un-synced names made, lost, each alone and all but one). Not modelled: torn
writes of SQLite's, whose log is made for them (WAL, synchronous=FULL). The index is in each state
as its last commit left it on the real disk, file and log, with the operations on snapshots before
and after that commit in all their states.
"""

from __future__ import annotations

import asyncio
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from kvserve.store.store import Store
from tests.faults.recording import CrashState, RecordingDisk
from tests.faults.scenario import LIMITS, PROMPTS, THOROUGH, Journal, check, live
from tests.store_fakes import IDENTITY, Clock

SOME = 24
"""States that an ordinary run looks at; the slow one looks at all."""


def follow_commits(store: Store, disk: RecordingDisk) -> None:
    """Record the index as it is after each commit, before anything else happens."""
    dialect = store.catalog.database.engines[1].sync_engine.dialect
    commit = dialect.do_commit

    def recorded(connection: Any) -> None:
        commit(connection)
        for path in (store.folder.index, Path(f"{store.folder.index}-wal")):
            disk.outside(path)

    dialect.do_commit = recorded  # type: ignore[method-assign, assignment]


def record(root: Path, kind: type[RecordingDisk] = RecordingDisk) -> list[CrashState]:
    folder = root / "data"

    async def scenario() -> RecordingDisk:
        store = await Store.open(folder, identity=IDENTITY, limits=LIMITS, clock=Clock())
        await store.aclose()
        clock, disk = Clock(), kind(root)
        store = await Store.open(folder, identity=IDENTITY, limits=LIMITS, disk=disk, clock=clock)
        try:
            follow_commits(store, disk)
            journal = Journal(note=disk.note)
            await live(store, clock, journal)
            assert not journal.failures and store.stats()["evicted"]
        finally:
            await store.aclose()
        return disk

    return list(asyncio.run(scenario()).crash_states())


def journal_of(state: CrashState) -> Journal:
    """Return what had been acknowledged, and what had begun, when the power went."""
    journal = Journal()
    for note in state.notes:
        what, name, after, *saves = note.split(" ")
        tokens = None if after == "None" else int(after)
        if what == "begin":
            journal.may[name] = journal.may[name] | {tokens}
            if tokens is None:
                journal.saved.discard(name)
        else:
            journal.may[name] = {tokens}
            if saves == ["1"]:
                journal.saved.add(name)
    return journal


def look(root: Path, state: CrashState) -> None:
    """Open a state and compare it with what had been acknowledged."""
    root.mkdir()
    state.materialise(root)
    try:
        asyncio.run(check(root / "data", journal_of(state)))
    except BaseException as error:
        error.add_note(state.name)
        raise
    shutil.rmtree(root)


@pytest.mark.parametrize("thorough", [False, pytest.param(True, marks=THOROUGH)])
def test_every_state_that_a_loss_of_power_may_leave_has_all_that_was_acknowledged(
    tmp_path: Path, thorough: bool
) -> None:
    states = record(tmp_path / "recorded")
    assert len(states) > 150
    assert journal_of(states[-1]).may["late"] == {len(PROMPTS["late"])}
    chosen = states if thorough else random.Random(1).sample(states, SOME)
    for number, state in enumerate(chosen):
        look(tmp_path / str(number), state)


class LazyDisk(RecordingDisk):
    """Says that files are durable when they are not."""

    def fsync(self, fd: int) -> None:
        pass


class LazyFolders(RecordingDisk):
    """Says that names are durable when they are not."""

    def fsync_folder(self, folder: Path) -> None:
        pass


@pytest.mark.parametrize("kind", [LazyDisk, LazyFolders])
def test_a_store_that_forgot_to_sync_would_be_found_out(
    tmp_path: Path, kind: type[RecordingDisk]
) -> None:
    states = record(tmp_path / "recorded", kind)
    acknowledged = [state for state in states if any("done fork 65" in n for n in state.notes)]

    def look_at_all() -> None:
        for number, state in enumerate(reversed(acknowledged)):
            look(tmp_path / str(number), state)

    with pytest.raises(AssertionError):
        look_at_all()

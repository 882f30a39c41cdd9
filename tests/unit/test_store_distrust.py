"""A path that gave wrong replies is taken out of use whole, with what was computed behind it."""

from __future__ import annotations

from pathlib import Path

from tests.store_fakes import NAMESPACE, conversation, write
from tests.unit.test_store import files_in, opened, run, tokens


def test_a_wrong_path_goes_with_all_behind_it_and_nothing_else(tmp_path: Path) -> None:
    first, other = tokens(1, 60), tokens(2, 40)
    branch = first.copy()
    branch[30:] = tokens(3, 30)

    async def scenario() -> None:
        async with opened(tmp_path) as store:
            for name, path in (("c", first), ("branch", branch), ("other", other)):
                await write(store, conversation(name, path))
            assert await store.distrust(NAMESPACE, first[:50]) == 2
            for path in (first, branch):
                assert not any(s.readable for s in (await store.walk(NAMESPACE, path)).segments)
            assert all(s.readable for s in (await store.walk(NAMESPACE, other)).segments)
            # The conversations are what they were; what is computed anew takes the old's place.
            found = await store.find("a", "c")
            assert found is not None and (found.token_ids == first).all()
            await write(store, conversation("c", first))
            healed = await store.walk(NAMESPACE, first)
            assert all(segment.readable for segment in healed.segments)
            behind = await store.walk(NAMESPACE, branch)
            assert not behind.segments[-1].readable
            assert [fault async for step in store.verify() for fault in step.faults] == []

    run(scenario)
    assert len(files_in(tmp_path)) == 2


def test_an_unknown_path_is_no_harm(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with opened(tmp_path) as store:
            await write(store, conversation("c", tokens(1, 60)))
            assert await store.distrust(NAMESPACE, tokens(2, 10)) == 0
            assert await store.distrust(b"another", tokens(1, 60)) == 0

    run(scenario)

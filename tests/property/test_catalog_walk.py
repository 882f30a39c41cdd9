"""The tree of runs beside a plain dict of sequences, in any order of events."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from datetime import timedelta
from itertools import zip_longest
from typing import Any, TypeVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvserve.store.guards import victims
from kvserve.store.runs import Run, Walk
from tests.catalog_fixtures import (
    IDENTITY,
    NAMESPACE,
    NOW,
    conversation,
    filling,
    ids,
    split,
    temporary,
    turn,
)

T = TypeVar("T")
Tokens = tuple[int, ...]

# Few tokens and long runs of one: paths part, and runs are entered amid, at nearly every step.
TOKENS: st.SearchStrategy[Tokens] = st.lists(
    st.tuples(st.integers(0, 2), st.integers(1, 4)), min_size=1, max_size=6
).map(lambda parts: tuple(token for token, times in parts for _ in range(times)))
NAMES = st.sampled_from("abcd")


def shared(a: Tokens, b: Tokens) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))  # noqa: B905


class CatalogMachine(RuleBasedStateMachine):
    """Turns, forks, evictions, splits and deletions against one index.

    `names` are the conversations. What else is there as cache is read from the rows themselves.
    """

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.context = temporary()
        self.catalog = self.do(self.context.__aenter__())
        self.names: dict[str, Tokens] = {}
        self.step = 0

    def do(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(coroutine)

    def teardown(self) -> None:
        self.do(self.context.__aexit__(None, None, None))
        self.runner.close()

    def runs(self) -> dict[int, Run]:
        async def every() -> dict[int, Run]:
            return {run.id: run async for chunk in self.catalog.runs() for run in chunk}

        return self.do(every())

    def sequences(self) -> list[Tokens]:
        """All sequences that end at a run's end, put together from the rows alone."""
        runs, own = self.runs(), {}
        for run_id in runs:
            record = self.do(self.catalog.record(run_id))
            assert record is not None
            own[run_id] = tuple(int(token) for token in record.tokens)
        whole: dict[int, Tokens] = {}
        for run in sorted(runs.values(), key=lambda run: run.start):
            above = whole[run.parent_id] if run.parent_id is not None else ()
            whole[run.id] = above[: run.start] + own[run.id]
        return list(whole.values())

    def walk(self, tokens: Tokens) -> Walk:
        return self.do(self.catalog.walk(IDENTITY, NAMESPACE, ids(tokens)))

    @rule(name=NAMES, tokens=TOKENS, grow=st.booleans(), held=st.booleans())
    def take_a_turn(self, name: str, tokens: Tokens, grow: bool, held: bool) -> None:
        self.step += 1
        whole = self.names.get(name, ())[: None if grow else 3] + tokens
        now = NOW + timedelta(seconds=self.step)
        before = self.walk(whole).path.num_tokens
        file = f"file{self.step}"
        added = self.do(turn(self.catalog, name, whole, held=held, now=now, file=file))
        assert len(added) == (before < len(whole))
        self.names[name] = whole

    @precondition(lambda self: self.names)
    @rule(data=st.data(), name=NAMES)
    def fork(self, data: st.DataObject, name: str) -> None:
        of = data.draw(st.sampled_from(sorted(self.names)))
        end = data.draw(st.integers(0, len(self.names[of])))
        self.names[name] = self.names[of][:end]
        self.do(self.catalog.put(conversation(name, self.names[name])))

    @rule(name=NAMES)
    def delete(self, name: str) -> None:
        before = {run.file for run in self.runs().values()}
        gone = self.do(self.catalog.delete("t", name))
        assert (gone is not None) == (name in self.names)
        after = {run.file for run in self.runs().values()}
        assert before - after - {None} == set(gone or ())
        self.names.pop(name, None)

    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        holdings = self.do(self.catalog.holdings(NOW + timedelta(seconds=self.step)))
        needed = data.draw(st.integers(0, sum(holding.nbytes for holding in holdings)))
        chosen = victims(holdings, needed)
        assert chosen is not None  # nothing is protected here
        before = self.runs()
        files = self.do(self.catalog.evict(chosen))
        assert set(files) == {before[run_id].file for run_id in chosen}
        after = self.runs()
        assert sum(run.nbytes for run in before.values()) - needed >= sum(
            run.nbytes for run in after.values()
        )
        for run in after.values():
            if run.file is not None and run.parent_id is not None:
                assert run.parent_id not in chosen

    @rule(data=st.data())
    def quarantine(self, data: st.DataObject) -> None:
        files = sorted(run.id for run in self.runs().values() if run.file)
        if files:
            chosen = data.draw(st.sampled_from(files))
            assert self.do(self.catalog.quarantine(chosen)) is not None

    @rule(data=st.data())
    def split(self, data: st.DataObject) -> None:
        bare = [run for run in self.runs().values() if not run.file and run.end - run.start > 1]
        if bare:
            run = data.draw(st.sampled_from(bare))
            at = data.draw(st.integers(run.start + 1, run.end - 1))
            before = sorted(self.sequences())
            self.do(split(self.catalog, run.id, at))
            assert set(before) < set(self.sequences())

    @precondition(lambda self: self.names)
    @rule(data=st.data())
    def heal(self, data: st.DataObject) -> None:
        tokens = self.names[data.draw(st.sampled_from(sorted(self.names)))]
        bare = [at for at in self.walk(tokens).runs if at.run.file is None]
        if bare:
            at = data.draw(st.sampled_from(bare))
            self.step += 1
            self.do(
                self.catalog.commit(
                    filling(at.run.id, tokens[: at.until], at.run.start, file=f"heal{self.step}")
                )
            )

    @rule()
    def collect(self) -> None:
        self.do(self.catalog.collect())
        for tokens in self.sequences():
            assert any(shared(tokens, whole) > 0 for whole in self.names.values())

    @rule(tokens=TOKENS)
    def a_walk_agrees_with_brute_force(self, tokens: Tokens) -> None:
        walk = self.walk(tokens)
        longest = max((shared(tokens, known) for known in self.sequences()), default=0)
        assert walk.path.num_tokens == longest
        at = 0
        for segment, following in zip_longest(walk.path.segments, walk.path.segments[1:]):
            assert segment.start == at
            at = following.start if following is not None else longest
            assert segment.start < at <= segment.end
        assert at == longest

    @invariant()
    def conversations_are_whole(self) -> None:
        heads = self.do(self.catalog.heads())
        assert {head.id for head in heads} == set(self.names)
        for name, tokens in self.names.items():
            found = self.do(self.catalog.find("t", name))
            assert found is not None and tuple(found.token_ids) == tokens
            path = self.do(self.catalog.path("t", name)) or ()
            assert path == self.walk(tokens).runs
            used = self.do(self.catalog.usage([("t", name)]))
            held = sum(at.until - at.run.start for at in path if at.run.file)
            assert sum(use.held_tokens for use in used.values()) == held

    @invariant()
    def the_index_is_in_order(self) -> None:
        assert self.do(self.catalog.check()) == []


def test_the_tree_of_runs_agrees_with_plain_sequences() -> None:
    run_state_machine_as_test(
        CatalogMachine, settings=settings(max_examples=20, stateful_step_count=15)
    )

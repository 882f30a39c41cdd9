"""The segment cache beside plain sets, for models of every kind, in any order of events."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Hashable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvserve.cache.leases import Lease
from kvserve.cache.plan import Traits
from kvserve.cache.segments import SegmentCache
from kvserve.core.types import TokenIds
from tests.property.fake_state import Fake, Kind, Tokens, Working, rebuilt

KINDS = {
    "plain": Kind(span=True),
    "window": Kind(windows=(4,)),
    "span_and_window": Kind(span=True, windows=(5,)),
    "two_windows": Kind(windows=(2, 6)),
    "state": Kind(stateful=True),
    "span_and_state": Kind(span=True, stateful=True),
    "all": Kind(span=True, windows=(3, 6), stateful=True),
}
AMPLE = 1 << 30

NAMESPACES = st.sampled_from([b"", b"other"])
# Few tokens and long runs of one: prefixes collide, and segments split, at nearly every step.
TOKENS = st.lists(st.tuples(st.integers(0, 1), st.integers(1, 5)), min_size=1, max_size=6).map(
    lambda runs: tuple(token for token, times in runs for _ in range(times))
)
NAMES = st.integers(0, 3)


def ids(tokens: Tokens) -> TokenIds:
    return np.array(tokens, np.uint32)


def shared(a: Tokens, b: Tokens) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))  # noqa: B905


class CacheMachine(RuleBasedStateMachine):
    """Runs, lookups, references and pressure against one cache."""

    kind: Kind

    @initialize(budget=st.sampled_from([AMPLE, AMPLE, 60, 120]))
    def start(self, budget: int) -> None:
        self.ample = budget == AMPLE
        self.cache: SegmentCache[Fake] = SegmentCache(
            Traits(self.kind.reach, self.kind.stateful), budget, self.kind.nbytes
        )
        self.published: dict[bytes, set[Tokens]] = {b"": set(), b"other": set()}
        self.leases: list[tuple[bytes, Tokens, Lease[Fake]]] = []
        self.bound: dict[Hashable, tuple[bytes, Tokens]] = {}
        self.reserved: list[int] = []
        self.dropped = False

    # -- what may be asked ----------------------------------------------------------------------

    def longest(self, namespace: bytes, tokens: Tokens) -> int:
        """Return how many tokens any published path has in common with `tokens`."""
        return max((shared(tokens, path) for path in self.published[namespace]), default=0)

    def looked_up(
        self, namespace: bytes, tokens: Tokens, limit: int | None, yielding: bool = False
    ) -> Lease[Fake]:
        lease = self.cache.lookup(namespace, ids(tokens), limit, yielding=yielding)
        self.verify(namespace, tokens, lease)
        self.verify_deepest(namespace, tokens, limit, lease.num_tokens)
        return lease

    def verify(self, namespace: bytes, tokens: Tokens, lease: Lease[Fake]) -> None:
        """What the cache said can be restored can be, and is right."""
        assert lease.num_tokens <= self.longest(namespace, tokens)
        if lease.num_tokens:
            held = self.cache.payloads(lease)
            assert held[0][0] == 0
            assert all(a[1] == b[0] for a, b in pairwise(held))
            assert held[-1][0] < lease.num_tokens <= held[-1][1]
            assert rebuilt(self.kind, namespace, tokens, held, lease.num_tokens)

    def verify_deepest(
        self, namespace: bytes, tokens: Tokens, limit: int | None, answer: int
    ) -> None:
        """Nothing deeper than the answer could have been restored from what is held."""
        most = len(tokens) if limit is None else min(limit, len(tokens))
        node, matched = self.cache._tree(namespace).walk(ids(tokens))
        path = [(n.start, n.end, n.payload) for n in node.path() if n.payload is not None]
        for position in range(min(most, matched), answer, -1):
            reaching = [part for part in path if part[0] < position]
            assert not rebuilt(self.kind, namespace, tokens, reaching, position), position
        if self.ample and not self.dropped:
            assert matched == self.longest(namespace, tokens)
            if not self.kind.windows and not self.kind.stateful:
                assert answer == min(most, matched)

    # -- runs -----------------------------------------------------------------------------------

    def publish(self, work: Working, end: int, with_state: bool) -> int:
        tokens = work.tokens[:end]
        held = self.cache.publish(
            work.namespace, ids(tokens), with_state=with_state, capture=work.capture
        )
        self.published[work.namespace].add(tokens[:held])
        self.cache.check()
        return held

    @rule(
        namespace=NAMESPACES,
        tokens=TOKENS,
        cuts=st.sets(st.integers(1, 30)),
        chunk=st.integers(1, 9),
        data=st.data(),
    )
    def run(
        self, namespace: bytes, tokens: Tokens, cuts: set[int], chunk: int, data: st.DataObject
    ) -> None:
        """A request as the engine runs it: what it cannot reuse it computes and publishes."""
        lease = self.looked_up(namespace, tokens, len(tokens) - 1)
        position = lease.num_tokens
        self.cache.release(lease)
        stop = data.draw(st.integers(position + 1, len(tokens)))
        ends = sorted(cut for cut in cuts if position < cut < stop)
        while position < stop:
            begin, position = position, min(position + chunk, stop)
            if self.kind.stateful:
                position = min([position, *(cut for cut in ends if cut > begin)])
            # Right after a chunk the buffers hold all of it and the window before it.
            work = Working(self.kind, namespace, tokens, position)
            at = [cut for cut in ends if begin < cut <= position]
            for end in [*at, *([stop] if position == stop else [])]:
                takes = self.kind.stateful and end == position
                if self.publish(work, end, takes) < end:
                    break
                if self.ample:
                    again = self.cache.lookup(namespace, ids(tokens), end)
                    if takes or not self.kind.stateful:
                        assert again.num_tokens == end
                    self.cache.release(again)

    @rule(
        namespace=NAMESPACES,
        tokens=TOKENS,
        since=st.integers(0, 20),
        state=st.booleans(),
        data=st.data(),
    )
    def publish_late(
        self, namespace: bytes, tokens: Tokens, since: int, state: bool, data: st.DataObject
    ) -> None:
        """A cut that is published after the windows have moved on."""
        work = Working(self.kind, namespace, tokens, len(tokens), min(since, len(tokens)))
        end = data.draw(st.integers(1, len(tokens)))
        self.publish(work, end, state and self.kind.stateful)

    @rule(
        namespace=NAMESPACES,
        tokens=TOKENS,
        first=st.integers(0, 20),
        cuts=st.sets(st.integers(1, 30)),
        beyond=st.integers(0, 4),
        data=st.data(),
    )
    def adopt(
        self,
        namespace: bytes,
        tokens: Tokens,
        first: int,
        cuts: set[int],
        beyond: int,
        data: st.DataObject,
    ) -> None:
        """Segments come back from disk: other cuts, ends beyond the path, holes in windows."""
        stop = len(tokens)
        cut_at = [first, *sorted(cut for cut in cuts if first < cut < stop), stop]
        loaded = []
        for start, following in pairwise(cut_at) if first < stop else ():
            end = following + data.draw(st.integers(0, beyond))
            own, since = tokens[:following] + (2,) * beyond, data.draw(st.sampled_from([0, start]))
            work = Working(self.kind, namespace, own, end, since)
            state, contained = data.draw(st.booleans()), data.draw(st.booleans())
            loaded.append((start, end, work.capture(start, end, state, contained)))
        _, matched = self.cache._tree(namespace).walk(ids(tokens))
        reached = self.cache.adopt(namespace, ids(tokens), loaded)
        self.cache.check()
        assert not loaded or matched >= first or reached == 0
        if self.ample and loaded and matched >= first:
            assert reached == stop
        if reached:
            self.published[namespace].add(tokens[:reached])
            assert self.cache.usage(namespace, ids(tokens)).num_tokens >= reached

    # -- leases ---------------------------------------------------------------------------------

    @rule(
        namespace=NAMESPACES,
        tokens=TOKENS,
        limit=st.none() | st.integers(0, 20),
        yielding=st.booleans(),
    )
    def hold(self, namespace: bytes, tokens: Tokens, limit: int | None, yielding: bool) -> None:
        lease = self.looked_up(namespace, tokens, limit, yielding)
        assert self.cache.held(namespace, ids(tokens), limit) == lease.num_tokens
        self.leases.append((namespace, tokens, lease))

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), limit=st.none() | st.integers(0, 20))
    def extend(self, data: st.DataObject, limit: int | None) -> None:
        index = data.draw(st.integers(0, len(self.leases) - 1))
        namespace, tokens, lease = self.leases[index]
        revoked = lease.released
        longer = self.cache.extend(lease, ids(tokens), limit)
        assert longer.yielding == lease.yielding and lease.released and not longer.released
        self.leases[index] = (namespace, tokens, longer)
        self.verify(namespace, tokens, longer)
        if not revoked:
            self.verify_deepest(namespace, tokens, limit, longer.num_tokens)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        _, _, lease = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        self.cache.release(lease)
        self.cache.release(lease)

    # -- references -----------------------------------------------------------------------------

    @rule(name=NAMES, namespace=NAMESPACES, tokens=TOKENS)
    def bind(self, name: int, namespace: bytes, tokens: Tokens) -> None:
        self.cache.bind(name, namespace, ids(tokens))
        self.bound[name] = namespace, tokens

    @rule(name=NAMES, drop=st.booleans())
    def unbind(self, name: int, drop: bool) -> None:
        before = {n: node.end for n, node in self.cache._names.items() if n != name}
        self.cache.unbind(name, drop=drop)
        self.bound.pop(name, None)
        assert {n: node.end for n, node in self.cache._names.items()} == before
        self.dropped |= drop

    @rule(namespace=NAMESPACES, tokens=TOKENS)
    def usage(self, namespace: bytes, tokens: Tokens) -> None:
        found = self.cache.usage(namespace, ids(tokens))
        assert found.num_tokens <= self.longest(namespace, tokens)
        assert found.nbytes == sum(nbytes for _, _, nbytes in found.segments)
        assert 0 <= found.shared_nbytes <= found.nbytes
        ends = [0, *(end for _, end, _ in found.segments)]
        assert [start for start, _, _ in found.segments] == ends[:-1]
        assert ends[-1] == found.num_tokens

    # -- pressure -------------------------------------------------------------------------------

    @rule(nbytes=st.integers(0, 80))
    def reserve(self, nbytes: int) -> None:
        if self.cache.reserve(nbytes):
            self.reserved.append(nbytes)
        else:
            assert not self.ample
            assert not any(lease.yielding and not lease.released for _, _, lease in self.leases)

    @precondition(lambda self: self.reserved)
    @rule()
    def unreserve(self) -> None:
        self.cache.unreserve(self.reserved.pop())

    @rule(namespace=NAMESPACES, tokens=TOKENS, keep=st.sets(st.integers(1, 20)))
    def thin(self, namespace: bytes, tokens: Tokens, keep: set[int]) -> None:
        if self.kind.stateful:
            self.cache.thin_states(namespace, ids(tokens), keep, Fake.without_state)

    @rule()
    def bury(self) -> None:
        self.cache.bury()
        assert not self.cache._dropped

    # -- what is always so ----------------------------------------------------------------------

    @invariant()
    def totals_are_right_and_within_budget(self) -> None:
        self.cache.check()
        stats = self.cache.stats()
        assert stats["stored_bytes"] + stats["working_bytes"] <= stats["budget_bytes"]

    @invariant()
    def leased_paths_stay_whole(self) -> None:
        for namespace, tokens, lease in self.leases:
            if lease.released:  # taken back: only then, and only from one that yields
                assert lease.yielding and not self.ample
                with pytest.raises(LookupError):
                    self.cache.payloads(lease)
            else:
                self.verify(namespace, tokens, lease)

    @invariant()
    def names_mean_prefixes_of_what_was_bound(self) -> None:
        for name, node in self.cache._names.items():
            _, tokens = self.bound[name]
            path = tuple(node.token_ids().tolist())
            assert path == tokens[: len(path)]

    @invariant()
    def the_eviction_queue_stays_small(self) -> None:
        assert len(self.cache._leaves) <= 2 * self.cache.stats()["segments"] + 64

    def teardown(self) -> None:
        for _, _, lease in self.leases:
            self.cache.release(lease)
        self.leases.clear()
        while self.reserved:
            self.cache.unreserve(self.reserved.pop())
        if self.cache.stats()["stored_bytes"]:
            # Nobody holds anything any more, so that everything can be evicted, leaves first.
            assert self.cache.reserve(self.cache.budget_nbytes)
            assert self.cache.stats()["stored_bytes"] == 0
            self.cache.check()


def _machine(name: str) -> type[CacheMachine]:
    return type(f"Cache_{name}", (CacheMachine,), {"kind": KINDS[name]})


@pytest.mark.parametrize("name", KINDS)
def test_any_history_leaves_the_cache_right(name: str) -> None:
    run: Callable[..., None] = run_state_machine_as_test
    run(_machine(name), settings=settings(max_examples=100, stateful_step_count=25))


@pytest.mark.parametrize("name", ["plain", "all"])
def test_lookups_and_drops_of_other_threads_leave_the_cache_right(name: str) -> None:
    kind = KINDS[name]
    traits = Traits(kind.reach, kind.stateful)
    cache: SegmentCache[Fake] = SegmentCache(traits, 300, kind.nbytes)
    random = np.random.default_rng(3)
    paths = [tuple(random.integers(0, 2, 24).tolist()) for _ in range(12)]
    failures: list[BaseException] = []
    stop = threading.Event()

    def others() -> None:
        try:
            for turn in range(1_000_000):
                if stop.is_set():
                    return
                path = paths[turn * 7 % len(paths)]
                lease = cache.lookup(b"", ids(path))
                if lease.num_tokens:
                    held = cache.payloads(lease)
                    assert rebuilt(kind, b"", path, held, lease.num_tokens)
                cache.bind(turn % 5, b"", ids(path))
                cache.release(lease)
                cache.unbind(turn % 5, drop=True)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=others) for _ in range(2)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for turn in range(600):
            path = paths[turn % len(paths)]
            for end in range(4, 25, 5):
                work = Working(kind, b"", path, end)
                cache.publish(b"", ids(path[:end]), with_state=kind.stateful, capture=work.capture)
            cache.check()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
    assert not failures
    cache.check()

"""The RAM tier at its edges: room, replacements, references, and what other threads may do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from kvserve.cache.plan import Traits
from kvserve.cache.segments import Lease, SegmentCache
from kvserve.core.types import TokenIds
from tests.property.fake_state import STATE_NBYTES, Fake, Kind, Tokens, Working

PLAIN = Kind(span=True)
STATE = Kind(span=True, stateful=True)


def ids(tokens: str) -> TokenIds:
    return np.array([ord(token) for token in tokens], np.uint32)


def codes(tokens: str) -> Tokens:
    return tuple(map(ord, tokens))


class Cache:
    """A segment cache with shorter words for tests."""

    def __init__(self, kind: Kind = PLAIN, budget: int = 1000) -> None:
        self.kind = kind
        traits = Traits(kind.reach, kind.stateful)
        self.segments: SegmentCache[Fake] = SegmentCache("m", traits, budget, kind.nbytes)

    def put(self, text: str, namespace: bytes = b"", state: bool | None = None) -> int:
        work = Working(self.kind, namespace, codes(text), len(text))
        with_state = self.kind.stateful if state is None else state
        held = self.segments.publish(
            namespace, ids(text), with_state=with_state, capture=work.capture
        )
        self.segments.check()
        return held

    def found(self, text: str, namespace: bytes = b"") -> int:
        lease = self.segments.lookup(namespace, ids(text))
        self.segments.release(lease)
        return lease.num_tokens

    def figure(self, name: str) -> int:
        value = self.segments.stats()[name]
        assert isinstance(value, int)
        return value


def test_a_prefix_of_two_conversations_is_held_once() -> None:
    cache = Cache()
    cache.put("system hello")
    cache.put("system help")
    assert cache.figure("stored_bytes") == len("system hello") + 1
    assert cache.found("system help me") == 11
    assert cache.figure("published_tokens") == 13


def test_namespaces_see_nothing_of_each_other() -> None:
    cache = Cache()
    cache.put("secret", b"a")
    assert cache.found("secret", b"b") == cache.found("secret") == 0
    assert cache.segments.usage(b"b", ids("secret")).num_tokens == 0


def test_namespaces_that_hold_nothing_leave_nothing_behind() -> None:
    cache = Cache(budget=10)
    for number in range(200):
        namespace = b"salt%d" % number
        assert cache.found("prompt", namespace) == 0
        cache.segments.usage(namespace, ids("prompt"))
        cache.segments.bind("name", namespace, ids("prompt"))
        assert cache.put("prompt", namespace) == 6
    assert len(cache.segments._trees) == 1


def test_what_does_not_fit_is_not_stored() -> None:
    cache = Cache(budget=5)
    assert cache.put("toolong") == 0
    assert cache.put("fits") == 4
    lease = cache.segments.lookup(b"", ids("fits"))
    assert cache.put("fitsnot") == 4
    assert cache.put("other") == 0
    assert cache.figure("skipped_no_room") == 3
    cache.segments.release(lease)
    assert cache.put("other") == 5
    assert cache.found("fits") == 0


def test_eviction_takes_leaves_least_recently_used_first() -> None:
    cache = Cache(budget=10)
    cache.put("ab")
    cache.put("abcd")
    cache.put("abxyz")
    cache.put("q")
    assert cache.found("abcd") == 4
    cache.put("wwww")  # needs two bytes: of the leaves, xyz was used least recently
    assert [cache.found(text) for text in ("abxyz", "abcd", "q", "wwww")] == [2, 4, 1, 4]


def test_a_parent_counts_as_used_when_its_children_were() -> None:
    cache = Cache(budget=10)
    cache.put("ab")
    cache.put("abcd")
    cache.put("old")
    cache.put("new")
    assert cache.found("abcd") == 4
    assert cache.segments.reserve(2)
    assert cache.found("old") == 0
    assert cache.found("abcd") == 4


def test_evicted_payloads_are_freed_by_whoever_evicts() -> None:
    cache = Cache(budget=8)
    for text in ("aaaa", "bbbb", "cccc"):
        cache.put(text)
    assert cache.segments._dropped == []
    assert cache.segments.reserve(8)
    assert cache.segments._dropped == []


def test_a_payload_larger_than_was_foretold_does_not_break_the_budget() -> None:
    cache = Cache(budget=6)
    cache.segments._segment_nbytes = lambda num_tokens, with_state: 1
    lease_of = cache.put("abcd")
    assert lease_of == 4
    lease = cache.segments.lookup(b"", ids("abcd"))
    assert cache.put("abcdefgh") == 4
    cache.segments.release(lease)
    cache.segments.check()


def test_a_state_is_added_to_a_segment_that_had_none() -> None:
    cache = Cache(STATE)
    assert cache.put("abcd", state=False) == 4
    assert cache.found("abcd") == 0
    assert cache.put("abcd") == 4
    assert cache.found("abcd") == 4
    assert cache.put("ab") == 2
    assert (cache.found("abc"), cache.found("abcd")) == (2, 4)
    assert cache.figure("stored_bytes") == 4 + 2 * STATE_NBYTES


def test_a_capture_that_fails_leaves_no_lease() -> None:
    cache = Cache()
    cache.put("ab")

    def broken(start: int, end: int, with_state: bool, contained: bool) -> Fake:
        raise MemoryError

    with pytest.raises(MemoryError):
        cache.segments.publish(b"", ids("abcd"), with_state=False, capture=broken)
    cache.segments.check()
    assert cache.segments.reserve(1000)
    assert cache.figure("stored_bytes") == 0


def during_capture(cache: Cache, text: str, action: Callable[[], None]) -> int:
    work = Working(cache.kind, b"", codes(text), len(text))

    def capture(start: int, end: int, with_state: bool, contained: bool) -> Fake:
        action()
        return work.capture(start, end, with_state, contained)

    return cache.segments.publish(b"", ids(text), with_state=False, capture=capture)


def test_a_segment_that_is_being_added_to_cannot_be_dropped_by_another_thread() -> None:
    cache = Cache()
    cache.put("ab")
    cache.segments.bind("chat", b"", ids("ab"))
    assert during_capture(cache, "abcd", lambda: cache.segments.unbind("chat", drop=True)) == 4
    cache.segments.check()
    assert cache.found("abcd") == 4


def test_a_drop_between_capture_and_storing_finds_the_parent_held(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = Cache()
    cache.put("ab")
    cache.segments.bind("chat", b"", ids("ab"))
    release = cache.segments.release

    def then_another_thread(lease: Lease[Fake]) -> None:
        release(lease)
        cache.segments.unbind("chat", drop=True)

    monkeypatch.setattr(cache.segments, "release", then_another_thread)
    assert cache.put("abcd") == 4
    monkeypatch.undo()
    assert cache.found("abcd") == 4


def test_an_extended_lease_finds_what_now_parts_where_it_ended() -> None:
    cache = Cache()
    cache.put("abcdef")
    lease = cache.segments.lookup(b"", ids("abcxyz"))
    assert lease.num_tokens == 3
    cache.put("abcxy")
    lease = cache.segments.extend(lease, ids("abcxyz"))
    assert lease.num_tokens == 5
    cache.segments.release(lease)


def test_a_reference_never_means_more_than_was_bound() -> None:
    cache = Cache()
    cache.put("abcdef")
    cache.segments.bind("mine", b"", ids("abcdef"))
    cache.segments.bind("short", b"", ids("abc"))
    cache.segments.unbind("mine", drop=False)
    cache.segments.unbind("short", drop=True)
    assert cache.found("abcdef") == 6


def test_a_drop_frees_what_nobody_else_uses() -> None:
    cache = Cache()
    for name, text in (("a", "system one"), ("b", "system two")):
        cache.put(text)
        cache.segments.bind(name, b"", ids(text))
    cache.segments.unbind("a", drop=True)
    assert cache.found("system one") == len("system ")
    assert cache.found("system two") == len("system two")
    cache.segments.unbind("b", drop=True)
    cache.segments.unbind("b", drop=True)
    assert cache.figure("stored_bytes") == cache.figure("references") == 0
    cache.segments.bury()
    cache.segments.check()


def test_a_drop_waits_for_leases() -> None:
    cache = Cache()
    cache.put("abc")
    cache.segments.bind("a", b"", ids("abc"))
    lease = cache.segments.lookup(b"", ids("abc"))
    cache.segments.unbind("a", drop=True)
    assert cache.segments.payloads(lease)[0][:2] == (0, 3)
    cache.segments.release(lease)


def test_usage_tells_what_is_shared() -> None:
    cache = Cache()
    cache.put("system one")
    cache.segments.bind("a", b"", ids("system one"))
    own = cache.segments.usage(b"", ids("system one and more"))
    assert (own.num_tokens, own.nbytes, own.shared_nbytes) == (10, 10, 0)
    assert own.segments == ((0, 10, 10),)
    part = cache.segments.usage(b"", ids("system"))
    assert (part.num_tokens, part.shared_nbytes) == (6, 10)  # the segment is another's as well
    cache.put("system two")
    cache.segments.bind("b", b"", ids("system two"))
    split = cache.segments.usage(b"", ids("system one"))
    assert (split.nbytes, split.shared_nbytes) == (10, 7)
    cache.segments.bind("c", b"", ids("system one"))
    assert cache.segments.usage(b"", ids("system one")).shared_nbytes == 10


def test_thinning_spares_tips_forks_and_what_is_kept() -> None:
    cache = Cache(STATE)
    for text in ("ab", "abcd", "abcdef", "abcdefgh", "abcdXX"):
        cache.put(text)
    cache.put("abcdefghij")
    cache.segments.bind("chat", b"", ids("abcdef"))
    cache.segments.thin_states(b"", ids("abcdefghij"), {2}, Fake.without_state)
    cache.segments.check()
    held = [end for end in range(1, 11) if cache.found("abcdefghij"[:end]) == end]
    assert held == [2, 4, 6, 10]  # kept, a fork, a reference, the tip; 8 is thinned


def test_a_window_that_came_too_late_does_not_replace_a_fuller_one() -> None:
    kind = Kind(windows=(4,))
    cache = Cache(kind)
    cache.put("abcdefgh")
    cache.put("abcdefXY")  # parts at 6 and leaves e, f to the upper half
    assert cache.found("abcdefgh") == 8
    late = replace(Working(kind, b"", codes("abcdefgh"), 8), since=6)
    cache.segments.publish(b"", ids("abcdef"), with_state=False, capture=late.capture)
    assert cache.found("abcdefgh") == 8
    cache.segments.check()


def test_the_queue_does_not_grow_with_conversations_that_come_and_go() -> None:
    cache = Cache()
    for number in range(500):
        text = f"{number:04d} once"
        cache.put(text)
        cache.segments.bind("chat", b"", ids(text))
        cache.segments.unbind("chat", drop=True)
    assert len(cache.segments._leaves) < 100

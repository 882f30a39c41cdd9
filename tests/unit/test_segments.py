"""The RAM tier at its edges: room, replacements, references, and what other threads may do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from kvserve.cache.leases import Lease
from kvserve.cache.plan import Traits
from kvserve.cache.segments import SegmentCache
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
        self.segments: SegmentCache[Fake] = SegmentCache(traits, budget, kind.nbytes)

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


def test_a_dropped_path_takes_along_what_was_computed_behind_it_and_nothing_else() -> None:
    cache = Cache()
    for text in ("abcdef", "abcxyz", "abcxyz12", "other"):
        cache.put(text)
    cache.put("abcdef", b"b")
    cache.segments.bind("one", b"", ids("abcdef"))
    cache.segments.bind("two", b"", ids("other"))
    assert cache.segments.drop_path(b"", ids("abcdef and more")) == len("abcdefxyz12")
    cache.segments.check()
    assert cache.found("abcdef") == cache.found("abcxyz12") == 0
    assert cache.found("other") == 5
    assert cache.found("abcdef", b"b") == 6
    assert cache.figure("references") == 1
    assert cache.segments.drop_path(b"", ids("abcdef")) == 0
    assert cache.segments.drop_path(b"unknown", ids("abcdef")) == 0
    cache.segments.unbind("one", drop=True)
    assert cache.put("abcdef") == cache.found("abcdef") == 6


@pytest.mark.parametrize("yielding", [False, True])
def test_a_lease_on_a_dropped_path_names_nothing(yielding: bool) -> None:
    cache = Cache(budget=20)
    cache.put("abcdef")
    lease = cache.segments.lookup(b"", ids("abcdef"), yielding=yielding)
    cache.segments.drop_path(b"", ids("abcdef"))
    cache.segments.check()
    with pytest.raises(LookupError, match="no longer"):
        cache.segments.payloads(lease)
    cache.put("abc")
    longer = cache.segments.extend(lease, ids("abcdef"))
    assert lease.released
    assert longer.num_tokens <= 3
    cache.segments.payloads(longer)
    cache.segments.release(longer)
    cache.segments.check()
    assert cache.put("another, of 17") == 14  # evicts: nothing that was dropped is in its way


# -- what comes back from disk -----------------------------------------------------------------


def loaded(
    cache: Cache, text: str, *starts: int, state: bool = True
) -> list[tuple[int, int, Fake]]:
    """Return the state of `text` from the first start on, cut at the others, as if read."""
    segments = []
    for start, end in pairwise([*starts, len(text)]):
        work = Working(cache.kind, b"", codes(text), end)
        with_state = state and cache.kind.stateful
        segments.append((start, end, work.capture(start, end, with_state, False)))
    return segments


def test_loaded_segments_join_the_tree_as_they_are() -> None:
    cache = Cache()
    segments = loaded(cache, "system hello", 0, 7)
    assert cache.segments.adopt(b"", ids("system hello"), segments) == 12
    cache.segments.check()
    lease = cache.segments.lookup(b"", ids("system hello"))
    held = [payload for _, _, payload in cache.segments.payloads(lease)]
    assert all(a is b for a, (_, _, b) in zip(held, segments, strict=True))
    assert (cache.figure("adopted_tokens"), cache.figure("published_tokens")) == (12, 0)
    assert cache.found("system help") == 10


def test_what_ram_holds_is_not_adopted_twice() -> None:
    cache = Cache()
    cache.put("system hello")
    before = cache.segments.stats()
    segments = loaded(cache, "system hello", 0, 7)
    assert cache.segments.adopt(b"", ids("system hello"), segments) == 12
    assert cache.segments.stats() == before


def test_a_loaded_segment_is_cut_where_ram_ends_and_ram_where_it_parts() -> None:
    cache = Cache()
    cache.put("system hello you")
    lease = cache.segments.lookup(b"", ids("system hello you"))
    segments = loaded(cache, "system hello there", 4)
    assert cache.segments.adopt(b"", ids("system hello there"), segments) == 18
    cache.segments.check()
    assert cache.figure("stored_bytes") == len("system hello you") + len("there")
    assert cache.found("system hello there") == 18
    assert [end for _, end, _ in cache.segments.payloads(lease)] == [13, 16]


def test_of_a_segment_that_the_path_leaves_only_its_own_tokens_are_adopted() -> None:
    cache = Cache()
    foreign = loaded(cache, "system secret", 0)
    own = loaded(cache, "system hello", 7)
    assert cache.segments.adopt(b"", ids("system hello"), [*foreign, *own]) == 12
    assert cache.segments.adopt(b"", ids("sys"), foreign) == 3
    cache.segments.check()
    assert cache.found("system secret") == 7


def test_a_loaded_segment_behind_a_gap_is_not_adopted() -> None:
    cache = Cache()
    cache.put("sys")
    assert cache.segments.adopt(b"", ids("system hello"), loaded(cache, "system hello", 7)) == 0
    assert cache.segments.adopt(b"new", ids("system hello"), loaded(cache, "system hello", 7)) == 0
    assert cache.segments.adopt(b"new", ids("system"), []) == 0
    assert len(cache.segments._trees) == 1
    assert cache.found("system hello") == 3


def test_a_loaded_state_completes_a_segment_that_lost_its_own() -> None:
    cache = Cache(STATE)
    cache.put("system", state=False)
    assert cache.found("system") == 0
    assert cache.segments.adopt(b"", ids("system"), loaded(cache, "system", 0, state=False)) == 6
    assert cache.found("system") == 0
    assert cache.segments.adopt(b"", ids("system"), loaded(cache, "system", 0)) == 6
    cache.segments.check()
    assert cache.found("system") == 6
    assert cache.figure("stored_bytes") == 6 + STATE_NBYTES
    assert cache.segments.adopt(b"", ids("system"), loaded(cache, "system", 0, state=False)) == 6
    assert cache.found("system") == 6


def test_a_loaded_segment_replaces_one_that_lacks_tokens_of_a_window_but_never_a_state() -> None:
    kind = Kind(windows=(4,), stateful=True)
    cache = Cache(kind)
    cache.put("abcdef")
    cache.put("abcdefgh")
    late = Working(kind, b"", codes("abcdefgh"), 8)
    for with_state, position in ((False, 8), (True, 8)):
        fuller = late.capture(6, 8, with_state, True)
        before = cache.figure("stored_bytes")
        assert cache.segments.adopt(b"", ids("abcdefgh"), [(6, 8, fuller)]) == 8
        cache.segments.check()
        assert cache.found("abcdefgh") == position
        assert cache.figure("stored_bytes") == before + 2 * with_state


def test_adoption_evicts_others_but_not_its_own_path() -> None:
    cache = Cache(budget=20)
    cache.put("0123456789")
    cache.put("abcdefghij")
    assert cache.segments.adopt(b"", ids("system hello"), loaded(cache, "system hello", 0, 7)) == 12
    cache.segments.check()
    assert cache.found("system hello") == 12
    assert not cache.segments._dropped
    # Room for one of two segments: the first stays, and nothing of it is taken for the second.
    assert cache.segments.reserve(8)
    assert cache.segments.adopt(b"", ids("system hello"), loaded(cache, "system hello", 0, 7)) == 12
    small = Cache(budget=10)
    assert small.segments.adopt(b"", ids("system hello"), loaded(small, "system hello", 0, 7)) == 7
    small.segments.check()
    assert small.found("system hello") == 7


def test_a_state_that_does_not_fit_leaves_the_segment_as_it_was() -> None:
    cache = Cache(STATE, budget=6 + STATE_NBYTES)
    cache.put("system", state=False)
    assert cache.segments.reserve(STATE_NBYTES)
    assert cache.segments.adopt(b"", ids("system"), loaded(cache, "system", 0)) == 6
    cache.segments.check()
    assert cache.segments.usage(b"", ids("system")).num_tokens == 6
    assert cache.found("system") == 0


# -- leases that yield -------------------------------------------------------------------------


def test_a_yielding_lease_protects_while_anything_else_can_go() -> None:
    cache = Cache(budget=20)
    cache.put("0123456789")
    lease = cache.segments.lookup(b"", ids("0123456789"), yielding=True)
    cache.put("abcdefghij")
    cache.put("klmnopqrst")
    assert not lease.released
    assert cache.found("0123456789") == 10 and cache.found("abcdefghij") == 0
    cache.segments.release(lease)
    assert not cache.segments._yielding


def test_yielding_leases_give_way_oldest_first_when_nothing_else_can_go() -> None:
    cache = Cache(budget=30)
    texts = ["0123456789", "abcdefghij", "klmnopqrst"]
    leases = []
    for text in texts:
        cache.put(text)
        leases.append(cache.segments.lookup(b"", ids(text), yielding=True))
    firm = cache.segments.lookup(b"", ids(texts[1]))
    assert cache.segments.reserve(5)
    assert [lease.released for lease in leases] == [True, False, False]
    assert cache.segments.reserve(10)
    assert [lease.released for lease in leases] == [True, True, True]
    assert not cache.segments.reserve(10)
    assert [cache.found(text) for text in texts] == [0, 10, 0]
    assert cache.figure("revoked_leases") == 3
    cache.segments.check()
    cache.segments.release(firm)
    for lease in leases:
        cache.segments.release(lease)
        with pytest.raises(LookupError):
            cache.segments.payloads(lease)
    cache.segments.check()


def test_a_lease_that_was_taken_back_can_be_extended_to_what_is_held_now() -> None:
    cache = Cache(budget=10)
    cache.put("0123456789")
    lease = cache.segments.lookup(b"", ids("0123456789"), yielding=True)
    cache.put("01234")
    assert cache.put("abcdefghij") == 10
    assert lease.released
    assert cache.segments.extend(lease, ids("0123456789")).num_tokens == 0
    cache.put("01234")
    fresh = cache.segments.lookup(b"", ids("0123456789"), yielding=True)
    assert fresh.num_tokens == 5
    cache.put("0123456789")
    longer = cache.segments.extend(fresh, ids("0123456789"))
    assert longer.num_tokens == 10 and longer.yielding and fresh.released


def test_a_yielding_lookup_is_no_use() -> None:
    cache = Cache(budget=20)
    cache.put("0123456789")
    cache.put("abcdefghij")
    cache.segments.release(cache.segments.lookup(b"", ids("0123456789"), yielding=True))
    assert cache.segments.held(b"", ids("0123456789abc")) == 10
    assert cache.segments.held(b"", ids("0123456789abc"), 4) == 4
    assert cache.segments.held(b"other", ids("0123456789")) == 0
    assert cache.figure("lookups") == 0
    cache.put("klmnopqrst")
    assert cache.found("0123456789") == 0 and cache.found("abcdefghij") == 10

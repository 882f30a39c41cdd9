"""The RAM tier: segment trees of all callers under one byte budget.

Owns the trees, the leases, the references and the only counter of bytes: stored segments plus the
working caches that the engine has reserved. Every method is short and takes the one lock, so any
thread may look up; only the engine thread publishes and reserves, because payloads hold MLX arrays
and both evict. What other threads drop is laid aside and freed by the engine thread in `bury()`.

The cache may only make things faster: what does not fit is not stored, and the reason is counted.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

from kvserve.cache.eviction import LeafOrder
from kvserve.cache.leases import Lease, PathUsage
from kvserve.cache.plan import Traits
from kvserve.cache.tree import (
    Node,
    Payload,
    Tree,
    lacks_window,
    reaches_back,
    restorable_position,
    shared_nbytes,
)
from kvserve.core.types import TokenIds

P = TypeVar("P", bound=Payload)


Capture = Callable[[int, int, bool, bool], P]
"""`(start, end, with_state, self_contained) -> payload` of the tokens `[start, end)`; see codec."""


class SegmentCache(Generic[P]):
    """Segments of one model, by namespace.

    Args:
        traits: what the model's layers demand.
        budget_nbytes: hard limit over segments and reservations.
        segment_nbytes: `(num_tokens, with_state) -> bytes`, what a payload will take; room is made
            for it before it is captured, and for what it lacked afterwards.
    """

    def __init__(
        self,
        traits: Traits,
        budget_nbytes: int,
        segment_nbytes: Callable[[int, bool], int],
        on_drop: Callable[[], None] = lambda: None,
    ) -> None:
        self.traits = traits
        self.budget_nbytes = budget_nbytes
        self._segment_nbytes = segment_nbytes
        self._on_drop = on_drop
        # By the namespace itself, not by a hash of it: callers choose a part of it (`cache_salt`),
        # and XXH3 does not resist one who looks for another caller's.
        self._trees: dict[bytes, Tree[P]] = {}
        self._names: dict[Hashable, Node[P]] = {}
        self._turns: dict[Hashable, int] = {}  # outlive eviction, until the name is unbound
        self._leaves: LeafOrder[P] = LeafOrder(budget_nbytes)
        self._yielding: dict[Lease[P], None] = {}  # oldest first
        self._dropped: list[P] = []
        self._stored_nbytes = self._num_segments = self._num_tokens = 0
        self._reserved_nbytes = 0
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    # -- looking up ---------------------------------------------------------------------------

    def lookup(
        self,
        namespace: bytes,
        token_ids: TokenIds,
        limit: int | None = None,
        *,
        yielding: bool = False,
    ) -> Lease[P]:
        """Return a lease on the longest stored prefix, at most `limit` tokens of it restorable.

        `yielding` is for work that can be given up: such a lease is no use and ages nothing, and is
        taken back when nothing else can be evicted.
        """
        with self._lock:
            self._counts["lookups"] += not yielding
            tree = self._trees[namespace] = self._tree(namespace)
            return self._lease(tree, tree.root, token_ids, limit, yielding)

    def held(self, namespace: bytes, token_ids: TokenIds, limit: int | None = None) -> int:
        """Return how many leading tokens could be restored right now, without holding them."""
        with self._lock:
            node, matched = self._tree(namespace).walk(token_ids)
            return restorable_position(node, matched, len(token_ids) if limit is None else limit)

    def extend(self, lease: Lease[P], token_ids: TokenIds, limit: int | None = None) -> Lease[P]:
        """Return a lease on what has been stored since, and give `lease` back."""
        with self._lock:
            lost = lease.released or _is_dropped(lease.node)
            origin = lease.tree.root if lost else lease.node
            # A split may have left the leased node behind the position, where others now part.
            while origin.start >= lease.num_tokens and origin.parent is not None:
                origin = origin.parent
            longer = self._lease(lease.tree, origin, token_ids, limit, lease.yielding)
            self._release(lease)
            return longer

    def release(self, lease: Lease[P]) -> None:
        """Give a lease back; idempotent."""
        with self._lock:
            self._release(lease)

    def payloads(self, lease: Lease[P]) -> list[tuple[int, int, P]]:
        """Return `(start, end, payload)` of the leased segments from the root on, in order.

        The last may reach beyond `lease.num_tokens`: only its leading tokens are to be used.
        Raises LookupError if the lease was given or taken back, or its path dropped.
        """
        with self._lock:
            if lease.released or _is_dropped(lease.node):
                raise LookupError("what was held is no longer")
            found = []
            for node in lease.node.path():
                if node.start >= lease.num_tokens:
                    break
                assert node.payload is not None
                found.append((node.start, node.end, node.payload))
            return found

    # -- storing ------------------------------------------------------------------------------

    def publish(
        self, namespace: bytes, token_ids: TokenIds, *, with_state: bool, capture: Capture[P]
    ) -> int:
        """Store the state after `token_ids`; return how many of them are now held.

        Takes only what is missing, from the last held token on. Engine thread only: `capture`
        copies arrays. Room is made by evicting; without room nothing is stored.
        """
        end = len(token_ids)
        with self._lock:
            tree = self._trees[namespace] = self._tree(namespace)
            node, matched = tree.walk(token_ids)
            self._leaves.touch(node)
            if matched == end and self._is_served(node, end, with_state):
                return end
            if matched < node.end:
                node = self._split(tree, node, matched)
            replaces = matched == end
            above, start = (node.parent, node.start) if replaces else (node, matched)
            assert above is not None
            contained = lacks_window(above, start, end) or (replaces and reaches_back(node))
            span = max(self.traits.reach, end - start) if contained else end - start
            # Until the newcomer is in its place: another thread may drop what nobody holds.
            keep = self._hold(tree, node, matched, False)
            fits = self._make_room(self._segment_nbytes(span, with_state))
        try:
            if fits:
                payload = capture(start, end, with_state, contained)
                with self._lock:
                    tokens = token_ids[start:]
                    fits = self._store(tree, node, tokens, payload, replaces, "published_tokens")
            if not fits:
                self._counts["skipped_no_room"] += 1
                return matched
            return end
        finally:
            self.release(keep)
            self.bury()

    def adopt(
        self, namespace: bytes, token_ids: TokenIds, segments: Sequence[tuple[int, int, P]]
    ) -> int:
        """Take loaded segments in as if they had been published; return where they end.

        `segments` are `(start, end, payload)` of the path `token_ids`, ascending; each counts only
        up to where the next begins or the path ends. What is held already stays, but for an
        end state that it lacks. Arrays are copied only where a segment is cut. Engine thread only.
        Ends early, without harm, where room runs out or tokens before a segment are not held.
        """
        ends = [*(start for start, _, _ in segments[1:]), len(token_ids)]
        with self._lock:
            tree = self._trees[namespace] = self._tree(namespace)
            keep = self._hold(tree, tree.root, 0, False)
        try:
            for (start, end, payload), following in zip(segments, ends, strict=False):
                stop = min(end, following, len(token_ids))
                if stop <= start:
                    break
                if stop < end:
                    payload, _ = payload.split(stop - start, end - start)
                with self._lock:
                    node = self._adopt(tree, token_ids[:stop], start, payload)
                    if node is None:
                        break
                    self._release(keep)
                    keep = self._hold(tree, node, stop, False)
            return keep.num_tokens
        finally:
            self.release(keep)
            self.bury()

    def thin_states(
        self, namespace: bytes, token_ids: TokenIds, keep: set[int], without: Callable[[P], P]
    ) -> None:
        """Drop end states along a path at positions not in `keep`; forks and tips keep theirs."""
        with self._lock:
            node, matched = self._tree(namespace).walk(token_ids)
            for step in node.path():
                held = step.payload
                if held is None or not held.restorable or step.end in keep or step.end > matched:
                    continue
                if step.names or step.leases or len(step.children) != 1 or step is node:
                    continue
                step.payload = without(held)
                self._stored_nbytes += step.payload.nbytes - held.nbytes

    # -- the budget ---------------------------------------------------------------------------

    @property
    def free_nbytes(self) -> int:
        """Bytes that can be had without evicting anything."""
        with self._lock:
            return self.budget_nbytes - self._stored_nbytes - self._reserved_nbytes

    def reserve(self, nbytes: int) -> bool:
        """Set `nbytes` aside for a working cache, evicting for it; False if it cannot be had.

        Engine thread only: what is evicted is freed at once.
        """
        with self._lock:
            fits = self._make_room(nbytes)
            self._reserved_nbytes += nbytes if fits else 0
        self.bury()
        return fits

    def unreserve(self, nbytes: int) -> None:
        """Give back what `reserve` set aside."""
        with self._lock:
            assert 0 <= nbytes <= self._reserved_nbytes
            self._reserved_nbytes -= nbytes

    def bury(self) -> None:
        """Free what was evicted or dropped. Engine thread only."""
        with self._lock:
            dropped, self._dropped = self._dropped, []
        del dropped  # outside the lock, for it may take its time

    # -- references ---------------------------------------------------------------------------

    def bind(self, name: Hashable, namespace: bytes, token_ids: TokenIds) -> None:
        """Let `name` refer to the longest held prefix of `token_ids`, and to nothing else.

        Each new place is a turn of the conversation; the more of them, the longer it is kept.
        """
        with self._lock:
            before = self._unbind(name)
            node, matched = self._tree(namespace).walk(token_ids)
            if matched < node.end and node.parent is not None:
                node = node.parent  # the rest of that segment belongs to others
            self._turns[name] = self._turns.get(name, 0) + (node is not before)
            if node.is_root:
                return
            node.names.add(name)
            self._names[name] = node
            if node.end == len(token_ids):  # else it is what others share
                node.num_turns = max(node.num_turns, self._turns[name])
                self._leaves.touch(node)

    def unbind(self, name: Hashable, *, drop: bool) -> None:
        """Forget a reference; with `drop` also free the segments that only it used."""
        with self._lock:
            node = self._unbind(name)
            self._turns.pop(name, None)
            while drop and node is not None and node.parent is not None:
                if node.children or node.names or node.leases:
                    break
                parent = node.parent
                self._remove(node)
                node = parent
        if drop:
            self._on_drop()

    def drop_path(self, namespace: bytes, token_ids: TokenIds) -> int:
        """Drop a path that proved wrong, and all that was computed behind it; return its tokens.

        Leases do not protect it: to their holders it is a miss. Engine thread only.
        """
        num_tokens = 0
        with self._lock:
            tree = self._tree(namespace)
            top = tree.root.children.pop(int(token_ids[0]), None)
            doomed = [] if top is None else [top]
            for node in doomed:
                doomed.extend(node.children.values())
                num_tokens += len(node.tokens)
                self._lay_aside(node)
                for name in node.names:
                    del self._names[name]
                node.names = set()
            self._close(tree.root)
        self.bury()
        return num_tokens

    def usage(self, namespace: bytes, token_ids: TokenIds) -> PathUsage:
        """Return what is held of the path `token_ids`."""
        with self._lock:
            node, matched = self._tree(namespace).walk(token_ids)
            segments = [
                (step.start, min(step.end, matched), step.payload.nbytes)
                for step in node.path()
                if step.payload is not None
            ]
            nbytes = sum(size for _, _, size in segments)
            return PathUsage(matched, nbytes, shared_nbytes(node, matched), tuple(segments))

    # -- inspection ---------------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """Return counts and bytes, JSON-able, without any text or id of a caller."""
        with self._lock:
            return {
                "budget_bytes": self.budget_nbytes,
                "stored_bytes": self._stored_nbytes,
                "working_bytes": self._reserved_nbytes,
                "references": len(self._names),
                "segments": self._num_segments,
                "tokens": self._num_tokens,
                "lookups": self._counts["lookups"],
                "published_tokens": self._counts["published_tokens"],
                "adopted_tokens": self._counts["adopted_tokens"],
                "evicted_segments": self._counts["evicted"],
                "evicted_tokens": self._counts["evicted_tokens"],
                "revoked_leases": self._counts["revoked"],
                "skipped_no_room": self._counts["skipped_no_room"],
            }

    def check(self) -> None:
        """Recount everything and raise AssertionError on any difference; for tests."""
        with self._lock:
            total = num_segments = num_tokens = 0
            named = {}
            for tree in self._trees.values():
                for node in tree:
                    assert node.parent is not None and node.payload is not None
                    assert node.start == node.parent.end and len(node.tokens) > 0
                    assert node.parent.children[int(node.tokens[0])] is node
                    assert node.leases >= 0
                    total += node.payload.nbytes
                    num_segments += 1
                    num_tokens += len(node.tokens)
                    named.update(dict.fromkeys(node.names, node))
            assert total == self._stored_nbytes, (total, self._stored_nbytes)
            assert (num_segments, num_tokens) == (self._num_segments, self._num_tokens)
            assert named == self._names
            assert not any(lease.released or not lease.node.leases for lease in self._yielding)
            assert self._stored_nbytes + self._reserved_nbytes <= self.budget_nbytes

    # -- inside the lock ----------------------------------------------------------------------

    def _tree(self, namespace: bytes) -> Tree[P]:
        """Return the tree of a namespace, an empty one that is not kept if there is none."""
        tree = self._trees.get(namespace)
        return Tree() if tree is None else tree

    def _lease(
        self,
        tree: Tree[P],
        origin: Node[P],
        token_ids: TokenIds,
        limit: int | None,
        yielding: bool,
    ) -> Lease[P]:
        node, matched = tree.walk(token_ids, origin)
        limit = len(token_ids) if limit is None else limit
        position = restorable_position(node, matched, limit)
        while not node.is_root and node.start >= position:
            assert node.parent is not None
            node = node.parent
        if not yielding:
            self._leaves.touch(node)
            self._leaves.reuse(node)
        return self._hold(tree, node, position, yielding)

    def _hold(self, tree: Tree[P], node: Node[P], position: int, yielding: bool) -> Lease[P]:
        node.leases += 1
        lease = Lease(tree, node, position, yielding)
        if yielding:
            self._yielding[lease] = None
        return lease

    def _release(self, lease: Lease[P]) -> None:
        if lease.released:
            return
        lease.released = True
        self._yielding.pop(lease, None)
        node = lease.node
        assert node.leases > 0
        node.leases -= 1
        self._leaves.offer(node)
        self._close(node)

    def _close(self, root: Node[P]) -> None:
        """Forget an empty tree: there may be a namespace for each request."""
        if root.is_root and not root.children and not root.leases:
            self._trees = {key: tree for key, tree in self._trees.items() if tree.root is not root}

    def _is_served(self, node: Node[P], end: int, with_state: bool) -> bool:
        """Whether a state at `end` is already held, or is not wanted there."""
        if self.traits.stateful and not with_state:
            return True
        return restorable_position(node, end, end) == end

    def _split(self, tree: Tree[P], node: Node[P], position: int) -> Node[P]:
        assert node.payload is not None
        before = node.payload.nbytes
        upper = tree.split(node, position)
        assert upper.payload is not None and node.payload is not None
        self._stored_nbytes += upper.payload.nbytes + node.payload.nbytes - before
        self._num_segments += 1
        return upper

    def _store(
        self,
        tree: Tree[P],
        node: Node[P],
        tokens: TokenIds,
        payload: P,
        replaces: bool,
        counter: str,
    ) -> bool:
        """Put a payload in its place, below `node` or instead of its own; False without room."""
        before = 0
        if replaces:
            assert node.payload is not None
            before = node.payload.nbytes
            if any(
                payload.windows.get(window, 0) < held
                for window, held in node.payload.windows.items()
            ):
                return True  # what others rely on would be lost; it came too late to be better
        if not self._make_room(payload.nbytes - before):
            return False
        self._stored_nbytes += payload.nbytes - before
        if replaces:
            node.payload = payload
        else:
            # Who goes on where a conversation ended is that conversation; who forks is another.
            num_turns = 1 if node.children else node.num_turns
            node = tree.add(node, tokens, payload)
            node.num_turns = num_turns
            self._leaves.added(node)
            self._counts[counter] += len(tokens)
            self._num_segments += 1
            self._num_tokens += len(tokens)
        self._leaves.touch(node)
        self._leaves.offer(node)
        return True

    def _adopt(self, tree: Tree[P], token_ids: TokenIds, start: int, payload: P) -> Node[P] | None:
        """Put a loaded payload, of the tokens from `start` on, in its place in the tree.

        Returns the node that now ends the path `token_ids` or holds its end; None if that fails.
        """
        end = len(token_ids)
        node, matched = tree.walk(token_ids)
        if matched < start:
            return None
        if start < matched < end:
            _, payload = payload.split(matched - start, end - start)
        if matched < end and matched < node.end:
            node = self._split(tree, node, matched)
        keep = self._hold(tree, node, matched, False)  # what makes room must not take this
        try:
            if matched == end:
                assert node.payload is not None
                if (node.start, node.end) == (start, end) and _is_better(payload, node.payload):
                    self._store(tree, node, token_ids[start:], payload, True, "adopted_tokens")
                self._leaves.touch(node)
                return node
            tokens = token_ids[matched:]
            if not self._store(tree, node, tokens, payload, False, "adopted_tokens"):
                return None
            return node.children[int(tokens[0])]
        finally:
            self._release(keep)

    def _make_room(self, nbytes: int) -> bool:
        while self._stored_nbytes + self._reserved_nbytes + nbytes > self.budget_nbytes:
            victim = self._leaves.next_victim()
            if victim is None and self._yielding:
                self._release(next(iter(self._yielding)))
                self._counts["revoked"] += 1
                continue
            if victim is None:
                return False
            self._counts["evicted"] += 1
            self._counts["evicted_tokens"] += len(victim.tokens)
            self._remove(victim)
        return True

    def _remove(self, node: Node[P]) -> None:
        """Take a leaf out; its references move to its parent."""
        parent = node.parent
        assert parent is not None
        del parent.children[int(node.tokens[0])]
        self._lay_aside(node)
        for name in node.names:
            if parent.is_root:
                del self._names[name]
            else:
                parent.names.add(name)
                self._names[name] = parent
        node.names = set()
        self._leaves.pass_on(node, parent)
        self._close(parent)

    def _lay_aside(self, node: Node[P]) -> None:
        """Count a node's payload out, to be freed in `bury`."""
        assert node.payload is not None
        self._stored_nbytes -= node.payload.nbytes
        self._num_segments -= 1
        self._num_tokens -= len(node.tokens)
        self._dropped.append(node.payload)
        node.payload = None
        self._leaves.discard(node)

    def _unbind(self, name: Hashable) -> Node[P] | None:
        node = self._names.pop(name, None)
        if node is not None:
            node.names.discard(name)
        return node


def _is_dropped(node: Node[Any]) -> bool:
    """Whether a node was taken out of its tree while a lease named it."""
    return node.payload is None and not node.is_root


def _is_better(new: Payload, old: Payload) -> bool:
    """Whether a payload of the same tokens gives all that the other gives, and something more."""
    sizes = {*new.windows, *old.windows}
    held = [(new.windows.get(size, 0), old.windows.get(size, 0)) for size in sizes]
    held.append((new.restorable, old.restorable))
    return all(a >= b for a, b in held) and any(a > b for a, b in held)

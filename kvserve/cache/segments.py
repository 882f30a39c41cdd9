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
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from kvserve.cache.plan import Traits
from kvserve.cache.policy import EvictionQueue
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


@dataclass(frozen=True, slots=True)
class PathUsage:
    """What is held of one path: leading tokens, bytes, and the segments as half-open ranges.

    `shared_nbytes` counts the segments that another reference or branch uses too.
    """

    num_tokens: int
    nbytes: int
    shared_nbytes: int
    segments: tuple[tuple[int, int, int], ...]


class Lease(Generic[P]):
    """A looked-up path that cannot be evicted until `SegmentCache.release` gives it back.

    `num_tokens` leading tokens of the prompt can be restored from it.
    """

    __slots__ = ("node", "num_tokens", "released", "tree")

    def __init__(self, tree: Tree[P], node: Node[P], num_tokens: int) -> None:
        self.tree = tree
        self.node = node
        self.num_tokens = num_tokens
        self.released = False


Capture = Callable[[int, int, bool, bool], P]
"""`(start, end, with_state, self_contained) -> payload` of the tokens `[start, end)`; see codec."""


class SegmentCache(Generic[P]):
    """Segments of one model, by namespace.

    Args:
        fingerprint: stands for the model in the key of whatever leaves this process.
        traits: what the model's layers demand.
        budget_nbytes: hard limit over segments and reservations.
        segment_nbytes: `(num_tokens, with_state) -> bytes`, what a payload will take; room is made
            for it before it is captured, and for what it lacked afterwards.
    """

    def __init__(
        self,
        fingerprint: str,
        traits: Traits,
        budget_nbytes: int,
        segment_nbytes: Callable[[int, bool], int],
        on_drop: Callable[[], None] = lambda: None,
    ) -> None:
        self.traits = traits
        self.budget_nbytes = budget_nbytes
        self.fingerprint = fingerprint
        self._segment_nbytes = segment_nbytes
        self._on_drop = on_drop
        # By the namespace itself, not by a hash of it: callers choose a part of it (`cache_salt`),
        # and XXH3 does not resist one who looks for another caller's.
        self._trees: dict[bytes, Tree[P]] = {}
        self._names: dict[Hashable, Node[P]] = {}
        self._leaves: EvictionQueue[Node[P]] = EvictionQueue()
        self._dropped: list[P] = []
        self._stored_nbytes = self._num_segments = self._num_tokens = 0
        self._reserved_nbytes = 0
        self._tick = 0
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    # -- looking up ---------------------------------------------------------------------------

    def lookup(self, namespace: bytes, token_ids: TokenIds, limit: int | None = None) -> Lease[P]:
        """Return a lease on the longest stored prefix, at most `limit` tokens of it restorable."""
        with self._lock:
            self._counts["lookups"] += 1
            tree = self._trees[namespace] = self._tree(namespace)
            return self._lease(tree, tree.root, token_ids, limit)

    def extend(self, lease: Lease[P], token_ids: TokenIds, limit: int | None = None) -> Lease[P]:
        """Return a lease on what has been stored since, and give `lease` back."""
        with self._lock:
            origin = lease.node
            # A split may have left the leased node behind the position, where others now part.
            while origin.start >= lease.num_tokens and origin.parent is not None:
                origin = origin.parent
            longer = self._lease(lease.tree, origin, token_ids, limit)
            self._release(lease)
            return longer

    def release(self, lease: Lease[P]) -> None:
        """Give a lease back; idempotent."""
        with self._lock:
            self._release(lease)

    def payloads(self, lease: Lease[P]) -> list[tuple[int, int, P]]:
        """Return `(start, end, payload)` of the leased segments from the root on, in order.

        The last may reach beyond `lease.num_tokens`: only its leading tokens are to be used.
        """
        with self._lock:
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
            self._touch(node)
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
            keep = self._hold(tree, node, matched)
            fits = self._make_room(self._segment_nbytes(span, with_state))
        try:
            if fits:
                payload = capture(start, end, with_state, contained)
                with self._lock:
                    fits = self._store(tree, node, token_ids[start:], payload, replaces)
            if not fits:
                self._counts["skipped_no_room"] += 1
                return matched
            return end
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
        """Let `name` refer to the longest held prefix of `token_ids`, and to nothing else."""
        with self._lock:
            self._unbind(name)
            node, matched = self._tree(namespace).walk(token_ids)
            if matched < node.end and node.parent is not None:
                node = node.parent  # the rest of that segment belongs to others
            if not node.is_root:
                node.names.add(name)
                self._names[name] = node

    def unbind(self, name: Hashable, *, drop: bool) -> None:
        """Forget a reference; with `drop` also free the segments that only it used."""
        with self._lock:
            node = self._unbind(name)
            while drop and node is not None and node.parent is not None:
                if node.children or node.names or node.leases:
                    break
                parent = node.parent
                self._remove(node)
                node = parent
        if drop:
            self._on_drop()

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
                "evicted_segments": self._counts["evicted"],
                "evicted_tokens": self._counts["evicted_tokens"],
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
            assert self._stored_nbytes + self._reserved_nbytes <= self.budget_nbytes

    # -- inside the lock ----------------------------------------------------------------------

    def _tree(self, namespace: bytes) -> Tree[P]:
        """Return the tree of a namespace, an empty one that is not kept if there is none."""
        tree = self._trees.get(namespace)
        return Tree() if tree is None else tree

    def _lease(
        self, tree: Tree[P], origin: Node[P], token_ids: TokenIds, limit: int | None
    ) -> Lease[P]:
        node, matched = tree.walk(token_ids, origin)
        limit = len(token_ids) if limit is None else limit
        position = restorable_position(node, matched, limit)
        while not node.is_root and node.start >= position:
            assert node.parent is not None
            node = node.parent
        self._touch(node)
        return self._hold(tree, node, position)

    def _hold(self, tree: Tree[P], node: Node[P], position: int) -> Lease[P]:
        node.leases += 1
        return Lease(tree, node, position)

    def _release(self, lease: Lease[P]) -> None:
        if lease.released:
            return
        lease.released = True
        node = lease.node
        assert node.leases > 0
        node.leases -= 1
        self._offer(node)
        self._close(node)

    def _close(self, root: Node[P]) -> None:
        """Forget an empty tree: there may be a namespace for each request."""
        if root.is_root and not root.children and not root.leases:
            self._trees = {key: tree for key, tree in self._trees.items() if tree.root is not root}

    def _touch(self, node: Node[P]) -> None:
        """Note a use. Only leaves are evicted, so those above learn of it in `_remove`."""
        self._tick += 1
        node.used = self._tick

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
        self, tree: Tree[P], node: Node[P], tokens: TokenIds, payload: P, replaces: bool
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
            node = tree.add(node, tokens, payload)
            self._counts["published_tokens"] += len(tokens)
            self._num_segments += 1
            self._num_tokens += len(tokens)
        self._touch(node)
        self._offer(node)
        return True

    def _make_room(self, nbytes: int) -> bool:
        while self._stored_nbytes + self._reserved_nbytes + nbytes > self.budget_nbytes:
            victim = self._leaves.pop(self._evictable)
            if victim is None:
                return False
            self._counts["evicted"] += 1
            self._counts["evicted_tokens"] += len(victim.tokens)
            self._remove(victim)
        return True

    def _evictable(self, node: Node[P]) -> int | None:
        """Return the tick of a leaf that may be evicted, None for anything else."""
        if node.children or node.leases or node.payload is None:
            return None
        return node.used

    def _offer(self, node: Node[P]) -> None:
        if not node.is_root and self._evictable(node) is not None:
            self._leaves.push(node, node.used)

    def _remove(self, node: Node[P]) -> None:
        """Take a leaf out; its references move to its parent."""
        parent = node.parent
        assert parent is not None and node.payload is not None
        del parent.children[int(node.tokens[0])]
        self._stored_nbytes -= node.payload.nbytes
        self._num_segments -= 1
        self._num_tokens -= len(node.tokens)
        self._dropped.append(node.payload)
        node.payload = None
        self._leaves.discard(node)
        for name in node.names:
            if parent.is_root:
                del self._names[name]
            else:
                parent.names.add(name)
                self._names[name] = parent
        node.names = set()
        parent.used = max(parent.used, node.used)
        self._offer(parent)
        self._close(parent)

    def _unbind(self, name: Hashable) -> Node[P] | None:
        node = self._names.pop(name, None)
        if node is not None:
            node.names.discard(name)
        return node

"""Which leaf of the trees goes next: the policy, kept up to date as nodes are used.

Owns the queue of leaves and the clock of uses, and what nodes carry of it (`used`, `rank`,
`reused`). Called inside the cache's lock. Takes nothing out itself and counts no stored bytes: what
is to leave, and when, is the cache's.
"""

from __future__ import annotations

from typing import Any, Generic, TypeVar

from kvserve.cache.policy import SAMPLED_TOKENS, Ageing, EvictionQueue, Order, sample_keys
from kvserve.cache.tree import Node, Payload

P = TypeVar("P", bound=Payload)


class LeafOrder(Generic[P]):
    """The order in which leaves are evicted under a budget of `budget_nbytes`."""

    def __init__(self, budget_nbytes: int) -> None:
        self._ageing = Ageing(budget_nbytes)
        self._leaves: EvictionQueue[Node[P]] = EvictionQueue()
        self._tick = 0

    def __len__(self) -> int:
        """Return the number of entries, discarded ones that still wait included."""
        return len(self._leaves)

    def touch(self, node: Node[P]) -> None:
        """Note a use. Only leaves are evicted, so those above learn of it in `pass_on`."""
        self._tick += 1
        node.used = self._tick
        node.rank = max(node.rank, self._ageing.rank(node.num_turns))

    def reuse(self, node: Node[P]) -> None:
        """Note that a request found this path."""
        step: Node[P] | None = node
        while step is not None and step.payload is not None and not step.reused:
            step.reused = True
            self._ageing.reused(step.payload.nbytes)
            step = step.parent

    def added(self, node: Node[P]) -> None:
        """Note a new node; what was evicted lately counts as found again."""
        for key in _keys(node):
            node.reused |= self._ageing.added(key)

    def offer(self, node: Node[P]) -> None:
        """Make a node a candidate, if it may be evicted as it now is."""
        order = _order(node)
        if order is not None:
            self._leaves.push(node, order)

    def discard(self, node: Node[P]) -> None:
        """Forget a node that is taken out."""
        self._leaves.discard(node)

    def pass_on(self, node: Node[P], parent: Node[P]) -> None:
        """Let the parent of a leaf that was taken out have its uses; it may be next."""
        parent.used = max(parent.used, node.used)
        parent.rank = max(parent.rank, node.rank)
        self.offer(parent)

    def next_victim(self) -> Node[P] | None:
        """Return the leaf to evict, which is remembered as evicted; None when there is none."""
        victim = self._leaves.pop(_order)
        if victim is not None:
            assert victim.payload is not None
            sampled_nbytes = victim.payload.nbytes * SAMPLED_TOKENS // len(victim.tokens)
            for key in _keys(victim):
                self._ageing.evicted(key, sampled_nbytes)
        return victim


def _order(node: Node[Any]) -> Order | None:
    """Return the place in the order of a leaf that may be evicted, None for anything else."""
    if node.children or node.leases or node.payload is None:
        return None
    return node.rank, node.used


def _keys(node: Node[Any]) -> list[int]:
    return sample_keys(node.start, node.data)

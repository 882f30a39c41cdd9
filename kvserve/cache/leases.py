"""What a lookup in the RAM tier gives out: a lease on a path, and the figures of one.

State: none of its own. A lease is changed by `kvserve.cache.segments.SegmentCache` alone, under its
lock; holders read it on any thread.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from kvserve.cache.tree import Node, Payload, Tree

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

    `num_tokens` leading tokens of the prompt can be restored from it. A `yielding` lease protects
    only as long as room can be made without it: then it is taken back and `released` is True.
    """

    __slots__ = ("node", "num_tokens", "released", "tree", "yielding")

    def __init__(self, tree: Tree[P], node: Node[P], num_tokens: int, yielding: bool) -> None:
        self.tree = tree
        self.node = node
        self.num_tokens = num_tokens
        self.yielding = yielding
        self.released = False

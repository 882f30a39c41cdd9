"""The most that a cache can find: without a limit, and within one by knowing the future.

With foresight: after each request keep, of what was held and what the request brought, the blocks
whose next use is soonest (Belady's MIN, which may also decline to keep). Here that is **the exact
optimum** of one tier, and not just a bound: all blocks are of one size and cost, and a block's
prefix is used whenever the block is, hence no later; with ties broken towards the root what is
kept is therefore always closed under prefixes, so that every block that MIN finds can be used.
For any cache that must hold a whole prompt while it serves it, it is an upper bound.

For two tiers of r and d blocks MIN of r is the most that memory can find, and MIN of r + d the most
that both can: a bound which a disk that also holds what memory does (ours) reaches only
if r is small beside d.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from scripts.replay.requests import Request


def unlimited(requests: Sequence[Request]) -> int:
    """Return how many counted blocks a cache finds that forgets nothing."""
    seen: set[int] = set()
    hits = 0
    for request in requests:
        if request.counted:
            hits += sum(block in seen for block in request.blocks)
        seen.update(request.blocks)
    return hits


def with_foresight(requests: Sequence[Request], num_blocks: int) -> int:
    """Return how many counted blocks the best cache of `num_blocks` finds.

    Uses that are not counted are not foreseen: nothing is kept for their sake.
    """
    never = len(requests)
    following: dict[int, int] = {}
    next_uses: list[list[int]] = []
    for number in range(len(requests) - 1, -1, -1):
        blocks = requests[number].blocks
        next_uses.append([following.get(block, never) for block in blocks])
        if requests[number].counted:
            following.update(dict.fromkeys(blocks, number))
    next_uses.reverse()
    held: dict[int, int] = {}
    waiting: list[tuple[int, int, int]] = []
    hits = 0
    for number, request in enumerate(requests):
        if request.counted:
            hits += sum(block in held for block in request.blocks)
        for depth, (block, use) in enumerate(zip(request.blocks, next_uses[number], strict=True)):
            held[block] = use
            heapq.heappush(waiting, (-use, -depth, block))
        while len(held) > num_blocks:
            use, _, block = heapq.heappop(waiting)
            if held.get(block) == -use:
                del held[block]
    return hits

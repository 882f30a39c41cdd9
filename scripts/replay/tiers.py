"""Memory and disk as sets of prefix blocks, evicted by the server's own policy or by LRU.

Memory decides with `kvserve.cache.policy`, as `kvserve.cache.segments` does, one block a segment;
a test holds the two to the same hits. The disk decides with `kvserve.store.guards.staleness`, one
run for what a turn adds. Every turn is written to disk as it ends, as with `--persist auto`, so
what memory evicts is not written then; what is read from disk is in memory afterwards. Sizes are
blocks.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvserve.cache.policy import Ageing, EvictionQueue, Order
from kvserve.store.guards import Holding, staleness
from scripts.replay.requests import BLOCK_TOKENS, Request

SPARE_SHARE = 64
"""The disk frees this part of its budget beyond what it needs, and so need not look each time."""


@dataclass(slots=True, eq=False)
class Block:
    """A block in memory; the names are those of `kvserve.cache.tree.Node`."""

    id: int
    parent: Block | None
    num_children: int = 0
    used: int = 0
    rank: int = 0
    num_turns: int = 1
    reused: bool = False


class Memory:
    """The RAM tier. Without `ageing` all ranks are equal, which is LRU.

    `block_nbytes` is the size of a block in the unit of the ageing's budget.
    """

    def __init__(self, num_blocks: int, ageing: Ageing | None, block_nbytes: int = 1) -> None:
        self._block_nbytes = block_nbytes
        self._budget = num_blocks
        self._ageing = ageing
        self._held: dict[int, Block] = {}
        self._leaves: EvictionQueue[Block] = EvictionQueue()
        self._leased: set[int] = set()
        self._tick = 0

    def hits(self, blocks: Sequence[int]) -> int:
        """Return how many leading blocks are held."""
        return next((i for i, block in enumerate(blocks) if block not in self._held), len(blocks))

    def use(self, request: Request) -> None:
        """Serve a request: use what is held of it, hold the rest, and end its turn."""
        self._leased = set(request.blocks)
        num_held = self.hits(request.blocks)
        tip = self._held[request.blocks[num_held - 1]] if num_held else None
        if tip is not None:
            self._touch(tip)
            self._reuse(tip)
        for block in request.blocks[num_held:]:
            if not self._make_room():
                break
            tip = self._add(block, tip)
        self._leased = set()
        if tip is not None:
            if tip.id == request.blocks[-1]:
                tip.num_turns = max(tip.num_turns, request.num_turns)
            self._touch(tip)
            self._offer(tip)

    def _add(self, id: int, above: Block | None) -> Block:
        block = self._held[id] = Block(id, above)
        if above is not None:
            block.num_turns = 1 if above.num_children else above.num_turns
            above.num_children += 1
        if self._ageing is not None:
            block.reused = self._ageing.added(id)
        self._touch(block)
        return block

    def _touch(self, block: Block) -> None:
        self._tick += 1
        block.used = self._tick
        if self._ageing is not None:
            block.rank = max(block.rank, self._ageing.rank(block.num_turns))

    def _reuse(self, tip: Block | None) -> None:
        while tip is not None and not tip.reused:
            tip.reused = True
            if self._ageing is not None:
                self._ageing.reused(self._block_nbytes)
            tip = tip.parent

    def _make_room(self) -> bool:
        while len(self._held) >= self._budget:
            victim = self._leaves.pop(self._order)
            if victim is None:
                return False
            del self._held[victim.id]
            if self._ageing is not None:
                self._ageing.evicted(victim.id, self._block_nbytes)
            if (parent := victim.parent) is not None:
                parent.num_children -= 1
                parent.used = max(parent.used, victim.used)
                parent.rank = max(parent.rank, victim.rank)
                self._offer(parent)
        return True

    def _order(self, block: Block) -> Order | None:
        if block.num_children or block.id in self._leased:
            return None
        return block.rank, block.used

    def _offer(self, block: Block) -> None:
        order = self._order(block)
        if order is not None:
            self._leaves.push(block, order)


@dataclass(slots=True, eq=False)
class Run:
    """What one turn added, in one file: the blocks from position `start` on."""

    id: int
    parent: Run | None
    start: int
    blocks: tuple[int, ...]
    used_at_s: float
    num_turns: int
    num_children: int = 0


def longest_unused(holding: Holding) -> float:
    """Order runs as LRU does."""
    return holding.age_s


class Disk:
    """The disk tier: runs, of which the leaf with the highest `order` goes first."""

    def __init__(self, num_blocks: int, order: Callable[[Holding], float]) -> None:
        self._budget = num_blocks
        self._order = order
        self._runs: dict[int, Run] = {}
        self._run_of: dict[int, Run] = {}
        self._serial = 0

    def hits(self, blocks: Sequence[int]) -> int:
        """Return how many leading blocks are held."""
        return next((i for i, block in enumerate(blocks) if block not in self._run_of), len(blocks))

    def use(self, request: Request) -> None:
        """Write what is not held of a turn that has ended."""
        start = self.hits(request.blocks)
        above = self._run_of[request.blocks[start - 1]] if start else None
        new = request.blocks[start:]
        if not self._make_room(len(new), above, request.at_s):
            return
        if new:
            self._serial += 1
            run = Run(self._serial, above, start, new, request.at_s, request.num_turns)
            self._runs[run.id] = run
            self._run_of.update(dict.fromkeys(new, run))
            if above is not None:
                above.num_children += 1
        elif above is not None:
            above.used_at_s = request.at_s
            above.num_turns = max(above.num_turns, request.num_turns)

    def _make_room(self, num_blocks: int, keep: Run | None, now_s: float) -> bool:
        if num_blocks > self._budget:
            return False
        excess = len(self._run_of) + num_blocks - self._budget
        if excess <= 0:
            return True
        excess += self._budget // SPARE_SHARE
        kept: set[int] = set()
        while keep is not None:
            kept.add(keep.id)
            keep = keep.parent
        leaves = [
            (-self._order(_holding(run, now_s)), run.id)
            for run in self._runs.values()
            if not run.num_children and run.id not in kept
        ]
        heapq.heapify(leaves)
        while leaves and excess > 0:
            gone = self._runs.pop(heapq.heappop(leaves)[1])
            excess -= len(gone.blocks)
            for block in gone.blocks:
                del self._run_of[block]
            if (above := gone.parent) is not None:
                above.num_children -= 1
                above.used_at_s = max(above.used_at_s, gone.used_at_s)
                above.num_turns = max(above.num_turns, gone.num_turns)
                if not above.num_children and above.id not in kept:
                    heapq.heappush(leaves, (-self._order(_holding(above, now_s)), above.id))
        return len(self._run_of) + num_blocks <= self._budget


def _holding(run: Run, now_s: float) -> Holding:
    end = run.start + len(run.blocks)
    return Holding(
        run_id=run.id,
        parent_id=None,
        start=run.start * BLOCK_TOKENS,
        end=end * BLOCK_TOKENS,
        nbytes=len(run.blocks) * BLOCK_TOKENS,
        age_s=now_s - run.used_at_s,
        num_turns=run.num_turns,
    )


@dataclass(frozen=True, slots=True)
class Hits:
    """Counted blocks: found in memory, found on disk behind those, and all that were asked for."""

    ram: int
    disk: int
    total: int

    @property
    def ratio(self) -> float:
        """The share that was found anywhere."""
        return (self.ram + self.disk) / self.total if self.total else 0.0


def replay(
    requests: Sequence[Request],
    ram_blocks: int,
    disk_blocks: int = 0,
    *,
    lru: bool = False,
    advance: Callable[[], None] = lambda: None,
) -> Hits:
    """Serve the requests one after the other; `advance` is called after each."""
    memory = Memory(ram_blocks, None if lru else Ageing(ram_blocks))
    disk = Disk(disk_blocks, longest_unused if lru else staleness) if disk_blocks else None
    ram_hits = disk_hits = total = 0
    for request in requests:
        in_memory = memory.hits(request.blocks)
        found = max(in_memory, disk.hits(request.blocks) if disk is not None else 0)
        if request.counted:
            ram_hits += in_memory
            disk_hits += found - in_memory
            total += len(request.blocks)
        memory.use(request)
        if disk is not None:
            disk.use(request)
        advance()
    return Hits(ram_hits, disk_hits, total)

"""What memory and disk hold of a conversation, put together. Pure.

The tiers are told apart as a next turn would find them: it takes from memory what memory holds,
and the rest from disk.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter

from kvserve.chat.conversations import Conversation
from kvserve.chat.ports import PathUsage
from kvserve.store.runs import PathUsage as DiskUsage

Ranges = Sequence[tuple[int, int, int]]
"""`(start, end, nbytes)` in order, half-open."""


@dataclass(frozen=True, slots=True)
class Holding:
    """What is held of one conversation. `tier` is where most of it is, memory first.

    `nbytes` and `shared_nbytes` are the tier's. `num_in_ram` leading tokens are in memory.
    """

    tier: str
    nbytes: int
    shared_nbytes: int
    num_in_ram: int
    ram: Ranges
    disk: Ranges


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageCut:
    """The tokens `[start, end)` up to the end of message `message`, and what is held of them.

    A message whose end the template hides has no entry; the next entry covers it too. `tier` is
    `ram` when memory holds all of it, `disk` when the disk has what memory lacks, else `none`;
    `bytes` is its share of what covers it there.
    """

    message: int
    role: str
    start: int
    end: int
    tier: str
    bytes: int


def holding(ram: PathUsage | None, disk: DiskUsage | None) -> Holding:
    """Return what the tiers hold together; None for a tier that was not asked."""
    in_ram = 0 if ram is None else ram.num_tokens
    on_disk = 0 if disk is None else disk.held_tokens
    tier, nbytes, shared = "none", 0, 0
    if ram is not None and in_ram >= max(on_disk, 1):
        tier, nbytes, shared = "ram", ram.nbytes, ram.shared_nbytes
    elif disk is not None and on_disk:
        tier, nbytes, shared = "disk", disk.nbytes, disk.shared_nbytes
    return Holding(
        tier,
        nbytes,
        shared,
        in_ram,
        () if ram is None else ram.segments,
        () if disk is None else disk.ranges,
    )


def message_cuts(record: Conversation, held: Holding) -> tuple[MessageCut, ...]:
    """Return the conversation's cuts with what is held of each."""
    cuts = []
    start = 0
    for cut in record.cuts:
        end = cut.position
        lacking = max(start, held.num_in_ram)
        if lacking >= end:
            tier = "ram"
        elif _tokens_within(held.disk, lacking, end) == end - lacking:
            tier = "disk"
        else:
            tier = "none"
        cuts.append(
            MessageCut(
                message=cut.message,
                role=record.roles[cut.message],
                start=start,
                end=end,
                tier=tier,
                bytes=_bytes_within(held.disk if tier == "disk" else held.ram, start, end),
            )
        )
        start = end
    return tuple(cuts)


def _tokens_within(ranges: Ranges, start: int, end: int) -> int:
    return sum(overlap for overlap, _ in _within(ranges, start, end))


def _bytes_within(ranges: Ranges, start: int, end: int) -> int:
    return sum(
        nbytes * overlap // (last - first)
        for overlap, (first, last, nbytes) in _within(ranges, start, end)
    )


def _within(ranges: Ranges, start: int, end: int) -> Iterator[tuple[int, tuple[int, int, int]]]:
    """Yield the ranges that meet `[start, end)`, each with how many tokens of it do.

    The first is searched for: a long chat has thousands of ranges, and is asked for each message.
    """
    for at in range(bisect_right(ranges, start, key=itemgetter(1)), len(ranges)):
        first, last, _ = ranges[at]
        if first >= end:
            return
        yield min(last, end) - max(first, start), ranges[at]

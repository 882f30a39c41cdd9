"""Where one request's prefill stops and what it leaves behind: pure decisions on positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvserve.cache.policy import STATE_SPACING_TOKENS, states_to_keep
from kvserve.core.types import Cut


@dataclass(frozen=True, slots=True)
class Traits:
    """What a model's layers demand of a plan.

    `reach` is the widest sliding window in tokens, 0 if there is none. `stateful` models keep
    end states, which exist only where prefill pauses.
    """

    reach: int = 0
    stateful: bool = False

    @property
    def fleeting(self) -> bool:
        """Whether state is overwritten as tokens follow, so that it must be taken in passing."""
        return self.stateful or self.reach > 0


@dataclass(frozen=True, slots=True)
class Plan:
    """How a prompt is prefilled.

    `cuts` are the ends of the segments to be published, ascending, all behind `reuse` and none
    behind the prompt's end. `states` are those among them where end states are taken.
    """

    reuse: int
    length: int
    cuts: tuple[int, ...]
    states: frozenset[int]


def segment_ends(message_ends: Sequence[int], length: int, segment_tokens: int) -> list[int]:
    """Return the ends of all segments of a path of `length` tokens.

    Every message end is one, and inside a message every `segment_tokens` from its start. What
    lies behind the last message end (the suffix that opens the reply, and the reply) counts as
    a message that has not ended.
    """
    ends: list[int] = []
    start = 0
    for end in (*message_ends, length):
        end = min(end, length)
        if end - start > segment_tokens:
            ends.extend(range(start + segment_tokens, end, segment_tokens))
        if end > start:
            ends.append(end)
            start = end
    return ends


def plan(length: int, cuts: Sequence[Cut], reuse: int, traits: Traits, segment_tokens: int) -> Plan:
    """Return what to prefill of a prompt of `length` tokens of which `reuse` are held.

    The end of the prompt is not a cut of its own: the suffix that opens the reply and the reply
    make one segment, since the next turn never takes up between them.
    """
    assert 0 <= reuse < length
    message_ends = [cut.position for cut in cuts]
    ends = finished_ends(message_ends, length, segment_tokens)
    states = state_ends(message_ends, length, segment_tokens) if traits.stateful else set()
    return Plan(
        reuse=reuse,
        length=length,
        cuts=tuple(end for end in ends if end > reuse),
        states=frozenset(end for end in states if end > reuse),
    )


def finished_ends(message_ends: Sequence[int], length: int, segment_tokens: int) -> list[int]:
    """Return the segment ends of a path that will not move as it grows.

    The end of the path is one of them only if a message ends there.
    """
    boundaries = set(message_ends)
    ends = segment_ends(message_ends, length, segment_tokens)
    return [end for end in ends if end < length or end in boundaries]


def state_ends(message_ends: Sequence[int], length: int, segment_tokens: int) -> set[int]:
    """Return the ends at which a path of `length` tokens keeps end states.

    The message ends that policy keeps, and inside long messages one every so often.
    """
    boundaries = set(message_ends)
    kept = states_to_keep(message_ends, length)
    last = 0
    for end in finished_ends(message_ends, length, segment_tokens):
        if end in boundaries:
            last = end
        elif end - last >= STATE_SPACING_TOKENS:
            kept.add(end)
            last = end
    return kept


def chunk_end(position: int, plan: Plan, size: int) -> int:
    """Return where the chunk that begins at `position` ends, at most `size` tokens further.

    Only end states need the pause: they exist for the last token computed. Right after a chunk,
    a sliding window's buffer still holds all of the chunk's tokens and the window before them, so
    whatever cut lies inside the chunk can be taken from it.
    """
    end = min(position + size, plan.length)
    pauses = [pause for pause in plan.states if position < pause < end]
    return min(pauses, default=end)

"""Made-up loads that ask one question each: is what will be wanted still there?

Block ids are made from what the blocks hold, so that equal prefixes are equal. Sizes are blocks;
only the requests that ask the question are counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from scripts.replay.requests import Request


@dataclass(slots=True)
class Load:
    """Requests in the making, a second apart."""

    requests: list[Request] = field(default_factory=list)
    _ids: dict[tuple[object, ...], int] = field(default_factory=dict)

    def prefix(self, *parts: tuple[str, int]) -> tuple[int, ...]:
        """Return the blocks of a prompt made of named parts of so many blocks each."""
        blocks: list[int] = []
        path: tuple[object, ...] = ()
        for name, num_blocks in parts:
            path = (*path, name)
            for number in range(num_blocks):
                blocks.append(self._ids.setdefault((*path, number), len(self._ids)))
        return tuple(blocks)

    def ask(self, num_turns: int, *parts: tuple[str, int], counted: bool = False) -> None:
        """Add a request; its conversation is in its `num_turns`-th turn."""
        at_s = float(len(self.requests))
        self.requests.append(Request(at_s, self.prefix(*parts), num_turns, counted))

    def talk(
        self, name: str, turn: int, system: tuple[str, int], added: int, *, counted: bool = False
    ) -> None:
        """Add the `turn`-th turn of a conversation that grows by `added` blocks a turn."""
        parts = [(f"{name}/{number}", added) for number in range(turn)]
        self.ask(turn, system, *parts, counted=counted)


def pause(num_prompts: int = 500, num_turns: int = 8) -> list[Request]:
    """Eight people talk, pause for a burst of one-off prompts, and come back.

    Their conversations take 164 blocks, each prompt 6 beside the system prompt that all share.
    """
    load, system, added = Load(), ("system", 4), 20 // num_turns
    for turn in range(1, num_turns + 1):
        for person in range(8):
            load.talk(f"person {person}", turn, system, added)
    for number in range(num_prompts):
        load.ask(1, system, (f"prompt {number}", 6))
    for person in range(8):
        load.talk(f"person {person}", num_turns + 1, system, added, counted=True)
    return load.requests


def sub_agents(num_agents: int = 50) -> list[Request]:
    """A main agent of twelve turns (68 blocks) waits for its sub-agents and goes on.

    Every other sub-agent begins with the main agent's system prompt, the others with one of their
    own; they take one to four turns, four of them at a time, and none comes back.
    """
    load, system = Load(), ("system", 8)
    for turn in range(1, 13):
        load.talk("main", turn, system, 5)
    for first in range(0, num_agents, 4):
        agents = range(first, min(first + 4, num_agents))
        for turn in range(1, 5):
            for agent in agents:
                prompt = system if agent % 2 else (f"system {agent}", 8)
                if turn <= 1 + agent % 4:
                    load.talk(f"agent {agent}", turn, prompt, 3)
    load.talk("main", 13, system, 5, counted=True)
    return load.requests


def change(since: int = 1) -> list[Request]:
    """Eight favourites of twelve turns are left for good; eight new conversations begin.

    Either fills most of the memory. What the new ones find from turn `since` on is counted.
    """
    load = _favourites()
    for turn in range(1, 13):
        for person in range(8):
            load.talk(f"new {person}", turn, ("system", 4), 2, counted=turn >= since)
    return load.requests


def documents(since: int = 1) -> list[Request]:
    """The same favourites are left for nine documents of 20 blocks, asked about in turn.

    The questions belong to no conversation. What they find from round `since` on is counted.
    """
    load = _favourites()
    for number in range(1, 21):
        for document in range(9):
            parts = (f"document {document}", 20), (f"question {number}", 1)
            load.ask(1, *parts, counted=number >= since)
    return load.requests


def _favourites() -> Load:
    load = Load()
    for turn in range(1, 13):
        for person in range(8):
            load.talk(f"old {person}", turn, ("system", 4), 2)
    return load


@dataclass(frozen=True, slots=True)
class Scenario:
    """A load, and the size of memory at which it asks its question."""

    name: str
    ram_blocks: int
    make: Callable[[], list[Request]]


SCENARIOS = [
    *(
        Scenario(f"8 pause after {turns} turns, 500 prompts", 200, partial(pause, 500, turns))
        for turns in (2, 3, 4, 8)
    ),
    Scenario("8 pause after 8 turns, 2,000 prompts", 200, partial(pause, 2000, 8)),
    *(Scenario("main agent waits for 50 sub-agents", ram, sub_agents) for ram in (100, 128, 256)),
    Scenario("new conversations displace old, all turns", 220, change),
    Scenario("new conversations displace old, from turn 7", 220, partial(change, 7)),
    Scenario("documents displace old, all rounds", 220, documents),
    Scenario("documents displace old, from round 4", 220, partial(documents, 4)),
]
"""What `scripts.replay_trace` shows, those included at which the policy does worse than LRU."""

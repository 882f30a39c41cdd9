"""The RAM tier evicts as the policy says, and the replay decides as the RAM tier does."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kvserve.cache.plan import Traits
from kvserve.cache.policy import Ageing
from kvserve.cache.segments import SegmentCache
from kvserve.core.types import TokenIds
from scripts.replay.tiers import Memory
from tests.unit.made_paths import PATHS, requests_of

BLOCK = 128
"""Tokens of a segment here: as many as one remembered place stands for."""


@dataclass(frozen=True)
class Sized:
    """A payload that is nothing but its size."""

    nbytes: int
    restorable: bool = True
    whole: bool = True

    @property
    def windows(self) -> Mapping[int, int]:
        return {}

    def split(self, at: int, length: int) -> tuple[Sized, Sized]:
        return Sized(at), Sized(length - at)


class Server:
    """A cache of one byte a token, asked as the server asks it. A prompt is a list of blocks."""

    def __init__(self, num_blocks: int) -> None:
        self.cache: SegmentCache[Sized] = SegmentCache(
            Traits(0), num_blocks * BLOCK, lambda num_tokens, _: num_tokens
        )

    def tokens(self, blocks: tuple[int, ...]) -> TokenIds:
        return np.repeat(np.array(blocks, np.uint32), BLOCK)

    def held(self, *blocks: int) -> int:
        """Return how many leading blocks are held, without using them."""
        return self.cache.held(b"", self.tokens(blocks)) // BLOCK

    def ask(self, name: Hashable, *blocks: int) -> int:
        """Serve a turn of a conversation; return how many blocks of it were held."""
        tokens = self.tokens(blocks)
        lease = self.cache.lookup(b"", tokens)
        for end in range(lease.num_tokens + BLOCK, len(tokens) + 1, BLOCK):
            self.cache.publish(
                b"", tokens[:end], with_state=False, capture=lambda a, b, *_: Sized(b - a)
            )
        self.cache.release(lease)
        self.cache.bind(name, b"", tokens)
        self.cache.check()
        return lease.num_tokens // BLOCK


@settings(deadline=None, max_examples=60)
@given(PATHS, st.sampled_from([5, 10, 25]))
def test_the_replay_decides_as_the_cache_does(
    paths: list[tuple[int, ...]], num_blocks: int
) -> None:
    memory = Memory(num_blocks, Ageing(num_blocks * BLOCK), block_nbytes=BLOCK)
    server = Server(num_blocks)
    for request in requests_of(paths * 3):
        server.cache._turns["name"] = request.num_turns - 1  # a conversation that had so many
        assert server.ask("name", *request.blocks) == memory.hits(request.blocks)
        server.cache.unbind("name", drop=False)
        memory.use(request)


def test_a_conversation_that_came_back_outlives_a_burst_of_prompts() -> None:
    server = Server(20)
    for turn in range(1, 9):
        server.ask("main", 1, *range(100, 100 + turn))
    for prompt in range(500):
        server.ask(prompt, 1, 1000 + prompt, 2000 + prompt)
    assert server.ask("main", 1, *range(100, 109)) == 9


def test_a_conversation_that_never_came_back_goes_with_the_burst() -> None:
    server = Server(20)
    server.ask("first", 1, *range(100, 108))
    for prompt in range(500):
        server.ask(prompt, 1, 1000 + prompt, 2000 + prompt)
    assert server.held(1, *range(100, 108)) == 1


def test_a_turn_in_the_making_is_worth_what_its_conversation_is() -> None:
    server = Server(100)
    for turn in range(1, 6):
        server.ask("main", 1, *range(100, 100 + turn))
    tokens = server.tokens((1, *range(100, 106)))
    server.cache.publish(
        b"", tokens, with_state=False, capture=lambda a, b, *_: Sized(b - a)
    )  # not bound yet
    node, _ = server.cache._tree(b"").walk(tokens)
    assert node.num_turns == 5
    server.ask("main", 1, *range(100, 106))
    assert node.num_turns == 6


def test_who_forks_a_conversation_begins_with_its_first_turn() -> None:
    server = Server(100)
    for turn in range(1, 6):
        server.ask("main", 1, *range(100, 100 + turn))
    server.ask("fork", 1, 100, 101, 7)
    node, _ = server.cache._tree(b"").walk(server.tokens((1, 100, 101, 7)))
    assert node.num_turns == 1


def test_a_reference_that_stays_where_it_is_counts_no_turn() -> None:
    server = Server(100)
    for _ in range(5):
        server.ask("main", 1, 2, 3)
    assert server.cache._turns == {"main": 1}
    server.cache.unbind("main", drop=False)
    assert server.cache._turns == {}


def test_turns_outlive_eviction() -> None:
    server = Server(4)
    for turn in range(1, 4):
        server.ask("main", *range(100, 100 + turn))
        server.ask(turn, 1, 2, 3, turn + 10)  # takes all the room
    assert server.held(100) == 0
    assert server.cache._turns["main"] == 3


def test_favourites_of_the_past_leave_once_others_are_in_use() -> None:
    server = Server(20)
    for turn in range(1, 15):
        server.ask("old", *range(100, 100 + turn))
    documents = [tuple(range(first, first + 5)) for first in (200, 300, 400)]
    found = [[server.ask(object(), *document) for document in documents] for _ in range(8)]
    assert found[0] == [0, 0, 0] and found[-1] == [5, 5, 5]

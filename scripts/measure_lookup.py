"""Measure how long the cache takes to find a long prompt among many stored conversations.

Run as `python -m scripts.measure_lookup`. It stores 1,000 conversations over one system prompt,
then looks up prompts of 100,000 tokens (messages of uneven length, forks at every depth) and makes
their plans. Payloads are empty: this is what the event loop and the planner pay, not the copying.
The aim is 5 ms for both together. The processor's time is given too, because on a busy machine the
clock mostly says how busy it is.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from kvserve.cache.plan import Traits, plan, segment_ends
from kvserve.cache.segments import SegmentCache
from kvserve.core.types import Cut, TokenIds

NUM_CONVERSATIONS = 1000
SYSTEM_TOKENS = 2000
LONG_TOKENS = 100_000
SEGMENT_TOKENS = 512
ROUNDS = 300


@dataclass(frozen=True, slots=True)
class Empty:
    """The payload of a model with one sliding window, without its arrays."""

    window: int
    held: int
    nbytes: int = 0
    restorable: bool = True
    whole: bool = True

    @property
    def windows(self) -> dict[int, int]:
        return {self.window: self.held} if self.window else {}

    def split(self, at: int, length: int) -> tuple[Empty, Empty]:
        below = min(length - at, self.held)
        return Empty(self.window, self.held - below), Empty(self.window, below)


def message_ends(random: np.random.Generator, length: int, mean: int) -> Iterator[int]:
    """Yield the ends of messages of uneven length, `mean` tokens on average."""
    end = SYSTEM_TOKENS
    while end < length:
        yield end
        end += 1 + int(random.exponential(mean))


def store(
    cache: SegmentCache[Empty], prompt: TokenIds, ends: list[int], window: int, held: int = 0
) -> None:
    """Publish a prompt cut by cut, as a prefill does; `held` tokens of it are there already."""
    for end in segment_ends(ends, len(prompt), SEGMENT_TOKENS):
        if end < held:
            continue
        cache.publish(b"", prompt[:end], with_state=False, capture=partial(_empty, window))


def _empty(window: int, start: int, end: int, with_state: bool, contained: bool) -> Empty:
    return Empty(window, min(window, end if contained else end - start))


def measure(window: int, mean: int) -> None:
    """Print the time of a lookup with its plan; `mean` is that of a message's tokens."""
    random = np.random.default_rng(1)
    traits = Traits(reach=window)
    cache: SegmentCache[Empty] = SegmentCache(traits, 1 << 40, lambda *_: 0)
    system = random.integers(0, 150_000, SYSTEM_TOKENS, dtype=np.uint32)
    longest = np.append(system, random.integers(0, 150_000, LONG_TOKENS, dtype=np.uint32))
    longest = longest[:LONG_TOKENS]
    ends = list(message_ends(random, LONG_TOKENS, mean))
    store(cache, longest, ends, window)
    for _ in range(NUM_CONVERSATIONS - 1):
        # Half of them part from the long one somewhere, so that it is split all over.
        parts = SYSTEM_TOKENS
        if random.random() < 0.5:
            parts = int(random.integers(SYSTEM_TOKENS, LONG_TOKENS))
        own = random.integers(0, 150_000, int(random.exponential(3000)) + 1, dtype=np.uint32)
        prompt = np.append(longest[:parts], own)
        cuts = [end for end in ends if end <= parts]
        store(cache, prompt, [*cuts, parts], window, parts)
    cache.check()
    prompt_cuts = [Cut(end, i) for i, end in enumerate(ends)]
    taken, computed = [], []
    for _ in range(ROUNDS):
        asked = longest.copy()
        asked[-int(random.integers(1, 2000))] ^= 1
        started, computing = time.perf_counter(), time.thread_time()
        lease = cache.lookup(b"", asked, len(asked) - 1)
        plan(len(asked), prompt_cuts, lease.num_tokens, traits, SEGMENT_TOKENS)
        computed.append(time.thread_time() - computing)
        taken.append(time.perf_counter() - started)
        cache.release(lease)
    stats = cache.stats()
    print(
        f"window {window or 'none':>5}, messages of {mean:>4}: {stats['segments']} segments, "
        f"{len(ends)} messages, median {1e3 * float(np.median(taken)):.2f} ms, "
        f"p99 {1e3 * float(np.quantile(taken, 0.99)):.2f} ms; of the processor's time "
        f"median {1e3 * float(np.median(computed)):.2f} ms, "
        f"p99 {1e3 * float(np.quantile(computed, 0.99)):.2f} ms"
    )


def main() -> None:
    for window in (0, 1024):
        for mean in (400, 50):
            measure(window, mean)


if __name__ == "__main__":
    main()

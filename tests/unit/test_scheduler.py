"""The order of chunks and steps, on plain values."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvserve.engine.scheduler import (
    CHUNK_GRANULE,
    MAX_WAIT_CHUNKS,
    MIN_CHUNK,
    Chunk,
    ChunkSizer,
    Decode,
    Idle,
    Prefill,
    Step,
    next_step,
)


def after(num_decoding: int, *remaining: int, decoded_last: bool = True) -> Step:
    prefills = [Prefill(tokens) for tokens in remaining]
    return next_step(num_decoding, prefills, decoded_last=decoded_last)


def test_without_work_there_is_nothing_to_do() -> None:
    assert after(0) == after(0, decoded_last=False) == Idle()


def test_prefill_alone_goes_on_and_decode_alone_too() -> None:
    assert after(0, 10, decoded_last=False) == Chunk(0)
    assert after(3, decoded_last=True) == Decode()


def test_the_shortest_goes_first_and_the_earliest_among_equals() -> None:
    assert after(0, 500, 20, 20) == Chunk(1)


@given(
    decoding=st.integers(1, 8),
    prefills=st.lists(st.integers(1, 9000), min_size=1, max_size=6),
)
def test_never_two_chunks_between_two_steps(decoding: int, prefills: list[int]) -> None:
    decoded_last, kinds = False, []
    for _ in range(12):
        step = after(decoding, *prefills, decoded_last=decoded_last)
        kinds.append(type(step))
        decoded_last = isinstance(step, Decode)
    assert kinds == [Decode, Chunk] * 6


def test_a_long_prompt_is_not_passed_over_for_ever() -> None:
    remaining, passed, served = [9000, 64], [0, 0], []
    for _ in range(4 * (MAX_WAIT_CHUNKS + 1)):
        prefills = [Prefill(r, p) for r, p in zip(remaining, passed, strict=True)]
        step = next_step(0, prefills, decoded_last=False)
        assert isinstance(step, Chunk)
        served.append(step.index)
        passed = [0 if i == step.index else p + 1 for i, p in enumerate(passed)]
        remaining[1] = 64  # a new short prompt in place of the one that is done
    assert served == ([1] * MAX_WAIT_CHUNKS + [0]) * 4


def run(sizer: ChunkSizer, seconds_per_token: float, times: int) -> None:
    for _ in range(times):
        sizer.record(sizer.size(), sizer.size() * seconds_per_token)


@pytest.mark.parametrize("token_s", [1e-5, 2e-4, 1e-3, 4e-3])
def test_chunks_come_to_fill_the_slice_without_exceeding_it(token_s: float) -> None:
    sizer = ChunkSizer(0.25, 2048)
    run(sizer, token_s, 12)
    assert sizer.size() % CHUNK_GRANULE == 0
    assert sizer.size() * token_s <= 0.25 * 1.01
    assert sizer.size() >= min(2048, 0.25 / token_s - 2 * CHUNK_GRANULE)


def test_chunks_shrink_when_tokens_become_dear_and_never_below_the_least() -> None:
    sizer = ChunkSizer(0.25, 2048)
    run(sizer, 2e-4, 10)
    large = sizer.size()
    run(sizer, 2e-3, 10)
    assert MIN_CHUNK < sizer.size() < large
    run(sizer, 10.0, 20)
    assert sizer.size() == MIN_CHUNK


def test_one_slow_chunk_is_forgotten() -> None:
    sizer = ChunkSizer(0.25, 2048)
    sizer.record(64, 5.0)  # kernels were compiled
    run(sizer, 2e-4, 20)
    assert sizer.size() >= 1000


def test_tiny_chunks_and_zero_times_say_nothing() -> None:
    sizer = ChunkSizer(0.25, 2048)
    assert sizer.tokens_per_s is None
    sizer.record(MIN_CHUNK - 1, 3.0)
    sizer.record(512, 0.0)
    assert sizer.tokens_per_s is None
    sizer.record(512, 0.512)
    assert sizer.tokens_per_s == pytest.approx(1000)


def test_a_chunk_behind_a_long_context_is_sized_for_dearer_tokens() -> None:
    sizer = ChunkSizer(0.25, 2048)
    for context in range(0, 4000, 200):
        sizer.record(200, 200 * (0.001 + context * 1e-6), context)
    near, far = sizer.size(0), sizer.size(16_000)
    assert 200 <= near <= 256
    assert far == 16


def test_the_first_chunk_is_small_and_an_estimate_never_runs_away() -> None:
    sizer = ChunkSizer(0.25, 2048)
    assert sizer.size(50_000) == 64
    sizer.record(64, 0.064, 1000)
    sizer.record(64, 0.064, 1100)
    assert sizer.size(0) <= 4 * 256

"""The sampler against plain numpy, and what a seed promises."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvserve.core.types import SamplingParams
from kvserve.engine.sampling import Sampler

VOCAB = 12
Floats = NDArray[np.float64]

PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.2, 0.7, 1.0, 2.0]),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 0.01]),
    top_k=st.sampled_from([0, 1, 3, 12, 40]),
    min_p=st.sampled_from([0.0, 0.05, 0.4, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    presence_penalty=st.sampled_from([0.0, 1.5, -2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.7, -0.5]),
    logit_bias=st.sampled_from([{}, {3: 100.0}, {0: -100.0, 5: 2.5}]),
    seed=st.sampled_from([0, 1, -7, 2**63 - 1]),
)


def logits_of(seed: int) -> Floats:
    return np.random.default_rng(seed).normal(0, 2, VOCAB).astype(np.float32).astype(np.float64)


def penalised(
    p: SamplingParams, logits: Floats, prompt: Sequence[int], reply: Sequence[int]
) -> Floats:
    """The definitions, token by token."""
    out = logits.copy()
    for token in range(VOCAB):
        if p.repetition_penalty != 1.0 and (token in prompt or token in reply):
            out[token] *= 1 / p.repetition_penalty if out[token] > 0 else p.repetition_penalty
        count = list(reply).count(token)
        out[token] -= p.presence_penalty * (count > 0) + p.frequency_penalty * count
        out[token] += p.logit_bias.get(token, 0.0)
    return out


def allowed(p: SamplingParams, logits: Floats) -> dict[int, float]:
    """Return the tokens that may be drawn with their probabilities."""
    scaled = logits / p.temperature
    order = sorted(range(VOCAB), key=lambda token: -scaled[token])
    if p.top_k:
        order = order[: p.top_k]
    weights = {token: float(np.exp(scaled[token] - scaled[order[0]])) for token in order}
    total, before, kept = sum(weights.values()), 0.0, {}
    for token in order:
        if p.top_p < 1.0 and before / total >= p.top_p:
            break
        kept[token] = weights[token]
        before += weights[token]
    kept = {token: weight for token, weight in kept.items() if weight >= p.min_p * (1 - 1e-6)}
    return {token: weight / sum(kept.values()) for token, weight in kept.items()}


def made(
    p: SamplingParams, prompt: Sequence[int] = (1, 4, 4), reply: Sequence[int] = ()
) -> Sampler:
    return Sampler(p, VOCAB, np.array(prompt, np.uint32), reply)


def draw(sampler: Sampler, logits: Floats) -> int:
    token = sampler.sample(mx.array(logits.astype(np.float32)))
    assert token.shape == (1,) and token.dtype == mx.uint32
    value: Any = token.item()
    return int(value)


@given(p=PARAMS, seed=st.integers(0, 50), reply=st.lists(st.integers(0, VOCAB - 1), max_size=4))
@settings(max_examples=150)
def test_every_choice_is_one_that_the_definitions_allow(
    p: SamplingParams, seed: int, reply: list[int]
) -> None:
    sampler = made(p, reply=reply)
    logits = logits_of(seed)
    for _ in range(4):
        expected = penalised(p, logits, (1, 4, 4), reply)
        token = draw(sampler, logits)
        if p.temperature == 0:
            assert expected[token] >= expected.max() - 1e-4
        else:
            assert token in allowed(p, expected)
        reply = [*reply, token]


def test_the_defaults_are_plain_greedy_and_nothing_else_is() -> None:
    assert made(SamplingParams()).plain_greedy
    assert made(SamplingParams(top_k=5, top_p=0.2, min_p=0.3)).plain_greedy
    for changed in (
        {"temperature": 0.1},
        {"logit_bias": {1: 1.0}},
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": 0.1},
    ):
        assert not made(replace(SamplingParams(), **changed)).plain_greedy


@pytest.mark.parametrize("temperature", [1e-3, 1e-10, 1e-38, 1e-42, 5e-324])
def test_a_tiny_temperature_is_greedy_and_never_nan(temperature: float) -> None:
    logits = logits_of(1) * 20
    sampler = made(SamplingParams(temperature=temperature, top_p=0.9, min_p=0.1, seed=1))
    assert {draw(sampler, logits) for _ in range(20)} == {int(logits.argmax())}


def test_logits_of_any_size_are_drawn_from() -> None:
    logits = np.full(VOCAB, -1e30)
    logits[[2, 7]] = 3e4
    sampler = made(SamplingParams(temperature=0.5, top_p=0.95, top_k=4, min_p=0.2, seed=1))
    assert {draw(sampler, logits) for _ in range(40)} == {2, 7}


def test_the_same_seed_draws_the_same_and_another_does_not() -> None:
    p = SamplingParams(temperature=1.5, seed=11)
    rows = [logits_of(step) for step in range(12)]

    def reply(p: SamplingParams) -> list[int]:
        sampler = made(p)
        return [draw(sampler, row) for row in rows]

    assert reply(p) == reply(p)
    assert reply(p) != reply(replace(p, seed=12))
    assert reply(replace(p, seed=None)) != reply(replace(p, seed=None))


@given(p=PARAMS, cut=st.integers(0, 8))
@settings(max_examples=40)
def test_a_reply_taken_up_again_goes_on_as_it_would_have(p: SamplingParams, cut: int) -> None:
    rows = [logits_of(step) for step in range(8)]
    whole = made(p)
    reply = [draw(whole, row) for row in rows]
    resumed = made(p, reply=reply[:cut])
    assert [draw(resumed, row) for row in rows[cut:]] == reply[cut:]


def test_batch_mates_change_nothing() -> None:
    p = SamplingParams(temperature=1.0, presence_penalty=0.5, seed=5)
    rows = [logits_of(step) for step in range(8)]
    alone = made(p)
    expected = [draw(alone, row) for row in rows]
    mine, other = made(p), made(replace(p, seed=6))
    got = []
    for row in rows:
        logits = mx.array(np.stack([logits_of(99), row]).astype(np.float32))
        draw(other, logits_of(99))
        value: Any = mine.sample(logits[1]).item()
        got.append(int(value))
    assert got == expected


@pytest.mark.parametrize(
    "p",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.6, top_k=5),
        SamplingParams(temperature=1.0, top_p=0.8),
        SamplingParams(temperature=1.5, min_p=0.1),
    ],
)
def test_draws_follow_the_distribution(p: SamplingParams) -> None:
    logits = logits_of(3) / 2
    expected = allowed(p, logits)
    sampler = made(replace(p, seed=123))
    num_draws = 3000
    row = mx.array(logits.astype(np.float32))
    drawn: Any = mx.concatenate([sampler.sample(row) for _ in range(num_draws)]).tolist()
    counts = Counter(drawn)
    assert counts.keys() <= expected.keys()
    chi = sum(
        (counts[token] - num_draws * share) ** 2 / (num_draws * share)
        for token, share in expected.items()
    )
    # Five standard deviations of a chi-square above its mean.
    degrees = max(1, len(expected) - 1)
    assert chi < degrees + 5 * (2 * degrees) ** 0.5


def test_half_precision_logits_are_drawn_from_in_full_precision() -> None:
    logits = mx.array([0.0, 1.0, 3.0, -2.0]).astype(mx.float16)
    sampler = Sampler(SamplingParams(), 4, np.array([0], np.uint32))
    assert sampler.sample(logits).item() == 2

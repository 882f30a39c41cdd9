"""Ragged decode: each row as if it were alone, whoever comes and goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.cache import ArraysCache, ChunkedKVCache, KVCache, RotatingKVCache
from mlx_lm.models.llama import Model as Llama
from mlx_lm.models.llama import ModelArgs

from kvserve.cache.codec import WorkingCache
from kvserve.engine.batch import (
    Batcher,
    RaggedCache,
    UnsupportedCacheError,
    as_model,
    install,
    relative_difference,
)

VOCAB = 32


class Recurrence(nn.Module):
    """A layer that needs `ArraysCache`, beside attention: its state is a running sum."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.embedding = nn.Embedding(VOCAB, 8)

    def __call__(self, tokens: mx.array, cache: WorkingCache) -> mx.array:
        x = self.embedding(tokens)
        state = cache[0][0] if cache[0][0] is not None else mx.zeros((x.shape[0], 8))
        state = state * 0.5 + x.sum(axis=1)
        cache[0][0] = state
        logits: mx.array = self.embedding.as_linear(state)
        return logits[:, None]


def llama() -> Any:
    mx.random.seed(1)
    return Llama(
        ModelArgs(
            model_type="llama",
            hidden_size=16,
            num_hidden_layers=2,
            intermediate_size=16,
            num_attention_heads=2,
            num_key_value_heads=1,
            rms_norm_eps=1e-5,
            vocab_size=VOCAB,
        )
    )


def cached(kind: str) -> tuple[Any, Any]:
    """Return a forward function and a maker of its caches."""
    if kind == "recurrent":
        mx.random.seed(2)
        return as_model(Recurrence()), lambda: [ArraysCache(1)]
    install()
    makes: dict[str, Callable[[], Any]] = {
        "plain": KVCache,
        "window": lambda: RotatingKVCache(max_size=6),
    }
    make = makes[kind]
    return as_model(llama()), lambda: [make(), make()]


@pytest.mark.parametrize("kind", ["plain", "window", "recurrent"])
def test_rows_that_come_and_go_get_what_they_would_get_alone(kind: str) -> None:
    forward, fresh = cached(kind)
    batcher = Batcher(forward)
    assert batcher.probe(fresh, VOCAB, 1e-4) == ""
    rows: list[WorkingCache] = []
    alone: list[WorkingCache] = []
    for length in (3, 11, 7):
        for group in (rows, alone):
            cache = fresh()
            mx.eval(forward((mx.arange(length) % VOCAB)[None], cache=cache))
            group.append(cache)
    present = [[0, 1], [0, 1, 2], [0, 1, 2], [2, 0], [1], [0, 1, 2], [1, 2], [0, 1, 2]]
    for step, members in enumerate(present):
        tokens = mx.array([(5 * step + row) % VOCAB for row in members], dtype=mx.uint32)
        got = batcher.step(tokens, [rows[row] for row in members])
        expected = mx.concatenate(
            [
                forward(tokens[i : i + 1][None], cache=alone[row])[:, -1]
                for i, row in enumerate(members)
            ]
        )
        assert relative_difference(got, expected) < 1e-5


def test_sync_brings_the_rows_own_states_up_to_date() -> None:
    forward, fresh = cached("recurrent")
    batcher = Batcher(forward)
    rows = [fresh(), fresh()]
    for row in rows:
        forward(mx.array([[1, 2]]), cache=row)
    before = [row[0][0].tolist() for row in rows]
    batcher.step(mx.array([3, 4], dtype=mx.uint32), rows)
    assert [row[0][0].tolist() for row in rows] == before  # still stacked
    batcher.sync()
    after = [row[0][0].tolist() for row in rows]
    assert after != before and after[0] != after[1]
    batcher.sync()
    assert [row[0][0].tolist() for row in rows] == after


def test_forget_leaves_the_rows_as_they_were() -> None:
    forward, fresh = cached("recurrent")
    batcher = Batcher(forward)
    rows = [fresh(), fresh()]
    for row in rows:
        forward(mx.array([[1, 2]]), cache=row)
    before = [row[0][0].tolist() for row in rows]
    batcher.step(mx.array([3, 4], dtype=mx.uint32), rows)
    batcher.forget()
    batcher.sync()
    assert [row[0][0].tolist() for row in rows] == before


def test_a_model_that_cannot_be_stepped_side_by_side_says_why_and_is_stepped_alone() -> None:
    forward = as_model(llama())
    batcher = Batcher(forward)
    why = batcher.probe(lambda: [ChunkedKVCache(64), ChunkedKVCache(64)], VOCAB, 1e-4)
    assert "ChunkedKVCache" in why and not batcher.ragged
    rows = [[ChunkedKVCache(64), ChunkedKVCache(64)] for _ in range(2)]
    assert batcher.step(mx.array([1, 2], dtype=mx.uint32), rows).shape == (2, VOCAB)


def test_a_model_whose_rows_differ_when_stepped_together_is_found_out() -> None:
    forward, fresh = cached("plain")

    def wrong(tokens: mx.array, cache: WorkingCache) -> mx.array:
        out: mx.array = forward(tokens, cache=cache)
        return out + 0.1 * isinstance(cache[0], RaggedCache)

    batcher = Batcher(wrong)
    assert "logits differ" in batcher.probe(fresh, VOCAB, 1e-3)
    assert not batcher.ragged

    def broken(tokens: mx.array, cache: WorkingCache) -> mx.array:
        out: mx.array = forward(tokens, cache=cache)
        return out * (float("nan") if isinstance(cache[0], RaggedCache) else 1.0)

    assert "logits differ" in Batcher(broken).probe(fresh, VOCAB, 1e-3)


def test_states_that_were_never_made_cannot_be_stacked() -> None:
    forward, fresh = cached("recurrent")
    with pytest.raises(UnsupportedCacheError):
        Batcher(forward).step(mx.array([1, 2], dtype=mx.uint32), [fresh(), fresh()])


def test_install_twice_changes_nothing_more() -> None:
    import mlx_lm.models.llama as module

    install()
    first = module.scaled_dot_product_attention
    install()
    assert module.scaled_dot_product_attention is first

"""A model that sees a wrong cache, in a real engine. Not a test module.

The fake's next token is a hash of every cached token and of the position it was stored at, so one
missing, foreign, shifted or flipped entry changes the reply. `expected_reply` computes the same in
numpy, from the tokens alone: the truth does not go through any cache.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache

from kvserve.cache.codec import arrays_of, traits_of
from kvserve.cache.codec_forms import footprint, forms_of
from kvserve.core.identity import ModelIdentity
from kvserve.core.types import (
    Cut,
    Finished,
    GenerationRequest,
    Prompt,
    SamplingParams,
    Started,
    TextPiece,
)
from kvserve.engine.batch import Batcher
from kvserve.engine.engine import Engine, EngineSettings, Generation
from kvserve.engine.model import LoadedModel, ModelInfo
from kvserve.engine.run import Run
from tests.tiny_models import VOCAB_SIZE, train_tokenizer

HEAD_DIM = 16
TOKEN_NBYTES = 2 * 4 * HEAD_DIM
"""Bytes that one token's keys and values take."""

_TOKEN, _POSITION, _DIM, _QUERY, _WORD = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F, 0x165667B1
Tokens = list[int]


def _mixed(x: Any, shift: Callable[[Any, int], Any], times: Callable[[Any, int], Any]) -> Any:
    """MurmurHash3's finaliser, over whatever does 32-bit arithmetic."""
    x = times(x ^ shift(x, 16), 0x85EBCA6B)
    x = times(x ^ shift(x, 13), 0xC2B2AE35)
    return x ^ shift(x, 16)


def _u32(value: int) -> mx.array:
    return mx.array(value, dtype=mx.uint32)


def _mix(x: mx.array) -> mx.array:
    mixed: mx.array = _mixed(x, lambda a, n: a >> _u32(n), lambda a, n: a * _u32(n))
    return mixed


def _mix_numpy(x: Any) -> Any:
    return _mixed(x, lambda a, n: a >> np.uint32(n), lambda a, n: a * np.uint32(n))


class FakeNetwork:
    """`network(tokens, cache)` as a model of mlx-lm, logits of every token that is fed.

    `before` is called first, with the token ids of each row and the contents of each row's cache
    so far; what it raises is raised.
    """

    def __init__(self, vocab_size: int = VOCAB_SIZE) -> None:
        self.vocab_size = vocab_size
        self.before: Callable[[list[Tokens], list[Tokens]], None] | None = None

    def __call__(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        (leaf,) = cache
        parts = leaf.rows if hasattr(leaf, "rows") else [leaf]
        if self.before is not None:
            fed = cast(list[Tokens], tokens.tolist())
            self.before(fed, [contents(part) for part in parts])
        num_rows, num_tokens = tokens.shape
        offset = mx.reshape(mx.array(leaf.offset), (-1, 1))
        positions = mx.broadcast_to(offset + mx.arange(num_tokens)[None], tokens.shape)
        shape = (num_rows, 1, num_tokens, HEAD_DIM)
        keys, values = (
            mx.broadcast_to(x.astype(mx.float32)[:, None, :, None], shape)
            for x in (tokens, positions)
        )
        held_keys, held_values = leaf.update_and_fetch(keys, values)
        rows = []
        for i in range(num_rows):
            keys, values = (part[i].reshape(-1, HEAD_DIM) for part in (held_keys, held_values))
            rows.append(self._logits(keys, values, num_tokens))
        return mx.stack(rows)

    def _logits(self, keys: mx.array, values: mx.array, num_fed: int) -> mx.array:
        """Return `[num_fed, vocab]`, each row for all that was held with its token.

        `keys` and `values` are what one row holds, `[tokens, dim]`.
        """
        num_held = keys.shape[0]
        dims = mx.arange(HEAD_DIM).astype(mx.uint32) * _u32(_DIM)
        entries = keys.astype(mx.uint32) * _u32(_TOKEN) + values.astype(mx.uint32) * _u32(_POSITION)
        sums = mx.cumsum(mx.sum(_mix(entries + dims), axis=-1))[-num_fed:]
        counts = mx.arange(num_held - num_fed + 1, num_held + 1).astype(mx.uint32)
        states = (sums + counts * _u32(_QUERY))[:, None]
        words = _mix(states + mx.arange(self.vocab_size).astype(mx.uint32) * _u32(_WORD))
        return (words >> _u32(8)).astype(mx.float32) * (8 / 2**24)


def contents(leaf: Any) -> Tokens:
    """Return the tokens that a working cache of the fake holds."""
    if leaf.keys is None:
        return []
    return [int(token) for token in leaf.keys[0, 0, : leaf.offset, 0].tolist()]


def expected_reply(prompt: Sequence[int], num_tokens: int) -> Tokens:
    """Return what the fake must reply to `prompt`, greedily, from the tokens alone."""
    reply: Tokens = []
    dims = np.arange(HEAD_DIM, dtype=np.uint32) * np.uint32(_DIM)
    words = np.arange(VOCAB_SIZE, dtype=np.uint32) * np.uint32(_WORD)
    with np.errstate(over="ignore"):
        while len(reply) < num_tokens:
            tokens = np.array([*prompt, *reply], dtype=np.uint32)
            places = np.arange(len(tokens), dtype=np.uint32) * np.uint32(_POSITION)
            entries = (tokens * np.uint32(_TOKEN) + places)[:, None] + dims
            state = _mix_numpy(entries).sum(dtype=np.uint32)
            state = state + np.uint32(len(tokens)) * np.uint32(_QUERY)
            reply.append(int(np.argmax(_mix_numpy(state + words) >> np.uint32(8))))
    return reply


def fake_identity(weights: str) -> ModelIdentity:
    """Return the identity of a model that was made, not read from files."""
    return ModelIdentity(
        weights=weights,
        config="fake",
        quantisation="none",
        adapter="",
        tokenizer="fake",
        chat_template="fake",
        kv_dtype="float32",
        layout="1",
    )


def fake_model(network: FakeNetwork, *, context_length: int = 16_384) -> LoadedModel:
    """Return the fake as the engine loads it; call it on the engine thread.

    It has no end-of-turn token: a reply is as long as was asked for.
    """

    def forward(tokens: mx.array, cache: list[Any]) -> mx.array:
        return network(tokens, cache)

    def fresh() -> list[Any]:
        return [KVCache()]

    used = fresh()
    before, network.before = network.before, None
    mx.eval(forward(mx.array([[1, 2, 3]]), used))
    network.before = before
    return LoadedModel(
        info=ModelInfo("fake", context_length, fake_identity("fake"), 0, (), True),
        forward=forward,
        tokenizer=train_tokenizer(),
        eos_token_ids=frozenset(),
        vocab_size=network.vocab_size,
        fresh_cache=fresh,
        traits=traits_of(fresh()),
        footprint=footprint(used),
        forms=forms_of(used),
        weights_nbytes=0,
        batcher=Batcher(forward),
    )


class CheckedEngine(Engine):
    """An engine that recounts everything after each step and keeps what was wrong.

    `working` are the bytes of all working caches against what was reserved for them.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.violations: list[str] = []
        self.most_running = 0
        self.most_waiting = 0

    def _flush(self) -> None:
        try:
            self._recount()
        except AssertionError as error:
            frames = traceback.format_tb(error.__traceback__)
            self.violations.append(f"{error} {frames[-1]}")
        super()._flush()

    def _recount(self) -> None:
        if self._loop is None or self._cache is None:
            return
        self._cache.check()
        running = runs_of(self)
        self.most_running = max(self.most_running, len(running))
        self.most_waiting = max(self.most_waiting, self._loop.num_waiting)
        for run in running:
            nbytes = sum(array.nbytes for array in arrays_of(run.cache or []))
            assert nbytes <= run.reserved_nbytes, (nbytes, run.reserved_nbytes, run.length)


def runs_of(engine: Engine) -> list[Run]:
    """Return the runs that are being prefilled or decoded; on the engine thread."""
    loop = engine._loop
    return [] if loop is None else [*loop._prefilling, *loop._decoding]


@asynccontextmanager
async def running_engine(
    network: FakeNetwork | None = None,
    *,
    on_death: Callable[[], None] | None = None,
    context_length: int = 16_384,
    **settings: Any,
) -> AsyncIterator[CheckedEngine]:
    """A started engine over the fake; stopped and found without a violation at the end."""
    fake = network or FakeNetwork()
    limits = EngineSettings(**{"budget_nbytes": 1 << 28, "segment_tokens": 64, **settings})
    engine = CheckedEngine(
        lambda: fake_model(fake, context_length=context_length), limits, on_death
    )
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()
    if engine.violations:
        raise AssertionError(engine.violations[:3])


def ask(
    tokens: Sequence[int],
    max_tokens: int = 8,
    *,
    cuts: Sequence[int] = (),
    namespace: bytes = b"",
    sampling: SamplingParams | None = None,
    stop: tuple[str, ...] = (),
    use_cache: bool = True,
) -> GenerationRequest:
    """Return a request for these tokens, with message ends at `cuts`."""
    return GenerationRequest(
        request_id="test",
        prompt=Prompt(np.array(tokens, np.uint32), tuple(Cut(c, i) for i, c in enumerate(cuts))),
        max_tokens=max_tokens,
        namespace=namespace,
        sampling=sampling or SamplingParams(),
        stop=stop,
        use_cache=use_cache,
    )


@dataclass
class Reply:
    """All that came of one request."""

    tokens: Tokens = field(default_factory=list)
    text: str = ""
    num_cached: int = -1
    num_prefill: int = -1
    finished: Finished | None = None


async def collect(generation: Generation) -> Reply:
    """Return the whole reply. Raises what the generation raises."""
    reply = Reply()
    async for event in generation:
        match event:
            case Started(num_cached, num_prefill):
                reply.num_cached, reply.num_prefill = num_cached, num_prefill
            case TextPiece(text):
                reply.text += text
            case Finished():
                reply.finished = event
                reply.tokens = event.token_ids.tolist()
    return reply


async def collect_all(generations: Sequence[Generation]) -> list[Reply | BaseException]:
    """Return every reply, or the error instead of it."""
    replies = await asyncio.gather(*map(collect, generations), return_exceptions=True)
    return list(replies)


def random_tokens(count: int, seed: int) -> Tokens:
    """Return ordinary tokens, none of them special."""
    tokens: Tokens = np.random.default_rng(seed).integers(8, VOCAB_SIZE, count).tolist()
    return tokens

"""Choosing the next token of one sequence, as MLX graphs that are evaluated later.

A `Sampler` belongs to one request and to the engine thread. It is lazy: it never reads a value, so
that the next decode step can be launched before the last one's token is known. Randomness depends
on the seed and the number of the token alone, never on batch-mates.

Sources: nucleus sampling after Holtzman et al. 2020; min-p after Nguyen et al. 2024; repetition
penalty after Keskar et al. 2019 (over prompt and reply); presence and frequency penalty as OpenAI
defines them (over the reply).
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import mlx.core as mx

from kvserve.core.types import SamplingParams, TokenIds

_LEAST_TEMPERATURE = 1e-6
"""As good as greedy. Below some 1e-37 float32 quotients overflow and any token could be drawn."""


class Sampler:
    """Chooses tokens for one request.

    Args:
        params: validated sampling parameters.
        vocab_size: width of the logits.
        prompt: token ids of the prompt, for the repetition penalty.
        reply: tokens already chosen, when a reply is taken up again in its middle.
    """

    def __init__(
        self,
        params: SamplingParams,
        vocab_size: int,
        prompt: TokenIds,
        reply: Sequence[int] = (),
    ) -> None:
        self._params = params
        seed = params.seed if params.seed is not None else secrets.randbits(63)
        self._seed = seed
        self._bias: mx.array | None = None
        if params.logit_bias:
            self._bias = mx.zeros(vocab_size)
            ids = mx.array(list(params.logit_bias.keys()))
            self._bias[ids] = mx.array(list(params.logit_bias.values()), dtype=mx.float32)
        self._seen: mx.array | None = None
        if params.repetition_penalty != 1.0:
            self._seen = mx.zeros(vocab_size, dtype=mx.bool_)
            self._seen[mx.array(prompt)] = True
        self._counts: mx.array | None = None
        if params.presence_penalty or params.frequency_penalty:
            self._counts = mx.zeros(vocab_size)
        self._step = len(reply)
        for token in reply:
            self._note(mx.array([token], dtype=mx.uint32))

    @property
    def plain_greedy(self) -> bool:
        """Whether the choice is the argmax of the raw logits."""
        p = self._params
        return p.temperature == 0 and all(x is None for x in (self._bias, self._seen, self._counts))

    def sample(self, logits: mx.array) -> mx.array:
        """Return the chosen token, shape `[1]` uint32, for logits of shape `[vocab]`; lazily."""
        p = self._params
        logits = self._penalise(logits.astype(mx.float32))
        if p.temperature == 0:
            token = mx.argmax(logits, keepdims=True)
        else:
            logits = (logits - mx.max(logits)) / max(p.temperature, _LEAST_TEMPERATURE)
            logits = _restrict(logits, p.top_k, p.top_p, p.min_p)
            token = mx.random.categorical(logits[None], key=self._key())
        self._step += 1
        token = token.astype(mx.uint32)
        self._note(token)
        return token

    def _key(self) -> mx.array:
        """Return this step's key; the odd constant (2**64 over the golden ratio) spreads steps."""
        return mx.random.key((self._seed + self._step * 0x9E3779B97F4A7C15) % 2**64)

    def _penalise(self, logits: mx.array) -> mx.array:
        p = self._params
        if self._seen is not None:
            scaled = mx.where(
                logits > 0, logits / p.repetition_penalty, logits * p.repetition_penalty
            )
            logits = mx.where(self._seen, scaled, logits)
        if self._counts is not None:
            logits = logits - p.presence_penalty * (self._counts > 0)
            logits = logits - p.frequency_penalty * self._counts
        if self._bias is not None:
            logits = logits + self._bias
        return logits

    def _note(self, token: mx.array) -> None:
        if self._seen is not None:
            self._seen[token] = True
        if self._counts is not None:
            self._counts = self._counts.at[token].add(1.0)


def _restrict(logits: mx.array, top_k: int, top_p: float, min_p: float) -> mx.array:
    """Set to -inf what top-k, then top-p, then min-p leave out; the likeliest always stays."""
    if top_k and top_k < logits.shape[-1]:
        threshold = mx.min(mx.topk(logits, top_k))
        logits = mx.where(logits < threshold, -mx.inf, logits)
    if top_p < 1.0:
        order = mx.argsort(-logits)
        probs = mx.softmax(logits[order])
        before = mx.cumsum(probs) - probs
        dropped = mx.where(before >= top_p, -mx.inf, logits[order])
        logits = mx.zeros_like(logits).at[order].add(dropped)
    if min_p > 0.0:
        floor = mx.max(logits) + mx.log(mx.array(min_p))
        logits = mx.where(logits < floor, -mx.inf, logits)
    return logits

"""The network: mlx_lm's `qwen3`, written as plain functions on a dictionary of parameters.

The parameters carry the names that `mlx_lm` gives them, so exporting is a plain save. What differs
is speed on CPUs: MLX computes `exp` there one number at a time (13 ns each), so the softmax, the
sigmoid and the loss use a polynomial that fuses into one vectorised pass (about 1 ns); attention is
computed in blocks that leave out what lies above the diagonal; and the last layer computes queries
only where a token is to be predicted.
"""

from __future__ import annotations

import math
import shutil
import sys
from dataclasses import asdict, dataclass
from typing import cast

import mlx.core as mx
import numpy as np

Parameters = dict[str, mx.array]

QUERY_BLOCK = 256

if sys.platform == "linux" and shutil.which("g++") is None:
    mx.disable_compile()  # it would fail; slower, the result is the same


@dataclass(frozen=True)
class NetworkConfig:
    """The sizes of the network, named as in `config.json`."""

    vocab_size: int = 1536
    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    rms_norm_eps: float = 1e-6
    rope_theta: float = 100000.0
    max_position_embeddings: int = 2304
    tie_word_embeddings: bool = True

    def as_json(self) -> dict[str, object]:
        """Return the fields for `config.json`."""
        return asdict(self)


def new_parameters(config: NetworkConfig, seed: int) -> Parameters:
    """Return random parameters: scaled normal matrices, norms of one, silent output matrices."""
    mx.random.seed(seed)
    hidden, inner = config.hidden_size, config.intermediate_size
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    dim = config.head_dim

    def matrix(rows: int, columns: int) -> mx.array:
        values: mx.array = mx.random.normal((rows, columns)) * float(columns) ** -0.5
        return values

    parameters = {
        "model.embed_tokens.weight": mx.random.normal((config.vocab_size, hidden)) * 0.05,
        "model.norm.weight": mx.ones(hidden),
    }
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}."
        parameters |= {
            f"{name}self_attn.q_proj.weight": matrix(heads * dim, hidden),
            f"{name}self_attn.k_proj.weight": matrix(kv_heads * dim, hidden),
            f"{name}self_attn.v_proj.weight": matrix(kv_heads * dim, hidden),
            f"{name}self_attn.o_proj.weight": matrix(hidden, heads * dim) * 0.2,
            f"{name}self_attn.q_norm.weight": mx.ones(dim),
            f"{name}self_attn.k_norm.weight": mx.ones(dim),
            f"{name}mlp.gate_proj.weight": matrix(inner, hidden),
            f"{name}mlp.up_proj.weight": matrix(inner, hidden),
            f"{name}mlp.down_proj.weight": matrix(hidden, inner) * 0.2,
            f"{name}input_layernorm.weight": mx.ones(hidden),
            f"{name}post_attention_layernorm.weight": mx.ones(hidden),
        }
    return parameters


def _fitted_correction() -> list[float]:
    """Return the cubic in m = 1 + f that fits 2**f / (1 + f) for f in [0, 1]."""
    f = 0.5 + 0.5 * np.cos((np.arange(64) + 0.5) * np.pi / 64)
    return [float(c) for c in np.polyfit(1 + f, 2**f / (1 + f), 3)[::-1]]


_C0, _C1, _C2, _C3 = _fitted_correction()
_MANTISSA = 1 << 23
_PER_NAT = _MANTISSA / math.log(2)


@mx.compile
def _exponential(x: mx.array) -> mx.array:
    """Return e**x within 0.08%, for x below 88; 0 for x below -87.

    x in units of the mantissa, with the exponent's bias added, is read as the bits of a float32:
    that interpolates linearly between powers of two (Schraudolph, "A fast, compact approximation
    of the exponential function", 1999). A cubic in the mantissa mends the rest. The maximum is of
    integers because MLX's maximum of floats is five times slower than all the rest together.
    """
    bits = mx.maximum((x * _PER_NAT + 127.0 * _MANTISSA).astype(mx.int32), 0)
    m = ((bits & 0x7FFFFF) | 0x3F800000).view(mx.float32)
    return bits.view(mx.float32) * (_C0 + m * (_C1 + m * (_C2 + m * _C3)))


def fast_exp(x: mx.array) -> mx.array:
    """Return e**x, with a gradient that costs one multiplication."""
    return cast(mx.array, _fast_exp(x))


@mx.custom_function
def _fast_exp(x: mx.array) -> mx.array:
    return _exponential(x)


@_fast_exp.vjp
def _fast_exp_vjp(primals: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    return cotangent * output


@mx.custom_function
def _swiglu(gate: mx.array, up: mx.array) -> mx.array:
    return _swiglu_forward(gate, up)


@mx.compile
def _swiglu_forward(gate: mx.array, up: mx.array) -> mx.array:
    return gate * up / (1.0 + _exponential(-gate))


@mx.compile
def _swiglu_backward(gate: mx.array, up: mx.array, ct: mx.array) -> tuple[mx.array, mx.array]:
    sigmoid = 1.0 / (1.0 + _exponential(-gate))
    silu = gate * sigmoid
    return ct * up * (sigmoid + silu * (1.0 - sigmoid)), ct * silu


@_swiglu.vjp
def _swiglu_vjp(
    primals: tuple[mx.array, mx.array], cotangent: mx.array, output: mx.array
) -> tuple[mx.array, mx.array]:
    return _swiglu_backward(*primals, cotangent)


def _rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    return x * mx.rsqrt(mx.mean(mx.square(x), axis=-1, keepdims=True) + eps) * weight


class Rope:
    """The rotations for positions [0, length), computed once."""

    def __init__(self, config: NetworkConfig, length: int) -> None:
        half = config.head_dim // 2
        rates = config.rope_theta ** (-mx.arange(half) / half)
        angles = mx.arange(length)[:, None] * rates[None, :]
        self.cos, self.sin = mx.cos(angles), mx.sin(angles)  # [length, head_dim / 2]
        mx.eval(self.cos, self.sin)

    def rotate(self, x: mx.array, positions: mx.array | None = None) -> mx.array:
        """Rotate x [batch, heads, tokens, head_dim]; positions [batch, tokens] or from 0."""
        if positions is None:
            cos, sin = self.cos[: x.shape[2]], self.sin[: x.shape[2]]
        else:
            cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]
        left, right = mx.split(x, 2, axis=-1)
        return mx.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


def _weighted_values(scores: mx.array, values: mx.array, mask: mx.array | None) -> mx.array:
    """Return the unnormalised sum of `values` [.., keys, dim + 1], whose last column is one.

    Queries and keys are normalised, so scores stay far below 2**126 and need no maximum taken off.
    """
    weights = fast_exp(scores)
    if mask is not None:
        weights = weights * mask
    return weights @ values


def _attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """Causal attention: q [batch, kv_heads, group, tokens, dim], k and v [batch, kv_heads, ..].

    `q` carries the scale. `v` has a last column of ones, which becomes the softmax's denominator.
    """
    batch, kv_heads, group, tokens, dim = q.shape
    keys = k.swapaxes(-1, -2)
    pieces = []
    for start in range(0, tokens, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, tokens)
        rows = q[:, :, :, start:stop].reshape(batch, kv_heads, group * (stop - start), dim)
        lower = mx.tril(mx.ones((stop - start, stop - start)))
        mask = mx.concatenate([lower] * group, axis=0)
        total = _weighted_values(rows @ keys[..., start:stop], v[:, :, start:stop], mask)
        if start:
            total = total + _weighted_values(rows @ keys[..., :start], v[:, :, :start], None)
        pieces.append(total.reshape(batch, kv_heads, group, stop - start, dim + 1))
    total = mx.concatenate(pieces, axis=3) if len(pieces) > 1 else pieces[0]
    return total[..., :dim] / total[..., dim:]


def _attention_at(q: mx.array, k: mx.array, v: mx.array, picked: mx.array) -> mx.array:
    """Attention like `_attention`'s, for queries that stand at `picked` [batch, queries] only."""
    batch, kv_heads, group, num, dim = q.shape
    seen = mx.arange(k.shape[2])[None, None, :] <= picked[:, :, None]
    mask = mx.concatenate([seen.astype(mx.float32)[:, None]] * group, axis=2)
    rows = q.reshape(batch, kv_heads, group * num, dim)
    total = _weighted_values(rows @ k.swapaxes(-1, -2), v, mask)
    total = total.reshape(batch, kv_heads, group, num, dim + 1)
    return total[..., :dim] / total[..., dim:]


def _attention_output(
    parameters: Parameters,
    config: NetworkConfig,
    rope: Rope,
    name: str,
    x: mx.array,
    picked: mx.array | None,
) -> mx.array:
    """Return what the attention of layer `name` reads, at all positions or at `picked` ones."""
    batch, length, _ = x.shape
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    group, eps = heads // kv_heads, config.rms_norm_eps
    asking = x if picked is None else _at(x, picked)
    num = asking.shape[1]
    q = (asking @ parameters[f"{name}q_proj.weight"].T).reshape(batch, num, heads, dim)
    k = (x @ parameters[f"{name}k_proj.weight"].T).reshape(batch, length, kv_heads, dim)
    v = (x @ parameters[f"{name}v_proj.weight"].T).reshape(batch, length, kv_heads, dim)
    q = _rms_norm(q, parameters[f"{name}q_norm.weight"] * dim**-0.5, eps)
    k = _rms_norm(k, parameters[f"{name}k_norm.weight"], eps)
    q = rope.rotate(q.swapaxes(1, 2), picked).reshape(batch, kv_heads, group, num, dim)
    k = rope.rotate(k.swapaxes(1, 2))
    v = mx.concatenate([v.swapaxes(1, 2), mx.ones((batch, kv_heads, length, 1))], axis=-1)
    out = _attention(q, k, v) if picked is None else _attention_at(q, k, v, picked)
    out = out.reshape(batch, heads, num, dim).swapaxes(1, 2).reshape(batch, num, heads * dim)
    return out @ parameters[f"{name}o_proj.weight"].T


def _at(x: mx.array, picked: mx.array) -> mx.array:
    """Return x [batch, tokens, ..] at the positions `picked` [batch, wanted]."""
    return x[mx.arange(x.shape[0])[:, None], picked]


def loss(
    parameters: Parameters,
    config: NetworkConfig,
    rope: Rope,
    tokens: mx.array,
    picked: mx.array,
    targets: mx.array,
    weights: mx.array,
) -> mx.array:
    """Return the summed cross-entropy of the wanted tokens, in nats.

    tokens [batch, length]; picked, targets, weights [batch, wanted]: at position `picked` the next
    token should be `targets`; weight 0 marks padding.
    """
    eps = config.rms_norm_eps
    embedding = parameters["model.embed_tokens.weight"]
    h = embedding[tokens]
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}."
        where = picked if layer == config.num_hidden_layers - 1 else None
        x = _rms_norm(h, parameters[f"{name}input_layernorm.weight"], eps)
        out = _attention_output(parameters, config, rope, f"{name}self_attn.", x, where)
        h = (h if where is None else _at(h, where)) + out
        x = _rms_norm(h, parameters[f"{name}post_attention_layernorm.weight"], eps)
        gate = x @ parameters[f"{name}mlp.gate_proj.weight"].T
        up = x @ parameters[f"{name}mlp.up_proj.weight"].T
        inner = cast(mx.array, _swiglu(gate, up))
        h = h + inner @ parameters[f"{name}mlp.down_proj.weight"].T
    h = _rms_norm(h, parameters["model.norm.weight"], eps)
    logits = h @ embedding.T
    largest = mx.stop_gradient(mx.max(logits, axis=-1, keepdims=True))
    total = mx.sum(fast_exp(logits - largest), axis=-1)
    chosen = mx.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nats = mx.log(total) + largest[..., 0] - chosen
    return mx.sum(nats * weights)

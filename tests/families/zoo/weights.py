"""Building a family: deterministic random weights under which every kind of state matters.

A fresh module is full of zeros and ones (norms, gates, biases, convolutions, decay parameters).
With those, whole branches give zero or forget at once, and a test that loses their state would
pass. So every parameter is drawn anew here, at scales that neither blow up nor forget too soon.
"""

import copy
import importlib
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten, tree_unflatten

from tests.families.zoo.family import Family


def parameters(model: Any) -> dict[str, mx.array]:
    """Return the model's parameters by their dotted names."""
    return dict(tree_flatten(model.parameters()))


def _constant(value: mx.array) -> bool:
    return bool((value.max() == value.min()).item())


def _drawn(name: str, value: mx.array) -> mx.array:
    """Return the parameter that replaces `value`, by what its name says it does.

    Decay rates are `exp(-exp(A_log) * dt)` in SSMs and `exp(-8 * softplus(recurrent_param) * gate)`
    in the RG-LRU: as initialised, most forget within two tokens.
    """
    last = name.rsplit(".", 1)[-1]
    if value.ndim == 0:
        return value.astype(mx.float32)
    if last in ("A_log", "a_log"):
        return mx.random.uniform(-4.0, -1.0, value.shape)
    if last == "recurrent_param":
        return mx.random.uniform(-7.0, -5.0, value.shape)
    if "w_lora" in name and last == "bias":
        return mx.random.uniform(-6.0, -4.0, value.shape)
    noise = mx.random.normal(value.shape)
    if not _constant(value):
        return value.astype(mx.float32) + (0.1 * noise if value.ndim == 1 else 0.0)
    if value.ndim == 1 or value.size == max(value.shape):
        return value.astype(mx.float32) + 0.2 * noise
    return value.astype(mx.float32) + 0.3 * noise


def build(family: Family, seed: int = 0) -> Module:
    """Return the family's model in float32, evaluated and in eval mode, equal for equal seeds.

    Leaves `mx.random` seeded; every parameter depends on `seed` and its place in the model only.
    """
    module = importlib.import_module(f"mlx_lm.models.{family.model_type}")
    mx.random.seed(seed)
    model: Module = module.Model(module.ModelArgs.from_dict(copy.deepcopy(family.config)))
    drawn = [(name, _drawn(name, value)) for name, value in parameters(model).items()]
    model.update(tree_unflatten(drawn))
    model.eval()
    mx.eval(parameters(model))
    return model

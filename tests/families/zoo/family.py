"""What a member of the zoo is, and the few numbers that most configurations share.

A configuration is what a checkpoint's `config.json` would hold, only tiny. It names every field
that decides which layers exist and what they keep; `tiny` fills in the sizes that all of them have.
"""

from dataclasses import dataclass
from typing import Any

VOCABULARY = 128
WINDOW = 12
"""Tokens that a sliding-window layer keeps. Tests with 40 tokens or more go round it."""
CHUNK = 8
"""Tokens of one attention chunk (llama4)."""

Config = dict[str, Any]

_TINY: Config = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
}

MLA: Config = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
"""Multi-head latent attention: what is cached is one latent of 16 and one rotated key of 8."""

FULL = "full_attention"
SLIDING = "sliding_attention"
LINEAR = "linear_attention"
CONV = "conv"


@dataclass(frozen=True)
class Family:
    """One tiny model: `model_type` is the mlx-lm module, `config` is read with its `ModelArgs`."""

    name: str
    model_type: str
    config: Config


def tiny(**fields: Any) -> Config:
    """Return the shared sizes, overridden and completed by `fields`."""
    return {**_TINY, **fields}


def family(model_type: str, *, variant: str = "", **fields: Any) -> Family:
    """Return the family of `model_type` with `tiny(**fields)`; `variant` tells two apart."""
    name = f"{model_type}-{variant}" if variant else model_type
    return Family(name, model_type, {"model_type": model_type, **tiny(**fields)})


def wrapped(model_type: str, text_type: str, *, variant: str = "", **fields: Any) -> Family:
    """Return a vision-language type without its tower: its text model sits in `text_config`."""
    name = f"{model_type}-{variant}" if variant else model_type
    text = {"model_type": text_type, **tiny(**fields)}
    config = {"model_type": model_type, "vocab_size": VOCABULARY, "text_config": text}
    return Family(name, model_type, config)

"""Tiny random models of every mlx-lm model type that runs without a GPU, for the families tests.

The modules sort the families by what their layers keep: `attention` (all keys and values),
`experts` (the same, with mixtures of experts and latent attention), `windows` (sliding or
chunked) and `recurrent` (a state of fixed size). `weights` builds them, `limits` says what is
missing and why.

What `make_prompt_cache` gives, and for whom (the test holds it; "and" means: in one model):

    KVCache                                   most of `attention` and `experts`
    KVCache and RotatingKVCache               most of `windows`
    RotatingKVCache                           recurrent_gemma-windows
    ChunkedKVCache and KVCache                llama4
    LayerCache (its own class)                deepseek_v41
    ArraysCache                               mamba, mamba-falcon, mamba2, rwkv7
    ArraysCache and KVCache                   most of `recurrent`
    ArraysCache and RotatingKVCache           recurrent_gemma
    ArraysCache, KVCache and RotatingKVCache  gear
    CacheList(KVCache, KVCache)               deepseek_v32, glm_moe_dsa, longcat_flash
      and CacheList(KVCache)                  minimax_m3_vl
      and ArraysCache                         longcat_flash_ngram
    CacheList(ArraysCache, KVCache)           falcon_h1
      and CacheList(ArraysCache, RotatingKVCache)  baichuan_m1

Caches and layers need not pair up: afm7, gemma3n and gemma4 have fewer caches (layers share keys),
nemotron_h too (some layers keep nothing), nanbeige and iquestloopcoder have two for each layer,
longcat_flash_ngram has one more, and one cache of nemotron-nas stays empty for ever.
"""

from tests.families.zoo import attention, experts, recurrent, windows
from tests.families.zoo.family import CHUNK, VOCABULARY, WINDOW, Family
from tests.families.zoo.limits import (
    BATCHING_DIFFERS,
    CHUNKING_DIFFERS,
    LEFT_OUT,
    NEVER_READ,
    OUT_OF_REACH,
)
from tests.families.zoo.weights import build

__all__ = [
    "BATCHING_DIFFERS",
    "CHUNK",
    "CHUNKING_DIFFERS",
    "LEFT_OUT",
    "NEVER_READ",
    "OUT_OF_REACH",
    "VOCABULARY",
    "WINDOW",
    "Family",
    "build",
    "families",
]


def families() -> list[Family]:
    """Return every family; the names are unique and fit for test ids."""
    return [*attention.FAMILIES, *experts.FAMILIES, *windows.FAMILIES, *recurrent.FAMILIES]

"""What the zoo does not hold, and where mlx-lm itself gives different answers by another path.

Each reason was found by running mlx-lm 0.32.2, not by reading only. The keys of the dictionaries
other than `LEFT_OUT` are names of families.
"""

LEFT_OUT: dict[str, str] = {
    "bitnet": "ternary weights need a Metal kernel, without a fallback",
    "muse_spark": "norm and rotation of queries and keys are one Metal kernel, without a fallback",
    "olmo": "imports hf_olmo, and ends the process (SystemExit) where that is not installed",
    "phi3small": (
        "masks the logits of token ids up to 100351 whatever the vocabulary: with a small one that "
        "writes outside the array and crashes. Nor is it causal: it adds a boolean mask to scores"
    ),
    "prism_hadamard_qwen35": "a 2-bit packing of qwen3_5's weights, with the caches of qwen3_5",
}
"""Type of mlx-lm -> why no family has it."""

_DYNAMIC = (
    "the base of the rotation follows the length at the time a token is fed, so cached keys "
    "remember the chunk that they came in"
)

CHUNKING_DIFFERS: dict[str, str] = {
    "internlm3-dynamic": _DYNAMIC,
    "plamo3": (
        "masks with a window of one token more than its rotating cache keeps, so a token sees one "
        "more of them when both came in one chunk"
    ),
}
"""Family -> why feeding a prompt in pieces gives other logits than feeding it whole.

For these, two runs agree only where they cut the prompt at the same places.
"""

BATCHING_DIFFERS: dict[str, str] = {
    "afm7": "layers that reuse keys rotate queries by the padded length, not by the row's offset",
    "deepseek_v41": "LayerCache has no merge",
    "gemma2": "the mask's batch axis meets the axis of key-value heads in its own attention",
    "gpt_bigcode": "positions are made with numpy from an offset that must be one number",
    "internlm3-dynamic": "the rotation takes the maximum over offsets, which must be one number",
    "llama4": "ChunkedKVCache has no merge",
    "minimax_m3_vl": "blocks of keys are cut by place in the buffer, so left padding moves them",
}
"""Family -> why two prompts of different lengths cannot be decoded together with `merge`."""

OUT_OF_REACH: dict[str, str] = {
    "recurrent_gemma-windows": "two layers with a window of 12 reach back 22 tokens",
}
"""Family -> why an early token does not change the logits 40 tokens on."""

NEVER_READ: dict[str, str] = {
    "deepseek_v32": "the indexer keeps a copy of its keys as values, and reads the keys only",
    "glm_moe_dsa": "as deepseek_v32",
}
"""Family -> why its `CacheList`s' second `values` may be anything."""

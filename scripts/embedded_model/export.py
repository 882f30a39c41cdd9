"""Writes the model folder in the layout that `mlx_lm.load` reads."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
from tokenizers import Tokenizer

from .network import NetworkConfig, Parameters
from .vocabulary import CHAT_TEMPLATE, END_OF_TEXT, IM_END, IM_START, token_id


def export_tokenizer(folder: Path, tokenizer: Tokenizer, config: NetworkConfig) -> None:
    """Write the tokenizer, its settings and the chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": config.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
            "add_bos_token": False,
            "eos_token": IM_END,
            "pad_token": END_OF_TEXT,
            "additional_special_tokens": [IM_START, IM_END],
        },
    )
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def export_weights(
    folder: Path, parameters: Parameters, tokenizer: Tokenizer, config: NetworkConfig
) -> None:
    """Write the configuration and the weights in float16."""
    eos = token_id(tokenizer, IM_END)
    _write_json(
        folder / "config.json",
        {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            **config.as_json(),
            "hidden_act": "silu",
            "attention_bias": False,
            "torch_dtype": "float16",
            "eos_token_id": eos,
            "pad_token_id": token_id(tokenizer, END_OF_TEXT),
        },
    )
    _write_json(folder / "generation_config.json", {"eos_token_id": eos})
    half = {name: value.astype(mx.float16) for name, value in parameters.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), half, metadata={"format": "mlx"})


def _write_json(path: Path, fields: dict[str, object]) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")

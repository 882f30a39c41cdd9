"""Random-weight models with a small tokenizer, as folders that the server can load.

Made anew where a test needs one: nothing of it is kept in the project. Not a test module.
"""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 512
CHATML = (
    "{%- for m in messages -%}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>assistant\n{%- endif -%}"
)
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_WORDS = (
    "the a of and to in is that it was for on are with as they be at one have this from river "
    "mountain garden letter window winter stone copper little seven green answer question water "
    "paper morning captain story island market silver"
).split()


def words(count: int, seed: int) -> str:
    """Return a text of `count` ordinary words, the same for the same seed."""
    chooser = random.Random(seed)
    return " ".join(chooser.choice(_WORDS) for _ in range(count))


@cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in _SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Made-up words beside the ordinary ones, so that there is enough to merge.
    chooser = random.Random(0)
    made_up = ["".join(chooser.choices("abcdefghijklmnop", k=6)) for _ in range(400)]
    tokenizer.train_from_iterator([words(2000, 0), " ".join(made_up)], trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    text: str = tokenizer.to_str()
    return text


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE of 512 tokens with ChatML's special tokens and template."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained()),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def qwen3_config(**overrides: Any) -> dict[str, Any]:
    """Return the config of a qwen3 of about a million parameters and a context of 16k."""
    return {
        "model_type": "qwen3",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e5,
        "max_position_embeddings": 16_384,
        "tie_word_embeddings": True,
        **overrides,
    }


def write_model(
    folder: Path, config: dict[str, Any], *, tokenizer_from: Path | None = None
) -> Path:
    """Write a model with random weights (always the same) and its tokenizer; return the folder.

    `tokenizer_from` is a folder whose tokenizer is used in place of the small one.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models import qwen3

    folder.mkdir(parents=True)
    mx.random.seed(7)
    network = qwen3.Model(qwen3.ModelArgs.from_dict(config))
    # Large enough that what was said thousands of tokens ago still moves the next token.
    parameters: Any = tree_flatten(network.parameters())
    weights = {
        name: mx.random.normal(array.shape) * (0.4 if array.ndim > 1 else 0.1) + (array.ndim == 1)
        for name, array in parameters
    }
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    if tokenizer_from is None:
        tokenizer = train_tokenizer()
        tokenizer.save_pretrained(str(folder))
        config = {**config, "eos_token_id": tokenizer.eos_token_id}
    else:
        for path in tokenizer_from.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder

"""Make a model folder with random weights, for measurements where the answer does not matter.

Run as `python -m scripts.random_model FOLDER [--hidden 512 --layers 8 ...]`. The result is a qwen3
of float32 weights with the embedded model's tokenizer and chat template, in the layout that
`mlx_lm.load` reads. Speed and reuse depend on shapes and tokens only, not on what weights say; in
float16 a server that does not upcast would be compared at a fortieth of the CPU's speed.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from kvserve import embedded
from kvserve.core import blas

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def make(
    folder: Path, *, hidden: int = 512, layers: int = 8, context: int = 16384, seed: int = 0
) -> Path:
    """Write the model to `folder` and return it. Heads are 64 wide, two query heads to a KV head.

    Weights are scaled so that attention matters; the vocabulary is the embedded tokenizer's.
    """
    blas.preload()
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models import qwen3

    source = embedded.path()
    base: dict[str, Any] = json.loads((source / "config.json").read_text(encoding="utf-8"))
    heads = max(2, hidden // 64)
    config = {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": hidden * 3,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "head_dim": 64,
        "rms_norm_eps": 1e-6,
        "vocab_size": base["vocab_size"],
        "max_position_embeddings": context,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "eos_token_id": base.get("eos_token_id"),
    }
    mx.random.seed(seed)
    network = qwen3.Model(qwen3.ModelArgs.from_dict(config))
    weights: Any = tree_flatten(network.parameters())
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(weights))
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    for name in TOKENIZER_FILES:
        shutil.copyfile(source / name, folder / name)
    return folder


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--context", type=int, default=16384)
    parser.add_argument("--seed", type=int, default=0)
    given = vars(parser.parse_args())
    print(make(given.pop("folder"), **given))


if __name__ == "__main__":
    main()

"""Train, export and evaluate the embedded model: one command, from nothing but this script.

python scripts/train_embedded_model.py                  # train, export, evaluate
python scripts/train_embedded_model.py --evaluate       # the accuracy table of the weights
python scripts/train_embedded_model.py --minutes 10     # train a while; go on by the same command
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.embedded_model.evaluation import accuracy_table  # noqa: E402
from scripts.embedded_model.export import export_tokenizer, export_weights  # noqa: E402
from scripts.embedded_model.network import NetworkConfig  # noqa: E402
from scripts.embedded_model.training import Run, load_parameters, train  # noqa: E402
from scripts.embedded_model.vocabulary import load_tokenizer, train_tokenizer  # noqa: E402


def main() -> None:
    """Parse the command line and do what it says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, default=ROOT / "kvserve" / "embedded" / "model")
    parser.add_argument(
        "--checkpoints", type=Path, default=Path(tempfile.gettempdir()) / "embedded-model"
    )
    parser.add_argument("--steps", type=int, default=6500)
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--evaluate", action="store_true", help="only measure the model's weights")
    parser.add_argument("--export", action="store_true", help="only export the latest checkpoint")
    parser.add_argument("--examples", type=int, default=40, help="per cell of the table")
    parser.add_argument("--show", action="store_true", help="print the replies that are wrong")
    options = parser.parse_args()
    if options.evaluate:
        print(accuracy_table(options.model, options.examples, options.show))
        return
    config = NetworkConfig()
    folder: Path = options.checkpoints
    if not (folder / "tokenizer.json").exists():
        export_tokenizer(folder, train_tokenizer(options.seed), config)
    is_finished = options.export or train(Run(folder, options.steps, options.seed, options.minutes))
    tokenizer = load_tokenizer(folder)
    export_tokenizer(options.model, tokenizer, config)
    export_weights(options.model, load_parameters(folder), tokenizer, config)
    if is_finished and not options.export:
        print(accuracy_table(options.model, options.examples, options.show))


if __name__ == "__main__":
    main()

"""Measure the store: starting with many conversations, bringing one back, and what turns cost.

Run as `python -m scripts.measure_store [PART...] [--json FILE]`. The parts:

readiness   starting a server with 10,000 stored conversations beside an empty store
restore     a conversation of 300 MB from disk beside reading the same bytes plainly
turns       bytes written per turn over new KV bytes, SQLite's log, time until durable
document    what 20 conversations over one document take

Models are the embedded one and one of random weights. Times are comparable within one run only.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from kvserve.core import blas
from scripts import random_model

Row = tuple[str, str]
PARTS = ("readiness", "restore", "turns", "document")


def measure(options: argparse.Namespace, scratch: Path) -> dict[str, list[Row]]:
    """Run the parts that were asked for, each in a folder of its own."""
    from scripts.store_figures.readiness import many_conversations
    from scripts.store_figures.restoring import long_conversation
    from scripts.store_figures.writing import chats, one_document

    small = random_model.make(scratch / "small")
    embedded = None

    def restore(folder: Path) -> list[Row]:
        large = random_model.make(scratch / "large", hidden=1024, layers=options.layers)
        work = long_conversation(folder, large, num_tokens=options.tokens, rounds=options.rounds)
        return asyncio.run(work)

    runs: list[tuple[str, str, Callable[[Path], list[Row]]]] = [
        (
            "readiness",
            "embedded model",
            lambda folder: many_conversations(
                folder, embedded, count=options.conversations, rounds=options.rounds
            ),
        ),
        ("restore", f"random model, {options.layers} layers of 1024", restore),
    ]
    for name, model, turns, words in (
        ("embedded model", embedded, 10, 500),
        ("random model, 8 layers of 512", small, 15, 2000),
    ):
        runs += [
            (
                "turns",
                name,
                lambda folder, model=model, turns=turns: asyncio.run(  # type: ignore[misc]
                    chats(folder, model, turns=turns, reply=24)
                ),
            ),
            (
                "document",
                name,
                lambda folder, model=model, words=words: asyncio.run(  # type: ignore[misc]
                    one_document(folder, model, words=words, num_chats=20, reply=24)
                ),
            ),
        ]
    results = {}
    for number, (part, name, run) in enumerate(runs):
        if part in options.parts:
            title = f"{part}: {name}"
            print(f"\n{title}", flush=True)
            results[title] = run(scratch / f"data-{number}")
            for what, figure in results[title]:
                print(f"  {what:<42} {figure}", flush=True)
    return results


def main() -> None:
    """Run the command line."""
    about = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=about)
    parser.add_argument("parts", nargs="*", metavar="PART", help="by default all")
    parser.add_argument("--conversations", type=int, default=10_000)
    parser.add_argument("--tokens", type=int, default=5000, help="length of the one restored")
    parser.add_argument("--layers", type=int, default=16, help="of the model that restores")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write all figures here too")
    options = parser.parse_args()
    unknown = set(options.parts) - set(PARTS)
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    options.parts = options.parts or PARTS
    blas.preload()
    with tempfile.TemporaryDirectory() as scratch:
        results = measure(options, Path(scratch))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Requests as a replay sees them: prompts in blocks of tokens, each with the turn it is.

A trace (Mooncake's format: one JSON a line with `timestamp` in ms, `input_length` in tokens and
`hash_ids`, one for each block of 512 tokens and all before it) names no conversations. A server
knows them from the messages, so they are inferred here: a request goes on with an earlier one if it
begins with all of that one's whole blocks, the last of which were new then.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

BLOCK_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt; equal block ids are equal prefixes. `num_turns` is 1 for a first question.

    A request that is not `counted` fills the cache without entering the hit ratio.
    """

    at_s: float
    blocks: tuple[int, ...]
    num_turns: int = 1
    counted: bool = True


def read_trace(path: Path) -> list[Request]:
    """Return the requests of a trace, gzipped or not. Raises OSError or ValueError, in words."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no trace at {path}; name another file with --trace.")
    lines: list[tuple[float, int, tuple[int, ...]]] = []
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
                blocks = tuple(int(block) for block in row["hash_ids"])
                lines.append((row["timestamp"] / 1000, int(row["input_length"]), blocks))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number} is no request: {error!r}") from error
    return list(_with_turns(lines))


def _with_turns(lines: Sequence[tuple[float, int, tuple[int, ...]]]) -> Iterator[Request]:
    seen: set[int] = set()
    ended: dict[int, int] = {}
    """By its last whole block, the turn of the request that ended there and nobody continued."""
    for at_s, num_tokens, blocks in lines:
        tip = next((block for block in reversed(blocks) if block in ended), None)
        num_turns = 1 if tip is None else ended.pop(tip) + 1
        whole = blocks[: num_tokens // BLOCK_TOKENS]
        if whole and (tip is not None or whole[-1] not in seen):
            ended[whole[-1]] = num_turns
        seen.update(blocks)
        yield Request(at_s, blocks, num_turns)

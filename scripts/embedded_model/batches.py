"""Training rows: which length a step has, and the conversations that fill it.

Everything is a function of seed, rank and step, so a run that was stopped goes on with the text it
would have seen.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .conversation import draw_conversation
from .document import Difficulty
from .vocabulary import Encoder
from .words import Split

ROW_TOKENS = 2304  # the longest row, and what one process computes in one step


@dataclass(frozen=True)
class Stage:
    """Part of the curriculum, up to step `until`: the shares of the row lengths."""

    until: float
    lengths: dict[int, float]
    difficulty: Difficulty


# Copying appears at about step 600. Recall by key did not appear until the easy stages: while much
# is absent and each fact is worded in its own way, "not stated" is too often right.
CURRICULUM = (
    Stage(276, {128: 1.0}, Difficulty(0.0, 0.0)),
    Stage(598, {128: 0.3, 256: 0.7}, Difficulty(0.0, 0.0)),
    Stage(900, {256: 0.4, 576: 0.6}, Difficulty(0.0, 0.0)),
    Stage(1300, {128: 0.2, 256: 0.5, 576: 0.3}, Difficulty(0.0, 0.0)),
    Stage(1600, {128: 0.5, 256: 0.4, 576: 0.1}, Difficulty(0.85, 0.0)),
    Stage(2600, {128: 0.25, 256: 0.45, 576: 0.3}, Difficulty(0.5, 0.0)),
    Stage(3000, {256: 0.4, 576: 0.4, 1152: 0.2}, Difficulty(0.35, 0.0)),
    Stage(3500, {256: 0.2, 576: 0.3, 1152: 0.35, 2304: 0.15}, Difficulty(0.3)),
    Stage(4200, {256: 0.25, 576: 0.35, 1152: 0.25, 2304: 0.15}, Difficulty()),
    Stage(math.inf, {256: 0.15, 576: 0.25, 1152: 0.3, 2304: 0.3}, Difficulty()),
)


@dataclass(frozen=True)
class Batch:
    """Rows of tokens [rows, length], and what is to be predicted in them [rows, wanted]."""

    tokens: npt.NDArray[np.int32]
    picked: npt.NDArray[np.int32]
    targets: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]


def stage_at(step: int) -> Stage:
    """Return the part of the curriculum that this step belongs to."""
    return next(stage for stage in CURRICULUM if step < stage.until)


def row_length(seed: int, step: int) -> int:
    """Return the length of the rows of this step, the same for every process."""
    lengths = stage_at(step).lengths
    rng = random.Random(f"{seed}/length/{step}")
    return rng.choices(list(lengths), list(lengths.values()))[0]


def draw_batch(encoder: Encoder, seed: int, rank: int, step: int, length: int) -> Batch:
    """Return as many rows of `length` as make up `ROW_TOKENS`."""
    rng = random.Random(f"{seed}/text/{rank}/{step}")
    rows, difficulty = ROW_TOKENS // length, stage_at(step).difficulty
    tokens = np.full((rows, length), encoder.end_of_text, np.int32)
    wanted: list[list[int]] = []
    following: list[list[int]] = []
    for row in range(rows):
        conversation = draw_conversation(
            rng, Split.TRAINED, length - 12, encoder.measure, difficulty
        )
        ids, is_wanted = encoder.supervised(conversation)
        ids, is_wanted = ids[: length + 1], is_wanted[: length + 1]
        positions = [at - 1 for at in range(1, len(ids)) if is_wanted[at]]
        wanted.append(positions)
        following.append([ids[at + 1] for at in positions])
        tokens[row, : min(len(ids), length)] = ids[:length]
    most = max(len(positions) for positions in wanted)
    width = max(16, -(-most // 16) * 16)  # few different shapes, so that few are traced
    picked = np.full((rows, width), length - 1, np.int32)
    targets = np.zeros((rows, width), np.int32)
    weights = np.zeros((rows, width), np.float32)
    for row, (positions, next_ids) in enumerate(zip(wanted, following, strict=True)):
        picked[row, : len(positions)] = positions
        targets[row, : len(positions)] = next_ids
        weights[row, : len(positions)] = 1.0
    return Batch(tokens, picked, targets, weights)

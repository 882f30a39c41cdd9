"""Exact-match recall of a model folder, measured on held-out conversations.

Each probe is a conversation that ends with a question whose one right reply is known. Its entities
and values were paired nowhere in training, and its random seed lies outside training's. The model
answers greedily, by mlx_lm, as the server would run it: the weights as exported, in float32.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import random
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from .conversation import (
    MEASURED,
    WITH_DOCUMENT,
    WITHOUT_DOCUMENT,
    Conversation,
    Message,
)
from .document import Difficulty
from .vocabulary import Encoder, load_tokenizer
from .words import Split

CONTEXTS = (512, 1024, 2048)
MAX_REPLY = 72


@dataclass(frozen=True)
class Probe:
    """A prompt and the one right reply to it."""

    messages: list[Message]
    expected: str


def _fill(conversation: Conversation, num_tokens: int) -> None:
    """Add turns until about `num_tokens` are there, the last question's tokens included."""
    mix = WITH_DOCUMENT if conversation.document else WITHOUT_DOCUMENT
    while conversation.num_tokens < num_tokens - 48:
        conversation.turn(mix)


def _ask_document(conversation: Conversation, num_tokens: int) -> None:
    conversation.open(num_tokens - 44)
    conversation.ask_document()


def _ask_document_late(conversation: Conversation, num_tokens: int) -> None:
    conversation.open(int(0.5 * num_tokens) if num_tokens < 800 else num_tokens - 400)
    for _ in range(6):
        conversation.turn(WITH_DOCUMENT)
    conversation.ask_document()


def _ask_absent(conversation: Conversation, num_tokens: int) -> None:
    conversation.open(num_tokens - 44)
    conversation.ask_absent()


def _ask_told(conversation: Conversation, num_tokens: int) -> None:
    """The user's first message told it; a document precedes, many turns follow."""
    conversation.open(int(0.7 * num_tokens))
    conversation.tell()
    fact = next(iter(conversation.told.values()))
    _fill(conversation, num_tokens)
    conversation.ask(conversation.told[fact.key])


def _ask_corrected(conversation: Conversation, num_tokens: int) -> None:
    conversation.open(int(0.7 * num_tokens))
    conversation.tell()
    fact = next(iter(conversation.told.values()))
    conversation.turn(WITHOUT_DOCUMENT)
    conversation.correct_fact(conversation.told[fact.key])
    _fill(conversation, num_tokens)
    conversation.ask(conversation.told[fact.key])


def _repeat(conversation: Conversation, num_tokens: int) -> None:
    conversation.open(int(0.7 * num_tokens))
    _fill(conversation, num_tokens - 40)
    conversation.say_message()
    conversation.repeat()


def _ask_item(conversation: Conversation, num_tokens: int) -> None:
    """The list was given a few turns ago."""
    conversation.open(int(0.7 * num_tokens))
    _fill(conversation, num_tokens - 120)
    conversation.give_list()
    _fill(conversation, num_tokens)
    conversation.ask_listed_item()


PLAIN = "document, worded as asked"
PROBES: dict[str, Callable[[Conversation, int], None]] = {
    PLAIN: _ask_document,
    "document, first turn": _ask_document,
    "document, after 6 turns": _ask_document_late,
    "absent from the document": _ask_absent,
    "told by the user": _ask_told,
    "corrected by the user": _ask_corrected,
    "previous message repeated": _repeat,
    "n-th item of a list": _ask_item,
}


def draw_probe(kind: str, num_tokens: int, seed: int, encoder: Encoder) -> Probe:
    """Return the probe number `seed` of its kind, with a prompt of about `num_tokens`."""
    rng = random.Random(f"held out/{kind}/{num_tokens}/{seed}")
    difficulty = Difficulty(ease=1.0) if kind == PLAIN else MEASURED
    for _ in range(200):
        conversation = Conversation(rng, Split.HELD_OUT, encoder.measure, difficulty)
        PROBES[kind](conversation, num_tokens)
        *messages, reply = conversation.messages
        length = len(encoder.prompt(messages))
        if 0.75 * num_tokens <= length <= num_tokens:
            return Probe(messages, reply.text)
    raise ValueError(f"no probe of {kind!r} fits {num_tokens} tokens")


class Answerer:
    """Answers greedily with the model in a folder; owns the loaded weights."""

    def __init__(self, folder: Path) -> None:
        self._model: Any = load_model(folder)[0]
        self._model.set_dtype(mx.float32)
        self._tokenizer = load_tokenizer(folder)
        self.encoder = Encoder(self._tokenizer)

    def answer(self, messages: list[Message]) -> str:
        """Return the model's reply to the messages."""
        cache = make_prompt_cache(self._model)
        ids = mx.array(self.encoder.prompt(messages))[None]
        reply: list[int] = []
        while len(reply) < MAX_REPLY:
            logits = self._model(ids, cache=cache)[:, -1]
            token = int(np.argmax(np.array(logits[0])))
            if token == self.encoder.im_end:
                break
            reply.append(token)
            ids = mx.array([[token]])
        text: str = self._tokenizer.decode(reply, skip_special_tokens=False)
        return text


def accuracy(
    answerer: Answerer, kind: str, num_tokens: int, num_examples: int, show: bool = False
) -> float:
    """Return the share of exactly right replies, in percent."""
    right = 0
    for seed in range(num_examples):
        probe = draw_probe(kind, num_tokens, seed, answerer.encoder)
        reply = answerer.answer(probe.messages)
        right += reply == probe.expected
        if show and reply != probe.expected:
            print(f"{kind} {num_tokens}: {probe.messages[-1].text!r}")
            print(f"    wanted {probe.expected!r}\n    got    {reply!r}", flush=True)
    return 100 * right / num_examples


@functools.cache
def _answerer(folder: Path) -> Answerer:
    return Answerer(folder)


def _cell(folder: Path, kind: str, num_tokens: int, num_examples: int, show: bool) -> float:
    return accuracy(_answerer(folder), kind, num_tokens, num_examples, show)


def accuracy_table(folder: Path, num_examples: int, show: bool = False) -> str:
    """Return the table of accuracies as Markdown; `show` prints the wrong replies.

    Cells are measured by two processes at a time, with one BLAS thread each.
    """
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=2, mp_context=context) as pool:
        cells = {
            (kind, size): pool.submit(_cell, folder, kind, size, num_examples, show)
            for size in sorted(CONTEXTS, reverse=True)
            for kind in PROBES
        }
        lines = [
            f"| asked | {' | '.join(f'{size:,}' for size in CONTEXTS)} |",
            f"|---|{'---|' * len(CONTEXTS)}",
        ]
        for kind in PROBES:
            row = [f"{cells[kind, size].result():.0f}" for size in CONTEXTS]
            lines.append(f"| {kind} | {' | '.join(row)} |")
    return "\n".join(lines)

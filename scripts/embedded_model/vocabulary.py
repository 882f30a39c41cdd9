"""The tokenizer: byte-level BPE with single digits, ChatML markers and template.

Byte-level, so any UTF-8 round trips. Digits stand alone, so that a number is copied digit by digit.
A conversation is encoded message by message; since the markers are tokens of their own, this equals
encoding the rendered template.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from .conversation import Conversation, Message, draw_conversation
from .document import Difficulty
from .words import Split

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END)
VOCABULARY_SIZE = 1536
CHAT_TEMPLATE = (
    "{%- for message in messages -%}\n"
    "{{- '<|im_start|>' + message['role'] + '\\n' -}}\n"
    "{%- if message['content'] is string -%}\n"
    "{{- message['content'] -}}\n"
    "{%- elif message['content'] -%}\n"
    "{%- for part in message['content'] -%}\n"
    "{{- part['text'] if part['text'] is defined else '' -}}\n"
    "{%- endfor -%}\n"
    "{%- endif -%}\n"
    "{{- '<|im_end|>\\n' -}}\n"
    "{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}\n"
    "{{- '<|im_start|>assistant\\n' -}}\n"
    "{%- endif -%}\n"
)
NO_SIBLINGS = Difficulty(ease=0.0, siblings=0.0)
_WORDS_AND_SIGNS = r" ?\p{L}+\p{M}*|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]|\s+(?!\S)|\s+"


def train_tokenizer(seed: int, num_conversations: int = 1500) -> Tokenizer:
    """Return a tokenizer learned from conversations drawn with `seed`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS_AND_SIGNS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[AddedToken(text, special=True) for text in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(seed, num_conversations), trainer)
    return tokenizer


def _texts(seed: int, num_conversations: int) -> Iterator[str]:
    rng = random.Random(seed)
    for _ in range(num_conversations):
        conversation = draw_conversation(
            rng, Split.TRAINED, rng.choice((200, 600)), difficulty=NO_SIBLINGS
        )
        for message in conversation.messages:
            yield f"{message.role}\n"
            yield message.text


def load_tokenizer(path: Path) -> Tokenizer:
    """Return the tokenizer in the model folder `path`."""
    return Tokenizer.from_file(str(path / "tokenizer.json"))


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """Return the id of a special token."""
    found = tokenizer.token_to_id(token)
    if found is None:
        raise ValueError(f"the tokenizer lacks {token}")
    return found


class Encoder:
    """Turns messages into token ids; remembers nothing but the ids of the markers."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.im_start = token_id(tokenizer, IM_START)
        self.im_end = token_id(tokenizer, IM_END)
        self.end_of_text = token_id(tokenizer, END_OF_TEXT)
        self._line_end = self._ids("\n")

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def measure(self, text: str) -> int:
        """Return how many tokens `text` has."""
        return len(self._ids(text))

    def prompt(self, messages: list[Message]) -> list[int]:
        """Return the ids of the messages and of the marker after which the model answers."""
        ids: list[int] = []
        for message in messages:
            ids += [self.im_start, *self._ids(f"{message.role}\n{message.text}")]
            ids += [self.im_end, *self._line_end]
        return [*ids, self.im_start, *self._ids("assistant\n")]

    def supervised(self, conversation: Conversation) -> tuple[list[int], list[bool]]:
        """Return the conversation's ids and, for each, whether the model is to predict it."""
        ids: list[int] = []
        wanted: list[bool] = []
        for message in conversation.messages:
            head = [self.im_start, *self._ids(f"{message.role}\n")]
            body = [*self._ids(message.text), self.im_end]
            if message.role != "assistant":
                head, body = [*head, *body], []
            ids += [*head, *body, *self._line_end]
            wanted += [False] * len(head) + [True] * len(body) + [False] * len(self._line_end)
        return ids, wanted

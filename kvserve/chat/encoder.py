"""Text to token ids, with the token position of given places in the text.

State: a bounded memory of prefixes already tokenised, behind a lock; called from worker threads.

A conversation grows at its end, and tokenising 100,000 tokens takes 0.4 s, so the tokens of a
known prefix are taken from memory and only the rest is tokenised. That is exact only where an added
token (`<|im_start|>`) begins: tokenizers split the text there before they do anything else. Nowhere
else is it done. Adds no special tokens: the template has written them.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase

from kvserve.core.types import TokenIds

MAX_REMEMBERED_TOKENS = 8_000_000
"""Of all remembered prefixes together, at 8 bytes each."""

_NFC_SHRINK = 3
"""NFC can make three bytes out of nine (Hangul letters to a syllable), not less."""


@dataclass(frozen=True, slots=True, eq=False)
class _Encoded:
    """`ends[i]` is where token i ends in the text, in characters, never decreasing."""

    ids: TokenIds
    ends: NDArray[np.int32]

    def upto(self, count: int) -> _Encoded:
        return _Encoded(self.ids[:count], self.ends[:count])


class Encoder:
    """One per model. Raises `ValueError` for a tokenizer without fast backend."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ValueError("The model's tokenizer has no fast (tokenizers) backend.")
        # A copy of our own: others may set truncation on theirs, and a call of it that runs while
        # we encode without the GIL raises "Already borrowed".
        self._backend: Tokenizer = Tokenizer.from_str(backend.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        self._added = _safe_added_tokens(self._backend)
        self._longest_token = _longest_token_bytes(self._backend)
        self._lock = threading.Lock()
        self._memory: OrderedDict[bytes, _Encoded] = OrderedDict()
        self._num_remembered = 0

    def min_tokens(self, text: str) -> int:
        """Return a number of tokens that `text` has at least; 0 where nothing can be said.

        Costs a look at the text's length, so that 10 MB can be refused untokenised.
        """
        if self._longest_token is None:
            return 0
        nbytes = len(text) if text.isascii() else len(text.encode()) // _NFC_SHRINK
        return nbytes // self._longest_token

    def encode(
        self, text: str, marks: Sequence[int], digests: Mapping[int, bytes]
    ) -> tuple[TokenIds, list[int]]:
        """Return the token ids of `text`, and for each mark how many whole tokens end by it.

        `marks` are ascending places in `text`, in characters; `digests[mark]` stands for
        `text[:mark]`.
        """
        encoded = self._resume(text, marks, digests) or self._encode(text)
        positions = np.searchsorted(encoded.ends, marks, side="right").tolist()
        self._remember(text, encoded, dict(zip(marks, positions, strict=True)), digests)
        return encoded.ids, positions

    def _encode(self, text: str) -> _Encoded:
        # encode_batch gives the GIL back while it works; encode held it for 2.8 s on 2 MB.
        encoding: Encoding = self._backend.encode_batch([text], add_special_tokens=False)[0]
        ids = np.array(encoding.ids, dtype=np.uint32)
        ends = np.fromiter((end for _, end in encoding.offsets), dtype=np.int32, count=len(ids))
        return _Encoded(ids, np.maximum.accumulate(ends))

    def _resume(
        self, text: str, marks: Sequence[int], digests: Mapping[int, bytes]
    ) -> _Encoded | None:
        """Return `text` encoded from its longest remembered prefix on, if that is exact."""
        for mark in reversed(marks):
            with self._lock:
                known = self._memory.get(digests[mark])
                if known is not None:
                    self._memory.move_to_end(digests[mark])
            if known is None:
                continue
            if mark == len(text):
                return known
            tail = self._encode(text[mark:])
            if len(tail.ids) and self._begins_safely(text, mark, int(tail.ids[0])):
                return _Encoded(
                    np.concatenate([known.ids, tail.ids]),
                    np.concatenate([known.ends, tail.ends + np.int32(mark)]),
                )
            return None
        return None

    def _begins_safely(self, text: str, mark: int, token_id: int) -> bool:
        content = self._added.get(token_id)
        return content is not None and text.startswith(content, mark)

    def _remember(
        self,
        text: str,
        encoded: _Encoded,
        positions: Mapping[int, int],
        digests: Mapping[int, bytes],
    ) -> None:
        # The last mark of this turn may lie before the words of the next reply, where resuming is
        # not exact (Mistral opens a reply with nothing); the one before it serves then.
        for mark in sorted(positions)[-3:]:
            count = positions[mark]
            if count == 0 or int(encoded.ends[count - 1]) != mark:
                continue
            if count == len(encoded.ids) or self._begins_safely(
                text, mark, int(encoded.ids[count])
            ):
                self._put(digests[mark], encoded.upto(count))

    def _put(self, key: bytes, encoded: _Encoded) -> None:
        with self._lock:
            old = self._memory.pop(key, None)
            self._num_remembered += len(encoded.ids) - (0 if old is None else len(old.ids))
            self._memory[key] = encoded
            while self._num_remembered > MAX_REMEMBERED_TOKENS:
                _, dropped = self._memory.popitem(last=False)
                self._num_remembered -= len(dropped.ids)


def _safe_added_tokens(backend: Tokenizer) -> dict[int, str]:
    """Return the added tokens before which the text is always split, whatever stands there.

    Left out: those that swallow what precedes them, and those that another added token could
    overlap from the left (`x<a>` beside `<a>`), which would then win.
    """
    added = {
        token_id: token
        for token_id, token in backend.get_added_tokens_decoder().items()
        if not token.normalized and token.content
    }
    contents = {token.content for token in added.values()}
    suffixes = {content[i:] for content in contents for i in range(1, len(content))}
    insides = "\0".join(content[1:] for content in contents)

    def overlapped(content: str) -> bool:
        return content in insides or any(
            content[:i] in suffixes for i in range(1, len(content) + 1)
        )

    return {
        token_id: token.content
        for token_id, token in added.items()
        if not (token.lstrip or token.single_word) and not overlapped(token.content)
    }


def _longest_token_bytes(backend: Tokenizer) -> int | None:
    """Return the most bytes of text that one token can stand for, or None if there is no most."""
    model: Any = backend.model
    byte_level = isinstance(backend.decoder, decoders.ByteLevel) or isinstance(
        backend.pre_tokenizer, pre_tokenizers.ByteLevel
    )
    if not isinstance(model, models.BPE) or not (byte_level or model.byte_fallback):
        return None  # an unknown word of any length can be one token
    if not isinstance(backend.normalizer, (type(None), normalizers.NFC)):
        return None  # it may delete text
    added = backend.get_added_tokens_decoder()
    if any(token.lstrip or token.rstrip for token in added.values()):
        return None  # such a token swallows any amount of white space
    longest = max((len(token.content.encode()) for token in added.values()), default=1)
    for token, token_id in backend.get_vocab(with_added_tokens=False).items():
        if token_id not in added:  # byte-level vocabularies spell each byte as one character
            longest = max(longest, len(token) if byte_level else len(token.encode()))
    return longest

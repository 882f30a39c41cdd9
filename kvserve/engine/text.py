"""From token ids to the text that a client may see: incremental decoding and stop strings.

One `TextStream` per reply, owned by the engine thread. It never gives out half a character, nor
text that might still turn out to be the beginning of a stop string.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class StopStrings:
    """Finds the first of several strings in a text that arrives in pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops)
        self._stops = tuple(stops)
        self._held = ""

    def feed(self, piece: str) -> tuple[str, bool]:
        """Return the text that may go out now, and whether a stop string was met.

        The stop string itself and what follows it are swallowed.
        """
        text = self._held + piece
        hits = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if hits:
            self._held = ""
            return text[: min(hits)], True
        keep = max((self._overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """Return what was held back, once nothing more comes."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Return the length of the longest end of `text` that begins `stop`."""
        for length in range(min(len(stop) - 1, len(text)), 0, -1):
            if text.endswith(stop[:length]):
                return length
        return 0


class TextStream:
    """Decodes one reply token by token."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._pending: list[int] = []
        self._stops = StopStrings(stops)
        self.stopped = False

    def feed(self, token_id: int) -> str:
        """Return the text that this token completes; sets `stopped` at a stop string."""
        self._pending.append(token_id)
        piece = self._decoder.step(self._tokenizer, token_id)
        if piece is None:
            return ""
        self._pending.clear()
        text, self.stopped = self._stops.feed(piece)
        return text

    def finish(self) -> str:
        """Return what is left: a character cut off by the limit shows as U+FFFD."""
        if self.stopped:
            return ""
        rest = ""
        if self._pending:
            rest = self._tokenizer.decode(self._pending, skip_special_tokens=True)
            self._pending.clear()
        text, self.stopped = self._stops.feed(rest)
        return text if self.stopped else text + self._stops.flush()

"""Where messages end in a rendered text, found by rendering and remembered.

State: a bounded memory of places, behind a lock; called from worker threads. It knows no template
by name and reads no markup: the end of message k is what the rendering of the first k messages
shares with the whole. Nothing depends on a place being right: state is reused by comparing tokens.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvserve.chat.messages import DIGEST_BYTES
from kvserve.core.errors import InvalidRequest

MAX_REMEMBERED = 100_000
MAX_UNSEEN = 16
"""How many of the last ends of a long unseen history are looked for, besides the first."""

Render = Callable[[Sequence[Mapping[str, Any]]], str]
"""Renders a history, without the suffix that opens a reply. Raises `InvalidRequest`."""


@dataclass(frozen=True, slots=True)
class _Place:
    """The shared text ended `num_chars` into a rendering, whose text up to there had `text_hash`.

    `num_chars` 0: the template lets no end be found here.
    """

    num_chars: int
    text_hash: bytes


class BoundaryFinder:
    """One per model."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._memory: OrderedDict[bytes, _Place] = OrderedDict()

    def find(
        self,
        whole: str,
        messages: Sequence[Mapping[str, Any]],
        chain: Sequence[bytes],
        render: Render,
        *,
        closed: bool,
    ) -> dict[int, int]:
        """Return for each message whose end was found, where: characters into `whole`, rising.

        `chain[k]` stands for all that a rendering of `messages[:k]` depends on. With `closed` the
        last message ends within `whole` and a suffix may follow; else it is left open. Renders a
        few prefixes for a history that grew, at most `2 * (MAX_UNSEEN + 2)` for an unseen one.
        """
        last = len(messages) if closed else len(messages) - 1
        # The last end is never taken from memory: a place that a longer history left there may lie
        # too early, and a cut right before the suffix must always be there.
        places = self._recall(whole, chain[:last])
        fresh = {}
        for count in range(1, last + 1):
            if count in places or not (count == 1 or count > last - MAX_UNSEEN):
                continue
            fresh[count] = _probe(whole, messages, count, render)
        self._learn(whole, chain, fresh)
        return _rising(whole, messages, places | fresh)

    def _recall(self, whole: str, chain: Sequence[bytes]) -> dict[int, int]:
        """Return the remembered places by message count, those alone whose text is the same."""
        with self._lock:
            known = {k: self._memory[key] for k, key in enumerate(chain) if key in self._memory}
            for count in known:
                self._memory.move_to_end(chain[count])
        hashes = prefix_hashes(
            whole, {p.num_chars for p in known.values() if p.num_chars <= len(whole)}
        )
        return {
            count: place.num_chars
            for count, place in known.items()
            if hashes.get(place.num_chars) == place.text_hash
        }

    def _learn(self, whole: str, chain: Sequence[bytes], fresh: Mapping[int, int]) -> None:
        hashes = prefix_hashes(whole, set(fresh.values()))
        with self._lock:
            for count, num_chars in fresh.items():
                self._memory[chain[count]] = _Place(num_chars, hashes[num_chars])
                self._memory.move_to_end(chain[count])
            while len(self._memory) > MAX_REMEMBERED:
                self._memory.popitem(last=False)


def prefix_hashes(text: str, lengths: Iterable[int]) -> dict[int, bytes]:
    """Return the digest of `text[:n]` for each n, in one pass over the text."""
    state = hashlib.blake2b(digest_size=DIGEST_BYTES)
    hashes = {}
    done = 0
    for length in sorted(lengths):
        state.update(text[done:length].encode())
        hashes[length] = state.digest()
        done = length
    return hashes


def shared_length(a: str, b: str) -> int:
    """Return the length of the longest common prefix."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # slices compare at memory speed, a loop over characters does not
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _probe(whole: str, messages: Sequence[Mapping[str, Any]], count: int, render: Render) -> int:
    """Return where `messages[:count]` end in `whole`, or 0."""
    try:
        prefix = render(messages[:count])
        shared = shared_length(prefix, whole)
        if shared == len(prefix) or count == len(messages):
            return shared
    except InvalidRequest:
        shared = 0  # some templates refuse a history that ends here (Qwen3.5: no user message)
    # As the last of its history a message can look otherwise than in the middle: Qwen3 gives it an
    # empty <think> block. So show it with a successor, of which only the words are foreign.
    successor = messages[count]
    words = successor.get("content")
    stub = "y" if isinstance(words, str) and words.lstrip().startswith("x") else "x"
    kept = {name: successor[name] for name in ("role", "name", "tool_call_id") if name in successor}
    try:
        prefix = render([*messages[:count], {**kept, "content": stub}])
    except InvalidRequest:
        return shared
    return max(shared, shared_length(prefix, whole))


def _rising(
    whole: str, messages: Sequence[Mapping[str, Any]], places: Mapping[int, int]
) -> dict[int, int]:
    """Return the places that lie behind all before them, by index of the message that ends there.

    A template that moves the system prompt to the end (Mistral) shares no more than `<s>` at first,
    which is not the end of anything: the first place must have its message's words before it.
    """
    rising: dict[int, int] = {}
    highest = 0
    for count, place in sorted(places.items()):
        if place <= highest:
            continue
        if not rising and count < len(messages):
            words = messages[count - 1].get("content")
            if isinstance(words, str) and words.strip() not in whole[:place]:
                continue
        rising[count - 1] = highest = place
    return rising

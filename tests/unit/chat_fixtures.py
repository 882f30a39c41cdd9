"""What the tests of the chat part share: small tokenizers, templates, a fake engine and cache."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from kvserve.cache.stored import needed, restorable
from kvserve.core.identity import ModelIdentity
from kvserve.core.types import (
    Event,
    Finished,
    FinishReason,
    GenerationRequest,
    Started,
    TextPiece,
    TokenIds,
)
from kvserve.store.errors import SnapshotDamaged, SourceGone
from kvserve.store.segments import PackedSegment, SegmentSource, StoredPath, StoredSegment
from tests.unit.snapshot_fixtures import IDENTITY, ListSource, make_segment, make_spec

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THINKING = (
    # The last assistant message shows an empty thinking block, earlier ones do not; the suffix
    # opens a block that the history never shows; a history must end in a user's message.
    "{% if messages[-1].role == 'system' %}{{ raise_exception('No user query found.') }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
MOVING = (
    # The system prompt stands before the last message, wherever that is (Mistral).
    "<s>{% set last = messages | length - 1 %}{% for m in messages %}{% if m.role != 'system' %}"
    "{% if loop.index0 == last and messages[0].role == 'system' %}{{ messages[0].content }}"
    "{% endif %}{{ '<|im_start|>' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
)


def message(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def chat(*contents: str, system: str | None = "Be brief.") -> list[dict[str, Any]]:
    """Return a chat of alternating user and assistant messages."""
    head = [] if system is None else [message("system", system)]
    roles = ("user", "assistant")
    return head + [message(roles[i % 2], text) for i, text in enumerate(contents)]


@cache
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer: one token a byte, apart from the added ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    specials = ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<s>"]
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in specials])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    tokenizer.chat_template = CHATML
    return tokenizer


@cache
def real_tokenizer(name: str) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / name)
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def sessions(name: str, count: int) -> Iterator[dict[str, Any]]:
    with (SHARED / "sessions" / f"{name}.jsonl").open(encoding="utf-8") as lines:
        for _, line in zip(range(count), lines, strict=False):
            yield json.loads(line)


@dataclass(frozen=True)
class Info:
    name: str = "tiny"
    context_length: int = 4096
    caching: bool = True
    identity: ModelIdentity = IDENTITY


@dataclass(frozen=True)
class Usage:
    num_tokens: int
    nbytes: int
    shared_nbytes: int
    segments: tuple[tuple[int, int, int], ...]


@dataclass
class FakeCache:
    """Holds whole paths; ten bytes a token, in segments of 16 tokens."""

    paths: list[tuple[bytes, TokenIds]] = field(default_factory=list)
    bound: dict[Hashable, tuple[bytes, TokenIds]] = field(default_factory=dict)
    dropped: list[tuple[Hashable, bool]] = field(default_factory=list)

    def longest(self, namespace: bytes, token_ids: TokenIds) -> int:
        best = 0
        for known, path in self.paths:
            length = min(len(path), len(token_ids))
            differs = np.nonzero(path[:length] != token_ids[:length])[0]
            if known == namespace:
                best = max(best, int(differs[0]) if len(differs) else length)
        return best

    def usage(self, namespace: bytes, token_ids: TokenIds) -> Usage:
        held = self.longest(namespace, token_ids)
        ends = [*range(16, held, 16), held] if held else []
        segments = tuple((s, e, 10 * (e - s)) for s, e in zip([0, *ends], ends, strict=False))
        return Usage(held, 10 * held, 0, segments)

    def bind(self, name: Hashable, namespace: bytes, token_ids: TokenIds) -> None:
        self.bound[name] = (namespace, token_ids)

    def unbind(self, name: Hashable, *, drop: bool) -> None:
        self.dropped.append((name, drop))
        self.bound.pop(name, None)


class FakeGeneration:
    """Answers with `reply`, a token for each of its bytes; keeps `kept` tokens when it is cut."""

    def __init__(
        self,
        engine: FakeEngine,
        request: GenerationRequest,
        reply: str,
        stored: StoredPath | None = None,
    ) -> None:
        self.request = request
        self.stored = stored
        self.num_closed = 0
        self._engine = engine
        self._reply = reply
        self._events = self._run()

    def __aiter__(self) -> AsyncIterator[Event]:
        return self._events

    async def aclose(self) -> None:
        self.num_closed += 1
        await self._events.aclose()  # type: ignore[attr-defined]

    async def _run(self) -> AsyncIterator[Event]:
        engine, prompt = self._engine, self.request.prompt
        cached = 0
        if self.request.use_cache:
            cached = engine.cache.longest(self.request.namespace, prompt.token_ids)
        cached = min(cached, len(prompt) - 1)
        if engine.fail_before:
            raise engine.fail_before
        kept = prompt.token_ids if engine.kept is None else prompt.token_ids[: engine.kept]
        if self.request.use_cache:
            engine.cache.paths.append((self.request.namespace, kept))
        held, (cached, damaged) = cached, self._fetched(cached)
        yield Started(cached, len(prompt) - cached, cached - held, damaged)
        if not self.request.max_tokens:
            nothing = np.zeros(0, np.uint32)
            yield Finished(FinishReason.LENGTH, nothing, len(prompt), 0.0, 0.0)
            return
        for i, character in enumerate(self._reply):
            yield TextPiece(character, i + 1)
            if engine.fail_after:
                raise engine.fail_after
        ids = engine.encode(self._reply)[: self.request.max_tokens]
        path = np.concatenate([prompt.token_ids, ids])[:-1]  # the last token was never fed
        if self.request.use_cache:
            engine.cache.paths.append((self.request.namespace, path))
        yield Finished(FinishReason.STOP, ids, len(path), 0.0, 0.0)

    def _fetched(self, cached: int) -> tuple[int, bool]:
        """Return how far memory and disk reach together, and whether a file was damaged."""
        read = self._engine.read
        if self.stored is None or read is None:
            return cached, False
        position = restorable(self.stored, len(self.request.prompt) - 1, cached)
        try:
            read(needed(self.stored, position, cached))
        except SnapshotDamaged:
            return cached, True
        return position, False


@dataclass
class FakeEngine:
    """Generates `replies`, and gives the disk what its cache holds, as the real one does.

    `read` is the disk's. `let_go` stands for memory that requests took back: then nothing can be
    written.
    """

    cache: FakeCache
    info: Info = Info()
    replies: list[str] = field(default_factory=list)
    kept: int | None = None
    fail_before: Exception | None = None
    fail_after: Exception | None = None
    submitted: list[FakeGeneration] = field(default_factory=list)
    read: Callable[[Sequence[StoredSegment]], list[PackedSegment]] | None = None
    let_go: bool = False
    num_leases: int = 0

    def submit(
        self, request: GenerationRequest, stored: StoredPath | None = None
    ) -> FakeGeneration:
        reply = self.replies.pop(0) if self.replies and request.max_tokens else "ok"
        self.submitted.append(FakeGeneration(self, request, reply, stored))
        return self.submitted[-1]

    def held(self, namespace: bytes, token_ids: TokenIds) -> int:
        return self.cache.longest(namespace, token_ids)

    def hold(self, namespace: bytes, token_ids: TokenIds) -> list[int]:
        self.num_leases += 1
        return [self.held(namespace, token_ids)]

    def release(self, lease: list[int]) -> None:
        self.num_leases -= len(lease)
        lease.clear()

    async def sources(
        self, lease: list[int], path: StoredPath, ranges: Sequence[tuple[int, int]]
    ) -> list[SegmentSource]:
        if self.let_go or any(end > lease[0] for _, end in ranges):
            raise SourceGone
        return [ListSource([make_segment(make_spec(*at))]) for at in ranges]

    def encode(self, text: str) -> TokenIds:
        ids = byte_tokenizer().encode(text + "<|im_end|>", add_special_tokens=False)
        return np.array(ids, dtype=np.uint32)

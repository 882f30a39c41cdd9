"""What the chat part asks of the engine, the cache and the renderer, as protocols.

Holds no state. It exists so that nothing in `kvserve.chat` imports a module that imports MLX, and
so that tests can stand in small fakes. The real ones are `kvserve.engine.engine.Engine`,
`kvserve.cache.segments.SegmentCache` and `kvserve.chat.template.Formatter`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Hashable, Mapping, Sequence
from typing import Any, Protocol

from kvserve.core.identity import ModelIdentity
from kvserve.core.types import Event, GenerationRequest, Prompt, TokenIds
from kvserve.store.segments import SegmentSource, StoredPath


class ModelInfo(Protocol):
    """The loaded model, as far as a turn depends on it."""

    @property
    def name(self) -> str: ...
    @property
    def context_length(self) -> int: ...
    @property
    def caching(self) -> bool: ...
    @property
    def identity(self) -> ModelIdentity: ...


class Generation(Protocol):
    """One running request: `Started`, then `TextPiece`s, then `Finished`; errors are raised."""

    def __aiter__(self) -> AsyncIterator[Event]: ...
    async def aclose(self) -> None: ...


class Engine(Protocol):
    """Where prompts go; `submit` raises `QueueFull`, `NotReady` and the like at once."""

    @property
    def info(self) -> ModelInfo: ...
    def submit(
        self, request: GenerationRequest, stored: StoredPath | None = None
    ) -> Generation: ...


class StateSource(Protocol):
    """Where the disk takes KV state from; the engine."""

    def held(self, namespace: bytes, token_ids: TokenIds) -> int:
        """Return how many leading tokens can be taken up again from memory."""

    def hold(self, namespace: bytes, token_ids: TokenIds) -> Any:
        """Protect what memory holds of a path, as long as requests can do without its room."""

    def release(self, lease: Any) -> None: ...

    async def sources(
        self, lease: Any, path: StoredPath, ranges: Sequence[tuple[int, int]]
    ) -> list[SegmentSource]:
        """Return what is to be stored of the held path for each of the token ranges."""


class PathUsage(Protocol):
    """What the cache holds of one path; `segments` are `(start, end, nbytes)`, half-open."""

    @property
    def num_tokens(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def shared_nbytes(self) -> int: ...
    @property
    def segments(self) -> tuple[tuple[int, int, int], ...]: ...


class Cache(Protocol):
    """The references that keep a conversation's segments from being evicted first."""

    def usage(self, namespace: bytes, token_ids: TokenIds) -> PathUsage: ...
    def bind(self, name: Hashable, namespace: bytes, token_ids: TokenIds) -> None: ...
    def unbind(self, name: Hashable, *, drop: bool) -> None: ...


class Renderer(Protocol):
    """Messages to a prompt; called in a worker thread."""

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] = ...,
        context_length: int | None = None,
    ) -> Prompt: ...

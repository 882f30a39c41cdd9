"""A pure stand-in for a model's state: it knows which entry belongs to which token of which path.

The entry of a token is its whole prefix, so that an entry of another path, another position or
another caller is seen for what it is. Payloads split as `kvserve.cache.codec.SegmentPayload` does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

Entry = tuple[bytes, tuple[int, ...]]
Tokens = tuple[int, ...]

STATE_NBYTES = 5


@dataclass(frozen=True)
class Kind:
    """The layers of a model: plain spans, windows of these sizes, and perhaps an end state."""

    span: bool = False
    windows: tuple[int, ...] = ()
    stateful: bool = False

    @property
    def reach(self) -> int:
        return max(self.windows, default=0)

    def nbytes(self, num_tokens: int, with_state: bool) -> int:
        """Return the upper bound of a segment's bytes that the cache is told."""
        windows = sum(min(num_tokens, window) for window in self.windows)
        return num_tokens * self.span + windows + STATE_NBYTES * (self.stateful and with_state)


@dataclass(frozen=True)
class Fake:
    """The state that a segment adds. `state` is None where an end state was not kept."""

    kind: Kind
    length: int
    span: tuple[Entry, ...]
    held: tuple[tuple[Entry, ...], ...]
    state: Entry | None

    @property
    def nbytes(self) -> int:
        windows = sum(map(len, self.held))
        return len(self.span) + windows + STATE_NBYTES * (self.state is not None)

    @property
    def restorable(self) -> bool:
        return not self.kind.stateful or self.state is not None

    @property
    def whole(self) -> bool:
        return not self.kind.stateful

    @cached_property
    def windows(self) -> Mapping[int, int]:
        return {
            window: len(entries)
            for window, entries in zip(self.kind.windows, self.held, strict=True)
        }

    def split(self, at: int, length: int) -> tuple[Fake, Fake]:
        assert length == self.length and 0 < at < length
        behind = length - at
        upper = tuple(entries[: max(0, len(entries) - behind)] for entries in self.held)
        lower = tuple(entries[-min(behind, len(entries)) :] for entries in self.held)
        return (
            Fake(self.kind, at, self.span[:at], upper, None),
            Fake(self.kind, behind, self.span[at:], lower, self.state),
        )

    def without_state(self) -> Fake:
        return Fake(self.kind, self.length, self.span, self.held, None)


@dataclass(frozen=True)
class Working:
    """A working cache that stands at `position`; tokens before `since` have left its windows."""

    kind: Kind
    namespace: bytes
    tokens: Tokens
    position: int
    since: int = 0

    def entry(self, index: int) -> Entry:
        return self.namespace, self.tokens[: index + 1]

    def capture(self, start: int, end: int, with_state: bool, contained: bool) -> Fake:
        assert 0 <= start < end <= self.position
        held = []
        for window in self.kind.windows:
            first = max(0, end - min(window, end if contained else end - start))
            held.append(tuple(self.entry(i) for i in range(max(first, self.since), end)))
        span = tuple(self.entry(i) for i in range(start, end)) if self.kind.span else ()
        state = self.entry(end - 1) if with_state and end == self.position else None
        return Fake(self.kind, end - start, span, tuple(held), state)


def rebuilt(
    kind: Kind,
    namespace: bytes,
    tokens: Tokens,
    segments: Sequence[tuple[int, int, Fake]],
    num_tokens: int,
) -> bool:
    """Whether the state after `num_tokens` can be had from `segments`; asserts that it is right.

    Takes whatever is there, wherever it lies: what it cannot rebuild, nobody can.
    """
    expected = Working(kind, namespace, tokens, len(tokens))
    spans: dict[int, Entry] = {}
    windows: list[dict[int, Entry]] = [{} for _ in kind.windows]
    for start, end, payload in segments:
        assert payload.length == end - start
        spans.update(zip(range(start, end), payload.span, strict=False))
        for found, entries in zip(windows, payload.held, strict=True):
            found.update(zip(range(end - len(entries), end), entries, strict=True))
    needed = [(spans, range(num_tokens))] if kind.span else []
    for window, found in zip(kind.windows, windows, strict=True):
        needed.append((found, range(max(0, num_tokens - window), num_tokens)))
    for found, positions in needed:
        for index in positions:
            if index not in found:
                return False
            assert found[index] == expected.entry(index)
    if kind.stateful:
        _, end, tip = segments[-1]
        if end != num_tokens or tip.state is None:
            return False
        assert tip.state == expected.entry(num_tokens - 1)
    return True

"""The tree of KV segments: which tokens are held, and where a prompt parts from them.

Pure bookkeeping over opaque payloads: no clock, lock, file or MLX. One tree serves one root key.

Cuts alone cannot drive the walk: a reply is stored up to its last computed token, while the next
prompt has its message end a template's newline later, so the same tokens arrive cut differently.
The walk therefore follows the stored segments, found by their first token and decided by comparing
every token, and a segment is split where a newcomer parts from it. Siblings thus never begin with
the same token, and no prefix is held twice.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import Generic, Protocol, Self, TypeVar

import numpy as np

from kvserve.core.types import TokenIds


class Payload(Protocol):
    """What a segment holds besides its tokens; immutable."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""

    @property
    def restorable(self) -> bool:
        """Whether no end state is missing, so that the state at the segment's end can be had."""

    @property
    def whole(self) -> bool:
        """Whether it consists of tokens alone, so that states inside it can be had too."""

    @property
    def windows(self) -> Mapping[int, int]:
        """For each size of sliding window, how many tokens before the segment's end are held.

        Fewer than the segment has where the window was smaller; more where it was captured behind
        a segment that lacks some.
        """

    def split(self, at: int, length: int) -> tuple[Self, Self]:
        """Return the payloads of the tokens `[0, at)` and `[at, length)`."""


P = TypeVar("P", bound=Payload)

_WIDTH = 4
"""Bytes of a token id."""


def common_prefix(a: TokenIds, b: TokenIds) -> int:
    """Return how many leading tokens `a` and `b` share."""
    n = min(len(a), len(b))
    if n == 0 or a[0] != b[0]:
        return 0
    differs = a[:n] != b[:n]
    first = int(differs.argmax())
    return first if differs[first] else n


class Node(Generic[P]):
    """A segment: the tokens `[start, end)` behind its parent's, with their payload.

    `leases` counts lookups in use, `names` are the references (conversations) whose tip it is,
    `used` is the tick of its last use as a tip, or of one below it that is gone, and `rank` what
    eviction made of it then. `num_turns` is the turn of the conversation that it belongs to,
    `reused` says that a request other than the one that published it used it. `data` and `tokens`
    are the same memory.
    """

    __slots__ = (
        *("children", "data", "leases", "names", "num_turns", "parent", "payload"),
        *("rank", "reused", "start", "tokens", "used"),
    )

    def __init__(
        self, parent: Node[P] | None, start: int, tokens: TokenIds, payload: P | None
    ) -> None:
        self.parent = parent
        self.start = start
        self.own(tokens)
        self.payload = payload
        self.children: dict[int, Node[P]] = {}
        self.leases = 0
        self.names: set[Hashable] = set()
        self.used = 0
        self.rank = 0
        self.num_turns = 1
        self.reused = False

    def own(self, tokens: TokenIds) -> None:
        """Make a copy of `tokens` the segment's own."""
        self.data = tokens.astype(np.uint32, copy=False).tobytes()
        self.tokens: TokenIds = np.frombuffer(self.data, np.uint32)

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)

    @property
    def is_root(self) -> bool:
        return self.parent is None

    def path(self) -> list[Node[P]]:
        """Return the nodes from below the root down to this one."""
        nodes: list[Node[P]] = []
        node = self
        while node.parent is not None:
            nodes.append(node)
            node = node.parent
        nodes.reverse()
        return nodes

    def token_ids(self) -> TokenIds:
        """Return all tokens from the root to this segment's end."""
        parts = [node.tokens for node in self.path()]
        return np.concatenate(parts) if parts else np.zeros(0, np.uint32)


class Tree(Generic[P]):
    """The segments below one root."""

    def __init__(self) -> None:
        self.root: Node[P] = Node(None, 0, np.zeros(0, np.uint32), None)

    def walk(self, token_ids: TokenIds, origin: Node[P] | None = None) -> tuple[Node[P], int]:
        """Return the deepest node that shares a token with the prompt, and how far they agree.

        The second value is a position in the prompt; it lies inside the node where the prompt
        parts from it or ends. `origin` is a node already known to match up to its start.
        """
        node = origin if origin is not None else self.root
        matched = node.start
        if not node.is_root:
            matched += common_prefix(node.tokens, token_ids[node.start :])
            if matched < node.end:
                return node, matched
        # One comparison of bytes per segment: a long conversation is a path of thousands.
        prompt = token_ids.astype(np.uint32, copy=False).tobytes()
        length = len(token_ids)
        while matched < length:
            child = node.children.get(int(token_ids[matched]))
            if child is None:
                break
            node = child
            if prompt.startswith(child.data, matched * _WIDTH):
                matched += len(child.tokens)
                continue
            matched += common_prefix(child.tokens, token_ids[matched:])
            break
        return node, matched

    def split(self, node: Node[P], position: int) -> Node[P]:
        """Cut `node` at `position`, strictly inside it; return the new upper node.

        The lower part stays the same object, so leases, names and children on it remain right.
        """
        assert node.parent is not None and node.payload is not None
        assert node.start < position < node.end
        at = position - node.start
        first, second = node.payload.split(at, len(node.tokens))
        upper: Node[P] = Node(node.parent, node.start, node.tokens[:at], first)
        upper.used, upper.rank = node.used, node.rank
        upper.num_turns, upper.reused = node.num_turns, node.reused
        node.parent.children[int(upper.tokens[0])] = upper
        node.parent, node.start, node.payload = upper, position, second
        node.own(node.tokens[at:])
        upper.children[int(node.tokens[0])] = node
        return upper

    def add(self, parent: Node[P], tokens: TokenIds, payload: P) -> Node[P]:
        """Hang a new segment below `parent`, none of whose children begins with its token."""
        assert len(tokens) and int(tokens[0]) not in parent.children
        node: Node[P] = Node(parent, parent.end, tokens, payload)
        parent.children[int(tokens[0])] = node
        return node

    def __iter__(self) -> Iterator[Node[P]]:
        """Visit every segment, parents before children."""
        stack = list(self.root.children.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())


def restorable_position(node: Node[P], matched: int, limit: int) -> int:
    """Return the deepest position, at most `min(matched, limit)`, whose state can be rebuilt.

    `matched` is a position in `node` or at its end. Zero stands for the empty prefix. If a
    segment's last matching position lacks tokens of a window, so do all before it in the segment.
    """
    here = node
    while here.parent is not None:
        payload = here.payload
        assert payload is not None
        stop = min(matched, limit, here.end)
        if stop > here.start and (payload.whole or (stop == here.end and payload.restorable)):
            needs = ((max(0, stop - window), window) for window in payload.windows)
            if all(holds_window(here, since, stop, window) for since, window in needs):
                return stop
        here = here.parent
    return 0


def holds_window(node: Node[P], since: int, until: int, window: int) -> bool:
    """Whether `node` and its ancestors hold the tokens `[since, until)` of one sliding window."""
    here = node
    while until > since:
        if here.parent is None or here.end < until:
            return False  # the one before lacks its first tokens
        assert here.payload is not None
        held = here.payload.windows.get(window)
        if held is None:
            return True  # layers that the model does not use
        if here.end - held < until:
            until = here.end - held
        elif here.start < until:
            return False
        here = here.parent
    return True


def lacks_window(above: Node[P], start: int, end: int) -> bool:
    """Whether a segment `[start, end)` below `above` needs tokens that are not held there."""
    payload = above.payload
    if payload is None:
        return False  # the root: nothing is before it
    return any(
        not holds_window(above, max(0, end - window), start, window) for window in payload.windows
    )


def reaches_back(node: Node[P]) -> bool:
    """Whether its windows hold tokens from before it, on which segments below may rely."""
    assert node.payload is not None
    return any(held > len(node.tokens) for held in node.payload.windows.values())


def shared_nbytes(tip: Node[P], matched: int) -> int:
    """Return the bytes on the path to `tip`, up to `matched`, that more than one of them uses."""
    shared = 0
    others = matched < tip.end or bool(tip.children) or len(tip.names) > 1
    for node in reversed(tip.path()):
        assert node.payload is not None
        if node is not tip and (len(node.children) > 1 or node.names):
            others = True
        if others:
            shared += node.payload.nbytes
    return shared

"""Why less was reused than a conversation held, and what `X-Conv-KV` says. Pure.

It sees the conversation of the request and nothing else, so that it cannot tell of others.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from kvserve.chat.conversations import Conversation
from kvserve.core.identity import ModelIdentity
from kvserve.core.types import Prompt, Started, TokenIds


class KvSource(StrEnum):
    """The values of `X-Conv-KV`."""

    HIT = "hit"
    SNAPSHOT = "snapshot"
    FRESH = "fresh"
    NONE = "none"
    DISABLED = "disabled"


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request asks for, in the terms in which a `Conversation` records it.

    `begun` are the words of a last message of the assistant, from which the reply goes on.
    """

    prompt: Prompt
    chain: tuple[bytes, ...]
    roles: tuple[str, ...]
    tools_digest: bytes
    template_digest: bytes
    begun: str | None = None


def num_shared(a: TokenIds, b: TokenIds) -> int:
    """Return the length of the longest common prefix."""
    length = min(len(a), len(b))
    differs = a[:length] != b[:length]
    return int(differs.argmax()) if differs.any() else length


def kv_source(
    held: Conversation, asked: Asked, started: Started, identity: ModelIdentity
) -> KvSource:
    """Return where a whole message that both have was reused from, `FRESH` if none was.

    `SNAPSHOT` if some of it came from disk, else `HIT`.
    """
    if held.identity != identity:
        return KvSource.FRESH
    shared = num_shared(held.token_ids, asked.prompt.token_ids)
    first = held.cuts[0].position if held.cuts else len(held.token_ids)
    if not 0 < first <= min(shared, started.num_cached):
        return KvSource.FRESH
    return KvSource.SNAPSHOT if started.num_from_disk else KvSource.HIT


def miss_reason(
    held: Conversation, asked: Asked, started: Started, identity: ModelIdentity
) -> str | None:
    """Return the value of `X-Conv-Miss-Reason`, or None if nothing was missed.

    Nothing is missed when the prompt goes on from all that was held, and when it goes back to an
    earlier point of it (a regenerate, a rollback), be it with another suffix behind the last cut.
    """
    differs = held.identity.differences(identity)
    if differs == ("chat_template",):
        return "template_changed"
    if differs:
        return f"model_changed; differs={','.join(differs)}"
    num_cached = started.num_cached
    if len(held.token_ids) == 0:
        return None
    shared = num_shared(held.token_ids, asked.prompt.token_ids)
    if num_cached < _reachable(held, asked, shared):
        return "corrupt" if started.damaged else "evicted"
    last_cut = asked.prompt.cuts[-1].position if asked.prompt.cuts else len(asked.prompt)
    if shared == len(held.token_ids) or (
        shared >= last_cut and len(asked.chain) <= len(held.chain)
    ):
        return None
    changed = _first_changed_message(held, asked)
    if held.tools_digest != asked.tools_digest and (
        changed is None or _diverged_before(held, changed, shared)
    ):
        return "tools_changed"
    if changed is None or (
        held.template_digest != asked.template_digest and _diverged_before(held, changed, shared)
    ):
        return "template_changed"
    if changed == 0 and {held.roles[0], asked.roles[0]} & {"system", "developer"}:
        return "system_changed"
    return f"messages_changed; message={changed}"


def _reachable(held: Conversation, asked: Asked, shared: int) -> int:
    """Return how many tokens at least ought to have been reused: up to the last shared cut.

    At least one token of the prompt is always computed.
    """
    shared = min(shared, len(asked.prompt) - 1)
    cuts = [*held.cuts, *asked.prompt.cuts]
    return max((cut.position for cut in cuts if cut.position <= shared), default=0)


def _first_changed_message(held: Conversation, asked: Asked) -> int | None:
    """Return the index of the first message that differs; None if one history holds the other."""
    for count, (old, new) in enumerate(zip(held.chain, asked.chain, strict=False)):
        if old != new:
            return count - 1
    return None


def _diverged_before(held: Conversation, message: int, shared: int) -> bool:
    """Return whether the tokens part before the messages do."""
    return any(cut.message < message and cut.position > shared for cut in held.cuts)

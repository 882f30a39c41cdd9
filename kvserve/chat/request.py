"""What a caller asks of one turn, and the pure values made of it. No state; any thread."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvserve.chat.messages import DIGEST_BYTES, digest, identity_chain, plain_messages
from kvserve.chat.miss import Asked
from kvserve.chat.ports import Renderer
from kvserve.core.types import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnRequest:
    """One reply to be made for `messages`, which are the whole history.

    `tenant` is "" for callers without a key, else a digest of the key. `max_tokens` None: as many
    as the context allows. `keep` False: leave the conversation's reference where it is (second
    and later choices of `n`). Fields that the API has validated are not validated again.
    """

    request_id: str
    tenant: str
    messages: tuple[dict[str, Any], ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    conversation_id: str | None = None
    reset_conversation: bool = False
    client_address: str | None = None
    cache_salt: str | None = None
    tools: tuple[dict[str, Any], ...] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    keep: bool = True


def namespace_of(tenant: str, cache_salt: str | None) -> bytes:
    """Return what separates the KV state of this caller from others'.

    The tenant goes in with its length, so that no tenant and salt can pass for another pair.
    """
    raw_tenant = tenant.encode("utf-8", "surrogatepass")
    state = hashlib.blake2b(len(raw_tenant).to_bytes(8, "little"), digest_size=DIGEST_BYTES)
    state.update(raw_tenant)
    if cache_salt is not None:
        state.update(b"\x01" + cache_salt.encode("utf-8", "surrogatepass"))
    return state.digest()


def size_of(messages: Sequence[Mapping[str, Any]]) -> int:
    """Return about how many characters the messages hold, at the cost of a look at each."""
    size = 0
    for message in messages:
        content = message.get("content")
        if isinstance(content, str):
            size += len(content)
        elif isinstance(content, (list, tuple)):
            size += sum(len(part.get("text") or "") for part in content if isinstance(part, dict))
        for call in message.get("tool_calls") or ():
            size += len(str(call))
    return size


def ask(request: TurnRequest, renderer: Renderer, context_length: int) -> Asked:
    """Render the request. Slow for long histories: runs in a worker thread.

    Raises `InvalidRequest` and `ContextTooLong`.
    """
    plain = plain_messages(request.messages)
    prompt = renderer.render(
        plain,
        tools=request.tools,
        template_kwargs=request.template_kwargs,
        context_length=context_length,
    )
    return Asked(
        prompt=prompt,
        chain=identity_chain(plain),
        roles=tuple(str(message.get("role", "")) for message in plain),
        tools_digest=digest(request.tools or None),
        template_digest=digest(dict(request.template_kwargs)),
        begun=plain[-1]["content"] if plain[-1].get("role") == "assistant" else None,
    )

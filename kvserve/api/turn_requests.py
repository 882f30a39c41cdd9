"""From a checked chat request to what is asked of the chat part, one turn for each choice.

Stateless and pure but for what it reads from the HTTP request: headers and the client's address.
"""

from __future__ import annotations

from typing import Any

from starlette.requests import Request

from kvserve.api.identity import conversation_id_of, tenant_of
from kvserve.api.wire import ChatRequest
from kvserve.api.wire_conv_kv import WarmRequest
from kvserve.chat.turn import TurnRequest
from kvserve.core.types import SamplingParams


def turn_requests_of(
    request: Request,
    body: ChatRequest,
    messages: tuple[dict[str, Any], ...],
    reply_id: str,
    defaults: SamplingParams,
) -> list[TurnRequest]:
    """Return a turn for each choice. They differ in their id and seed only.

    The reply's id names them below, not the client's request id, which need not be unique.
    """
    conversation_id = conversation_id_of(
        request.headers, conversation=body.conversation, conversation_id=body.conversation_id
    )
    return [
        TurnRequest(
            request_id=reply_id if index == 0 else f"{reply_id}-{index}",
            tenant=tenant_of(request.headers),
            messages=messages,
            sampling=_sampling(body, defaults, index),
            max_tokens=body.max_reply_tokens,
            stop=body.stop,
            conversation_id=conversation_id,
            reset_conversation=bool(body.reset_conversation),
            client_address=request.client.host if request.client else None,
            cache_salt=body.cache_salt,
            tools=body.tool_definitions,
            template_kwargs=body.chat_template_kwargs or {},
            keep=index == 0,
        )
        for index in range(body.n or 1)
    ]


def warm_request_of(
    request: Request, body: WarmRequest, messages: tuple[dict[str, Any], ...], request_id: str
) -> TurnRequest:
    """Return what is asked of the chat part to prefill a prompt ahead of its users.

    Headers that name conversations are not looked at: a prompt for many is none of theirs.
    """
    return TurnRequest(
        request_id=request_id,
        tenant=tenant_of(request.headers),
        messages=messages,
        cache_salt=body.cache_salt,
        tools=body.tool_definitions,
        template_kwargs=body.chat_template_kwargs or {},
    )


def _sampling(body: ChatRequest, defaults: SamplingParams, index: int) -> SamplingParams:
    def given(name: str) -> Any:
        value = getattr(body, name)
        return getattr(defaults, name) if value is None else value

    seed = given("seed")
    return SamplingParams(
        temperature=given("temperature"),
        top_p=given("top_p"),
        top_k=max(0, given("top_k")),
        min_p=given("min_p"),
        repetition_penalty=given("repetition_penalty"),
        presence_penalty=given("presence_penalty"),
        frequency_penalty=given("frequency_penalty"),
        logit_bias=body.logit_bias or defaults.logit_bias,
        # Each choice its own seed, still one of 64 bits: n equal replies would serve nobody.
        seed=None if seed is None else (seed + index + 2**63) % 2**64 - 2**63,
    )

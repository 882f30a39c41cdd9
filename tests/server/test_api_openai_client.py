"""The official `openai` client against the app: replies, streams, and errors as its own classes."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from kvserve.core.errors import NotReady, QueueFull, RequestFailed
from tests.server.api_fakes import MODEL, FakeTurns, make_app

pytestmark = pytest.mark.anyio
USER: Any = [{"role": "user", "content": "hello"}]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def client_of(turns: FakeTurns) -> openai.AsyncOpenAI:
    http: Any = httpx.AsyncClient(transport=httpx.ASGITransport(make_app(turns)))
    return openai.AsyncOpenAI(
        base_url="http://test/v1", api_key="sk-1", http_client=http, max_retries=0
    )


async def test_it_parses_a_reply_with_its_headers_and_usage() -> None:
    async with client_of(FakeTurns()) as client:
        raw = await client.chat.completions.with_raw_response.create(
            model=MODEL, messages=USER, extra_headers={"X-Conversation-Id": "chat-1"}
        )
        reply = raw.parse()
    assert raw.headers["x-conv-id"] == "chat-1"
    assert reply.choices[0].message.content == "Hello wörld"
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage is not None
    assert reply.usage.prompt_tokens_details is not None
    assert reply.usage.prompt_tokens_details.cached_tokens == 30


async def test_a_reply_can_be_sent_back_as_it_came() -> None:
    turns = FakeTurns()
    async with client_of(turns) as client:
        reply = await client.chat.completions.create(model=MODEL, messages=USER)
        message: Any = reply.choices[0].message
        for sent_back in (message, message.model_dump(), message.model_dump(exclude_none=True)):
            await client.chat.completions.create(model=MODEL, messages=[*USER, sent_back, *USER])
    for request in turns.asked[1:]:
        assert request.messages[1] == {"role": "assistant", "content": "Hello wörld"}


async def test_it_parses_a_stream() -> None:
    async with client_of(FakeTurns()) as client:
        stream = await client.chat.completions.create(
            model=MODEL, messages=USER, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    text = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(text) == "Hello wörld"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 46


@pytest.mark.parametrize(
    ("error", "expected"),
    [(QueueFull("full"), openai.RateLimitError), (NotReady("no"), openai.InternalServerError)],
)
async def test_refusals_of_a_busy_server_are_its_own_classes(
    error: Exception, expected: type[openai.APIStatusError]
) -> None:
    async with client_of(FakeTurns(start_error=error)) as client:
        with pytest.raises(expected) as caught:
            await client.chat.completions.create(model=MODEL, messages=USER, stream=True)
    if isinstance(error, QueueFull):
        assert caught.value.response.headers["retry-after"] == "1"
        assert caught.value.code == "queue_full"


async def test_wrong_requests_are_its_own_classes() -> None:
    async with client_of(FakeTurns()) as client:
        with pytest.raises(openai.BadRequestError) as bad:
            await client.chat.completions.create(model=MODEL, messages=USER, logprobs=True)
        with pytest.raises(openai.NotFoundError) as missing:
            await client.chat.completions.create(model="gpt-9", messages=USER)
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("gpt-9")
        assert [model.id async for model in client.models.list()] == [MODEL]
    assert bad.value.param == "logprobs"
    assert missing.value.code == "model_not_found"


async def test_an_error_within_a_stream_is_raised_from_it() -> None:
    turns = FakeTurns(error=RequestFailed("It broke."), error_after=2)
    async with client_of(turns) as client:
        stream = await client.chat.completions.create(model=MODEL, messages=USER, stream=True)
        with pytest.raises(openai.APIError, match=r"It broke\."):
            async for _ in stream:
                pass

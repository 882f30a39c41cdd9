"""Asking a real server, in few words: messages, one request with its figures, a cold reference.

Not a test module.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import openai
from openai.types.chat import ChatCompletion

Message = dict[str, str]

_salts = itertools.count()


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def system(text: str) -> Message:
    return {"role": "system", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


@dataclass
class Answer:
    """A reply with its figures; the headers' and the usage's agree (checked in `ask`)."""

    text: str
    finish_reason: str
    num_cached: int
    num_prefill: int
    num_reply: int
    headers: Mapping[str, str]

    @property
    def num_prompt(self) -> int:
        return self.num_cached + self.num_prefill

    @property
    def conversation_id(self) -> str:
        return self.headers["x-conv-id"]

    @property
    def kv(self) -> str:
        return self.headers["x-conv-kv"]

    @property
    def miss_reason(self) -> str | None:
        return self.headers.get("x-conv-miss-reason")


def ask(
    client: openai.OpenAI,
    messages: Sequence[Message],
    conversation: str | None = None,
    *,
    max_tokens: int = 12,
    **how: Any,
) -> Answer:
    """Send the history, greedily; `how` are further fields of the body."""
    body: Any = {"max_tokens": max_tokens, "messages": list(messages), "model": None, **how}
    extra = {name: body.pop(name) for name in ("cache_salt",) if name in body}
    headers = {} if conversation is None else {"X-Conversation-Id": conversation}
    body["model"] = client.models.list().data[0].id
    raw = client.chat.completions.with_raw_response.create(
        **body, extra_body=extra, extra_headers=headers
    )
    reply: ChatCompletion = raw.parse()
    return checked(reply, raw.headers)


def checked(reply: ChatCompletion, headers: Mapping[str, str]) -> Answer:
    """Return the answer; headers and usage must tell the same."""
    usage, choice = reply.usage, reply.choices[0]
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    cached = int(headers["x-conv-cached-tokens"])
    assert usage.prompt_tokens_details.cached_tokens == cached
    prefill = int(headers["x-conv-processing-tokens"])
    assert cached >= 0 and prefill >= 1
    assert cached + prefill == usage.prompt_tokens
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    text = choice.message.content
    assert text is not None
    return Answer(text, choice.finish_reason, cached, prefill, usage.completion_tokens, headers)


def cold(client: openai.OpenAI, messages: Sequence[Message], **how: Any) -> Answer:
    """Ask where nothing has been stored: in a namespace of its own."""
    answer = ask(client, messages, cache_salt=f"cold-{next(_salts)}", **how)
    assert answer.num_cached == 0
    return answer

"""The wire shape of replies: completions, chunks of a stream, usage, and the `X-Conv-*` headers.

Stateless and pure; values in, JSON-able values out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvserve.core.types import Finished

if TYPE_CHECKING:
    from kvserve.chat.turn import Turn


@dataclass(frozen=True, slots=True)
class ReplyHead:
    """What all pieces of one reply have in common; `created` in unix seconds."""

    id: str
    created: int
    model: str
    fingerprint: str

    def fields(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": f"fp_{self.fingerprint[:12]}",
        }


def conversation_headers(turn: Turn) -> dict[str, str]:
    """Return the `X-Conv-*` headers of a turn; those without a value are absent."""
    headers = {
        "X-Conv-KV": str(turn.kv),
        "X-Conv-Cached-Tokens": str(turn.num_cached),
        "X-Conv-Processing-Tokens": str(turn.num_prefill),
    }
    if turn.conversation_id is not None:
        headers["X-Conv-Id"] = turn.conversation_id
    if turn.miss_reason is not None:
        headers["X-Conv-Miss-Reason"] = turn.miss_reason
    return headers


def usage(turn: Turn, finished: Sequence[Finished]) -> dict[str, Any]:
    """Return the usage of a request: prompt and speed of its first choice, replies of all.

    `finished` are the ends of the choices in the order of their index.
    """
    num_prompt = turn.num_cached + turn.num_prefill
    num_reply = sum(len(end.token_ids) for end in finished)
    first = finished[0]
    speed = len(first.token_ids) / first.decode_s if first.decode_s > 0 else 0.0
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_reply,
        "total_tokens": num_prompt + num_reply,
        "prompt_tokens_details": {"cached_tokens": turn.num_cached},
        "completion_tokens_details": {"reasoning_tokens": 0},
        "input_tokens_details": {"cached_tokens": turn.num_cached},
        "tokens_per_second": round(speed, 2),
    }


def completion(
    head: ReplyHead, turn: Turn, texts: Sequence[str], finished: Sequence[Finished]
) -> dict[str, Any]:
    """Return the body of a reply that is not streamed."""
    choices: list[dict[str, Any]] = [
        {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None, "annotations": []},
            "logprobs": None,
            "finish_reason": str(end.reason),
        }
        for index, (text, end) in enumerate(zip(texts, finished, strict=True))
    ]
    return {
        **head.fields("chat.completion"),
        "choices": choices,
        "usage": usage(turn, finished),
        "metadata": {"conversation_id": turn.conversation_id},
    }


def chunk(
    head: ReplyHead,
    index: int,
    delta: Mapping[str, str],
    *,
    finish_reason: str | None = None,
    with_usage: bool = False,
) -> dict[str, Any]:
    """Return one piece of a streamed choice; `with_usage` where a usage chunk will follow."""
    choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
    body = {**head.fields("chat.completion.chunk"), "choices": [choice]}
    return {**body, "usage": None} if with_usage else body


def usage_chunk(head: ReplyHead, turn: Turn, finished: Sequence[Finished]) -> dict[str, Any]:
    return {
        **head.fields("chat.completion.chunk"),
        "choices": [],
        "usage": usage(turn, finished),
    }

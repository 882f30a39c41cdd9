"""Wire messages in the one form that templates and digests see. Pure; any thread.

Two chains of digests are made from them, for two questions. `exact_chain`: would the template get
the very same input? `identity_chain`: does a person mean the same conversation? The second forgives
what clients lose on the way back: reasoning, and white space around a reply.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kvserve.core.errors import InvalidRequest

DIGEST_BYTES = 16
MAX_DEPTH = 64
_IDENTITY_FIELDS = ("role", "name", "tool_calls", "tool_call_id")


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return `messages` with contents as strings, tool arguments as objects and no None fields.

    Raises `InvalidRequest` naming the content part that is not text, or the field whose text
    cannot be written as UTF-8.
    """
    if not messages:
        raise InvalidRequest("messages must hold at least one message.", param="messages")
    plain = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        fields = {name: value for name, value in message.items() if value is not None}
        if isinstance(fields.get("content"), (list, tuple)):
            fields["content"] = _joined(fields["content"], f"{where}.content")
        if fields.get("tool_calls"):
            # Clients send null beside tool calls; templates expect a string or raise (Qwen3).
            fields.setdefault("content", "")
            fields["tool_calls"] = [_with_object_arguments(call) for call in fields["tool_calls"]]
        check_text(fields, where)
        plain.append(fields)
    return plain


def check_text(value: Any, where: str, *, depth: int = MAX_DEPTH) -> None:
    """Raise `InvalidRequest` naming the first string in `value` that is not valid Unicode.

    JSON can spell half of a surrogate pair (`"\\ud800"`), which no tokenizer can encode. Refuses
    values nested deeper than `depth` too, which would exhaust the stack further on.
    """
    if depth < 0:
        raise InvalidRequest(f"{where.partition('.')[0]} is nested too deeply.", param=where[:40])
    if isinstance(value, str):
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                message = f"{where} holds half of a surrogate pair, which is not valid Unicode."
                raise InvalidRequest(message, param=where) from None
    elif isinstance(value, Mapping):
        for name, item in value.items():
            check_text(name, where, depth=depth - 1)
            check_text(item, f"{where}.{name}", depth=depth - 1)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            check_text(item, f"{where}[{index}]", depth=depth - 1)


def exact_chain(
    messages: Iterable[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None,
    template_kwargs: Mapping[str, Any],
) -> list[bytes]:
    """Return for each k in [0, n] the digest of all that a rendering of `messages[:k]` sees."""
    return _chain(digest([tools, dict(template_kwargs)]), messages)


def identity_chain(messages: Iterable[Mapping[str, Any]]) -> tuple[bytes, ...]:
    """Return for each k in [0, n] the digest of the conversation `messages[:k]`."""
    return tuple(_chain(b"", (_identity(message) for message in messages)))


def extend_identity(last: bytes, message: Mapping[str, Any]) -> bytes:
    """Return the digest that follows `last` in an identity chain."""
    return _chain(last, [_identity(message)])[-1]


def digest(value: Any) -> bytes:
    """Return a digest of a JSON value. The order of keys counts: templates print in it."""
    return _hash(b"", value)


def _chain(first: bytes, values: Iterable[Any]) -> list[bytes]:
    chain = [first]
    for value in values:
        chain.append(_hash(chain[-1], value))
    return chain


def _hash(before: bytes, value: Any) -> bytes:
    # ensure_ascii spells lone surrogates as escapes, so that digests never fail on them.
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), default=repr)
    return hashlib.blake2b(before + text.encode("ascii"), digest_size=DIGEST_BYTES).digest()


def _identity(message: Mapping[str, Any]) -> list[Any]:
    content = message.get("content") or ""
    if message.get("role") == "assistant" and isinstance(content, str):
        content = content.strip()
    return [content, *(message.get(name) for name in _IDENTITY_FIELDS)]


def _joined(parts: Sequence[Any], where: str) -> str:
    texts = []
    for index, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text":
            raise InvalidRequest(
                f"{where}[{index}].type must be 'text': this model reads text only.",
                param=f"{where}[{index}].type",
            )
        text = part.get("text")
        if not isinstance(text, str):
            raise InvalidRequest(
                f"{where}[{index}].text must be a string.", param=f"{where}[{index}].text"
            )
        texts.append(text)
    return "".join(texts)


def _with_object_arguments(call: Any) -> Any:
    """OpenAI spells arguments as a JSON string; templates expect the object (Qwen3.5 raises)."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    if not isinstance(arguments, dict):
        return call
    return {**call, "function": {**function, "arguments": arguments}}

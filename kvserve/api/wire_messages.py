"""The wire shape of one chat message, as OpenAI's clients send it back from earlier replies.

Stateless and pure. Text parts are joined here, so that what lies below sees a string; nothing else
about a message is changed but `developer`, which is today's name of `system`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, model_validator

from kvserve.api.validation import Wire, accepts, described, refusal, shortened

_CONTENT = "a string or a list of text parts"
_PART_FIELDS = {"type", "text", "refusal", "cache_control"}


def text_of(content: Any) -> str | None:
    """Return a message's content as one string; `None` stays `None`.

    Parts are joined without anything between them, as the chat templates do that take parts.
    """
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise refusal(f"must be {_CONTENT}, not {described(content)}")
    if not content:
        raise refusal(f"must be {_CONTENT}, not an empty list")
    return "".join(_text_of_part(part, f"[{i}]") for i, part in enumerate(content))


def _text_of_part(part: Any, at: str) -> str:
    if not isinstance(part, dict):
        raise refusal(f"must be a text part, not {described(part)}", at=at)
    kind = part.get("type")
    if kind not in ("text", "refusal"):
        raise refusal(
            f'must be "text", the only kind of part this model takes, not {described(kind)}',
            at=f"{at}.type",
        )
    if unknown := next((name for name in part if name not in _PART_FIELDS), None):
        raise refusal("is not a field of a text part", at=f"{at}.{shortened(unknown)}")
    text = part.get(kind)
    if not isinstance(text, str):
        raise refusal(f"must be a string, not {described(text)}", at=f"{at}.{kind}")
    return text


Text = Annotated[str | None, accepts("a string or null")]
Null = Annotated[None, accepts("null: this model takes text only")]


class FunctionCall(Wire):
    name: Annotated[str, accepts("a string")]
    arguments: Annotated[str, accepts("a string of JSON")]


class ToolCall(Wire):
    """A call that an earlier reply made. `index` is left over from streamed pieces and ignored."""

    id: Annotated[str, accepts("a string")]
    type: Annotated[Literal["function"], accepts('"function"')] = "function"
    function: FunctionCall
    index: Any = None


class Message(Wire):
    """One message of the history.

    Clients give back what they were given, so the empty extras of a reply (`refusal`, `audio`,
    `annotations`, `function_call`) are taken as long as they are empty. `cache_control` never
    changes an answer: everything is cached anyway.
    """

    role: Annotated[
        Literal["system", "developer", "user", "assistant", "tool"],
        accepts("one of system, developer, user, assistant, tool"),
    ]
    content: Annotated[str | None, PlainValidator(text_of)] = None
    name: Annotated[str | None, Field(max_length=256), accepts("a string of up to 256")] = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=1024)] | None = None
    tool_call_id: Text = None
    reasoning_content: Text = None
    refusal: Null = None
    audio: Null = None
    function_call: Null = None
    annotations: Annotated[
        Annotated[list[Any], Field(max_length=0)] | None, accepts("null or an empty list")
    ] = None
    cache_control: Any = None

    @model_validator(mode="after")
    def check_role(self) -> Message:
        if self.role != "assistant":
            for field in ("tool_calls", "reasoning_content"):
                if getattr(self, field):
                    raise refusal("belongs to messages of the role assistant", at=f".{field}")
        if self.role == "tool" and not self.tool_call_id:
            raise refusal("is required of the role tool", at=".tool_call_id")
        if self.role != "tool" and self.tool_call_id is not None:
            raise refusal("belongs to messages of the role tool", at=".tool_call_id")
        if self.content is None and not (self.tool_calls or self.reasoning_content):
            raise refusal(f"must be {_CONTENT}", at=".content")
        return self

    def as_dict(self) -> dict[str, Any]:
        """Return the message as templates know it; fields that were not sent are absent."""
        message: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": self.content,
        }
        if self.name is not None:
            message["name"] = self.name
        if self.tool_calls:
            message["tool_calls"] = [call.model_dump(exclude={"index"}) for call in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        if self.reasoning_content is not None:
            message["reasoning_content"] = self.reasoning_content
        return message

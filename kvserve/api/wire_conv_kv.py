"""The wire shapes of `/v1/conv_kv`: which fields, of which type, in which range.

Stateless and pure. As for chat requests, every other field is refused by its name.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, FailFast, Field, PlainValidator, model_validator

from kvserve.api.validation import Wire, accepts, check_depth, refusal
from kvserve.api.wire import MAX_MESSAGES, Flag, Number, Tool, conversation_name
from kvserve.api.wire_messages import Message

MAX_TTL_S = 10 * 365 * 86_400

Name = Annotated[str | None, accepts("a string")]
Index = Annotated[int | None, Field(ge=0), accepts("the index of a message: an integer from 0 on")]
Ttl = Annotated[
    Number | None,
    Field(gt=0, le=MAX_TTL_S),
    accepts(f"a number of seconds above 0 and up to {MAX_TTL_S} (ten years)"),
]


class NamedConversation(Wire):
    """The conversation that a body names; headers may name it instead."""

    conversation: Annotated[str | None, PlainValidator(conversation_name)] = None
    conversation_id: Name = None


class LoadRequest(NamedConversation):
    pass


class SaveRequest(NamedConversation):
    title: Annotated[
        str | None, Field(min_length=1, max_length=256), accepts("a string of 1 to 256 characters")
    ] = None


class ForkRequest(Wire):
    """`at_message` is the index of the last message that the new conversation keeps."""

    new_id: Name = None
    at_message: Index = None


class RollbackRequest(Wire):
    """`to_message` is the index of the last message that stays."""

    to_message: Index = None
    drop_turns: Annotated[int | None, Field(ge=1), accepts("an integer of at least 1")] = None

    @model_validator(mode="after")
    def check_one(self) -> RollbackRequest:
        if (self.to_message is None) == (self.drop_turns is None):
            raise refusal("must hold exactly one of to_message and drop_turns")
        return self


class PinRequest(Wire):
    ttl_s: Ttl = None


class WarmRequest(Wire):
    """A prompt without a reply. The last two shape prompts and their sharing as in chat."""

    messages: Annotated[list[Message], FailFast(), Field(min_length=1, max_length=MAX_MESSAGES)]
    model: Name = None
    tools: Annotated[list[Tool] | None, Field(max_length=1024)] = None
    ttl_s: Ttl = None
    pin: Flag = None
    chat_template_kwargs: Annotated[
        Annotated[dict[str, Any] | None, accepts("an object")], AfterValidator(check_depth)
    ] = None
    cache_salt: Annotated[
        str | None, Field(min_length=1, max_length=256), accepts("a string of 1 to 256 characters")
    ] = None

    @property
    def tool_definitions(self) -> tuple[dict[str, Any], ...] | None:
        """The tools as templates know them; fields that were not sent are absent."""
        if not self.tools:
            return None
        return tuple(tool.model_dump(exclude_unset=True) for tool in self.tools)

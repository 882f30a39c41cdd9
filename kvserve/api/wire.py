"""The wire shape of `POST /v1/chat/completions`: which fields, of which type, in which range.

Stateless and pure. Every field that OpenAI's API or its common extensions know is here in one of
three kinds: used; of no influence on the answer, and so taken without a look; or not possible yet,
and so refused by name unless it holds the value that asks for nothing. All others are unknown.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, FailFast, Field, PlainValidator, model_validator

from kvserve.api.validation import Wire, accepts, check_depth, described, refusal, shortened
from kvserve.api.wire_messages import Message

MAX_MESSAGES = 65_536
MAX_CHOICES = 8
_MAX_STOPS = 16
_MAX_STOP_CHARACTERS = 1_000
_TOKEN_ID = re.compile(r"[0-9]{1,10}")


def stop_strings(value: Any) -> tuple[str, ...]:
    """Return the stop strings of a string, a list of strings or null."""
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > _MAX_STOPS:
        raise refusal(f"must be a string or a list of up to {_MAX_STOPS} strings")
    for i, stop in enumerate(stops):
        if not isinstance(stop, str) or not 0 < len(stop) <= _MAX_STOP_CHARACTERS:
            raise refusal(
                f"must be a string of 1 to {_MAX_STOP_CHARACTERS} characters, "
                f"not {described(stop)}",
                at=f"[{i}]" if isinstance(value, list) else "",
            )
    return tuple(stops)


def token_biases(value: Any) -> dict[int, float]:
    """Return the map of `logit_bias` with its keys as token ids."""
    accepted = "must be an object of token ids to numbers from -100 to 100"
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > 65_536:
        raise refusal(f"{accepted}, not {described(value)}")
    for key, bias in value.items():
        number = isinstance(bias, (int, float)) and not isinstance(bias, bool)
        if not _TOKEN_ID.fullmatch(key) or not number or not -100 <= bias <= 100:
            raise refusal(accepted, at=f".{shortened(key)}")
    return {int(key): float(bias) for key, bias in value.items()}


def conversation_name(value: Any) -> str | None:
    """Return the id of `"id"` or `{"id": "id"}`; its characters are checked elsewhere."""
    if value is None:
        return None
    name = value["id"] if isinstance(value, dict) and set(value) == {"id"} else value
    if isinstance(name, str):
        return name
    raise refusal('must be a string or an object {"id": string}')


def no_request(value: bool | None) -> bool | None:
    if value:
        raise ValueError
    return value


Number = Annotated[float, Field(allow_inf_nan=False)]
NullOnly = Annotated[None, accepts("null: this is not supported")]
Flag = Annotated[bool | None, accepts("true or false")]
Penalty = Annotated[Number | None, Field(ge=-2, le=2), accepts("a number from -2 to 2")]
MaxTokens = Annotated[int | None, Field(ge=1), accepts("an integer of at least 1")]


class StreamOptions(Wire):
    """`include_obfuscation` only pads what OpenAI sends; it changes no answer."""

    include_usage: Flag = None
    include_obfuscation: Flag = None


class FunctionDefinition(Wire):
    name: Annotated[str, Field(min_length=1, max_length=256), accepts("a string of 1 to 256")]
    description: Annotated[str | None, accepts("a string or null")] = None
    parameters: Annotated[
        Annotated[dict[str, Any] | None, accepts("an object")], AfterValidator(check_depth)
    ] = None
    strict: Flag = None


class Tool(Wire):
    type: Annotated[Literal["function"], accepts('"function"')]
    function: FunctionDefinition


class ResponseFormat(Wire):
    type: Annotated[Literal["text"], accepts('"text", the only format supported')]


class ChatRequest(Wire):
    """A request for one or more replies to a history."""

    messages: Annotated[list[Message], FailFast(), Field(min_length=1, max_length=MAX_MESSAGES)]
    model: Annotated[str | None, accepts("a string")] = None
    stream: Flag = None
    stream_options: StreamOptions | None = None
    n: Annotated[
        int | None, Field(ge=1, le=MAX_CHOICES), accepts(f"an integer from 1 to {MAX_CHOICES}")
    ] = None
    temperature: Annotated[Number | None, Field(ge=0, le=2), accepts("a number from 0 to 2")] = None
    top_p: Annotated[Number | None, Field(gt=0, le=1), accepts("a number above 0 and up to 1")] = (
        None
    )
    top_k: Annotated[
        int | None, Field(ge=-1, lt=2**31), accepts("an integer of at least 0, or -1 for off")
    ] = None
    min_p: Annotated[Number | None, Field(ge=0, le=1), accepts("a number from 0 to 1")] = None
    presence_penalty: Penalty = None
    frequency_penalty: Penalty = None
    repetition_penalty: Annotated[
        Number | None, Field(gt=0, le=2), accepts("a number above 0 and up to 2")
    ] = None
    logit_bias: Annotated[dict[int, float], PlainValidator(token_biases)] = Field(
        default_factory=dict
    )
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63), accepts("an integer of 64 bits")] = (
        None
    )
    max_tokens: MaxTokens = None
    max_completion_tokens: MaxTokens = None
    stop: Annotated[tuple[str, ...], PlainValidator(stop_strings)] = ()
    tools: Annotated[list[Tool] | None, Field(max_length=1024)] = None
    tool_choice: Annotated[
        Literal["none", "auto"] | None, accepts('"none": tools cannot be called yet')
    ] = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: Annotated[
        Annotated[dict[str, Any] | None, accepts("an object")], AfterValidator(check_depth)
    ] = None
    # Which conversation, and who may share its state
    conversation: Annotated[str | None, PlainValidator(conversation_name)] = None
    conversation_id: Annotated[str | None, accepts("a string")] = None
    reset_conversation: Flag = None
    cache_salt: Annotated[
        str | None, Field(min_length=1, max_length=256), accepts("a string of 1 to 256 characters")
    ] = None
    # Not possible yet: refused unless they ask for nothing
    logprobs: Annotated[
        bool | None, AfterValidator(no_request), accepts("false: log probabilities are not given")
    ] = None
    top_logprobs: Annotated[
        int | None, Field(ge=0, le=0), accepts("0: log probabilities are not given")
    ] = None
    modalities: Annotated[list[Literal["text"]] | None, accepts('["text"]')] = None
    reasoning_effort: NullOnly = None
    verbosity: NullOnly = None
    audio: NullOnly = None
    functions: NullOnly = None
    function_call: NullOnly = None
    web_search_options: NullOnly = None
    # Of no influence on the answer
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    prediction: Any = None
    parallel_tool_calls: Any = None

    @model_validator(mode="after")
    def check_together(self) -> ChatRequest:
        if self.stream_options is not None and not self.stream:
            raise refusal('is only possible with "stream": true', at=".stream_options")
        if self.tools and self.tool_choice != "none":
            raise refusal('must be "none": tools cannot be called yet', at=".tool_choice")
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) == 2:
            raise refusal(
                "must equal 'max_completion_tokens' when both are given", at=".max_tokens"
            )
        return self

    @property
    def max_reply_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def tool_definitions(self) -> tuple[dict[str, Any], ...] | None:
        """The tools as templates know them; fields that were not sent are absent."""
        if not self.tools:
            return None
        return tuple(tool.model_dump(exclude_unset=True) for tool in self.tools)

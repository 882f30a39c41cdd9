"""What a chat request may hold: each field's accepted values, refused ones, and the words used."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from kvserve.api.validation import check_depth, invalid_request
from kvserve.api.wire import MAX_MESSAGES, ChatRequest
from kvserve.core.errors import InvalidRequest

USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}


def accepted(**fields: Any) -> ChatRequest:
    return ChatRequest.model_validate({"messages": [USER]} | fields)


def refused(**fields: Any) -> InvalidRequest:
    with pytest.raises(ValidationError) as caught:
        accepted(**fields)
    return invalid_request(caught.value)


def refused_message(**message: Any) -> InvalidRequest:
    return refused(messages=[USER, USER, message])


NUMBERS = {
    "temperature": (0, 2, -0.01, 2.01),
    "top_p": (0.01, 1, 0, 1.01),
    "min_p": (0, 1, -0.01, 1.01),
    "presence_penalty": (-2, 2, -2.01, 2.01),
    "frequency_penalty": (-2, 2, -2.01, 2.01),
    "repetition_penalty": (0.01, 2, 0, 2.01),
}
INTEGERS = {
    "n": (1, 8, 0, 9),
    "top_k": (-1, 2**31 - 1, -2, 2**31),
    "seed": (-(2**63), 2**63 - 1, -(2**63) - 1, 2**63),
    "max_tokens": (1, 10**9, 0, -1),
    "max_completion_tokens": (1, 10**9, 0, -1),
}
STRINGS = ("model", "conversation_id", "cache_salt")
FLAGS = ("stream", "reset_conversation")


@pytest.mark.parametrize("field", [*NUMBERS, *INTEGERS])
def test_a_number_is_taken_within_its_range_only(field: str) -> None:
    lowest, highest, below, above = (NUMBERS | INTEGERS)[field]
    for value in (lowest, highest, None):
        assert getattr(accepted(**{field: value}), field) == value
    for value in (below, above, float("nan"), float("inf"), -float("inf")):
        error = refused(**{field: value})
        assert error.param == field
        assert error.message.startswith(f"'{field}' must be a")


@pytest.mark.parametrize("field", [*NUMBERS, *INTEGERS])
@pytest.mark.parametrize("value", ["1", True, [1], {"a": 1}, ""])
def test_a_number_is_never_made_of_something_else(field: str, value: Any) -> None:
    assert refused(**{field: value}).param == field


@pytest.mark.parametrize("field", INTEGERS)
def test_an_integer_is_never_made_of_a_fraction(field: str) -> None:
    assert refused(**{field: 1.5}).param == field


@pytest.mark.parametrize("field", [*STRINGS, "conversation"])
@pytest.mark.parametrize("value", [1, True, ["a"], {"a": "b"}])
def test_a_string_field_takes_only_a_string(field: str, value: Any) -> None:
    assert refused(**{field: value}).param == field


@pytest.mark.parametrize("field", FLAGS)
@pytest.mark.parametrize("value", [1, 0, "true", [], {}])
def test_a_flag_takes_only_true_and_false(field: str, value: Any) -> None:
    assert refused(**{field: value}).param == field


@pytest.mark.parametrize(
    ("field", "harmless", "wrong"),
    [
        ("logprobs", [None, False], [True, 0, "no"]),
        ("top_logprobs", [None, 0], [1, False, "0"]),
        ("modalities", [None, ["text"]], [["audio"], "text", 1]),
        ("response_format", [None, {"type": "text"}], [{"type": "json_object"}, "text", {}]),
        ("tool_choice", [None, "none", "auto"], ["required", {"type": "function"}, 1]),
        ("reasoning_effort", [None], ["low", 1]),
        ("verbosity", [None], ["low"]),
        ("audio", [None], [{"voice": "alloy"}]),
        ("functions", [None], [[]]),
        ("function_call", [None], ["auto"]),
        ("web_search_options", [None], [{}]),
    ],
)
def test_what_is_not_supported_is_refused_by_name_unless_it_asks_for_nothing(
    field: str, harmless: list[Any], wrong: list[Any]
) -> None:
    for value in harmless:
        accepted(**{field: value})
    for value in wrong:
        error = refused(**{field: value})
        assert (error.param or "").startswith(field)
        assert field in error.message


@pytest.mark.parametrize(
    "field",
    [
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "prediction",
        "parallel_tool_calls",
    ],
)
@pytest.mark.parametrize("value", [None, "a", 1, {"a": [1]}])
def test_what_never_changes_the_answer_is_taken_without_a_look(field: str, value: Any) -> None:
    accepted(**{field: value})


def test_an_unknown_field_is_refused_by_name() -> None:
    error = refused(temprature=1)
    assert error.param == "temprature"
    assert "temperature" in error.message


def test_an_unknown_field_is_not_echoed_at_length() -> None:
    error = refused(**{"x" * 10_000_000: 1})
    assert len(error.message) + len(error.param or "") < 2000


@pytest.mark.parametrize(
    ("value", "stops"),
    [(None, ()), ("a", ("a",)), (["a", "b"], ("a", "b")), ([], ()), (["x"] * 16, ("x",) * 16)],
)
def test_stop_is_a_string_or_a_list_of_strings(value: Any, stops: tuple[str, ...]) -> None:
    assert accepted(stop=value).stop == stops


@pytest.mark.parametrize(
    ("value", "param"),
    [
        ("", "stop"),
        ([""], "stop[0]"),
        (["a", 1], "stop[1]"),
        (["x"] * 17, "stop"),
        (1, "stop"),
        ({}, "stop"),
        (["a", None], "stop[1]"),
        ("x" * 1001, "stop"),
    ],
)
def test_stop_that_is_empty_or_no_string_is_refused(value: Any, param: str) -> None:
    assert refused(stop=value).param == param


def test_logit_bias_maps_token_ids_to_numbers() -> None:
    assert accepted(logit_bias={"5": -100, "17": 1.5}).logit_bias == {5: -100.0, 17: 1.5}
    assert accepted(logit_bias=None).logit_bias == {}


@pytest.mark.parametrize(
    ("value", "param"),
    [
        ({"a": 1}, "logit_bias.a"),
        ({"5": 101}, "logit_bias.5"),
        ({"5": True}, "logit_bias.5"),
        ({"-1": 1}, "logit_bias.-1"),
        ({"5": "1"}, "logit_bias.5"),
        ([1], "logit_bias"),
        ({"٣": 1}, "logit_bias.٣"),
        ({"5": float("nan")}, "logit_bias.5"),
        ("5", "logit_bias"),
    ],
)
def test_logit_bias_of_anything_else_is_refused(value: Any, param: str) -> None:
    assert refused(logit_bias=value).param == param


def test_conversation_is_a_string_or_an_object_with_an_id() -> None:
    assert accepted(conversation="a").conversation == "a"
    assert accepted(conversation={"id": "a"}).conversation == "a"
    assert accepted(conversation=None).conversation is None
    for wrong in ({}, {"id": 1}, {"id": None}, {"id": "a", "more": 1}, {"id": {"id": "a"}}):
        assert refused(conversation=wrong).param == "conversation"


def test_cache_salt_has_up_to_256_characters() -> None:
    accepted(cache_salt="x" * 256)
    assert refused(cache_salt="x" * 257).param == "cache_salt"
    assert refused(cache_salt="").param == "cache_salt"


def test_both_token_limits_must_agree() -> None:
    assert accepted(max_tokens=5).max_reply_tokens == 5
    assert accepted(max_tokens=5, max_completion_tokens=5).max_reply_tokens == 5
    assert refused(max_tokens=5, max_completion_tokens=6).param == "max_tokens"


def test_stream_options_belong_to_streams() -> None:
    assert accepted(stream=True, stream_options={"include_usage": True}).include_usage
    assert refused(stream_options={"include_usage": True}).param == "stream_options"
    error = refused(stream=True, stream_options={"include_usage": 1})
    assert error.param == "stream_options.include_usage"
    assert refused(stream=True, stream_options={"usage": True}).param == "stream_options.usage"
    assert refused(stream=True, stream_options=[]).param == "stream_options"


def test_tools_are_shown_to_the_model_but_never_called() -> None:
    assert accepted(tools=[TOOL], tool_choice="none").tool_definitions == (TOOL,)
    assert accepted(tools=[]).tool_definitions is None
    for choice in (None, "auto"):
        error = refused(tools=[TOOL], tool_choice=choice)
        assert error.param == "tool_choice"
        assert '"none"' in error.message


@pytest.mark.parametrize(
    ("tool", "param"),
    [
        (1, "tools[0]"),
        ({"type": "code", "function": {"name": "a"}}, "tools[0].type"),
        ({"type": "function"}, "tools[0].function"),
        ({"type": "function", "function": {"name": ""}}, "tools[0].function.name"),
        (
            {"type": "function", "function": {"name": "a", "parameters": 1}},
            "tools[0].function.parameters",
        ),
        ({"type": "function", "function": {"name": "a", "x": 1}}, "tools[0].function.x"),
    ],
)
def test_a_tool_of_another_shape_is_refused(tool: Any, param: str) -> None:
    assert refused(tools=[tool], tool_choice="none").param == param


def test_template_variables_are_an_object() -> None:
    assert accepted(chat_template_kwargs={"enable_thinking": False}).chat_template_kwargs
    assert refused(chat_template_kwargs=[1]).param == "chat_template_kwargs"


def test_free_form_objects_may_not_nest_without_end() -> None:
    deep: dict[str, Any] = {}
    for _ in range(900):
        deep = {"a": deep}
    assert refused(chat_template_kwargs=deep).param == "chat_template_kwargs"
    tool = {"type": "function", "function": {"name": "a", "parameters": deep}}
    assert refused(tools=[tool], tool_choice="none").param == "tools[0].function.parameters"
    shallow = {"a": [{"b": [1, 2, {"c": "d"}]}]}
    assert check_depth(shallow) == shallow


@pytest.mark.parametrize("messages", [None, "hi", {}, 1, True])
def test_messages_must_be_a_list(messages: Any) -> None:
    error = refused(messages=messages)
    assert (error.param, error.message) == ("messages", "'messages' must be a list.")


def test_messages_must_be_there_and_not_empty() -> None:
    assert refused(messages=[]).message == "'messages' must have at least 1 item(s)."
    with pytest.raises(ValidationError) as caught:
        ChatRequest.model_validate({})
    assert invalid_request(caught.value).message == "'messages' is required."
    assert refused(messages=[USER] * (MAX_MESSAGES + 1)).param == "messages"


@pytest.mark.parametrize("body", [[], "a", 1, None, True])
def test_a_body_that_is_no_object_is_refused(body: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        ChatRequest.model_validate(body)
    error = invalid_request(caught.value)
    assert (error.param, error.message) == (None, "The body must be an object.")


@pytest.mark.parametrize(
    ("message", "at"),
    [
        ({"role": "wizard", "content": "a"}, ".role"),
        ({"role": "function", "content": "a", "name": "f"}, ".role"),
        ({"role": None, "content": "a"}, ".role"),
        ({"role": ["user"], "content": "a"}, ".role"),
        ({"content": "a"}, ".role"),
        ({"role": "user"}, ".content"),
        ({"role": "user", "content": None}, ".content"),
        ({"role": "system", "content": None}, ".content"),
        ({"role": "assistant"}, ".content"),
        ({"role": "user", "content": 1}, ".content"),
        ({"role": "user", "content": {"type": "text"}}, ".content"),
        ({"role": "user", "content": []}, ".content"),
        ({"role": "user", "content": ["a"]}, ".content[0]"),
        ({"role": "user", "content": [{"type": "text"}]}, ".content[0].text"),
        ({"role": "user", "content": [{"type": "text", "text": 1}]}, ".content[0].text"),
        ({"role": "user", "content": [{"text": "a"}]}, ".content[0].type"),
        ({"role": "user", "content": [{"type": "text", "text": "a", "x": 1}]}, ".content[0].x"),
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]},
            ".content[1].type",
        ),
        ({"role": "user", "content": "a", "name": 1}, ".name"),
        ({"role": "user", "content": "a", "nmae": "x"}, ".nmae"),
        ({"role": "user", "content": "a", "tool_calls": [CALL]}, ".tool_calls"),
        ({"role": "user", "content": "a", "tool_call_id": "c"}, ".tool_call_id"),
        ({"role": "user", "content": "a", "reasoning_content": "r"}, ".reasoning_content"),
        ({"role": "tool", "content": "a"}, ".tool_call_id"),
        ({"role": "tool", "content": "a", "tool_call_id": 1}, ".tool_call_id"),
        ({"role": "assistant", "content": "a", "audio": {"id": "x"}}, ".audio"),
        ({"role": "assistant", "content": "a", "annotations": [1]}, ".annotations"),
        ({"role": "assistant", "content": "a", "tool_calls": {}}, ".tool_calls"),
        ({"role": "assistant", "tool_calls": [CALL | {"id": 1}]}, ".tool_calls[0].id"),
        (
            {"role": "assistant", "tool_calls": [CALL | {"function": {"name": "a"}}]},
            ".tool_calls[0].function.arguments",
        ),
        ("hello", ""),
        (None, ""),
    ],
)
def test_a_wrong_message_is_refused_by_its_path(message: Any, at: str) -> None:
    error = refused(messages=[USER, USER, message])
    assert error.param == f"messages[2]{at}"
    assert error.message.startswith(f"'messages[2]{at}' ")


def test_messages_reach_the_templates_as_they_were_sent() -> None:
    request = accepted(
        messages=[
            {"role": "developer", "content": "rules"},
            {"role": "user", "content": [{"type": "text", "text": "a"}] * 2, "name": "Ann"},
            {"role": "assistant", "content": None, "tool_calls": [CALL | {"index": 0}]},
            {"role": "tool", "content": "", "tool_call_id": "c1"},
            {"role": "assistant", "content": "b", "reasoning_content": "r"},
            # What a reply looks like when a client gives it back as it came
            {"role": "assistant", "content": "c", "refusal": None, "annotations": []},
            {"role": "assistant", "content": "d", "audio": None, "function_call": None}
            | {"tool_calls": None, "annotations": None, "cache_control": {"type": "ephemeral"}},
        ]
    )
    assert [message.as_dict() for message in request.messages] == [
        {"role": "system", "content": "rules"},
        {"role": "user", "content": "aa", "name": "Ann"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "", "tool_call_id": "c1"},
        {"role": "assistant", "content": "b", "reasoning_content": "r"},
        {"role": "assistant", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]


def test_a_long_text_is_not_quoted_in_an_error() -> None:
    assert len(refused_message(role="x" * 1000, content="a").message) < 200

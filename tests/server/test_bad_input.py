"""Everything that can be wrong with a request, on a real process: it is named, and nothing more.

After each of them the server still answers, and its log holds nothing that a user wrote.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.server.conftest import ROOT, ServerProcess
from tests.tiny_models import words

pytestmark = pytest.mark.server

SECRET = "xyzzyplugh"
HELLO = [{"role": "user", "content": f"hello {SECRET}"}]


@pytest.fixture(scope="module")
def http(server: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client
        assert client.post("/v1/chat/completions", json={"messages": HELLO}).status_code == 200
    assert SECRET not in server.log
    assert "Traceback" not in server.log


def refused(http: httpx.Client, status: int, param: str | None, **how: Any) -> dict[str, Any]:
    """Send a bad request; check the answer's shape and that the next good one is answered."""
    headers = {"Content-Type": "application/json", **how.pop("headers", {})}
    response = http.post("/v1/chat/completions", headers=headers, **how)
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert len(error["message"]) < 2500
    assert str(ROOT) not in error["message"] and ".py" not in error["message"]
    good = http.post("/v1/chat/completions", json={"messages": HELLO, "max_tokens": 1})
    assert good.status_code == 200
    return error


WRONG_VALUES: dict[str, list[Any]] = {
    "messages": [None, "hello", {}, [], 5],
    "messages[0]": ["hello", None, 7, []],
    "messages[0].content": [5, {}, [], None, True],
    "messages[0].role": ["robot", 5, None, []],
    "messages[0].name": [5, []],
    "model": [5, [], {}],
    "stream": ["yes", 1],
    "n": [0, -1, 1.5, "two", 1000, True],
    "temperature": [-1, 3, "hot", [], True],
    "top_p": [0, -1, 1.1, "all"],
    "top_k": [-2, 1.5, "all", 2**40],
    "min_p": [-0.1, 2, "none"],
    "presence_penalty": [3, "x"],
    "frequency_penalty": [-3, "x"],
    "repetition_penalty": [0, -1, "x"],
    "seed": [1.5, "x", 2**64],
    "max_tokens": [0, -5, 1.5, "many", True],
    "max_completion_tokens": [0, -5, "many"],
    "stop": [5, {}, "", ["a"] * 100],
    "stop[0]": [[5], [""], [None]],
    "logit_bias": [5, [], "x", {"999999": 1}],
    "logit_bias.x": [{"x": 1}],
    "logit_bias.5": [{"5": 1000}],
    "stream_options": [5, {}],
    "response_format": [5, "json"],
    "tools": [5, {}],
    "tool_choice": [5, "required"],
    "conversation": [5, [], "a/b", "x" * 300, "", {"name": "x"}],
    "conversation_id": [5, "a b", "ä"],
    "cache_salt": [5, "", []],
    "reset_conversation": ["yes", 1],
    "chat_template_kwargs": [5, "x", []],
    "logprobs": [True],
    "top_logprobs": [5],
    "reasoning_effort": ["high"],
    "no_such_field": [1],
}
CASES = [(param, value) for param, values in WRONG_VALUES.items() for value in values]


@pytest.mark.parametrize(
    ("param", "value"), CASES, ids=[f"{param}-{i}" for i, (param, _) in enumerate(CASES)]
)
def test_a_wrong_value_is_refused_by_the_name_of_its_field(
    http: httpx.Client, param: str, value: Any
) -> None:
    body: dict[str, Any] = {"messages": HELLO}
    field, _, rest = param.partition(".")
    if field == "messages[0]":
        body["messages"] = [{**HELLO[0], rest: value} if rest else value]
    else:
        body[field.removesuffix("[0]")] = value
    error = refused(http, 400, param, json=body)
    assert param.rpartition(".")[2].partition("[")[0] in error["message"]


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_no_number_is_not_a_number(http: httpx.Client, text: str) -> None:
    body = f'{{"messages": {json.dumps(HELLO)}, "temperature": {text}}}'
    response = http.post(
        "/v1/chat/completions", content=body, headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b'{"messages": [}',
        b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}',
        b"\x00\x01",
        b"[" * 100_000,
        b'{"messages":' * 2_000,
    ],
)
def test_a_body_that_is_not_a_json_object_is_refused(http: httpx.Client, content: bytes) -> None:
    refused(http, 400, None, content=content)


def test_half_a_surrogate_pair_is_refused_by_its_place(http: httpx.Client) -> None:
    content = b'{"messages": [{"role": "user", "content": "\\ud800"}]}'
    response = http.post(
        "/v1/chat/completions", content=content, headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 400


def test_a_body_that_does_not_say_it_is_json_is_refused(http: httpx.Client) -> None:
    refused(
        http,
        400,
        None,
        content=json.dumps({"messages": HELLO}),
        headers={"Content-Type": "text/plain"},
    )


def test_an_unknown_model_is_404_and_named(http: httpx.Client) -> None:
    error = refused(http, 404, "model", json={"messages": HELLO, "model": "gpt-17"})
    assert error["code"] == "model_not_found"
    assert "gpt-17" in error["message"]


def test_a_prompt_longer_than_the_context_names_both_numbers(http: httpx.Client) -> None:
    messages = [{"role": "user", "content": words(20_000, 1)}]
    error = refused(http, 400, "messages", json={"messages": messages})
    assert error["code"] == "context_length_exceeded"
    numbers = [int(word) for word in error["message"].split() if word.isdigit()]
    assert 16_384 in numbers
    assert max(numbers) > 19_000


def test_ten_megabytes_of_text_are_refused_without_standing_still(http: httpx.Client) -> None:
    messages = [{"role": "user", "content": SECRET * 1_000_000}]
    error = refused(http, 400, "messages", json={"messages": messages})
    assert error["code"] == "context_length_exceeded"


def test_a_body_over_the_limit_is_413(http: httpx.Client) -> None:
    response = http.post("/v1/chat/completions", json={"messages": "x" * (33 << 20)})
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"


@pytest.mark.parametrize("name", ["a/b", "x" * 300, "../../etc/passwd", "a b", "", "%00"])
@pytest.mark.parametrize("header", ["X-Conversation-Id", "X-Session-Id"])
def test_a_bad_id_in_a_header_is_refused_by_the_name_of_the_header(
    http: httpx.Client, header: str, name: str
) -> None:
    error = refused(http, 400, header, json={"messages": HELLO}, headers={header: name})
    assert error["code"] == "invalid_conversation_id"


@pytest.mark.parametrize("path", ["a%2Fb", "x" * 300, "..%2F..%2Fetc", "no-such-one"])
@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_a_bad_id_in_a_path_is_refused(http: httpx.Client, method: str, path: str) -> None:
    response = http.request(method, f"/v1/conv_kv/{path}")
    assert response.status_code == (404 if path == "no-such-one" else 400)
    assert response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/v1/nothing", 404),
        ("GET", f"/{SECRET}", 404),
        ("DELETE", "/v1/models", 405),
        ("GET", "/v1/models/none", 404),
        ("GET", "/v1/conv_kv/stats?limit=x", 400),
    ],
)
def test_what_is_not_there_has_the_same_shape_of_error(
    http: httpx.Client, method: str, path: str, status: int
) -> None:
    response = http.request(method, path)
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}

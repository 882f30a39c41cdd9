"""Ids from bodies and headers: which comes first, which are refused, and what a key becomes."""

from __future__ import annotations

import pytest
from starlette.datastructures import Headers

from kvserve.api.identity import (
    CONVERSATION_HEADERS,
    conversation_id_of,
    request_id_of,
    tenant_of,
)
from kvserve.core.errors import InvalidRequest


def test_the_first_source_in_the_order_of_the_contract_names_the_conversation() -> None:
    headers = {name: f"from-{name}" for name in CONVERSATION_HEADERS}
    found = conversation_id_of(Headers(headers), conversation="a", conversation_id="b")
    assert found == "a"
    assert conversation_id_of(Headers(headers), conversation=None, conversation_id="b") == "b"
    for name in CONVERSATION_HEADERS:
        found = conversation_id_of(Headers(headers), conversation=None, conversation_id=None)
        assert found == f"from-{name}"
        del headers[name]
    assert conversation_id_of(Headers({}), conversation=None, conversation_id=None) is None


@pytest.mark.parametrize(
    "value", ["", "a/b", "a b", "ä", "x" * 129, "a\x00", "a%2Fb", "a\n", "../a"]
)
def test_an_id_of_other_characters_or_length_is_refused_naming_its_source(value: str) -> None:
    for name in CONVERSATION_HEADERS:
        headers = Headers(raw=[(name.lower().encode(), value.encode("latin-1"))])
        with pytest.raises(InvalidRequest) as caught:
            conversation_id_of(headers, conversation=None, conversation_id=None)
        assert caught.value.param == name
        assert name in caught.value.message
    with pytest.raises(InvalidRequest) as caught:
        conversation_id_of(Headers({}), conversation=value, conversation_id="good")
    assert caught.value.param == "conversation"


@pytest.mark.parametrize("value", ["a", "x" * 128, "a:b", "a_b", "A-Z.0"])
def test_an_id_is_taken_exactly_as_it_is(value: str) -> None:
    assert conversation_id_of(Headers({}), conversation=value, conversation_id=None) == value


def test_two_different_ids_in_one_header_are_refused() -> None:
    raw = [(b"x-conversation-id", b"a"), (b"x-conversation-id", b"b")]
    with pytest.raises(InvalidRequest, match="2 times"):
        conversation_id_of(Headers(raw=raw), conversation=None, conversation_id=None)
    same = Headers(raw=[raw[0], raw[0]])
    assert conversation_id_of(same, conversation=None, conversation_id=None) == "a"


def test_a_key_is_one_tenant_however_it_is_sent_and_never_shows() -> None:
    tenant = tenant_of(Headers({"authorization": "Bearer sk-secret"}))
    assert tenant == tenant_of(Headers({"authorization": "bearer  sk-secret "}))
    assert tenant == tenant_of(Headers({"x-api-key": "sk-secret"}))
    assert tenant != tenant_of(Headers({"authorization": "Bearer sk-other"}))
    assert len(tenant) == 32
    assert "secret" not in tenant


@pytest.mark.parametrize("headers", [{}, {"authorization": ""}, {"authorization": "Bearer "}])
def test_no_key_is_the_common_tenant(headers: dict[str, str]) -> None:
    assert tenant_of(Headers(headers)) == ""


def test_a_request_id_is_given_back_or_made() -> None:
    assert request_id_of(Headers({"x-request-id": "abc-1/2"})) == "abc-1/2"
    made = request_id_of(Headers({}))
    assert made != request_id_of(Headers({}))
    for unfit in ("", "a b", "x" * 129, "ä"):
        raw = [(b"x-request-id", unfit.encode("latin-1"))]
        assert request_id_of(Headers(raw=raw)).startswith("req_")

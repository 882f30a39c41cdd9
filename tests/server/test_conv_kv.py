"""`/v1/conv_kv` over HTTP: every status, every shape, and bodies that are wrong."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from starlette.datastructures import Headers

from kvserve.api.errors import ResponseAborted
from kvserve.api.identity import tenant_of
from kvserve.chat.refusals import damaged, id_taken, model_changed, persistence_off, state_not_held
from kvserve.core.errors import NotReady, OutOfSpace, QueueFull, RequestFailed, TooLarge
from tests.server.api_fakes import (
    MODEL,
    FakeConversations,
    FakeEngine,
    FakeFile,
    client_of,
    error_of,
    make_app,
)

pytestmark = pytest.mark.anyio
PREFIX = "/v1/conv_kv"
BINARY = {"Content-Type": "application/octet-stream"}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def known(**how: Any) -> FakeConversations:
    return FakeConversations(held={"": ["c"]}, **how)


async def send(
    method: str, path: str, conversations: FakeConversations | None = None, **how: Any
) -> httpx.Response:
    settings = {name: how.pop(name) for name in ("engine", "max_body_bytes") if name in how}
    app = make_app(conversations=conversations or known(), **settings)
    async with client_of(app) as client:
        return await client.request(method, PREFIX + path, **how)


async def get(path: str, conversations: FakeConversations) -> httpx.Response:
    return await send("GET", path.removeprefix(PREFIX), conversations)


# -- looking -----------------------------------------------------------------------------------


async def test_conversations_are_paged_within_limits() -> None:
    known = FakeConversations(held={"": ["a", "b", "c", "d"]})
    page = (await get("/v1/conv_kv/stats?limit=2&after=a", known)).json()
    assert [item["id"] for item in page["items"]] == ["b", "c"]
    assert page["items"][0] == {
        "id": "b",
        "title": None,
        "model": MODEL,
        "tokens": 7,
        "messages": 1,
        "bytes": 700,
        "shared_bytes": 0,
        "tier": "ram",
        "saved": False,
        "pinned": False,
        "pinned_until": None,
        "branches": 1,
        "created_at": "2026-01-02T03:04:05Z",
        "used_at": "2026-01-02T03:04:06Z",
        "expires_at": None,
    }
    assert page["totals"] == {"conversations": 3}
    assert page["guards"] == {"max_conversations": 9}
    assert page["has_more"]
    assert (await get("/v1/conv_kv/stats?limit=1000", known)).status_code == 200
    for limit in ("0", "1001", "-1", "x", "", "1.5", "٣", "9" * 5000):
        response = await get(f"/v1/conv_kv/stats?limit={limit}", known)
        assert response.status_code == 400
        assert error_of(response)["param"] == "limit"
    response = await get("/v1/conv_kv/stats?after=a/b", known)
    assert error_of(response)["param"] == "after"
    response = await get("/v1/conv_kv/stats?limt=2", known)
    assert response.status_code == 400
    assert error_of(response)["param"] == "limt"


async def test_a_conversation_can_be_looked_at_and_forgotten() -> None:
    known = FakeConversations(held={"": ["a:b"]})
    async with client_of(make_app(conversations=known)) as client:
        detail = (await client.get("/v1/conv_kv/a:b")).json()
        assert (detail["id"], detail["tokens"]) == ("a:b", 7)
        assert detail["cuts"] == [
            {"message": 0, "role": "user", "start": 0, "end": 7, "tier": "ram", "bytes": 700}
        ]
        response = await client.delete("/v1/conv_kv/a:b")
        assert response.json() == {"status": "deleted", "id": "a:b"}
        for gone in (await client.get("/v1/conv_kv/a:b"), await client.delete("/v1/conv_kv/a:b")):
            assert gone.status_code == 404
            assert error_of(gone)["code"] == "conversation_not_found"


async def test_another_keys_conversation_is_as_unknown_as_none() -> None:
    headers = {"Authorization": "Bearer alice"}
    tenant = tenant_of(Headers(headers))
    async with client_of(
        make_app(conversations=FakeConversations(held={tenant: ["mine"]}))
    ) as client:
        assert (await client.get("/v1/conv_kv/mine", headers=headers)).status_code == 200
        for other in ({}, {"Authorization": "Bearer bob"}):
            assert (await client.get("/v1/conv_kv/mine", headers=other)).status_code == 404
            assert (await client.delete("/v1/conv_kv/mine", headers=other)).status_code == 404
            page = await client.get("/v1/conv_kv/stats", headers=other)
            assert page.json()["items"] == []


@pytest.mark.parametrize("bad", ["a/b", "a%2Fb", "x" * 300, "a%20b", "%C3%A4", "%FF", "", "a//b"])
async def test_an_id_that_is_none_is_refused(bad: str) -> None:
    async with client_of(make_app()) as client:
        for method in ("GET", "DELETE"):
            response = await client.request(method, f"/v1/conv_kv/{bad}")
            assert response.status_code == 400
            assert error_of(response)["param"] == "id"


# -- orders ------------------------------------------------------------------------------------


async def test_save_and_load_answer_as_the_contract_says() -> None:
    conversations = known()
    saved = await send("POST", "/save", conversations, json={"conversation": "c", "title": "T"})
    shown = {"id": "c", "title": None, "tokens": 7, "messages": 1, "bytes": 700}
    assert saved.status_code == 200
    assert saved.json() == {"status": "saved", **shown, "model": MODEL}
    loaded = await send("POST", "/load", conversations, json={"conversation_id": "c"})
    assert loaded.json() == {"status": "loaded", **shown}
    assert conversations.orders == [("save", {"title": "T"}), ("load", {})]


@pytest.mark.parametrize("path", ["/save", "/load"])
async def test_a_conversation_is_named_as_for_a_chat(path: str) -> None:
    for body, headers in (
        ({"conversation": {"id": "c"}}, {}),
        ({"conversation": "c", "conversation_id": "other"}, {"X-Session-Id": "other"}),
        ({}, {"X-Conversation-Id": "c"}),
    ):
        assert (await send("POST", path, json=body, headers=headers)).status_code == 200
    missing = await send("POST", path, json={})
    assert missing.status_code == 400
    assert error_of(missing)["param"] == "conversation"
    unknown = await send("POST", path, json={"conversation": "never"})
    assert unknown.status_code == 404
    assert error_of(unknown)["code"] == "conversation_not_found"


REFUSALS = [
    (persistence_off(), 409, "persistence_off"),
    (state_not_held(), 409, "state_not_held"),
    (model_changed(("weights", "tokenizer")), 409, "model_changed"),
    (TooLarge("300 GB; 200 GB are allowed", code="conversation_too_large"), 413, None),
    (damaged(64, 120), 422, "snapshot_damaged"),
    (QueueFull("full"), 429, "queue_full"),
    (RequestFailed("The disk failed.", code="disk_failed"), 500, "disk_failed"),
    (NotReady("loading", code="not_ready"), 503, "not_ready"),
    (OutOfSpace("990 of 1000 bytes are used", code="disk_full"), 507, "disk_full"),
]
CALLS: list[tuple[str, str, dict[str, Any] | None]] = [
    ("POST", "/save", {"conversation": "c"}),
    ("POST", "/load", {"conversation": "c"}),
    ("POST", "/c/fork", {}),
    ("POST", "/c/rollback", {"drop_turns": 1}),
    ("POST", "/c/pin", {}),
    ("DELETE", "/c/pin", None),
    ("GET", "/c/export", None),
    ("POST", "/warm", {"messages": [{"role": "user", "content": "x"}]}),
]


@pytest.mark.parametrize(("error", "status", "code"), REFUSALS)
async def test_a_refusal_has_its_status_and_its_words(
    error: Any, status: int, code: str | None
) -> None:
    for method, path, body in CALLS:
        response = await send(method, path, known(error=error), json=body)
        assert response.status_code == status, path
        found = error_of(response)
        assert found["message"] == error.message
        assert found["code"] == (code or error.code)
    response = await send("POST", "/import", known(error=error), content=b"file", headers=BINARY)
    assert response.status_code == status


async def test_a_refusal_says_what_differs_and_what_is_left() -> None:
    assert "weights, tokenizer" in model_changed(("weights", "tokenizer")).message
    assert "64 of its 120 tokens" in damaged(64, 120).message
    assert "'c'" in id_taken("c", "new_id").message


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/save", {"conversation": "c", "titel": "x"}, "titel"),
        ("/save", {"conversation": "c", "title": ""}, "title"),
        ("/save", {"conversation": "c", "title": "x" * 257}, "title"),
        ("/save", {"conversation": "c", "title": 3}, "title"),
        ("/save", {"conversation": 3}, "conversation"),
        ("/save", {"conversation": {"id": "c", "x": 1}}, "conversation"),
        ("/save", {"conversation": "a/b"}, "conversation"),
        ("/save", {"conversation_id": "x" * 129}, "conversation_id"),
        ("/save", ["c"], None),
        ("/load", {"conversation": "c", "title": "x"}, "title"),
        ("/c/fork", {"new_id": "a b"}, "new_id"),
        ("/c/fork", {"new_id": ""}, "new_id"),
        ("/c/fork", {"new_id": 1}, "new_id"),
        ("/c/fork", {"at_message": -1}, "at_message"),
        ("/c/fork", {"at_message": 1.0}, "at_message"),
        ("/c/fork", {"at_message": True}, "at_message"),
        ("/c/fork", {"at_message": "1"}, "at_message"),
        ("/c/fork", {"message": 1}, "message"),
        ("/c/rollback", {}, None),
        ("/c/rollback", {"to_message": 1, "drop_turns": 1}, None),
        ("/c/rollback", {"to_message": None, "drop_turns": None}, None),
        ("/c/rollback", {"to_message": -1}, "to_message"),
        ("/c/rollback", {"drop_turns": 0}, "drop_turns"),
        ("/c/rollback", {"drop_turns": True}, "drop_turns"),
        ("/c/rollback", {"turns": 1}, "turns"),
        ("/c/pin", {"ttl_s": 0}, "ttl_s"),
        ("/c/pin", {"ttl_s": -1}, "ttl_s"),
        ("/c/pin", {"ttl_s": 1e300}, "ttl_s"),
        ("/c/pin", {"ttl_s": "60"}, "ttl_s"),
        ("/c/pin", {"ttl_s": True}, "ttl_s"),
        ("/c/pin", {"ttl": 60}, "ttl"),
        ("/warm", {}, "messages"),
        ("/warm", {"messages": []}, "messages"),
        ("/warm", {"messages": [{"role": "x", "content": "y"}]}, "messages[0].role"),
        ("/warm", {"messages": [{"role": "user", "content": "y"}], "ttl_s": 0}, "ttl_s"),
        ("/warm", {"messages": [{"role": "user", "content": "y"}], "pin": 1}, "pin"),
        ("/warm", {"messages": [{"role": "user", "content": "y"}], "stream": True}, "stream"),
        ("/warm", {"messages": [{"role": "user", "content": "y"}], "tools": [1]}, "tools[0]"),
    ],
)
async def test_a_wrong_field_is_named_and_nothing_is_done(
    path: str, body: Any, param: str | None
) -> None:
    conversations = known()
    response = await send("POST", path, conversations, json=body)
    assert response.status_code == 400, response.text
    assert error_of(response)["param"] == param
    assert conversations.orders == []


@pytest.mark.parametrize("path", ["/save", "/load", "/c/fork", "/c/rollback", "/c/pin", "/warm"])
async def test_a_body_that_is_no_json_is_refused(path: str) -> None:
    json_type = {"Content-Type": "application/json"}
    for content, headers in (
        (b"{", json_type),
        (b'{"ttl_s": NaN}', json_type),
        (b'{"ttl_s": Infinity}', json_type),
        (b"[" * 10_000, json_type),
        (b"{}", {"Content-Type": "text/plain"}),
        (b"{}", {}),
        (b"", {"Origin": "https://elsewhere"}),
    ):
        conversations = known()
        response = await send("POST", path, conversations, content=content, headers=headers)
        assert response.status_code == 400, (path, content)
        error_of(response)
        assert conversations.orders == []
    response = await send("POST", path, json={"x": "y" * 200}, max_body_bytes=100)
    assert response.status_code == 413


@pytest.mark.parametrize("bad", ["a/b", "a%2Fb", "x" * 129, "a%20b", "%FF", ""])
async def test_an_order_for_an_id_that_is_none_is_refused(bad: str) -> None:
    for method, order in (
        ("POST", "fork"),
        ("POST", "rollback"),
        ("POST", "pin"),
        ("DELETE", "pin"),
        ("GET", "export"),
    ):
        response = await send(method, f"/{bad}/{order}", json={"drop_turns": 1})
        assert response.status_code == 400
        assert error_of(response)["param"] == "id"


async def test_fork_rollback_and_pin_show_the_conversation() -> None:
    conversations = known()
    forked = (await send("POST", "/c/fork", conversations, json={"new_id": "d"})).json()
    assert (forked["status"], forked["id"], forked["forked_from"]) == ("forked", "d", "c")
    named = (await send("POST", "/c/fork", conversations, json={"at_message": 0})).json()
    assert named["id"] == "conv_new" and named["tokens"] == 7
    back = (await send("POST", "/c/rollback", conversations, json={"to_message": 0})).json()
    assert (back["status"], back["id"], back["messages"]) == ("rolled_back", "c", 1)
    pinned = (await send("POST", "/c/pin", conversations, json={"ttl_s": 1.5})).json()
    assert (pinned["status"], pinned["id"]) == ("pinned", "c")
    freed = (await send("DELETE", "/c/pin", conversations)).json()
    assert (freed["status"], freed["id"]) == ("unpinned", "c")
    assert conversations.orders == [
        ("fork", {"new_name": "d", "at_message": None}),
        ("fork", {"new_name": None, "at_message": 0}),
        ("rollback", {"to_message": 0, "drop_turns": None}),
        ("pin", {"ttl_s": 1.5}),
        ("unpin", {}),
    ]


async def test_fork_and_pin_need_no_body() -> None:
    conversations = known()
    assert (await send("POST", "/c/fork", conversations)).status_code == 200
    assert (await send("POST", "/c/pin", conversations)).status_code == 200
    assert conversations.orders == [
        ("fork", {"new_name": None, "at_message": None}),
        ("pin", {"ttl_s": None}),
    ]


async def test_a_missing_conversation_is_not_found_by_any_order() -> None:
    for method, path, body in CALLS:
        if path == "/warm":
            continue
        body = {"conversation": "x"} if body and "conversation" in body else body
        response = await send(method, path.replace("/c/", "/x/"), json=body)
        assert response.status_code == 404, path
        assert error_of(response)["code"] == "conversation_not_found"


async def test_another_keys_conversation_cannot_be_ordered_about() -> None:
    mine = {"Authorization": "Bearer alice"}
    held = {tenant_of(Headers(mine)): ["c"]}
    for method, path, body in CALLS:
        if path == "/warm":
            continue
        for headers, status in ((mine, 200), ({}, 404), ({"x-api-key": "bob"}, 404)):
            conversations = FakeConversations(held=held)
            response = await send(method, path, conversations, json=body, headers=headers)
            assert response.status_code == status, path


async def test_warm_asks_for_the_prompt_and_answers_with_its_id() -> None:
    conversations = known()
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    body = {
        "model": MODEL,
        "messages": [{"role": "developer", "content": [{"type": "text", "text": "Be brief."}]}],
        "tools": [tool],
        "ttl_s": 60,
        "pin": True,
        "cache_salt": "s",
        "chat_template_kwargs": {"x": 1},
    }
    headers = {"Authorization": "Bearer alice", "X-Conversation-Id": "c"}
    response = await send("POST", "/warm", conversations, json=body, headers=headers)
    warmed = response.json()
    assert (warmed["status"], warmed["id"]) == ("warmed", "warm_1")
    assert (warmed["cached_tokens"], warmed["processing_tokens"]) == (5, 2)
    ((_, order),) = conversations.orders
    asked = order["request"]
    assert (order["ttl_s"], order["pin"]) == (60, True)
    assert asked.tenant == tenant_of(Headers(headers))
    assert asked.messages == ({"role": "system", "content": "Be brief."},)
    assert asked.tools == (tool,) and asked.cache_salt == "s"
    assert asked.conversation_id is None and asked.template_kwargs == {"x": 1}
    response = await send("POST", "/warm", json=body | {"model": "other"})
    assert response.status_code == 404
    assert error_of(response)["code"] == "model_not_found"


async def test_a_loading_server_neither_loads_nor_warms() -> None:
    for method, path, body in CALLS:
        if path in ("/load", "/warm"):
            response = await send(method, path, json=body, engine=FakeEngine(ready=False))
            assert response.status_code == 503


async def test_a_client_that_leaves_ends_its_load() -> None:
    conversations = known(let_load=asyncio.Event())
    app = make_app(conversations=conversations)
    body = b'{"conversation": "c"}'
    messages = [{"type": "http.request", "body": body, "more_body": False}]
    sent: list[Any] = []

    async def receive() -> Any:
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def note(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "path": f"{PREFIX}/load",
        "raw_path": b"",
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "headers": [(b"content-type", b"application/json")],
        "client": None,
        "server": None,
    }
    await asyncio.wait_for(app(scope, receive, note), 5)
    assert conversations.num_cancelled == 1
    assert sent[0]["status"] == 499


# -- files -------------------------------------------------------------------------------------


async def test_an_export_is_one_file_with_a_safe_name() -> None:
    conversations = FakeConversations(held={"": ["a:b.c-d"]})
    response = await send("GET", "/a:b.c-d/export", conversations)
    assert response.status_code == 200
    assert response.content == b"onetwo"
    assert response.headers["content-type"] == "application/octet-stream"
    assert response.headers["content-length"] == "6"
    disposition = response.headers["content-disposition"]
    assert disposition == 'attachment; filename="conversation-a_b.c-d.safetensors"'
    assert conversations.file.closed


async def test_what_is_wrong_at_the_beginning_of_an_export_has_its_status() -> None:
    file = FakeFile([b"x" * 100, damaged(64, 120)])
    response = await send("GET", "/c/export", known(file=file))
    assert response.status_code == 422
    assert error_of(response)["code"] == "snapshot_damaged"
    assert file.closed


async def test_what_is_wrong_later_cuts_the_connection() -> None:
    file = FakeFile([bytes(2**24), b"second", damaged(64, 120)])
    with pytest.raises(ResponseAborted):
        await send("GET", "/c/export", known(file=file))
    assert file.closed


async def test_an_import_takes_the_file_as_it_comes() -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"fi"
        yield b"le"

    conversations = known()
    response = await send("POST", "/import", conversations, content=pieces(), headers=BINARY)
    assert response.status_code == 200
    body = response.json()
    assert (body["status"], body["id"]) == ("imported", "from-file")
    assert conversations.received == b"file"
    assert conversations.orders == [("import", {"new_name": None, "declared": None})]


@pytest.mark.parametrize(
    ("query", "headers"), [("?id=new", {}), ("", {"X-Conversation-Id": "new"})]
)
async def test_an_import_may_be_given_an_id(query: str, headers: dict[str, str]) -> None:
    conversations = known()
    path = f"/import{query}"
    how = {"content": b"file", "headers": BINARY | headers}
    response = await send("POST", path, conversations, max_body_bytes=1, **how)
    assert response.json()["id"] == "new"
    assert conversations.orders == [("import", {"new_name": "new", "declared": 4})]


async def test_an_import_that_is_none_is_refused() -> None:
    for query, headers, param in (
        ("?id=a/b", BINARY, "id"),
        ("?id=", BINARY, "id"),
        ("?new_id=x", BINARY, "new_id"),
        ("", {}, None),
        ("", {"Content-Type": "application/json"}, None),
        ("", {"Content-Type": "multipart/form-data; boundary=x"}, None),
        ("", BINARY | {"X-Conversation-Id": "a b"}, "X-Conversation-Id"),
    ):
        conversations = known()
        how = {"content": b"file", "headers": headers}
        response = await send("POST", f"/import{query}", conversations, **how)
        assert response.status_code == 400, query
        assert error_of(response)["param"] == param
        assert conversations.orders == []


async def test_the_methods_of_orders_are_told() -> None:
    response = await send("PUT", "/save")
    assert response.status_code == 405
    error_of(response)

"""Models, conversations, health, and what is answered where there is no route."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.api_fakes import (
    CHAT,
    MODEL,
    FakeEngine,
    FakeInfo,
    client_of,
    error_of,
    make_app,
)

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def get(path: str, engine: FakeEngine | None = None) -> Any:
    async with client_of(make_app(engine=engine)) as client:
        return await client.get(path)


async def test_models_lists_the_one_that_is_served() -> None:
    entry = {
        "id": MODEL,
        "object": "model",
        "created": 1_700_000_000,
        "owned_by": "kvserve",
        "context_length": 2048,
    }
    assert (await get("/v1/models")).json() == {"object": "list", "data": [entry]}
    assert (await get(f"/v1/models/{MODEL}")).json() == entry
    assert (await get("/v1/models/someone%2Ftiny-chat")).json() == entry
    missing = await get("/v1/models/other/model")
    assert missing.status_code == 404
    assert error_of(missing)["code"] == "model_not_found"


async def test_health_says_that_it_is_alive_and_what_caching_does() -> None:
    body = (await get("/health")).json()
    assert body == {"status": "ok", "model": MODEL, "caching": {"enabled": True, "notes": []}}
    info = FakeInfo(caching=False, notes=("This model's state cannot be kept.",))
    body = (await get("/health", engine=FakeEngine(info=info))).json()
    assert body["caching"] == {"enabled": False, "notes": ["This model's state cannot be kept."]}


async def test_a_dead_engine_is_neither_healthy_nor_ready() -> None:
    engine = FakeEngine(ready=False, failure="The engine has stopped.")
    for path in ("/health", "/ready"):
        response = await get(path, engine=engine)
        assert response.status_code == 503
        assert response.json()["status"] == "failed"
        assert response.json()["error"]["message"] == "The engine has stopped."


async def test_a_loading_server_is_alive_but_not_ready() -> None:
    engine = FakeEngine(ready=False)
    assert (await get("/health", engine=engine)).status_code == 200
    response = await get("/ready", engine=engine)
    assert (response.status_code, response.json()["status"]) == (503, "starting")
    response = await get("/ready")
    assert (response.status_code, response.json()["status"]) == (200, "ready")


async def test_stats_are_the_engines_and_the_disks() -> None:
    disk = {"persist": "auto"}
    engine = {"num_running": 1, "tokens": {"prefilled": 7}}
    assert (await get("/stats")).json() == {**engine, "disk": disk}


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/nothing", "/docs", "/openapi.json", "/health/"])
async def test_where_there_is_nothing_the_error_body_is_the_usual_one(path: str) -> None:
    response = await get(path)
    assert response.status_code == 404
    assert error_of(response)["code"] == "unknown_url"


async def test_a_wrong_method_is_told_which_are_right() -> None:
    async with client_of(make_app()) as client:
        for method, path, allowed in (
            ("GET", CHAT, {"POST"}),
            ("POST", "/v1/conv_kv/a", {"GET", "DELETE"}),
            ("POST", "/health", {"GET", "HEAD"}),
            ("PUT", "/v1/models", {"GET"}),
        ):
            response = await client.request(method, path)
            assert response.status_code == 405
            assert set(response.headers["allow"].split(", ")) == allowed
            assert error_of(response)["code"] == "method_not_allowed"


async def test_an_error_of_a_route_is_answered_and_not_explained() -> None:
    class BrokenEngine(FakeEngine):
        def stats(self) -> dict[str, Any]:
            raise ValueError("at /var/lib/secret")

    response = await get("/stats", engine=BrokenEngine())
    assert response.status_code == 500
    assert "secret" not in response.text
    assert error_of(response)["code"] == "internal_error"


async def test_a_request_id_is_on_every_answer() -> None:
    async with client_of(make_app()) as client:
        for path in ("/health", "/nothing", "/v1/conv_kv/x"):
            given = await client.get(path, headers={"X-Request-Id": "mine"})
            assert given.headers["x-request-id"] == "mine"
            made = await client.get(path, headers={"X-Request-Id": "not fit"})
            assert made.headers["x-request-id"].startswith("req_")

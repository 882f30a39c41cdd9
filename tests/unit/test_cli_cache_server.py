"""`kvserve cache` through a server: what is asked over HTTP, and what comes of the answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest

from kvserve.cli.cache.branches import grow
from kvserve.cli.cache.place import CacheError, NotThere, Refused, Unusable
from kvserve.cli.cache.running import RunningServer

T = TypeVar("T")
NOW = "2026-11-20T12:00:00Z"
ITEM = {
    **{"id": "main", "title": None, "model": "m", "tokens": 230, "messages": 2, "bytes": 2300},
    **{"shared_bytes": 0, "tier": "ram", "saved": False, "pinned": False, "pinned_until": None},
    **{"branches": 1, "created_at": NOW, "used_at": NOW, "expires_at": None, "new_field": 1},
}
CUTS = [
    {"message": 0, "role": "system", "start": 0, "end": 120, "tier": "ram", "bytes": 1200},
    {"message": 1, "role": "user", "start": 120, "end": 230, "tier": "disk", "bytes": 1100},
]


class FakeServer:
    """Answers with what `answers` says for "METHOD /path"; remembers what it was asked."""

    def __init__(self, **answers: Any) -> None:
        self.answers = answers
        self.asked: list[httpx.Request] = []

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        await request.aread()
        self.asked.append(request)
        path = request.url.raw_path.decode().partition("?")[0].removeprefix("/v1/conv_kv/")
        answer = self.answers[f"{request.method} {path}"]
        return answer(request) if callable(answer) else httpx.Response(200, json=answer)

    def use(self, work: Callable[[RunningServer], Awaitable[T]]) -> T:
        async def scenario() -> T:
            transport = httpx.MockTransport(self)
            async with httpx.AsyncClient(transport=transport, base_url="http://here:1") as client:
                return await work(RunningServer(client, "process 7"))

        return asyncio.run(scenario())


def refusal(status: int, message: str | None = "Said so.") -> Callable[[object], httpx.Response]:
    body = "<html>" if message is None else json.dumps({"error": {"message": message}})
    return lambda _: httpx.Response(status, text=body)


def silent(done: int, total: int | None) -> None:
    pass


def test_all_pages_of_the_list_are_read() -> None:
    def page(request: httpx.Request) -> httpx.Response:
        first = "after" not in request.url.params
        items = [{**ITEM, "id": name} for name in (("c", "b") if first else ("a",))]
        body = {"items": items, "has_more": first, "totals": {}, "guards": {"stored_bytes": 77}}
        return httpx.Response(200, json=body)

    server = FakeServer(**{"GET stats": page})
    listing = server.use(lambda place: place.ls())
    assert [item.id for item in listing.items] == ["c", "b", "a"] and listing.nbytes == 77
    assert [dict(request.url.params).get("after") for request in server.asked] == [None, "b"]
    assert listing.items[0].used_at == datetime(2026, 11, 20, 12, tzinfo=UTC)
    assert listing.items[0].tenant is None


def test_a_server_that_keeps_nothing_on_disk_has_no_total() -> None:
    body = {"items": [], "has_more": False, "totals": {}, "guards": {}}
    assert FakeServer(**{"GET stats": body}).use(lambda place: place.ls()).nbytes is None


def test_the_tree_shows_where_others_leave_a_conversation() -> None:
    def other(name: str, tokens: int, shared: int) -> dict[str, Any]:
        return {"id": name, "tokens": tokens, "shared_tokens": shared, "used_at": NOW}

    shares = [other("fork", 200, 130), other("prefix", 150, 150), other("all", 260, 230)]
    server = FakeServer(**{"GET main": {**ITEM, "cuts": CUTS, "shares": shares}})
    detail = server.use(lambda place: place.show("main"))
    assert [(m.message, m.role, m.end, m.bytes) for m in detail.messages] == [
        (0, "system", 120, 1200),
        (1, "user", 230, 1100),
    ]
    [root] = grow(detail.lines, "main")
    assert (root.start, root.end, root.nbytes, root.tier) == (0, 130, 1300, "part")
    on, fork = root.below
    assert (on.end, on.tips, on.nbytes) == (150, ["prefix"], 200)
    assert (fork.end, fork.tips, fork.nbytes) == (200, ["fork"], None)
    [tip] = on.below
    assert (tip.end, tip.tips) == (230, ["main"])
    assert [(branch.end, branch.tips) for branch in tip.below] == [(260, ["all"])]


def test_an_id_cannot_leave_its_place_in_the_path(tmp_path: Path) -> None:
    place_of_id = "..%2F..%2Fstats%3Fa"
    server = FakeServer(
        **{
            f"GET {place_of_id}": {**ITEM, "cuts": CUTS, "shares": []},
            f"DELETE {place_of_id}": {},
            f"GET {place_of_id}/export": {},
            f"POST {place_of_id}/pin": ITEM,
            f"DELETE {place_of_id}/pin": ITEM,
        }
    )
    works: list[Callable[[RunningServer, str], Awaitable[Any]]] = [
        lambda place, name: place.show(name),
        lambda place, name: place.rm(name),
        lambda place, name: place.pin(name, None),
        lambda place, name: place.unpin(name),
        lambda place, name: place.export(name, tmp_path / "file", silent),
    ]
    for work in works:
        server.use(lambda place, work=work: work(place, "../../stats?a"))  # type: ignore[misc]
    assert len(server.asked) == len(works)


def test_a_pin_says_when_it_ends() -> None:
    server = FakeServer(
        **{
            "POST main/pin": lambda request: httpx.Response(
                200, json={**ITEM, "pinned_until": NOW if request.content != b"{}" else None}
            ),
            "DELETE main/pin": ITEM,
        }
    )
    assert server.use(lambda place: place.pin("main", None)) is None
    assert server.use(lambda place: place.pin("main", 60.0)) == datetime(
        2026, 11, 20, 12, tzinfo=UTC
    )
    server.use(lambda place: place.unpin("main"))
    assert [request.content for request in server.asked] == [b"{}", b'{"ttl_s":60.0}', b""]


def test_an_export_is_streamed_into_the_file(tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    server = FakeServer(**{"GET main/export": lambda _: httpx.Response(200, content=b"x" * 5000)})
    file = tmp_path / "file"
    nbytes = server.use(lambda place: place.export("main", file, lambda *now: seen.append(now)))
    assert nbytes == file.stat().st_size == 5000 and seen[-1] == (5000, 5000)


def test_an_export_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"x" * 100
        raise httpx.RemoteProtocolError("peer closed connection")

    server = FakeServer(**{"GET main/export": lambda _: httpx.Response(200, content=broken())})
    with pytest.raises(Unusable, match="broke the export of main off"):
        server.use(lambda place: place.export("main", tmp_path / "file", silent))
    assert list(tmp_path.iterdir()) == []


def test_an_import_sends_the_file_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"y" * 3_000_000)
    seen: list[tuple[int, int | None]] = []
    server = FakeServer(**{"POST import": {"id": "new"}, "GET new": {**ITEM, "id": "new"}})
    item = server.use(lambda place: place.import_(file, "new", lambda *now: seen.append(now)))
    assert item.id == "new" and seen[-1] == (3_000_000, 3_000_000) and len(seen) > 2
    sent = server.asked[0]
    assert sent.content == file.read_bytes() and dict(sent.url.params) == {"id": "new"}
    assert sent.headers["Content-Type"] == "application/octet-stream"
    assert sent.headers["Content-Length"] == "3000000"
    assert "Transfer-Encoding" not in sent.headers


@pytest.mark.parametrize(
    ("status", "kind", "code"),
    [
        (404, NotThere, 1),
        (422, Unusable, 1),
        *((status, Refused, 2) for status in (400, 401, 403, 409, 413, 500, 503, 507)),
    ],
)
def test_an_error_of_the_server_keeps_its_words(
    status: int, kind: type[CacheError], code: int, tmp_path: Path
) -> None:
    answers = {path: refusal(status) for path in ("GET main", "DELETE main", "GET main/export")}
    works: list[Callable[[RunningServer], Awaitable[Any]]] = [
        lambda place: place.show("main"),
        lambda place: place.rm("main"),
        lambda place: place.export("main", tmp_path / "file", silent),
    ]
    for work in works:
        with pytest.raises(kind, match=r"^Said so\.$") as caught:
            FakeServer(**answers).use(work)
        assert caught.value.exit_code == code
    assert list(tmp_path.iterdir()) == []


def test_an_answer_that_is_no_json_is_an_error_in_words() -> None:
    with pytest.raises(Refused, match="the server answered 502"):
        FakeServer(**{"GET main": refusal(502, None)}).use(lambda place: place.show("main"))


def test_what_would_change_files_under_a_server_is_refused() -> None:
    server = FakeServer()
    for work in (lambda place: place.repair(silent), lambda place: place.gc()):
        with pytest.raises(Refused, match=r"stopped store only.*http://here:1 \(process 7\)"):
            server.use(work)
    assert server.asked == []

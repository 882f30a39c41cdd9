"""`/v1/conv_kv` on real servers: a life over restarts, from one server to another, and damage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.conftest import ServerProcess, start_server
from tests.server.talk import Answer, Message, ask, assistant, cold, system, user
from tests.tiny_models import qwen3_config, write_model

pytestmark = pytest.mark.server
KEY = "a-key"
NOTHING_MISSED = (None, "template_changed")
"""A random model's reply is no text; sent back as text it is other tokens."""
BINARY = {"Content-Type": "application/octet-stream"}
LONG = system("You know all about the tides, the moon and the sea. " * 12)


class Chat:
    """One running server, its official client, and one conversation with it."""

    def __init__(self, server: ServerProcess) -> None:
        self.server = server
        self.client = server.client(api_key=KEY)

    def say(self, history: list[Message], words: str, **how: Any) -> Answer:
        """Ask in conversation `c`; the reply must be the one of a cold start. Extends `history`."""
        history.append(user(words))
        answer = ask(self.client, history, "c", **how)
        assert answer.text == cold(self.client, history).text
        history.append(assistant(answer.text))
        return answer

    def send(self, method: str, path: str, body: Any = None, **how: Any) -> httpx.Response:
        if body is not None:
            how["json"] = body
        headers = {"Authorization": f"Bearer {KEY}", **how.pop("headers", {})}
        url = f"{self.server.url}/v1/conv_kv{path}"
        return httpx.request(method, url, headers=headers, timeout=60, **how)

    def order(self, path: str, body: Any = None, method: str = "POST", **how: Any) -> Any:
        """Return the answer to an order that must be done."""
        response = self.send(method, path, body, **how)
        assert response.status_code == 200, response.text
        return response.json()


@contextmanager
def chatting(model: Path, data: Path, *flags: str) -> Iterator[Chat]:
    # Cold references are no conversations.
    off = ("--auto-conversation", "off")
    server = start_server(data, "--model", str(model), *off, *flags)
    try:
        server.wait_ready()
        chat = Chat(server)
        with chat.client:
            yield chat
    finally:
        code = server.end()
    assert code == 0, server.log
    assert "Traceback" not in server.log


def error(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    found: dict[str, Any] = response.json()["error"]
    return found


def files(data: Path) -> list[Path]:
    return sorted(data.glob("snapshots/??/*.safetensors"))


@pytest.mark.parametrize("persist", ["auto", "manual"])
def test_a_conversation_lives_on_over_a_restart(
    random_model: Path, tmp_path: Path, persist: str
) -> None:
    history = [LONG]
    flags = ("--persist", persist)
    with chatting(random_model, tmp_path, *flags) as chat:
        chat.say(history, "When is the flood?")
        chat.say(history, "And the ebb?")
        saved = chat.order("/save", {"conversation": "c", "title": "Tides"})
        assert (saved["status"], saved["title"], saved["messages"]) == ("saved", "Tides", 5)
        assert saved["bytes"] == sum(file.stat().st_size for file in files(tmp_path))
        assert chat.order("/c/pin", {"ttl_s": 3600})["pinned"]
        fork = chat.order("/c/fork", {"new_id": "fork", "at_message": 2})
        assert (fork["messages"], fork["branches"]) == (3, 2)
        if persist == "manual":  # a conversation of its own, not saved by its source's save
            chat.order("/save", {"conversation": "fork"})
    with chatting(random_model, tmp_path, *flags) as chat:
        (first, second) = chat.order("/stats", method="GET")["items"]
        assert (first["id"], second["id"]) == ("fork", "c")
        assert (second["tier"], second["saved"], second["pinned"]) == ("disk", True, True)
        assert second["shared_bytes"] > 0 and second["expires_at"] is not None
        loaded = chat.order("/load", {"conversation_id": "c"})
        assert (loaded["status"], loaded["tokens"]) == ("loaded", saved["tokens"])
        detail = chat.order("/c", method="GET")
        assert detail["tier"] == "ram"
        assert {cut["tier"] for cut in detail["cuts"]} == {"ram"}
        answer = chat.say(history, "Why?")
        assert answer.kv == "hit"
        assert answer.num_cached >= 0.9 * saved["tokens"]
    with chatting(random_model, tmp_path, *flags) as chat:
        history = history[: 7 if persist == "auto" else 5]
        assert chat.order("/c", method="GET")["messages"] == len(history)
        answer = chat.say(history, "So what?")
        assert answer.kv == "snapshot" and answer.miss_reason in NOTHING_MISSED


def test_a_rollback_and_a_delete_hold_over_a_restart(random_model: Path, tmp_path: Path) -> None:
    history = [LONG]
    with chatting(random_model, tmp_path) as chat:
        chat.say(history, "One?")
        chat.say(history, "Two?")
        back = chat.order("/c/rollback", {"drop_turns": 1})
        assert (back["status"], back["messages"]) == ("rolled_back", 3)
        del history[3:]
        warmed = chat.order(
            "/warm", {"messages": [system("Of cabbages and kings. " * 20)], "pin": True}
        )
        assert warmed["status"] == "warmed" and warmed["pinned"]
        short = chat.order("/warm", {"messages": [user("x " * 40)], "ttl_s": 0.01})
        assert chat.send("GET", f"/{short['id']}").status_code == 404
    with chatting(random_model, tmp_path) as chat:
        assert chat.order("/c", method="GET")["messages"] == 3
        assert chat.order(f"/{warmed['id']}", method="GET")["tier"] == "disk"
        answer = ask(chat.client, [system("Of cabbages and kings. " * 20), user("Who?")], "new")
        assert answer.num_cached >= 0.9 * warmed["tokens"]
        chat.say(history, "Three?")
        for path in ("/c", f"/{warmed['id']}", "/new"):
            assert chat.order(path, method="DELETE")["status"] == "deleted"
            assert error(chat.send("DELETE", path), 404)["code"] == "conversation_not_found"
    with chatting(random_model, tmp_path) as chat:
        assert chat.send("GET", "/c").status_code == 404
        assert chat.send("GET", f"/{warmed['id']}").status_code == 404


def test_a_conversation_moves_to_a_server_of_the_same_model_only(
    random_model: Path, tmp_path: Path
) -> None:
    history = [LONG]
    with chatting(random_model, tmp_path / "a", "--persist", "manual") as chat:
        chat.say(history, "One?")
        exported = chat.send("GET", "/c/export")
        assert exported.status_code == 200
        assert exported.headers["content-length"] == str(len(exported.content))
        tokens = chat.order("/c", method="GET")["tokens"]
    damaged = bytearray(exported.content)
    damaged[len(damaged) // 2] ^= 1
    with chatting(random_model, tmp_path / "b") as chat:
        refused = chat.send("POST", "/import", content=bytes(damaged), headers=BINARY)
        assert error(refused, 422)["code"] == "snapshot_damaged"
        imported = chat.order("/import", content=exported.content, headers=BINARY)
        assert (imported["id"], imported["tokens"]) == ("c", tokens)
        again = chat.send("POST", "/import", content=exported.content, headers=BINARY)
        assert error(again, 409)["code"] == "id_taken"
        answer = chat.say(history, "Two?")
        assert answer.kv == "snapshot" and answer.miss_reason in NOTHING_MISSED
    other = write_model(tmp_path / "other", qwen3_config(rms_norm_eps=1e-5))
    with chatting(other, tmp_path / "c") as chat:
        refused = chat.send("POST", "/import", content=exported.content, headers=BINARY)
        found = error(refused, 409)
        assert found["code"] == "model_changed" and "config" in found["message"]
    with chatting(other, tmp_path / "b") as chat:
        found = error(chat.send("POST", "/load", {"conversation": "c"}), 409)
        assert found["code"] == "model_changed" and "config" in found["message"]
        answer = ask(chat.client, [*history, user("Three?")], "c")
        assert (answer.kv, answer.num_cached) == ("fresh", 0)
        assert answer.miss_reason is not None and "config" in answer.miss_reason


def test_damage_is_told_and_costs_a_prefill_only(random_model: Path, tmp_path: Path) -> None:
    history = [LONG]
    with chatting(random_model, tmp_path) as chat:
        chat.say(history, "One?")
        saved = chat.order("/save", {"conversation": "c"})
    for file in files(tmp_path):
        data = bytearray(file.read_bytes())
        data[-100] ^= 8
        file.write_bytes(data)
    with chatting(random_model, tmp_path) as chat:
        found = error(chat.send("POST", "/load", {"conversation": "c"}), 422)
        assert found["code"] == "snapshot_damaged"
        assert f"of its {saved['tokens']} tokens can still be used" in found["message"]
        chat.say(history, "Two?")
        assert chat.order("/load", {"conversation": "c"})["status"] == "loaded"


def test_without_persistence_saving_is_refused_by_name(random_model: Path, tmp_path: Path) -> None:
    with chatting(random_model, tmp_path, "--persist", "off") as chat:
        chat.say([LONG], "One?")
        refused = error(chat.send("POST", "/save", {"conversation": "c"}), 409)
        assert refused["code"] == "persistence_off"
        assert chat.order("/c/fork", {"new_id": "d"})["messages"] == 3
    assert files(tmp_path) == []


def test_nobodys_words_reach_the_log(random_model: Path, tmp_path: Path) -> None:
    with chatting(random_model, tmp_path, "--log-level", "debug") as chat:
        ask(chat.client, [user("swordfish-one")], "id-swordfish")
        body = {"conversation": "id-swordfish", "title": "title-swordfish"}
        chat.order("/save", body)
        chat.order("/id-swordfish/fork", {"new_id": "fork-swordfish"})
        chat.order("/id-swordfish", method="DELETE")
    assert "swordfish" not in chat.server.log

"""`kvserve cache` as a process of its own, beside a running server and after it has stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import DEADLINE_S, ROOT, ServerProcess, start_server
from tests.server.talk import ask, assistant, system, user

pytestmark = pytest.mark.server

DOCUMENT = system("The code of the blue door is 4417. The owner of the boat is Anna. " * 8)
FIRST = [DOCUMENT, user("What is the code of the blue door?")]


@dataclass(frozen=True)
class Cache:
    """The command as a person runs it."""

    folder: Path

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environ = {k: v for k, v in os.environ.items() if not k.startswith("KVSERVE_")}
        return subprocess.run(
            [sys.executable, "-m", "kvserve", "cache", *arguments, "--data-dir", str(self.folder)],
            cwd=ROOT,
            env=environ,
            capture_output=True,
            text=True,
            check=False,
            timeout=DEADLINE_S,
        )

    def text(self, *arguments: str) -> str:
        ran = self.run(*arguments)
        assert (ran.returncode, ran.stderr) == (0, "")
        return ran.stdout

    def json(self, *arguments: str) -> Any:
        return json.loads(self.text(*arguments, "--json"))

    def refusal(self, code: int, *arguments: str) -> str:
        ran = self.run(*arguments)
        assert (ran.returncode, ran.stdout) == (code, "")
        [line] = ran.stderr.splitlines()
        return line


@dataclass(frozen=True)
class Pair:
    """A server with three conversations, all written, and the command on its folder."""

    server: ServerProcess
    cache: Cache


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, random_model: Path) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("data")
    running = start_server(folder, "--model", str(random_model))
    try:
        running.wait_ready()
        with running.client("alice") as client:
            reply = ask(client, FIRST, "main").text
            more = [*FIRST, assistant(reply)]
            ask(client, [*more, user("And of the red one?")], "main")
            ask(client, [*more, user("Who is the owner of the boat?")], "fork")
        with running.client("bob") as client:
            ask(client, FIRST, "main")
        running.wait_for_stats(lambda stats: stats["disk"]["conversations"] == 3, DEADLINE_S)
        yield Pair(running, Cache(folder))
    finally:
        code = running.end()
    assert code == 0 and "Traceback" not in running.log, running.log


def tips(tree: list[dict[str, Any]]) -> dict[str, int]:
    return {tip: node["end"] for node in tree for tip in node["tips"]}


def test_the_keys_conversations_are_listed_and_shown(pair: Pair) -> None:
    cache = pair.cache
    items = {item["id"]: item for item in cache.json("ls", "--api-key", "alice")["items"]}
    assert set(items) == {"main", "fork"} and items["main"]["branches"] == 2
    assert [item["id"] for item in cache.json("ls", "--api-key", "bob")["items"]] == ["main"]
    assert cache.json("ls")["items"] == []
    assert "no conversation of this id" in cache.refusal(1, "show", "main")
    shown = cache.json("show", "main", "--api-key", "alice")
    assert [cut["role"] for cut in shown["cuts"]][:3] == ["system", "user", "assistant"]
    assert tips(shown["tree"]) == {name: item["tokens"] for name, item in items.items()}
    parted = shown["tree"][0]["end"]
    assert shown["cuts"][1]["end"] < parted < items["fork"]["tokens"]


def test_changes_go_through_the_server(pair: Pair, tmp_path: Path) -> None:
    cache, key = pair.cache, ("--api-key", "alice")
    assert "pinned main until" in cache.text("pin", "main", "--ttl", "1h", *key)
    assert cache.json("show", "main", *key)["pinned"]
    cache.text("unpin", "main", *key)
    assert not cache.json("show", "main", *key)["pinned"]
    file = str(tmp_path / "main.safetensors")
    cache.text("export", "main", file, *key)
    assert "already" in cache.refusal(2, "import", file, *key)
    taken = cache.json("import", file, "--id", "copy", *key)
    assert taken["tokens"] == cache.json("show", "main", *key)["tokens"] and taken["saved"]
    cache.text("rm", "copy", *key)
    assert "no conversation of this id" in cache.refusal(1, "rm", "copy", *key)
    (tmp_path / "bad").write_bytes(b"x" * 5000)
    assert "damaged" in cache.refusal(1, "import", str(tmp_path / "bad"), *key)


def test_what_a_server_forbids_is_refused_and_verify_is_not(pair: Pair) -> None:
    for command in ("repair", "gc"):
        assert "stopped store only" in pair.cache.refusal(2, command)
    assert "--api-key" in pair.cache.refusal(2, "ls", "--tenant", "-")
    assert "all well" in pair.cache.text("verify")


def test_a_second_server_on_the_folder_is_refused_in_words(pair: Pair, random_model: Path) -> None:
    second = start_server(pair.cache.folder, "--model", str(random_model))
    second.process.wait(DEADLINE_S * 4)
    assert second.end() == 2
    assert "Traceback" not in second.log and pair.server.url in second.log
    assert pair.cache.json("ls", "--api-key", "bob")["items"]


def test_a_stopped_server_leaves_the_same_conversations(
    tmp_path: Path, random_model: Path, pair: Pair
) -> None:
    """Last in this module: it stops the server."""
    cache, key = pair.cache, ("--api-key", "alice")
    before = cache.json("show", "main", *key)
    assert pair.server.end() == 0
    after = cache.json("show", "main", *key)
    same = ("id", "model", "tokens", "messages", "branches", "created_at")
    assert {name: after[name] for name in same} == {name: before[name] for name in same}
    assert [(cut["start"], cut["end"]) for cut in after["cuts"]] == [
        (cut["start"], cut["end"]) for cut in before["cuts"]
    ]
    assert tips(after["tree"]) == tips(before["tree"])
    assert len(cache.json("ls")["items"]) == 3
    assert "2 tenants have a conversation main" in cache.refusal(2, "show", "main")
    assert "all well" in cache.text("verify")
    assert cache.text("gc").endswith("removed, 0 B\n")

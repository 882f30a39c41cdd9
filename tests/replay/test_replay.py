"""Nothing that an earlier request of a replay had in the same position is prefilled again."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from kvserve import embedded
from tests.replay.replaying import Score, score_of, without_none
from tests.tiny_models import qwen3_config, words, write_model

pytestmark = pytest.mark.anyio

PLAIN = (
    "{%- for m in messages -%}{{ m['role'] }}: {{ m['content'] }}\n{%- endfor -%}"
    "{%- if add_generation_prompt -%}assistant: {%- endif -%}"
)
"""For models without a chat template: no special token marks where a message ends."""

SOME_AGENTS = 3
ALL = os.environ.get("ALL_REPLAYS") == "1"
"""Whether every recorded session is replayed; else as many as take seconds."""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def sessions(shared_data: Path, name: str) -> Iterator[dict[str, Any]]:
    with (shared_data / "sessions" / f"{name}.jsonl").open(encoding="utf-8") as lines:
        yield from without_none(map(json.loads, lines))


def check(score: Score, *, min_requests: int) -> None:
    assert score.num_requests >= min_requests
    assert score.ideal > 0
    assert score.num_reused >= 0.99 * score.ideal, str(score)


# -- real conversations ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "min_requests", "template"),
    [("oasst_branches", 100, None), ("mt_bench", 80, PLAIN)],
    ids=["oasst_branches", "mt_bench-plain-lines"],
)
async def test_chats_on_stories260k(
    shared_data: Path, name: str, min_requests: int, template: str | None
) -> None:
    folder = shared_data / "models" / "stories260K"
    score = await score_of(folder, sessions(shared_data, name), chat_template=template)
    check(score, min_requests=min_requests)


@pytest.mark.parametrize(
    ("name", "count", "min_requests"), [("oasst_branches", 60, 80), ("mt_bench", 25, 40)]
)
async def test_chats_on_the_embedded_model(
    shared_data: Path, name: str, count: int, min_requests: int
) -> None:
    some = islice(sessions(shared_data, name), None if ALL else count)
    check(await score_of(embedded.path(), some), min_requests=min_requests)


@pytest.mark.parametrize(
    "count", [SOME_AGENTS, pytest.param(10_000, marks=pytest.mark.slow, id="all")]
)
async def test_agents_with_tools_on_a_random_model(
    shared_data: Path, tmp_path: Path, count: int
) -> None:
    if count > SOME_AGENTS and not ALL:
        pytest.skip("takes minutes; set ALL_REPLAYS=1")
    tokenizer = shared_data / "tokenizers" / "qwen3"
    config = qwen3_config(
        vocab_size=151_936,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        eos_token_id=151_645,
    )
    folder = write_model(tmp_path / "random-qwen3", config, tokenizer_from=tokenizer)
    agents = [s for i, s in enumerate(sessions(shared_data, "tau_airline")) if i < count]
    check(await score_of(folder, agents), min_requests=10 * min(count, len(agents)))


# -- the same behaviour on texts of our own ----------------------------------------------------


def said(role: str, count: int, seed: int) -> dict[str, Any]:
    return {"role": role, "content": words(count, seed)}


def branches() -> Iterator[dict[str, Any]]:
    """A tree of messages as root-to-leaf paths: every node goes on in two ways."""

    def paths(depth: int, seed: int) -> Iterator[list[dict[str, Any]]]:
        message = said("assistant" if depth % 2 else "user", 20 + 7 * depth, seed)
        if depth == 5:
            yield [message]
            return
        for child in (2 * seed + 1, 2 * seed + 2):
            for path in paths(depth + 1, child):
                yield [message, *path]

    for i, path in enumerate(paths(0, 0)):
        yield {"id": f"branch-{i}", "messages": path}


def live_chats() -> Iterator[dict[str, Any]]:
    """Two questions each, the first answered by the model itself."""
    for i in range(10):
        yield {"id": f"chat-{i}", "messages": [said("user", 30, i), said("user", 20, 100 + i)]}


def agents() -> Iterator[dict[str, Any]]:
    """One long system prompt for all; calls of tools and their results."""
    for i in range(4):
        messages = [said("system", 600, 1), said("user", 15, i)]
        for step in range(4):
            messages += [
                said("assistant", 10, 50 * i + step),
                {**said("tool", 60, 60 * i + step), "tool_call_id": f"call-{step}"},
                said("assistant", 12, 70 * i + step),
                said("user", 9, 80 * i + step),
            ]
        yield {"id": f"agent-{i}", "messages": [*messages, said("assistant", 5, i)]}


@pytest.mark.parametrize(("kind", "min_requests"), [(branches, 32), (live_chats, 20), (agents, 30)])
@pytest.mark.parametrize("template", [None, PLAIN], ids=["chatml", "plain-lines"])
async def test_made_up_sessions_on_a_random_model(
    tmp_path: Path, kind: Any, min_requests: int, template: str | None
) -> None:
    folder = write_model(tmp_path / "random", qwen3_config(num_hidden_layers=2, hidden_size=64))
    check(await score_of(folder, kind(), chat_template=template), min_requests=min_requests)

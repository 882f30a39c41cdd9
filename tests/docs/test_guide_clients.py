"""What the guide tells clients is what the code answers: headers, errors, modes, refusals."""

from __future__ import annotations

import ast
import re
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import get_args

import pytest

from kvserve.api.errors import _TABLE
from kvserve.chat.archive import PersistMode
from kvserve.chat.miss import KvSource
from kvserve.config import Settings
from kvserve.core.errors import QueueFull
from kvserve.store import migrate
from kvserve.store.errors import SchemaTooNew, StoreLocked
from kvserve.store.lock import StoreLock
from tests.docs.pages import GUIDE_PAGE, ROOT, code_in

CONVERSATIONS = (
    "chat",
    "store",
    "api/conv_kv*.py",
    "api/identity.py",
    "api/body.py",
    "engine/line.py",
)
"""Where errors are raised that an order for a conversation may meet."""
ELSEWHERE = {"model_not_found", "stopping", "unknown_conversation", "context_length_exceeded"}
"""Codes that chat requests meet, or that others replace on the way out."""


def test_every_value_of_the_headers_is_explained() -> None:
    values = [code_in(row[0])[0] for row in GUIDE_PAGE.table("`X-Conv-KV`", "when")]
    assert values == [str(value) for value in KvSource]
    reasons = {
        re.split(r"[; ]", code_in(row[0])[0])[0]
        for row in GUIDE_PAGE.table("`X-Conv-Miss-Reason`", "when")
    }
    assert reasons == {text.partition(";")[0] for text in _miss_reasons()}


def _miss_reasons() -> set[str]:
    """Return all texts that `miss_reason` may return, and those of the turn around it."""
    source = (ROOT / "kvserve/chat/miss.py").read_text() + (
        ROOT / "kvserve/chat/turn.py"
    ).read_text()
    found = re.findall(r"""["'](\w+_changed|evicted|corrupt|expired)\b""", source)
    return set(found)


def test_every_error_is_listed_with_its_status() -> None:
    listed = {
        (int(row[0]), code_in(row[1])[0]) for row in GUIDE_PAGE.table("status", "code", "when")
    }
    raised = {(status, code) for status, code in _raised() if code not in ELSEWHERE}
    raised.add((429, str(QueueFull("").code)))
    assert listed == raised


def _raised() -> set[tuple[int, str]]:
    """Return status and code of every error that is made where orders pass."""
    status = {kind.__name__: number for kind, (number, _) in _TABLE.items()}
    found = set()
    for pattern in CONVERSATIONS:
        folder = ROOT / "kvserve" / pattern
        for path in sorted(
            folder.glob("*.py") if folder.is_dir() else folder.parent.glob(folder.name)
        ):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.Call):
                    continue
                name = node.func.id if isinstance(node.func, ast.Name) else ""
                codes = [word.value for word in node.keywords if word.arg == "code"]
                for code in codes:
                    if name in status and isinstance(code, ast.Constant):
                        found.add((status[name], str(code.value)))
    return found


def test_the_modes_are_those_of_the_setting() -> None:
    rows = GUIDE_PAGE.table("`--persist`", "written to disk", "answered orders that are durable")
    modes = [code_in(row[0])[0] for row in rows]
    assert modes == [str(mode) for mode in PersistMode]
    assert tuple(modes) == get_args(Settings.model_fields["persist"].annotation)


def test_a_second_process_hears_these_words(tmp_path: Path) -> None:
    lock = StoreLock.acquire(tmp_path)
    try:
        lock.announce("http://127.0.0.1:8000")
        with pytest.raises(StoreLocked) as refused:
            StoreLock.acquire(tmp_path)
    finally:
        lock.release()
    assert _without_numbers(refused.value.message) in _said()


def test_the_index_of_a_later_version_is_refused_in_these_words(tmp_path: Path) -> None:
    index = tmp_path / "index.sqlite3"
    migrate.upgrade(index)
    with closing(sqlite3.connect(index)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(SchemaTooNew) as refused:
        migrate.upgrade(index)
    assert _without_numbers(refused.value.message) in _said()


def _said() -> set[str]:
    lines = GUIDE_PAGE.section("## Recovery").text.splitlines()
    return {_without_numbers(line.removeprefix("kvserve: ")) for line in lines}


def _without_numbers(text: str) -> str:
    return re.sub(
        r"(?<=process )\d+|(?<=schema )\w+|(?<=up to )\w+|(?<=kvserve \()[\w.]+", "N", text
    )

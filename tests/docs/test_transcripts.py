"""What guide and README show of a server is what a server says.

One server process at a time plays all of it, in the order of the pages; each block is a test. After
a change that is meant, `python -m tests.docs.record` writes the answers anew.
"""

from __future__ import annotations

import re
import shutil
from typing import Any

import pytest

from tests.docs.live import Play, guide_phases, play, readme_phases
from tests.docs.pages import GUIDE, README, Page, code_in

pytestmark = pytest.mark.server
HAS_CURL = shutil.which("bash") is not None and shutil.which("curl") is not None

_BLOCKS = [(GUIDE, block) for _, blocks in guide_phases() for block in blocks]
_BLOCKS += [(README, shown) for phase in readme_phases() for _, shown in phase if shown]


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Play:
    return play(tmp_path_factory.mktemp("played"), with_shell=HAS_CURL)


@pytest.mark.parametrize(
    ("page", "line"),
    [(page, block.first_line) for page, block in _BLOCKS],
    ids=[f"{page.name}:{block.first_line + 1}" for page, block in _BLOCKS],
)
def test_a_server_answers_as_shown(page: Any, line: int, played: Play) -> None:
    if page == README and not HAS_CURL:
        pytest.skip("needs bash and curl")
    (found,) = (one for one in played.blocks if (one.page, one.first_line) == (page, line))
    assert found.differences == []


def test_the_ready_line_is_as_shown(played: Play) -> None:
    for block in Page.read(GUIDE).blocks:
        if block.language == "console":
            shown = block.text.splitlines()[1]
            for line in played.ready:
                assert re.sub(r":\d+ ", ":8000 ", line) == shown


def test_every_call_of_the_contract_is_shown() -> None:
    shown = {
        re.sub(r"/(doors|what-if|copy)\b", "/{id}", block.text.splitlines()[0].partition("?")[0])
        for page, block in _BLOCKS
        if page == GUIDE
    }
    assert shown == {
        "POST /v1/chat/completions",
        *(f"POST /v1/conv_kv/{call}" for call in ("save", "load", "warm", "import")),
        *(f"POST /v1/conv_kv/{{id}}/{call}" for call in ("fork", "rollback", "pin")),
        *("GET /v1/conv_kv/{id}", "GET /v1/conv_kv/{id}/export", "GET /v1/conv_kv/stats"),
        *("DELETE /v1/conv_kv/{id}", "DELETE /v1/conv_kv/{id}/pin"),
    }


def test_every_figure_of_the_disk_is_explained(played: Play) -> None:
    figures = played.stats["disk"]
    names = {f"writer.{name}" for name in figures.pop("writer")} | set(figures)
    rows = Page.read(GUIDE).table("figure", "meaning")
    assert {name for row in rows for name in code_in(row[0])} == names


def test_nothing_but_what_is_listed_lies_in_the_data_folder(played: Play) -> None:
    listed = {
        code_in(row[0])[0].partition("/")[0] for row in Page.read(GUIDE).table("path", "what")
    }
    assert {path.name for path in played.data.iterdir()} == listed


def test_the_data_folder_is_its_owners_alone(played: Play) -> None:
    for path in [played.data, *played.data.rglob("*")]:
        if path.name != "fingerprints.json":
            assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path

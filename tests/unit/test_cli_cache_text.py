"""What `kvserve cache` prints fits a terminal, and holds everything in a pipe."""

from __future__ import annotations

import io
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from rich.cells import cell_len
from rich.console import Console

from kvserve.cli.cache import words
from kvserve.cli.cache.detail import show_detail
from kvserve.cli.cache.listing import kept, show_listing
from kvserve.cli.cache.outcome import checked_lines, mended_lines
from kvserve.cli.cache.place import Checked, Detail, Item, Line, Listing, Mended, Problem, Step
from kvserve.cli.cache.progress import bar

NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)
ITEM = Item(
    tenant="",
    id="conv_0123456789abcdef01234567",
    title="Die Übersicht über alles, was im Vertrag steht, und noch mehr",
    model="kvserve-embedded",
    tokens=123_456,
    messages=12,
    bytes=1_234_567_890,
    shared_bytes=999,
    tier="disk",
    saved=True,
    pinned=True,
    pinned_until=NOW + timedelta(hours=5),
    branches=3,
    created_at=NOW - timedelta(days=2),
    used_at=NOW - timedelta(minutes=7),
    expires_at=NOW + timedelta(hours=5),
)


def listed(*items: Item, width: int | None = None) -> list[str]:
    out = io.StringIO()
    terminal = width is not None
    console = Console(
        file=out, width=width, force_terminal=terminal, color_system=None, highlight=False
    )
    show_listing(console, Listing(items, 5_000), NOW)
    return out.getvalue().splitlines()


def shown(detail: Detail, *, encoding: str = "utf-8") -> str:
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
    show_detail(Console(file=out, highlight=False), detail, NOW, all_branches=False)
    out.flush()
    return out.buffer.getvalue().decode(encoding)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (9_949, "9.9 kB"),
        (9_950, "10 kB"),
        (999_499, "999 kB"),
        (999_500, "1.0 MB"),
        (1_234_567_890, "1.2 GB"),
        (5 * 10**15, "5000 TB"),
    ],
)
def test_sizes_have_two_digits_and_a_unit_of_a_thousand(nbytes: int, text: str) -> None:
    assert words.size(nbytes) == text


def test_durations_are_rounded_in_their_largest_unit() -> None:
    spans = [0.4, 59, 60, 3599, 7200, 86_399, 86_400 * 400, -5]
    assert [words.span(timedelta(seconds=s)) for s in spans] == (
        ["0 s", "59 s", "1 min", "60 min", "2 h", "24 h", "400 d", "0 s"]
    )


@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_no_line_of_a_list_is_wider_than_the_terminal(width: int) -> None:
    wide = replace(ITEM, title="漢字" * 40, id="b")
    lines = listed(ITEM, wide, replace(ITEM, tenant="ab" * 16, title=None), width=width)
    assert len(lines) == 5
    assert max(map(cell_len, lines)) <= width
    assert "TENANT" in lines[0], "with several tenants an id is not enough"
    assert lines[1].split()[0] == ITEM.id


def test_a_narrow_terminal_loses_columns_and_never_an_id() -> None:
    lines = listed(ITEM, width=40)
    assert ITEM.id in lines[1] and "MODEL" not in lines[0] and "TIER" in lines[0]


def test_a_title_is_shortened_with_a_sign_that_it_was() -> None:
    assert "…" in listed(ITEM, width=140)[1]
    assert "…" not in listed(ITEM)[1]


def test_a_list_in_a_pipe_is_whole_and_aligned() -> None:
    header, row, *_, totals = listed(ITEM)
    assert ITEM.title is not None and row.endswith(ITEM.title)
    for name, value in (("ID", "conv_"), ("TIER", "disk"), ("MODEL", "kvserve-embedded")):
        assert header.index(name) == row.index(value)
    assert totals == "1 conversation, 123,456 tokens, 5.0 kB on disk in all"


def test_the_last_used_comes_first() -> None:
    older = replace(ITEM, id="older", used_at=NOW - timedelta(days=1))
    assert [line.split()[0] for line in listed(older, ITEM)[1:3]] == [ITEM.id, "older"]


def test_an_empty_list_says_so() -> None:
    assert listed() == ["0 conversations, 0 tokens, 5.0 kB on disk in all"]


def test_a_title_cannot_move_the_cursor_or_look_like_markup() -> None:
    for width in (None, 300):
        lines = listed(replace(ITEM, title="[red]a\x1b[31m\nb\x07[/red]"), width=width)
        assert len(lines) == 3 and "[red]a�[31m�b�[/red]" in lines[1]


def test_what_keeps_a_conversation_is_said_with_its_end() -> None:
    assert kept(ITEM, NOW) == "saved, pinned for 5 h"
    assert kept(replace(ITEM, pinned_until=None, expires_at=None), NOW) == "saved, pinned"
    dying = replace(ITEM, saved=False, pinned=False, pinned_until=None)
    assert kept(dying, NOW) == "ends in 5 h"
    assert kept(replace(dying, expires_at=None), NOW) == ""


def test_a_terminal_without_unicode_gets_a_tree_of_ascii() -> None:
    steps = (Step(1, 0, 10, 500, "disk"), Step(2, 10, 30, 700, "disk"))
    fork = (Step(1, 0, 10, 500, "disk"), Step("fork", 10, 20, None, ""))
    item = replace(ITEM, title=None, id="main")
    lines = (Line("main", NOW, steps), Line("fork", NOW, fork))
    text = shown(Detail(item, (), lines), encoding="ascii")
    assert "* 0-10" in text and "|-* 10-20" in text and "main <" in text
    assert "● 0-10" in shown(Detail(item, (), lines))


def test_outcomes_are_lines_with_the_whole_at_the_end() -> None:
    problem = Problem("run 3 (file ab-0.safetensors)", "digest segment 1, needed by main")
    found = Checked(files=2, bytes=10, conversations=1, problems=(problem,))
    assert list(checked_lines(found)) == [
        "run 3 (file ab-0.safetensors): digest segment 1, needed by main",
        "1 conversation, 2 files, 10 B: 1 fault; see `kvserve cache repair`",
    ]
    assert list(checked_lines(replace(found, problems=()))) == [
        "1 conversation, 2 files, 10 B: all well"
    ]
    mended = Mended(
        problems=(problem,),
        quarantined_files=1,
        restored_rows=2,
        ended_conversations=0,
        removed_files=0,
        freed_bytes=0,
        left=("run 4 has the key of other tokens",),
    )
    assert list(mended_lines(mended))[1:] == [
        "1 damaged file put into quarantine",
        "2 rows made again from files",
        "0 files removed, 0 B",
        "not repaired: run 4 has the key of other tokens",
    ]


def test_a_bar_is_for_terminals() -> None:
    cases = ((True, "verifying", True), (False, "verifying", False), (True, None, False))
    for terminal, doing, shows in cases:
        out = io.StringIO()
        with bar(Console(file=out, force_terminal=terminal, width=80), doing) as progress:
            progress(5, 10)
        assert ("verifying" in out.getvalue()) is shows

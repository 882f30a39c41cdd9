"""The replay counts as the trace's readers do, and shows what the policy is for."""

from __future__ import annotations

import gzip
import json
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts.replay.optimum import unlimited, with_foresight
from scripts.replay.requests import Request, read_trace
from scripts.replay.scenarios import SCENARIOS, change, documents, pause, sub_agents
from scripts.replay.tiers import replay
from scripts.replay_trace import TRACE, amounts, main, measure
from tests.unit.made_paths import PATHS, requests_of

# -- made-up traces -------------------------------------------------------------------------------


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def row(num_tokens: int, *blocks: int) -> dict[str, object]:
    return {"timestamp": 1500, "input_length": num_tokens, "hash_ids": list(blocks)}


# -- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["trace.jsonl", "trace.jsonl.gz"])
def test_a_conversation_is_known_by_its_whole_blocks(tmp_path: Path, name: str) -> None:
    trace = write(
        tmp_path / name,
        [
            row(1100, 0, 1, 2),  # a system prompt of one block, and a question
            row(1100, 0, 3, 4),  # another question
            row(1700, 0, 1, 5, 6),  # the first one goes on: its last block was not whole
            row(2100, 0, 1, 5, 7, 8),  # and again
            row(1700, 0, 1, 5, 9),  # what it once was goes on otherwise: another conversation
        ],
    )
    requests = read_trace(trace)
    assert [request.num_turns for request in requests] == [1, 1, 2, 3, 1]
    assert requests[2].blocks == (0, 1, 5, 6) and requests[2].at_s == 1.5


def test_a_bad_line_is_named(tmp_path: Path) -> None:
    trace = write(tmp_path / "trace.jsonl", [row(512, 0), {"timestamp": 1}])
    with pytest.raises(ValueError, match="line 2 is no request"):
        read_trace(trace)


def test_a_missing_trace_is_said_in_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--trace", str(tmp_path / "none.jsonl")])
    assert ended.value.code == 2
    assert "there is no trace at" in capsys.readouterr().err


def test_amounts_have_suffixes_and_are_not_negative(capsys: pytest.CaptureFixture[str]) -> None:
    assert amounts("1k, 2.5M,7") == [1000, 2_500_000, 7]
    for bad in ("1x", "-1", "k", ""):
        with pytest.raises(SystemExit):
            main(["--ram", bad, "--only", "scenarios"])
    assert "1x" in capsys.readouterr().err


# -- the tiers ------------------------------------------------------------------------------------


@settings(deadline=None)
@given(PATHS, st.integers(1, 12))
def test_equal_ranks_are_lru(paths: list[tuple[int, ...]], num_blocks: int) -> None:
    requests = requests_of(paths)
    held: dict[int, int] = {}
    ticks = count()
    hits = 0
    for request in requests:
        found = [block in held for block in request.blocks]
        hits += sum(found)
        fits = request.blocks[:num_blocks]
        for block in reversed(fits):  # leaves first: a prefix is as young as what is behind it
            held[block] = next(ticks)
        while len(held) > num_blocks:
            del held[min(held, key=held.__getitem__)]
    result = replay(requests, num_blocks, lru=True)
    assert (result.ram, result.disk, result.total) == (hits, 0, sum(map(len, paths)))


@settings(deadline=None)
@given(PATHS, st.integers(1, 8), st.integers(1, 30), st.booleans())
def test_tiers_find_no_more_than_foresight_does(
    paths: list[tuple[int, ...]], ram: int, disk: int, lru: bool
) -> None:
    requests = requests_of(paths)
    hits = replay(requests, ram, disk, lru=lru)
    assert hits.ram <= with_foresight(requests, ram)
    assert hits.ram + hits.disk <= with_foresight(requests, ram + disk) <= unlimited(requests)
    assert hits.disk >= 0 and hits.ram + hits.disk <= hits.total
    everything = replay(requests, ram, 1000, lru=lru)
    assert everything.ram + everything.disk == unlimited(requests)


def test_what_memory_evicted_comes_back_from_disk() -> None:
    first, second = tuple(range(10)), tuple(range(100, 110))
    requests = [Request(float(i), blocks) for i, blocks in enumerate([first, second, first, first])]
    hits = replay(requests, 10, 20, lru=True)
    assert (hits.ram, hits.disk, hits.total) == (10, 10, 40)
    assert replay(requests, 10, 5, lru=True).disk == 0  # too small to hold a run


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=3).map(tuple), max_size=7))
def test_foresight_is_the_exact_optimum(paths: list[tuple[int, ...]]) -> None:
    requests = requests_of(paths)
    num_blocks = 3
    best: dict[frozenset[int], int] = {frozenset(): 0}
    for request in requests:
        after: dict[frozenset[int], int] = {}
        for held, hits in best.items():
            found = next((i for i, b in enumerate(request.blocks) if b not in held), 3)
            union = held | set(request.blocks)
            for kept in _subsets(sorted(union), num_blocks):
                after[kept] = max(after.get(kept, 0), hits + min(found, len(request.blocks)))
        best = after
    assert with_foresight(requests, num_blocks) == max(best.values())


def _subsets(items: list[int], most: int) -> list[frozenset[int]]:
    found = [frozenset[int]()]
    for item in items:
        found += [kept | {item} for kept in found if len(kept) < most]
    return found


# -- what the policy is for -----------------------------------------------------------------------


def test_who_pauses_is_not_thrown_out_for_a_burst_of_prompts() -> None:
    for num_turns in (4, 8):
        burst = measure("", pause(500, num_turns), 200, 0)
        assert burst.ram == burst.unlimited > 4 * burst.lru_ram
    assert measure("", pause(5000, 8), 200, 0).ram == burst.ram


def test_a_main_agent_is_not_thrown_out_by_its_sub_agents() -> None:
    agents = measure("", sub_agents(50), 128, 0)
    assert agents.ram == agents.unlimited > 8 * agents.lru_ram


def test_old_favourites_make_way_for_new_ones() -> None:
    for load in (change(7), documents(4)):
        displaced = measure("", load, 220, 0)
        assert displaced.ram == displaced.lru_ram == displaced.unlimited


def test_every_made_up_load_stays_below_its_optimum() -> None:
    for scenario in SCENARIOS:
        shown = measure(scenario.name, scenario.make(), scenario.ram_blocks, 0)
        assert shown.ram <= shown.optimum_ram <= shown.unlimited


def test_figures_come_as_json_and_as_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = write(tmp_path / "t.jsonl", [row(1024, 0, 1), row(1024, 2, 3), row(1100, 0, 1, 4)])
    arguments = ["--trace", str(trace), "--ram", "1024,2048", "--disk", "2k", "--unit", "tokens"]
    main([*arguments, "--only", "trace", "--json"])
    figures = json.loads(capsys.readouterr().out)
    assert [(row["ram_blocks"], row["disk_blocks"]) for row in figures] == [(2, 3), (4, 3)]
    assert figures[1]["ram"] == figures[1]["unlimited"] == 2 / 7
    assert figures[0]["optimum_ram"] == 2 / 7 and figures[0]["ram"] == 0
    main(arguments)
    shown = capsys.readouterr().out
    assert "3 requests" in shown and "Made-up loads" in shown


@pytest.mark.skipif(not TRACE.is_file(), reason="the trace is not here")
@pytest.mark.parametrize(
    ("num_blocks", "published"),
    [
        (1000, 0.045),
        (5000, 0.112),
        (10_000, 0.212),
        pytest.param(20_000, 0.288, marks=pytest.mark.slow),
        pytest.param(50_000, 0.355, marks=pytest.mark.slow),
    ],
)
def test_the_policy_finds_more_than_lru_on_a_real_trace(num_blocks: int, published: float) -> None:
    requests = read_trace(TRACE)
    lru = replay(requests, num_blocks, lru=True)
    assert round(lru.ratio, 3) == published
    assert round(unlimited(requests) / lru.total, 3) == 0.366
    ours = replay(requests, num_blocks)
    assert lru.ratio < ours.ratio < with_foresight(requests, num_blocks) / lru.total

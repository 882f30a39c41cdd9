"""The tree of branches tells for every conversation where it goes, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from kvserve.cli.cache.branches import Branch, grow
from kvserve.cli.cache.graph import TYPED, graph
from kvserve.cli.cache.place import Line, Step

NOW = datetime(2026, 11, 20, tzinfo=UTC)


def line(name: str, *steps: tuple[object, int, int], age: int = 0) -> Line:
    """Return a conversation of steps `(label, start, end)`, ten bytes a token."""
    made = (Step(str(label), start, end, 10 * (end - start), "disk") for label, start, end in steps)
    return Line(name, NOW - timedelta(days=age), tuple(made))


def every(branches: list[Branch]) -> Iterator[Branch]:
    for branch in branches:
        yield branch
        yield from every(branch.below)


def drawn(lines: list[Line], trunk: str, limit: int | None = None) -> list[str]:
    return [
        f"{row.drawn} {row.branch.start}-{row.branch.end} {' '.join(row.branch.tips)}".rstrip()
        if row.branch
        else f"{row.drawn}{row.num_left_out}"
        for row in graph(grow(lines, trunk), TYPED, limit)
    ]


def test_conversations_part_where_one_leaves_a_run_or_goes_on_in_another() -> None:
    lines = [
        line("main", (1, 0, 50), (2, 50, 80)),
        line("fork", (1, 0, 30), (3, 30, 60)),
        line("short", (1, 0, 20)),
        line("twig", (1, 0, 50), (2, 50, 70), (4, 70, 75)),
    ]
    assert drawn(lines, "main") == [
        "* 0-20 short",
        "* 20-30",
        "|-* 30-60 fork",
        "* 30-70",
        "|-* 70-75 twig",
        "* 70-80 main",
    ]
    assert drawn(lines, "fork")[2:] == [
        "|-* 30-70",
        "| |-* 70-75 twig",
        "| * 70-80 main",
        "* 30-60 fork",
    ]


def test_a_conversation_alone_is_one_branch() -> None:
    [branch] = grow([line("main", (1, 0, 50), (2, 50, 80), (3, 80, 90))], "main")
    assert (branch.start, branch.end, branch.nbytes) == (0, 90, 900)
    assert branch.tips == ["main"] and branch.below == []


def test_a_branch_held_in_two_places_says_so() -> None:
    steps = (Step(1, 0, 10, 100, "disk"), Step(2, 10, 20, 0, "none"))
    [branch] = grow([Line("main", NOW, steps)], "main")
    assert branch.tier == "part" and branch.nbytes == 100


def test_a_size_that_is_not_known_is_not_added_to_one_that_is() -> None:
    steps = (Step(1, 0, 10, 100, "disk"), Step(2, 10, 20, None, ""), Step(3, 20, 30, None, ""))
    [branch] = grow([Line("main", NOW, steps)], "main")
    assert branch.nbytes == 100
    [rest] = branch.below
    assert (rest.start, rest.end, rest.nbytes) == (10, 30, None)


def test_conversations_that_end_at_the_same_token_are_named_together() -> None:
    lines = [line("a", (1, 0, 9)), line("b", (1, 0, 9)), line("c", (1, 0, 12))]
    assert drawn(lines, "c") == ["* 0-9 a b", "* 9-12 c"]


def test_at_most_so_many_sides_of_a_fork_are_drawn_the_last_used_first() -> None:
    lines = [line("main", (1, 0, 50), (2, 50, 80), age=99)]
    lines += [line(f"c{n}", (1, 0, 50), (10 + n, 50, 60 + n), age=n) for n in range(5)]
    assert drawn(lines, "main", 2) == [
        "* 0-50",
        "|-* 50-60 c0",
        "|-* 50-61 c1",
        "| : 3",
        "* 50-80 main",
    ]


def test_a_conversation_without_tokens_is_left_out() -> None:
    assert drawn([line("empty"), line("main", (1, 0, 5))], "main") == ["* 0-5 main"]
    assert grow([line("empty")], "empty") == []


def test_a_fork_at_every_turn_of_a_long_conversation_is_drawn_without_nesting() -> None:
    trunk = [(n, n, n + 1) for n in range(300)]
    lines = [line("main", *trunk)]
    lines += [line(f"c{n}", *trunk[:n], (f"c{n}", n, n + 5)) for n in range(1, 300)]
    rows = drawn(lines, "main")
    assert len(rows) == 2 * 299 + 1
    assert max(row.count("|") for row in rows) == 1


@st.composite
def families(draw: st.DrawFn) -> list[Line]:
    """Draw conversations in a tree of runs in which children hang anywhere on their parents."""
    runs: list[tuple[tuple[object, int, int], ...]] = [((0, 0, draw(st.integers(1, 9))),)]
    for number in range(1, draw(st.integers(1, 12))):
        above = draw(st.sampled_from(runs))
        label, start, end = above[-1]
        at = draw(st.integers(start + 1, end))
        length = draw(st.integers(1, 9))
        runs.append((*above[:-1], (label, start, at), (number, at, at + length)))
    lines = []
    for number in range(draw(st.integers(1, 8))):
        path = draw(st.sampled_from(runs))
        label, start, end = path[-1]
        until = draw(st.integers(start + 1, end))
        lines.append(line(f"c{number}", *path[:-1], (label, start, until), age=number))
    return lines


@given(families())
def test_every_conversation_is_found_once_and_all_its_bytes(lines: list[Line]) -> None:
    branches = grow(lines, lines[-1].id)
    tips = [tip for branch in every(branches) for tip in branch.tips]
    assert sorted(tips) == sorted(one.id for one in lines)
    paths: dict[str, int] = {}

    def down(branch: Branch, start: int, nbytes: int) -> None:
        assert branch.start == start < branch.end
        assert branch.tips or len(branch.below) != 1, "this should be one branch"
        assert branch.num_tips == sum(len(one.tips) for one in every([branch]))
        total = nbytes + (branch.nbytes or 0)
        paths.update(dict.fromkeys(branch.tips, total))
        for child in branch.below:
            down(child, branch.end, total)

    for branch in branches:
        down(branch, 0, 0)
    assert paths == {one.id: 10 * one.steps[-1].end for one in lines}
    at, trunk = branches[0], lines[-1].id
    while trunk not in at.tips:
        at = at.below[0]

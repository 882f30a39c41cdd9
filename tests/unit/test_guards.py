"""What a write may do, decided by figures: limits, budgets, and who has to leave."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from kvserve.core.errors import OutOfSpace, TooLarge
from kvserve.store.guards import (
    MAX_TURNS,
    Holding,
    Limits,
    Situation,
    check_day,
    check_save,
    evictable_nbytes,
    refusal,
    shortfall,
    size,
    staleness,
    victims,
)

CALM = Situation(
    new_nbytes=100,
    path_nbytes=100,
    held_nbytes=0,
    written_today=0,
    disk_used=0,
    disk_free=10_000,
)


def run(run_id: int, parent: int | None = None, **changes: float | bool) -> Holding:
    holding = Holding(run_id=run_id, parent_id=parent, start=0, end=10, nbytes=100, age_s=60.0)
    return replace(holding, **changes)  # type: ignore[arg-type]


# -- limits -------------------------------------------------------------------------------------


def test_a_conversation_may_fill_the_per_save_limit_and_no_more() -> None:
    limits = Limits(save_nbytes=1000)
    check_save(limits, replace(CALM, path_nbytes=1000))
    with pytest.raises(TooLarge, match=r"1001 bytes on disk; 1000 bytes are allowed") as caught:
        check_save(limits, replace(CALM, path_nbytes=1001))
    assert caught.value.code == "conversation_too_large"


def test_the_days_budget_counts_what_was_written_today() -> None:
    limits = Limits(daily_nbytes=1000)
    check_day(limits, replace(CALM, written_today=900))
    with pytest.raises(OutOfSpace, match=r"100 bytes .* of 1000 bytes, of which 901 ") as caught:
        check_day(limits, replace(CALM, written_today=901))
    assert caught.value.code == "write_budget"
    check_day(limits, replace(CALM, new_nbytes=0, written_today=5000))  # nothing to write
    check_day(Limits(), replace(CALM, written_today=2**60))


@pytest.mark.parametrize(
    ("limits", "changes", "missing"),
    [
        (Limits(), {}, 0),
        (Limits(store_nbytes=1000), {"held_nbytes": 900}, 0),
        (Limits(store_nbytes=1000), {"held_nbytes": 930}, 30),
        (Limits(store_nbytes=1000), {"held_nbytes": 5000, "new_nbytes": 0}, 0),
        (Limits(), {"disk_used": 890, "disk_free": 110, "new_nbytes": 10}, 0),
        (Limits(), {"disk_used": 890, "disk_free": 110, "new_nbytes": 11}, 1),
        # A share of one still cannot put more on the disk than goes on it.
        (Limits(disk_share=1.0), {"disk_used": 950, "disk_free": 50}, 50),
    ],
)
def test_the_shortfall_is_what_must_leave(
    limits: Limits, changes: dict[str, int], missing: int
) -> None:
    assert shortfall(limits, replace(CALM, **changes)) == missing


def test_a_refusal_names_the_guard_and_its_figures() -> None:
    limits = Limits(store_nbytes=10**9)
    full = replace(CALM, new_nbytes=2 * 10**6, held_nbytes=999_000_000)
    error = refusal(limits, full, evictable=500_000)
    assert error.code == "store_budget"
    for figure in ("2000000 bytes (2.0 MB)", "(1.0 GB)", "999000000 bytes", "500000 bytes"):
        assert figure in error.message
    error = refusal(limits, replace(CALM, disk_used=9_500, disk_free=500), evictable=7)
    assert error.code == "disk_full"
    for figure in ("90%", "9500 bytes of 10000 bytes", "500 bytes free", "7 bytes"):
        assert figure in error.message


def test_sizes_are_exact_and_readable() -> None:
    assert size(999_999) == "999999 bytes"
    assert size(1_500_000) == "1500000 bytes (1.5 MB)"
    assert size(214748364800) == "214748364800 bytes (214.7 GB)"


# -- who leaves ---------------------------------------------------------------------------------


def test_the_older_leaf_leaves_first() -> None:
    assert victims([run(1, age_s=10.0), run(2, age_s=20.0)], 1) == [2]


def test_parents_leave_after_all_their_children() -> None:
    holdings = [run(1, age_s=1000.0), run(2, 1, age_s=1.0), run(3, 1, age_s=2.0)]
    assert victims(holdings, 100) == [3]
    assert victims(holdings, 201) == [3, 2, 1]


def test_a_parent_is_as_young_as_what_was_below_it() -> None:
    trunk = run(1, age_s=1000.0, num_turns=0)
    leaf = run(2, 1, age_s=10.0, num_turns=3)
    other = run(3, age_s=500.0, num_turns=1)
    assert victims([trunk, leaf, other], 300) == [3, 2, 1]
    assert victims([trunk, replace(leaf, age_s=900.0), replace(other, age_s=200.0)], 300) == [
        *(2, 1, 3)
    ]


def test_a_conversation_of_many_turns_outlives_a_burst_of_single_questions() -> None:
    hour = 3600.0
    waiting = run(1, age_s=3 * hour, num_turns=12)
    burst = [run(n, age_s=hour, num_turns=1) for n in range(2, 30)]
    assert victims([waiting, *burst], 27 * 100) is not None
    assert 1 not in (victims([waiting, *burst], 27 * 100) or [])
    assert victims([replace(waiting, age_s=30 * hour), *burst], 1) == [1]


def test_what_holds_more_tokens_for_its_bytes_is_worth_more() -> None:
    assert staleness(run(1, end=100)) == 2 * staleness(run(1, end=200))
    assert staleness(run(1)) == staleness(run(1, start=50_000, end=50_010))
    assert staleness(run(1, nbytes=200)) == 2 * staleness(run(1, nbytes=100))
    assert staleness(run(1, num_turns=MAX_TURNS)) == staleness(run(1, num_turns=10**6))


def test_protected_runs_and_all_above_them_stay() -> None:
    chain = [run(1), run(2, 1), run(3, 2, protected=True), run(4, 3), run(5, 1)]
    assert sorted(victims(chain, 200) or []) == [4, 5]
    assert victims(chain, 201) is None
    assert evictable_nbytes(chain) == 200


def test_a_protected_row_without_a_file_still_protects_its_parent() -> None:
    chain = [run(1), run(2, 1, nbytes=0, protected=True)]
    assert victims(chain, 1) is None


def test_rows_without_files_let_their_parents_leave() -> None:
    chain = [run(1), run(2, 1, nbytes=0), run(3, 2, nbytes=0), run(4, 1)]
    assert victims(chain, 200) == [4, 1]


def test_the_path_being_written_is_kept() -> None:
    chain = [run(1), run(2, 1), run(3, 2)]
    assert victims(chain, 100, keep=[2]) == [3]
    assert victims(chain, 101, keep=[2]) is None


def test_more_than_needed_leaves_only_to_spare_the_next_search() -> None:
    holdings = [run(n, age_s=float(n)) for n in range(1, 9)]
    assert victims(holdings, 100) == [8]
    assert victims(holdings, 100, spare=150) == [8, 7, 6]
    assert victims(holdings, 800, spare=10**9) == [8, 7, 6, 5, 4, 3, 2, 1]
    assert victims(holdings, 0) == []


def test_any_choice_frees_enough_and_never_strands_a_child() -> None:
    dice = random.Random(7)
    for _ in range(300):
        holdings = [
            run(
                number,
                dice.choice([None, *range(number)]),
                nbytes=dice.choice([0, 1, 50, 100]),
                age_s=dice.uniform(0, 1000),
                num_turns=dice.randrange(4),
                protected=dice.random() < 0.1,
            )
            for number in range(dice.randrange(1, 25))
        ]
        by_id = {holding.run_id: holding for holding in holdings}
        most = evictable_nbytes(holdings)
        needed = dice.randint(0, most + 20)
        chosen = victims(holdings, needed)
        assert (chosen is None) == (needed > most)
        gone: set[int] = set()
        for run_id in chosen or []:
            assert run_id not in gone and by_id[run_id].nbytes and not by_id[run_id].protected
            gone.add(run_id)
        freed = sum(by_id[run_id].nbytes for run_id in gone)
        assert chosen is None or freed >= needed
        for holding in holdings:
            here = holding.parent_id
            while here is not None:
                if holding.run_id not in gone and (holding.nbytes or holding.protected):
                    assert here not in gone
                here = by_id[here].parent_id

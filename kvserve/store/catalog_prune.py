"""Shrinking of the tree of runs: files that are let go, rows that nothing needs.

State: none; functions over a connection, called by `kvserve.store.catalog` inside a write
transaction. They return the names of the files to remove once it is committed, and touch none.
Which runs go is decided elsewhere; here only that leaves go before what they hang on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import Connection, ScalarSelect, bindparam, delete, func, select, update

from kvserve.store.catalog_runs import NO_FILE
from kvserve.store.tables import Moment, RunState, conversations, runs


class _Leaf(NamedTuple):
    """What is looked at of a run that may go."""

    id: int
    parent_id: int | None
    file: str | None
    used_at: datetime
    hits: int


_LEAF = select(*(runs.c[name] for name in _Leaf._fields)).order_by(runs.c.start.desc())


def among(ids: Iterable[int]) -> ScalarSelect[int]:
    """Return a subquery of any number of ids; SQLite limits how many parameters there may be."""
    values = func.json_each(json_list(ids)).table_valued("value")
    return select(values.c.value).scalar_subquery()


def json_list(ids: Iterable[int]) -> str:
    """Return ids as one parameter, for SQLite's `json_each`."""
    return "[" + ",".join(map(str, ids)) + "]"


def let_go(connection: Connection, run_ids: Iterable[int], state: RunState) -> list[str]:
    """Take the files from runs and return their names, to be removed once this is committed.

    Their rows stay while a conversation or a run below needs the tokens.
    """
    doomed = runs.c.id.in_(among(run_ids)) & runs.c.file.is_not(None)
    rows = [_Leaf(*row) for row in connection.execute(_LEAF.where(doomed))]
    ids = [row.id for row in rows]
    _pass_on_use(connection, rows)
    connection.execute(
        update(runs).where(runs.c.id.in_(among(ids))).values(NO_FILE | {"state": state, "hits": 0})
    )
    prune(connection, ids, with_files=False)
    return [row.file for row in rows if row.file is not None]


def files_from(connection: Connection, run_id: int) -> dict[int, str]:
    """Return the files of a run and of all that hang below it, by run."""
    below = select(runs.c.id).where(runs.c.id == run_id).cte("below", recursive=True)
    child = runs.alias("child")
    below = below.union_all(select(child.c.id).where(child.c.parent_id == below.c.id))
    query = select(runs.c.id, runs.c.file).where(runs.c.id.in_(select(below.c.id)))
    return {row.id: row.file for row in connection.execute(query) if row.file is not None}


def prune(connection: Connection, run_ids: Iterable[int], *, with_files: bool) -> list[str]:
    """Delete those of the rows that nothing hangs on or ends in, leaves first.

    Without `with_files`, only those that have no file. Parents without a file that are thus left
    without a purpose go too. Returns the names of the files that the deleted rows had.
    """
    files: list[str] = []
    ids = set(run_ids)
    while ids:
        query = _LEAF.where(runs.c.id.in_(among(ids)))
        if not with_files:
            query = query.where(runs.c.file.is_(None))
        gone = _unused(connection, [_Leaf(*row) for row in connection.execute(query)])
        files += [row.file for row in gone if row.file is not None]
        _pass_on_use(connection, gone)
        connection.execute(delete(runs).where(runs.c.id.in_(among(row.id for row in gone))))
        ids = {row.parent_id for row in gone if row.parent_id is not None}
        with_files = False
    return files


def _unused(connection: Connection, rows: Sequence[_Leaf]) -> list[_Leaf]:
    """Return those that nothing hangs on or ends in once the ones before them are gone."""
    ids = among(row.id for row in rows)
    below = Counter(connection.scalars(select(runs.c.parent_id).where(runs.c.parent_id.in_(ids))))
    tips = set(
        connection.scalars(select(conversations.c.tip_id).where(conversations.c.tip_id.in_(ids)))
    )
    gone = []
    for row in rows:
        if not below[row.id] and row.id not in tips:
            gone.append(row)
            if row.parent_id is not None:
                below[row.parent_id] -= 1
    return gone


def _pass_on_use(connection: Connection, rows: Sequence[_Leaf]) -> None:
    """Tell the parents of what goes, deepest first, how it was used: they may be next."""
    passed: dict[int, tuple[datetime, int]] = {}
    for row in rows:
        last, hits = passed.get(row.id, (row.used_at, 0))
        if row.parent_id is not None:
            above, others = passed.get(row.parent_id, (last, 0))
            use = (max(above, last, row.used_at), others + hits + row.hits)
            passed[row.parent_id] = use
    if passed:
        connection.execute(
            update(runs)
            .where(runs.c.id == bindparam("above"))
            .values(
                used_at=func.max(runs.c.used_at, bindparam("last", type_=Moment)),
                hits=runs.c.hits + bindparam("more"),
            ),
            [
                {"above": run_id, "last": last, "more": hits}
                for run_id, (last, hits) in passed.items()
            ],
        )

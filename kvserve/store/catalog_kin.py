"""Which conversations share runs: those that begin as one does, and those that need a run.

State: none; a function over a connection, called by `kvserve.store.catalog` inside a transaction.
Reads no tokens: which run a path goes through says what is shared, since no two runs that continue
one position begin alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, Select, bindparam, select

from kvserve.store.catalog_prune import among
from kvserve.store.catalog_walk import path_of
from kvserve.store.runs import Kin, Stretch
from kvserve.store.tables import conversations, runs


def kin(connection: Connection, tenant: str, id: str, since: int) -> tuple[Kin, ...]:
    """Return the tenant's conversations that share at least `since` tokens with one of them.

    That one is among them, unless it is unknown or shorter. `since` is 1 at least.
    """
    own = connection.execute(
        select(conversations.c.tip_id, conversations.c.num_tokens).where(
            conversations.c.tenant == tenant, conversations.c.name == id
        )
    ).one_or_none()
    if own is None or own.tip_id is None or own.num_tokens < since:
        return ()
    path = [at.run for at in path_of(connection, own.tip_id, own.num_tokens)]
    above = [run for run in path if run.start < since]
    known: dict[int, Any] = {run.id: run for run in above}
    fork = above[-1]
    for row in connection.execute(_BELOW, {"fork_id": fork.id, "since": since}):
        known[row.id] = row
    named = connection.execute(
        select(
            *(conversations.c.name, conversations.c.used_at),
            *(conversations.c.tip_id, conversations.c.num_tokens),
        )
        .where(conversations.c.tenant == tenant, conversations.c.num_tokens >= since)
        .where(conversations.c.tip_id.in_(among(known.keys() - {run.id for run in above[:-1]})))
        .order_by(conversations.c.id)
    )
    return tuple(_kin(row, known) for row in named)


def users(connection: Connection, run_id: int) -> list[tuple[str, str]]:
    """Return tenant and name of the conversations on whose path a run lies."""
    query = (
        select(conversations.c.tenant, conversations.c.name)
        .where(conversations.c.tip_id.in_(_FROM_RUN))
        .order_by(conversations.c.tenant, conversations.c.name)
    )
    return [(row.tenant, row.name) for row in connection.execute(query, {"run_id": run_id})]


def _kin(row: Any, known: Mapping[int, Any]) -> Kin:
    upwards: list[Stretch] = []
    run_id, until = row.tip_id, row.num_tokens
    while run_id is not None:
        run = known[run_id]
        nbytes = run.nbytes * (until - run.start) // (run.end - run.start)
        upwards.append(Stretch(run.id, run.start, until, nbytes, run.file is not None))
        run_id, until = run.parent_id, run.start
    return Kin(row.name, row.used_at, tuple(reversed(upwards)))


def _below_query() -> Select[Any]:
    columns = (runs.c.id, runs.c.parent_id, runs.c.start, runs.c.end, runs.c.nbytes, runs.c.file)
    below = (
        select(runs.c.id)
        .where(runs.c.parent_id == bindparam("fork_id"), runs.c.start >= bindparam("since"))
        .cte("below", recursive=True)
    )
    child = runs.alias("child")
    below = below.union_all(
        select(child.c.id).select_from(below.join(child, child.c.parent_id == below.c.id))
    )
    return select(*columns).join(below, below.c.id == runs.c.id)


def _from_run_query() -> Select[Any]:
    own = select(runs.c.id).where(runs.c.id == bindparam("run_id")).cte("own", recursive=True)
    child = runs.alias("child")
    own = own.union_all(
        select(child.c.id).select_from(own.join(child, child.c.parent_id == own.c.id))
    )
    return select(own.c.id)


_BELOW = _below_query()
_FROM_RUN = _from_run_query()

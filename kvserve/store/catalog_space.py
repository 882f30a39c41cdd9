"""What the index knows of room: sums, what is protected, what is shared, what is of no use.

State: none; functions over a connection, called by `kvserve.store.catalog` inside a transaction.
Finds and counts; what leaves for want of room is decided in `kvserve.store.guards`.

A conversation is **protected** when it was saved by order, or is pinned and the pin has not run
out. What lies on the path to its tip is never evicted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    CTE,
    ColumnElement,
    Connection,
    Select,
    and_,
    false,
    func,
    or_,
    select,
    text,
)
from sqlalchemy.dialects.sqlite import insert as upsert

from kvserve.store.catalog_conversations import named
from kvserve.store.catalog_prune import json_list
from kvserve.store.runs import PathUsage, Totals
from kvserve.store.tables import conversations, runs, writes

Key = tuple[str, str]
"""(tenant, conversation id)."""


def protected(now: datetime) -> ColumnElement[bool]:
    """Return the condition under which a conversation keeps its files."""
    until = conversations.c.pinned_until
    lasts = or_(until.is_(None), until > now)
    return or_(conversations.c.saved, and_(conversations.c.pinned, lasts))


def unreferenced(connection: Connection, before: datetime | None = None) -> list[int]:
    """Return the runs on no conversation's path, deepest first.

    With `before`, only those that have no file or were not used since then.
    """
    needed = _upwards(runs.c.id.in_(select(conversations.c.tip_id)))
    query = select(runs.c.id).where(runs.c.id.not_in(select(needed.c.id)))
    if before is not None:
        query = query.where(or_(runs.c.file.is_(None), runs.c.used_at < before))
    return list(connection.scalars(query.order_by(runs.c.start.desc())))


def usage(connection: Connection, keys: Sequence[Key]) -> dict[Key, PathUsage]:
    """Return what conversations hold on disk; unknown ones are left out."""
    rows = connection.execute(_usage_query(keys)).all()
    paths: Mapping[Key, list[Any]] = defaultdict(list)
    for row in rows:
        paths[(row.tenant, row.name)].append(row)
    return {key: _usage(path, _shared_until(connection, path)) for key, path in paths.items()}


def _usage(path: Sequence[Any], shared_until: int) -> PathUsage:
    """Sum up a path whose runs that start before `shared_until` are on other paths too."""
    untils = [row.start for row in path[1:]] + [path[-1].num_tokens]
    held = [(row, until) for row, until in zip(path, untils, strict=True) if row.file is not None]
    return PathUsage(
        nbytes=sum(row.nbytes for row, _ in held),
        shared_nbytes=sum(row.nbytes for row, _ in held if row.start < shared_until),
        held_tokens=sum(until - row.start for row, until in held),
        ranges=tuple(
            (row.start, until, row.nbytes * (until - row.start) // (row.end - row.start))
            for row, until in held
        ),
    )


def _shared_until(connection: Connection, path: Sequence[Any]) -> int:
    """Return a position: the runs of the path that start before it are on others' paths too.

    Looks from the tip upwards for the first run in which another conversation ends, or below
    which, off this path, one does. Then all above it are shared as well.
    """
    found = connection.scalar(
        _SHARED, {"path": json_list(row.id for row in path), "mine": path[0].conversation_id}
    )
    return 0 if found is None else int(found) + 1


def note_written(connection: Connection, nbytes: int, now: datetime) -> None:
    """Add to the bytes written on the UTC day of `now`."""
    row = upsert(writes).values(day=_day(now), nbytes=nbytes)
    connection.execute(
        row.on_conflict_do_update(set_={"nbytes": writes.c.nbytes + row.excluded.nbytes})
    )


def totals(connection: Connection, now: datetime) -> Totals:
    """Return the counts over everything."""
    num_files, nbytes = connection.execute(_HELD).one()
    today = select(writes.c.nbytes).where(writes.c.day == _day(now))
    return Totals(
        num_conversations=_number(connection, select(func.count()).select_from(conversations)),
        num_runs=_number(connection, select(func.count()).select_from(runs)),
        num_files=num_files,
        nbytes=nbytes,
        written_nbytes=_number(connection, select(func.sum(writes.c.nbytes))),
        today_nbytes=_number(connection, today),
    )


def _number(connection: Connection, query: Select[Any]) -> int:
    return int(connection.scalar(query) or 0)


def _day(now: datetime) -> str:
    return now.astimezone(UTC).date().isoformat()


def _upwards(tips: ColumnElement[bool]) -> CTE:
    """Return the ids of the runs chosen by `tips` and of all above them, each once."""
    above = select(runs.c.id, runs.c.parent_id).where(tips).cte("above", recursive=True)
    parent = runs.alias("parent")
    return above.union(
        select(parent.c.id, parent.c.parent_id).select_from(
            above.join(parent, parent.c.id == above.c.parent_id)
        )
    )


def _usage_query(keys: Sequence[Key]) -> Select[Any]:
    """Return the query of all runs on the paths to some conversations, root first."""
    path = (
        select(
            conversations.c.id.label("conversation_id"),
            *(conversations.c.tenant, conversations.c.name, conversations.c.num_tokens),
            conversations.c.tip_id.label("id"),
        )
        .where(conversations.c.tip_id.is_not(None), or_(false(), *(named(*key) for key in keys)))
        .cte("path", recursive=True)
    )
    path = path.union_all(
        select(
            *(path.c.conversation_id, path.c.tenant, path.c.name, path.c.num_tokens),
            runs.c.parent_id,
        ).select_from(path.join(runs, (runs.c.id == path.c.id) & runs.c.parent_id.is_not(None)))
    )
    return (
        select(path, runs.c.start, runs.c.end, runs.c.nbytes, runs.c.file)
        .join(runs, runs.c.id == path.c.id)
        .order_by(path.c.conversation_id, runs.c.start)
    )


# Child after child, and below each by depth: the first leaf mostly settles it, of maybe thousands.
_SHARED = text(
    """
    SELECT max(runs.start) FROM runs
    WHERE runs.id IN (SELECT value FROM json_each(:path)) AND (
        EXISTS (
            SELECT 1 FROM conversations
            WHERE conversations.tip_id = runs.id AND conversations.id <> :mine
        )
        OR EXISTS (
            SELECT 1 FROM runs AS child
            WHERE child.parent_id = runs.id
                AND child.id NOT IN (SELECT value FROM json_each(:path))
                AND EXISTS (
                    WITH RECURSIVE below (id, start) AS (
                        SELECT child.id, child.start
                        UNION ALL
                        SELECT deeper.id, deeper.start
                        FROM below JOIN runs AS deeper ON deeper.parent_id = below.id
                        ORDER BY 2 DESC
                    )
                    SELECT 1
                    FROM below CROSS JOIN conversations ON conversations.tip_id = below.id
                )
        )
    )
    """
)

# Told which index: SQLite else takes the one by name and looks up every row (0.24 s for 100,000).
_HELD = text(
    "SELECT count(*), coalesce(sum(nbytes), 0) FROM runs INDEXED BY ix_runs_age"
    " WHERE file IS NOT NULL"
)

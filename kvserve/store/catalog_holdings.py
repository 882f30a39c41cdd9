"""What lies on disk, as eviction sees it: every run with how it is used, in one reading.

State: none; a function over a connection, called in a transaction and off the loop. All of it and
not just the oldest, because whether enough can leave has to be known before anything does.
"""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Connection, Integer, func, or_, select, type_coerce

from kvserve.store.catalog_space import protected
from kvserve.store.guards import Holding
from kvserve.store.tables import Moment, conversations, runs


def holdings(connection: Connection, now: datetime) -> list[Holding]:
    """Return every run; those of conversations whose time is over are in nobody's use."""
    now_us = Moment().process_bind_param(now, connection.dialect)
    assert now_us is not None
    alive = or_(conversations.c.expires_at.is_(None), conversations.c.expires_at > now)
    tips = {
        row.tip_id: row
        for row in connection.execute(
            select(
                conversations.c.tip_id,
                func.max(conversations.c.num_messages).label("num_messages"),
                func.max(protected(now)).label("protected"),
            )
            .where(alive, conversations.c.tip_id.is_not(None))
            .group_by(conversations.c.tip_id)
        )
    }
    rows = connection.execute(
        select(
            *(runs.c.id, runs.c.parent_id, runs.c.start, runs.c.end),
            *(runs.c.nbytes, type_coerce(runs.c.used_at, Integer).label("used_us")),
        )
    )
    return [
        Holding(
            run_id=row.id,
            parent_id=row.parent_id,
            start=row.start,
            end=row.end,
            nbytes=row.nbytes,
            age_s=(now_us - row.used_us) / 1e6,
            num_turns=(tips[row.id].num_messages + 1) // 2 if row.id in tips else 0,
            protected=row.id in tips and bool(tips[row.id].protected),
        )
        for row in rows
    ]

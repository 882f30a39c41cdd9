"""Looking through the whole index, and making rows again from what files say of themselves.

State: none; functions over a connection, called by `kvserve.store.catalog` inside a transaction.
Compares rows with each other; comparing them with files is up to the caller.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from datetime import datetime
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import xxhash
from sqlalchemy import Connection, LargeBinary, func, or_, select, type_coerce

from kvserve.core.identity import ModelIdentity
from kvserve.core.keys import root_key
from kvserve.store.catalog_conversations import get_root
from kvserve.store.catalog_runs import add_run, fill_run, key_within
from kvserve.store.catalog_walk import RUN_COLUMNS, run_of
from kvserve.store.errors import TreeChanged
from kvserve.store.runs import Fill, Found, Run, RunRecord
from kvserve.store.tables import TOKEN_NBYTES, contents, conversations, identities, roots, runs

_CHUNK = 500
"""Runs that are read at a time; below the number of parameters that SQLite allows."""


class _Place(NamedTuple):
    """Where a run is in its tree, and what it is called."""

    id: int
    root_id: int
    parent_id: int | None
    start: int
    key: bytes


def runs_after(connection: Connection, last_id: int, limit: int) -> list[Run]:
    """Return the next runs by id."""
    query = (
        select(*RUN_COLUMNS)
        .join_from(runs, contents)
        .where(runs.c.id > last_id)
        .order_by(runs.c.id)
        .limit(limit)
    )
    return [run_of(row) for row in connection.execute(query).mappings()]


def known_files(connection: Connection, names: Iterable[str]) -> set[str]:
    """Return those of the names that a run has as its file."""
    wanted = list(names)
    known: set[str] = set()
    for at in range(0, len(wanted), _CHUNK):
        chunk = wanted[at : at + _CHUNK]
        known.update(connection.scalars(select(runs.c.file).where(runs.c.file.in_(chunk))))
    return known


def records(connection: Connection, run_ids: Collection[int]) -> dict[int, RunRecord]:
    """Return all that is known of at most some hundred runs; unknown ones are left out."""
    parent = runs.alias("parent")
    rows = connection.execute(
        select(
            *(*RUN_COLUMNS, contents.c.tokens, roots.c.namespace, identities.c.json),
            parent.c.key.label("parent_key"),
        )
        .select_from(runs)
        .join(contents, contents.c.run_id == runs.c.id)
        .join(roots, roots.c.id == runs.c.root_id)
        .join(identities)
        .outerjoin(parent, parent.c.id == runs.c.parent_id)
        .where(runs.c.id.in_(run_ids))
    )
    identity_of = cache(ModelIdentity.from_json)
    return {
        row["id"]: RunRecord(
            run=run_of(row),
            identity=identity_of(row["json"]),
            namespace=row["namespace"],
            parent_key=row["parent_key"],
            tokens=row["tokens"],
        )
        for row in rows.mappings()
    }


def restore(connection: Connection, found: Found, now: datetime) -> int | None:
    """Add or fill the run of a file; None if its place is not known or taken."""
    run, content = found.run, found.run.content
    assert content is not None
    root_id = get_root(connection, found.identity, found.namespace)
    parent_id = _place(connection, root_id, found)
    if parent_id is None and run.start:
        return None
    head = run.tokens[:1].astype("<u4").tobytes()
    there = connection.execute(
        select(runs.c.id, runs.c.end, runs.c.file, contents.c.tokens)
        .join_from(runs, contents)
        .where(
            *(runs.c.root_id == root_id, runs.c.parent_id.is_not_distinct_from(parent_id)),
            *(runs.c.start == run.start, runs.c.head == head),
        )
    ).one_or_none()
    try:
        if there is None:
            return add_run(connection, root_id, parent_id, run, writer_id=None, now=now)
        if there.file == content.file:
            return int(there.id)
        if not np.array_equal(there.tokens[: len(run.tokens)], run.tokens):
            return None
        fill = Fill(run_id=there.id, end=run.start + len(run.tokens), key=run.key, content=content)
        fill_run(connection, fill, writer_id=None, now=now)
    except TreeChanged:
        return None
    return int(there.id)


def _place(connection: Connection, root_id: int, found: Found) -> int | None:
    """Return the run to hang it on: the one it names, else one that ends where it starts.

    The prefix itself is not in a file, only its key; so the key of the place is computed.
    """
    start = found.run.start
    names = [runs.c.key == found.prefix_key]
    if found.parent_key is not None:
        names.append(runs.c.key == found.parent_key)
    rows = connection.scalars(
        select(runs.c.id).where(
            *(runs.c.root_id == root_id, runs.c.start < start, runs.c.end >= start, or_(*names))
        )
    )
    for run_id in rows.all():
        if key_within(connection, run_id, start) == found.prefix_key:
            return int(run_id)
    return None


def check(connection: Connection) -> list[str]:
    """Return what is wrong, in words; nothing if all is well."""
    wrong = [
        f"SQLite: {row[0]}"
        for row in connection.exec_driver_sql("PRAGMA integrity_check")
        if row[0] != "ok"
    ]
    wrong += [
        f"a row of {row[0]} names one of {row[2]} that is not there"
        for row in connection.exec_driver_sql("PRAGMA foreign_key_check")
    ]
    # Each check rests on what those before it found in order.
    for look in (_check_contents, _check_places, _check_tips, _check_keys):
        wrong = wrong or list(look(connection))
    return wrong


def _check_contents(connection: Connection) -> Iterator[str]:
    """Each run has its tokens, as many as its range says and the first as noted."""
    tokens = contents.c.tokens
    fits = (func.length(tokens) == (runs.c.end - runs.c.start) * TOKEN_NBYTES) & (
        func.substr(tokens, 1, TOKEN_NBYTES) == runs.c.head
    )
    query = select(runs.c.id).outerjoin(contents, contents.c.run_id == runs.c.id)
    bad = query.where(or_(tokens.is_(None), ~fits))
    return (f"the tokens of run {run_id} are not whole" for run_id in connection.scalars(bad))


def _check_places(connection: Connection) -> Iterator[str]:
    """Each child hangs on its parent, below the same root, and parts from its tokens there."""
    parent = runs.alias("parent")
    at = (runs.c.start - parent.c.start) * TOKEN_NBYTES + 1
    fits = (
        (parent.c.root_id == runs.c.root_id)
        & (parent.c.start < runs.c.start)
        & (parent.c.end >= runs.c.start)
        & (func.substr(contents.c.tokens, at, TOKEN_NBYTES) != runs.c.head)
    )
    query = (
        select(runs.c.id)
        .join(parent, parent.c.id == runs.c.parent_id)
        .join(contents, contents.c.run_id == parent.c.id)
        .where(~fits)
    )
    return (f"run {run_id} does not fit its parent" for run_id in connection.scalars(query).all())


def _check_tips(connection: Connection) -> Iterator[str]:
    """Each conversation ends in its tip, below its own root."""
    at = conversations.c.num_tokens
    fits = (runs.c.root_id == conversations.c.root_id) & (runs.c.start < at) & (runs.c.end >= at)
    query = (
        select(conversations.c.name).join(runs, runs.c.id == conversations.c.tip_id).where(~fits)
    )
    return (f"conversation {name} does not end in its tip" for name in connection.scalars(query))


def _check_keys(connection: Connection) -> Iterator[str]:
    """Each key is that of the tokens from the root; every token is read and hashed once."""
    above = select(roots.c.id, roots.c.namespace, identities.c.digest).join(identities)
    begun = {
        root.id: xxhash.xxh3_128(root_key(root.digest, root.namespace))
        for root in connection.execute(above).all()
    }
    below = _children(connection)
    waiting = below.pop(None, [])[::-1]
    hashers: dict[int, Any] = {}  # of what comes before a run, until it is its turn
    while waiting:
        # Depth first, so that few hashers wait; a query for each run would take most of the time.
        chunk: list[_Place] = []
        while waiting and len(chunk) < _CHUNK:
            chunk.append(waiting.pop())
            waiting.extend(reversed(below.get(chunk[-1].id, ())))
        tokens = _token_bytes(connection, [run.id for run in chunk])
        for run in chunk:
            hasher = hashers.pop(run.id, None) or begun[run.root_id].copy()
            data, done = tokens[run.id], 0
            for child in below.pop(run.id, ()):
                at = (child.start - run.start) * TOKEN_NBYTES
                hasher.update(data[done:at])
                hashers[child.id] = hasher.copy()
                done = at
            hasher.update(data[done:])
            if hasher.digest() != run.key:
                yield f"run {run.id} has the key of other tokens"


def _children(connection: Connection) -> dict[int | None, list[_Place]]:
    """Return all runs by what they hang on, in order of position there."""
    query = select(*(runs.c[name] for name in _Place._fields)).order_by(runs.c.start)
    below: dict[int | None, list[_Place]] = {}
    for row in connection.execute(query.execution_options(yield_per=_CHUNK)):
        place = _Place(*row)
        below.setdefault(place.parent_id, []).append(place)
    return below


def _token_bytes(connection: Connection, run_ids: list[int]) -> dict[int, bytes]:
    """Return the tokens of runs as they lie in the index."""
    query = select(contents.c.run_id, type_coerce(contents.c.tokens, LargeBinary).label("tokens"))
    rows = connection.execute(query.where(contents.c.run_id.in_(run_ids)))
    return {row.run_id: row.tokens for row in rows}

"""Growth of the tree of runs: add, fill, split.

State: none; functions over a connection, called by `kvserve.store.catalog` inside a write
transaction. They keep the tree's rules (`kvserve.store.tables`) and raise TreeChanged where the
caller's picture of the tree is out of date. Files are named here, never touched.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import Connection, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from kvserve.core.keys import prefix_key, root_key
from kvserve.core.types import TokenIds
from kvserve.store.catalog_walk import tokens_of, written_segments
from kvserve.store.errors import TreeChanged
from kvserve.store.runs import Fill, NewRun, RunFile
from kvserve.store.tables import (
    TOKEN_NBYTES,
    RunState,
    contents,
    conversations,
    identities,
    roots,
    runs,
)

NO_FILE: dict[str, Any] = {"file": None, "nbytes": 0, "digest": None}


def add_run(
    connection: Connection,
    root_id: int,
    parent_id: int | None,
    run: NewRun,
    *,
    writer_id: int | None,
    now: datetime,
) -> int:
    """Hang a run on `parent_id` at `run.start` and return its id. Raises TreeChanged."""
    end = run.start + len(run.tokens)
    if parent_id is not None:
        _check_place(connection, root_id, parent_id, run)
    elif run.start:
        raise TreeChanged("only the first run has no parent")
    values = {
        "root_id": root_id,
        "parent_id": parent_id,
        "start": run.start,
        "end": end,
        "head": _head(run.tokens),
        "key": run.key,
        "created_at": now,
        "used_at": now,
        "hits": 0,
        "writer_id": writer_id,
        **(NO_FILE | {"state": RunState.ABSENT} if run.content is None else _file(run.content)),
    }
    try:
        run_id: int = connection.execute(
            insert(runs).values(values).returning(runs.c.id)
        ).scalar_one()
    except IntegrityError as error:
        raise TreeChanged(f"a run that begins so is there already: {error.orig}") from error
    segments = "[]" if run.content is None else _segments(run.content, run.start, end)
    _add_contents(connection, run_id, segments, run.tokens)
    return run_id


def _check_place(connection: Connection, root_id: int, parent_id: int, run: NewRun) -> None:
    """Raise TreeChanged unless `run` may hang on its parent, whose own tokens it parts from."""
    at = (run.start - runs.c.start) * TOKEN_NBYTES + 1
    goes_on = func.substr(contents.c.tokens, at, TOKEN_NBYTES)
    parent = connection.execute(
        select(runs.c.start, runs.c.end, goes_on.label("goes_on"))
        .join_from(runs, contents)
        .where(runs.c.id == parent_id, runs.c.root_id == root_id)
    ).one_or_none()
    if parent is None or not parent.start < run.start <= parent.end:
        raise TreeChanged("the run to hang it on is gone or ends before it")
    if parent.goes_on == _head(run.tokens):
        raise TreeChanged("its parent goes on with the same token")


def fill_run(connection: Connection, fill: Fill, *, writer_id: int | None, now: datetime) -> None:
    """Give a file to a run without one, splitting it first if the file ends inside it.

    The run counts as written by who filled it. Raises TreeChanged.
    """
    row = connection.execute(
        select(runs.c.start, runs.c.end, runs.c.file).where(runs.c.id == fill.run_id)
    ).one_or_none()
    if row is None or row.file is not None or not row.start < fill.end <= row.end:
        raise TreeChanged("the run to fill is gone, has a file, or ends before it")
    segments = _segments(fill.content, row.start, fill.end)
    if fill.end < row.end:
        split_run(connection, fill.run_id, fill.end, fill.key)
    values = _file(fill.content) | {"used_at": now, "writer_id": writer_id}
    try:
        connection.execute(update(runs).where(runs.c.id == fill.run_id).values(values))
    except IntegrityError as error:
        raise TreeChanged(f"another run has this file: {error.orig}") from error
    connection.execute(
        update(contents).where(contents.c.run_id == fill.run_id).values(segments=segments)
    )


def split_run(connection: Connection, run_id: int, position: int, key: bytes) -> int:
    """Cut a run without a file in two at `position`, strictly inside it; return the lower's id.

    The upper part keeps the id and ends with `key`. What hung or ended behind `position` moves to
    the lower part. Raises TreeChanged.
    """
    upper = connection.execute(select(runs).where(runs.c.id == run_id)).one_or_none()
    if upper is None or upper.file is not None or not upper.start < position < upper.end:
        raise TreeChanged("only a run without a file can be split, inside")
    body = contents.c.run_id == run_id
    tokens = connection.execute(select(contents.c.tokens).where(body)).scalar_one()
    first, rest = tokens[: position - upper.start], tokens[position - upper.start :]
    connection.execute(update(runs).where(runs.c.id == run_id).values(end=position, key=key))
    connection.execute(update(contents).where(body).values(tokens=first))
    values = {name: value for name, value in upper._mapping.items() if name != "id"}
    values |= {"parent_id": run_id, "start": position, "head": _head(rest)}
    lower_id: int = connection.execute(
        insert(runs).values(values).returning(runs.c.id)
    ).scalar_one()
    _add_contents(connection, lower_id, "[]", rest)
    connection.execute(
        update(runs)
        .where(runs.c.parent_id == run_id, runs.c.start > position)
        .values(parent_id=lower_id)
    )
    connection.execute(
        update(conversations)
        .where(conversations.c.tip_id == run_id, conversations.c.num_tokens > position)
        .values(tip_id=lower_id)
    )
    return lower_id


def key_within(connection: Connection, run_id: int, position: int) -> bytes:
    """Return the key of the prefix that ends at `position`, in or at the end of a run.

    Raises TreeChanged where there is no such run.
    """
    row = connection.execute(
        select(identities.c.digest, roots.c.namespace)
        .join_from(runs, roots)
        .join(identities)
        .where(runs.c.id == run_id)
    ).one_or_none()
    if row is None:
        raise TreeChanged("the run is gone")
    root = root_key(row.digest, row.namespace)
    return prefix_key(root, tokens_of(connection, run_id, position))


def _file(content: RunFile) -> dict[str, Any]:
    return {
        "state": RunState.PRESENT,
        "file": content.file,
        "nbytes": content.nbytes,
        "digest": content.digest,
    }


def _segments(content: RunFile, start: int, end: int) -> str:
    """Return the segments of a file as they are kept; they must lie end to end."""
    ends = [start, *(spec.end for spec in content.specs)]
    if [spec.start for spec in content.specs] != ends[:-1] or ends[-1] != end:
        raise ValueError("the segments of a file lie end to end and cover its run")
    return written_segments(content.specs)


def _add_contents(connection: Connection, run_id: int, segments: str, tokens: TokenIds) -> None:
    values = {"run_id": run_id, "segments": segments, "tokens": tokens}
    connection.execute(insert(contents).values(values))


def _head(tokens: TokenIds) -> bytes:
    return tokens[:1].astype("<u4").tobytes()

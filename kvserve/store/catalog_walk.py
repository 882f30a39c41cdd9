"""Queries along paths of the tree of runs: down with a prompt, up from a tip.

State: none; functions over a connection, called by `kvserve.store.catalog` inside a transaction.
Changes nothing.

A walk is one recursive query. Each step finds the one child that hangs where the prompt leaves the
run so far, by the prompt's token there, and compares all its tokens: SQLite compares the bytes,
and where they differ `common_tokens` (`kvserve.store.database`) counts how many agree. By the
radix invariant there is at most one such child, wherever on the run it hangs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import orjson
from sqlalchemy import (
    CTE,
    Connection,
    Integer,
    LargeBinary,
    RowMapping,
    Select,
    bindparam,
    case,
    func,
    select,
)

from kvserve.core.types import TokenIds
from kvserve.store.runs import PathRun, Run, Walk
from kvserve.store.segments import SegmentSpec, StoredPath, StoredSegment
from kvserve.store.tables import TOKEN_NBYTES, RunState, contents, identities, roots, runs

RUN_COLUMNS = [*(column for column in runs.c if column.name != "head"), contents.c.segments]
"""What `run_of` reads; from `runs` joined with `contents`."""


def find_root(connection: Connection, digest: str, namespace: bytes) -> int | None:
    """Return the id of the root for an identity, by its digest, and a namespace."""
    found: int | None = connection.scalar(
        select(roots.c.id)
        .join(identities)
        .where(identities.c.digest == digest, roots.c.namespace == namespace)
    )
    return found


def walk(connection: Connection, root_id: int | None, namespace: bytes, ids: TokenIds) -> Walk:
    """Return how far the tree below the root agrees with a prompt. No root: not at all."""
    if root_id is None or not len(ids):
        return Walk(StoredPath(namespace, ids, 0, ()), ())
    prompt = ids.astype("<u4", copy=False).tobytes()
    rows = connection.execute(_WALK, {"root_id": root_id, "prompt": prompt}).mappings().all()
    path = path_runs([(run_of(row), row["matched"]) for row in rows])
    num_tokens = path[-1].until if path else 0
    segments = tuple(
        segment for at in path for segment in at.run.segments if segment.start < at.until
    )
    return Walk(StoredPath(namespace, ids, num_tokens, segments), path)


def path_runs(chain: Sequence[tuple[Run, int]]) -> tuple[PathRun, ...]:
    """Return a chain of runs, from the root down, as a path.

    Each run is left where the next begins, the last one at the position given with it.
    """
    starts = [run.start for run, _ in chain[1:]]
    return tuple(
        PathRun(run, start)
        for (run, _), start in zip(chain, [*starts, *(at for _, at in chain[-1:])], strict=True)
    )


def path_of(connection: Connection, tip_id: int | None, num_tokens: int) -> tuple[PathRun, ...]:
    """Return the runs from the root to the tip, which is left at `num_tokens`."""
    rows = connection.execute(_PATH, {"tip_id": tip_id}).mappings().all()
    return path_runs([(run_of(row), num_tokens) for row in rows])


def tokens_of(connection: Connection, tip_id: int | None, num_tokens: int) -> TokenIds:
    """Return the first `num_tokens` tokens of the path to the tip."""
    rows = connection.execute(_TOKENS, {"tip_id": tip_id}).all()
    starts = [row.start for row in rows[1:]]
    parts = [
        row.tokens[: until - row.start]
        for row, until in zip(rows, [*starts, *([num_tokens] if rows else [])], strict=True)
    ]
    return np.concatenate(parts) if parts else np.zeros(0, np.uint32)


def run_of(row: RowMapping) -> Run:
    """Return a row that holds `RUN_COLUMNS`."""
    present = row["state"] == RunState.PRESENT
    parts: Iterable[Sequence[Any]] = (
        orjson.loads(row["segments"]) if present else [(row["start"], row["end"], 0, 0, 0, ())]
    )
    segments = tuple(
        StoredSegment(
            run_id=row["id"],
            index=index,
            start=start,
            end=end,
            nbytes=nbytes,
            restorable=bool(restorable),
            whole=bool(whole),
            windows=dict(windows),
            readable=present,
        )
        for index, (start, end, nbytes, restorable, whole, windows) in enumerate(parts)
    )
    return Run(
        id=row["id"],
        parent_id=row["parent_id"],
        start=row["start"],
        end=row["end"],
        key=row["key"],
        state=row["state"],
        file=row["file"],
        nbytes=row["nbytes"],
        digest=row["digest"],
        hits=row["hits"],
        used_at=row["used_at"],
        segments=segments,
    )


def written_segments(specs: Sequence[SegmentSpec]) -> str:
    """Return the text from which `run_of` makes the segments."""
    parts = [
        (at.start, at.end, at.nbytes, int(at.restorable), int(at.whole), sorted(at.windows.items()))
        for at in specs
    ]
    return orjson.dumps(parts).decode()


def _walk_query() -> Select[Any]:
    prompt = bindparam("prompt", type_=LargeBinary)

    def agreed(run: Any, body: Any) -> Any:
        tokens = func.substr(prompt, run.c.start * TOKEN_NBYTES + 1, func.length(body.c.tokens))
        return run.c.start + case(
            (tokens == body.c.tokens, run.c.end - run.c.start),
            else_=func.common_tokens(tokens, body.c.tokens, type_=Integer),
        )

    def head(position: Any) -> Any:
        return func.substr(prompt, position * TOKEN_NBYTES + 1, TOKEN_NBYTES)

    run, body = runs.alias("run"), contents.alias("body")
    path = (
        select(run.c.id, agreed(run, body).label("matched"))
        .join(body, body.c.run_id == run.c.id)
        .where(run.c.root_id == bindparam("root_id"), run.c.parent_id.is_(None))
        .where(run.c.head == head(0))
        .cte("path", recursive=True)
    )
    path = path.union_all(
        select(run.c.id, agreed(run, body))
        .select_from(path.join(run, run.c.parent_id == path.c.id))
        .join(body, body.c.run_id == run.c.id)
        .where(run.c.start == path.c.matched, run.c.head == head(path.c.matched))
    )
    return _runs_on(path, *RUN_COLUMNS, path.c.matched)


def _upwards(*columns: Any) -> Select[Any]:
    path = (
        select(runs.c.id, runs.c.parent_id)
        .where(runs.c.id == bindparam("tip_id"))
        .cte("path", recursive=True)
    )
    parent = runs.alias("parent")
    path = path.union_all(
        select(parent.c.id, parent.c.parent_id).join(path, path.c.parent_id == parent.c.id)
    )
    return _runs_on(path, *columns)


def _runs_on(path: CTE, *columns: Any) -> Select[Any]:
    joined = path.join(runs, runs.c.id == path.c.id).join(contents, contents.c.run_id == path.c.id)
    return select(*columns).select_from(joined).order_by(runs.c.start)


_WALK = _walk_query()
_PATH = _upwards(*RUN_COLUMNS)
_TOKENS = _upwards(runs.c.start, contents.c.tokens)

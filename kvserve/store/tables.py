"""The tables of the index: what they hold, and the rules that SQLite itself enforces.

State: none; a description. `migrations/` holds the same tables as the steps that lead to them, and
a test compares the two. Does not query: that is `kvserve.store.catalog` and its modules.

    identities 1 ── n roots 1 ── n runs (each below a parent) 1 ── 1 contents
                            1 ── n conversations (each with a tip) 1 ── n messages
    writes: bytes per day

A **run** is the tokens `[start, end)` behind its parent; its KV lies in one file, or no longer does
(`file` is NULL). A child hangs at any position p of its parent, `parent.start < p <= parent.end`,
and `child.start == p`. Runs that continue one position begin with different tokens: the two unique
indexes on `head` hold that among siblings, and `kvserve.store.catalog_runs` between a child and the
tokens of its parent that it hangs before.

Tokens and segments lie in a table of their own, `contents`, so that scans over all runs read a
tenth of the index.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any

import numpy as np
from sqlalchemy import (
    Boolean,
    CheckConstraint,
    Column,
    Dialect,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
    text,
)

from kvserve.core.types import TokenIds

TOKEN_NBYTES = 4
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


class Moment(TypeDecorator[datetime]):
    """A wall time with its zone, kept as whole microseconds since 1970 in UTC."""

    impl = Integer
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> int | None:
        return None if value is None else (value - _EPOCH) // _MICROSECOND

    def process_result_value(self, value: Any | None, dialect: Dialect) -> datetime | None:
        return None if value is None else _EPOCH + timedelta(microseconds=value)


class Tokens(TypeDecorator[TokenIds]):
    """Token ids as little-endian uint32, whatever the machine."""

    impl = LargeBinary
    cache_ok = True

    def process_bind_param(self, value: TokenIds | None, dialect: Dialect) -> bytes | None:
        return None if value is None else value.astype("<u4", copy=False).tobytes()

    def process_result_value(self, value: Any | None, dialect: Dialect) -> TokenIds | None:
        return None if value is None else np.frombuffer(value, "<u4").astype(np.uint32, copy=False)


class RunState(StrEnum):
    """What became of a run's file: there; removed for room; found bad; never written."""

    PRESENT = "present"
    EVICTED = "evicted"
    QUARANTINED = "quarantined"
    ABSENT = "absent"


metadata = MetaData()

identities = Table(
    "identities",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("digest", Text, nullable=False),
    Column("json", Text, nullable=False),
    UniqueConstraint("digest", name="uq_identities_digest"),
)

roots = Table(
    "roots",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("identity_id", ForeignKey("identities.id", name="fk_roots_identity"), nullable=False),
    Column("namespace", LargeBinary, nullable=False),
    # Not by the root's key: callers choose a part of the namespace, and XXH3 can be collided.
    UniqueConstraint("identity_id", "namespace", name="uq_roots_namespace"),
)

runs = Table(
    "runs",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("root_id", ForeignKey("roots.id", name="fk_runs_root"), nullable=False),
    Column("parent_id", ForeignKey("runs.id", name="fk_runs_parent")),
    Column("start", Integer, nullable=False),
    Column("end", Integer, nullable=False),
    Column("head", LargeBinary, nullable=False),  # its first token
    Column("key", LargeBinary, nullable=False),  # of the prefix [0, end)
    Column("state", Text, nullable=False),
    Column("file", Text),
    Column("nbytes", Integer, nullable=False),  # of the file
    Column("digest", LargeBinary),
    Column("used_at", Moment, nullable=False),
    Column("created_at", Moment, nullable=False),
    Column("hits", Integer, nullable=False),
    # The conversation that wrote it; may be gone by now. Its id is never given again.
    Column("writer_id", Integer),
    CheckConstraint('start < "end" AND (parent_id IS NULL) = (start = 0)', name="ck_runs_range"),
    CheckConstraint("(file IS NULL) = (state <> 'present')", name="ck_runs_file"),
    Index(
        "uq_runs_branch",
        *("parent_id", "start", "head"),
        unique=True,
        sqlite_where=text("parent_id IS NOT NULL"),
    ),
    Index(
        "uq_runs_first",
        *("root_id", "head"),
        unique=True,
        sqlite_where=text("parent_id IS NULL"),
    ),
    Index("uq_runs_file", "file", unique=True, sqlite_where=text("file IS NOT NULL")),
    Index("ix_runs_age", "used_at", "nbytes", sqlite_where=text("file IS NOT NULL")),
    Index("ix_runs_writer", "writer_id", sqlite_where=text("writer_id IS NOT NULL")),
    Index("ix_runs_key", "key"),
    sqlite_autoincrement=True,  # an id that was used once never names another run
)

contents = Table(
    "contents",
    metadata,
    Column(
        "run_id",
        ForeignKey("runs.id", name="fk_contents_run", ondelete="CASCADE"),
        primary_key=True,
    ),
    Column("segments", Text, nullable=False),  # [[start, end, nbytes, restorable, whole, windows]]
    Column("tokens", Tokens, nullable=False),
)

conversations = Table(
    "conversations",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("root_id", ForeignKey("roots.id", name="fk_conversations_root"), nullable=False),
    Column("tip_id", ForeignKey("runs.id", name="fk_conversations_tip")),
    Column("num_tokens", Integer, nullable=False),
    Column("num_messages", Integer, nullable=False),
    Column("model", Text, nullable=False),
    Column("title", Text),
    Column("saved", Boolean, nullable=False),
    Column("pinned", Boolean, nullable=False),
    Column("pinned_until", Moment),
    Column("expires_at", Moment),
    Column("created_at", Moment, nullable=False),
    Column("used_at", Moment, nullable=False),
    Column("tip_digest", LargeBinary, nullable=False),
    Column("stem_digest", LargeBinary, nullable=False),
    Column("tools_digest", LargeBinary, nullable=False),
    Column("template_digest", LargeBinary, nullable=False),
    UniqueConstraint("tenant", "name", name="uq_conversations_name"),
    CheckConstraint("(tip_id IS NULL) = (num_tokens = 0)", name="ck_conversations_tip"),
    Index("ix_conversations_tip", "tip_id"),
    Index("ix_conversations_root", "root_id"),
    sqlite_autoincrement=True,
)

messages = Table(
    "messages",
    metadata,
    Column(
        "conversation_id",
        ForeignKey("conversations.id", name="fk_messages_conversation", ondelete="CASCADE"),
        primary_key=True,
    ),
    Column("position", Integer, primary_key=True, autoincrement=False),
    Column("role", Text, nullable=False),
    Column("digest", LargeBinary, nullable=False),  # of all messages up to this one
    Column("end", Integer),  # tokens; NULL where the template hides it
    sqlite_with_rowid=False,
)

writes = Table(
    "writes",
    metadata,
    Column("day", Text, primary_key=True),  # in UTC, as 2026-11-20
    Column("nbytes", Integer, nullable=False),
)

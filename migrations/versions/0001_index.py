"""The tables of the first release."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "identities",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("digest", sa.Text, nullable=False),
        sa.Column("json", sa.Text, nullable=False),
        sa.UniqueConstraint("digest", name="uq_identities_digest"),
    )
    op.create_table(
        "roots",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("identity_id", sa.Integer, nullable=False),
        sa.Column("namespace", sa.LargeBinary, nullable=False),
        sa.ForeignKeyConstraint(["identity_id"], ["identities.id"], name="fk_roots_identity"),
        sa.UniqueConstraint("identity_id", "namespace", name="uq_roots_namespace"),
    )
    op.create_table(
        "runs",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("root_id", sa.Integer, nullable=False),
        sa.Column("parent_id", sa.Integer),
        sa.Column("start", sa.Integer, nullable=False),
        sa.Column("end", sa.Integer, nullable=False),
        sa.Column("head", sa.LargeBinary, nullable=False),
        sa.Column("key", sa.LargeBinary, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("file", sa.Text),
        sa.Column("nbytes", sa.Integer, nullable=False),
        sa.Column("digest", sa.LargeBinary),
        sa.Column("used_at", sa.Integer, nullable=False),
        sa.Column("created_at", sa.Integer, nullable=False),
        sa.Column("hits", sa.Integer, nullable=False),
        sa.Column("writer_id", sa.Integer),
        sa.ForeignKeyConstraint(["root_id"], ["roots.id"], name="fk_runs_root"),
        sa.ForeignKeyConstraint(["parent_id"], ["runs.id"], name="fk_runs_parent"),
        sa.CheckConstraint(
            'start < "end" AND (parent_id IS NULL) = (start = 0)', name="ck_runs_range"
        ),
        sa.CheckConstraint("(file IS NULL) = (state <> 'present')", name="ck_runs_file"),
        sqlite_autoincrement=True,
    )
    for name, columns, unique, where in [
        ("uq_runs_branch", ["parent_id", "start", "head"], True, "parent_id IS NOT NULL"),
        ("uq_runs_first", ["root_id", "head"], True, "parent_id IS NULL"),
        ("uq_runs_file", ["file"], True, "file IS NOT NULL"),
        ("ix_runs_age", ["used_at", "nbytes"], False, "file IS NOT NULL"),
        ("ix_runs_writer", ["writer_id"], False, "writer_id IS NOT NULL"),
    ]:
        op.create_index(name, "runs", columns, unique=unique, sqlite_where=sa.text(where))
    op.create_index("ix_runs_key", "runs", ["key"])
    op.create_table(
        "contents",
        sa.Column("run_id", sa.Integer, primary_key=True),
        sa.Column("segments", sa.Text, nullable=False),
        sa.Column("tokens", sa.LargeBinary, nullable=False),
        sa.ForeignKeyConstraint(
            ["run_id"], ["runs.id"], name="fk_contents_run", ondelete="CASCADE"
        ),
    )
    op.create_table(
        "conversations",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("root_id", sa.Integer, nullable=False),
        sa.Column("tip_id", sa.Integer),
        sa.Column("num_tokens", sa.Integer, nullable=False),
        sa.Column("num_messages", sa.Integer, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("title", sa.Text),
        sa.Column("saved", sa.Boolean, nullable=False),
        sa.Column("pinned", sa.Boolean, nullable=False),
        sa.Column("pinned_until", sa.Integer),
        sa.Column("expires_at", sa.Integer),
        sa.Column("created_at", sa.Integer, nullable=False),
        sa.Column("used_at", sa.Integer, nullable=False),
        sa.Column("tip_digest", sa.LargeBinary, nullable=False),
        sa.Column("stem_digest", sa.LargeBinary, nullable=False),
        sa.Column("tools_digest", sa.LargeBinary, nullable=False),
        sa.Column("template_digest", sa.LargeBinary, nullable=False),
        sa.ForeignKeyConstraint(["root_id"], ["roots.id"], name="fk_conversations_root"),
        sa.ForeignKeyConstraint(["tip_id"], ["runs.id"], name="fk_conversations_tip"),
        sa.UniqueConstraint("tenant", "name", name="uq_conversations_name"),
        sa.CheckConstraint("(tip_id IS NULL) = (num_tokens = 0)", name="ck_conversations_tip"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_conversations_tip", "conversations", ["tip_id"])
    op.create_index("ix_conversations_root", "conversations", ["root_id"])
    op.create_table(
        "messages",
        sa.Column("conversation_id", sa.Integer, primary_key=True),
        sa.Column("position", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("role", sa.Text, nullable=False),
        sa.Column("digest", sa.LargeBinary, nullable=False),
        sa.Column("end", sa.Integer),
        sa.ForeignKeyConstraint(
            ["conversation_id"],
            ["conversations.id"],
            name="fk_messages_conversation",
            ondelete="CASCADE",
        ),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "writes",
        sa.Column("day", sa.Text, primary_key=True),
        sa.Column("nbytes", sa.Integer, nullable=False),
    )

"""The first tables."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make them."""
    for name in ("job", "attempt", "journal", "incident"):
        op.create_table(
            name,
            sa.Column("key", sa.Text, primary_key=True),
            sa.Column("job", sa.Text, nullable=True),
            sa.Column("state", sa.Text, nullable=False),
        )
    op.create_table(
        "stray",
        sa.Column("reason", sa.Text, primary_key=True),
        sa.Column("count", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "event",
        # SQLite numbers rows by itself only in a column of this very type.
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
        sa.Column("job", sa.Text, nullable=False),
        sa.Column("generation", sa.Integer, nullable=True),
        sa.Column("attempt", sa.Integer, nullable=True),
        sa.Column("rank", sa.Integer, nullable=True),
        sa.Column("incarnation", sa.Text, nullable=False),
        sa.Column("seq", sa.BigInteger, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("at", sa.Float, nullable=True),
        sa.Column("received_at", sa.Float, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.UniqueConstraint("incarnation", "seq", name="event_once"),
    )
    op.create_index("event_job", "event", ["job", "id"])
